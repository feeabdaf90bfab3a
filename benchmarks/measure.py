"""Clocks, and what a server's processes take."""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import listdir
from pathlib import Path
from statistics import median

_MIB = 1 << 20
_REST_SECONDS = 2.0


def seconds(call: Callable[[], object]) -> float:
    """How long `call` takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def side_by_side(
    repetitions: int, ours: Callable[[], float], other: Callable[[], float], *, warm_up: int
) -> tuple[list[float], list[float]]:
    """The times that each side returns, in turns, so that noise hits both alike; who goes first changes each time.

    The first `warm_up` turns are not counted. What `ratio` makes of the series wants an even number of turns.
    """
    series: tuple[list[float], list[float]] = ([], [])
    order = [(ours, series[0]), (other, series[1])]
    gc.collect()
    for turn in range(-warm_up, repetitions):
        for side, times in order:
            taken = side()
            if turn >= 0:
                times.append(taken)
        order.reverse()
    return series


def ratio(ours: Sequence[float], other: Sequence[float]) -> float:
    """How many times the other's time ours takes: the median over each two turns, in which both went first once.

    Not the ratio of the medians. Each side's times fall into two heaps, of calls that follow the other side's and of
    calls that follow one of its own, and into more on a busy machine; a median between heaps is in either by chance.
    What disturbs two neighbouring turns disturbs both sides, or either with the same chance.
    """
    return median(sum(ours[at : at + 2]) / sum(other[at : at + 2]) for at in range(0, len(ours) - 1, 2))


@dataclass(frozen=True)
class Footprint:
    """What a process and all below it hold: resident memory in MiB, open descriptors, processes.

    Memory is the proportional set size: a page that processes of the family share counts once.
    """

    memory: float
    descriptors: int
    processes: int


def footprint(pid: int) -> Footprint:
    """The footprint of a server with its launcher and workers."""
    memory, descriptors = 0.0, 0
    family = _family(pid)
    for member in family:
        memory += _memory(member, "Pss")
        descriptors += len(listdir(f"/proc/{member}/fd"))
    return Footprint(memory, descriptors, len(family))


def footprint_at_rest(pid: int) -> Footprint:
    """The footprint a moment after the last call, when workers that are not kept have ended."""
    time.sleep(_REST_SECONDS)
    return footprint(pid)


def resident(pid: int) -> float:
    """Resident memory of one process, in MiB."""
    return _memory(pid, "Rss")


def _family(pid: int) -> Sequence[int]:
    parents: dict[int, int] = {}
    for name in filter(str.isdigit, listdir("/proc")):
        with suppress(OSError):
            fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
            parents[int(name)] = int(fields[1])
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def _memory(pid: int, kind: str) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024 / _MIB
    raise RuntimeError(f"the kernel does not tell the memory of process {pid}")
