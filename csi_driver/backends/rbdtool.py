"""Ceph's own programs `rbd`, `rados` and `ceph`, for one pool: images, objects beside them, the cluster's blocklist.

Programs and not python3-rbd: what hangs on a cluster is then a process with a time limit and no thread of ours, which
librbd would start in the server too; and the binding is not on PyPI. No configuration file of the host is read, and no
file written: monitors are an argument, the key is a memfd, which the program gets as a descriptor.
"""

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from csi_driver.backends.rbderrors import KEY, USER, CephMissing, told
from csi_driver.backends.rbdplace import Cluster, Place
from csi_driver.host.commands import Commands, ProgramFailed
from csi_driver.host.handle import Handle
from csi_driver.model.errors import (
    CommandFailed,
    DeadlineExceeded,
    FailedPrecondition,
)
from csi_driver.model.reading import decode

T = TypeVar("T")


_ONE_OPERATION: Final = str(64 << 20)  # bytes: what is put or appended is one operation of the cluster, all or nothing
_BLOCKED_SECONDS: Final = str(5 * 365 * 24 * 3600)  # as CSI-Addons' network fence: a frozen node may wake up any time
_KEY_HEAD: Final = 12  # CryptoKey of src/auth/Crypto.cc: type, seconds, nanoseconds, length
_DIFF_PIECE: Final = 4 << 20


@dataclass(frozen=True)
class Credentials:
    """A user of a cluster and its key, which repr and comparison leave out."""

    user: str
    key: str = field(repr=False, compare=False)

    @property
    def is_key(self) -> bool:
        """Whether it has the form of a key of Ceph: a type, a time, and a secret behind its length, in base64."""
        try:
            raw = base64.b64decode(self.key, validate=True)
        except ValueError:
            return False
        return len(raw) > _KEY_HEAD and len(raw) == _KEY_HEAD + int.from_bytes(raw[10:12], "little")


class Image(msgspec.Struct, frozen=True):
    """An image as `rbd info` shows it; `id` tells it from every other one of its pool that had its name."""

    id: str
    size: int
    data_pool: str | None = None


class Watcher(msgspec.Struct, frozen=True):
    """Who has an image open for writing: the address of its client."""

    address: str


class _Status(msgspec.Struct, frozen=True):
    watchers: list[Watcher]


class _Lock(msgspec.Struct, frozen=True):
    id: str
    locker: str
    address: str


class _Used(msgspec.Struct, frozen=True):
    used: int = msgspec.field(name="used_size")


class _Usage(msgspec.Struct, frozen=True):
    images: list[_Used]


class _PoolStats(msgspec.Struct, frozen=True):
    used: int = msgspec.field(name="bytes_used", default=0)
    available: int = msgspec.field(name="max_avail", default=0)


class PoolRoom(msgspec.Struct, frozen=True):
    """A pool as `ceph df` shows it; `number` is not that of one of the same name that is made later."""

    name: str
    number: int = msgspec.field(name="id")
    stats: _PoolStats = _PoolStats()

    @property
    def used(self) -> int:
        """Bytes that are used."""
        return self.stats.used

    @property
    def available(self) -> int:
        """Bytes that can still be written."""
        return self.stats.available


class _Rooms(msgspec.Struct, frozen=True):
    pools: list[PoolRoom] = []


class CephPrograms:
    """Runs one program of Ceph at a time, each for at most `seconds`."""

    def __init__(self, commands: Commands, seconds: float) -> None:
        self._commands = commands
        self.seconds = seconds

    def run(
        self,
        cluster: Cluster,
        credentials: Credentials,
        program: str,
        *words: str | Handle,
        seconds: float | None = None,
    ) -> str:
        """All that it says on standard output.

        Raises CephMissing, CephExists, DeviceInUse, ResourceExhausted, FailedPrecondition (the cluster refuses us),
        DeadlineExceeded, CommandFailed.
        """
        limit = self.seconds if seconds is None else seconds
        monitors = ",".join(cluster.monitors)
        with (
            memory_file(credentials.key.encode(), f"the key of client.{credentials.user}") as key,
            memory_file(b"", f"the answer of {program}") as answer,
        ):
            access = ("-c", "/dev/null", "-m", monitors, "--id", credentials.user, "--keyfile", key)
            try:
                self._commands.run_into(answer, [program, *access, *words], timeout=limit)
            except DeadlineExceeded as error:
                raise DeadlineExceeded(
                    f"the Ceph cluster {cluster.id} ({monitors}) did not answer {_shown(program, words)} within "
                    f"{limit:g} s ({'it cannot be killed' if 'cannot be killed' in str(error) else 'it was killed'}); "
                    f"look at 'ceph status' and at the network between this node and its monitors and OSDs"
                ) from None
            except ProgramFailed as failed:
                # Both: on standard error a client may have logged what did not matter, and said the error on the other.
                said = f"{content_of(answer).decode(errors='replace')}\n{failed.stderr}"
                said = said.replace(credentials.key, "…")  # Ceph quotes a key that it cannot decode
                raise told(cluster, credentials.user, _shown(program, words), failed.code, said) from None
            return content_of(answer).decode(errors="replace")


