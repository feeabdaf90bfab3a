"""What an encryption of an image cannot go below on this machine: its parts, each alone."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.measure import seconds
from csi_driver.images.base import CHUNK
from csi_driver.images.source import RawReader, Way
from csi_driver.images.stream import Buffer
from csi_driver.luks.bulk import sector_cipher

_TIMES = 3


def floor(folder: Path, size: int, threads: int, start: Callable[[], float]) -> Iterator[str]:
    """Lines: core-seconds of AES-XTS and of the start, seconds of reading and writing alone; medians of three.

    `size` in bytes; a file of it is made in `folder`. `start` tells the core-seconds of a command that does nothing.
    """
    yield f"profile: start of the command {_median(start):.2f} core-seconds"
    for sector in (512, 4096):
        spent = _median(partial(_encrypting, size, sector))
        yield f"profile: AES-XTS, sectors of {sector}: {spent:.2f} core-seconds"
    path = folder / "floor"
    for doing, work in (("writing", _write), ("reading", _read)):
        for way, flag in ((Way.DIRECT, os.O_DIRECT), (Way.CACHED, 0)):
            taken = _median(partial(work, path, size, threads, flag))
            yield f"floor: {doing} alone, {way}, {threads} threads: {taken:.2f} s"
    yield f"choice: a clone reads {_chosen(path, size, threads)}"
    path.unlink()


def forget(path: Path) -> None:
    """Take what was read of a file out of the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _median(measure: Callable[[], float]) -> float:
    return median(measure() for _ in range(_TIMES))


def _encrypting(size: int, sector: int) -> float:
    cipher, memory = sector_cipher("aes-xts-plain64", bytes(range(64)), sector), memoryview(bytearray(CHUNK))
    before = time.thread_time()
    for place in range(0, size, CHUNK):
        cipher.encrypt(place // 512, memory, memory)
    return time.thread_time() - before


def _write(path: Path, size: int, threads: int, flag: int) -> float:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flag, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)

        def work() -> None:
            _in_threads(threads, size, lambda memory, place: os.pwrite(descriptor, memory, place))
            os.fsync(descriptor)

        return seconds(work)
    finally:
        os.close(descriptor)


def _read(path: Path, size: int, threads: int, flag: int) -> float:
    forget(path)
    descriptor = os.open(path, os.O_RDONLY | flag)
    try:
        return seconds(lambda: _in_threads(threads, size, lambda memory, at: os.preadv(descriptor, [memory], at)))
    finally:
        os.close(descriptor)


def _chosen(path: Path, size: int, threads: int) -> str:
    """What the reader of a clone chooses here, each time that it is asked."""
    chosen = []
    for _ in range(_TIMES):
        forget(path)
        with contextlib.closing(RawReader(str(path), "the floor")) as reader:

            def read(memory: memoryview, place: int, reader: RawReader = reader) -> int:
                reader.read_into(place, memory)
                return len(memory)

            _in_threads(threads, size, read)
            chosen.append(str(reader.choice.chosen))
    return ", ".join(chosen)


def _in_threads(threads: int, size: int, call: Callable[[memoryview, int], int]) -> None:
    """Each thread takes every so many chunks, with a buffer of its own."""

    def work(places: Sequence[int]) -> None:
        memory = Buffer(CHUNK, huge=True).view
        for place in places:
            if call(memory, place) != CHUNK:
                raise OSError(f"a chunk at {place} came in part only")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [range(first * CHUNK, size, threads * CHUNK) for first in range(threads)]))
