"""One flock per volume, held across processes and inherited by every child that can touch the device."""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from csi_driver.host.held import await_started, holding
from csi_driver.host.holders import Holders, describe
from csi_driver.model.errors import VolumeBusy

_OPEN_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW


def _always(_: str) -> bool:
    return True


class VolumeLocks:
    """Lock files under `folder`, one per volume id; never waits for a call or a child at work.

    `is_known` says whether a volume exists: the file of one that does not goes when its lock is released. `remade`: a
    folder that somebody removed is made again.
    """

    def __init__(
        self, folder: Path, holders: Holders, is_known: Callable[[str], bool] = _always, *, remade: bool = False
    ) -> None:
        self._folder = folder
        self._holders = holders
        self._is_known = is_known
        self._remade = remade

    @contextlib.contextmanager
    def hold(self, volume_id: str) -> Iterator[None]:
        """Hold the lock of `volume_id` for the length of the block.

        Raises VolumeBusy, naming the process, when another call or an earlier child holds it.
        """
        path = f"{self._folder}/{volume_id}"
        descriptor = self._acquire(path, volume_id)
        try:
            with holding(descriptor):
                yield
        finally:
            # Closing is the release: an explicit LOCK_UN would also free the lock under a child that still runs.
            os.close(descriptor)
            if not self._is_known(volume_id):
                self._discard(path, volume_id)

    def _discard(self, path: str, volume_id: str) -> None:
        """Remove the file of a volume that is gone, unless its lock is held: by a child that hangs on a device, say."""
        # On a file system that went read-only it stays, and is as good for the next call.
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | _OPEN_FLAGS)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current(path, descriptor) and not self._is_known(volume_id):
                    os.unlink(path)
            finally:
                os.close(descriptor)

    def _acquire(self, path: str, volume_id: str) -> int:
        while True:
            descriptor = self._open(path)
            try:
                self._lock(descriptor)
                # The file may have been removed with its volume between open and flock: then this lock guards nothing.
                if self._is_current(path, descriptor):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                raise self._busy(path, volume_id) from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    @staticmethod
    def _lock(descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # A call that has ended may have left a copy of its lock in a child that has not come to its exec.
            await_started()
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _open(self, path: str) -> int:
        while True:
            try:
                return os.open(path, os.O_RDWR | os.O_CREAT | _OPEN_FLAGS, 0o600)
            except OSError as error:
                if self._remade and error.errno == errno.ENOENT:
                    self._folder.mkdir(mode=0o700, exist_ok=True)
                    continue
                if error.errno not in (errno.EROFS, errno.ENOSPC, errno.EDQUOT):
                    raise
                return self._open_what_is_there(path)

    def _open_what_is_there(self, path: str) -> int:
        """The state directory went read-only or is full: volumes must still be put down, which needs their locks."""
        try:
            return os.open(path, os.O_RDONLY | _OPEN_FLAGS)
        except FileNotFoundError:
            return os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | _OPEN_FLAGS)

    @staticmethod
    def _is_current(path: str, descriptor: int) -> bool:
        opened = os.fstat(descriptor)
        if stat.S_ISDIR(opened.st_mode):
            return True
        try:
            named = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)

    def _busy(self, path: str, volume_id: str) -> VolumeBusy:
        others = [holder for holder in self._holders.of_file(path) if holder.pid != os.getpid()]
        if others:
            return VolumeBusy(
                f"an earlier operation on volume {volume_id} is still at work in {describe(others)}; "
                f"call again when it has ended"
            )
        return VolumeBusy(f"another call on volume {volume_id} is still at work; call again when it has ended")
