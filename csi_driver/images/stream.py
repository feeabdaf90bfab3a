"""The threads of a clone: each takes the next chunk, reads, encrypts, hashes and writes it, in its own one buffer."""

import contextlib
import ctypes
import hashlib
import mmap
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final, Protocol, Self

from csi_driver.images.base import CHUNK, MIB, Extent, Reader
from csi_driver.images.checkpoint import DIGEST_BYTES, Checkpoint
from csi_driver.images.target import BLOCK, PartFile
from csi_driver.luks.bulk import SectorCipher
from csi_driver.luks.image_header import padded
from csi_driver.model.errors import DeadlineExceeded, DeviceUnreadable

_UNIT: Final = 512
_HOLE: Final = 64 * 1024
"""Zeros of a plain image become a hole in pieces of this size."""
_TICK_SECONDS: Final = 0.2
_HUGE_PAGE: Final = 2 * MIB  # of x86-64, and of arm64 with pages of 4 KiB

READ_BACK: Final = 4
"""Chunks before the place where a pass goes on that are compared with the checkpoint first."""


@dataclass(frozen=True)
class Pace:
    """Bytes of a chunk, a multiple of BLOCK; chunks between the places where a checkpoint may stand; bytes and seconds
    from one checkpoint to the next, and on to such a place; seconds that one chunk may take.
    """

    chunk: int = CHUNK
    stride: int = 64
    checkpoint_bytes: int = 256 * MIB
    checkpoint_seconds: float = 5.0
    patience: float = 300.0


USUAL_PACE: Final = Pace()
"""For images of any size."""


@dataclass(frozen=True)
class Chunk:
    """A chunk of the payload by its number, and what of it is not zero."""

    index: int
    data: Sequence[Extent] = ()


