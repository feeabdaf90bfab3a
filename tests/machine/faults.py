"""`make faults`: every step of every call fails, or the server is killed before, during and after it.

The steps are derived from a recorded run of each scenario. For each a fresh volume is brought to the call, the fault is
injected, a fresh server repeats the call, and the volume goes on to its end. Lost is a case in which a call does not
succeed when repeated, data is not what was written, or something was formatted again; leaked is one after which the
kernel shows more than before.

SEED and COUNT choose: COUNT of the points, drawn with SEED; all by default. FROM is the case to begin with, where an
earlier run with the same SEED was ended. BACKEND is loopfile, a volume group's lvm-thick or lvm-thin, rbd by
`tests.backends.on_ceph`, or csi over a played cluster; only on loopfile there are volumes from images. On rbd a case
takes ten seconds in a guest.
"""

import gc
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from csi_driver.model.settings import Settings
from tests.keys.program import program
from tests.machine.fault_points import Fault, Kind, Point
from tests.machine.fault_scenario import SCENARIOS, Life, Lost, Scenario
from tests.machine.fault_server import Build, FaultServer, Outcome, faulty_driver
from tests.machine.leaks import Facts, adopting_orphans, children, clear, leaked_since, orphans, settled
from tests.machine.storage import Storage, chosen, storage

LEAST_POINTS = 100
"""Fewer than these, and the recording has missed something."""

_BUSY_SECONDS = 30.0
_PAUSE = 0.02
_FORGIVEN = {
    ("restage", "worker luks-grow"),
    *((call, "note remove") for call in ("create", "rotate", "delete")),
    *(("stage", seam) for seam in ("worker luks-backup", "file rename", "file sync_folder")),
    *(("stage", f"api {what}") for what in ("create headerpieces", "patch volumerecords header")),
    ("stage", "copy remove"),
    *((call, "worker rbd image-meta") for call in ("create", "stage")),
    *((call, f"worker rados {what}") for call in ("stage", "restage") for what in ("getomapval", "stat", "put")),
    *(("unstage", f"worker rados {what}") for what in ("get", "append")),
    ("unstage", "api patch volumerecords staged"),
}
"""Steps whose failure a call outlives: a file system that cannot grow keeps nobody from the data in it, nor does a copy
of the header that could not be made (on Ceph: looked for by getomapval and stat, made by put), or what tells Ceph's own
tools of an image; and the note of a key that a KMS is about to make, or to forget, may stay. A cluster that was not
told of an unmapping puts a client on its blocklist that is gone. An API that was not told that a device was let go of
is told later: the pin says so until then.
"""

_ALIKE = {"create", "attach", "grow", "rotate", "detach", "delete"}
"""Calls that are the same work for each kind of volume for which they take the same steps."""

_AS_MANY_AS_THERE_ARE = "api delete headerpieces"
"""A step that comes more often in a life in which more was done: the first one is tried."""


@dataclass(frozen=True)
class Case:
    """One fault at one point."""

    point: Point
    kind: Kind

    def __str__(self) -> str:
        return f"{self.point}: {self.kind}"


@dataclass
class Result:
    """What came of all cases; each entry of `lost` and `leaked` is a sentence.

    `busy` counts the cases in which a child of the killed server waited to do its work, and the next call was told to
    come again.
    """

    cases: int = 0
    kills: int = 0
    busy: int = 0
    lost: dict[str, str] = field(default_factory=dict)
    leaked: dict[str, str] = field(default_factory=dict)

    def tell(self, what: str, case: Case, found: str) -> None:
        """Keep and print that a case has `lost` or `leaked` something, before anything is put in order behind it."""
        (self.lost if what == "lost" else self.leaked)[str(case)] = found
        print(f"{what}: {case}: {found}", file=sys.stderr, flush=True)


