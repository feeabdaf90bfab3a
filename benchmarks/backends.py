"""What the storage below costs: an encrypted volume of each backend beside a plain one of the same, and many of them.

`python -m benchmarks backends`, or `make bench-backends`; BACKEND is one of them, else all. Linux' loop device is below
all three: sparse files, and a volume group on one that is a sparse file itself.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.measure import seconds, side_by_side
from benchmarks.servers import CHEAP, Running, Volume, our_server
from benchmarks.table import Row, times
from csi_driver.host.mounts import Mounts
from csi_driver.host.workers import Workers
from csi_driver.volumes.driver import WARM
from tests.backends.rigs import GROUP, POOL, LvmRig

BACKENDS = ("loopfile", "lvm-thick", "lvm-thin")
_MIB = 1 << 20
_GROUP_BYTES, _POOL_BYTES = 16 << 30, 4 << 30


@dataclass(frozen=True)
class Sizes:
    """How much is measured: turns of staging, those that do not count, volumes of which the first and last `part` are
    compared.
    """

    turns: int = 16
    warm_up: int = 3
    volumes: int = 200
    part: int = 20


def rows(folder: Path, sizes: Sizes = Sizes()) -> Iterator[Row]:
    """One server of each backend."""
    chosen = os.environ.get("BACKEND")
    for backend in [chosen] if chosen else BACKENDS:
        place = folder / backend
        place.mkdir()
        with _server(backend, place) as (server, parameters):
            yield from _encrypted_beside_plain(server, backend, place, parameters, sizes)
            yield from _many(server, backend, place, parameters, sizes)


@contextmanager
def _server(backend: str, folder: Path) -> Iterator[tuple[Running, dict[str, str]]]:
    """A server on storage of its own, and what a class of it says."""
    if backend == "loopfile":
        with our_server(folder / "server") as server:
            yield server, {}
        return
    thin, workers = backend == "lvm-thin", Workers(WARM)
    try:
        with LvmRig(folder, workers, thin=thin, disk_bytes=_GROUP_BYTES, pool_bytes=_POOL_BYTES) as rig:
            rig.restart()
            rig.disown()
            try:
                with our_server(folder / "server", options=("--backend", "lvm", "--volume-group", GROUP)) as server:
                    yield server, {"thinPool": POOL} if thin else {}
            finally:
                Mounts().unmount(str(folder / "server/state/lvm"))
    finally:
        workers.stop()


def _encrypted_beside_plain(
    server: Running, backend: str, folder: Path, parameters: dict[str, str], sizes: Sizes
) -> Iterator[Row]:
    encrypted = server.new_volume("encrypted", folder, 64 * _MIB, {**CHEAP, **parameters})
    plain = server.new_volume("plain", folder, 64 * _MIB, parameters, "")

    def stage_and_unstage(volume: Volume) -> float:
        return seconds(volume.stage) + seconds(volume.unstage)

    for volume in (encrypted, plain):
        stage_and_unstage(volume)
    series = side_by_side(
        sizes.turns, lambda: stage_and_unstage(encrypted), lambda: stage_and_unstage(plain), warm_up=sizes.warm_up
    )
    for volume in (encrypted, plain):
        volume.delete()
    yield times(f"{backend}: re-stage + unstage, encrypted against plain", *series, 2.5)


def _many(server: Running, backend: str, folder: Path, parameters: dict[str, str], sizes: Sizes) -> Iterator[Row]:
    many, part = f"{backend}, {sizes.volumes} volumes", sizes.part
    made: list[Volume] = []

    def create(number: int) -> None:
        made.append(server.new_volume(f"many-{number:04}", folder, 16 * _MIB, {**CHEAP, **parameters}))

    created = [seconds(partial(create, number)) for number in range(sizes.volumes)]
    yield _flat(f"{many}: create", created, part)
    tokens = _tokens(server, part)
    if len(tokens) * part != sizes.volumes:
        raise RuntimeError(f"{sizes.volumes} volumes are listed on {len(tokens)} pages of {part}")

    def page(token: str) -> float:
        return seconds(partial(server.client.page, part, token))

    listed = side_by_side(part, lambda: page(tokens[-1]), lambda: page(tokens[0]), warm_up=sizes.warm_up)
    yield times(f"{many}: list, the last page of {part} against the first", *listed, 1.5)
    yield _flat(f"{many}: delete", [seconds(volume.delete) for volume in made], part)


def _flat(what: str, series: Sequence[float], part: int) -> Row:
    """Whether the last ones take longer than the first ones."""
    return times(f"{what}, the last {part} against the first {part}", series[-part:], series[:part], 1.5)


def _tokens(server: Running, entries: int) -> Sequence[str]:
    """By which each page is had, the first one by none."""
    tokens = [""]
    while token := server.client.page(entries, tokens[-1]).next_token:
        tokens.append(token)
    return tokens
