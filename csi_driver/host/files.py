"""Durable files: what is written here is on the disk, whole, before the call returns."""

import contextlib
import os
from pathlib import Path


class Files:
    """Durable writes, renames and removals; one method per step that a crash may cut."""

    def write(self, path: Path, content: bytes) -> None:
        """Replace `path` with `content`: written new, fsynced, renamed, the folder fsynced.

        A crash leaves the old file or the new one, never a mixture (rename(2)). Raises OSError.
        """
        self._replace(path, content, durable=True)

    def write_volatile(self, path: Path, content: bytes) -> None:
        """Like `write` without the fsyncs: survives the death of the process, not of the kernel."""
        self._replace(path, content, durable=False)

    def rename(self, source: Path, target: Path) -> None:
        """Rename within one file system and make it durable in both folders."""
        os.rename(source, target)
        self.sync_folder(target.parent)
        if source.parent != target.parent:
            self.sync_folder(source.parent)

    def sync_folder(self, folder: Path) -> None:
        """fsync a folder, so that the names in it are durable."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Remove one file; absent is fine."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def remove_folder(self, folder: Path) -> None:
        """Remove a folder of files, one level deep, and make that durable; absent is fine.

        Raises OSError (ENOTEMPTY, EISDIR) when it holds folders: nothing of ours does.
        """
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return
        for name in names:
            self.remove(folder / name)
        os.rmdir(folder)
        self.sync_folder(folder.parent)

    def _replace(self, path: Path, content: bytes, *, durable: bool) -> None:
        fresh = path.with_name(f".{path.name}.new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(fresh, path)
        if durable:
            self.sync_folder(path.parent)
