"""What the storage below costs: an encrypted volume of each backend beside a plain one of the same, and many of them.

`make bench-backends`; BACKEND is one of them, else all but `rbd` and `csi`. In parts: `python -m benchmarks backends`,
`backends-data` and `backends-many`. Linux' loop device is below the first three: sparse files, and a volume group on
one that is a sparse file itself. `rbd` has a Ceph of this machine or of its host, in memory; many volumes of it need no
device. `csi` has a cluster that is played within the server, with loop devices below: what a real API adds is in
`benchmarks.csi`.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.ceph import CephImage, CephVolume
from benchmarks.data import block_volume, compared, same_device
from benchmarks.measure import seconds, side_by_side
from benchmarks.servers import CHEAP, Running, Volume, our_server
from benchmarks.table import Row, times
from csi_driver.backends.rbdplace import image_name
from csi_driver.host.mounts import Mounts
from csi_driver.host.workers import Workers
from csi_driver.rpc.client import CsiClient
from csi_driver.volumes.driver import WARM
from tests.backends.ceph import CLUSTER, USER
from tests.backends.ceph import POOL as CEPH_POOL
from tests.backends.csirig import BELOW, NODE_ID
from tests.backends.rigs import GROUP, POOL, LvmRig, RbdRig

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


@dataclass(frozen=True)
class Served:
    """A server on storage of its own, and what a class of it says; `ceph` is below it, if one is."""

    backend: str
    server: Running
    folder: Path
    parameters: dict[str, str]
    ceph: RbdRig | None = None
    node: str = ""
    """To whom a volume is given before it is staged; "" where it lies on its node."""


def rows(folder: Path, sizes: Sizes = Sizes()) -> Iterator[Row]:
    """Staging, encrypted and plain."""
    return _of_each(folder, lambda served: _encrypted_beside_plain(served, sizes))


def data_rows(folder: Path, turns: int = 6) -> Iterator[Row]:
    """Reading and writing, through ours and bare dm-crypt on the same device."""
    return _of_each(folder, lambda served: _data(served, turns))


def many_rows(folder: Path, sizes: Sizes = Sizes()) -> Iterator[Row]:
    """Many volumes, by a controller alone where the backend has one."""
    return _of_each(folder, lambda served: _many(served, sizes), "controller")


def _of_each(
    folder: Path, measured: Callable[[Served], Iterator[Row]], services: str = "controller,node"
) -> Iterator[Row]:
    chosen = os.environ.get("BACKEND")
    for backend in [chosen] if chosen else BACKENDS:
        place = folder / backend
        place.mkdir()
        with _server(backend, place, services) as served:
            yield from measured(served)


@contextmanager
def _server(backend: str, folder: Path, services: str) -> Iterator[Served]:
    if backend == "loopfile":
        with our_server(folder / "server") as server:
            yield Served(backend, server, folder, {})
        return
    if backend == "csi":
        program = (sys.executable, "-m", "tests.backends.csi_server", "csi")
        with our_server(folder / "server", program=program) as server:
            yield Served(backend, server, folder, {"backingStorageClass": BELOW}, node=NODE_ID)
        return
    thin, workers = backend == "lvm-thin", Workers(WARM)
    try:
        if backend == "rbd":
            with RbdRig(folder, workers) as ceph:
                access = ("--ceph-config", str(ceph.config), "--ceph-secret", str(ceph.secret))
                options = ("--backend", "rbd", *access, "--services", services)
                with our_server(folder / "server", options=options) as server:
                    yield Served(backend, server, folder, {"clusterID": CLUSTER, "pool": CEPH_POOL}, ceph)
            return
        with LvmRig(folder, workers, thin=thin, disk_bytes=_GROUP_BYTES, pool_bytes=_POOL_BYTES) as rig:
            rig.restart()
            rig.disown()
            try:
                with our_server(folder / "server", options=("--backend", "lvm", "--volume-group", GROUP)) as server:
                    yield Served(backend, server, folder, {"thinPool": POOL} if thin else {})
            finally:
                Mounts().unmount(str(folder / "server/state/lvm"))
    finally:
        workers.stop()


def _encrypted_beside_plain(served: Served, sizes: Sizes) -> Iterator[Row]:
    encrypted = served.server.new_volume("encrypted", served.folder, 64 * _MIB, {**CHEAP, **served.parameters})
    plain = served.server.new_volume("plain", served.folder, 64 * _MIB, served.parameters, "")

    def stage_and_unstage(volume: Volume) -> float:
        return seconds(volume.stage) + seconds(volume.unstage)

    for volume in (encrypted, plain):
        if served.node:
            volume.attach(served.node)
        stage_and_unstage(volume)
    series = side_by_side(
        sizes.turns, lambda: stage_and_unstage(encrypted), lambda: stage_and_unstage(plain), warm_up=sizes.warm_up
    )
    yield times(f"{served.backend}: re-stage + unstage, encrypted against plain", *series, 2.5)
    if served.ceph is not None:
        theirs = _as_ceph_csi(served.ceph, encrypted, served.folder)
        series = side_by_side(
            sizes.turns,
            lambda: stage_and_unstage(encrypted),
            lambda: seconds(theirs.stage_and_unstage),
            warm_up=sizes.warm_up,
        )
        yield times("rbd: re-stage + unstage, against Ceph-CSI's sequence on the same image", *series, 0.1)
    for volume in (encrypted, plain):
        if served.node:
            volume.detach(served.node)
        volume.delete()


def _as_ceph_csi(ceph: RbdRig, volume: Volume, folder: Path) -> CephImage:
    """The same image, by what Ceph-CSI runs."""
    stage = CephVolume(folder, 64 * _MIB, volume.key, cheap_kdf=True)
    (folder / "ceph-stage").mkdir()
    access = ("-c", "/dev/null", "-m", ",".join(ceph.ceph.monitors), "--id", USER, "--keyfile")
    return CephImage(stage, f"{CEPH_POOL}/{image_name(volume.id)}", (*access, str(ceph.secret / "userKey")))


def _data(served: Served, turns: int) -> Iterator[Row]:
    what = f"{served.backend}, ours against bare dm-crypt on the same device"
    with (
        CsiClient(served.server.endpoint) as client,
        block_volume(client, served.folder, "data", served.parameters, served.node) as ours,
    ):
        yield from compared(what, 1 / 0.97, nullcontext(ours), same_device(ours.mapping), turns)


def _many(served: Served, sizes: Sizes) -> Iterator[Row]:
    server, many, part = served.server, f"{served.backend}, {sizes.volumes} volumes", sizes.part
    made: list[Volume] = []

    def create(number: int) -> None:
        parameters = {**CHEAP, **served.parameters}
        made.append(server.new_volume(f"many-{number:04}", served.folder, 16 * _MIB, parameters))

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
