"""What is known of each volume of a pool, in objects beside the images, changed by compare-and-swap.

luks-csi.volumes                   the index: in its map, for each volume, which life of its name counts
luks-csi.log.<id>.<life>.<number>  a volume's log: one line of JSON for each change that somebody wanted
luks-csi.header.<id>.<life>        a copy of its LUKS2 header, gzip

RADOS appends to an object wholly or not at all, in one order for all. So a change is a line that says from how many
changes it was made, and counts if it is the first one to say so: whoever reads the log sees the same winner, there is
no lock that a killed writer could keep, and a line that comes late, however late, counts for nothing.

A log that has grown long is closed by a line, and goes on in the one of the next number. Log 0 stays, shortened, and
names the later ones in its map, of which the highest counts: so a name that comes late counts for nothing either, nor
does the first line of a log, if a higher one is named by then.
"""

import gzip
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from csi_driver.backends.rbdpool import CephPool
from csi_driver.model.errors import Aborted, FailedPrecondition
from csi_driver.model.reading import decode

VERSION: Final = 1
"""Of a log's lines."""

INDEX: Final = "luks-csi.volumes"

_LONGEST_LOG: Final = 64  # changes: some 64 KiB, which every look reads
_TRIES: Final = 5


class Attachment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A node that has the volume. `client` is the address from which it may write, as of the boot `boot`.

    It has it `by_itself` where nobody gave it the volume and nobody else had it: commands of administrators.
    """

    many_nodes: bool = False
    by_itself: bool = False
    client: str | None = None
    boot: str | None = None


class VolumeState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that is known of a volume. Without `record` it is being made, by who said `claim` last, or `removing`.

    `image_id`, `pool_number` and `cluster` (fsid) are its image's, by which it is known; `record` is what `RecordCodec`
    wrote. `nodes` have it. `erase` bytes from its start on are overwritten before it goes. An image that was `adopted`
    is that of the volume which Ceph-CSI called so.
    """

    image_id: str | None = None
    pool_number: int | None = None
    cluster: str | None = None
    record: str | None = None
    nodes: dict[str, Attachment] = {}
    removing: bool = False
    erase: int = 0
    claim: str | None = None
    adopted: str | None = None


class _Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    version: int
    base: int
    by: str
    state: VolumeState
    closes: bool = False


@dataclass(frozen=True)
class _Name:
    """Which log of which life of a volume's name."""

    volume_id: str
    life: str
    number: int = 0

    @property
    def log(self) -> str:
        return f"luks-csi.log.{self.volume_id}.{self.life}.{self.number}"

    @property
    def header(self) -> str:
        return f"luks-csi.header.{self.volume_id}.{self.life}"

    def numbered(self, number: int) -> "_Name":
        return _Name(self.volume_id, self.life, number)


@dataclass(frozen=True)
class _Log:
    """A log as it was read: how many changes counted, the last of them, and who made each."""

    name: _Name
    count: int = 0
    state: VolumeState | None = None
    winners: tuple[str, ...] = ()
    is_closed: bool = False


Change = Callable[[VolumeState | None], VolumeState]
"""The state to come, from the one that is, None where nothing is known; what it raises ends the change."""


