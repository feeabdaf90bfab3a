"""Publish, unpublish, Probe, start and memory, beside a bare grpcio server with the same stubs and threads."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median

import grpc

from benchmarks.measure import footprint, ratio, resident, seconds, side_by_side
from benchmarks.servers import THREADS, Running, Volume, bare_server, for_bare, our_server
from benchmarks.table import Row, times

_PAIRS = 300
_ROUNDS = 12
_PAIRS_PER_CALLER = 15
_PROBES = 10_000
_STARTS = 16
_VOLUME_BYTES = 32 << 20


def rows(folder: Path) -> Iterator[Row]:
    """Both servers bind the same staged, encrypted volumes; the bare one finds its target folders made."""
    starts = _start(our_server(folder / "our-starts")), _start(bare_server(folder / "bare-starts"))
    # The first turns compile all modules: what is measured is an installed package.
    yield times("process start to first answered Probe", *side_by_side(_STARTS, *starts, warm_up=2), 1.5)
    with our_server(folder / "ours") as ours, bare_server(folder / "bare") as bare:
        volumes = [ours.new_volume(f"pod-{number}", folder, _VOLUME_BYTES) for number in range(THREADS)]
        for volume in volumes:
            volume.stage()
        bare_volumes = [for_bare(bare, volume) for volume in volumes]
        try:
            pair = _pair(volumes[0]), _pair(bare_volumes[0])
            yield times("publish + unpublish, p50", *side_by_side(_PAIRS, *pair, warm_up=20), 2.0)
            yield _throughput(volumes, bare_volumes)
        finally:
            for volume in bare_volumes:
                with suppress(grpc.RpcError):
                    volume.unpublish()
        probes = side_by_side(_PROBES, _probe(ours), _probe(bare), warm_up=100)
        yield times("Probe, p50", *probes, 1.5)
        yield _memory(ours, bare)


def _pair(volume: Volume) -> Callable[[], float]:
    return lambda: seconds(volume.publish_and_unpublish)


def _throughput(volumes: Sequence[Volume], bare_volumes: Sequence[Volume]) -> Row:
    """Callers, each with a volume of its own, as kubelet calls for many pods."""
    pairs = len(volumes) * _PAIRS_PER_CALLER
    taken = side_by_side(_ROUNDS, lambda: _burst(volumes), lambda: _burst(bare_volumes), warm_up=2)
    ours, bare = ([pairs / burst for burst in series] for series in taken)
    return Row(
        f"publish + unpublish, pairs per second with {len(volumes)} callers",
        f"{median(ours):.0f}/s (n={len(ours)})",
        f"{median(bare):.0f}/s (n={len(bare)})",
        1 / ratio(*taken),
        0.6,
        at_least=True,
    )


def _burst(volumes: Sequence[Volume]) -> float:
    """Seconds until every caller has made all its pairs. An error of a caller ends the benchmark."""
    start = threading.Barrier(len(volumes) + 1)
    failed: list[BaseException] = []

    def call(volume: Volume) -> None:
        start.wait()
        try:
            for _ in range(_PAIRS_PER_CALLER):
                volume.publish_and_unpublish()
        except Exception as error:  # noqa: BLE001 - told by the thread that waits
            failed.append(error)

    callers = [threading.Thread(target=call, args=(volume,)) for volume in volumes]
    for caller in callers:
        caller.start()
    start.wait()
    started = time.perf_counter()
    for caller in callers:
        caller.join()
    taken = time.perf_counter() - started
    if failed:
        raise failed[0]
    return taken


def _probe(server: Running) -> Callable[[], float]:
    return lambda: seconds(server.client.probe)


def _start(server: Running) -> Callable[[], float]:
    def start() -> float:
        taken = server.start()
        server.stop()
        return taken

    return start


def _memory(ours: Running, bare: Running) -> Row:
    """Server process against server process; what our helper processes add stands beside it."""
    mine, least, family = resident(ours.pid), resident(bare.pid), footprint(ours.pid)
    helpers = family.memory - footprint(bare.pid).memory - (mine - least)
    return Row(
        f"resident memory of the server process after {_PROBES:,} calls",
        f"{mine:.1f} MiB (launcher and {family.processes - 2} workers: {helpers:.1f} more)",
        f"{least:.1f} MiB",
        mine - least,
        25.0,
        "{:+.1f} MiB".format,
    )
