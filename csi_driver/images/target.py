"""Where a clone is written: a folder with a part file in it, its lock, and the system calls on both.

<folder>/part               the bytes, with their LUKS2 header if encrypted
<folder>/checkpoint.json    how much of them is durable (csi_driver.images.checkpoint)
.<folder>.lock              held by the run that is at work; beside the folder, as that comes and goes
"""

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from csi_driver.host.clonefile import share_blocks
from csi_driver.host.files import Files
from csi_driver.host.held import held_descriptors
from csi_driver.host.holders import Holders, describe
from csi_driver.host.locks import VolumeLocks
from csi_driver.host.syscalls import check, error_name, libc
from csi_driver.images.store import lock_of
from csi_driver.luks.formats import LuksFormat
from csi_driver.luks.image_header import padded
from csi_driver.model.errors import CommandFailed, ResourceExhausted, VolumeBusy
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import LuksIdentity

BLOCK: Final = 4096
"""Offsets, lengths and memory of direct I/O are whole blocks of this size; no disk asks for more (open(2))."""

_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.EPERM)


class NoRoom(ResourceExhausted):
    """The target's file system, or a limit on it, has no room."""


class TargetFailed(CommandFailed):
    """The target cannot be written or read back; what lies in it is not to be trusted."""


class Disk:
    """The system calls on a part, one method each: the seam for tests of what fails. All raise OSError."""

    def free(self, folder: Path) -> int:
        """Bytes that may be written to the file system of `folder`."""
        usage = os.statvfs(folder)
        return usage.f_bavail * usage.f_frsize

    def allocate(self, descriptor: int, offset: int, length: int) -> None:
        """Reserve room, reading as zeros (fallocate(2)); a file system that cannot is left to do it on writing."""
        self._fallocate(descriptor, 0, offset, length)

    def punch(self, descriptor: int, offset: int, length: int) -> None:
        """Make a hole of what was reserved and never written, where the file system can."""
        self._fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, offset, length)

    def reflink(self, descriptor: int, source: int) -> bool:
        """Share all blocks of `source`, copied when either is written; whether that can be done."""
        return share_blocks(source, descriptor)

    def write(self, descriptor: int, content: memoryview, offset: int) -> int:
        """pwrite(2)."""
        return os.pwrite(descriptor, content, offset)

    def read(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        """preadv(2)."""
        return os.preadv(descriptor, [buffer], offset)

    def sync(self, descriptor: int) -> None:
        """fdatasync(2)."""
        os.fdatasync(descriptor)

    @staticmethod
    def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
        # Not posix_fallocate(3): where the file system cannot, that writes to every block.
        start, size = ctypes.c_int64(offset), ctypes.c_int64(length)
        try:
            check(libc.fallocate(ctypes.c_int(descriptor), ctypes.c_int(mode), start, size), "fallocate")
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise


@dataclass(frozen=True)
class Encryption:
    """How a target is encrypted: the format of its header, and what opens its key slot."""

    format: LuksFormat
    passphrase: Passphrase


@dataclass(frozen=True)
class Target:
    """A folder that one clone is made in. Its parent must be there; the folder is made if it is not."""

    folder: Path
    encryption: Encryption | None = None
    files: Files = field(default_factory=Files)
    disk: Disk = field(default_factory=Disk)

    @property
    def part(self) -> Path:
        """The bytes."""
        return self.folder / "part"

    @property
    def checkpoint(self) -> Path:
        """How much of them is durable."""
        return self.folder / "checkpoint.json"

    def discard(self) -> None:
        """Remove part and checkpoint, and the folder if nothing else is in it. Absent is fine. Raises OSError."""
        for path in (self.checkpoint, self.part):
            self.files.remove(path)
        with contextlib.suppress(OSError):
            os.rmdir(self.folder)
        self.files.sync_folder(self.folder if self.folder.exists() else self.folder.parent)


@dataclass(frozen=True)
class PassResult:
    """A whole and durable copy at `part`: its length and that of the payload, and its LUKS2 identity if encrypted.

    A `reflinked` copy shares the source's blocks. `resumed` is how many chunks an earlier run had made.
    """

    part: Path
    size: int
    payload: int
    luks: LuksIdentity | None
    resumed: int
    reflinked: bool


Publish = Callable[[PassResult], None]
"""Takes a result over, by a rename."""


class Lock:
    """A held lock of a target."""

    def __init__(self) -> None:
        self.kept = False

    def keep(self) -> None:
        """Hold it until this process ends, as a thread that hangs in a system call may still write to the target."""
        os.dup(held_descriptors()[-1])
        self.kept = True


@contextlib.contextmanager
def hold(target: Target, where: str) -> Iterator[Lock]:
    """Hold the lock of `target`. Raises VolumeBusy, naming the process, when another run is at work on it, NoRoom and
    TargetFailed.
    """
    lock, holders = Lock(), Holders()
    path = lock_of(target.folder)
    with contextlib.ExitStack() as stack:
        try:
            with target_errors(where, target.folder, "locked"):
                stack.enter_context(VolumeLocks(path.parent, holders, lambda _: lock.kept).hold(path.name))
        except VolumeBusy:
            who = describe(holders.of_file(path))
            raise VolumeBusy(
                f"another run is at work on {where} in {target.folder} ({who}); run it again when that has ended"
            ) from None
        yield lock


class PartFile:
    """An open part. Reads and writes go past the page cache where the file system allows it, in whole blocks.

    Safe for several threads. Raises NoRoom and TargetFailed.
    """

    def __init__(self, target: Target, where: str, *, new: bool) -> None:
        self._where = where
        self._folder = target.folder
        self._disk = target.disk
        self._abandoned = False
        self._direct: int | None = None
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if new else 0)
        with self._errors("opened"):
            self._buffered = os.open(target.part, flags, 0o600)
            with contextlib.suppress(OSError):
                self._direct = os.open(target.part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECT)
        self._opened = [descriptor for descriptor in (self._buffered, self._direct) if descriptor is not None]

    def close(self) -> None:
        """Close it, unless it is abandoned."""
        if not self._abandoned:
            for descriptor in self._opened:
                os.close(descriptor)

    def abandon(self) -> None:
        """Never close it: a thread hangs in it, and its descriptors must not become those of another file."""
        self._abandoned = True

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return os.fstat(self._buffered).st_size

    @property
    def allocated(self) -> int:
        """Bytes it takes of its file system."""
        return os.fstat(self._buffered).st_blocks * 512

    def reserve(self, offset: int, length: int) -> None:
        """Room for the blocks that hold this range."""
        with self._errors("reserved"):
            start = offset // BLOCK * BLOCK
            self._disk.allocate(self._buffered, start, padded(offset + length, BLOCK) - start)

    def punch(self, offset: int, length: int) -> None:
        """Give back room that was reserved and never written."""
        with self._errors("written"):
            self._disk.punch(self._buffered, offset, length)

    def reflink(self, source: Path) -> bool:
        """Become a copy of `source` that shares its blocks; False, and unchanged, where that cannot be."""
        with self._errors("written"):
            descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return self._disk.reflink(self._buffered, descriptor)
            finally:
                os.close(descriptor)

    def write(self, content: memoryview, offset: int) -> None:
        """Write whole blocks, all of them."""
        with self._errors("written"):
            while content:
                written = self._transfer(self._disk.write, content, offset)
                content, offset = content[written:], offset + written

    def read(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer`, of whole blocks, from what lies on the disk; the count is smaller only at the end."""
        with self._errors("read back"):
            if self._direct is None:
                os.posix_fadvise(self._buffered, offset, len(buffer), os.POSIX_FADV_DONTNEED)
            filled = 0
            # A direct read that ends within a block has met the end of the file.
            while filled < len(buffer) and filled % BLOCK == 0:
                count = self._transfer(self._disk.read, buffer[filled:], offset + filled)
                if not count:
                    break
                filled += count
            return filled

    def read_at(self, offset: int, length: int) -> bytes:
        """Any few bytes, fewer only at the end."""
        with self._errors("read back"):
            return os.pread(self._buffered, length, offset)

    def sync(self) -> None:
        """What was written so far is on the disk."""
        with self._errors("made durable"):
            self._disk.sync(self._buffered)

    def set_size(self, size: int) -> None:
        """Its length in bytes, durable."""
        with self._errors("made durable"):
            os.ftruncate(self._buffered, size)
            os.fsync(self._buffered)

    def _transfer(self, call: Callable[[int, memoryview, int], int], memory: memoryview, offset: int) -> int:
        direct = self._direct
        if direct is not None:
            try:
                return call(direct, memory, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            self._direct = None  # opened for direct I/O and refusing it: larger blocks, or none at all
        return call(self._buffered, memory, offset)

    @contextlib.contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        with target_errors(self._where, self._folder, done):
            yield


@contextlib.contextmanager
def target_errors(where: str, folder: Path, done: str) -> Iterator[None]:
    """Turn OSError into NoRoom or TargetFailed: the copy of `where` in `folder` could not be `done`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoRoom(
                f"no space for {where} in {folder}: {error.strerror}; its unfinished copy is removed, free space there"
            ) from None
        raise TargetFailed(
            f"the copy of {where} in {folder} could not be {done} ({error_name(error)}); check that file system and "
            f"the kernel log"
        ) from None
