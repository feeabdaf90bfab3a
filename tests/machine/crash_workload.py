"""Inside the guest: volumes that are created, staged, written, expanded, unstaged and deleted, until a crash.

`python -m tests.machine.crash_workload SEED CHECK PLANT BACKEND` first checks what earlier crashes left (CHECK: `none`,
`some` volumes are deleted then, `all` are and the boot ends there), then works. Its facts go to $MACHINE_OUT.
"""

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

import msgspec

from csi_driver.cli.logs import configure_logs
from csi_driver.model.settings import LogFormat
from csi_driver.rpc.client import RemoteError
from tests.machine.crash_check import check
from tests.machine.crash_log import SLOT, Expected, Fact, Facts, Follower, Kind, Record, Step, expected
from tests.machine.crash_node import Node
from tests.machine.crash_plants import Plant
from tests.machine.storage import after_boot

FACTS = "facts"
REPORT = "report"
WALKERS = 3
GIVE_UP_SECONDS = 300  # a workload that nobody crashed

_MIB = 1 << 20
_MOST_RECORDS = 60
_GROWTHS = 3
KINDS = {
    Kind.EXT4: 30, Kind.BLOCK: 25, Kind.KMS_EXT4: 12, Kind.KMS_BLOCK: 8, Kind.PLAIN_EXT4: 10, Kind.PLAIN_BLOCK: 8,
    Kind.XFS: 7,
}  # fmt: skip


class State(Enum):
    CREATING = auto()
    UNSTAGED = auto()
    STAGED = auto()
    PUBLISHED = auto()
    DELETING = auto()


@dataclass
class Held:
    """A volume of a walker."""

    id: str
    kind: Kind
    capacity: int
    state: State = State.CREATING
    formatted: bool = False
    records: int = 0
    growths: int = 0

    @classmethod
    def adopt(cls, volume: Expected) -> "Held":
        """A volume after a crash, which unstaged it. Whether a cut enlargement has begun nobody knows."""
        capacity = volume.capacity if volume.created else volume.asked
        state = State.DELETING if volume.deleting else State.UNSTAGED if volume.created else State.CREATING
        return cls(volume.id, volume.kind, capacity, state, volume.staged, len(volume.records))


