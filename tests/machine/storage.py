"""What the volumes of a suite lie on, by a backend's name: how a driver is told, and where a volume's bytes are."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

from csi_driver.backends.base import Backend
from csi_driver.backends.lvmtool import dm_name
from csi_driver.backends.rbdplace import image_name
from csi_driver.backends.records import RecordCodec
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.krbd import MappedImages
from csi_driver.host.mounts import Mounts
from csi_driver.host.workers import Workers
from csi_driver.model.errors import NotFound
from csi_driver.model.settings import Settings
from csi_driver.model.volume import VolumeRecord
from csi_driver.volumes.driver import WARM
from tests.backends.ceph import CLUSTER
from tests.backends.ceph import POOL as CEPH_POOL
from tests.backends.csirig import BELOW, NODE_ID
from tests.backends.played import FarCluster, far_backend, played_cluster
from tests.backends.rigs import GROUP, POOL, LvmRig, RbdRig, lvm

DISK_BYTES, POOL_BYTES = 3 << 30, 2 << 30
VOLUMES = f"{dm_name(GROUP, 'luks')}-"
"""What device-mapper's names of volumes of a group begin with."""
PLAYED = "played"
"""The folder of the played cluster, beside the state directory."""
ON_THIS_MACHINE = ("loopfile", "lvm-thick", "lvm-thin")


class Storage(Protocol):
    """The storage of one driver."""

    parameters: Mapping[str, str]
    """What a class of it says."""
    makes_from_file: bool
    """Whether volumes can start with an image, and a folder that is copied is a volume."""
    enlarges_plain: bool
    """Whether a volume that is not encrypted is enlarged while it is in use."""
    node: str
    """To whom a volume is given before it is staged; "" where it lies on its node."""

    def settings(self, settings: Settings) -> Settings:
        """Those of a driver for it."""

    def id_of(self, name: str) -> str:
        """The id of the volume that CreateVolume calls so."""

    def record(self, volume_id: str) -> VolumeRecord | None:
        """What is recorded of a volume."""

    def header_copy(self, volume_id: str) -> Path:
        """The copy of its header."""

    def left_of(self, volume_id: str) -> list[str]:
        """What is there of a volume, if anything is."""

    def device(self, volume_id: str) -> AbstractContextManager[Path]:
        """A volume's bytes, attached or not; afterwards the driver finds what it has left."""

    def clear(self) -> None:
        """After a trouble, with nothing running: what is outside the state directory goes."""


class FolderStorage(Storage, Protocol):
    """Storage whose records are files of this machine."""

    root: Path
    """With the folders volumes, new and trash."""
    files: frozenset[str]
    """What is in a volume's folder."""

    def folder(self, volume_id: str) -> Path:
        """Where the record of a volume is, and the copy of its header."""

    def made(self) -> set[str]:
        """The ids of the volumes whose bytes are there, apart from their folders."""


class _InFolders:
    """A folder for each volume."""

    root: Path
    node = ""

    def folder(self, volume_id: str) -> Path:
        return self.root / "volumes" / volume_id

    def id_of(self, name: str) -> str:
        return name

    def record(self, volume_id: str) -> VolumeRecord | None:
        path = self.folder(volume_id) / "record.json"
        return RecordCodec().decode(path.read_bytes(), str(path)) if path.exists() else None

    def header_copy(self, volume_id: str) -> Path:
        return self.folder(volume_id) / "header.luks2"

    def left_of(self, volume_id: str) -> list[str]:
        return [str(path) for path in [self.folder(volume_id)] if path.exists()]


class LoopfileStorage(_InFolders):
    """Sparse files below the state directory."""

    parameters: Mapping[str, str] = {}
    makes_from_file = True
    enlarges_plain = True
    files = frozenset({"record.json", "disk.img", "header.luks2"})

    def __init__(self, state: Path) -> None:
        self.root = state / "loopfile"

    def settings(self, settings: Settings) -> Settings:
        return settings

    def made(self) -> set[str]:
        return set()

    def device(self, volume_id: str) -> AbstractContextManager[Path]:
        return nullcontext(self.folder(volume_id) / "disk.img")

    def clear(self) -> None:
        """All is in it."""


class GroupStorage(_InFolders):
    """A volume group, whose records are mounted below the state directory."""

    makes_from_file = False
    files = frozenset({"record.json", "lv.json", "header.luks2"})

    def __init__(self, state: Path, *, thin: bool) -> None:
        self.root = state / "lvm"
        self.parameters: Mapping[str, str] = {"thinPool": POOL} if thin else {}
        self.enlarges_plain = thin

    def settings(self, settings: Settings) -> Settings:
        return replace(settings, backend="lvm", volume_group=GROUP)

    def made(self) -> set[str]:
        found = lvm("lvs", "--noheadings", "-o", "lv_name", GROUP).split()
        return {name.removeprefix("luks-") for name in found if name.startswith("luks-")}

    def clear(self) -> None:
        for volume_id in self.made():
            lvm("lvremove", f"{GROUP}/luks-{volume_id}")

    @contextmanager
    def device(self, volume_id: str) -> Iterator[Path]:
        logical, mapper = f"luks-{volume_id}", DeviceMapper()
        name = dm_name(GROUP, logical)
        is_shown = mapper.get(name) is not None
        if not is_shown:
            lvm("lvchange", "-ay", "-K", f"{GROUP}/{logical}")
        try:
            shown = mapper.get(name)
            assert shown is not None, f"{GROUP}/{logical} is not shown"
            yield Path(f"/dev/dm-{shown.minor}")
        finally:
            if not is_shown:
                lvm("lvchange", "-an", f"{GROUP}/{logical}")