class Lab:
    """A folder with a state directory, the running server, and the cases tried on them."""

    def __init__(self, folder: Path, below: Storage, build: Build = faulty_driver, seed: int = 0) -> None:
        self._folder = folder
        self._below = below
        self._state = folder / "state"
        settings = Settings(
            endpoint=folder / "csi.sock",
            node_id="node-1",
            state_dir=self._state,
            free_space_floor=64 << 20,
            kms_config=folder / "kms.json",
            kms_programs=folder,
        )
        self._settings = below.settings(settings)
        program(folder)
        settings.kms_config.write_text('{"kms": {"encryptionKMSType": "exec", "program": "wrap-key"}}')
        self._build = build
        self._seed = seed
        self._log = folder / "server.log"
        self._gate = folder / "gate"
        self._running: FaultServer | None = None
        self._known = children()
        self._busy = False

    def record(self, scenarios: Sequence[Scenario] = SCENARIOS) -> list[Point]:
        """The points of each scenario, from a run in which nothing fails. Raises Lost."""
        points: list[Point] = []
        seen: set[tuple[str, ...]] = set()
        had: set[tuple[bool, str, str, int, bool]] = set()
        # What is done once, for all volumes or by a server, is no step: a case has the server of the one before.
        self._live(scenarios[0])
        for scenario in scenarios:
            if scenario.from_image and not self._below.makes_from_file:
                continue
            for call, outcome in self._live(scenario):
                seams = tuple(step.seam for step in outcome.steps)
                alike = call in _ALIKE or all(seam.startswith("file") for seam in seams)
                if call not in scenario.faulted or (alike and (call, *seams) in seen):
                    continue
                seen.add((call, *seams))
                seconds = {(end.seam, end.nth): end.seconds for end in outcome.ended}
                # On loopfile, where a case is quick, each kind of volume is tried in full.
                names = {
                    step: (scenario.encrypted, call, step.seam, step.nth, bool(step.depth)) for step in outcome.steps
                }
                points += [
                    Point(
                        scenario.name,
                        call,
                        step.seam,
                        step.nth,
                        step.depth,
                        seconds.get((step.seam, step.nth), 0.0),
                        again=not self._below.makes_from_file and name in had,
                    )
                    for step, name in names.items()
                    if step.nth == 1 or step.seam != _AS_MANY_AS_THERE_ARE
                ]
                had |= {*names.values()}
        return [point for point in points if point.kinds]

    def _live(self, scenario: Scenario) -> list[tuple[str, Outcome]]:
        """A whole life in which nothing fails."""
        life = Life(scenario, self._folder, self._below)
        outcomes = [(call, self._succeed(life, call, self._server())) for call in life.calls]
        life.end()
        return outcomes

    def try_all(self, cases: Sequence[Case], first: int = 1) -> Result:
        """Try each case from the `first` on; troubles, and how far it is, are told on standard error as they come."""
        result = Result()
        for number, case in enumerate(cases[first - 1 :], first):
            if result.cases % 50 == 0:
                print(f"case {number} of {len(cases)}: {case}", file=sys.stderr, flush=True)
            result.cases += 1
            result.kills += case.kind.kills_server or case.kind is Kind.WORKER
            self._busy = False
            self._shut_gate()
            self._try(case, result)
            result.busy += self._busy and case.kind is Kind.DURING
        return result

    def close(self) -> None:
        """End the server, and wait for what it leaves to end."""
        self._gate.touch()
        self._renew()
        settled(lambda: orphans(self._known))

    def _try(self, case: Case, result: Result) -> None:
        scenario = next(scenario for scenario in SCENARIOS if scenario.name == case.point.scenario)
        life = Life(scenario, self._folder, self._below)
        inherits = "create" not in life.around(case.point.call)
        if inherits and self._below.makes_from_file and not life.has_template:
            self._begin(life)
            life.keep()
            life = Life(scenario, self._folder, self._below)
        self._server()
        before = Facts.now(self._state)
        try:
            if inherits and self._below.makes_from_file:
                life.inherit()
            elif inherits:
                self._begin(life)
            leaked = self._drive(life, case)
        except Lost as broken:
            result.tell("lost", case, str(broken))
        except Exception as unforeseen:  # noqa: BLE001 - of one case, and the others are to be tried
            result.tell("lost", case, f"{type(unforeseen).__name__}: {unforeseen}")
        else:
            leaked += leaked_since(before, self._state)
            leaked += settled(lambda: orphans(self._known | {self._server().pid}))
            if leaked:
                result.tell("leaked", case, "; ".join(leaked))
        if str(case) in result.lost or str(case) in result.leaked:
            self.close()
            clear(before, self._state)
            self._below.clear()
        life.end()

    def _begin(self, life: Life) -> None:
        """A volume that was staged once."""
        for call in life.begin:
            self._succeed(life, call, self._server())

    def _drive(self, life: Life, case: Case) -> list[str]:
        """Take the volume through its life with the fault in it; returns what a failed call left at once."""
        leaked: list[str] = []
        for call in life.around(case.point.call):
            if call != case.point.call:
                self._succeed(life, call, self._server())
                continue
            before, outlived = Facts.now(self._state), False
            if case.kind is Kind.FOREIGN:
                self._refuse_foreign(life, call)
            else:
                outcome = self._server().call(life.request(call), self._fault(case))
                self._judge(case, outcome)
                life.watch(outcome.steps)
                outlived = outcome.succeeded
            if case.kind is Kind.ZOMBIE:
                life.bereave()
            if not case.kind.kills_server and not outlived:
                leaked = settled(partial(self._left_by_failure, before, call))
            self._renew()
            if case.kind is Kind.ABANDON:
                for last in life.give_up:
                    self._succeed(life, last, self._server())
                return leaked
            self._succeed(life, call, self._server())
            self._gate.touch()
        return leaked

    def _left_by_failure(self, before: Facts, call: str) -> list[str]:
        # The copy of a header that was made is no leftover: the volume has it from then on. Nor is the file of a lock,
        # which a program that is about to die may have open: the volume's next call takes it away.
        found = [
            one
            for one in Facts.now(self._state).more_than(before)
            if not one.endswith("/header.luks2") and f"{self._state}/locks/" not in one
        ]
        # What a cut deletion or enlargement leaves is for its repetition; a call that builds up must leave nothing.
        return (
            found
            if call in ("create", "stage", "restage", "publish")
            else [one for one in found if not one.startswith("files")]
        )

    def _refuse_foreign(self, life: Life, call: str) -> None:
        life.spoil()
        outcome = self._server().call(life.request(call))
        if outcome.failure is None or "FailedPrecondition" not in outcome.failure.classes:
            raise Lost(f"a device with somebody else's data was not refused: {outcome.failure or 'staged'}")
        life.unspoil()

    def _judge(self, case: Case, outcome: Outcome) -> None:
        """Whether the fault had the effect that it must have."""
        if not outcome.fired:
            raise Lost("the point was not reached")
        if outcome.hung:
            raise Lost("the call hung")
        if outcome.died != case.kind.kills_server:
            raise Lost("the server died" if outcome.died else "the server did not die")
        forgiven = (case.point.call, case.point.seam) in _FORGIVEN
        if not outcome.died and outcome.failure is None and not forgiven:
            raise Lost("the call succeeded though a step of it failed")
        if outcome.failure is not None and not outcome.failure.on_purpose:
            raise Lost(f"the call ended in an error that nobody foresaw: {outcome.failure}")

    def _succeed(self, life: Life, call: str, server: FaultServer) -> Outcome:
        """Make a call that must succeed, again while the volume is busy."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            outcome = server.call(life.request(call))
            life.watch(outcome.steps)
            if not (outcome.failure and outcome.failure.passes_by_itself) or time.monotonic() > deadline:
                break
            self._busy = True
            self._gate.touch()
            time.sleep(_PAUSE)
        if not outcome.succeeded:
            raise Lost(f"{call} did not succeed: {outcome.failure or ('hung' if outcome.hung else 'the server died')}")
        life.after(call)
        return outcome

    def _fault(self, case: Case) -> Fault:
        point = case.point
        part = random.Random(f"{self._seed} {case}").uniform(0.05, 0.8)
        return Fault(point.seam, point.nth, case.kind, part * point.seconds, str(self._gate))

    def _shut_gate(self) -> None:
        for path in (self._gate, self._gate.with_suffix(".waits")):
            path.unlink(missing_ok=True)

    def _server(self) -> FaultServer:
        if self._running is None:
            self._running = FaultServer(self._settings, self._build, self._log)
        return self._running

    def _renew(self) -> None:
        if self._running:
            self._running.kill()
        self._running = None


@contextmanager
def lab(build: Build = faulty_driver, seed: int = 0, backend: str = "loopfile") -> Iterator[Lab]:
    """A lab on the machine's state disk."""
    parent = os.environ.get("MACHINE_STATE", "/var/tmp")
    with adopting_orphans(), tempfile.TemporaryDirectory(prefix="faults-", dir=parent) as name:
        folder = Path(name)
        with storage(backend, folder, folder / "state") as below:
            gc.freeze()  # keeps the collector from touching, and so copying, what every server shares
            made = Lab(folder, below, build, seed)
            try:
                yield made
            finally:
                made.close()
                gc.unfreeze()


