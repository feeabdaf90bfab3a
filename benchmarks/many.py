"""Many volumes staged at once: what they cost, and that nothing is left of them."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.measure import footprint, footprint_at_rest, seconds
from benchmarks.servers import THREADS, Volume, our_server
from benchmarks.table import Row, times

_VOLUMES = 100
_PART = 20
_ROUNDS = 5
_KEPT_WORKERS = 2
_VOLUME_BYTES = 32 << 20
# A worker that has served for long has this much more memory of its own than one that took its place.
_MEMORY_BOUND = 4.0

_Parts = tuple[list[float], list[float]]


def rows(folder: Path) -> Iterator[Row]:
    """All are staged the first time by as many callers as the server has threads, then by two, unmeasured."""
    with our_server(folder / "hundred") as server:
        volumes = [
            server.new_volume(f"pvc-{number:04}", folder / "mounts", _VOLUME_BYTES) for number in range(_VOLUMES)
        ]
        with ThreadPoolExecutor(THREADS) as callers:
            list(callers.map(lambda volume: volume.stage(), volumes))
            list(callers.map(lambda volume: volume.unstage(), volumes))
        _warm_up(volumes)
        before = footprint_at_rest(server.pid)
        stage: _Parts = ([], [])
        unstage: _Parts = ([], [])
        staged = before
        for _ in range(_ROUNDS):
            _add(stage, [seconds(volume.stage) for volume in volumes])
            staged = footprint(server.pid)
            _add(unstage, [seconds(volume.unstage) for volume in volumes])
        after = footprint_at_rest(server.pid)
        many = f"{_VOLUMES} volumes staged at once"
        for what, (first, last) in (("stage", stage), ("unstage", unstage)):
            yield times(f"{many}: {what}, the last {_PART} against the first {_PART}", last, first, 1.5)
        yield Row(
            f"{many}, then unstaged, {_ROUNDS} times: memory of server, launcher and workers against before",
            f"{after.memory:.1f} MiB ({staged.memory:.1f} staged)", f"{before.memory:.1f} MiB",
            after.memory - before.memory, _MEMORY_BOUND, "{:+.1f} MiB".format,
        )  # fmt: skip
        yield Row(
            f"{many}, then unstaged, {_ROUNDS} times: their descriptors against before",
            f"{after.descriptors} ({staged.descriptors} staged)", f"{before.descriptors}",
            after.descriptors - before.descriptors, 0, "{:+.0f}".format,
        )  # fmt: skip


def _warm_up(volumes: Sequence[Volume]) -> None:
    """Have every worker that is kept open a mapping.

    One that has not yet has less memory of its own, and not the two descriptors that libcryptsetup then keeps of
    /dev/random and /dev/urandom. Left over from the callers before, it would count as growth once it is used.
    """
    with ThreadPoolExecutor(_KEPT_WORKERS) as callers:
        for _ in range(2):
            list(callers.map(lambda volume: volume.stage(), volumes))
            list(callers.map(lambda volume: volume.unstage(), volumes))


def _add(parts: _Parts, series: Sequence[float]) -> None:
    first, last = parts
    first += series[:_PART]
    last += series[-_PART:]
