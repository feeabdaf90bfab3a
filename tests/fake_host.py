"""The operating system's seams without an operating system: files, loop devices, holders, and a backend in memory."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from csi_driver.backends.base import Backend, Fill, Space
from csi_driver.host import ofdlock
from csi_driver.host.files import Files
from csi_driver.host.handle import Handle
from csi_driver.host.holders import Holder, Holders
from csi_driver.host.loop import AttachedLoop, LoopDevices, LoopInfo
from csi_driver.host.mountinfo import Mount
from csi_driver.host.workers import Workers
from csi_driver.images.cluster import ClusterImages
from csi_driver.images.store import ImageStore
from csi_driver.keys.audit import Audit
from csi_driver.keys.config import KmsConfig
from csi_driver.keys.kubernetes import Kubernetes
from csi_driver.keys.ledger import KeyLedger
from csi_driver.keys.sources import KeySources
from csi_driver.model.access import Access
from csi_driver.model.errors import Aborted, DeviceAbsent, DeviceInUse, FailedPrecondition, NotFound, ResourceExhausted
from csi_driver.model.settings import Limits
from csi_driver.model.volume import VolumeParameters, VolumeRecord, volume_id_for
from csi_driver.volumes.from_image import BackingImages
from csi_driver.volumes.keys import VolumeKeys
from csi_driver.volumes.keyslots import KeySlots
from csi_driver.volumes.moved import Homes

LOOP_MAJOR = 7
Step = Callable[[str], None]


def undisturbed(_: str) -> None:
    """What a step does unless a test says otherwise."""


class NoHolders(Holders):
    """Finds nobody; a search through all processes is for the tests of the search."""

    def of_device(self, major: int, minor: int) -> list[Holder]:
        return []

    def of_file(self, path: str | os.PathLike[str]) -> list[Holder]:
        return []

    def of_place(self, mount: Mount) -> list[Holder]:
        return []

    def of_mount(self, device: tuple[int, int]) -> list[Holder]:
        return []


class SteppedFiles(Files):
    """Real files, without fsync; `step` is told before and after each one that a crash may cut and may raise."""

    def __init__(self, step: Step = undisturbed) -> None:
        self.step = step

    def sync_folder(self, folder: Path) -> None:
        self.step(f"sync {folder.name}")

    def fill(self, path: Path, content: bytes, *, durable: bool) -> None:
        self.step(f"before fill {path.name}")
        super().fill(path, content[: len(content) // 2], durable=False)
        self.step(f"in fill {path.name}")
        super().fill(path, content, durable=False)
        self.step(f"after fill {path.name}")

    def set_size(self, path: Path, size: int, *, new: bool = False) -> None:
        self.step(f"before set_size {path.name}")
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if new else 0), 0o600)
        os.ftruncate(descriptor, size)
        os.close(descriptor)
        self.step(f"after set_size {path.name}")

    def make_folder(self, folder: Path) -> None:
        self.step("before make_folder")
        super().make_folder(folder)
        self.step("after make_folder")

    def rename(self, source: Path, target: Path) -> None:
        self.step(f"before rename to {target.parent.name}")
        super().rename(source, target)
        self.step(f"after rename to {target.parent.name}")

    def remove(self, path: Path) -> None:
        self.step(f"before remove {path.name}")
        super().remove(path)
        self.step(f"after remove {path.name}")

    def overwrite(self, path: Path, length: int) -> None:
        self.step(f"before overwrite {path.name}")
        super().overwrite(path, length)
        self.step(f"after overwrite {path.name}")

    def remove_folder(self, folder: Path, last: str = "") -> None:
        self.step(f"before remove_folder in {folder.parent.name}")
        super().remove_folder(folder, last)
        self.step(f"after remove_folder in {folder.parent.name}")


def no_images() -> BackingImages:
    """A node that has no image."""
    limits, workers, nowhere = Limits(), Workers(()), Path("/nonexistent")
    return BackingImages(
        ImageStore(nowhere, Files()), ClusterImages(nowhere), workers, KeySlots(workers, limits), no_kms(), limits
    )


def no_kms() -> VolumeKeys:
    """Keys of a node without any KMS: secrets alone open its volumes."""
    nowhere, nobody = Path("/nonexistent"), Kubernetes("", "")
    sources = KeySources(KmsConfig(nowhere, nobody), nobody, Workers(()), nowhere, Audit(None))
    return VolumeKeys(sources, KeyLedger(nowhere, Files()))


def at_home(backend: Backend) -> Homes:
    """Volumes of a node that has one driver."""
    return Homes(backend, lambda _: False)


@dataclass
class FakeLoop:
    """A bound loop device: the file, its lock, and how often it is open (handles, mappings, mounts)."""

    info: LoopInfo
    backing: int
    users: int = 0


class FakeHandle(AttachedLoop):
    """A handle that tells the fake when it is closed."""

    def __init__(self, loops: "FakeLoops", loop: FakeLoop) -> None:
        super().__init__(os.dup(loop.backing), loop.info)
        self._loops = loops
        loops.use(loop.info.path)
        loops.handles.append(self)

    @property
    def number(self) -> tuple[int, int]:
        return self.info.major, self.info.minor

    def close(self) -> None:
        if self.fd >= 0:
            self._loops.handles.remove(self)
            super().close()
            self._loops.release(self.info.path)


class FakeLoops(LoopDevices):
    """Loop devices as the kernel keeps them: autoclear ones go with their last user, each holds its file's lock."""

    def __init__(self, step: Step = undisturbed) -> None:
        self.step = step
        self.bound: dict[str, FakeLoop] = {}
        self.handles: list[FakeHandle] = []
        self.guarded: set[str] = set()

    def attach(self, path: str, *, autoclear: bool, read_only: bool = False) -> AttachedLoop:
        self.step("before attach")
        self.guarded.discard(path)
        try:
            backing = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DeviceAbsent(f"the backing file {path} is not there") from None
        if not ofdlock.try_lock(backing):
            os.close(backing)
            (existing,) = self.find(path)
            if existing.autoclear != autoclear:
                raise DeviceInUse(f"{path} is bound to {existing.path}")
            return FakeHandle(self, self.bound[existing.path])
        status, number = os.fstat(backing), next(n for n in range(1000, 2000) if f"/dev/loop{n}" not in self.bound)
        info = LoopInfo(
            f"/dev/loop{number}", LOOP_MAJOR, number, status.st_dev, status.st_ino, path,
            read_only=read_only, autoclear=autoclear, size_bytes=status.st_size,
        )  # fmt: skip
        loop = self.bound[info.path] = FakeLoop(info, backing)
        handle = FakeHandle(self, loop)
        try:
            self.step("after attach")
        except Exception:
            handle.close()
            if info.path in self.bound:
                self._unbind(info.path)
            raise
        return handle

    def guard(self, path: str) -> None:
        self.step("before guard")
        if os.path.exists(path) and self.find(path):
            self.guarded.add(path)
        self.step("after guard")

    def unguard(self, path: str) -> None:
        self.step("before unguard")
        self.guarded.discard(path)
        self.step("after unguard")

    def find(self, path: str) -> list[LoopInfo]:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return []
        infos = [loop.info for loop in self.bound.values()]
        return [one for one in infos if (one.backing_device, one.backing_inode) == (status.st_dev, status.st_ino)]

    def all(self) -> list[LoopInfo]:
        return [loop.info for loop in self.bound.values()]

    def info(self, device_path: str) -> LoopInfo | None:
        return self.bound[device_path].info if device_path in self.bound else None

    def file_of(self, major: int, minor: int) -> tuple[int, int] | None:
        found = self.info(f"/dev/loop{minor}") if major == LOOP_MAJOR else None
        return (found.backing_device, found.backing_inode) if found else None

    def open(self, device_path: str, *, read_only: bool = True) -> AttachedLoop:
        if device_path not in self.bound:
            raise DeviceAbsent(f"the loop device {device_path} is not there")
        return FakeHandle(self, self.bound[device_path])

    def set_capacity(self, device: Handle) -> None:
        self.step("before set_capacity")
        loop = self.bound[device.name]
        loop.info = msgspec.structs.replace(loop.info, size_bytes=os.fstat(loop.backing).st_size)
        self.step("after set_capacity")

    def detach(self, device_path: str, expected: LoopInfo | None = None) -> None:
        self.step("before detach")
        if device_path in self.bound:
            if self.bound[device_path].users:
                raise DeviceInUse(f"the loop device {device_path} is still open")
            self._unbind(device_path)
        self.step("after detach")

    def use(self, device_path: str) -> None:
        """A mapping, a mount or a handle opens the device."""
        self.bound[device_path].users += 1

    def release(self, device_path: str) -> None:
        """One of them closes it."""
        loop = self.bound[device_path]
        loop.users -= 1
        if not loop.users and loop.info.autoclear:
            self._unbind(device_path)

    def end_of_process(self) -> None:
        """What the kernel does with the handles of a killed process."""
        for handle in list(self.handles):
            handle.close()

    def _unbind(self, device_path: str) -> None:
        os.close(self.bound.pop(device_path).backing)


