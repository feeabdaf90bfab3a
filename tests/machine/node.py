"""The driver's use cases on one node, called as its gRPC server calls them, with seams at which tests plant bugs."""

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.backends.base import Backend
from csi_driver.backends.loopfile import LoopfileBackend
from csi_driver.backends.records import RecordCodec
from csi_driver.host import blockdev
from csi_driver.host.commands import Commands
from csi_driver.host.devicemapper import Device, DeviceMapper
from csi_driver.host.files import Files
from csi_driver.host.fshealth import FileSystemHealth
from csi_driver.host.holders import Holders
from csi_driver.host.locks import VolumeLocks
from csi_driver.host.loop import LoopDevices, LoopInfo
from csi_driver.host.mounts import Mounts
from csi_driver.host.workers import Workers
from csi_driver.images.cluster import ClusterImages
from csi_driver.images.store import ImageStore
from csi_driver.keys.secret import read_secret
from csi_driver.luks.header import Header, parse
from csi_driver.luks.mapping import Mappings
from csi_driver.model.settings import Limits, Settings
from csi_driver.model.volume import EncryptionState, FileSystemState, Move, VolumeRecord, mapping_name
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.conversion import Conversions
from csi_driver.volumes.drift import KeyDrift
from csi_driver.volumes.encryption import Encryption
from csi_driver.volumes.expand import ExpandRequest, Expansion
from csi_driver.volumes.export import Exports
from csi_driver.volumes.filesystem import FileSystems
from csi_driver.volumes.from_image import BackingImages
from csi_driver.volumes.healing import Healing
from csi_driver.volumes.keys import VolumeKeys
from csi_driver.volumes.keyslots import KeySlots
from csi_driver.volumes.move import Moves
from csi_driver.volumes.move_copy import Place as MovePlace
from csi_driver.volumes.moved import HasLeft, Homes
from csi_driver.volumes.presence import Presences
from csi_driver.volumes.provision import CreateRequest, Provisioning, VolumeView
from csi_driver.volumes.publish import Publishing, PublishRequest
from csi_driver.volumes.rekey import Rekeying
from csi_driver.volumes.stage import StageRequest, Staging
from csi_driver.volumes.stages import Stages
from csi_driver.volumes.standing import StandingVolumes
from csi_driver.volumes.usage import Usages
from tests.fake_host import no_kms
from tests.headers import head_of
from tests.machine.places import RECORDS_ARE_FILES, Place, current, id_of, length_of, name_of, of_class

MIB = 1 << 20
SIZE = 16 * MIB
DATA_OFFSET = 16 * MIB
NAME = "pvc-1"
VOLUME = id_of(NAME)
"""The volume of most tests, as CreateVolume calls it, and its id."""
PASSPHRASE = "plain oak table, seven chairs"
SECRET: Mapping[str, str] = {"CRYPTO_KEY_VALUE": PASSPHRASE}
CHEAP: Mapping[str, str] = {"encrypted": "true", "pbkdf": "pbkdf2", "pbkdfIterations": "1000"}
NONE: Mapping[str, str] = {}
MOUNT = Capability(AccessMode.SINGLE_NODE_WRITER, block=False)
EXT4 = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="ext4")
BLOCK = Capability(AccessMode.SINGLE_NODE_WRITER, block=True)
LIMITS = Limits(format_seconds=20, unlock_seconds=20, mount_seconds=20)


def fingerprint(path: Path) -> str:
    """A digest of all that is not zero in a sparse file, without reading its holes; BLANK when there is nothing.

    Of a device all is read, past what the kernel has of it.
    """
    digest, at = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while (piece := _next_data(descriptor, at)) is not None:
            at, content = piece
            if content.strip(b"\0"):
                digest.update(b"%d:" % at + content)
            at += len(content)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _next_data(descriptor: int, at: int) -> tuple[int, bytes] | None:
    if stat.S_ISBLK(os.fstat(descriptor).st_mode):
        os.posix_fadvise(descriptor, at, MIB, os.POSIX_FADV_DONTNEED)
        content = os.pread(descriptor, MIB, at)
        return (at, content) if content else None
    try:
        start = os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError:  # ENXIO: only a hole is left
        return None
    # Whole blocks, so that where one piece ends does not depend on what is a hole.
    return start, os.pread(descriptor, 4096, start)


