"""Beside the commit before identities replaced names: what may have become slower by that, or was to become faster.

That commit's tree is in $BENCH_BASE, its stubs built (`make bench` sees to it); both run in the same environment.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import grpc

from benchmarks.measure import seconds, side_by_side
from benchmarks.servers import Volume, bare_server, for_bare, our_server
from benchmarks.table import Row, times

_STAGES, _PAIRS = 60, 300
_WARM_UP, _PAIRS_WARM_UP = 4, 20
_ATTEMPTS = 5
_VOLUME_BYTES = 256 << 20


def rows(folder: Path) -> Iterator[Row]:
    """Columns: ours, the commit before; in the last row a server that does nothing but mount(2) and umount2(2)."""
    tree = Path(os.environ["BENCH_BASE"])
    with our_server(folder / "now") as now, our_server(folder / "before", tree) as before:
        ours = now.new_volume("now", folder, _VOLUME_BYTES)
        theirs = before.new_volume("before", folder, _VOLUME_BYTES)
        ours_down: list[float] = []
        theirs_down: list[float] = []
        up = side_by_side(
            _STAGES,
            lambda: _again(ours, ours.stage, ours_down),
            lambda: _again(theirs, lambda: _until_done(theirs), theirs_down),
            warm_up=_WARM_UP,
        )
        yield times("re-stage, against the commit before", *up, 1.0)
        down = ours_down[_WARM_UP:], theirs_down[_WARM_UP:]
        yield times("unstage, against the commit before", *down, 1.0)
        ours.stage()
        _until_done(theirs)
        pairs = side_by_side(
            _PAIRS,
            lambda: seconds(ours.publish_and_unpublish),
            lambda: seconds(theirs.publish_and_unpublish),
            warm_up=_PAIRS_WARM_UP,
        )
        yield times("publish + unpublish, against the commit before", *pairs, 0.85)
        with bare_server(folder / "bare") as bare:
            floor = for_bare(bare, ours)
            least = side_by_side(
                _PAIRS,
                lambda: seconds(floor.publish_and_unpublish),
                lambda: seconds(theirs.publish_and_unpublish),
                warm_up=_PAIRS_WARM_UP,
            )
        yield times("the same of a bare server, the floor", *least, None)


def _again(volume: Volume, stage: Callable[[], None], down: list[float]) -> float:
    taken = seconds(stage)
    down.append(seconds(volume.unstage))
    return taken


def _until_done(volume: Volume) -> None:
    """Stage it; where udev runs that commit fails now and then, and a caller asks again."""
    for _ in range(_ATTEMPTS - 1):
        with suppress(grpc.RpcError):
            return volume.stage()
    return volume.stage()
