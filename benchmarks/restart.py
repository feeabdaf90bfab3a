"""Whether a server that finds much on its node starts as fast as one that finds nothing."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.measure import side_by_side
from benchmarks.servers import THREADS, our_server
from benchmarks.table import Row, times

_VOLUMES = 500
_STARTS = 20
_VOLUME_BYTES = 16 << 20


def rows(folder: Path) -> Iterator[Row]:
    """Columns: with 500 volumes staged, with none."""
    with our_server(folder / "full") as full, our_server(folder / "empty") as empty:
        volumes = [full.new_volume(f"full-{number:03}", folder, _VOLUME_BYTES) for number in range(_VOLUMES)]
        with ThreadPoolExecutor(THREADS) as callers:
            list(callers.map(lambda volume: volume.stage(), volumes))
        restarts = side_by_side(_STARTS, full.restart, empty.restart, warm_up=2)
        yield times(f"restart to first answered Probe, with {_VOLUMES} volumes staged against none", *restarts, 1.3)
        with ThreadPoolExecutor(THREADS) as callers:
            list(callers.map(lambda volume: volume.unstage(), volumes))
