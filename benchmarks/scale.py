"""Whether a call costs the same with many volumes: two of our servers, side by side, one with few and one with many."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, cycle
from pathlib import Path

from benchmarks.measure import seconds, side_by_side
from benchmarks.servers import THREADS, Client, Running, Volume, our_server
from benchmarks.table import Row, times

_FEW, _MANY = 10, 10_000
_PAGE = 100
_CREATES, _PAGES, _STAGES, _STATS = 200, 200, 60, 1000
_BOUND = 1.1
_VOLUME_BYTES = 32 << 20


def rows(folder: Path) -> Iterator[Row]:
    """Columns: with 10,000 volumes, with 10."""
    with our_server(folder / "many") as many, our_server(folder / "few") as few:
        # One node opens both servers' volumes: so their names differ.
        _fill(many.client, "many", range(_MANY))
        _fill(few.client, "few", range(_FEW))
        versus = f"with {_MANY:,} volumes against {_FEW}"
        yield times(f"create, {versus}", *_creates(many.client, few.client), _BOUND)
        mounts = folder / "mounts"
        volumes = _first_staged(many, "many", mounts), _first_staged(few, "few", mounts)
        yield times(
            f"stage, {versus}", *side_by_side(_STAGES, _stage(volumes[0]), _stage(volumes[1]), warm_up=3), _BOUND
        )
        for volume in volumes:
            volume.stage()
        yield times(
            f"stats, {versus}", *side_by_side(_STATS, _stats(volumes[0]), _stats(volumes[1]), warm_up=20), _BOUND
        )
        # A page of 100 takes 100 volumes: of 10 it would be a page of 10, and a tenth of the work.
        _fill(few.client, "few", range(_FEW, _PAGE))
        pages = side_by_side(_PAGES, _pages(many.client), _pages(few.client), warm_up=10)
        yield times(f"list, a page of {_PAGE} out of {_MANY:,} volumes against one out of {_PAGE}", *pages, _BOUND)


def _fill(client: Client, name: str, numbers: Iterable[int]) -> None:
    with ThreadPoolExecutor(THREADS) as callers:
        list(callers.map(lambda number: client.create(f"{name}-{number:05}", _VOLUME_BYTES), numbers))


def _creates(many: Client, few: Client) -> tuple[list[float], list[float]]:
    numbers = count()

    def create(client: Client) -> Callable[[], float]:
        def once() -> float:
            name = f"fresh-{next(numbers)}"
            taken = seconds(lambda: client.create(name, _VOLUME_BYTES))
            client.delete(name)
            return taken

        return once

    return side_by_side(_CREATES, create(many), create(few), warm_up=5)


def _first_staged(server: Running, name: str, mounts: Path) -> Volume:
    volume = server.new_volume(f"{name}-00005", mounts, _VOLUME_BYTES)
    volume.stage()
    volume.unstage()
    return volume


def _stage(volume: Volume) -> Callable[[], float]:
    def stage() -> float:
        taken = seconds(volume.stage)
        volume.unstage()
        return taken

    return stage


def _stats(volume: Volume) -> Callable[[], float]:
    return lambda: seconds(volume.stats)


def _pages(client: Client) -> Callable[[], float]:
    """Pages in turn, from the first to the last full one."""
    tokens = [token := ""]
    while token := client.page(_PAGE, token).next_token:
        tokens.append(token)
    full = [token for token in tokens if len(client.page(_PAGE, token).entries) == _PAGE]
    turn = cycle(full)
    return lambda: seconds(lambda: client.page(_PAGE, next(turn)))
