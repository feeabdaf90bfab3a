"""`make crashes`: guests are killed at random moments while volumes are at work in them, and boot again on their disk.

A kill is to the guest what a kernel crash is to a machine: what reached the device stays. A flush that was forgotten
shows when writes are taken back that nothing had flushed: `tests.machine.crash_replay` does, its replays are counted.

COUNT crashes (10), SEED to draw the same again, BACKEND loopfile, lvm-thick or lvm-thin (without replays). A run that
finds something keeps its folder and tells where.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import msgspec

from tests.machine.crash_check import Report
from tests.machine.crash_log import Fact, Follower, Step
from tests.machine.crash_plants import Plant
from tests.machine.crash_workload import FACTS, REPORT
from tests.machine.guest_uml import Guest, GuestConfig, GuestError, missing
from tests.machine.storage import chosen

ROOT = Path(__file__).parents[2]
MEMORY = 768 << 20
DISK = 4 << 30

READY_SECONDS = 240.0  # boot and check, on a machine that does other things too
STEP_SECONDS = 15.0  # for a wished moment to come
ALIVE_SECONDS = 30.0  # the longest pause between two facts of a workload that is at work
POLL_SECONDS = 0.004
UNIFORM = 0.35  # share of the crashes that fall on any moment
WINDOW_SECONDS = 4.0
REPLAYS_PER_CRASH = 2

# Seconds after such a step in which the crash falls. The longest ones are those in which most happens.
MOMENTS: Mapping[Step, float] = {
    Step.CREATING: 0.04,
    Step.CREATED: 0.004,
    Step.FORMATTING: 0.9,
    Step.STAGING: 0.15,
    Step.STAGED: 0.004,
    Step.WRITTEN: 0.004,
    Step.EXPANDING: 0.25,
    Step.EXPANDED: 0.004,
    Step.UNSTAGED: 0.02,
    Step.DELETING: 0.05,
    Step.DELETED: 0.004,
}
_WEIGHTS = {Step.FORMATTING: 8, Step.EXPANDING: 2}


class RunFailed(Exception):
    """The run itself came to nothing; one sentence, and what the guest said."""


@dataclass(frozen=True)
class Moment:
    """`delay` seconds after the `times`-th `step`; of the workload's start without one."""

    delay: float
    step: Step = Step.READY
    times: int = 0

    @classmethod
    def draw(cls, rng: random.Random) -> "Moment":
        if rng.random() < UNIFORM:
            return cls(rng.uniform(0, WINDOW_SECONDS))
        step = rng.choices(list(MOMENTS), [_WEIGHTS.get(step, 1) for step in MOMENTS])[0]
        return cls(rng.uniform(0, MOMENTS[step]), step, rng.randint(1, 3))


@dataclass
class Outcome:
    """What a run showed."""

    seed: int
    backend: str
    crashes: int = 0
    replays: int = 0
    report: Report = field(default_factory=Report)

    def summary(self) -> str:
        report = self.report
        numbers = {
            "backend": self.backend,
            "crashes": self.crashes,
            "replays": self.replays,
            "volumes": len(set(report.volumes)),
            "bytes": report.bytes,
            "cut": sum(report.cut.values()),
            "lost": len(report.lost),
            "reformatted": len(report.reformatted),
            "unstageable": len(report.unstageable),
            "left": len(report.left),
            "seed": self.seed,
        }
        return " ".join(f"{name}={number}" for name, number in numbers.items())


