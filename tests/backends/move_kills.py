"""`make move-kills`: kill -9 at every step of a move to another backend, and what can be used of the volume then.

After each kill it can be used in one of the two places and not in both, with all that was in it; written to in between
or not, the same command ends the move. Another node never has from Ceph what can be used in its old place, and any node
can be given it in the end. SEED chooses, COUNT is how many steps of each kind; all of them without it.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from csi_driver.backends.base import shared
from csi_driver.host.krbd import MappedImages
from csi_driver.host.workers import Workers
from csi_driver.model.errors import NotFound, VolumeBusy
from csi_driver.model.settings import MIB
from csi_driver.volumes.driver import WARM
from tests.backends.moving import PLAIN, Pair, fill, is_refused, pair_in, shown, write
from tests.backends.rigs import RIGS, LvmRig, RbdRig
from tests.machine.node import CHEAP, NAME, Node

T = TypeVar("T")

KINDS = (("files", "encrypted"), ("group", "encrypted"), ("files", "plain"), ("group", "plain"))
TO_CEPH = (("files", "encrypted"), ("files", "plain"))
MoveRig = LvmRig | RbdRig
_BUSY_SECONDS = 120.0
_CEPH_STRETCH = 4 * MIB  # each change of a record there is several programs


@dataclass
class Result:
    """What came of it; `lost` and `leaked` say of which kill and what."""

    points: int = 0
    kills: int = 0
    lost: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)


def pair_on(rig: MoveRig, folder: Path) -> Pair:
    """The drivers in `folder`."""
    if isinstance(rig, RbdRig):
        return pair_in(folder, rig.backend(), rig.workers, rig.parameters, rig.id_of(NAME), _CEPH_STRETCH)
    return pair_in(folder, rig.backend(), rig.workers, rig.parameters)


@dataclass
class Case:
    """Where the drivers are, and the child that moves between them."""

    storage: Path
    folder: Path
    backend: str
    source: str

    def killed(self, step: int) -> int | None:
        """Move it in a process that is killed at that step; how many steps it had where it was not."""
        child = subprocess.run(
            [sys.executable, "-m", "tests.backends.move_child", str(self.storage), str(self.folder), self.backend,
             self.source, str(step)],
            check=False, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        if child.returncode == -signal.SIGKILL:
            return None
        assert child.returncode == 0, f"{self}, step {step}: {child.stderr}"
        return int(child.stdout)


def run(rig: MoveRig, case: Case, kind: str, step: int, result: Result) -> int:
    """One case; returns how many steps there were, where it was not killed (`step` 0)."""
    rig.clear()
    pair = pair_on(rig, case.folder)
    source = pair.files if case.source == "files" else pair.group
    target, where = pair.other(source), f"{kind} from {case.source}, step {step}"
    content = fill(source, PLAIN if kind == "plain" else CHEAP, step, pair.pool if source is pair.group else None)
    steps = case.killed(step)
    result.kills += steps is None
    if step % 2 == 0:
        content = _used(pair, source, _other_node(rig, case), content, step, where, result)
    with contextlib.suppress(NotFound):  # it had come to its end
        _patiently(lambda: pair.move(source))
    volume = pair.id_at(target)
    if not _patiently(lambda: shown(target, volume)).startswith(content):
        result.lost.append(f"{where}: the content is another one in the end")
    if source.store.has(NAME) or source.store.orphans() or target.store.orphans():
        result.leaked.append(f"{where}: something was left behind")
    if (storage := shared(target.store)) is not None:
        if storage.published(volume) or any(MappedImages().all()):
            result.leaked.append(f"{where}: this node has it still")
        storage.publish(volume, "node-2", many_nodes=False)
        storage.unpublish(volume, "node-2")
    target.delete(volume)
    return steps or 0


def _used(pair: Pair, source: Node, third: Node | None, content: bytes, step: int, where: str, result: Result) -> bytes:
    """Use it wherever that can be, and write to it; returns what is in it then."""
    is_elsewhere = third is not None and not _patiently(partial(is_refused, third, pair.far))
    places = pair.other(source), source
    homes = [node for node in places if not _patiently(partial(is_refused, node, pair.id_at(node)))]
    if len(homes) != 1:
        result.lost.append(f"{where}: it can be used in {len(homes)} places")
        return content
    (home,) = homes
    if is_elsewhere and home is source:
        result.lost.append(f"{where}: another node has it too")
    volume = pair.id_at(home)
    if not shown(home, volume).startswith(content):
        result.lost.append(f"{where}: the content is another one")
    return write(home, step + 1, volume)[: len(content)]


def _other_node(rig: MoveRig, case: Case) -> Node | None:
    """Another node of the driver of Ceph, which has no state directory that the volume came from."""
    if not isinstance(rig, RbdRig):
        return None
    return Node(case.folder / "other", rig.workers, backend=rig.backend(node_id="node-2"))


def _patiently(call: Callable[[], T]) -> T:
    """Once the children of a killed process have ended, which keep the volume's lock."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            return call()
        except VolumeBusy:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def run_all(rig: MoveRig, storage: Path, backend: str, seed: int, count: int) -> Result:
    """All kinds, all steps or `count` of each."""
    result, drawn = Result(), random.Random(seed)
    for source, kind in TO_CEPH if isinstance(rig, RbdRig) else KINDS:
        case = Case(storage, storage / f"{source}-{kind}", backend, source)
        steps = run(rig, case, kind, 0, result)
        result.points += steps
        chosen = range(1, steps + 1) if not count else sorted(drawn.sample(range(1, steps + 1), min(count, steps)))
        for step in chosen:
            run(rig, case, kind, step, result)
    return result


def main() -> int:
    """Run it; the exit code is 0 when nothing was lost."""
    seed = int(os.environ.get("SEED") or time.time_ns() % 100_000)
    chosen = os.environ.get("BACKEND") or "lvm"
    failed = False
    for backend in [name for name in RIGS if name.startswith(("lvm", "rbd")) and name.startswith(chosen)]:
        storage = Path(os.environ.get("MACHINE_STATE") or "/var/tmp") / f"moves-{backend}-{seed}"
        storage.mkdir()
        workers = Workers(WARM)
        workers.start()
        with RIGS[backend](storage, workers) as rig:
            assert isinstance(rig, MoveRig)
            begun = time.monotonic()
            result = run_all(rig, storage, backend, seed, int(os.environ.get("COUNT") or 0))
        workers.stop()
        for one in (*result.lost, *result.leaked):
            print(one)
        print(
            f"moves: backend={backend} points={result.points} kills={result.kills} lost={len(result.lost)} "
            f"leaked={len(result.leaked)} seconds={time.monotonic() - begun:.0f} seed={seed}",
            flush=True,
        )
        failed |= bool(result.lost or result.leaked) or not result.kills
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