def memory_file(content: bytes, name: str) -> Handle:
    """A file in memory alone with that content, which is what people are told instead of its path."""
    descriptor = os.memfd_create("luks-csi", os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    return Handle(descriptor, name)


def content_of(file: Handle) -> bytes:
    """All of a file in memory."""
    return os.pread(file.fd, os.fstat(file.fd).st_size, 0)


def _shown(program: str, words: Sequence[str | Handle]) -> str:
    return " ".join([program, *(str(word) for word in words)])[:200]


class CephPool:
    """One place as one user: a pool, in it a namespace perhaps. Errors as `CephPrograms.run`."""

    def __init__(self, programs: CephPrograms, place: Place, credentials: Credentials) -> None:
        self.place = place
        self._programs = programs
        self._credentials = credentials

    # --- objects

    def get(self, name: str) -> bytes | None:
        """All of an object; None where it is absent."""
        with memory_file(b"", f"the object {name}") as into:
            try:
                self._rados("get", name, into)
            except CephMissing:
                return None
            return content_of(into)

    def append(self, name: str, content: bytes) -> None:
        """Lengthen an object, or make it, in one step that is done or is not."""
        with memory_file(content, f"an entry of {name}") as source:
            self._rados("append", name, source)

    def put(self, name: str, content: bytes) -> None:
        """Replace an object's content, in one step."""
        with memory_file(content, f"the content of {name}") as source:
            self._rados("put", name, source)

    def drop(self, name: str) -> None:
        """Remove an object; absent is fine."""
        try:
            self._rados("rm", name)
        except CephMissing:
            return

    def has(self, name: str) -> bool:
        """Whether an object is there."""
        try:
            self._rados("stat", name)
        except CephMissing:
            return False
        return True

    def keys(self, name: str) -> Sequence[str]:
        """The keys of an object's map, sorted."""
        try:
            return sorted(self._rados("listomapkeys", name).split())
        except CephMissing:
            return []

    def value(self, name: str, key: str) -> str | None:
        """A value of an object's map; None where there is none."""
        with memory_file(b"", f"the key {key} of {name}") as into:
            try:
                self._rados("getomapval", name, key, into)
            except CephMissing:
                return None
            return content_of(into).decode()

    def set_value(self, name: str, key: str, value: str) -> None:
        """Set a value of an object's map, which is made if it is absent."""
        self._rados("setomapval", name, key, value)

    def drop_value(self, name: str, key: str) -> None:
        """Remove a value of an object's map; absent is fine."""
        try:
            self._rados("rmomapkey", name, key)
        except CephMissing:
            return

    # --- images

    def info(self, image: str) -> Image | None:
        """The image of that name, whoever made it."""
        try:
            return self._json(Image, "rbd", "info", "--format", "json", self._spec(image))
        except CephMissing:
            return None

    def make(self, image: str, size: int, features: Sequence[str], data_pool: str | None) -> None:
        """Make a blank image of `size` bytes. Raises CephExists."""
        where = ("--data-pool", data_pool) if data_pool else ()
        shape = ("--size", f"{size}B", "--image-format", "2", "--image-feature", ",".join(features))
        self._rbd("create", *shape, *where, self._spec(image))

    def resize(self, image: str, size: int) -> None:
        """Give it `size` bytes; where it is mapped that is seen when this returns."""
        self._rbd("resize", "--no-progress", "--size", f"{size}B", self._spec(image))

    def remove(self, image: str, seconds: float) -> None:
        """Remove it, and what is left of one that was half made or half removed; absent is fine.

        Raises DeviceInUse while anybody has it open.
        """
        try:
            self._rbd("rm", "--no-progress", self._spec(image), seconds=seconds)
        except CephMissing:
            return

    def watchers(self, image: str) -> Sequence[str]:
        """The addresses of those who have it open for writing."""
        found = self._json(_Status, "rbd", "status", "--format", "json", self._spec(image))
        return [each.address for each in found.watchers]

    def is_unwritten(self, image: str, seconds: float) -> bool:
        """Whether nothing was ever written to it that is still there."""
        said = self._rbd("du", "--format", "json", self._spec(image), seconds=seconds)
        return all(each.used == 0 for each in _decoded(_Usage, said, "rbd du").images)

    def describe(self, image: str, key: str, value: str) -> None:
        """Set one key of its metadata, which `rbd image-meta list` shows."""
        self._rbd("image-meta", "set", self._spec(image), key, value)

    def metadata(self, image: str) -> Mapping[str, str]:
        """All of its metadata."""
        said = self._rbd("image-meta", "list", "--format", "json", self._spec(image)).strip()
        return _decoded(dict[str, str], said, "rbd image-meta") if said else {}

    def rename(self, image: str, name: str) -> None:
        """Give it another name, in one step; who has it open goes on. Raises CephMissing, CephExists."""
        self._rbd("rename", self._spec(image), self._spec(name))

    def overwrite(self, image: str, length: int, seconds: float) -> None:
        """Random bytes over its first `length` bytes, without mapping it (rbd(8), import-diff)."""
        size = self._json(Image, "rbd", "info", "--format", "json", self._spec(image)).size
        parts = [b"rbd diff v1\n", b"s", size.to_bytes(8, "little")]  # doc/dev/rbd-diff.rst
        for at in range(0, min(length, size), _DIFF_PIECE):
            piece = min(_DIFF_PIECE, min(length, size) - at)
            parts += [b"w", at.to_bytes(8, "little"), piece.to_bytes(8, "little"), os.urandom(piece)]
        with memory_file(b"".join([*parts, b"e"]), "random bytes") as source:
            self._rbd("import-diff", "--no-progress", source, self._spec(image), seconds=seconds)

    def map(self, image: str, options: Sequence[str]) -> str:
        """Show it as a block device of this node, by a client of its own; returns the device's path.

        `noudev`: rbd would wait for udev, which it cannot hear in a container, for good.
        """
        return self._rbd("map", "-o", ",".join(("noudev", "noshare", *options)), self._spec(image)).strip()

    # --- the cluster

    def cluster_uuid(self) -> str:
        """The cluster's fsid."""
        return self._run("ceph", "fsid").strip()

    def rooms(self) -> Sequence[PoolRoom]:
        """Every pool of the cluster, with what room it has. Raises FailedPrecondition where nobody counts that."""
        found = self._json(_Rooms, "ceph", "df", "--format", "json").pools
        if not found:
            raise FailedPrecondition(
                f"the Ceph cluster {self.place.cluster.id} does not tell how full its pools are: its manager "
                f"(ceph-mgr), which counts that, does not run; start it"
            )
        return found

    def room_of(self, rooms: Sequence[PoolRoom], name: str) -> PoolRoom:
        """The one of that name. Raises CephMissing."""
        for room in rooms:
            if room.name == name:
                return room
        raise CephMissing(f"the Ceph cluster {self.place.cluster.id} has no pool {name}; make it, or correct the class")

    def fence(self, image: str, address: str) -> None:
        """Let nobody of that address write any more, durably, and let go of the image's lock if he has it."""
        self._run("ceph", "osd", "blocklist", "add", address, _BLOCKED_SECONDS)
        spec = self._spec(image)
        try:
            locks = self._json(list[_Lock], "rbd", "lock", "ls", "--format", "json", spec)
        except CephMissing:
            return
        for lock in locks:
            if lock.address == address:
                try:
                    self._rbd("lock", "rm", spec, lock.id, lock.locker)
                except CephMissing:
                    continue

    def _spec(self, image: str) -> str:
        return f"{self.place.spec}/{image}"

    def _rados(self, command: str, *words: str | Handle) -> str:
        namespace = self.place.cluster.namespace
        where = ("-p", self.place.pool, *(("--namespace", namespace) if namespace else ()))
        block = ("-b", _ONE_OPERATION) if command in ("put", "append") else ()
        return self._run("rados", *where, *block, command, *words)

    def _rbd(self, *words: str | Handle, seconds: float | None = None) -> str:
        return self._run("rbd", *words, seconds=seconds)

    def _json(self, kind: type[T], program: str, *words: str) -> T:
        return _decoded(kind, self._run(program, *words), f"{program} {words[0]}")

    def _run(self, program: str, *words: str | Handle, seconds: float | None = None) -> str:
        return self._programs.run(self.place.cluster, self._credentials, program, *words, seconds=seconds)


def pools_of(programs: CephPrograms, cluster: Cluster, credentials: Credentials) -> Sequence[str]:
    """The names of a cluster's pools."""
    return programs.run(cluster, credentials, "rados", "lspools").split()


def read_credentials(folder: Path) -> Credentials | None:
    """A Secret that kubelet has mounted; None where it has not both entries. Raises OSError but for absent files."""
    try:
        user, key = ((folder / name).read_text().strip() for name in (USER, KEY))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Credentials(user, key) if user and key else None


def _decoded(kind: type[T], said: str, what: str) -> T:
    try:
        return decode(said, kind)
    except msgspec.MsgspecError as error:
        raise CommandFailed(f"{what} gave an answer that cannot be read ({error})") from None
