"""The embedded backend: each volume a sparse file of this node, shown through a loop device.

<folder>/volumes/<id>/disk.img      the ciphertext
<folder>/volumes/<id>/next.img      the ciphertext under another volume key, while it is moved there
<folder>/volumes/<id>/record.json   the tags; their revision is an extended attribute of the folder too
<folder>/volumes/<id>/header.luks2  a copy of the LUKS2 header, as it is
<folder>/new/<id>/                  a volume being made; renamed into volumes/ when it is whole
<folder>/trash/<id>/                a volume being deleted; renamed out of volumes/ first
"""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from csi_driver.backends.base import Fill, Space
from csi_driver.backends.listing import SortedNames
from csi_driver.backends.records import RecordCodec
from csi_driver.host import ofdlock
from csi_driver.host.files import Files, read_file
from csi_driver.host.handle import Handle, open_handle
from csi_driver.host.loop import AttachedLoop, LoopDevices, LoopInfo
from csi_driver.model.errors import (
    Aborted,
    DeviceAbsent,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
)
from csi_driver.model.volume import VolumeRecord

_DISK = "disk.img"
_NEXT = "next.img"
_RECORD = "record.json"
_HEADER = "header.luks2"
_BLOCK = 512  # of st_blocks: inode(7)
_MOVING = 64 << 20  # what is on its way from one file to the other, and what the file system needs for that
_HEADER_ROOM = 16 << 20  # what is behind it in storage that is to take a volume's place is content
_MARK = "trusted.luks-csi.revision"  # trusted: only who may administer the host sees or sets it (xattr(7))


