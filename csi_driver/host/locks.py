"""One flock per volume, held across processes and inherited by every child that can touch the device."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

from csi_driver.host.holders import Holders, describe
from csi_driver.model.errors import VolumeBusy

_held: ContextVar[tuple[int, ...]] = ContextVar("held_lock_descriptors", default=())


def held_descriptors() -> tuple[int, ...]:
    """Descriptors of the locks that the running call holds; every child of the call inherits them.

    They travel in a context variable so that no caller can forget them: a child that outlives a killed server keeps
    the volume locked until it ends.
    """
    return _held.get()


# A program that another call starts shares our descriptors from fork to exec, and with them a lock just released.
_FORK_SECONDS = 0.5
_PAUSE_SECONDS = 0.005


def _always(_: str) -> bool:
    return True


class VolumeLocks:
    """Lock files under `folder`, one per volume id; never waits for a call or a child at work.

    `is_known` says whether a volume exists: the file of one that does not goes when its lock is released.
    """

    def __init__(self, folder: Path, holders: Holders, is_known: Callable[[str], bool] = _always) -> None:
        self._folder = folder
        self._holders = holders
        self._is_known = is_known
        self._held_here: set[str] = set()
        self._released: dict[str, float] = {}

    @contextlib.contextmanager
    def hold(self, volume_id: str) -> Iterator[None]:
        """Hold the lock of `volume_id` for the length of the block.

        Raises VolumeBusy, naming the process, when another call or an earlier child holds it.
        """
        path = self._folder / volume_id
        descriptor = self._acquire(path, volume_id)
        self._held_here.add(volume_id)
        token = _held.set((*_held.get(), descriptor))
        try:
            yield
        finally:
            _held.reset(token)
            try:
                if not self._is_known(volume_id):
                    self.forget(volume_id)
            finally:
                self._held_here.discard(volume_id)
                self._released[volume_id] = time.monotonic()
                # Closing is the release: an explicit LOCK_UN would also free the lock under a child that still runs.
                os.close(descriptor)

    def forget(self, volume_id: str) -> None:
        """Remove the lock file of a deleted volume; call it while holding the lock."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._folder / volume_id)

    def _acquire(self, path: Path, volume_id: str) -> int:
        deadline = self._released.pop(volume_id, 0.0) + _FORK_SECONDS
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The file may have been removed with its volume between open and flock: then this lock guards nothing.
                if self._is_current(path, descriptor):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                if volume_id in self._held_here or time.monotonic() > deadline:
                    raise self._busy(path, volume_id) from None
                time.sleep(_PAUSE_SECONDS)
                continue
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    @staticmethod
    def _is_current(path: Path, descriptor: int) -> bool:
        try:
            named = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        opened = os.fstat(descriptor)
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)

    def _busy(self, path: Path, volume_id: str) -> VolumeBusy:
        others = [holder for holder in self._holders.of_file(path) if holder.pid != os.getpid()]
        if others:
            return VolumeBusy(
                f"an earlier operation on volume {volume_id} is still at work in {describe(others)}; "
                f"call again when it has ended"
            )
        return VolumeBusy(f"another call on volume {volume_id} is still at work; call again when it has ended")