@dataclass
class MemoryBackend:
    """Records and sizes in memory; nothing can be attached."""

    records: dict[str, VolumeRecord] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    total: int = 1 << 60

    @property
    def name(self) -> str:
        return "memory"

    def prepare(self) -> None:
        """There is nothing to make."""

    def create(self, record: VolumeRecord, size: int) -> VolumeRecord:
        if size > self.space().available:
            raise ResourceExhausted(f"no room for {record.id}")
        self.records[record.id], self.sizes[record.id] = record, size
        return record

    def has(self, volume_id: str) -> bool:
        return volume_id in self.records

    def get(self, volume_id: str) -> VolumeRecord:
        if volume_id not in self.records:
            raise NotFound(f"volume {volume_id} does not exist")
        return self.records[volume_id]

    def update(self, record: VolumeRecord) -> VolumeRecord:
        if self.get(record.id).revision != record.revision:
            raise Aborted(f"the record of volume {record.id} was changed")
        self.records[record.id] = msgspec.structs.replace(record, revision=record.revision + 1)
        return self.records[record.id]

    def delete(self, volume_id: str) -> None:
        self.records.pop(volume_id, None)
        self.sizes.pop(volume_id, None)

    def ids(self) -> Sequence[str]:
        return sorted(self.records)

    def grow(self, volume_id: str, size: int) -> None:
        if size - self.sizes[volume_id] > self.space().available:
            raise ResourceExhausted(f"no room for {volume_id}")
        self.sizes[volume_id] = max(self.sizes[volume_id], size)

    def storage(self, volume_id: str) -> AbstractContextManager[Handle]:
        raise DeviceAbsent(f"volume {volume_id} is only in memory")

    def open_storage(self, volume_id: str) -> Handle:
        raise DeviceAbsent(f"volume {volume_id} is only in memory")

    def is_newest(self, record: VolumeRecord) -> bool:
        return False

    def accept_record(self, volume_id: str) -> VolumeRecord:
        return self.get(volume_id)

    def header_copy(self, volume_id: str) -> Path:
        return Path("/nonexistent") / volume_id

    def has_header_copy(self, volume_id: str) -> bool:
        return False

    def header_before(self, volume_id: str) -> Path:
        return Path("/nonexistent") / f"{volume_id}.before"

    def keep_header_copy(self, volume_id: str, fill: Fill) -> None:
        """Nothing is kept."""

    def attach(self, volume_id: str, *, lasting: bool) -> Handle:
        raise DeviceAbsent(f"volume {volume_id} is only in memory")

    def guard(self, volume_id: str) -> None:
        """Nothing is attached."""

    def refresh(self, device: Handle) -> None:
        """Nothing is attached."""

    def device_of(self, volume_id: str) -> Handle | None:
        return None

    def is_device_of(self, volume_id: str, number: tuple[int, int]) -> bool:
        return False

    def detach(self, volume_id: str) -> None:
        """Nothing is attached."""

    def space(self, parameters: VolumeParameters | None = None) -> Space:
        free = max(0, self.total - sum(self.sizes.values()))
        return Space(self.total, free, free)

    def orphans(self) -> Sequence[str]:
        return []

    def remove_orphans(self, volume_id: str) -> Sequence[str]:
        return []


