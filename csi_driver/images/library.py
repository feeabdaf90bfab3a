"""What can be done with images: import, clone, export, inspect, delete. One call at a time works on an image."""

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from csi_driver.host.files import Files
from csi_driver.host.holders import Holders
from csi_driver.host.locks import VolumeLocks
from csi_driver.host.syscalls import error_name
from csi_driver.images.base import ImageFormat
from csi_driver.images.bring import Bringer, Meter, check_secret_fits, is_url
from csi_driver.images.checkpoint import Job, Operation, SourceIdentity
from csi_driver.images.checksum import Algorithm, Checksum, checksum_of
from csi_driver.images.clone import run_pass
from csi_driver.images.destinations import Connector, parse_url
from csi_driver.images.formats import Inspected, check_source
from csi_driver.images.luksfile import ANY_COST
from csi_driver.images.readers import opened, reader_of
from csi_driver.images.requests import Clone, Import, check_clone, check_secret, chosen_format, passphrase_of
from csi_driver.images.source import RawReader, open_regular
from csi_driver.images.stopping import Told, untold
from csi_driver.images.store import ImageRecord, ImageStore, Provenance, check_name
from csi_driver.images.target import Encryption, PassResult, Target
from csi_driver.images.unwrap import Warn
from csi_driver.keys.audit import Audit
from csi_driver.keys.secret import SecretKey
from csi_driver.luks.header import Header
from csi_driver.luks.image_header import ImageHeader, read_image_header
from csi_driver.model.errors import (
    Aborted,
    AlreadyExists,
    CommandFailed,
    DeviceUnreadable,
    FailedPrecondition,
    InvalidArgument,
    InvalidHeader,
    NotFound,
    VolumeBusy,
)
from csi_driver.model.times import recorded_now
from csi_driver.model.volume import LuksIdentity

_NO_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)