def cases_of(points: Sequence[Point], drawn: Sequence[Point] | None = None) -> list[Case]:
    """Every case of these points, or of some `drawn` among them, and those of points at which more can go wrong."""
    wanted = points if drawn is None else drawn
    cases = [Case(point, kind) for point in wanted for kind in point.kinds]
    for scenario in SCENARIOS:
        here = [point for point in points if point.scenario == scenario.name and not point.depth]
        # A plain block volume is never formatted: whatever it holds is shown. One from an image is never blank.
        if (scenario.encrypted or not scenario.block) and not scenario.from_image:
            first = [point for point in here if point.call == "stage"][:1]
            cases += [Case(point, Kind.FOREIGN) for point in first if point in wanted]
        if scenario.encrypted:
            last = [point for point in here if point.call == "restage"][-1:]
            cases += [Case(point, Kind.ZOMBIE) for point in last if point in wanted]
    return cases


def main() -> int:
    seed = int(os.environ.get("SEED") or time.time_ns() % 100_000)
    count, first = int(os.environ.get("COUNT") or 0), max(1, int(os.environ.get("FROM") or 1))
    backend, started = chosen("rbd", "csi"), time.monotonic()
    with lab(seed=seed, backend=backend) as tried:
        points = tried.record()
        drawn = random.Random(seed).sample(points, min(count, len(points))) if count else points
        result = tried.try_all(cases_of(points, drawn), first)
    print(
        f"backend={backend} points={len(drawn)} first={first} cases={result.cases} kills={result.kills} "
        f"busy={result.busy} lost={len(result.lost)} leaked={len(result.leaked)} derived={len(points)} "
        f"seconds={time.monotonic() - started:.0f} seed={seed}"
    )
    return 0 if result.cases and not (result.lost or result.leaked) and len(points) >= LEAST_POINTS else 1


if __name__ == "__main__":
    sys.exit(main())