class VolumeLogs:
    """The states of volumes; safe for many threads and many processes on many nodes."""

    def __init__(self) -> None:
        self._names: dict[str, _Name] = {}  # of the log that counted when it was last looked for

    def ids(self, pool: CephPool) -> list[str]:
        """All volumes that anything is known of, sorted."""
        return list(pool.keys(INDEX))

    def is_named(self, pool: CephPool, volume_id: str) -> bool:
        """Whether the index has the volume, whatever its log says."""
        return pool.value(INDEX, volume_id) is not None

    def state(self, pool: CephPool, volume_id: str) -> VolumeState | None:
        """What is known of the volume; None where nothing is. Raises FailedPrecondition for a log that is damaged."""
        log = self._newest(pool, volume_id)
        return log.state if log is not None else None

    def change(self, pool: CephPool, volume_id: str, change: Change) -> VolumeState:
        """Make a state of the one that is, durably, unless somebody else did so meanwhile: then it is made anew.

        Raises Aborted when others are faster again and again, and what `change` raises.
        """
        for _ in range(_TRIES):
            log = self._newest(pool, volume_id)
            wanted = change(log.state if log is not None else None)
            if log is None:
                log = self._begun(pool, volume_id)
            elif wanted == log.state:
                return wanted
            if self._added(pool, log, wanted):
                if log.count + 1 >= _LONGEST_LOG:
                    self._go_on(pool, volume_id, log.name)
                return wanted
        raise Aborted(f"volume {volume_id} is changed by others at the same time; call again")

    def confirm(self, pool: CephPool, volume_id: str) -> None:
        """Raise Aborted where what was written went into a log that does not count: somebody else makes the volume."""
        if pool.value(INDEX, volume_id) != self._names[volume_id].life:
            self.forget(pool, volume_id)
            raise Aborted(f"volume {volume_id} is being made by somebody else at the same time; call again")

    def forget(self, pool: CephPool, volume_id: str) -> None:
        """Remove all that is known of the volume, its log last but one and the index last.

        Of the life that was last read here alone: who makes a volume of that name meanwhile begins another one.
        """
        known = self._names.get(volume_id)
        life = known.life if known is not None else pool.value(INDEX, volume_id)
        if life is not None:
            first = _Name(volume_id, life)
            pool.drop(first.header)
            for number in [*self._named(pool, first), 0]:
                pool.drop(first.numbered(number).log)
            pool.drop_value(INDEX, volume_id, only=life)
        self._names.pop(volume_id, None)

    def header(self, pool: CephPool, volume_id: str) -> bytes | None:
        """The copy of its header; None where there is none."""
        name = self._life(pool, volume_id)
        packed = pool.get(name.header) if name is not None else None
        return gzip.decompress(packed) if packed else None

    def has_header(self, pool: CephPool, volume_id: str) -> bool:
        """Whether there is a copy of its header."""
        name = self._life(pool, volume_id)
        return name is not None and pool.has(name.header)

    def keep_header(self, pool: CephPool, volume_id: str, content: bytes) -> None:
        """Keep a copy of its header in place of an earlier one, in one step. Raises FailedPrecondition."""
        name = self._life(pool, volume_id)
        if name is None:
            raise FailedPrecondition(f"volume {volume_id} has no record in {pool.place}, and no place for a copy")
        pool.put(name.header, gzip.compress(content, 1))

    def _life(self, pool: CephPool, volume_id: str) -> _Name | None:
        life = pool.value(INDEX, volume_id)
        return _Name(volume_id, life) if life else None

    def _begun(self, pool: CephPool, volume_id: str) -> _Log:
        name = self._names[volume_id] = _Name(volume_id, secrets.token_hex(6))
        pool.set_value(INDEX, volume_id, name.life)
        return _Log(name)

    def _newest(self, pool: CephPool, volume_id: str) -> _Log | None:
        """The log that counts; None where the index has no such volume."""
        known = self._names.get(volume_id)
        log = self._read(pool, known) if known is not None else None
        if known is None or log is None or (log.is_closed and not known.number):
            if (first := self._life(pool, volume_id)) is None:
                return None
            known, log = first, self._read(pool, first) or _Log(first)
        for _ in range(_TRIES):
            if log is not None and self._is_highest(pool, log := self._opened(pool, log)):
                self._names[volume_id] = log.name
                return log
            known = known.numbered(max(self._named(pool, known), default=0))
            log = self._read(pool, known)
        raise Aborted(f"volume {volume_id} is changed by others at the same time; call again")

    def _opened(self, pool: CephPool, log: _Log) -> _Log:
        """The log, or the one in which it goes on, begun by whoever writes first, from the state in which it closed."""
        while log.is_closed:
            higher = log.name.numbered(log.name.number + 1)
            log = self._read(pool, higher) or _Log(higher, state=log.state)
        return log

    def _added(self, pool: CephPool, log: _Log, state: VolumeState, *, closes: bool = False) -> bool:
        """Append the change; whether it counted. Raises Aborted where nobody can tell any more."""
        mine = secrets.token_hex(8)
        line = _Line(version=VERSION, base=log.count, by=mine, state=state, closes=closes)
        pool.append(log.name.log, msgspec.json.encode(line) + b"\n")
        after = self._read(pool, log.name)
        if after is not None and (after.count <= log.count or after.winners[log.count] != mine):
            return False
        # One that was removed when the line came is there again with nothing else; a higher one was named before.
        if after is None or not self._is_highest(pool, log):
            raise Aborted(f"volume {log.name.volume_id} is changed by others at the same time; call again")
        return True

    def _go_on(self, pool: CephPool, volume_id: str, name: _Name) -> None:
        """Close a log that has grown long and go on in the next; a kill anywhere leaves what is found as ever."""
        log = self._read(pool, name)
        if log is None or log.state is None:
            return
        if not log.is_closed and not self._added(pool, log, log.state, closes=True):
            return
        following = name.numbered(name.number + 1)
        if not self._added(pool, _Log(following), log.state):
            return
        pool.set_value(name.numbered(0).log, str(following.number), "")
        self._names[volume_id] = following
        for number in self._named(pool, name):
            if number < following.number:
                pool.drop(name.numbered(number).log)
                pool.drop_value(name.numbered(0).log, str(number))
        if not name.number:
            short = _Line(version=VERSION, base=0, by="", state=log.state, closes=True)
            pool.put(name.log, msgspec.json.encode(short) + b"\n")

    def _is_highest(self, pool: CephPool, log: _Log) -> bool:
        """Whether no higher one is named. Log 0 is never removed, and counts as long as it is not closed."""
        return not log.name.number or max(self._named(pool, log.name), default=0) <= log.name.number

    @staticmethod
    def _named(pool: CephPool, name: _Name) -> list[int]:
        """The numbers of later logs that log 0 names, in order."""
        return sorted(int(key) for key in pool.keys(name.numbered(0).log))

    @staticmethod
    def _read(pool: CephPool, name: _Name) -> _Log | None:
        content = pool.get(name.log)
        if content is None:
            return None
        state, winners, is_closed = None, list[str](), False
        for written in content.splitlines():
            try:
                line = decode(written, _Line)
            except (msgspec.MsgspecError, UnicodeError) as error:
                raise FailedPrecondition(
                    f"the object {name.log} in {pool.place} cannot be read ({error}); restore it, or run the driver "
                    f"that wrote it"
                ) from None
            if line.version > VERSION:
                raise FailedPrecondition(
                    f"the object {name.log} in {pool.place} has version {line.version}, written by a newer driver than "
                    f"this one, which knows version {VERSION}; run the newer driver"
                )
            if line.base == len(winners) and not is_closed:
                state, is_closed = line.state, line.closes
                winners.append(line.by)
        return _Log(name, len(winners), state, tuple(winners), is_closed=is_closed)