class ImageLibrary:
    """The images below `folder`.

    `stopping` is told when a signal asks long work to end, `warn` what is odd about an image that is taken.
    """

    def __init__(
        self,
        folder: Path,
        connector: Connector | None = None,
        stopping: Told = untold,
        warn: Warn = lambda _: None,
        audit: Audit | None = None,
    ) -> None:
        self._audit = audit or Audit(None)
        self._files = Files()
        self._store = ImageStore(folder, self._files)
        self._run = functools.partial(run_pass, stopping=stopping)
        self._bringer = Bringer(self._files, connector or Connector(), warn, self._run)
        self._locks = VolumeLocks(self._store.locks, Holders(), self._store.exists)

    def names(self) -> list[str]:
        """The complete images."""
        return list(self._store.names())

    def unfinished(self) -> list[str]:
        """What cut calls have left: the same call goes on with it, `delete` removes it."""
        return list(self._store.unfinished())

    def owned(self) -> dict[str, str]:
        """Which of both are for Image objects: by name the uid. What cannot be read is left out."""
        owners = {}
        for name in (*self.names(), *self.unfinished()):
            with contextlib.suppress(FailedPrecondition):
                owners[name] = self._store.owner(name)
        return {name: owner for name, owner in owners.items() if owner is not None}

    def get(self, name: str) -> ImageRecord:
        """The record of an image. Raises InvalidArgument, NotFound, FailedPrecondition."""
        return self._store.get(name)

    def file(self, name: str) -> Path:
        """The file of an image. Errors as `get`."""
        self._store.get(name)
        return self._store.file(name)

    def header(self, name: str) -> Header:
        """The LUKS2 header of an encrypted image, checked. Errors as `get`, DeviceUnreadable, InvalidHeader."""
        descriptor = open_regular(str(self.file(name)), f"image {name}")
        try:
            return _header(descriptor, f"image {name}").header
        finally:
            os.close(descriptor)

    def import_(self, wanted: Import, meter: Meter) -> ImageRecord:
        """Bring an image in; what an earlier, cut call of this name has downloaded is gone on with.

        Raises AlreadyExists, VolumeBusy, and what `fetch`, `unwrap`, `inspect` and `run_pass` raise.
        """
        if wanted.stream is None:
            check_source(wanted.source)
        check_secret(wanted.secret)
        with self._made(wanted.name, wanted.owner) as folder:
            where = f"image {wanted.name}"
            try:
                made, found = self._bringer.bring(wanted, folder, meter, where)
                record = _recorded(wanted, made, found, where)
            except (InvalidArgument, InvalidHeader):
                self._store.discard(wanted.name)
                raise
            self._store.finish(record, made)
            return record

    def clone(self, wanted: Clone, meter: Meter) -> ImageRecord:
        """Make an image of another one. A killed call is gone on with by the next one of this name.

        Raises InvalidArgument (encrypting what is encrypted, decrypting what is not), FailedPrecondition (no
        passphrase), NotFound (also for a source of another owner), AlreadyExists, VolumeBusy, Unauthenticated, and what
        `run_pass` raises.
        """
        source = self._store.get(wanted.source)
        if wanted.source_owner not in (None, source.owner):
            raise NotFound(f"the image {wanted.source} of this node is not the Image of that name, but another one")
        check_clone(source, wanted)
        fields = {"image": wanted.name, "key": "secret", "operation": "use", "purpose": wanted.operation.value}
        is_copied = wanted.operation is Operation.IGNORE
        with (
            contextlib.nullcontext() if is_copied else self._audit.using(**fields),
            self._made(wanted.name, wanted.owner) as folder,
            self._store.reading(wanted.source, f"image {wanted.name}"),
        ):
            file = self._store.file(wanted.source)
            where = f"image {wanted.source}"
            job = Job(
                wanted.operation,
                file,
                SourceIdentity.of(file, where),
                ImageFormat.RAW if is_copied else source.format,  # whatever its format
                where,
            )
            if self._store.get(wanted.source) != source:
                raise Aborted(f"{where} was replaced by another one; call again")
            target = Target(folder, self._encryption(wanted))
            with contextlib.ExitStack() as stack:
                reader = reader_of(source, file, wanted, where)
                stack.callback(reader.close)
                progress = stack.enter_context(meter(_DOING[wanted.operation], reader.size))
                self._run(
                    reader,
                    target,
                    job,
                    progress,
                    verify=wanted.verify,
                    publish=lambda result: self._store.finish(_cloned(source, wanted, result), result.part),
                )
        return self._store.get(wanted.name)

    def receive(self, name: str, owner: str | None, bring: Callable[[Path], tuple[Path, ImageRecord]]) -> ImageRecord:
        """Have an image of which somebody else knows what it is, for the Image object `owner`: of another node, say.

        `bring` puts its file, whole and durable, into the folder that it is given, goes on there where it was cut, and
        returns the file and what is to be recorded. Raises AlreadyExists, VolumeBusy and what `bring` raises.
        """
        with self._made(name, owner) as folder:
            made, record = bring(folder)
            self._store.finish(msgspec.structs.replace(record, name=name, owner=owner), made)
        return self._store.get(name)

    def checksum(self, name: str, meter: Meter) -> Checksum:
        """The SHA-256 of an image's file, read whole. Errors as `get`, DeviceUnreadable, Aborted (being deleted)."""
        record, where = self._store.get(name), f"image {name}"
        with self._store.reading(name, "its checksum"), meter("checking", record.file_size) as progress:
            descriptor = open_regular(str(self._store.file(name)), where)
            try:
                return checksum_of(descriptor, Algorithm.SHA256, progress)
            except OSError as error:
                raise DeviceUnreadable(f"{where} cannot be read ({error_name(error)}); check its storage") from None
            finally:
                os.close(descriptor)

    def prove(self, name: str, key: SecretKey) -> None:
        """Open an encrypted image with the key of a secret; nothing is to be proven of another one.

        Raises Unauthenticated, FailedPrecondition (no passphrase), and what `get` and `LuksReader` raise.
        """
        if self._store.get(name).luks is None:
            return
        with (
            self._audit.using(image=name, key="secret", operation="use", purpose="check"),
            self._store.reading(name, "the proof of its key"),
        ):
            opened(self._store.file(name), key, f"image {name}").close()

    def export(self, name: str, path: Path, meter: Meter) -> None:
        """Copy an image's file, as it is, to a new file at `path`. Raises AlreadyExists, NotFound and as `run_pass`."""
        self._store.get(name)
        if path.exists() or path.is_symlink():
            raise AlreadyExists(f"{path} exists already; choose another name")
        if not path.parent.is_dir():
            raise NotFound(f"image {name} cannot be exported to {path}: there is no folder {path.parent}; make it")
        file, where = self._store.file(name), f"image {name}"
        job = Job(Operation.IGNORE, file, SourceIdentity.of(file, where), ImageFormat.RAW, where)
        target = Target(path.parent / f".{path.name}.export")
        with (
            self._store.reading(name, f"the file {path}"),
            contextlib.closing(RawReader(str(file), where)) as reader,
            meter("exporting", reader.size) as progress,
        ):
            self._run(reader, target, job, progress, publish=lambda result: self._put(result.part, path))
        target.discard()

    def _put(self, part: Path, path: Path) -> None:
        """Let a file be seen at `path`, where nothing may have appeared meanwhile."""
        try:
            os.link(part, path)
            self._files.sync_folder(path.parent)
        except FileExistsError:
            raise AlreadyExists(f"{path} has appeared meanwhile and was left alone; choose another name") from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise CommandFailed(f"{path} cannot be made ({error_name(error)}); check that file system") from None
            self._files.rename(part, path)  # a file system without links

    def delete(self, name: str, *, owned: bool = False) -> None:
        """Remove an image, and what a cut call has left of it; that of an Image object where `owned` says so.

        Raises NotFound, VolumeBusy, DeviceInUse (read), FailedPrecondition (an Image object's).
        """
        check_name(name)
        self._store.start()
        with self._lock(name):
            owner = None
            with contextlib.suppress(FailedPrecondition):  # one that is damaged can be removed
                owner = self._store.owner(name)
            if owner is not None and not owned:
                raise FailedPrecondition(
                    f"image {name} is this node's copy of the Image object with the uid {owner} and was not deleted; "
                    f"delete that object (kubectl delete image {name}), or add --owned where the cluster has it no more"
                )
            self._store.delete(name)

    def drop(self, name: str, owner: str) -> None:
        """As `delete`, of what is there for that owner; nothing of it, or somebody else's, is fine.

        Raises FailedPrecondition where the record does not tell whose it is.
        """
        check_name(name)
        self._store.start()
        with self._lock(name):
            if self._store.owner(name) == owner:
                self._store.delete(name)
            elif self._store.is_unbegun(name):
                self._store.discard(name)

    @contextlib.contextmanager
    def _made(self, name: str, owner: str | None) -> Iterator[Path]:
        """The folder to make an image in, locked."""
        check_name(name)
        self._store.start()
        with self._lock(name):
            folder = self._store.begin(name, owner)
            try:
                yield folder
            finally:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # nothing was begun in it, or it is gone

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._locks.hold(name))
            except VolumeBusy:
                raise VolumeBusy(f"another call is at work on image {name}; call again when it has ended") from None
            yield

    @staticmethod
    def _encryption(wanted: Clone) -> Encryption | None:
        if not wanted.operation.encrypts:
            return None
        where = f"image {wanted.name}"
        return Encryption(chosen_format(wanted), passphrase_of(wanted.new_key or SecretKey(None), where))


