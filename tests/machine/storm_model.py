"""What the storm knows to be true: which volumes are there, which records were acknowledged in them, and its findings.

A volume's name is used again and again; each time it is another *generation*. Who is to make or remove it asks first
(`Slot.begin`), so that from what was answered it is always known which generation may be there. A call whose server was
killed has no known outcome: what it may have done stays possible until a later answer tells.
"""

import random
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from pathlib import Path

import msgspec

from csi_driver.rpc.client import RemoteVolume
from csi_driver.volumes.capability import AccessMode, Capability
from tests.machine.node import CHEAP, MIB, NONE

RECORD_BYTES = 4096
PLACES = 16
"""Records of a volume that are there at once; a later one at a place takes the earlier one's."""
GROWTH = 8 * MIB
MOST_GROWTHS = 3

_HEAD = re.compile(rb"storm (\S+) (\d+) (\d+)\n")


@dataclass(frozen=True)
class Kind:
    """What a volume is used as; `size` in bytes, a block volume has no file system type."""

    encrypted: bool
    fs_type: str | None
    size: int = 16 * MIB
    image: str | None = None

    @property
    def block(self) -> bool:
        return self.fs_type is None

    @property
    def capability(self) -> Capability:
        return Capability(AccessMode.SINGLE_NODE_WRITER, self.block, self.fs_type)

    @property
    def parameters(self) -> dict[str, str]:
        """Its StorageClass."""
        if self.image is None:
            return dict(CHEAP if self.encrypted else NONE)
        return {"backingImage": self.image, **({"encrypted": "true"} if self.encrypted else {})}


class Code(StrEnum):
    """How a call ended, as far as the storm makes a difference."""

    OK = "OK"
    ABORTED = "ABORTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    NOT_FOUND = "NOT_FOUND"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    CANCELLED = "CANCELLED"


UNDONE = frozenset({Code.ABORTED, Code.FAILED_PRECONDITION, Code.NOT_FOUND})
"""A call that ended so has changed nothing of what is there."""


class Op(StrEnum):
    """The calls of CSI that change or show a volume."""

    CREATE = auto()
    STAGE = auto()
    PUBLISH = auto()
    GROW = auto()
    EXPAND = auto()
    STATS = auto()
    UNPUBLISH = auto()
    UNSTAGE = auto()
    DELETE = auto()


class There(Enum):
    """Whether a volume exists: DOOMED ones may be gone, as a deletion was cut."""

    NO = auto()
    MAYBE = auto()
    YES = auto()
    DOOMED = auto()


@dataclass(frozen=True)
class Ticket:
    """A call that was allowed to begin. The volume was `sure` to be there; `deletes` had begun in all."""

    op: Op
    generation: int
    sure: bool
    deletes: int


def content(name: str, generation: int, serial: int) -> bytes:
    """RECORD_BYTES that tell whose they are and cannot be taken for others."""
    head = b"storm %s %d %d\n" % (name.encode(), generation, serial)
    return head + random.Random(head).randbytes(RECORD_BYTES - len(head))


def whose(found: bytes) -> tuple[str, int] | None:
    """Name and generation of the volume that a record was written into; None for what is no record."""
    match = _HEAD.match(found)
    return (match[1].decode(), int(match[2])) if match else None


