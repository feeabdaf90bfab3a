"""A file's content into another one: shared blocks where the file system can, else a copy with its holes.

Runs in a worker: it may take long, and a storage that hangs must cost nobody but the worker.
"""

import errno
import fcntl
import os
import stat
from typing import Final, Self

from msgspec import Struct

from csi_driver.host.syscalls import error_name
from csi_driver.model.errors import Aborted, DeviceUnreadable

_FICLONE: Final = 0x40049409
# ioctl_ficlone(2), copy_file_range(2): what says "not here", and nothing was written
_CANNOT: Final = frozenset(
    {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ETXTBSY}
)
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_PIECE: Final = 64 << 20
_BUFFER: Final = 4 << 20


class FileIdentity(Struct, frozen=True):
    """A regular file that nobody changes: another file at its path is noticed. `size` in bytes."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Self:
        """The file at `path`. Raises OSError."""
        return cls.seen(str(path), os.stat(path, follow_symlinks=False))

    @classmethod
    def seen(cls, path: str, status: os.stat_result) -> Self:
        """The file that has this status."""
        return cls(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def open(self, where: str) -> int:
        """Open it for reading and return the descriptor; `where` names what it is in errors.

        Raises Aborted when it is gone or another one has its place, DeviceUnreadable.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise Aborted(f"the file of {where} went away; call again") from None
        except OSError as error:
            raise DeviceUnreadable(f"{where} cannot be opened ({error_name(error)}); check its storage") from None
        if self.seen(self.path, os.fstat(descriptor)) != self:
            os.close(descriptor)
            raise Aborted(f"the file of {where} was replaced by another one; call again")
        return descriptor


def clone_file(where: str, source: FileIdentity, target: str, size: int) -> bool:
    """Let `target` begin with what is in `source`, durably; returns whether they share blocks.

    A regular file becomes `size` bytes long: what is behind the source's end is a hole, what does not fit is left out.
    A block device must be blank. `where` names the source in errors. Raises Aborted (`FileIdentity.open`), OSError
    (ENOSPC, EDQUOT, EFBIG) when there is no room, DeviceUnreadable for everything else.
    """
    reading = source.open(where)
    try:
        writing = os.open(target, os.O_RDWR | os.O_CLOEXEC)
        try:
            is_file = stat.S_ISREG(os.fstat(writing).st_mode)
            if is_file:
                os.ftruncate(writing, 0)
            if not (shared := is_file and share_blocks(reading, writing)):
                _copy(reading, writing, min(source.size, size))
            if is_file:
                os.ftruncate(writing, size)
            os.fsync(writing)
            return shared
        finally:
            os.close(writing)
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise DeviceUnreadable(
            f"{where} cannot be copied to {target} ({error_name(error)}); check the storage of both"
        ) from None
    finally:
        os.close(reading)


def share_blocks(reading: int, writing: int) -> bool:
    """Let one file be a copy of the other that shares its blocks (ioctl_ficlone(2)); False where that cannot be."""
    try:
        fcntl.ioctl(writing, _FICLONE, reading)
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise
    return True


def _copy(reading: int, writing: int, end: int) -> None:
    position = 0
    while position < end:
        try:
            start = os.lseek(reading, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # nothing but a hole is left
            raise
        position = min(os.lseek(reading, start, os.SEEK_HOLE), end)
        while start < position:
            count = _copy_piece(reading, writing, start, min(position - start, _PIECE))
            if not count:
                raise OSError(errno.EIO, "the file became shorter")
            # An image is read once and may be longer than the memory.
            os.posix_fadvise(reading, start, count, os.POSIX_FADV_DONTNEED)
            start += count


def _copy_piece(reading: int, writing: int, at: int, length: int) -> int:
    try:
        return os.copy_file_range(reading, writing, length, at, at)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    piece = os.pread(reading, min(length, _BUFFER), at)
    view = memoryview(piece)
    while view:
        view = view[os.pwrite(writing, view, at + len(piece) - len(view)) :]
    return len(piece)
