"""Images that are being uploaded to this node: `uploads/<image>/part`, `whole` when all is there.

`for` in the folder names the Image object: what was uploaded for an earlier one of that name is not this one's. `total`
and, where the sender tells it, `digest` say which file it is of: half of one and half of another are no image.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from csi_driver.host.files import Files, read_file
from csi_driver.host.syscalls import error_name
from csi_driver.images.base import MIB
from csi_driver.images.checksum import Checksum
from csi_driver.images.requests import MOST_BYTES
from csi_driver.images.room import EVERY, check_room
from csi_driver.kube.kinds import Json
from csi_driver.model.errors import (
    Aborted,
    CommandFailed,
    FailedPrecondition,
    InvalidArgument,
    OutOfRange,
    ResourceExhausted,
    VolumeBusy,
)
from csi_driver.model.sizes import read_size

_FOR: Final = "for"
_MOST_LIMIT: Final = 1024 << 40
"""No image has more, and no sum of sizes leaves what 64 bits hold."""


class Uploads:
    """The uploads below `folder`; `came` is told of an image that is whole, that there is no room for, or that
    goes on after that.
    """

    def __init__(self, folder: Path, came: Callable[[str], None] = lambda _: None) -> None:
        self._folder = folder
        self._files = Files()
        self._guard = threading.Lock()
        self._at_work: set[str] = set()
        self._unwanted: set[str] = set()
        self._refused: dict[str, tuple[str, str]] = {}
        self.came = came

    def whole(self, name: str, uid: str) -> Path | None:
        """The file that was uploaded for this Image, None while it is not all there."""
        path = self._folder / name / "whole"
        return path if path.exists() and self._is_for(name, uid) else None

    def received(self, name: str, uid: str) -> int:
        """Bytes that are here, durable; an upload goes on behind them."""
        if not self._is_for(name, uid):
            return 0
        for file in ("whole", "part"):
            with contextlib.suppress(FileNotFoundError):
                return (self._folder / name / file).stat().st_size
        return 0

    def refused(self, name: str, uid: str) -> str:
        """Why the last piece for this Image was not taken for want of room; "" where it was, or none came."""
        known, said = self._refused.get(name, ("", ""))
        return said if known == uid else ""

    def announced(self, name: str, uid: str) -> Checksum | None:
        """The checksum that the sender said the whole has; None where he said none, and while nothing is here."""
        told = _noted(self._folder / name / "digest") if self.received(name, uid) else None
        return Checksum.parse(told) if told else None

    def total(self, name: str, uid: str) -> int | None:
        """How long the whole is to be; None while nothing is here."""
        told = _noted(self._folder / name / "total") if self.received(name, uid) else None
        return int(told) if told else None

    def receive(
        self, name: str, uid: str, start: int, total: int, length: int, stream: BinaryIO, *,
        announced: Checksum | None = None, most: int = MOST_BYTES,
    ) -> int:  # fmt: skip
        """Take the bytes from `start` on, `length` of them, of `total`; how many are here then.

        `announced` is the checksum of the whole, if its sender tells it; what was begun with one is gone on with by
        that one alone. `most` are the bytes that the Image may have.

        Raises VolumeBusy (another upload is under way), OutOfRange (`start` is not where it goes on), InvalidArgument,
        FailedPrecondition (what is here is of another file), ResourceExhausted, Aborted (the sender ended early: what
        came is kept), CommandFailed.
        """
        if total > most:
            raise InvalidArgument(
                f"image {name} may have {most} bytes and {total} were to come; raise spec.limit of the Image, or "
                f"upload a smaller file"
            )
        if not 0 <= start < total or not 0 < length <= total - start:
            raise InvalidArgument(f"{length} bytes from {start} on are no part of an image of {total} bytes")
        with self._alone(name):
            if self._refused.pop(name, None):
                self.came(name)
            try:
                with _told(name):
                    there = self._take(name, uid, start, total, length, stream, announced)
            except ResourceExhausted as error:
                self._refused[name] = uid, str(error)
                self.came(name)
                raise
        if there == total:
            self.came(name)
        return there

    def _take(
        self, name: str, uid: str, start: int, total: int, length: int, stream: BinaryIO, announced: Checksum | None
    ) -> int:
        folder = self._begin(name, uid)
        there = self.received(name, uid)
        if there:
            _check_same(folder, name, total, announced)
        if (folder / "whole").exists():
            return total
        if start != there:
            raise OutOfRange(f"the upload of image {name} goes on at byte {there}, not at {start}")
        self._note(folder, total, announced)
        part = folder / "part"
        there = self._append(name, part, start, total, length, stream)
        if there == total:
            self._files.rename(part, folder / "whole")
        return there

    def owned(self) -> dict[str, str]:
        """What there is of uploads: by the image's name the uid of the Image that it is for."""
        found = {}
        for path in self._folder.glob(f"*/{_FOR}"):
            with contextlib.suppress(OSError):
                found[path.parent.name] = read_file(path).decode(errors="replace")
        return found

    def forget(self, name: str, uid: str) -> None:
        """Remove what was uploaded for this Image; nothing of it is fine.

        Raises VolumeBusy while it is uploaded: that ends with its next piece.
        """
        try:
            with self._alone(name), _told(name):
                self._refused.pop(name, None)
                if self._is_for(name, uid):
                    self._files.remove_folder(self._folder / name, last=_FOR)
        except VolumeBusy:
            with self._guard:
                if name in self._at_work and self._is_for(name, uid):
                    self._unwanted.add(name)
            raise

    def _note(self, folder: Path, total: int, announced: Checksum | None) -> None:
        """Which file it is of, before the first byte of it is here; and what nobody had said of it until now."""
        for path, said in ((folder / "total", str(total)), (folder / "digest", str(announced or ""))):
            if (_noted(path) or "") != said:
                self._files.write(path, said.encode())

    def _append(self, name: str, part: Path, start: int, total: int, length: int, stream: BinaryIO) -> int:
        at, durable = start, start
        with part.open("ab", buffering=0) as file:
            check_room(file.fileno(), f"for image {name}", total - start)  # not when most of it has come in vain
            while at < start + length:
                piece = stream.read(min(MIB, start + length - at))
                if not piece:
                    break
                if name in self._unwanted:
                    raise Aborted(f"image {name} is not wanted any more; nothing of it is kept")
                view = memoryview(piece)
                while view:
                    view = view[file.write(view) :]
                at += len(piece)
                if at - durable >= EVERY:
                    os.fsync(file.fileno())
                    durable = at
                    check_room(file.fileno(), f"for image {name}")
            os.fsync(file.fileno())
        if at < start + length:
            raise Aborted(f"the upload of image {name} ended at byte {at}; it goes on there")
        return at

    def _begin(self, name: str, uid: str) -> Path:
        folder = self._folder / name
        if not self._is_for(name, uid):
            self._files.remove_folder(folder, last=_FOR)
            folder.mkdir(mode=0o700, parents=True)
            self._files.write(folder / _FOR, uid.encode())
        return folder

    def _is_for(self, name: str, uid: str) -> bool:
        try:
            return read_file(self._folder / name / _FOR) == uid.encode()
        except OSError:
            return False

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        with self._guard:
            if name in self._at_work:
                raise VolumeBusy(f"image {name} is being uploaded already; wait until that has ended")
            self._at_work.add(name)
        try:
            yield
        finally:
            with self._guard:
                self._at_work.discard(name)
                self._unwanted.discard(name)


