"""The embedded backend: each volume a sparse file of this node, shown through a loop device.

<folder>/volumes/<id>/disk.img      the ciphertext
<folder>/volumes/<id>/next.img      the ciphertext under another volume key, while it is moved there

Beside them are the records: `csi_driver.backends.folders`.
"""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from csi_driver.backends.base import Fill, Space
from csi_driver.backends.folders import VolumeFolders
from csi_driver.backends.records import RecordCodec
from csi_driver.host import ofdlock
from csi_driver.host.files import Files
from csi_driver.host.handle import Handle, open_handle
from csi_driver.host.loop import AttachedLoop, LoopDevices, LoopInfo
from csi_driver.model.errors import (
    DeviceAbsent,
    DeviceInUse,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
)
from csi_driver.model.volume import VolumeParameters, VolumeRecord

_DISK = "disk.img"
_NEXT = "next.img"
_BLOCK = 512  # of st_blocks: inode(7)
_MOVING = 64 << 20  # what is on its way from one file to the other, and what the file system needs for that
_HEADER_ROOM = 16 << 20  # what is behind it in storage that is to take a volume's place is content


class LoopfileBackend:
    """Sparse files below `folder`; `floor` bytes of its file system stay free for the volumes that are there."""

    name = "loopfile"

    def __init__(self, folder: Path, floor: int, files: Files, loops: LoopDevices, codec: RecordCodec) -> None:
        self._folder = folder
        self._floor = floor
        self._files = files
        self._loops = loops
        self._folders = VolumeFolders(folder, files, codec, self._drop)

    def prepare(self) -> None:
        """Make the folders. Raises OSError when the state directory cannot be written."""
        self._folders.prepare()

    def create(self, record: VolumeRecord, size: int) -> VolumeRecord:
        """Make the sparse file and its record aside and rename both in, so that a crash leaves all or nothing."""
        return self.create_filled(record, size, None)

    def create_filled(self, record: VolumeRecord, size: int, fill: Fill | None) -> VolumeRecord:
        """As `create`; `fill` gets the path of the file."""
        self._folders.refuse_known(record.id)
        self._check_room(record.id, size, "free space or choose another node")

        def make(fresh: Path) -> None:
            self._files.set_size(fresh / _DISK, size, new=True)
            if fill is not None:
                fill(str(fresh / _DISK))

        return self._folders.create(record, make)

    def has(self, volume_id: str) -> bool:
        return self._folders.has(volume_id)

    def get(self, volume_id: str) -> VolumeRecord:
        return self._folders.get(volume_id)

    def accept_record(self, volume_id: str) -> VolumeRecord:
        return self._folders.accept_record(volume_id, half=self.has_next(volume_id, _HEADER_ROOM))

    def update(self, record: VolumeRecord) -> VolumeRecord:
        return self._folders.update(record)

    def delete(self, volume_id: str) -> None:
        self._folders.delete(volume_id, self._check_unused)

    def ids(self) -> Sequence[str]:
        return self._folders.ids()

    def grow(self, volume_id: str, size: int) -> None:
        """Lengthen the sparse file; a file that is long enough stays as it is."""
        disk = self._folders.volume(volume_id) / _DISK
        try:
            present = disk.stat().st_size
        except FileNotFoundError:
            raise NotFound(f"volume {volume_id} has no backing file {disk}") from None
        try:
            if size > present:
                self._check_room(volume_id, size - present, "free space there")
                self._loops.unguard(str(disk))
                with self._folders.told_errors(volume_id):
                    self._files.set_size(disk, size)
        finally:
            self._loops.guard(str(disk))  # also where an earlier call was cut before it

    @contextlib.contextmanager
    def storage(self, volume_id: str) -> Iterator[Handle]:
        """The sparse file; a stage that was cut may have left the guard on."""
        disk = self._disk(volume_id)
        self._loops.unguard(disk)
        try:
            handle = open_handle(disk, os.O_RDWR)
        except FileNotFoundError:
            raise DeviceAbsent(f"volume {volume_id} has no backing file {disk}") from None
        try:
            with handle:
                yield handle
        finally:
            self._loops.guard(disk)  # only where it is attached

    def open_storage(self, volume_id: str) -> Handle:
        """The sparse file."""
        disk = self._folders.volume(volume_id) / _DISK
        try:
            return open_handle(str(disk), os.O_RDONLY)
        except FileNotFoundError:
            raise DeviceAbsent(f"volume {volume_id} has no backing file {disk}") from None

    def is_newest(self, record: VolumeRecord) -> bool:
        return self._folders.is_newest(record)

    def make_next(self, volume_id: str, size: int) -> None:
        """A sparse file beside the volume's own."""
        path = self._folders.volume(volume_id) / _NEXT
        self.drop_next(volume_id)
        with self._folders.told_errors(volume_id):
            disk = (self._folders.volume(volume_id) / _DISK).stat()
            # What is moved is freed where it was: in the end there is no more than the new one, all of it written.
            self._check_room(volume_id, max(0, size - disk.st_blocks * _BLOCK) + _MOVING, "free space there")
            self._files.set_size(path, size, new=True)

    def drop_next(self, volume_id: str) -> None:
        """unlink(2)."""
        path = self._folders.volume(volume_id) / _NEXT
        self._loops.unguard(str(path))
        with self._folders.told_errors(volume_id):
            self._files.remove(path)

    def attach_next(self, volume_id: str) -> AttachedLoop:
        """As `attach`, autoclear."""
        return self._loops.attach(str(self._folders.volume(volume_id) / _NEXT), autoclear=True)

    def has_next(self, volume_id: str, header: int = 0) -> bool:
        """Whether the file is there, and has data from there on; a file system that does not know says so too."""
        try:
            descriptor = os.open(self._folders.path(volume_id, _NEXT), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return not header or os.lseek(descriptor, header, os.SEEK_DATA) >= header
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole from there on: lseek(2)
                return False
            raise
        finally:
            os.close(descriptor)

    def take_next(self, volume_id: str) -> None:
        """rename(2). A loop device on the old file keeps that until its last user ends."""
        disk, fresh = self._folders.volume(volume_id) / _DISK, self._folders.volume(volume_id) / _NEXT
        for path in (disk, fresh):
            self._loops.unguard(str(path))
        with self._folders.told_errors(volume_id), self._folders.replacing(volume_id, disk):
            self._files.rename(fresh, disk)
            self._loops.guard(str(disk))  # only where it is attached

    def header_copy(self, volume_id: str) -> Path:
        return self._folders.header_copy(volume_id)

    def has_header_copy(self, volume_id: str) -> bool:
        return self._folders.has_header_copy(volume_id)

    def header_before(self, volume_id: str) -> Path:
        return self._folders.header_before(volume_id)

    def keep_header_copy(self, volume_id: str, fill: Fill) -> None:
        self._folders.keep_header_copy(volume_id, fill)

    def attach(self, volume_id: str, *, lasting: bool) -> AttachedLoop:
        """One loop device per file, autoclear unless `lasting`."""
        disk = self._folders.volume(volume_id) / _DISK
        device = self._loops.attach(str(disk), autoclear=not lasting)
        if device.info.size_bytes < disk.stat().st_size:
            self.refresh(device)  # it was attached before the file grew
        return device

    def guard(self, volume_id: str) -> None:
        """Loop lets a file be bound twice, and then two mappings tear it: the file system must refuse."""
        for path in self._files_of(volume_id):
            self._loops.guard(path)

    def refresh(self, device: Handle) -> None:
        """LOOP_SET_CAPACITY."""
        self._loops.set_capacity(device)

    def device_of(self, volume_id: str) -> AttachedLoop | None:
        """The loop device on the volume's file, found by the file's device and inode."""
        for info in self._find(self._disk(volume_id)):
            with contextlib.suppress(DeviceAbsent):
                handle = self._loops.open(info.path)
                if info.same_file(handle.info):
                    return handle
                handle.close()  # released since it was found, and another file has the number
        return None

    def is_device_of(self, volume_id: str, number: tuple[int, int]) -> bool:
        """Whether that device is a loop device on this volume's very file (device and inode)."""
        found = self._loops.file_of(*number)
        for path in self._files_of(volume_id) if found is not None else ():
            with contextlib.suppress(FileNotFoundError):
                disk = os.stat(path)
                if found == (disk.st_dev, disk.st_ino):
                    return True
        return False

    def detach(self, volume_id: str) -> None:
        """Detach every loop device on the volume's files."""
        for path in self._files_of(volume_id):
            for info in self._find(path):
                self._loops.detach(info.path, info)
            # A volume is unstaged whatever its file system has come to; the guard goes also when it is attached or
            # deleted.
            with contextlib.suppress(FailedPrecondition):
                self._loops.unguard(path)

    def space(self, parameters: VolumeParameters | None = None) -> Space:  # noqa: ARG002 - all share one file system
        """What statvfs says, less the floor. Files are sparse: this is room now, not room promised."""
        usage = os.statvfs(self._folder)
        free = usage.f_bavail * usage.f_frsize
        return Space(usage.f_blocks * usage.f_frsize, free, max(0, free - self._floor))

    def orphans(self) -> Sequence[str]:
        return self._folders.orphans()

    def remove_orphans(self, volume_id: str) -> Sequence[str]:
        return self._folders.remove_orphans(volume_id)

    def _drop(self, folder: Path, erase: int) -> None:
        for name in (_DISK, _NEXT):
            self._loops.unguard(str(folder / name))  # a power cut leaves the guard on
        if erase:
            for name in (_NEXT, _DISK):
                self._files.erase(folder / name, erase)

    def _disk(self, volume_id: str) -> str:
        return self._folders.path(volume_id, _DISK)

    def _files_of(self, volume_id: str) -> tuple[str, ...]:
        disk, fresh = self._disk(volume_id), self._folders.path(volume_id, _NEXT)
        return (disk, fresh) if os.path.exists(fresh) else (disk,)

    def _find(self, disk: str) -> list[LoopInfo]:
        # A free lock proves without a scan that no loop device has the file: an attached one holds the lock.
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if ofdlock.is_locked(descriptor):
                    return self._loops.find(disk)
            finally:
                os.close(descriptor)
        return []

    def _check_unused(self, volume_id: str) -> None:
        # A scan, unlike `_find`: a loop device that somebody else bound holds no lock.
        if found := [info.path for path in self._files_of(volume_id) for info in self._loops.find(path)]:
            raise DeviceInUse(
                f"volume {volume_id} cannot be deleted: its file is still attached as {', '.join(found)}; "
                f"unpublish and unstage it first"
            )

    def _check_room(self, volume_id: str, size: int, advice: str) -> None:
        available = self.space().available
        if size > available:
            raise ResourceExhausted(
                f"no room for volume {volume_id} in {self._folder}: {size} bytes are wanted and {available} are free "
                f"above the floor of {self._floor}; {advice}"
            )


def half_beside(path: Path) -> Path | None:
    """The file beside that volume's file with what was moved to another volume key, or from there; None without one."""
    other = path.with_name(_NEXT if path.name == _DISK else _DISK)
    return other if path.name in (_DISK, _NEXT) and other.exists() else None
