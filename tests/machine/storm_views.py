"""How records get into a volume and out of it: through the paths that the driver shows, as a pod would.

A view holds what it opened, so nothing can be unmounted or given to another volume while it is looked at or written.
"""

import contextlib
import errno
import mmap
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tests.machine.storm_model import PLACES, RECORD_BYTES, Ledger, Slot, There


class NotShown(Exception):
    """The volume is not shown at that path, as far as this process can see."""


class View(Protocol):
    """Records of an open volume by place; raises OSError."""

    def read(self, place: int) -> bytes | None: ...

    def write(self, place: int, record: bytes) -> None:
        """Durable when it returns."""


class _FolderView:
    def __init__(self, folder: int) -> None:
        self._folder = folder

    def read(self, place: int) -> bytes | None:
        try:
            with self._open(place, os.O_RDONLY) as file:
                return os.pread(file, RECORD_BYTES, 0)
        except FileNotFoundError:
            return None

    def write(self, place: int, record: bytes) -> None:
        with self._open(place, os.O_WRONLY | os.O_CREAT) as file:
            os.pwrite(file, record, 0)
            os.fsync(file)
        os.fsync(self._folder)

    @contextlib.contextmanager
    def _open(self, place: int, flags: int) -> Iterator[int]:
        file = os.open(f"record-{place}", flags | os.O_CLOEXEC, 0o600, dir_fd=self._folder)
        try:
            yield file
        finally:
            os.close(file)


class _DeviceView:
    """Past the page cache: what is read lies on the device."""

    def __init__(self, device: int, size: int) -> None:
        self._device = device
        self._apart = size // PLACES
        self._page = mmap.mmap(-1, RECORD_BYTES)

    def read(self, place: int) -> bytes | None:
        os.preadv(self._device, [self._page], place * self._apart)
        return bytes(self._page)

    def write(self, place: int, record: bytes) -> None:
        self._page[:] = record
        os.pwritev(self._device, [self._page], place * self._apart)
        os.fsync(self._device)


@contextlib.contextmanager
def view_of(slot: Slot, path: Path) -> Iterator[View]:
    """What the path shows. Raises NotShown."""
    flags = os.O_RDWR | os.O_DIRECT if slot.kind.block else os.O_RDONLY | os.O_DIRECTORY
    try:
        opened = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise NotShown(f"{path}: {error.strerror}") from None
    try:
        if slot.kind.block:
            if not stat.S_ISBLK(os.fstat(opened).st_mode):
                raise NotShown(f"{path} is no device")
            yield _DeviceView(opened, slot.kind.size)
        else:
            if os.fstat(opened).st_dev == path.parent.stat().st_dev:
                raise NotShown(f"nothing is mounted at {path}")
            yield _FolderView(opened)
    finally:
        os.close(opened)


def verify(slot: Slot, view: View, ledger: Ledger) -> bool:
    """Compare all records with the model; whether all is well. For the holder of `slot.io`."""
    if slot.there is There.NO:
        ledger.tell("foreign", f"volume {slot.name} was deleted and something is still shown as it")
        return False
    well = True
    for place in range(PLACES):
        try:
            finding = slot.judge(place, view.read(place))
        except OSError as error:
            finding = "lost", f"volume {slot.name} (generation {slot.generation}), place {place}: {_words(error)}"
        if finding is not None:
            ledger.tell(*finding)
            well = False
    return well


def write(slot: Slot, view: View, ledger: Ledger, rng: random.Random) -> None:
    """Write a record where the volume is proven to be the slot's. For the holder of `slot.io`."""
    place = rng.randrange(PLACES) if slot.acknowledged(0) else 0
    try:
        finding = slot.judge(0, view.read(0))
        if finding is not None:
            ledger.tell(*finding)
            return
        view.write(place, slot.next(place))
        slot.acknowledge(place)
        ledger.count("records")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            ledger.tell("lost", f"volume {slot.name} (generation {slot.generation}) cannot be written: {_words(error)}")


def _words(error: OSError) -> str:
    return f"{errno.errorcode.get(error.errno or 0)}, {error.strerror}"