class _OfBackend:
    """Records and copies of headers that a backend fetches from where they are."""

    _backend: Backend

    def record(self, volume_id: str) -> VolumeRecord | None:
        try:
            return self._backend.get(volume_id)
        except NotFound:
            return None

    def header_copy(self, volume_id: str) -> Path:
        return self._backend.header_copy(volume_id)


class CephStorage(_OfBackend):
    """A pool of Ceph; its images are given to the one node there is. `rig` has its daemons."""

    parameters: Mapping[str, str] = {"clusterID": CLUSTER, "pool": CEPH_POOL}
    makes_from_file = False
    enlarges_plain = True
    node = "node-1"

    def __init__(self, rig: RbdRig) -> None:
        self._rig = rig
        self._backend = rig.backend(node_id="who looks")

    def settings(self, settings: Settings) -> Settings:
        return replace(settings, backend="rbd", ceph_config=self._rig.config, ceph_secret=self._rig.secret)

    def id_of(self, name: str) -> str:
        return self._rig.id_of(name)

    def left_of(self, volume_id: str) -> list[str]:
        return [line for line in self._rig.ceph.admin("rados", "-p", CEPH_POOL, "ls").split() if volume_id in line]

    def clear(self) -> None:
        self._rig.clear()

    @contextmanager
    def device(self, volume_id: str) -> Iterator[Path]:
        image = f"{CEPH_POOL}/{image_name(volume_id)}"
        identity = self._rig.ceph.asked("rbd", "info", image)["id"]
        for mapped in MappedImages().all():
            if mapped.identity.image_id == identity:
                yield Path(mapped.path)
                return
        path = self._rig.ceph.admin("rbd", "map", "-o", "noudev", image).strip()
        try:
            yield Path(path)
        finally:
            self._rig.ceph.admin("rbd", "unmap", "-o", "noudev", path)


class CsiStorage(_OfBackend):
    """Claims of a played cluster, which goes on when the server is killed."""

    parameters: Mapping[str, str] = {"backingStorageClass": BELOW}
    makes_from_file = False
    enlarges_plain = True
    node = NODE_ID

    def __init__(self, folder: Path, cluster: FarCluster) -> None:
        self._cluster = cluster
        self._backend = far_backend(folder, api=cluster)

    def settings(self, settings: Settings) -> Settings:
        return replace(settings, backend="csi")

    def id_of(self, name: str) -> str:
        return name

    def left_of(self, volume_id: str) -> list[str]:
        return cast("list[str]", self._cluster.ask("left_of", volume_id))

    def device(self, volume_id: str) -> AbstractContextManager[Path]:
        return nullcontext(cast("Path", self._cluster.ask("device", volume_id)))

    def clear(self) -> None:
        self._cluster.ask("clear")


@contextmanager
def storage(backend: str, folder: Path, state: Path) -> Iterator[Storage]:
    """Storage for the driver with the state directory `state`; what else it needs is in `folder`. It ends with it."""
    if backend == "loopfile":
        yield LoopfileStorage(state)
        return
    if backend == "csi":
        with played_cluster(folder / PLAYED) as cluster:
            yield CsiStorage(folder / PLAYED, cluster)
        return
    workers = Workers(WARM)
    try:
        if backend == "rbd":
            workers.start()  # before anybody counts processes
            with RbdRig(folder / "ceph", workers) as ceph:
                yield CephStorage(ceph)
            return
        with LvmRig(folder, workers, thin=backend == "lvm-thin", disk_bytes=DISK_BYTES, pool_bytes=POOL_BYTES) as rig:
            rig.restart()
            rig.disown()
            try:
                yield GroupStorage(state, thin=backend == "lvm-thin")
            finally:
                Mounts().unmount(str(state / "lvm"))
    finally:
        workers.stop()


def after_boot(backend: str, folder: Path, state: Path) -> FolderStorage:
    """As `storage`, in a machine that may lose its power: made in its first boot, and found in the next ones."""
    if backend == "loopfile":
        return LoopfileStorage(state)
    thin, disk = backend == "lvm-thin", folder / "group.disk"
    is_first = not disk.exists()
    with disk.open("ab") as file:
        file.truncate(DISK_BYTES)
    loop = subprocess.run(["losetup", "--find", "--show", disk], check=True, stdout=subprocess.PIPE, text=True)
    DeviceMapper().target_version("thin-pool")
    if is_first:
        lvm("vgcreate", GROUP, loop.stdout.strip())
        if thin:
            lvm("lvcreate", "-L", f"{POOL_BYTES}b", "--type", "thin-pool", "-n", POOL, GROUP)
        os.sync()
    return GroupStorage(state, thin=thin)


def chosen(*others: str) -> str:
    """The backend that BACKEND names, else loopfile: one that needs no more than this machine, or one of `others`."""
    backend, known = os.environ.get("BACKEND") or "loopfile", (*ON_THIS_MACHINE, *others)
    if backend not in known:
        raise SystemExit(f"BACKEND is {backend!r} and must be one of {', '.join(known)}")
    return backend
