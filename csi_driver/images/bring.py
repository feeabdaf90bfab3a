"""How an image comes in: from a file, a URL or a pipe, unpacked where it is packed, and told what it is."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from csi_driver.host.files import Files
from csi_driver.images.base import MIB, ImageFormat, Progress
from csi_driver.images.checkpoint import Job, Operation, SourceIdentity
from csi_driver.images.checksum import Algorithm, Checksum, checksum_of
from csi_driver.images.clone import run_pass
from csi_driver.images.destinations import Connector
from csi_driver.images.fetch import fetch
from csi_driver.images.formats import HEAD_BYTES, Inspected, detect_wrapping, inspect
from csi_driver.images.requests import Import
from csi_driver.images.room import EVERY, check_room
from csi_driver.images.source import RawReader, open_regular
from csi_driver.images.target import PassResult, Target
from csi_driver.images.unwrap import Warn, unwrap
from csi_driver.model.errors import CommandFailed, FailedPrecondition, InvalidArgument, ResourceExhausted

_URL: Final = ("http://", "https://")


class Meter(Protocol):
    """Shows how far each part of the work is."""

    def __call__(self, what: str, total: int | None) -> contextlib.AbstractContextManager[Progress]:
        """For the length of the block `what` is under way, of `total` bytes if that is known."""


def is_url(source: str) -> bool:
    """Whether a source is an address to download from."""
    return source.lower().startswith(_URL)


def check_secret_fits(found: Inspected, wanted: Import, where: str) -> None:
    """Raise InvalidArgument where a secret is named for what is not encrypted."""
    if found.luks is None and wanted.secret is not None:
        raise InvalidArgument(f"{where} is not encrypted, but a secret was named for it; leave that out")


class Bringer:
    """Brings images in; files are copied by `run`. What is worth telling of one that is taken goes to `warn`."""

    def __init__(
        self, files: Files, connector: Connector, warn: Warn, run: Callable[..., PassResult] = run_pass
    ) -> None:
        self._files = files
        self._connector = connector
        self._warn = warn
        self._run = run

    def bring(self, wanted: Import, folder: Path, meter: Meter, where: str) -> tuple[Path, Inspected]:
        """The file of the image, in `folder` and durable, and what it is. `where` names the image in errors.

        Raises what `fetch`, `unwrap`, `inspect` and `run_pass` raise.
        """
        if wanted.stream is not None:
            made = self._piped(wanted, wanted.stream, folder, meter, where)
        elif is_url(wanted.source):
            made = self._downloaded(wanted, folder, meter, where)
        else:
            made = self._copied(wanted, folder, meter, where)
        descriptor = open_regular(str(made), where)
        try:
            found = inspect(descriptor, where, wanted.most_bytes)
            longer = os.fstat(descriptor).st_size > found.length
        finally:
            os.close(descriptor)
        if longer:
            _cut(made, found.length, where)
        if found.warning:
            self._warn(found.warning)
        return made, found

    def _downloaded(self, wanted: Import, folder: Path, meter: Meter, where: str) -> Path:
        # A whole one stays for a repetition of this very call, not for one with another URL or checksum.
        asked = f"{wanted.source} {wanted.checksum}"
        path = folder / f"download-{hashlib.sha256(asked.encode()).hexdigest()[:16]}"
        if not path.exists():
            with _Total(meter, "downloading") as progress:
                fetch(
                    wanted.source, path, wanted.most_bytes, self._connector, expected=wanted.checksum,
                    headers=wanted.headers, progress=progress, warn=self._warn,
                )  # fmt: skip
        return self._unwrapped(path, folder, wanted, meter, where)

    def _piped(self, wanted: Import, stream: BinaryIO, folder: Path, meter: Meter, where: str) -> Path:
        """What comes through a pipe: it comes once, so nothing of it is kept for a repetition."""
        path = folder / "piped"
        try:
            with meter("reading", None) as progress, _reading("standard input", where):
                found = _drain(stream, path, wanted, where, progress)
            if wanted.checksum:
                wanted.checksum.require(found, "standard input")
            return self._unwrapped(path, folder, wanted, meter, where)
        except BaseException:
            self._files.remove(path)
            raise

    def _copied(self, wanted: Import, folder: Path, meter: Meter, where: str) -> Path:
        source = Path(wanted.source)
        SourceIdentity.of(source, where)  # says so if it is not there
        descriptor = open_regular(wanted.source, where)
        try:
            with _reading(wanted.source, where):
                os.fsync(descriptor)
            before = SourceIdentity.of(source, where)
            if wanted.checksum:
                with meter("checking", before.size) as progress, _reading(wanted.source, where):
                    found = checksum_of(descriptor, wanted.checksum.algorithm, progress)
                wanted.checksum.require(found, where if wanted.take else wanted.source)
            with _reading(wanted.source, where):
                packed = detect_wrapping(os.pread(descriptor, HEAD_BYTES, 0))
            is_whole = False
            if packed is None:
                # Refused before it is copied; the copy decides.
                inspected = inspect(descriptor, where, wanted.most_bytes)
                check_secret_fits(inspected, wanted, where)
                is_whole = inspected.length == before.size
        finally:
            os.close(descriptor)
        if packed:
            made = self._unwrapped(source, folder, wanted, meter, where)
            if SourceIdentity.of(source, where) != before:
                if made != source:  # what is no longer packed is the user's own file
                    self._files.remove(made)
                raise FailedPrecondition(f"{source} was changed while it was read; import it again")
            return made
        if wanted.take and is_whole:  # a second name of what is to be cut would cut the source
            made = folder / "taken"
            with _reading(wanted.source, where):
                self._files.link(source, made)
            return made
        job = Job(Operation.IGNORE, source, before, ImageFormat.RAW, where)
        with contextlib.closing(RawReader(wanted.source, where)) as reader, meter("copying", reader.size) as progress:
            return self._run(reader, Target(folder), job, progress).part

    def _unwrapped(self, path: Path, folder: Path, wanted: Import, meter: Meter, where: str) -> Path:
        descriptor = open_regular(str(path), where)
        try:
            with _reading(str(path), where):
                wrapping = detect_wrapping(os.pread(descriptor, HEAD_BYTES, 0))
            if wrapping is None:
                return path
            made = folder / "unpacked"
            with meter("unpacking", os.fstat(descriptor).st_size) as progress:
                unwrap(descriptor, wrapping, made, wanted.most_bytes, where, progress, self._warn)
            return made
        finally:
            os.close(descriptor)


def _drain(stream: BinaryIO, path: Path, wanted: Import, where: str, progress: Progress) -> Checksum:
    """Write all that comes to a new file, durable; returns its checksum."""
    algorithm = wanted.checksum.algorithm if wanted.checksum else Algorithm.SHA512
    digest, size, looked = hashlib.new(algorithm), 0, 0
    with path.open("wb", buffering=0) as file:
        while piece := stream.read(MIB):
            size += len(piece)
            if size > wanted.most_bytes:
                raise InvalidArgument(
                    f"{where} is refused: more than the {wanted.most_bytes} bytes that are allowed came by standard "
                    "input; raise the limit"
                )
            if size > looked:
                check_room(file.fileno(), f"for {where}")
                looked = size + EVERY
            view = memoryview(piece)
            while view:
                view = view[file.write(view) :]
            digest.update(piece)
            progress(size)
        os.fsync(file.fileno())
    return Checksum(algorithm, digest.hexdigest())


def _cut(path: Path, length: int, where: str) -> None:
    """Leave out what stands behind the image."""
    with _reading(str(path), where), path.open("r+b") as file:
        file.truncate(length)
        os.fsync(file.fileno())


class _Total:
    """A download's progress: its total is known once the server has answered."""

    def __init__(self, meter: Meter, what: str) -> None:
        self._meter = meter
        self._what = what
        self._stack = contextlib.ExitStack()
        self._progress: Progress | None = None

    def __enter__(self) -> Callable[[int, int | None], None]:
        return self._advance

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _advance(self, done: int, total: int | None) -> None:
        if self._progress is None:
            self._progress = self._stack.enter_context(self._meter(self._what, total))
        self._progress(done)


@contextlib.contextmanager
def _reading(source: str, where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted(f"no space is left for {where}; make room") from error
        raise CommandFailed(f"{source} cannot be read for {where} ({error.strerror}); check its storage") from None
