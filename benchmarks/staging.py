"""First stage, stage again and unstage, beside what Ceph-CSI does for the same volume."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from benchmarks.ceph import CephVolume
from benchmarks.measure import seconds, side_by_side
from benchmarks.servers import Running, our_server, random_key
from benchmarks.table import Row, fraction

_AGAIN = 16
_WARM_UP = 3
_FIRST = 10
_SLOW_FIRST = 6
_VOLUME_BYTES = 256 << 20


def rows(folder: Path) -> Iterator[Row]:
    """Both sides format with PBKDF2, 1000 iterations and have a key of 32 random bytes, unless a row says otherwise."""
    with our_server(folder / "staging") as server:
        yield from _again(server, folder)
        yield from _first(server, folder)


def _again(server: Running, folder: Path) -> Iterator[Row]:
    volume = server.new_volume("again", folder, _VOLUME_BYTES)
    peer = CephVolume(folder, _VOLUME_BYTES, random_key(), cheap_kdf=True)
    ours_down: list[float] = []
    peers_down: list[float] = []
    with peer.attached() as device:
        volume.stage()
        volume.unstage()
        peer.first_stage(device)
        peer.unstage()

        def ours() -> float:
            taken = seconds(volume.stage)
            ours_down.append(seconds(volume.unstage))
            return taken

        def peers() -> float:
            taken = seconds(lambda: peer.stage(device))
            peers_down.append(seconds(peer.unstage))
            return taken

        up = side_by_side(_AGAIN, ours, peers, warm_up=_WARM_UP)
    yield fraction("re-stage, random key and cheap KDF, against Ceph-CSI's sequence with the same", *up, 15)
    yield fraction("unstage, against Ceph-CSI's sequence", ours_down[_WARM_UP:], peers_down[_WARM_UP:], 2.5)


def _first(server: Running, folder: Path) -> Iterator[Row]:
    numbers = count()

    def ours() -> float:
        volume = server.new_volume(f"first-{next(numbers)}", folder, _VOLUME_BYTES)
        taken = seconds(volume.stage)
        volume.unstage()
        volume.delete()
        return taken

    def peers(*, cheap_kdf: bool) -> float:
        peer = CephVolume(folder, _VOLUME_BYTES, random_key(), cheap_kdf=cheap_kdf)
        with peer.attached() as device:
            taken = seconds(lambda: peer.first_stage(device))
            peer.unstage()
        return taken

    fast = side_by_side(_FIRST, ours, lambda: peers(cheap_kdf=True), warm_up=2)
    yield fraction("first stage, ext4, 256 MiB, against Ceph-CSI's sequence with the same KDF", *fast, 2.5)
    slow = side_by_side(_SLOW_FIRST, ours, lambda: peers(cheap_kdf=False), warm_up=0)
    yield fraction(
        "first stage, ext4, 256 MiB, against Ceph-CSI's sequence with its default KDF, ours cheap", *slow, 15
    )