@dataclass
class SharedMemoryBackend(MemoryBackend):
    """The same as storage outside the nodes: one pool, whose name is in each id."""

    used: list[tuple[str, Access]] = field(default_factory=list)
    nodes: dict[str, list[str]] = field(default_factory=dict)
    takes_many_nodes: bool = True
    own_node: str = "node-1"

    def id_for(self, name: str, parameters: VolumeParameters) -> str:
        return f"{volume_id_for(name)}.pool"

    def places(self, record: VolumeRecord) -> Sequence[Mapping[str, str]]:
        return []

    def use(self, volume_id: str, access: Access) -> None:
        self.used.append((volume_id, access))

    def publish(self, volume_id: str, node_id: str, *, many_nodes: bool) -> Mapping[str, str]:
        others = [node for node in self.nodes.get(volume_id, []) if node != node_id]
        if others and not many_nodes:
            raise FailedPrecondition(f"volume {volume_id} is on {others[0]}")
        self.nodes[volume_id] = sorted({*others, node_id})
        return {"given": node_id}

    def unpublish(self, volume_id: str, node_id: str) -> None:
        self.nodes[volume_id] = [node for node in self.nodes.get(volume_id, []) if node_id not in ("", node)]

    def published(self, volume_id: str) -> Sequence[str]:
        return self.nodes.get(volume_id, [])

    def most_volumes(self) -> int:
        return 7
