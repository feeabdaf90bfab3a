"""What was acknowledged before a crash: facts, each written outside the crashed disk once it was durable on it.

A fact of something begun (`creating`) is written before the call, so that whatever a crash cuts is known too. One that
is done (`created`) is written after the call has returned: from then on it has to survive.
"""

import os
import random
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import msgspec

SLOT = 64 << 10  # bytes from the start of one record to the start of the next


class Kind(StrEnum):
    """What a volume is used as."""

    EXT4 = "ext4"
    XFS = "xfs"
    BLOCK = "block"
    KMS_EXT4 = "kms-ext4"
    KMS_BLOCK = "kms-block"
    PLAIN_EXT4 = "plain-ext4"
    PLAIN_BLOCK = "plain-block"

    @property
    def encrypted(self) -> bool:
        return not self.startswith("plain-")

    @property
    def kms(self) -> bool:
        return self.startswith("kms-")

    @property
    def block(self) -> bool:
        return self.endswith("block")

    @property
    def fs_type(self) -> str | None:
        return None if self.block else self.removeprefix("plain-").removeprefix("kms-")


class Step(StrEnum):
    """What can be begun or done with a volume; READY and FAILED are the workload's own."""

    READY = "ready"
    FAILED = "failed"
    CREATING = "creating"
    CREATED = "created"
    FORMATTING = "formatting"
    STAGING = "staging"
    STAGED = "staged"
    WRITTEN = "written"
    EXPANDING = "expanding"
    EXPANDED = "expanded"
    MOVING = "moving"
    UNSTAGED = "unstaged"
    DELETING = "deleting"
    DELETED = "deleted"


class Identity(msgspec.Struct, frozen=True):
    """What changes when a volume is formatted again, as found on its device: LUKS UUID, digest of the volume key, UUID
    of the file system; None where there is none.
    """

    luks_uuid: str | None
    key_digest: str | None
    fs_uuid: str | None

    def agrees(self, other: "Identity") -> bool:
        """Whether both can be of one volume: only one that was mounted knows its file system, and one that was moved to
        another volume key no digest.
        """
        pairs = (self.key_digest, other.key_digest), (self.fs_uuid, other.fs_uuid)
        return self.luks_uuid == other.luks_uuid and all(None in pair or pair[0] == pair[1] for pair in pairs)


class Record(msgspec.Struct, frozen=True):
    """`size` bytes at `offset` of a file, or of the device where `file` is empty."""

    number: int
    file: str
    offset: int
    size: int

    def content(self, volume: str) -> bytes:
        """What it holds: bytes that are nowhere else."""
        return random.Random(f"{volume}/{self.number}").randbytes(self.size)


class Fact(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step of one volume. `capacity` is in bytes as asked for or granted; `usable` is what its users find: the size
    of the device or of the file system.
    """

    step: Step
    volume: str = ""
    kind: Kind = Kind.EXT4
    capacity: int = 0
    usable: int = 0
    identity: Identity | None = None
    record: Record | None = None
    error: str = ""


@dataclass
class Expected:
    """What must be found of a volume, and what may be."""

    id: str
    kind: Kind
    asked: int = 0
    capacity: int = 0
    usable: int = 0
    created: bool = False
    staged: bool = False
    deleting: bool = False
    deleted: bool = False
    moved: bool = False
    identity: Identity | None = None
    records: list[Record] = field(default_factory=list)
    identities: set[Identity] = field(default_factory=set)

    def learn(self, fact: Fact) -> None:
        """Take in what was begun or done."""
        self.asked = max(self.asked, fact.capacity)
        match fact.step:
            case Step.CREATED | Step.EXPANDED:
                self.created = True
                self.capacity = max(self.capacity, fact.capacity)
            case Step.FORMATTING:
                self.staged = True
            case Step.STAGED if fact.identity is not None:
                self._know(fact.identity)
            case Step.MOVING:
                self.moved = True
                known, self.identities, self.identity = self.identities, set(), None
                for identity in known:
                    self._know(identity)
            case Step.WRITTEN if fact.record is not None:
                self.records.append(fact.record)
            case Step.DELETING:
                self.deleting = True
            case Step.DELETED:
                self.deleted = True
            case _:
                pass
        self.usable = max(self.usable, fact.usable)

    def _know(self, identity: Identity) -> None:
        """Of a volume that was moved to another volume key, perhaps to its end, the digest tells nothing any more."""
        identity = msgspec.structs.replace(identity, key_digest=None) if self.moved else identity
        self.identities.add(identity)
        self.identity = self.identity or identity


def expected(facts: Iterable[Fact]) -> dict[str, Expected]:
    """The volumes that the facts tell of, in the order of their creation."""
    volumes: dict[str, Expected] = {}
    for fact in facts:
        if fact.volume:
            volumes.setdefault(fact.volume, Expected(fact.volume, fact.kind)).learn(fact)
    return volumes


class Facts:
    """Appends to a file, a line each, from several threads."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._guard = threading.Lock()

    def add(self, fact: Fact) -> None:
        with self._guard:
            os.write(self._descriptor, msgspec.json.encode(fact) + b"\n")


class Follower:
    """Reads a growing file of facts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def news(self) -> Sequence[Fact]:
        """The facts since the last call. One whose line is not whole was never acknowledged."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        self._offset += len(whole) + 1 if whole else 0
        return [msgspec.json.decode(line, type=Fact) for line in whole.splitlines()]
