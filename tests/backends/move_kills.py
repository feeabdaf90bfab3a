"""`make move-kills`: kill -9 at every step of a move to another backend, and what can be used of the volume then.

After each kill it can be used in one of the two places and not in both, with all that was in it; written to in between
or not, the same command ends the move. SEED chooses, COUNT is how many steps of each kind; all of them without it.
"""

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

from csi_driver.host.workers import Workers
from csi_driver.model.errors import VolumeBusy
from csi_driver.volumes.driver import WARM
from tests.backends.moving import PLAIN, Pair, fill, is_refused, pair_in, shown, write
from tests.backends.rigs import RIGS, LvmRig
from tests.machine.node import CHEAP, Node

T = TypeVar("T")

KINDS = (("files", "encrypted"), ("group", "encrypted"), ("files", "plain"), ("group", "plain"))
_BUSY_SECONDS = 120.0


@dataclass
class Result:
    """What came of it; `lost` says of which kill and what."""

    points: int = 0
    kills: int = 0
    lost: list[str] = field(default_factory=list)


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


def run(rig: LvmRig, case: Case, kind: str, step: int, result: Result) -> int:
    """One case; returns how many steps there were, where it was not killed (`step` 0)."""
    rig.clear()
    pair = pair_in(case.folder, rig.backend(), rig.workers, rig.parameters.thin_pool)
    source = pair.files if case.source == "files" else pair.group
    target, where = pair.other(source), f"{kind} from {case.source}, step {step}"
    content = fill(source, PLAIN if kind == "plain" else CHEAP, step, pair.pool if source is pair.group else None)
    steps = case.killed(step)
    result.kills += steps is None
    if step % 2 == 0:
        content = _used(pair, source, content, step, where, result)
    if source.store.has("pvc-1"):
        _patiently(lambda: pair.move(source))
    if not _patiently(lambda: shown(target)).startswith(content):
        result.lost.append(f"{where}: the content is another one in the end")
    if source.store.has("pvc-1") or source.store.orphans() or target.store.orphans():
        result.lost.append(f"{where}: something was left behind")
    target.delete()
    return steps or 0


def _used(pair: Pair, source: Node, content: bytes, step: int, where: str, result: Result) -> bytes:
    """Use it wherever that can be, and write to it; returns what is in it then."""
    homes = [node for node in (pair.other(source), source) if not _patiently(partial(is_refused, node))]
    if len(homes) != 1:
        result.lost.append(f"{where}: it can be used in {len(homes)} places")
        return content
    (home,) = homes
    if not shown(home).startswith(content):
        result.lost.append(f"{where}: the content is another one")
    return write(home, step + 1)[: len(content)]


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


def run_all(rig: LvmRig, storage: Path, backend: str, seed: int, count: int) -> Result:
    """All kinds, all steps or `count` of each."""
    result, drawn = Result(), random.Random(seed)
    for source, kind in KINDS:
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
    for backend in [name for name in RIGS if name.startswith("lvm") and name.startswith(chosen)]:
        storage = Path(os.environ.get("MACHINE_STATE") or "/var/tmp") / f"moves-{backend}-{seed}"
        storage.mkdir()
        workers = Workers(WARM)
        workers.start()
        with RIGS[backend](storage, workers) as rig:
            assert isinstance(rig, LvmRig)
            begun = time.monotonic()
            result = run_all(rig, storage, backend, seed, int(os.environ.get("COUNT") or 0))
        workers.stop()
        for one in result.lost:
            print(one)
        print(
            f"moves: backend={backend} points={result.points} kills={result.kills} lost={len(result.lost)} "
            f"seconds={time.monotonic() - begun:.0f} seed={seed}",
            flush=True,
        )
        failed |= bool(result.lost) or not result.kills
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
