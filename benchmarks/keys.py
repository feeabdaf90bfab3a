"""Volumes with keys of their own: a node that comes back, what asking a KMS costs a stage, a change of the volume key.

`python -m benchmarks keys`, or `make bench-keys`. A KMS whose credentials are in secrets of Kubernetes is left out:
there is no cluster in the guest.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path

from benchmarks import standstill
from benchmarks.ceph import CephVolume
from benchmarks.measure import seconds, side_by_side
from benchmarks.servers import CHEAP, Running, Volume, our_server, random_key
from benchmarks.table import Row, fraction, times
from tests.keys import servers
from tests.keys.program import program

_VOLUMES = 50
_CALLERS = 8
_ROUNDS = 2
_COLD = 4
_AGAIN = 16
_AGAIN_SLOWLY = 8
_VOLUME_BYTES = 32 << 20
_SECRET: Mapping[str, str] = {"encrypted": "true"}
_PASSPHRASE = "a passphrase that a person thought of"


def rows(folder: Path) -> Iterator[Row]:
    """A server with a KMS of each type that needs no cluster."""
    folder = folder / "keys"
    folder.mkdir()
    with servers.plugin(folder) as (_, endpoint):
        program(folder)
        config = folder / "kms.json"
        entries = {
            "metadata": {"encryptionKMSType": "metadata"},
            "kms-plugin": {"encryptionKMSType": "kms-plugin", "endpoint": endpoint},
            "exec": {"encryptionKMSType": "exec", "program": "wrap-key"},
        }
        config.write_text(json.dumps(entries))
        options = ["--kms-config", str(config), "--kms-programs", str(folder)]
        with our_server(folder / "server", options=options) as server:
            yield from _node_comes_back(server, folder)
            for kind in entries:
                yield from _one_stage(server, folder, kind)
            yield from standstill.rows(server, folder)


def _node_comes_back(server: Running, folder: Path) -> Iterator[Row]:
    """From the start of the server to the last of 50 volumes staged, by eight callers."""
    of_kms = _made(server, folder, "dek", {"encrypted": "true", "encryptionKMSID": "kms-plugin"}, "")
    passphrases = _made(server, folder, "argon", _SECRET, _PASSPHRASE)

    def ours(volumes: Sequence[Volume]) -> float:
        taken = server.restart() + seconds(lambda: _at_once(lambda volume: volume.stage(), volumes))
        _at_once(lambda volume: volume.unstage(), volumes)
        return taken

    with ExitStack() as stack:
        peers = _peers(folder, stack)

        def theirs() -> float:
            taken = seconds(lambda: _at_once(lambda peer: peer[0].stage(peer[1]), peers))
            _at_once(lambda peer: peer[0].unstage(), peers)
            return taken

        back = f"a node comes back, {_VOLUMES} volumes staged by {_CALLERS} callers, keys of a KMS:"
        series = side_by_side(_ROUNDS, lambda: ours(of_kms), theirs, warm_up=0)
        yield fraction(f"{back} against Ceph-CSI's sequence with its own KDF", *series, 40)
    series = side_by_side(_ROUNDS, lambda: ours(of_kms), lambda: ours(passphrases), warm_up=0)
    yield fraction(f"{back} against ours with passphrases and argon2id", *series, 8)
    for volume in (*of_kms, *passphrases):
        volume.delete()


def _one_stage(server: Running, folder: Path, kind: str) -> Iterator[Row]:
    """Cold is the first one after the server's start.

    A plain secret is a random key with the cheap KDF, the hardest to compare with; or what the document's has, a
    passphrase and the default KDF.
    """
    key = random_key() if kind == "metadata" else ""
    parameters = {"encrypted": "true", "encryptionKMSID": kind}
    (own,), (plain,), (document,) = (
        _made(server, folder, f"{kind}-{name}", chosen, secret, 1)
        for name, chosen, secret in (
            ("own", parameters, key),
            ("plain", CHEAP, random_key()),
            ("document", _SECRET, _PASSPHRASE),
        )
    )

    def warm(volume: Volume) -> float:
        taken = seconds(volume.stage)
        volume.unstage()
        return taken

    def cold(volume: Volume) -> float:
        server.restart()
        return warm(volume)

    series = side_by_side(_COLD, lambda: cold(own), lambda: cold(plain), warm_up=0)
    yield times(f"re-stage with {kind}, cold, against a secret with a random key", *series, 3.0)
    series = side_by_side(_AGAIN, lambda: warm(own), lambda: warm(plain), warm_up=2)
    yield times(f"re-stage with {kind}, warm, against a secret with a random key", *series, 1.1)
    series = side_by_side(_AGAIN_SLOWLY, lambda: warm(own), lambda: warm(document), warm_up=2)
    yield times(f"re-stage with {kind}, warm, against the document's secret, a passphrase", *series, 1.1)
    for volume in (own, plain, document):
        volume.delete()


def _made(
    server: Running, folder: Path, name: str, parameters: Mapping[str, str], key: str, number: int = _VOLUMES
) -> list[Volume]:
    """Volumes that were staged once."""
    volumes = [
        server.new_volume(f"{name}-{index:02}", folder / "mounts", _VOLUME_BYTES, parameters=parameters, key=key)
        for index in range(number)
    ]
    _at_once(lambda volume: volume.stage(), volumes)
    _at_once(lambda volume: volume.unstage(), volumes)
    return volumes


def _peers(folder: Path, stack: ExitStack) -> list[tuple[CephVolume, str]]:
    """As many volumes of Ceph-CSI, attached. One is formatted, by its own KDF; the others are copies of it."""
    key, template = random_key(), folder / "template"
    names = count()
    made = []
    for index in range(_VOLUMES):
        place = folder / f"ceph-{index:02}"
        place.mkdir()
        peer = CephVolume(place, _VOLUME_BYTES, key, cheap_kdf=False, name=f"luks-rbd-{next(names)}")
        if index:
            subprocess.run(["cp", "--sparse=always", template, place / "ceph.img"], check=True)
        device = stack.enter_context(peer.attached())
        if not index:
            peer.first_stage(device)
            peer.unstage()
            shutil.copyfile(place / "ceph.img", template)
        made.append((peer, device))
    return made


def _at_once(call: Callable[..., object], of: Sequence[object]) -> None:
    with ThreadPoolExecutor(_CALLERS) as callers:
        list(callers.map(call, of))