@dataclass(frozen=True)
class Layout:
    """Where chunks lie, in bytes; a plain target has offset 0 and sectors of 1. And which of them are hashed: all to
    `verify`, else those that a checkpoint can end with, which stands every `stride` chunks and at the end.
    """

    payload: int
    chunk: int
    offset: int
    sector: int
    stride: int = 1
    verify: bool = False

    @property
    def chunks(self) -> int:
        """How many there are."""
        return -(-self.payload // self.chunk)

    @property
    def end(self) -> int:
        """Length of the target."""
        return self.offset + padded(self.payload, self.sector)

    def length(self, index: int) -> int:
        """Payload of a chunk; only the last one is short."""
        return min(self.chunk, self.payload - index * self.chunk)

    def stored(self, index: int) -> int:
        """What the target holds of it: whole sectors."""
        return padded(self.length(index), self.sector)

    def place(self, index: int) -> int:
        """Where that lies in the target."""
        return self.offset + index * self.chunk

    def secured(self, chunks: int) -> int:
        """How many of the leading `chunks` a checkpoint can speak of."""
        return chunks if chunks == self.chunks else chunks - chunks % self.stride

    def hashed(self, index: int) -> bool:
        """Whether the digest of a chunk may ever be read."""
        return self.verify or self.secured(min(index + READ_BACK, self.chunks)) > index


def chunks_of(reader: Reader, layout: Layout, first: int, where: str) -> Iterator[Chunk]:
    """The chunks from `first` on, in order. Raises DeviceUnreadable when the extents leave gaps."""
    index, data, position = first, list[Extent](), 0
    for extent in reader.extents():
        if extent.offset != position or extent.length <= 0:
            break
        position += extent.length
        while index < layout.chunks and position > (start := index * layout.chunk):
            begin, end = max(extent.offset, start), min(position, start + layout.length(index))
            if not extent.zero and begin < end:
                data.append(Extent(begin, end - begin, zero=False))
            if position < start + layout.length(index):
                break
            yield Chunk(index, data)
            index, data = index + 1, []
    if position != layout.payload:
        raise DeviceUnreadable(f"{where} does not tell what lies at byte {position}; check the image")


class Buffer:
    """Memory of a chunk as direct I/O wants it; not shared, unlike what `mmap` gives without flags.

    In a huge page if it is `huge`, where the kernel has them (madvise(2), MADV_HUGEPAGE): scattered small ones cut a
    direct read or write of 2 MiB into several requests, as a disk takes so many pieces at once and no more.
    """

    def __init__(self, size: int, *, huge: bool = False) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if not huge:
            self.view = memoryview(mmap.mmap(-1, padded(size, BLOCK), flags=flags))
            return
        memory = mmap.mmap(-1, padded(size, _HUGE_PAGE) + _HUGE_PAGE, flags=flags)
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        skip = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE_PAGE
        self.view = memoryview(memory)[skip : skip + padded(size, BLOCK)]


class Copier:
    """Copies chunks from `reader` to `part`, with `cipher` if the target is encrypted. One per thread."""

    def __init__(self, reader: Reader, part: PartFile, layout: Layout, cipher: SectorCipher | None) -> None:
        self._reader = reader
        self._part = part
        self._layout = layout
        self._cipher = cipher
        self._buffer = Buffer(layout.chunk, huge=True).view
        self._zeros = Buffer(layout.chunk).view  # never written, so the kernel gives it no memory
        self._zero_digests: dict[int, bytes] = {}

    def __call__(self, chunk: Chunk) -> bytes:
        """Copy one; returns the SHA-256 of what the target then holds of it, or nothing where nobody asks for it."""
        stored = self._layout.stored(chunk.index)
        place = self._layout.place(chunk.index)
        buffer = self._buffer[: padded(stored, BLOCK)]
        if self._cipher:
            source = self._fill(chunk, buffer) if chunk.data else self._zeros[: len(buffer)]
            self._cipher.encrypt(chunk.index * self._layout.chunk // _UNIT, source, buffer)
            self._part.write(buffer, place)
        elif chunk.data:
            self._write_plain(chunk, self._fill(chunk, buffer), place)
        else:
            return self._digest_of_zeros(stored)  # a hole of the part
        return hashlib.sha256(buffer[:stored]).digest() if self._layout.hashed(chunk.index) else b""

    def _fill(self, chunk: Chunk, buffer: memoryview) -> memoryview:
        """The payload of a chunk, zeros around it."""
        filled = 0
        for extent in chunk.data:
            begin = extent.offset - chunk.index * self._layout.chunk
            buffer[filled:begin] = self._zeros[: begin - filled]
            filled = begin + extent.length
            self._reader.read_into(extent.offset, buffer[begin:filled])
        buffer[filled:] = self._zeros[: len(buffer) - filled]
        return buffer

    def _digest_of_zeros(self, length: int) -> bytes:
        if length not in self._zero_digests:
            self._zero_digests[length] = hashlib.sha256(self._zeros[:length]).digest()
        return self._zero_digests[length]

    def _write_plain(self, chunk: Chunk, buffer: memoryview, place: int) -> None:
        """Write what is not zero. What was zero in the source is a hole already."""
        done = 0
        for extent in chunk.data:
            begin = max(done, (extent.offset - place) // BLOCK * BLOCK)
            done = max(done, padded(extent.offset + extent.length - place, BLOCK))
            for first, last, zero in _runs(buffer, begin, done):
                if zero:
                    self._part.punch(place + first, last - first)
                else:
                    self._part.write(buffer[first:last], place + first)


class Checker:
    """Reads chunks back from `part`. One per thread."""

    def __init__(self, part: PartFile, layout: Layout) -> None:
        self._part = part
        self._layout = layout
        self._buffer = Buffer(layout.chunk, huge=True).view

    def __call__(self, chunk: Chunk) -> bytes:
        """The SHA-256 of what the disk holds of one."""
        stored = self._layout.stored(chunk.index)
        found = self._part.read(self._buffer[: padded(stored, BLOCK)], self._layout.place(chunk.index))
        return hashlib.sha256(self._buffer[: min(found, stored)]).digest()


class Worker(Protocol):
    """What a thread does with a chunk."""

    def __call__(self, chunk: Chunk) -> bytes:
        """Its digest."""


class Crew:
    """Threads at work on `chunks`, from the start of the block to its end. `hire` makes the worker of each.

    Raises, in `take`, the first error of a thread, and DeadlineExceeded when no chunk ends within `patience` seconds.
    """

    def __init__(
        self, chunks: Iterator[Chunk], hire: Callable[[], Worker], threads: int, patience: float, where: str
    ) -> None:
        self._where = where
        self._chunks = chunks
        self._hire = hire
        self._patience = patience
        self._halt = threading.Event()
        self._plan = threading.Lock()
        self._ends: queue.SimpleQueue[tuple[int, bytes] | BaseException] = queue.SimpleQueue()
        # Daemons: one that hangs in a system call must not keep the process from ending.
        self._threads = [threading.Thread(target=self._work, name=f"image-{n}", daemon=True) for n in range(threads)]
        self._latest = time.monotonic()
        self.hanging = False

    def __enter__(self) -> Self:
        self.hanging = True  # until it is known that it is not
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let each thread end its chunk. `hanging` tells whether one did not, within the patience that is left."""
        self._halt.set()
        deadline = self._latest + self._patience
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self.hanging = any(thread.is_alive() for thread in self._threads)

    def take(self) -> tuple[int, bytes] | None:
        """A chunk that is done: its number and digest. None when none ended for a moment."""
        try:
            end = self._ends.get(timeout=0 if self._halt.is_set() else _TICK_SECONDS)
        except queue.Empty:
            if time.monotonic() - self._latest > self._patience:
                raise DeadlineExceeded(
                    f"nothing of {self._where} could be read or written for {self._patience:.0f} seconds; look at the "
                    f"kernel log and the storage, then run it again to go on"
                ) from None
            return None
        self._latest = time.monotonic()
        if isinstance(end, BaseException):
            raise end
        return end

    def rest(self) -> Iterator[tuple[int, bytes]]:
        """What else is done when one thread has failed, behind `stop`."""
        with contextlib.suppress(queue.Empty):
            while True:
                end = self._ends.get_nowait()
                if isinstance(end, tuple):
                    yield end

    def _work(self) -> None:
        try:
            worker = self._hire()
            while not self._halt.is_set():
                with self._plan:
                    chunk = next(self._chunks, None)
                if chunk is None:
                    return
                self._ends.put((chunk.index, worker(chunk)))
        except BaseException as error:  # noqa: BLE001 - it is raised where the threads are driven
            self._ends.put(error)
            self._halt.set()


class Ledger:
    """What came from the threads: the leading chunks that are done, their digests, and bytes of payload in all.

    It begins with what `found` says. All digests are kept to verify, else those of the last READ_BACK chunks.
    """

    def __init__(self, layout: Layout, found: Checkpoint) -> None:
        self._layout = layout
        self._ahead: dict[int, bytes] = {}
        self._leading = found.chunks
        self._fresh = bytearray()
        self.digests = bytearray(found.digests)
        self.chunks = found.chunks
        self.done = self.chunks * layout.chunk

    def add(self, index: int, digest: bytes) -> None:
        """A chunk is done; they come in any order."""
        self._ahead[index] = digest
        self.done += self._layout.length(index)
        while self._leading in self._ahead:
            self._fresh += self._ahead.pop(self._leading)
            self._leading += 1
            if self._layout.secured(self._leading) == self._leading:
                self.digests += self._fresh
                if not self._layout.verify:
                    del self.digests[: -READ_BACK * DIGEST_BYTES]
                self._fresh.clear()
                self.chunks = self._leading


def _runs(buffer: memoryview, begin: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Pieces of the buffer that are all zero, or not, in turn."""
    zeros, first, kind = bytes(_HOLE), begin, None
    for at in count(begin, _HOLE):
        stop = min(at + _HOLE, end)
        # The first byte settles it for most data, without a copy.
        found = at < end and buffer[at] == 0 and bytes(buffer[at:stop]) == zeros[: stop - at]
        if at >= end or found != kind:
            if kind is not None and first < at:
                yield first, min(at, end), kind
            first, kind = at, found
        if at >= end:
            return