BLANK = hashlib.sha256().hexdigest()


def nowhere_else(_: Move) -> bool:
    """There is no other driver on this node."""
    return False


@dataclass
class Node:
    """A driver on the state directory below `folder`; a second one on the same folder is the driver after a restart.

    Staging paths are <folder>/stage/<volume>, pods' paths <folder>/pods/<volume>.
    """

    folder: Path
    workers: Workers
    limits: Limits = LIMITS
    backend: Backend | None = None
    make_commands: Callable[[Workers], Commands] = Commands
    loops: LoopDevices = field(default_factory=LoopDevices)
    make_mappings: Callable[[DeviceMapper, Holders], Mappings] = Mappings
    make_slots: Callable[[Workers, Limits], KeySlots] = KeySlots
    make_encryption: Callable[[Workers, Mappings, KeySlots, Limits], Encryption] = Encryption
    given_keys: VolumeKeys | None = None
    has_left: HasLeft = nowhere_else
    stretch: int = MIB
    files: Files = field(default_factory=Files)

    def __post_init__(self) -> None:
        self.state = self.folder / "state"
        for name in ("locks", "stages"):
            (self.state / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        settings = Settings(node_id="node-1", state_dir=self.state, free_space_floor=64 * MIB, limits=self.limits)
        loopfile = LoopfileBackend(
            self.state / "loopfile", settings.free_space_floor, self.files, self.loops, RecordCodec()
        )
        loopfile.prepare()
        self.store: Backend = self.backend or self._elsewhere() or loopfile
        self.mapper, self.mounts, holders = DeviceMapper(), Mounts(), Holders()
        self.locks = VolumeLocks(self.state / "locks", holders, self.store.has, remade=True)
        self.stages = Stages(self.state / "stages", self.files)
        self.mappings = self.make_mappings(self.mapper, holders)
        self.slots = self.make_slots(self.workers, self.limits)
        self.encryption = self.make_encryption(self.workers, self.mappings, self.slots, self.limits)
        file_systems = FileSystems(self.workers, self.make_commands(self.workers), self.mounts, holders, self.limits)
        self.keys = self.given_keys or no_kms()
        here = self.state / "images"
        images = BackingImages(
            ImageStore(here, Files()), ClusterImages(here), self.workers, self.slots, self.keys, self.limits
        )

        def healthy() -> None:
            """The state directory is the one that it was."""

        presences = Presences(self.store, self.stages, self.mappings, self.mounts)
        healing = Healing(self.store, presences, self.workers, file_systems, FileSystemHealth(self.mounts))
        self.rekeying = Rekeying(self.store, presences, self.workers, self.slots, self.keys)
        drift = KeyDrift(self.store, self.stages, self.slots, self.keys)
        self.homes = Homes(self.store, self.has_left)
        self.staging = Staging(
            self.store,
            healthy,
            self.stages,
            presences,
            self.workers,
            self.encryption,
            file_systems,
            self.mappings,
            healing,
            drift,
            self.keys,
            self.rekeying,
            self.homes,
        )
        self.provisioning = Provisioning(settings, self.store, images, healthy, self.staging.release, self.keys)
        self.publishing = Publishing(self.store, presences, self.mounts, holders, file_systems, healing)
        self.expansion = Expansion(
            self.store, healthy, presences, self.workers, self.encryption, self.slots, file_systems, healing, self.keys
        )
        self.conversions = Conversions(
            self.store,
            self.locks,
            presences,
            self.stages,
            self.workers,
            self.mapper,
            self.encryption,
            self.slots,
            self.keys,
            self.limits,
            MIB,
        )
        self.moves = Moves(
            MovePlace(self.state, self.store, self.locks, presences), self.workers, self.keys, self.limits, self.stretch
        )
        self.exports = Exports(self.store, self.locks, presences, self.loops, self.slots)
        self.standing = StandingVolumes(self.store, self.locks, presences, self.workers, self.mapper, self.encryption)
        self.presences, self.healing = presences, healing
        self.usages = Usages(self.store, presences)
        self.workers.start()

    def _elsewhere(self) -> Backend | None:
        return self.place.backend(self.state, self.workers) if self.place is not None else None

    @property
    def place(self) -> Place | None:
        """Where volumes are that have no other `backend`, while there is such a place; else they are files."""
        return current() if self.backend is None else None

    @contextlib.contextmanager
    def _call(self, volume: str) -> Iterator[str]:
        """A call of the driver for a volume, by name or id; its id."""
        if self.place is not None:
            self.place.before_call()
        volume_id = self._id(volume)
        with self.locks.hold(volume_id):
            yield volume_id

    def _id(self, volume: str) -> str:
        """Of a volume that is given by name or id."""
        return id_of(volume) if self.place is not None else volume

    def create(
        self,
        volume: str = NAME,
        *,
        size: int = SIZE,
        parameters: Mapping[str, str] = CHEAP,
        capability: Capability = MOUNT,
        secret: Mapping[str, str] = SECRET,
    ) -> VolumeView:
        told = of_class(parameters) if self.place is not None else parameters
        name = name_of(volume) if self.place is not None else volume
        request = CreateRequest(name, size, 0, (capability,), told, read_secret(secret))
        with self._call(volume) as volume_id:
            made = self.provisioning.create(request)
            if self.place is not None:
                self.place.give(self.store, volume_id)
            return made

    def stage(
        self,
        volume: str = NAME,
        capability: Capability = MOUNT,
        *,
        secret: Mapping[str, str] = SECRET,
        context: Mapping[str, str] = NONE,
        path: Path | None = None,
    ) -> None:
        path = path or self.staging_path(volume)
        with contextlib.suppress(FileExistsError):  # not a look at what is mounted there
            path.mkdir(parents=True)
        with self._call(volume) as volume_id:
            self.staging.stage(StageRequest(volume_id, str(path), capability, read_secret(secret), context))

    def unstage(self, volume: str = NAME, *, path: Path | None = None) -> None:
        with self._call(volume) as volume_id:
            self.staging.unstage(volume_id, str(path or self.staging_path(volume)))

    def publish(
        self,
        volume: str = NAME,
        capability: Capability = MOUNT,
        *,
        target: Path | None = None,
        read_only: bool = False,
    ) -> Path:
        target = target or self.target_path(volume)
        staging_path = str(self.staging_path(volume))
        with self._call(volume) as volume_id:
            self.publishing.publish(PublishRequest(volume_id, staging_path, str(target), capability, read_only, NONE))
        return target

    def unpublish(self, volume: str = NAME, *, target: Path | None = None) -> None:
        with self._call(volume) as volume_id:
            self.publishing.unpublish(volume_id, str(target or self.target_path(volume)))

    def grow(self, size: int, volume: str = NAME) -> int:
        """ControllerExpandVolume."""
        with self._call(volume) as volume_id:
            return self.provisioning.expand(volume_id, size, 0)

    def expand(
        self, size: int, volume: str = NAME, *, path: Path | None = None, secret: Mapping[str, str] = NONE
    ) -> int:
        """NodeExpandVolume, by default without a secret, as Longhorn's and Ceph-CSI's classes have it."""
        shown = str(path or self.staging_path(volume))
        with self._call(volume) as volume_id:
            return self.expansion.expand(ExpandRequest(volume_id, shown, size, 0, read_secret(secret)))

    def delete(self, volume: str = NAME) -> None:
        with self._call(volume) as volume_id:
            if self.place is not None:
                self.place.take(self.store, volume_id)
            self.provisioning.delete(volume_id)

    def staging_path(self, volume: str = NAME) -> Path:
        return self.folder / "stage" / self._id(volume)

    def target_path(self, volume: str = NAME) -> Path:
        return self.folder / "pods" / self._id(volume) / "mount"

    def disk(self, volume: str = NAME) -> Path:
        """The backing file of a volume on loopfile, else its bytes where they are shown."""
        if self.place is not None:
            return self.place.shown(self._id(volume))
        return self.state / "loopfile" / "volumes" / volume / "disk.img"

    def disk_bytes(self, volume: str = NAME) -> int:
        """Its length."""
        return length_of(self.disk(volume))

    def rounded(self, size: int) -> int:
        """How long it is made for so many bytes."""
        unit = 1 if self.place is None else self.place.rounding
        return -(-size // unit) * unit

    def plain_device(self, volume: str = NAME) -> Path:
        """What shows a staged volume that is not encrypted."""
        device = self.store.device_of(self._id(volume))
        assert device is not None, f"volume {volume} is not attached"
        with contextlib.closing(device):
            return Path("/dev", blockdev.kernel_name(device.number))

    def record_file(self, volume: str = NAME) -> Path:
        """Where records are files."""
        assert RECORDS_ARE_FILES
        if self.place is not None:
            return self.state / "lvm/volumes" / volume / "record.json"
        return self.disk(volume).with_name("record.json")

    def raw_record(self, volume: str = NAME) -> bytes:
        """A volume's record as it is kept."""
        if self.place is not None:
            return self.place.raw_record(self._id(volume))
        return self.record_file(volume).read_bytes()

    def put_record(self, content: bytes, volume: str = NAME) -> None:
        """Put another record in place of a volume's."""
        if self.place is not None:
            self.place.put_record(self._id(volume), content)
        else:
            self.record_file(volume).write_bytes(content)

    def record(self, volume: str = NAME) -> VolumeRecord:
        return self.store.get(self._id(volume))

    def encryption_state(self, volume: str = NAME) -> EncryptionState | None:
        return self.record(volume).encryption

    def file_system_state(self, volume: str = NAME) -> FileSystemState:
        return self.record(volume).file_system

    def header(self, volume: str = NAME) -> Header:
        """The LUKS2 header on the backing file."""
        return parse(head_of(self.disk(volume)), f"the test's volume {volume}")

    def mapping(self, volume: str = NAME) -> Device | None:
        return self.mapper.get(mapping_name(self._id(volume)))

    def open_mapping(self, volume: str = NAME) -> Device:
        """The mapping of a staged volume."""
        found = self.mapping(volume)
        assert found is not None, f"volume {volume} has no mapping"
        return found

    def loops_of(self, volume: str = NAME) -> Sequence[LoopInfo]:
        return [] if self.place is not None else self.loops.find(str(self.disk(volume)))

    def is_attached(self, volume: str = NAME) -> bool:
        """Whether a device shows the volume's storage that is not the test's own doing."""
        return self.place.is_left_shown(self._id(volume)) if self.place is not None else bool(self.loops_of(volume))

    def write(self, text: str = "precious", volume: str = NAME) -> None:
        """Write a file into the staged file system, durably."""
        with (self.staging_path(volume) / "file").open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def read(self, volume: str = NAME) -> str:
        return (self.staging_path(volume) / "file").read_text()

    def is_mounted(self, volume: str = NAME) -> bool:
        return self.mounts.at(str(self.staging_path(volume))) is not None

    def closed(self, volume: str = NAME) -> bool:
        """Whether nothing of the volume is open, mounted or attached, nor recorded as staged."""
        return not (
            self.mapping(volume)
            or self.is_mounted(volume)
            or self.stages.get(self._id(volume))
            or (self.backend is None and self.is_attached(volume))
        )

    def staged_once(self, volume: str = NAME, text: str = "precious") -> None:
        """Create the volume, put a file into it and unstage it."""
        self.create(volume)
        self.stage(volume)
        self.write(text, volume)
        self.unstage(volume)
