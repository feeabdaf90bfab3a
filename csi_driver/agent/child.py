"""The process that makes one image for an agent: it may end, or be ended, at any moment, and another one goes on.

It reads a Request from standard input and tells what it does in lines on standard output. Nothing of either is shown to
anybody else: no argument, no environment, no file.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from csi_driver.agent.pulling import pull
from csi_driver.agent.rate import Rate, paced
from csi_driver.agent.work import (
    CloneWork,
    Doing,
    Download,
    Export,
    Failed,
    Line,
    Made,
    Pull,
    Request,
    Upload,
    Used,
    foreign,
)
from csi_driver.host.hardening import die_with_parent, harden_process
from csi_driver.host.inmemory import in_memory
from csi_driver.host.syscalls import error_name
from csi_driver.images.base import Progress
from csi_driver.images.checkpoint import Operation
from csi_driver.images.checksum import Checksum
from csi_driver.images.destinations import Connector
from csi_driver.images.library import ImageLibrary
from csi_driver.images.requests import Clone, Import
from csi_driver.images.store import ImageRecord
from csi_driver.keys.audit import Audit
from csi_driver.keys.secret import read_secret
from csi_driver.model.errors import (
    Aborted,
    AlreadyExists,
    CommandFailed,
    DeviceUnreadable,
    DriverError,
    InvalidArgument,
    InvalidHeader,
    NotFound,
    OutOfRange,
    ResourceExhausted,
)
from csi_driver.model.reading import decode
from csi_driver.model.settings import Settings

_EVERY_SECONDS: Final = 1.0
_PERMANENT: Final = (InvalidArgument, InvalidHeader, OutOfRange)
_OF_THIS_NODE: Final = (ResourceExhausted, DeviceUnreadable, CommandFailed, AlreadyExists, NotFound)


class _ByAgent(Audit):
    """The agent tells it, who has a log and the file."""

    def __init__(self) -> None:
        super().__init__(None)

    def record(self, **fields: str) -> None:
        """A line for the agent."""
        _tell(Used(fields))


def main() -> None:
    """Do what standard input says."""
    die_with_parent()
    harden_process()
    request = decode(sys.stdin.buffer.read(), Request)
    sys.stdin.close()
    try:
        _tell(make(request))
    except DriverError as error:
        is_absent = isinstance(error, NotFound) and isinstance(request.work, Download)  # and so it is from anywhere
        busy, elsewhere = isinstance(error, Aborted), isinstance(error, _OF_THIS_NODE) and not is_absent
        _tell(Failed(str(error), isinstance(error, _PERMANENT), busy, elsewhere))
    except OSError as error:
        said = f"image {request.name} could not be made ({error_name(error)}); check the disk of this node"
        _tell(Failed(said, elsewhere=True))


def make(request: Request) -> Made:
    """Make the image, or find it made; raises what the library does."""
    with _certificates(request) as path:
        connector = Connector(allow_local=request.allow_local, cacert=path)
        library = ImageLibrary(Path(request.folder), connector, audit=_ByAgent())
        try:
            record = library.get(request.name)
        except NotFound:
            record = _made(library, request)
    if record.owner != request.owner:
        raise AlreadyExists(foreign(record))
    if (opens := request.opens) is not None:
        library.prove(request.name, read_secret(opens.entries, opens.name))
    return Made(record, library.checksum(request.name, _meter).digest)


def _made(library: ImageLibrary, request: Request) -> ImageRecord:
    name, owner, secret, work = request.name, request.owner, request.secret, request.work
    match work:
        case Download():
            checksum = Checksum.parse(work.checksum) if work.checksum else None
            wanted = Import(name, work.url, checksum, secret, work.limit, headers=work.headers, owner=owner)
            return library.import_(wanted, _meter)
        case Upload():
            checksum = Checksum.parse(work.checksum) if work.checksum else None
            wanted = Import(name, work.path, checksum, secret, work.limit, take=True, owner=owner)
            return library.import_(wanted, _meter)
        case CloneWork():
            key, new_key = (
                None if each is None else read_secret(each.entries, each.name) for each in (work.key, work.new_key)
            )
            operation = Operation(work.encryption)
            clone = Clone(
                work.source, name, operation, key, new_key, secret, work.sector_size,
                owner=owner, source_owner=work.source_owner,
            )  # fmt: skip
            return library.clone(clone, _meter)
        case Pull():
            return library.receive(name, owner, lambda folder: pull(name, work, folder, _meter))
        case Export():
            return _exported(library, request, work)


def _exported(library: ImageLibrary, request: Request, work: Export) -> ImageRecord:
    """Of a volume: by a driver of our own, which serves nobody."""
    from csi_driver.volumes.driver import build_driver  # noqa: PLC0415 - nothing else here needs it, and it is large
    from csi_driver.volumes.export import Export as Wanted  # noqa: PLC0415

    driver = build_driver(Settings(state_dir=Path(work.state_dir)))
    try:
        wanted = Wanted(work.volume, request.name, request.secret, request.owner, work.limit)
        return driver.offline().exports.export(wanted, library, paced(_meter, Rate(work.rate)))
    finally:
        driver.stop()


@contextlib.contextmanager
def _certificates(request: Request) -> Iterator[Path | None]:
    """The file of the certificates that a download trusts instead of the system's, in memory."""
    text = request.work.ca if isinstance(request.work, Download) else None
    if text is None:
        yield None
        return
    with in_memory(text.encode()) as path:
        yield Path(path)


@contextlib.contextmanager
def _meter(what: str, total: int | None) -> Iterator[Progress]:
    """Tells how far each part of the work is, once a second."""
    next_at = 0.0

    def progress(done: int) -> None:
        nonlocal next_at
        now = time.monotonic()
        if now >= next_at:
            next_at = now + _EVERY_SECONDS
            _tell(Doing(what, done, total))

    progress(0)
    yield progress


def _tell(line: Line) -> None:
    os.write(1, msgspec.json.encode(line) + b"\n")


if __name__ == "__main__":
    main()
