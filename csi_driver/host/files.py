"""Durable files: what is written here is on the disk, whole, before the call returns."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from csi_driver.host.log import log
from csi_driver.host.syscalls import check, error_name, libc

_PIECE = 1 << 20


def read_file(path: str | os.PathLike[str]) -> bytes:
    """All of a file, with as few system calls as it takes: every call reads some. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        while piece := os.read(descriptor, 1 << 16):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(descriptor)


def read_attribute(path: str) -> bytes:
    """What the kernel tells in a file of at most a page (sysfs, fdinfo): one read gives all of it. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def though_read_only(what: str, volume_id: str) -> Iterator[None]:
    """Let what puts a volume down go on where a file of it, `what`, stays as its file system has turned read-only.

    Raises other OSErrors.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        log.warning("a file stays on a read-only file system", volume_id=volume_id, file=what)


class Files:
    """Durable writes, renames and removals; one method per step that a crash may cut."""

    def write(self, path: Path, content: bytes) -> None:
        """Replace `path` with `content`: written new, fsynced, renamed, the folder fsynced.

        A crash leaves the old file or the new one, never a mixture (rename(2)). Raises OSError.
        """
        self._replace(path, content, durable=True)
        self.sync_folder(path.parent)

    def keep(self, path: Path, content: bytes) -> None:
        """`write`, unless that is there already: a file system that has turned read-only is no error then."""
        with contextlib.suppress(FileNotFoundError):
            if read_file(path) == content:
                return
        self.write(path, content)

    def write_volatile(self, path: Path, content: bytes) -> None:
        """Like `write` without the fsyncs: survives the death of the process, not of the kernel."""
        self._replace(path, content, durable=False)

    def fill(self, path: Path, content: bytes, *, durable: bool) -> None:
        """Make `path` a file with `content`, fsynced if `durable`. Raises OSError."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def set_size(self, path: Path, size: int, *, new: bool = False) -> None:
        """Give a file `size` bytes, a `new` one or one that is there; what is added is a hole. Raises OSError."""
        flags = os.O_CREAT | os.O_EXCL if new else 0
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
        try:
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def make_folder(self, folder: Path) -> None:
        """Make a folder that only its owner may enter; whoever renames it into place makes it durable."""
        folder.mkdir(mode=0o700)

    def overwrite(self, path: Path, length: int) -> None:
        """Random bytes, durably, over what was written within the first `length` bytes of a file; absent is fine.

        A file system that writes nothing in place, and an SSD, may keep the old ones. Raises OSError.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            at, end = 0, min(length, os.fstat(descriptor).st_size)
            while at < end:
                try:
                    at = os.lseek(descriptor, at, os.SEEK_DATA)
                except OSError as error:
                    if error.errno != errno.ENXIO:  # nothing but a hole from there on: lseek(2)
                        raise
                    break
                stop = min(end, os.lseek(descriptor, at, os.SEEK_HOLE))
                while at < stop:
                    at += os.pwrite(descriptor, os.urandom(min(_PIECE, stop - at)), at)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def erase(self, path: Path, length: int) -> None:
        """`overwrite` of a file that is removed next; absent is fine. Raises OSError.

        What is behind `length` goes first: a file system that writes nothing in place, or where another file has the
        same blocks, wants room for the overwriting. If it has none even so, the old bytes would stay on the disk in any
        case, and the file goes with a warning.
        """
        with contextlib.suppress(FileNotFoundError):
            try:
                if path.stat().st_size > length:
                    self.set_size(path, length)
                self.overwrite(path, length)
            except OSError as error:
                _raise_unless_full(error)
                _sync_file_system(path)  # what was freed can be had behind the next commit of btrfs
                try:
                    self.overwrite(path, length)
                except OSError as again:
                    _raise_unless_full(again)
                    log.warning("a header was not overwritten", path=str(path), error=error_name(again))

    def rename(self, source: Path, target: Path) -> None:
        """Rename within one file system and make it durable in both folders."""
        os.rename(source, target)
        self.sync_folder(target.parent)
        if source.parent != target.parent:
            self.sync_folder(source.parent)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name, in place of another file's, in one file system; durable in its folder."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)
        os.link(source, target)
        self.sync_folder(target.parent)

    def sync_folder(self, folder: Path) -> None:
        """fsync a folder, so that the names in it are durable."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Remove one file and what a cut write of it left; absent is fine."""
        for name in (path, beside(path)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)

    def remove_folder(self, folder: Path, last: str = "") -> None:
        """Remove a folder of files, one level deep, and make that durable; absent is fine.

        The file named `last` goes behind the others: a removal that was cut is told by it, whose it was say.
        Raises OSError (ENOTEMPTY, EISDIR) when it holds folders: nothing of ours does.
        """
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return
        for name in sorted(names, key=lambda name: name == last):
            self.remove(folder / name)
        os.rmdir(folder)
        self.sync_folder(folder.parent)

    def _replace(self, path: Path, content: bytes, *, durable: bool) -> None:
        fresh = beside(path)
        try:
            self.fill(fresh, content, durable=durable)
            os.rename(fresh, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise


def beside(path: Path) -> Path:
    """Where the new content of `path` is written, which a kill may leave."""
    return path.with_name(f".{path.name}.new")


def _raise_unless_full(error: OSError) -> None:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise error


def _sync_file_system(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        check(libc.syncfs(descriptor), "syncfs")
    finally:
        os.close(descriptor)