_DOING: Final = {
    Operation.IGNORE: "copying",
    Operation.ENCRYPT: "encrypting",
    Operation.DECRYPT: "decrypting",
    Operation.REENCRYPT: "reencrypting",
}


def _recorded(wanted: Import, made: Path, found: Inspected, where: str) -> ImageRecord:
    """What a file is that was brought in."""
    check_secret_fits(found, wanted, where)
    size = found.virtual_size
    if found.luks is not None:
        descriptor = open_regular(str(made), where)
        try:
            size = _header(descriptor, where).payload
        finally:
            os.close(descriptor)
    return ImageRecord(
        name=wanted.name,
        format=found.format,
        size=size,
        file_size=found.length,
        luks=found.luks,
        secret=wanted.secret,
        owner=wanted.owner,
        created=recorded_now(),
        provenance=Provenance(operation="import", source=_told_source(wanted), checksum=_text(wanted.checksum)),
    )


def _told_source(wanted: Import) -> str:
    if wanted.stream is not None:
        return "standard input"
    return str(parse_url(wanted.source)) if is_url(wanted.source) else str(Path(wanted.source).absolute())


def _cloned(source: ImageRecord, wanted: Clone, result: PassResult) -> ImageRecord:
    kept = wanted.operation is Operation.IGNORE
    luks: LuksIdentity | None = source.luks if kept else result.luks
    image_format = source.format if kept else (ImageFormat.LUKS2 if luks else ImageFormat.RAW)
    return ImageRecord(
        name=wanted.name,
        format=image_format,
        size=source.size if kept else result.payload,
        file_size=result.size,
        luks=luks,
        secret=wanted.secret or (source.secret if kept else None),
        owner=wanted.owner,
        created=recorded_now(),
        provenance=Provenance(operation=wanted.operation, source=wanted.source),
    )


def _header(descriptor: int, where: str) -> ImageHeader:
    def read(offset: int, length: int) -> bytes:
        return os.pread(descriptor, length, offset)

    return read_image_header(where, read, os.fstat(descriptor).st_size, ANY_COST)


def _text(checksum: Checksum | None) -> str | None:
    return str(checksum) if checksum else None