def limit_of(image: Json) -> int:
    """The most bytes that an Image may bring in, by its `spec.limit`. Raises InvalidArgument."""
    limit = image["spec"].get("limit")
    with contextlib.suppress(ValueError):
        size = MOST_BYTES if limit is None else read_size(str(limit))
        if size <= _MOST_LIMIT:
            return size
    raise InvalidArgument(f"spec.limit of the Image, {limit}, is no size of at most 1024Ti; write one, such as 2Ti")


def _check_same(folder: Path, name: str, total: int, announced: Checksum | None) -> None:
    """Half of one file and half of another would make a whole that is neither."""
    begun, known = _noted(folder / "total"), _noted(folder / "digest")
    if begun is not None and begun != str(total):
        raise FailedPrecondition(
            f"the upload of image {name} was begun with {begun} bytes in all and goes on with {total}; send the "
            f"same file, or delete the Image and make it anew"
        )
    if known and known != str(announced):
        said = "of this one it is not told" if announced is None else f"this one has {announced}"
        raise FailedPrecondition(
            f"what is here of image {name} is of another file, which has the checksum {known}, and {said}; go on with "
            f"that file, or delete the Image and make it anew"
        )


def _noted(path: Path) -> str | None:
    try:
        return read_file(path).decode(errors="replace")
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted(
                f"no space is left for image {name} ({error_name(error)}); make room on the disk of this node"
            ) from None
        raise CommandFailed(
            f"the upload of image {name} cannot be kept ({error_name(error)}); check the disk"
        ) from None
