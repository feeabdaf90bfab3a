"""A file that is being received: `<path>.part`. `<path>.part.json` says how much of it is surely on the disk."""

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from csi_driver.host.files import Files, read_file
from csi_driver.images.base import MIB
from csi_driver.images.checksum import Algorithm, Checksum, hashed
from csi_driver.images.destinations import Destination
from csi_driver.images.room import EVERY, check_room, spare_bytes
from csi_driver.model.errors import CommandFailed, DriverError, InvalidArgument, ResourceExhausted, VolumeBusy
from csi_driver.model.reading import decode

_DURABLE_EVERY = 64 * MIB


class _State(msgspec.Struct, frozen=True):
    """What `<path>.part.json` holds. The URL's digest, as the URL may carry a credential."""

    source: str
    received: int
    total: int | None
    validator: str


class Part:
    """The file that is being received, open and locked, with the digest of what is in it."""

    def __init__(self, descriptor: int, path: Path, first: Destination, algorithm: Algorithm) -> None:
        self._descriptor = descriptor
        self._path = path
        self._source = hashlib.sha256(first.url.encode()).hexdigest()
        self._algorithm = algorithm
        self._files = Files()
        self._durable = 0
        self._looked = 0
        self.received = 0
        self.total: int | None = None
        self.validator = ""
        self._digest = hashlib.new(algorithm)

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, first: Destination, algorithm: Algorithm) -> Iterator["Part"]:
        """Lock the part of `path` and take up what is durable in it; keep or remove it at the end, as `fetch` says."""
        descriptor = _open_locked(_part_of(path))
        try:
            part = cls(descriptor, path, first, algorithm)
            with part._told_of_the_disk():
                part._take_up()
            try:
                yield part
            except (InvalidArgument, ResourceExhausted):
                part._remove()
                raise
            except BaseException:
                with contextlib.suppress(DriverError):
                    part.make_durable()
                if not part.resumable:
                    part._remove()
                raise
        finally:
            os.close(descriptor)

    @property
    def resumable(self) -> bool:
        """Something is here, and the server can be asked whether it still is of the same file."""
        return bool(self.received and self.validator)

    def range_headers(self) -> dict[str, str]:
        """What asks for the rest, if that can be asked for."""
        return {"Range": f"bytes={self.received}-", "If-Range": self.validator} if self.resumable else {}

    def restart(self, total: int | None, validator: str) -> None:
        """Forget what is here. The file becomes `total` bytes of what `validator` proves the same."""
        self.total, self.validator = total, validator
        self.received = self._durable = self._looked = 0
        self._digest = hashlib.new(self._algorithm)
        with self._told_of_the_disk():
            self._files.remove(_state_of(self._path))  # before the bytes it speaks of
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)

    def add(self, piece: bytes) -> None:
        """Append what came."""
        with self._told_of_the_disk():
            if self.received >= self._looked:  # of known length too: others write beside it
                check_room(self._descriptor, f"for the download to {self._path}")
                self._looked = self.received + EVERY
            view = memoryview(piece)
            while view:
                view = view[os.write(self._descriptor, view) :]
        self._digest.update(piece)
        self.received += len(piece)
        if self.received - self._durable >= _DURABLE_EVERY:
            self.make_durable()

    def make_durable(self) -> None:
        """What is here outlives a power cut from now on, and a later call takes it up."""
        if not self.resumable or self.received == self._durable:
            return
        state = _State(self._source, self.received, self.total, self.validator)
        with self._told_of_the_disk():
            os.fdatasync(self._descriptor)
            self._files.write(_state_of(self._path), msgspec.json.encode(state))
        self._durable = self.received

    def checksum(self) -> Checksum:
        """The digest of all that is here."""
        return Checksum(self._algorithm, self._digest.hexdigest())

    def spare_bytes(self) -> int:
        """What may be taken of the file system."""
        return max(0, spare_bytes(self._descriptor))

    def finish(self) -> None:
        """Let the file be seen under its name."""
        with self._told_of_the_disk():
            os.fsync(self._descriptor)
            self._files.rename(_part_of(self._path), self._path)
            self._files.remove(_state_of(self._path))

    def _take_up(self) -> None:
        try:
            state = decode(read_file(_state_of(self._path)), _State)
        except (FileNotFoundError, msgspec.DecodeError, UnicodeError):
            return self.restart(None, "")
        if state.source != self._source or not 0 < state.received <= os.fstat(self._descriptor).st_size:
            return self.restart(None, "")
        os.ftruncate(self._descriptor, state.received)
        for _ in hashed(self._descriptor, self._digest, state.received):
            pass
        os.lseek(self._descriptor, state.received, os.SEEK_SET)
        self.received = self._durable = state.received
        self.total, self.validator = state.total, state.validator
        return None

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self._files.remove(_state_of(self._path))
            self._files.remove(_part_of(self._path))

    @contextlib.contextmanager
    def _told_of_the_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhausted(
                    f"no space is left for the download to {self._path} after {self.received} bytes; make room"
                ) from error
            raise CommandFailed(f"the download to {self._path} could not be written: {error.strerror}") from error


def _part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _state_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part.json")


def _open_locked(path: Path) -> int:
    """The part file, locked against another download; made if it is not there."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise CommandFailed(f"the download to {path} could not be begun: {error.strerror}") from error
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise VolumeBusy(f"another download to {path} is at work; call again when it has ended") from None
            # It may have been finished or removed between open and flock: then the name means another file by now.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(path), os.fstat(descriptor)):
                    undo.pop_all()
                    return descriptor