class Slot:
    """A volume's name, what is known of it, and hints at the state it is in for those who choose the next call."""

    def __init__(self, name: str, kind: Kind, folder: Path) -> None:
        self.name = name
        self.kind = kind
        self.staging = folder / "stages" / name
        self.targets = tuple(folder / "pods" / name / pod for pod in ("a", "b"))
        self.io = threading.Lock()
        """Held by who reads or writes records."""
        self.staged = False
        self.published: frozenset[Path] = frozenset()
        self.sick = False
        """Could not be staged the last time: it is not deleted then, as that would hide a loss."""
        self._guard = threading.Lock()
        self._there = There.NO
        self._generation = 0
        self._flying: Counter[Op] = Counter()
        self._deletes = 0
        self._serial = 0
        self._places: dict[int, list[int | None]] = {}

    @property
    def there(self) -> There:
        return self._there

    @property
    def generation(self) -> int:
        return self._generation

    @property
    def remote(self) -> RemoteVolume:
        """As a client names it."""
        return RemoteVolume(self.name, self.kind.size, {"encrypted": str(self.kind.encrypted).lower()})

    def begin(self, op: Op) -> Ticket | None:
        """Whether the call may be made now; it is then under way until `end`."""
        with self._guard:
            if op is Op.CREATE and not self._may_create():
                return None
            if op is Op.DELETE:
                if self._flying[Op.CREATE] or self.sick:
                    return None
                self._deletes += 1
            self._flying[op] += 1
            sure = self._there is There.YES and not self._flying[Op.DELETE]
            return Ticket(op, self._generation, sure, self._deletes)

    def end(self, ticket: Ticket, code: str) -> bool:
        """Take in the answer; False when it says that a volume is not there which must be."""
        with self._guard:
            self._flying[ticket.op] -= 1
            match ticket.op:
                case Op.CREATE if code == Code.OK:
                    self._there = There.YES
                case Op.DELETE if code == Code.OK:
                    self._there = There.NO
                case Op.DELETE if code not in UNDONE and self._there is not There.NO:
                    self._there = There.DOOMED
                case Op.STAGE | Op.GROW if code == Code.NOT_FOUND:
                    return not (ticket.sure and ticket.deletes == self._deletes)
            if (ticket.generation, ticket.deletes) == (self._generation, self._deletes):
                self._hint(ticket.op, code)
            return True

    def _may_create(self) -> bool:
        """A new generation begins only when nothing that was asked of the old one can still happen."""
        if self._flying[Op.DELETE] or self._there is There.DOOMED:
            return False
        if self._there is There.NO:
            if self._flying.total() or not self.io.acquire(blocking=False):
                return False
            self._generation += 1
            self._places.clear()
            self._there = There.MAYBE
            self.staged, self.published = False, frozenset()
            self.io.release()
        return True

    def _hint(self, op: Op, code: str) -> None:
        match op:
            case Op.STAGE:
                self.staged = self.staged or code == Code.OK
                self.sick = code == Code.FAILED_PRECONDITION and bool(self._places)
            case Op.UNSTAGE if code == Code.OK:
                self.staged, self.published = False, frozenset()

    def shows(self, target: Path, *, shown: bool) -> None:
        """Note that the volume was published at a path, or is no longer."""
        with self._guard:
            self.published = self.published | {target} if shown else self.published - {target}

    def next(self, place: int) -> bytes:
        """A new record for a place; it may be there from now on. For the holder of `io`, as all that follows."""
        self._serial += 1
        self._places.setdefault(place, [None]).append(self._serial)
        return content(self.name, self._generation, self._serial)

    def acknowledge(self, place: int) -> None:
        """The newest record of a place was fsynced: it alone may be there."""
        del self._places[place][:-1]

    def acknowledged(self, place: int) -> bool:
        """Whether a record must be at that place."""
        return self._places.get(place, [None])[0] is not None

    def judge(self, place: int, found: bytes | None) -> tuple[str, str] | None:
        """What is wrong with what was found at a place, as a kind of finding and words; None when nothing is."""
        where = f"volume {self.name} (generation {self._generation}), place {place}"
        owner = whose(found) if found else None
        if owner is not None and owner != (self.name, self._generation):
            return "foreign", f"{where}: holds a record of volume {owner[0]} (generation {owner[1]})"
        serials = self._places.get(place, [None])
        for serial in serials:
            if serial is not None and found == content(self.name, self._generation, serial):
                return None
        if serials[0] is None and owner is None:
            return None
        what = "nothing" if found is None else "a record that was never acknowledged" if owner else f"{found[:16]!r}…"
        return "lost", f"{where}: the acknowledged record {serials[0]} is gone, found {what}"


@dataclass
class Ledger:
    """Counts and findings of all threads; each finding is told on standard error as it comes."""

    kinds = ("lost", "foreign", "leaked", "stuck", "odd")

    counts: Counter[str] = field(default_factory=Counter)
    findings: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in Ledger.kinds})
    _guard: threading.Condition = field(default_factory=threading.Condition)
    _started: float = field(default_factory=time.monotonic)

    @property
    def calls(self) -> int:
        return self.counts["calls"]

    def count(self, what: str) -> None:
        with self._guard:
            self.counts[what] += 1
            self._guard.notify_all()

    def tell(self, kind: str, words: str) -> None:
        """Add a finding."""
        with self._guard:
            self.findings[kind].append(words)
            number = self.calls
        print(f"{kind}, {time.monotonic() - self._started:.1f} s, call {number}: {words}", file=sys.stderr, flush=True)

    def wait_for_calls(self, number: int, seconds: float) -> bool:
        """Whether so many calls were answered, after at most that time."""
        with self._guard:
            return self._guard.wait_for(lambda: self.calls >= number, seconds)

    @property
    def summary(self) -> str:
        """The counts in one line."""
        counted = " ".join(f"{what}={self.counts[what]}" for what in ("calls", "kills", "stops", "records"))
        return f"{counted} " + " ".join(f"{kind}={len(found)}" for kind, found in self.findings.items())

    def dump(self) -> bytes:
        """Counts and findings, for `add`."""
        return msgspec.json.encode((self.counts, self.findings))

    def add(self, dumped: bytes) -> None:
        """Take in those of another ledger."""
        counts, findings = msgspec.json.decode(dumped, type=tuple[dict[str, int], dict[str, list[str]]])
        self.counts.update(counts)
        for kind, found in findings.items():
            self.findings[kind] += found

    @property
    def clean(self) -> bool:
        return not any(self.findings.values())
