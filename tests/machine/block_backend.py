"""A backend over block devices that the test brings, so that their storage can be made to fail, hang or vanish."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from csi_driver.backends.base import Fill, Space
from csi_driver.host import blockdev
from csi_driver.host.devicemapper import DeviceMapper, Target
from csi_driver.host.handle import Handle
from csi_driver.host.loop import AttachedLoop, LoopDevices
from csi_driver.model.errors import Aborted, DeviceAbsent, NotFound
from csi_driver.model.volume import VolumeParameters, VolumeRecord
from tests.handles import handle_on
from tests.machine.kernel import suspend

_SECTOR = 512


@dataclass
class BlockBackend:
    """Each volume is a block device, put into `devices` by its id; records are kept in memory."""

    devices: dict[str, str] = field(default_factory=dict)
    records: dict[str, VolumeRecord] = field(default_factory=dict)
    name: str = "block"

    def prepare(self) -> None:
        """The devices are the test's."""

    def create(self, record: VolumeRecord, size: int) -> VolumeRecord:
        return self.records.setdefault(record.id, record)

    def has(self, volume_id: str) -> bool:
        return volume_id in self.records

    def get(self, volume_id: str) -> VolumeRecord:
        if volume_id not in self.records:
            raise NotFound(f"volume {volume_id} does not exist")
        return self.records[volume_id]

    def update(self, record: VolumeRecord) -> VolumeRecord:
        if self.get(record.id).revision != record.revision:
            raise Aborted(f"the record of volume {record.id} was changed by another writer")
        updated = msgspec.structs.replace(record, revision=record.revision + 1)
        self.records[record.id] = updated
        return updated

    def delete(self, volume_id: str) -> None:
        self.records.pop(volume_id, None)

    def ids(self) -> Sequence[str]:
        return sorted(self.records)

    def grow(self, volume_id: str, size: int) -> None:
        """The storage below grows, or not."""

    @contextmanager
    def storage(self, volume_id: str) -> Iterator[Handle]:
        with handle_on(self.devices[volume_id]) as handle:
            yield handle

    def open_storage(self, volume_id: str) -> Handle:
        return self.attach(volume_id, lasting=False)

    def is_newest(self, record: VolumeRecord) -> bool:
        return False

    def accept_record(self, volume_id: str) -> VolumeRecord:
        return self.get(volume_id)

    def header_copy(self, volume_id: str) -> Path:
        return Path("/nonexistent") / volume_id

    def has_header_copy(self, volume_id: str) -> bool:
        return True

    def header_before(self, volume_id: str) -> Path:
        return Path("/nonexistent") / f"{volume_id}.before"

    def keep_header_copy(self, volume_id: str, fill: Fill) -> None:
        """Nothing is kept."""

    def attach(self, volume_id: str, *, lasting: bool) -> Handle:
        if volume_id not in self.devices:
            raise DeviceAbsent(f"volume {volume_id} has no device")
        return handle_on(self.devices[volume_id])

    def refresh(self, device: Handle) -> None:
        """A mapped device shows its new size by itself."""

    def device_of(self, volume_id: str) -> Handle | None:
        path = self.devices.get(volume_id)
        return handle_on(path) if path and os.path.exists(path) else None

    def is_device_of(self, volume_id: str, number: tuple[int, int]) -> bool:
        path = self.devices.get(volume_id)
        return bool(path) and blockdev.device_number(str(path)) == number

    def guard(self, volume_id: str) -> None:
        """The kernel lets a block device be opened exclusively once."""

    def detach(self, volume_id: str) -> None:
        """The device is the test's."""

    def space(self, parameters: VolumeParameters | None = None) -> Space:
        return Space(1 << 40, 1 << 40, 1 << 40)

    def orphans(self) -> Sequence[str]:
        return ()

    def remove_orphans(self, volume_id: str) -> Sequence[str]:
        return ()


class FaultyDevice:
    """A disk of `size` bytes, a sparse file below a mapped device, that a test can damage; close it in the end."""

    def __init__(self, file: Path, size: int) -> None:
        self.name = name = f"disk-of-{file.parent.name}"
        self.file = file
        self._mapper = DeviceMapper()
        self._sectors = size // _SECTOR
        with file.open("wb") as backing:
            backing.truncate(size)
        self._loop: AttachedLoop = LoopDevices().attach(str(file), autoclear=True)
        self._mapper.create(name, f"{name}-uuid", [self._linear(0, self._sectors)])

    @property
    def path(self) -> str:
        """Its node."""
        return f"/dev/mapper/{self.name}"

    def heal(self) -> None:
        """It reads and writes again."""
        self._swap([self._linear(0, self._sectors)])

    def fail(self, start: int, length: int) -> None:
        """Every read and write of these bytes ends in EIO."""
        first, last = start // _SECTOR, (start + length) // _SECTOR
        parts = [
            self._linear(0, first),
            Target(first, last - first, "error", ""),
            self._linear(last, self._sectors - last),
        ]
        self._swap([part for part in parts if part.length])

    def read_as_zeros(self) -> None:
        """It is there, has its size, and holds nothing, as storage may that lost its replicas."""
        self._swap([Target(0, self._sectors, "zero", "")])

    def fail_writes(self) -> None:
        """Reads are fine and writes end in EIO."""
        self._flakey("error_writes")

    def drop_writes(self) -> None:
        """Writes are acknowledged and forgotten."""
        self._flakey("drop_writes")

    def suspend(self) -> None:
        """It does not answer, whoever asks sleeps in state D."""
        suspend(self.name, noflush=True)

    def resume(self) -> None:
        """It answers again."""
        self._mapper.resume(self.name)

    def close(self) -> None:
        """Remove it and its file."""
        self._mapper.resume(self.name)
        try:
            self._mapper.remove(self.name)
        finally:
            self._loop.close()
            self.file.unlink()

    def _swap(self, targets: list[Target]) -> None:
        self._mapper.reload(self.name, targets)
        # What the kernel read before must not hide what the disk says now.
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def _flakey(self, feature: str) -> None:
        where = f"{self._loop.major}:{self._loop.minor}"
        self._swap([Target(0, self._sectors, "flakey", f"{where} 0 0 3600 1 {feature}")])

    def _linear(self, start: int, length: int) -> Target:
        return Target(start, length, "linear", f"{self._loop.major}:{self._loop.minor} {start}")
