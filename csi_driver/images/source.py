"""The payload of an image whose file is the payload: raw, iso, and the ciphertext of an encrypted image."""

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Iterator
from enum import StrEnum
from typing import Final

from csi_driver.host.blockdev import kind
from csi_driver.host.syscalls import error_name
from csi_driver.images.base import Extent
from csi_driver.model.errors import DeviceUnreadable, InvalidArgument

_BLOCK: Final = 4096
_TURN: Final = 8
"""Reads in a row by one way, then by the other."""
_TURNS: Final = 4
_WORTH: Final = 0.9


class Way(StrEnum):
    """How a file is read."""

    DIRECT = "past the page cache"
    CACHED = "through the page cache"


class WayChoice:
    """The faster way to read this file from this disk, by its first reads: the ways take turns, then one is taken.

    What is in memory already, or comes from a disk that wants to be read ahead, is had sooner through the page cache;
    that costs a copy and pushes out what others have there. So it must be a tenth faster. Safe for several threads.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._begun = 0
        self._done = dict.fromkeys(Way, 0)
        self._cost = dict.fromkeys(Way, 0.0)  # seconds by byte, added up
        self.chosen: Way | None = None

    def next(self) -> Way:
        """The way for the next read."""
        if self.chosen is not None:
            return self.chosen
        with self._guard:
            turn = self._begun // _TURN
            self._begun += 1
        return Way.CACHED if turn < _TURNS and turn % 2 else Way.DIRECT

    def tell(self, way: Way, length: int, seconds: float) -> None:
        """What a read of `length` bytes took."""
        if self.chosen is not None:
            return
        with self._guard:
            self._done[way] += 1
            self._cost[way] += seconds / length
            if all(done >= _TURN * _TURNS // 2 for done in self._done.values()):
                mean = {each: self._cost[each] / self._done[each] for each in Way}
                self.chosen = Way.CACHED if mean[Way.CACHED] < mean[Way.DIRECT] * _WORTH else Way.DIRECT


def open_regular(path: str, where: str) -> int:
    """Open the regular file at `path` for reading; returns the descriptor.

    /proc/self/fd/<number> is a good `path`: it names a file that the caller holds open already. Raises
    InvalidArgument when it is something else than a regular file, DeviceUnreadable when it cannot be opened.
    """
    try:
        # A FIFO would make a plain open wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DeviceUnreadable(f"the file of {where} cannot be opened ({error_name(error)}); check its path") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise InvalidArgument(f"{where} is expected to be a regular file and is a {kind(mode)}; name the image's file")
    return descriptor


class RawReader:
    """Reads a regular file as it is; its holes are extents of zeros (lseek(2), SEEK_HOLE).

    `where` names the image in errors. Whole blocks go past the page cache (open(2), O_DIRECT) where the file system can
    and that is no slower: `choice` has it. An image is read once and longer than the memory: what went through the
    cache leaves it again (posix_fadvise(2)). Errors of the constructor as `open_regular`. Close it after the last read.
    """

    def __init__(self, path: str, where: str) -> None:
        self._where = where
        self._descriptor = open_regular(path, where)
        self._direct: int | None = None
        with contextlib.suppress(OSError):
            self._direct = os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self.choice = WayChoice()
        self._size = os.fstat(self._descriptor).st_size

    @property
    def size(self) -> int:
        return self._size

    def extents(self) -> Iterator[Extent]:
        """The whole file in order: data and holes in turn. Raises DeviceUnreadable."""
        position = 0
        while position < self._size:
            data = self._seek(position, os.SEEK_DATA)
            if data > position:
                yield Extent(position, data - position, zero=True)
            if data == self._size:
                return
            position = self._seek(data, os.SEEK_HOLE)
            if position <= data:  # only a file that is changed meanwhile shows that
                raise self._unreadable(data, "the file changes while it is read")
            yield Extent(data, position - data, zero=False)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        position, rest = offset, buffer
        while rest:
            try:
                count = self._read(rest, position)
            except OSError as error:
                raise self._unreadable(position, error_name(error)) from None
            if not count:
                raise self._unreadable(position, "the file ends early")
            position, rest = position + count, rest[count:]

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def _read(self, buffer: memoryview, offset: int) -> int:
        if self._direct is None or offset % _BLOCK or len(buffer) % _BLOCK:
            return self._read_cached(buffer, offset)
        way, started = self.choice.next(), time.monotonic()
        count = self._read_direct(self._direct, buffer, offset) if way is Way.DIRECT else None
        if count is None:
            count = self._read_cached(buffer, offset)
        self.choice.tell(way, len(buffer), time.monotonic() - started)
        return count

    @staticmethod
    def _read_direct(descriptor: int, buffer: memoryview, offset: int) -> int | None:
        """None for memory that does not fit, or a file system that cannot."""
        try:
            return os.preadv(descriptor, [buffer], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return None

    def _read_cached(self, buffer: memoryview, offset: int) -> int:
        count = os.preadv(self._descriptor, [buffer], offset)
        os.posix_fadvise(self._descriptor, offset, count, os.POSIX_FADV_DONTNEED)
        return count

    def _seek(self, position: int, whence: int) -> int:
        """The next data or hole from `position` on, the size where there is none."""
        try:
            return min(os.lseek(self._descriptor, position, whence), self._size)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self._size
            raise self._unreadable(position, error_name(error)) from None

    def _unreadable(self, offset: int, cause: str) -> DeviceUnreadable:
        return DeviceUnreadable(
            f"{self._where} cannot be read at byte {offset} of {self._size}: {cause}; check the file and its storage"
        )