class Machine:
    """A guest on a disk of its own that is crashed and booted again; `folder` holds its disk and its facts."""

    def __init__(self, guest: Guest, folder: Path, seed: str, plant: Plant, backend: str) -> None:
        self._guest = guest
        self._folder = folder
        self._seed = seed
        self._plant = plant
        self._backend = backend
        self._boots = 0
        self._follower = Follower(folder / "out" / FACTS)
        self._last_fact = 0.0
        self.report = Report()

    def crash(self, how: str, moment: Moment) -> bool:
        """Boot, check what is there, work, and crash at that moment; False if the check found something.

        `how` is "some" (those of the volumes are deleted that the seed says) or "none": no check this time.
        """
        self._boot("crash_workload", how)
        self._await(Step.READY, 1, READY_SECONDS)
        self._take_report()
        if self.report.findings:
            return False
        if moment.times:
            self._await(moment.step, moment.times, STEP_SECONDS, required=False)
        self._sleep(moment.delay)
        self._guest.kill()
        self._look()
        if time.monotonic() - self._last_fact > ALIVE_SECONDS:
            raise RunFailed(f"The workload had stopped before it was crashed.\n{self._said()}")
        return True

    def end(self) -> None:
        """Boot, check all, delete all."""
        self._boot("crash_workload", "all")
        self._finish(READY_SECONDS)

    def replay(self, count: int) -> int:
        """Log what a workload writes, and check that many states that a power cut could have left; how many were."""
        self._boot("crash_replay", str(count))
        self._finish(READY_SECONDS + 5 * count)
        return int(self._guest.output())

    def _finish(self, seconds: float) -> None:
        if code := self._guest.wait(seconds):
            raise RunFailed(f"The check ended with {code}.\n{self._said()}")
        self._take_report()

    def _boot(self, program: str, how: str) -> None:
        self._boots += 1
        (self._folder / "out" / REPORT).unlink(missing_ok=True)
        _copy(self._guest.disk, self._folder / "disk.before")
        _copy(self._folder / "out" / FACTS, self._folder / "facts.before")
        seed = f"{self._seed}/{self._boots}"
        words = [seed, how, self._plant.value, *([self._backend] if program == "crash_workload" else [])]
        self._guest.start([sys.executable, "-m", f"tests.machine.{program}", *words])
        self._last_fact = time.monotonic()

    def _take_report(self) -> None:
        path = self._folder / "out" / REPORT
        if path.exists():
            self.report.add(msgspec.json.decode(path.read_bytes(), type=Report))

    def _await(self, step: Step, times: int, seconds: float, *, required: bool = True) -> None:
        """Wait for that many facts of that step from now on."""
        deadline = time.monotonic() + seconds
        while times > 0:
            times -= sum(fact.step is step for fact in self._look())
            if time.monotonic() > deadline:
                if not required:
                    return
                raise RunFailed(f"The guest did not come to {step} within {seconds:g} s.\n{self._said()}")
            time.sleep(POLL_SECONDS)

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
            self._look()

    def _look(self) -> list[Fact]:
        found = list(self._follower.news())
        if found:
            self._last_fact = time.monotonic()
        for fact in found:
            if fact.step is Step.FAILED and self._plant is Plant.NONE:
                raise RunFailed(f"A call of the workload failed: {fact.error}\n{self._said()}")
        return found

    def _said(self) -> str:
        return self._guest.output("stderr").decode(errors="replace")[-4000:]


@contextmanager
def machine(seed: str, plant: Plant = Plant.NONE, backend: str = "loopfile") -> Iterator[Machine]:
    """A machine in a folder that goes away, unless something was found: then its place is told."""
    folder = Path(tempfile.mkdtemp(prefix="crashes-"))
    (folder / "out").mkdir()
    config = GuestConfig(memory=MEMORY, disk=folder / "disk", disk_size=DISK, out=folder / "out", cwd=ROOT)
    keep = False
    try:
        with Guest(config) as guest:
            made = Machine(guest, folder, seed, plant, backend)
            try:
                yield made
            except (RunFailed, GuestError):
                keep = True
                raise
            finally:
                keep = plant is Plant.NONE and (keep or bool(made.report.findings))
                if keep:
                    (folder / "stderr").write_bytes(guest.output("stderr"))
    finally:
        if keep:
            print(f"kept: {folder} (disk.before and facts.before are those of the last boot)", file=sys.stderr)
        else:
            shutil.rmtree(folder)


def run(seed: int, count: int, replays: int, backend: str = "loopfile") -> Outcome:
    """Crash until `count` is reached or something is found, then replay."""
    rng = random.Random(seed)
    outcome = Outcome(seed, backend)
    while outcome.crashes < count and not outcome.report.findings:
        crashes = min(rng.randint(3, 6), count - outcome.crashes)
        with machine(f"{seed}-{outcome.crashes}", backend=backend) as crashed:
            for _ in range(crashes):
                how, moment = "none" if rng.random() < 0.2 else "some", Moment.draw(rng)
                if not crashed.crash(how, moment):
                    break
                outcome.crashes += 1
                told = f"{moment.delay:.3f} s after {moment.step} {moment.times or ''}".rstrip()
                print(f"crash {outcome.crashes} of {count}: {told}", file=sys.stderr)
            else:
                crashed.end()
            outcome.report.add(crashed.report)
    if replays and not outcome.report.findings:
        with machine(f"{seed}-replays") as replayed:
            outcome.replays = replayed.replay(replays)
            outcome.report.add(replayed.report)
    return outcome


def _copy(source: Path, target: Path) -> None:
    if source.exists():
        subprocess.run(["cp", "--sparse=always", "--reflink=auto", source, target], check=True, timeout=120)


def _terminated(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    count = int(os.environ.get("COUNT") or 10)
    seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(1 << 31))
    if reason := missing():
        print(reason, file=sys.stderr)
        return 1
    backend = chosen()
    again = f"repeat with: make crashes SEED={seed} COUNT={count} BACKEND={backend}"
    try:
        # What is taken back are writes to a file system, and not those to what is below a volume group.
        outcome = run(seed, count, REPLAYS_PER_CRASH * count if backend == "loopfile" else 0, backend)
    except (RunFailed, GuestError) as error:
        print(error, again, sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    findings = outcome.report.findings
    if findings:
        print(
            *findings,
            f"repeat with: make crashes SEED={seed} COUNT={count} BACKEND={backend}",
            sep="\n",
            file=sys.stderr,
        )
    print(outcome.summary())
    return 1 if findings or outcome.crashes < count else 0


if __name__ == "__main__":
    sys.exit(main())
