"""The images of a state directory: a folder per image with its file and its record, whole or not there.

ready/<name>/{image,record.json}    complete, renamed in at the end, never changed
new/<name>/                         being made; what a killed call left there is for its repetition
trash/<name>/                       being removed
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from csi_driver.host import ofdlock
from csi_driver.host.files import Files, beside, read_file
from csi_driver.host.syscalls import error_name
from csi_driver.images.base import ImageFormat
from csi_driver.model.errors import Aborted, AlreadyExists, DeviceInUse, FailedPrecondition, InvalidArgument, NotFound
from csi_driver.model.reading import convert, decode
from csi_driver.model.volume import LuksIdentity

VERSION: Final = 1

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
_FILE, _RECORD, _OWNER = "image", "record.json", "owner"
_READS: Final = "luks-csi reads image"
_LONGEST_NAME: Final = 249  # memfd_create(2)


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where an image comes from: what was done, with which source, and the checksum that was asked of it.

    `source` is a path, a URL without user and query, the name of an image, or the id of a volume.
    """

    operation: str
    source: str
    checksum: str | None = None


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is recorded of an image. Sizes in bytes.

    `size` is what a VM sees, `file_size` the file's length. `luks` is set for an encrypted image: then the file is
    LUKS2 and `secret` may tell which Kubernetes secret (namespace/name) opens it. `owner` is the uid of the Image
    object whose copy this is; one that was made by hand has none.
    """

    name: str
    format: ImageFormat
    size: int
    file_size: int
    luks: LuksIdentity | None = None
    secret: str | None = None
    owner: str | None = None
    created: str
    provenance: Provenance


class ImageStore:
    """Images below `folder`; callers hold the image's lock where they write."""

    def __init__(self, folder: Path, files: Files) -> None:
        self._folder = folder
        self._files = files

    def start(self) -> None:
        """Make the folders that are not there. Raises FailedPrecondition."""
        with self._usable():
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            for folder in (self._folder, *(self._folder / name for name in ("ready", "new", "trash", "locks"))):
                if not folder.is_dir():
                    folder.mkdir(mode=0o700, exist_ok=True)
                    self._files.sync_folder(folder.parent)

    @property
    def locks(self) -> Path:
        """The folder for lock files."""
        return self._folder / "locks"

    def names(self) -> Sequence[str]:
        """The complete images. Raises FailedPrecondition."""
        return self._below("ready")

    def unfinished(self) -> Sequence[str]:
        """What cut calls have left and nobody sees. Raises FailedPrecondition."""
        left = {*self._below("new"), *self._below("trash")} - {*self.names()}
        return sorted(name for name in left if _NAME.fullmatch(name))  # no lock files

    def exists(self, name: str) -> bool:
        """Whether there is a complete image of that name, or one in the making."""
        return any((self._folder / kind / name).exists() for kind in ("ready", "new", "trash"))

    def get(self, name: str) -> ImageRecord:
        """The record of a complete image. Raises InvalidArgument, NotFound, FailedPrecondition."""
        check_name(name)
        path = self._folder / "ready" / name / _RECORD
        try:
            with self._usable():
                return _decode(read_file(path), path)
        except FileNotFoundError:
            if self.exists(name):
                raise NotFound(f"image {name} is unfinished; run the command that makes it again, it goes on") from None
            raise NotFound(
                f"image {name} does not exist in {self._folder}; luks-csi image list shows those that do"
            ) from None

    def file(self, name: str) -> Path:
        """The file of a complete image."""
        return self._folder / "ready" / name / _FILE

    def begin(self, name: str, owner: str | None = None) -> Path:
        """The folder in which the image is made, kept if an earlier call for this `owner` began it.

        Raises AlreadyExists, also where another owner's is in the making.
        """
        check_name(name)
        ready = self._folder / "ready" / name
        if ready.exists():
            self._tidy(ready)
            raise AlreadyExists(f"image {name} exists already; delete it, or choose another name")
        self._empty_trash(name)
        folder = self._folder / "new" / name
        if not folder.exists():
            self._files.make_folder(folder)
        if self.is_unbegun(name):
            if owner is not None:
                self._files.write(folder / _OWNER, owner.encode())
        elif (maker := self.maker(name)) != owner:
            raise AlreadyExists(
                f"an unfinished image {name} is on this node that was begun {_begun_by(maker)}; let that end, or "
                f"remove it with luks-csi image delete {name}{'' if maker is None else ' --owned'}"
            )
        return folder

    def is_unbegun(self, name: str) -> bool:
        """Whether there is a folder to make it in, or of its removal, with nothing in it: a call was killed before it
        said for whom, or when all was removed.
        """
        folders = [folder for kind in ("new", "trash") if (folder := self._folder / kind / name).exists()]
        found = {path.name for folder in folders for path in folder.iterdir()}
        return bool(folders) and found <= {beside(self._folder / _OWNER).name}

    def maker(self, name: str) -> str | None:
        """The owner for whom an unfinished image was begun; None where it is by hand, or where there is none."""
        try:
            with self._usable():
                return read_file(self._folder / "new" / name / _OWNER).decode(errors="replace")
        except FileNotFoundError:
            return None

    def owner(self, name: str) -> str | None:
        """The owner of what there is of an image: whole, being removed, or in the making. Raises FailedPrecondition."""
        for kind in ("ready", "trash"):
            path = self._folder / kind / name / _RECORD
            with contextlib.suppress(FileNotFoundError), self._usable():
                return _decode(read_file(path), path).owner
        return self.maker(name)

    def finish(self, record: ImageRecord, made: Path) -> None:
        """Make an image visible whose file `made`, in the folder of `begin`, is complete and durable.

        What a repetition goes on from is there until the image is.
        """
        folder, ready = self._folder / "new" / record.name, self._folder / "ready" / record.name
        self._files.write(folder / _RECORD, msgspec.json.encode({"version": VERSION, "image": record}))
        self._files.link(made, folder / _FILE)
        self._files.rename(folder, ready)
        self._tidy(ready)

    @contextlib.contextmanager
    def reading(self, name: str, what: str) -> Iterator[None]:
        """Keep an image from being deleted for the length of the block, in which it is read for `what`.

        Raises Aborted when it is being deleted.
        """
        with self._opened(self.file(name), os.O_RDONLY) as descriptor, contextlib.ExitStack() as stack:
            if descriptor is not None:
                stack.enter_context(_told(descriptor, what))
            if descriptor is None or not ofdlock.try_share(descriptor):
                raise Aborted(f"image {name} is being deleted; call again when that has ended")
            yield

    @contextlib.contextmanager
    def _unread(self, name: str) -> Iterator[None]:
        """Nobody reads the image, and nobody begins to, for the length of the block. Raises DeviceInUse."""
        with self._opened(self.file(name), os.O_RDWR) as descriptor:
            if descriptor is not None and not ofdlock.try_claim(descriptor):
                readers = " and ".join(sorted(set(_readers(descriptor)))) or "somebody"
                raise DeviceInUse(
                    f"image {name} is being read for {readers} and was not deleted; delete it when that has ended, or "
                    f"stop that first"
                )
            yield

    @contextlib.contextmanager
    def _opened(self, path: Path, flags: int) -> Iterator[int | None]:
        try:
            with self._usable():
                descriptor = os.open(path, flags | os.O_CLOEXEC)
        except FileNotFoundError:
            yield None
            return
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def discard(self, name: str) -> None:
        """Remove what is in the making, and what a cut removal has left."""
        self._empty_trash(name)
        self._files.remove_folder(self._folder / "new" / name, last=_OWNER)

    def delete(self, name: str) -> None:
        """Remove an image and what is in the making of it. Raises NotFound, DeviceInUse naming who reads it."""
        check_name(name)
        if not self.exists(name):
            raise NotFound(f"image {name} does not exist in {self._folder}")
        ready, trash = self._folder / "ready" / name, self._folder / "trash" / name
        self._empty_trash(name)
        if ready.exists():
            with self._unread(name):
                self._files.rename(ready, trash)
        self.discard(name)
        self._files.remove(lock_of(self._folder / "new" / name))

    def _empty_trash(self, name: str) -> None:
        """The record goes last: it tells whose the file is."""
        self._files.remove_folder(self._folder / "trash" / name, last=_RECORD)

    def _tidy(self, ready: Path) -> None:
        """Remove what the making of an image has left beside it."""
        for path in ready.iterdir():
            if path.name not in (_FILE, _RECORD):
                self._files.remove(path)

    def _below(self, kind: str) -> Sequence[str]:
        try:
            with self._usable():
                return sorted(path.name for path in (self._folder / kind).iterdir())
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        """Tell what is wrong with the folder; that something is not there is the caller's to tell."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise FailedPrecondition(
                f"the images in {self._folder} cannot be used ({error_name(error)}); run this as root, and check the "
                f"state directory"
            ) from None


@contextlib.contextmanager
def _told(image: int, what: str) -> Iterator[None]:
    """Say who reads the image that is open as `image`, by the name of an open descriptor: that ends with this process,
    however it ends.
    """
    shown = os.fsencode(f"{_shown(image)}{what}")[:_LONGEST_NAME]
    descriptor = os.memfd_create(os.fsdecode(shown))
    try:
        yield
    finally:
        os.close(descriptor)


def _shown(image: int) -> str:
    """How what is told of an image begins: by its file, as each driver of a node has images of its own."""
    file = os.fstat(image)
    return f"{_READS} {file.st_dev}:{file.st_ino} for "


def _readers(image: int) -> Iterator[str]:
    """What the processes of this node read the image for, as they say (proc(5), /proc/pid/fd)."""
    start = f"/memfd:{_shown(image)}"
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for descriptor in os.listdir(f"/proc/{process}/fd"):
                with contextlib.suppress(OSError):
                    link = os.readlink(f"/proc/{process}/fd/{descriptor}")
                    if link.startswith(start):
                        yield link.removeprefix(start).removesuffix(" (deleted)")


def _begun_by(owner: str | None) -> str:
    return f"for the Image object with the uid {owner}" if owner else "by hand"


def check_name(name: str) -> None:
    """Raise InvalidArgument unless `name` can be an image's, as Kubernetes names its objects."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"{name!r} cannot be an image's name; use at most 63 lower-case letters, digits, - and ., with a letter or "
            f"digit at each end"
        )


def lock_of(folder: Path) -> Path:
    """The lock file of the target in `folder`; a killed run leaves it."""
    return folder.with_name(f".{folder.name}.lock")


def _decode(content: bytes, path: Path) -> ImageRecord:
    try:
        document = decode(content, dict[str, Any])
        if (version := convert(document["version"], int)) > VERSION:
            raise FailedPrecondition(
                f"the image record {path} has version {version}, written by a newer luks-csi than this one, which "
                f"knows version {VERSION}; run the newer one on this node"
            )
        return convert(document["image"], ImageRecord)
    except (ValueError, KeyError, RecursionError) as error:
        raise FailedPrecondition(
            f"the image record {path} cannot be read ({error}); restore it from a backup, or remove the image with "
            f"luks-csi image delete {path.parent.name}"
        ) from None