class LoopfileBackend:
    """Sparse files below `folder`; `floor` bytes of its file system stay free for the volumes that are there."""

    name = "loopfile"

    def __init__(self, folder: Path, floor: int, files: Files, loops: LoopDevices, codec: RecordCodec) -> None:
        self._folder = folder
        self._volumes = str(folder / "volumes")
        self._names = SortedNames(folder / "volumes")
        self._floor = floor
        self._files = files
        self._loops = loops
        self._codec = codec

    def prepare(self) -> None:
        """Make the folders. Raises OSError when the state directory cannot be written."""
        for name in ("volumes", "new", "trash"):
            (self._folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def create(self, record: VolumeRecord, size: int, fill: Fill | None = None) -> VolumeRecord:
        """Make the sparse file and its record aside and rename both in, so that a crash leaves all or nothing."""
        if self.has(record.id):
            raise FailedPrecondition(
                f"volume {record.id} cannot be made: {self._volume(record.id)} is there without a readable record and "
                f"may hold data; restore its record from a backup or delete the volume"
            )
        self._check_room(record.id, size, "free space or choose another node")
        fresh = self._folder / "new" / record.id
        try:
            with self._space_errors(record.id):
                self._remove(fresh)
                self._remove(self._folder / "trash" / record.id)
                self._files.make_folder(fresh)
                self._files.set_size(fresh / _DISK, size, new=True)
                if fill is not None:
                    fill(str(fresh / _DISK))
                self._files.write(fresh / _RECORD, self._codec.encode(record))
                self._files.rename(fresh, self._volume(record.id))
        except DriverError:
            # Nobody may ask again for a volume that could not be made. Renamed in, it was not yet durable.
            with contextlib.suppress(DriverError, OSError):
                self.delete(record.id)
            raise
        return record

    def has(self, volume_id: str) -> bool:
        """Whether its folder is there."""
        return os.path.exists(f"{self._volumes}/{volume_id}")

    def get(self, volume_id: str) -> VolumeRecord:
        """Read the record. Raises FailedPrecondition for one that is older than the last that was written.

        Such a record (from a backup, say) may permit what the newer one forbids: to format. Compared here, so that
        nobody forgets to.
        """
        record = self._read(volume_id)
        newest = self._newest(volume_id)
        if record.revision < newest:
            raise FailedPrecondition(
                f"the record of volume {volume_id} is older than the volume: {self._volume(volume_id) / _RECORD} has "
                f"revision {record.revision} and revision {newest} was written; restore the newest record or, if "
                f"there is none, see what this one says and take it by `luks-csi volume accept-record {volume_id}`"
            )
        return record

    def accept_record(self, volume_id: str) -> VolumeRecord:
        """Take the record that is there for the newest one, whatever was written since; returns it.

        Only a settled record, as nothing is ever formatted by one. Raises NotFound, FailedPrecondition.
        """
        record = self._read(volume_id)
        if record.conversion is not None or self.has_next(volume_id, _HEADER_ROOM):
            raise FailedPrecondition(
                f"the record of volume {volume_id} cannot be taken: the volume was being moved to another volume key, "
                f"and by a record that is older half of it would be lost; restore the newest record"
            )
        if not record.is_settled:
            raise FailedPrecondition(
                f"the record of volume {volume_id} cannot be taken: it says encryption={record.encryption or 'none'} "
                f"and filesystem={record.file_system}, by which the volume would be formatted; restore a newer record "
                f"or read the data by hand"
            )
        try:
            self._mark(volume_id, record.revision)
        except OSError as error:
            raise FailedPrecondition(
                f"the record of volume {volume_id} cannot be taken: the attribute {_MARK} of "
                f"{self._volume(volume_id)} cannot be set ({error.strerror}); run this as root on the node"
            ) from None
        return record

    def update(self, record: VolumeRecord) -> VolumeRecord:
        """Write the record if it was made from the one that is there."""
        if self.get(record.id).revision != record.revision:
            raise Aborted(f"the record of volume {record.id} was changed by another writer; call again")
        updated = msgspec.structs.replace(record, revision=record.revision + 1)
        with self._space_errors(record.id):
            self._files.write(self._volume(record.id) / _RECORD, self._codec.encode(updated))
        # Not fsynced: a mark that a power cut took protects less, and never is one ahead of its durable record. For
        # the same reason a file system without such attributes will do.
        with contextlib.suppress(OSError):
            self._mark(record.id, updated.revision)
        return updated

    def delete(self, volume_id: str) -> None:
        """Take the volume out of sight in one step, then remove it piece by piece."""
        volume, trash, fresh = (self._folder / name / volume_id for name in ("volumes", "trash", "new"))
        for folder in (volume, trash, fresh):
            _refuse_folders(folder)
        if volume.exists():
            self._check_unused(volume_id)
        with self._space_errors(volume_id):
            if volume.exists():
                self._remove(trash)
                self._files.rename(volume, trash)
            self._remove(trash)
            self._remove(fresh)

    def ids(self) -> Sequence[str]:
        """Folder names are the ids."""
        return self._names.read()

    def grow(self, volume_id: str, size: int) -> None:
        """Lengthen the sparse file; a file that is long enough stays as it is."""
        disk = self._volume(volume_id) / _DISK
        try:
            present = disk.stat().st_size
        except FileNotFoundError:
            raise NotFound(f"volume {volume_id} has no backing file {disk}") from None
        try:
            if size > present:
                self._check_room(volume_id, size - present, "free space there")
                self._loops.unguard(str(disk))
                with self._space_errors(volume_id):
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
        disk = self._volume(volume_id) / _DISK
        try:
            return open_handle(str(disk), os.O_RDONLY)
        except FileNotFoundError:
            raise DeviceAbsent(f"volume {volume_id} has no backing file {disk}") from None

    def is_newest(self, record: VolumeRecord) -> bool:
        """Whether the mark says so; a power cut may have taken it."""
        return self._newest(record.id) == record.revision

    def make_next(self, volume_id: str, size: int) -> None:
        """A sparse file beside the volume's own."""
        path = self._volume(volume_id) / _NEXT
        self.drop_next(volume_id)
        with self._space_errors(volume_id):
            disk = (self._volume(volume_id) / _DISK).stat()
            # What is moved is freed where it was: in the end there is no more than the new one, all of it written.
            self._check_room(volume_id, max(0, size - disk.st_blocks * _BLOCK) + _MOVING, "free space there")
            self._files.set_size(path, size, new=True)

    def drop_next(self, volume_id: str) -> None:
        """unlink(2)."""
        path = self._volume(volume_id) / _NEXT
        self._loops.unguard(str(path))
        with self._space_errors(volume_id):
            self._files.remove(path)

    def attach_next(self, volume_id: str) -> AttachedLoop:
        """As `attach`, autoclear."""
        return self._loops.attach(str(self._volume(volume_id) / _NEXT), autoclear=True)

    def has_next(self, volume_id: str, header: int = 0) -> bool:
        """Whether the file is there, and has data from there on; a file system that does not know says so too."""
        try:
            descriptor = os.open(f"{self._volumes}/{volume_id}/{_NEXT}", os.O_RDONLY | os.O_CLOEXEC)
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
        disk, fresh = self._volume(volume_id) / _DISK, self._volume(volume_id) / _NEXT
        for path in (disk, fresh):
            self._loops.unguard(str(path))
        with self._space_errors(volume_id):
            self._files.rename(fresh, disk)
        self._loops.guard(str(disk))  # only where it is attached

    def header_copy(self, volume_id: str) -> Path:
        """Where the copy of the volume's header is kept."""
        return self._volume(volume_id) / _HEADER

    def has_header_copy(self, volume_id: str) -> bool:
        """Whether the file is there."""
        return os.path.exists(f"{self._volumes}/{volume_id}/{_HEADER}")

    def keep_header_copy(self, volume_id: str, fill: Fill) -> None:
        """Written aside and renamed: there is always a whole one."""
        path = self._volume(volume_id) / _HEADER
        fresh = path.with_name(f".{_HEADER}.new")
        try:
            with self._space_errors(volume_id):
                fill(str(fresh))
                self._files.rename(fresh, path)
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink()

    def attach(self, volume_id: str, *, lasting: bool) -> AttachedLoop:
        """One loop device per file, autoclear unless `lasting`."""
        disk = self._volume(volume_id) / _DISK
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

    def space(self) -> Space:
        """What statvfs says, less the floor. Files are sparse: this is room now, not room promised."""
        usage = os.statvfs(self._folder)
        free = usage.f_bavail * usage.f_frsize
        return Space(usage.f_blocks * usage.f_frsize, free, max(0, free - self._floor))

    def orphans(self) -> Sequence[str]:
        """Half-made and half-deleted volumes, and volume folders without a record."""
        leftovers = [path for name in ("new", "trash") for path in (self._folder / name).iterdir()]
        nameless = [path for path in (self._folder / "volumes").iterdir() if not (path / _RECORD).exists()]
        return sorted(map(str, (*leftovers, *nameless)))

    def remove_orphans(self, volume_id: str) -> Sequence[str]:
        """Remove the half-made and the half-deleted one; a folder that lost its record still holds data and stays."""
        leftovers = [path for name in ("new", "trash") if (path := self._folder / name / volume_id).exists()]
        for path in leftovers:
            self._remove(path)
        return [str(path) for path in leftovers]

    def _read(self, volume_id: str) -> VolumeRecord:
        path = f"{self._volumes}/{volume_id}/{_RECORD}"
        try:
            content = read_file(path)
        except FileNotFoundError:
            raise NotFound(f"volume {volume_id} does not exist on this node") from None
        record = self._codec.decode(content, path)
        if record.id != volume_id:
            raise FailedPrecondition(
                f"the volume record {path} is that of volume {record.id}; put each volume's own record back"
            )
        return record

    def _newest(self, volume_id: str) -> int:
        """Revision of the newest record that was written; 0 where nothing tells."""
        with contextlib.suppress(OSError, ValueError):
            return int(os.getxattr(f"{self._volumes}/{volume_id}", _MARK))
        return 0

    def _mark(self, volume_id: str, revision: int) -> None:
        # On the folder: the guard forbids it on the file of a staged volume.
        os.setxattr(self._volume(volume_id), _MARK, str(revision).encode())

    def _remove(self, folder: Path) -> None:
        _refuse_folders(folder)
        for name in (_DISK, _NEXT):
            self._loops.unguard(str(folder / name))  # a power cut leaves the guard on
        if header := self._to_erase(folder):
            for name in (_HEADER, _NEXT, _DISK):
                self._files.overwrite(folder / name, header)
        self._files.remove_folder(folder)

    def _to_erase(self, folder: Path) -> int:
        """How many bytes hold header and key slots, where the volume's class wants them overwritten."""
        try:
            record = self._codec.decode(read_file(folder / _RECORD), str(folder / _RECORD))
        except (OSError, FailedPrecondition):
            return 0  # it was never made to its end, or was erased before its record went
        if record.luks is None or not record.parameters.erase_on_delete:
            return 0
        other = record.conversion.luks.data_offset if record.conversion else 0
        return max(record.luks.data_offset, other)

    def _volume(self, volume_id: str) -> Path:
        return self._folder / "volumes" / volume_id

    def _disk(self, volume_id: str) -> str:
        return f"{self._volumes}/{volume_id}/{_DISK}"  # not by pathlib: that costs more than what is done with it

    def _files_of(self, volume_id: str) -> tuple[str, ...]:
        disk, fresh = self._disk(volume_id), f"{self._volumes}/{volume_id}/{_NEXT}"
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

    @contextlib.contextmanager
    def _space_errors(self, volume_id: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ResourceExhausted(
                    f"no space for volume {volume_id} in {self._folder}: {error.strerror}; free space there"
                ) from None
            raise FailedPrecondition(
                f"volume {volume_id} cannot be written in {self._folder}: {error.strerror}; check that file system"
            ) from None


def half_beside(path: Path) -> Path | None:
    """The file beside that volume's file with what was moved to another volume key, or from there; None without one."""
    other = path.with_name(_NEXT if path.name == _DISK else _DISK)
    return other if path.name in (_DISK, _NEXT) and other.exists() else None


def _refuse_folders(folder: Path) -> None:
    """A folder in a volume's folder is somebody else's: nothing is removed then, and it is named."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        if found := sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False)):
            others = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise FailedPrecondition(
                f"{folder} cannot be removed: it holds the folder {found[0]!r}{others}, which this driver did not "
                f"make; move that away and call again"
            )
