"""`python -m benchmarks.bulk`: what encryption of chunks in memory costs, in MB per second of CPU time.

Both ways of `csi_driver.luks.bulk`, each cipher with its longest key, and two threads at once on the clock: twice the
rate where two cores are free and the interpreter lock is released.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from statistics import median

from csi_driver.images.base import CHUNK
from csi_driver.luks.bulk import SectorCipher, sector_cipher
from csi_driver.luks.formats import CIPHER_KEY_BITS

_KEYS = (*((cipher, bits[-1]) for cipher, bits in CIPHER_KEY_BITS.items()), ("aes-xts-plain64", 384))
_SERIES = 5
_SERIES_SECONDS = 0.2

Work = Callable[[int, memoryview, memoryview], None]


def _rate(work: Work, clock: Callable[[], float]) -> float:
    """Median MB per second of several series."""
    source, target = memoryview(bytearray(CHUNK)), memoryview(bytearray(CHUNK))

    def series() -> float:
        begin, chunks = clock(), 0
        while (spent := clock() - begin) < _SERIES_SECONDS:
            work(chunks * (CHUNK // 512), source, target)
            chunks += 1
        return chunks * CHUNK / 1e6 / spent

    return median(series() for _ in range(_SERIES))


def _two_threads(cipher: SectorCipher) -> float:
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(lambda _: _rate(cipher.encrypt, time.monotonic), range(2)))


def rows() -> Iterator[tuple[str, ...]]:
    """A line for each cipher, sector size and way."""
    for (name, bits), sector_size, compiled in product(_KEYS, (512, 4096), (True, False)):
        cipher = sector_cipher(name, bytes(range(bits // 8)), sector_size, compiled=compiled)
        rates = (*(_rate(work, time.thread_time) for work in (cipher.encrypt, cipher.decrypt)), _two_threads(cipher))
        way = "compiled" if compiled else "sector by sector"
        yield f"{name} {bits}", str(sector_size), way, *(f"{rate:.0f}" for rate in rates)


def main() -> None:
    """Print the table."""
    print("cipher and key bits | sector size | way | encrypt | decrypt | encrypt, two threads, by the clock")
    print("--- | --- | --- | --- | --- | ---")
    for row in rows():
        print(*row, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
