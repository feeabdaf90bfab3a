"""The driver as a whole: every collaborator made once and handed to those who need it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from csi_driver.backends.base import Backend, Mends, shared
from csi_driver.backends.csidirect import Call, DirectDevices, nobody_calls
from csi_driver.backends.loopfile import LoopfileBackend
from csi_driver.backends.records import RecordCodec
from csi_driver.host.commands import Commands
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.files import Files
from csi_driver.host.fshealth import FileSystemHealth
from csi_driver.host.holders import Holders
from csi_driver.host.locks import VolumeLocks
from csi_driver.host.log import log
from csi_driver.host.loop import LoopDevices
from csi_driver.host.mounts import Mounts
from csi_driver.host.regularly import Regularly
from csi_driver.host.workers import Workers
from csi_driver.images.cluster import ClusterImages
from csi_driver.images.store import ImageStore
from csi_driver.keys.audit import Audit
from csi_driver.keys.config import KmsConfig
from csi_driver.keys.kubernetes import Kubernetes
from csi_driver.keys.ledger import KeyLedger
from csi_driver.keys.sources import KeySources
from csi_driver.luks.mapping import Mappings
from csi_driver.model.errors import DriverError, FailedPrecondition
from csi_driver.model.settings import Service, Settings
from csi_driver.model.volume import Move, MovePhase
from csi_driver.volumes.attachment import Attachments
from csi_driver.volumes.condition import Conditions
from csi_driver.volumes.drift import KeyDrift
from csi_driver.volumes.encryption import Encryption
from csi_driver.volumes.expand import Expansion
from csi_driver.volumes.filesystem import FileSystems
from csi_driver.volumes.from_image import BackingImages
from csi_driver.volumes.healing import Healing
from csi_driver.volumes.health import Health
from csi_driver.volumes.keys import VolumeKeys
from csi_driver.volumes.keyslots import KeySlots
from csi_driver.volumes.kms_health import KmsHealth
from csi_driver.volumes.moved import Homes
from csi_driver.volumes.presence import Presences
from csi_driver.volumes.provision import Provisioning
from csi_driver.volumes.publish import Publishing
from csi_driver.volumes.rekey import Rekeying
from csi_driver.volumes.rotation import LOOK_SECONDS, KeyRotation
from csi_driver.volumes.stage import Staging
from csi_driver.volumes.stages import Stages
from csi_driver.volumes.standing import StandingVolumes
from csi_driver.volumes.statedir import NODE_MOUNTS, StateDirectory, identity_of
from csi_driver.volumes.usage import Usages

if TYPE_CHECKING:
    from csi_driver.volumes.offline import Offline

WARM = (
    "csi_driver.luks.cloned",
    "csi_driver.luks.device",
    "csi_driver.luks.recovery",
    "csi_driver.luks.rekey",
    "csi_driver.luks.two_keys",
    "csi_driver.host.commands",
    "csi_driver.host.fshealth",
    "csi_driver.host.growfs",
    "csi_driver.host.mounts",
    "csi_driver.host.signatures",
    "csi_driver.luks.libcryptsetup:load_library_if_present",
)
"""What workers need, loaded ahead in their launcher."""


_STANDING_SECONDS = 10.0
_MENDING_SECONDS = 20.0


@dataclass(frozen=True)
class Host:
    """The operating system's seams; tests that inject faults put theirs here.

    `below` calls the drivers that the kubelet with that folder knows: gRPC is none of this layer's.
    """

    files: Files = field(default_factory=Files)
    workers: Workers = field(default_factory=lambda: Workers(WARM))
    loops: LoopDevices = field(default_factory=LoopDevices)
    mapper: DeviceMapper = field(default_factory=DeviceMapper)
    mounts: Mounts = field(default_factory=Mounts)
    holders: Holders = field(default_factory=Holders)
    sources: KeySources | None = None
    backend: Backend | None = None
    below: Callable[[Path], Call] = lambda _: nobody_calls


@dataclass(frozen=True)
class Driver:
    """The use cases, ready to be called."""

    settings: Settings
    workers: Workers
    state: StateDirectory
    locks: VolumeLocks
    backend: Backend
    mappings: Mappings
    encryption: Encryption
    sources: KeySources
    keys: VolumeKeys
    rekeying: Rekeying
    rotation: KeyRotation
    provisioning: Provisioning
    attachments: Attachments | None
    staging: Staging
    publishing: Publishing
    expansion: Expansion
    healing: Healing
    usage: Usages
    conditions: Conditions
    health: Health
    kms_health: KmsHealth
    mends: Sequence[Regularly]
    jobs: Sequence[Regularly]
    offline: Callable[[], "Offline"]

    def start(self) -> None:
        """Make the folders. The worker launcher starts with the first call, or with `warm_up`.

        Raises FailedPrecondition when the state directory cannot be made, or is not the one that it was.
        """
        self.state.start()
        if self.backend.name != self.settings.backend:
            raise FailedPrecondition(
                f"the state directory {self.settings.state_dir} has volumes of the backend {self.backend.name} and "
                f"{self.settings.backend} is to be served; name that backend, or another state directory"
            )
        try:
            for folder in ("locks", "stages"):
                (self.settings.state_dir / folder).mkdir(mode=0o700, exist_ok=True)
            self.backend.prepare()
        except OSError as error:
            raise FailedPrecondition(
                f"the state directory {self.settings.state_dir} cannot be made ({error.strerror}); make it a writable "
                f"folder"
            ) from None

        if Service.NODE in self.settings.services:
            try:
                self.mappings.names()
            except DriverError as error:
                log.warning("no encrypted volume can be staged on this host", error=str(error))

    def warm_up(self) -> None:
        """Start the worker launcher ahead of the first call that needs it."""
        self.workers.start()

    def stop(self) -> None:
        """End the worker launcher, and close what is open to key sources; what is staged stays staged."""
        self.sources.close()
        self.workers.stop()


def key_sources(settings: Settings, workers: Workers) -> KeySources:
    """The key sources of a node: its KMS configuration and, in a cluster, the Kubernetes API."""
    kubernetes = Kubernetes(
        os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    )
    config = KmsConfig(settings.kms_config, kubernetes)
    return KeySources(config, kubernetes, workers, settings.kms_programs, Audit(settings.audit_file))


def make_backend(settings: Settings, host: Host) -> Backend:
    """What keeps the ciphertext; nothing is started or touched yet.

    A state directory that had a volume group, volumes over another driver or images of Ceph keeps that, so that no
    command beside the server has to be told.
    """
    state = settings.state_dir
    memory = state / "lvm.json"
    over = state / "csi.json"
    if settings.backend == "csi" or over.exists():
        return _csi(settings, host, state / "csi", over)
    if settings.backend == "lvm" or memory.exists():
        return _lvm(settings, host, state / "lvm", memory)
    of_ceph = state / "rbd.json"
    if settings.backend == "rbd" or of_ceph.exists():
        return _rbd(settings, host, state / "rbd", of_ceph)
    folder = state / "loopfile"
    return LoopfileBackend(folder, settings.free_space_floor, host.files, host.loops, RecordCodec())


def _lvm(settings: Settings, host: Host, folder: Path, memory: Path) -> Backend:
    from csi_driver.backends.lvm import LvmBackend  # noqa: PLC0415 - who has no volume group pays nothing for it
    from csi_driver.backends.lvmrecords import GroupRecords, remembered_name  # noqa: PLC0415
    from csi_driver.backends.lvmtool import VolumeGroup  # noqa: PLC0415

    commands, limits = Commands(host.workers), settings.limits
    group = VolumeGroup(settings.volume_group or remembered_name(memory), commands, limits.mount_seconds)
    records = GroupRecords(
        group, folder, memory, host.files, host.workers, commands, host.mapper, host.mounts, limits,
        partial(identity_of, settings.state_dir),
    )  # fmt: skip
    return LvmBackend(
        group,
        records,
        RecordCodec(),
        host.files,
        host.workers,
        host.mapper,
        limits,
        settings.thin_pool_limit / 100,
    )


def _csi(settings: Settings, host: Host, folder: Path, memory: Path) -> Backend:
    from csi_driver.backends.csi import CsiBackend  # noqa: PLC0415 - who has no Kubernetes below pays nothing for it
    from csi_driver.backends.csiclaims import Claims  # noqa: PLC0415
    from csi_driver.backends.csiheaders import HeaderCopies  # noqa: PLC0415
    from csi_driver.backends.csiholders import HolderPods, image_of  # noqa: PLC0415
    from csi_driver.backends.csinode import NodeDevices  # noqa: PLC0415
    from csi_driver.backends.csipins import Pins  # noqa: PLC0415
    from csi_driver.backends.csiplace import Place, read_place  # noqa: PLC0415
    from csi_driver.backends.csirecords import RecordObjects  # noqa: PLC0415
    from csi_driver.kube.client import Kube  # noqa: PLC0415

    kube = Kube.of()
    is_server = settings.backend == "csi"
    if is_server:
        place = Place.of(settings, settings.namespace or kube.namespace)
    else:  # a command beside the server
        place = read_place(memory)
        settings = replace(settings, driver_name=place.driver_name, kubelet_dir=Path(place.kubelet_dir))
    # Asked when the first holder is made: the API may be away at the start.
    own_image = cache(partial(image_of, kube, kube.namespace, settings.pod_name))
    records = RecordObjects(kube, place.namespace, RecordCodec())
    pins = Pins(settings.holders_dir, host.files)
    direct = DirectDevices(host.below(settings.kubelet_dir), settings.kubelet_dir, settings.driver_name)
    return CsiBackend(
        records,
        HeaderCopies(kube, place.namespace, records, folder, host.files),
        Claims(kube, place.namespace, settings.driver_name),
        HolderPods(kube, place.namespace, lambda: settings.holder_image or own_image(), settings.holders_dir),
        NodeDevices(kube, records, pins, direct, place.node_id, settings.driver_below),
        is_node=place.is_node,
        node_topology=settings.topology_key,
        remember=partial(place.write, memory, host.files) if is_server else lambda: None,
    )


def _has_left(settings: Settings, host: Host, move: Move) -> bool:
    """Whether the other driver of this node, by its state directory, says that the volume has left it."""
    other = replace(settings, state_dir=Path(move.other), backend=Settings.backend, volume_group="")
    found = make_backend(other, host).get(move.volume_id).move
    return found is not None and (found.phase, found.id) == (MovePhase.LEFT, move.id)


def _rbd(settings: Settings, host: Host, folder: Path, memory: Path) -> Backend:
    from csi_driver.backends.rbd import RbdBackend  # noqa: PLC0415 - who has no Ceph pays nothing for it
    from csi_driver.backends.rbdaccess import CephAccess  # noqa: PLC0415
    from csi_driver.backends.rbdclients import CephClients  # noqa: PLC0415
    from csi_driver.backends.rbddevices import MappedVolumes  # noqa: PLC0415
    from csi_driver.backends.rbdimages import Images  # noqa: PLC0415
    from csi_driver.backends.rbdmemory import Memory, read_memory  # noqa: PLC0415
    from csi_driver.backends.rbdnodes import NodeAttachments  # noqa: PLC0415
    from csi_driver.backends.rbdplace import Clusters  # noqa: PLC0415
    from csi_driver.backends.rbdrecords import VolumeLogs  # noqa: PLC0415
    from csi_driver.host.krbd import MappedImages  # noqa: PLC0415

    is_server = settings.backend == "rbd"
    told = Memory.of(settings) if is_server else read_memory(memory)
    secrets = list(dict.fromkeys(Path(each) for each in (settings.ceph_secret, told.ceph_secret) if each))
    limits, logs = settings.limits, VolumeLogs()
    clients = CephClients(host.workers, limits.mount_seconds)
    devices = MappedVolumes(folder, host.files, host.workers, MappedImages(), limits.mount_seconds)
    return RbdBackend(
        folder,
        CephAccess(Clusters(Path(told.ceph_config)), clients, secrets),
        logs,
        Images(logs, limits.format_seconds),
        NodeAttachments(logs, told.node_id, devices.boot),
        devices,
        RecordCodec(),
        host.files,
        is_central=told.is_central,
        remember=partial(told.write, memory, host.files) if is_server else lambda: None,
    )


def build_driver(settings: Settings, host: Host | None = None) -> Driver:
    """Put the driver together; nothing is started or touched yet."""
    host = host or Host()
    state = settings.state_dir
    directory = StateDirectory(
        state,
        settings.endpoint,
        host.files,
        host.mounts,
        Mounts(NODE_MOUNTS),
        require_mount=settings.require_mount,
    )
    backend = host.backend or make_backend(settings, host)
    mappings = Mappings(host.mapper, host.holders)
    stages = Stages(state / "stages", host.files)
    presences = Presences(backend, stages, mappings, host.mounts)
    commands = Commands(host.workers)
    storage = shared(backend)
    # Whether a volume outside the node exists its storage alone tells, which may not answer: its lock's file goes.
    is_known = backend.has if storage is None else (lambda _: False)
    locks = VolumeLocks(state / "locks", host.holders, is_known, remade=True)
    slots = KeySlots(host.workers, settings.limits)
    encryption = Encryption(host.workers, mappings, slots, settings.limits)
    sources = host.sources or key_sources(settings, host.workers)
    keys = VolumeKeys(sources, KeyLedger(state, host.files))
    file_systems = FileSystems(host.workers, commands, host.mounts, host.holders, settings.limits)
    ailments = FileSystemHealth(host.mounts)
    healing = Healing(backend, presences, host.workers, file_systems, ailments)
    here = state / "images"
    images = BackingImages(
        ImageStore(here, host.files), ClusterImages(here), host.workers, slots, keys, settings.limits
    )
    drift = KeyDrift(backend, stages, slots, keys)
    homes = Homes(backend, partial(_has_left, settings, host))
    rekeying = Rekeying(backend, presences, host.workers, slots, keys)
    staging = Staging(
        backend, directory.check, stages, presences, host.workers, encryption, file_systems, mappings, healing, drift,
        keys, rekeying, homes,
    )  # fmt: skip
    is_node = Service.NODE in settings.services
    # A central controller has no devices, and may not look for any; whether a volume is in use its storage knows.
    release = staging.release if is_node or storage is None else lambda _: None
    mends = []
    if isinstance(backend, Mends):
        mending = partial(backend.mend, locks.hold)
        mends.append(Regularly("backend", mending, _MENDING_SECONDS, first=_MENDING_SECONDS))
    standing = StandingVolumes(backend, locks, presences, host.workers, host.mapper, encryption)
    rotation = KeyRotation(backend, locks, rekeying, directory.check)

    def offline() -> "Offline":
        from csi_driver.volumes.offline import Offline  # noqa: PLC0415 - a server starts without it

        return Offline(
            settings.limits, host, backend, locks, stages, presences, mappings, commands, slots, encryption,
            file_systems, sources, keys, rekeying, homes, state,
        )  # fmt: skip

    return Driver(
        settings=settings,
        workers=host.workers,
        state=directory,
        locks=locks,
        backend=backend,
        mappings=mappings,
        encryption=encryption,
        sources=sources,
        keys=keys,
        rekeying=rekeying,
        rotation=rotation,
        provisioning=Provisioning(settings, backend, images, directory.check, release, keys),
        attachments=Attachments(backend, storage) if storage is not None else None,
        staging=staging,
        publishing=Publishing(backend, presences, host.mounts, host.holders, file_systems, healing),
        expansion=Expansion(
            backend, directory.check, presences, host.workers, encryption, slots, file_systems, healing, keys
        ),
        healing=healing,
        usage=Usages(backend, presences),
        conditions=Conditions(backend, presences, ailments),
        health=Health(
            settings, backend, stages, commands, host.mapper, mappings, host.mounts, directory.check, sources.checked
        ),
        mends=mends,
        jobs=(
            Regularly("standing volumes", standing.look, _STANDING_SECONDS),
            Regularly("rotation", rotation.look, LOOK_SECONDS, first=LOOK_SECONDS),
        ),
        kms_health=KmsHealth(sources),
        offline=offline,
    )