class Walker:
    """Takes steps with volumes of its own, one after the other, each chosen by `rng`."""

    def __init__(
        self,
        node: Node,
        tell: Callable[[Fact], None],
        rng: random.Random,
        name: str,
        volumes: Sequence[Held] = (),
        kinds: dict[Kind, int] = KINDS,
    ) -> None:
        self._node = node
        self._tell = tell
        self._rng = rng
        self._name = name
        self._volumes = list(volumes)
        self._kinds = kinds
        self._made = 0

    def step(self) -> None:
        """One step with one volume."""
        if not self._volumes or (len(self._volumes) < 2 and self._rng.random() < 0.2):
            self._volumes.append(self._new())
        volume = self._rng.choice(self._volumes)
        match volume.state:
            case State.CREATING:
                self._create(volume)
            case State.UNSTAGED:
                fresh = not volume.formatted
                self._one_of(volume, (self._stage, 10), (self._expand, 2), (self._delete, 1 if fresh else 4))
            case State.STAGED:
                keys = (self._rotate, 2 * volume.kind.kms), self._another_key(volume)
                self._one_of(volume, (self._publish, 8), *keys, (self._unstage, 2))
            case State.PUBLISHED:
                keys = (self._rotate, 3 * volume.kind.kms), self._another_key(volume)
                self._one_of(volume, (self._write, 10), *keys, (self._expand, 2), (self._unpublish, 3))
            case State.DELETING:
                self._delete(volume)

    def leave(self) -> None:
        """Bring all volumes to rest, unstaged."""
        for volume in self._volumes:
            if volume.state is State.PUBLISHED:
                self._unpublish(volume)
            if volume.state is State.STAGED:
                self._unstage(volume)

    def _new(self) -> Held:
        self._made += 1
        kind = self._rng.choices(list(self._kinds), list(self._kinds.values()))[0]
        capacity = 304 if kind is Kind.XFS else self._rng.choice([16, 32, 64])
        return Held(f"{self._name}-{self._made}", kind, capacity * _MIB)

    def _one_of(self, volume: Held, *choices: tuple[Callable[[Held], None], int]) -> None:
        actions, weights = zip(*choices, strict=True)
        self._rng.choices(actions, weights)[0](volume)

    def _begin(self, step: Step, volume: Held, capacity: int = 0) -> None:
        self._tell(Fact(step, volume.id, volume.kind, capacity))

    def _another_key(self, volume: Held) -> tuple[Callable[[Held], None], int]:
        return self._reencrypt, int(volume.kind.encrypted and self._node.moves_keys)

    def _create(self, volume: Held) -> None:
        self._begin(Step.CREATING, volume, volume.capacity)
        volume.capacity = self._node.create(volume.id, volume.kind, volume.capacity)
        volume.state = State.UNSTAGED
        self._tell(Fact(Step.CREATED, volume.id, volume.kind, volume.capacity))

    def _stage(self, volume: Held) -> None:
        self._begin(Step.STAGING if volume.formatted else Step.FORMATTING, volume)
        self._node.stage(volume.id, volume.kind)
        volume.state, volume.formatted = State.STAGED, True
        identity = self._node.identity(volume.id, volume.kind)
        usable = self._node.usable(volume.id, volume.kind)
        self._tell(Fact(Step.STAGED, volume.id, volume.kind, identity=identity, usable=usable))

    def _publish(self, volume: Held) -> None:
        self._node.publish(volume.id, volume.kind)
        volume.state = State.PUBLISHED

    def _write(self, volume: Held) -> None:
        if volume.records >= _MOST_RECORDS:
            return self._unpublish(volume)
        record = self._place(volume)
        volume.records += 1
        folder = self._node.target(volume.id)
        descriptor = os.open(folder / record.file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            written = os.pwrite(descriptor, record.content(volume.id), record.offset)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if written != record.size:
            raise AssertionError(f"{written} of {record.size} bytes were written to volume {volume.id}")
        if record.offset == 0 and record.file:
            sync_folder(folder)
        return self._tell(Fact(Step.WRITTEN, volume.id, volume.kind, record=record))

    def _place(self, volume: Held) -> Record:
        """Where the next record goes: nowhere near another. On devices some go to the end, which moves."""
        number, size = volume.records, self._rng.randint(1, SLOT)
        if not volume.kind.block:
            return Record(number, f"data-{number % 3}", number // 3 * SLOT, size)
        return Record(number, "", volume.capacity - (number + 1) * SLOT if number % 4 == 0 else number * SLOT, size)

    def _expand(self, volume: Held) -> None:
        is_used = volume.state is not State.UNSTAGED
        if volume.growths >= _GROWTHS or (is_used and not (volume.kind.encrypted or self._node.below.enlarges_plain)):
            return
        self._end_move(volume)
        volume.growths += 1
        wanted = volume.capacity + self._rng.choice([8, 16, 24]) * _MIB
        self._begin(Step.EXPANDING, volume, wanted)
        published = volume.state is State.PUBLISHED
        volume.capacity = self._node.expand(volume.id, wanted, published=published)
        usable = self._node.usable(volume.id, volume.kind) if published else 0
        self._tell(Fact(Step.EXPANDED, volume.id, volume.kind, volume.capacity, usable))

    def _rotate(self, volume: Held) -> None:
        self._end_move(volume)
        self._node.rotate(volume.id)

    def _reencrypt(self, volume: Held) -> None:
        self._begin(Step.MOVING, volume)
        self._node.reencrypt(volume.id, volume.kind)

    def _end_move(self, volume: Held) -> None:
        """What a crash has cut forbids other changes until it has ended."""
        if self._node.is_between_keys(volume.id):
            self._node.reencrypt(volume.id, volume.kind)

    def _unpublish(self, volume: Held) -> None:
        self._node.unpublish(volume.id)
        volume.state = State.STAGED

    def _unstage(self, volume: Held) -> None:
        self._node.unstage(volume.id)
        volume.state = State.UNSTAGED
        self._begin(Step.UNSTAGED, volume)

    def _delete(self, volume: Held) -> None:
        self._begin(Step.DELETING, volume)
        self._node.delete(volume.id)
        self._volumes.remove(volume)
        self._begin(Step.DELETED, volume)


def sync_folder(folder: Path) -> None:
    """Make the names in it durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def walk(walker: Walker, facts: Facts, until: float) -> None:
    """Take steps until the time is over; what fails is told and ends it."""
    try:
        while time.monotonic() < until:
            walker.step()
    except (RemoteError, OSError, AssertionError) as error:
        facts.add(Fact(Step.FAILED, error=f"{type(error).__name__}: {error}"))


def work(node: Node, facts: Facts, volumes: Sequence[Expected], seed: str) -> None:
    """Several walkers at once, until the crash."""
    until = time.monotonic() + GIVE_UP_SECONDS
    threads = []
    for number in range(WALKERS):
        held = [Held.adopt(volume) for volume in volumes[number::WALKERS]]
        name = f"{seed.replace('/', '-')}-{number}"
        walker = Walker(node, facts.add, random.Random(name), name, held)
        threads.append(threading.Thread(target=walk, args=(walker, facts, until), name=name))
    facts.add(Fact(Step.READY))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main(seed: str, how: str, plant: str, backend: str = "loopfile") -> None:
    """Check and work; what ends it early is told."""
    facts = Facts(Path(os.environ["MACHINE_OUT"]) / FACTS)
    try:
        _main(seed, how, plant, backend)
    except Exception as error:
        facts.add(Fact(Step.FAILED, error=f"{type(error).__name__}: {error}"))
        raise


def _main(seed: str, how: str, plant: str, backend: str) -> None:
    out, state = Path(os.environ["MACHINE_OUT"]), Path(os.environ["MACHINE_STATE"])
    configure_logs(LogFormat.TEXT, "info")
    known = Follower(out / FACTS).news()
    facts = Facts(out / FACTS)
    host = Plant(plant).host()
    below = after_boot(backend, state, state / "luks-csi")
    with Node(state / "luks-csi", host, below) as node:
        if how != "none":
            report = check(node, facts.add, known, random.Random(seed), everything=how == "all")
            (out / REPORT).write_bytes(msgspec.json.encode(report))
            known = Follower(out / FACTS).news()
        if how != "all":
            volumes = [volume for volume in expected(known).values() if not volume.deleted]
            work(node, facts, volumes, seed)
    host.workers.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
