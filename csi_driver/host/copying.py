"""What one block device or file holds into a blank one, piece by piece, with a digest by which it is compared later.

Runs in a worker. What is zero is neither written nor part of the digest: holes stay holes, and where one call ends and
the next one begins makes no difference.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from csi_driver.host import blockdev
from csi_driver.host.handle import Handle, open_handle
from csi_driver.host.syscalls import error_name
from csi_driver.model.errors import CommandFailed, DeviceShort, DeviceUnreadable

PIECE: Final = 1 << 20
"""Bytes by which the digest is chained: each call begins at a multiple of it."""

_BLOCK: Final = 4096
_ZEROS: Final = bytes(PIECE)


@dataclass(frozen=True)
class Stretch:
    """All bytes before `end` are done, `digest` is theirs; `read` of them were read by this call."""

    end: int
    digest: str
    read: int


def copy(source: Handle, target: Handle, start: int, size: int, digest: str, budget: int) -> Stretch:
    """Copy from `start` on, up to `size` or until `budget` bytes were read, durably; `digest` is of what is before.

    The target must read as zeros from there on, but for what an earlier call for the same bytes has left. Raises
    DeviceUnreadable and DeviceShort of the source, CommandFailed of the target.
    """
    end, chained, read = start, bytes.fromhex(digest), 0
    reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        writing = os.open(target, os.O_RDWR | os.O_CLOEXEC)
        try:
            for at, piece in _pieces(source, reading, start, size, budget):
                end, read = at + len(piece), read + len(piece)
                if not _is_zero(piece):
                    chained = _chained(chained, at, piece)
                    _write(target, writing, at, piece)
            _sync(target, writing)
        finally:
            os.close(writing)
        os.posix_fadvise(reading, start, end - start, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(reading)
    return Stretch(end, chained.hex(), read)


def look(device: Handle, start: int, size: int, digest: str, budget: int) -> Stretch:
    """As `copy`, without a target: what the device holds, read from the disk and not from memory."""
    end, chained, read = start, bytes.fromhex(digest), 0
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, start, 0, os.POSIX_FADV_DONTNEED)
        for at, piece in _pieces(device, descriptor, start, size, budget):
            end, read = at + len(piece), read + len(piece)
            if not _is_zero(piece):
                chained = _chained(chained, at, piece)
    finally:
        os.close(descriptor)
    return Stretch(end, chained.hex(), read)


def copy_file(source: str, target: str) -> None:
    """A small file into a new one, with its holes, durably. Raises OSError, DeviceUnreadable, CommandFailed."""
    with open_handle(source, os.O_RDONLY) as reading:
        size = os.fstat(reading.fd).st_size
        made = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with Handle(made, target) as writing:
            os.ftruncate(writing.fd, size)
            copy(reading, writing, 0, size, "", size)


def stamp(storage: Handle) -> str:
    """By which a change of a closed volume's storage is noticed: its length and, of a file, when it was written to."""
    if stamp_tells(storage):
        status = os.fstat(storage.fd)
        return f"{status.st_size} {status.st_mtime_ns}"
    return str(blockdev.size_bytes(storage.fd))


def stamp_tells(storage: Handle) -> bool:
    """Whether `stamp` changes with each write to it: of a device nothing does."""
    return stat.S_ISREG(os.fstat(storage.fd).st_mode)


def _pieces(source: Handle, descriptor: int, start: int, size: int, budget: int) -> Iterator[tuple[int, bytes]]:
    """Each piece and where it begins, without those in a file's holes; the last one is empty and tells the end."""
    is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
    at, read = start, 0
    try:
        while at < size and read < budget:
            if is_file and (at := _next_data(descriptor, at, size)) >= size:
                break
            piece = blockdev.read_at(descriptor, at, min(PIECE, size - at))
            if len(piece) < min(PIECE, size - at):
                raise DeviceShort(
                    f"{source} is expected to have {size} bytes and ends at {at + len(piece)}; nothing more was copied"
                )
            yield at, piece
            at, read = at + len(piece), read + len(piece)
    except OSError as error:
        raise DeviceUnreadable(
            f"{source} cannot be read at {at} ({error_name(error)}); check the storage below it"
        ) from None
    yield at, b""


def _next_data(descriptor: int, at: int, size: int) -> int:
    """Where the next piece begins that is no hole; `size` where only a hole is left (lseek(2))."""
    try:
        found = os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return size
    return max(at, found - found % PIECE)


def _is_zero(piece: bytes) -> bool:
    return piece == _ZEROS[: len(piece)]


def _chained(digest: bytes, at: int, piece: bytes) -> bytes:
    return hashlib.sha256(digest + b"%d:" % at + hashlib.sha256(piece).digest()).digest()


def _write(target: Handle, descriptor: int, at: int, piece: bytes) -> None:
    """What is not zero of it, in as few calls as that takes."""
    data = [begin for begin in range(0, len(piece), _BLOCK) if not _is_zero(piece[begin : begin + _BLOCK])]
    try:
        while data:
            run = next((n for n in range(1, len(data)) if data[n] != data[0] + n * _BLOCK), len(data))
            view, position = memoryview(piece)[data[0] : data[run - 1] + _BLOCK], at + data[0]
            while view:
                written = os.pwrite(descriptor, view, position)
                view, position = view[written:], position + written
            data = data[run:]
    except OSError as error:
        raise _refused(target, error) from None


def _sync(target: Handle, descriptor: int) -> None:
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise _refused(target, error) from None


def _refused(target: Handle, error: OSError) -> CommandFailed:
    return CommandFailed(f"{target} cannot be written ({error_name(error)}); check the storage below it")
