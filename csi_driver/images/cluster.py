"""What the agent of a node and its driver tell each other about the cluster's images, by files that both see.

cluster/<image>.json    by the agent: an Image that is ready or being made, and how far bringing it to this node is
wanted/<image>          by the driver: a volume waits for it here; the agent removes it when the image is here
used/<image>            by the driver: its time is that of the last volume that started from it; removed with the first

The driver has no token to ask Kubernetes with, and the agent no socket to be called at. Whoever is killed leaves whole
files, and each says again what it has to say: neither is durable, as nothing hangs on them after a restart.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import msgspec

from csi_driver.host.files import Files
from csi_driver.host.syscalls import error_name
from csi_driver.images.store import check_name
from csi_driver.model.errors import FailedPrecondition, InvalidArgument
from csi_driver.model.reading import decode
from csi_driver.model.times import recorded

_MOST_BYTES: Final = 16 << 10
_LONGEST_MESSAGE: Final = 1024
_END: Final = ".json"


class ClusterImage(msgspec.Struct, frozen=True, kw_only=True):
    """An Image of the cluster: its uid, whether a copy of it is ready anywhere, and how far the one for this node is.

    `here` is whether that one is ready: a file may be there that is none of this Image's. `message` is for a person, in
    one line; `percent`, and `here` of an older agent, are None where nobody knows.
    """

    uid: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    ready: bool
    here: bool | None = None
    message: Annotated[str, msgspec.Meta(max_length=_LONGEST_MESSAGE)] = ""
    percent: Annotated[int, msgspec.Meta(ge=0, le=100)] | None = None


class ClusterImages:
    """The files below the folder of a node's images; an agent tells of an image from one thread at a time.

    All methods raise InvalidArgument for what is no image's name, and FailedPrecondition where the files cannot be read
    or written.
    """

    def __init__(self, folder: Path) -> None:
        self._told = folder / "cluster"
        self._wanted = folder / "wanted"
        self._used = folder / "used"
        self._files = Files()

    def tell(self, name: str, uid: str, *, ready: bool, here: bool, percent: int | None, message: str) -> None:
        """For the agent: the Image of that name, as ClusterImage has it; what does not fit there is cut off."""
        found = ClusterImage(uid=uid, ready=ready, here=here, percent=percent, message=_one_line(message))
        path = self._path(name)
        with _usable(path):
            _made(self._told)
            self._files.write_volatile(path, msgspec.json.encode(found))

    def forget(self, name: str) -> None:
        """For the agent: the cluster has no such Image any more; none that was told of is fine."""
        path = self._path(name)
        with _usable(path):
            self._files.remove(self._used / name)
            self._files.remove(path)

    def names(self) -> Sequence[str]:
        """For the agent: the images that were told of and not forgotten, readable or not, sorted."""
        return _names(self._told, _END)

    def wanted(self) -> Sequence[str]:
        """For the agent: the images that volumes of this node wait for, sorted."""
        return _names(self._wanted, "")

    def brought(self, name: str) -> None:
        """For the agent: nobody has to wait any more; what nobody waited for is fine."""
        path = self._wanting(name)
        with _usable(path):
            self._files.remove(path)

    def has(self, name: str) -> bool:
        """For the driver: whether the cluster has such an image, whatever is told of it."""
        return os.path.lexists(self._path(name))

    def find(self, name: str) -> ClusterImage | None:
        """For the driver: what was told of an image; None where the cluster has none of that name."""
        path = self._path(name)
        with _usable(path):
            content = _read(path)
        if content is None:
            return None
        try:
            found = decode(content, ClusterImage)
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
            raise _unreadable(path, str(error)) from None
        return msgspec.structs.replace(found, message=_one_line(found.message))

    def want(self, name: str) -> None:
        """For the driver: a volume waits for that image; again is fine, and by several calls at once."""
        _touch(self._wanting(name))

    def use(self, name: str) -> None:
        """For the driver: a volume starts from that image now."""
        check_name(name)
        _touch(self._used / name)

    def last_used(self, name: str) -> str:
        """For the agent: when `use` was called last, in the form of records; "" if it never was."""
        check_name(name)
        path = self._used / name
        with _usable(path), suppress(FileNotFoundError):
            return recorded(datetime.fromtimestamp(path.stat(follow_symlinks=False).st_mtime, UTC))
        return ""

    def _path(self, name: str) -> Path:
        check_name(name)
        return self._told / f"{name}{_END}"

    def _wanting(self, name: str) -> Path:
        check_name(name)
        return self._wanted / name


def _made(folder: Path) -> None:
    for each in (folder.parent, folder):
        each.mkdir(mode=0o700, exist_ok=True)


def _touch(path: Path) -> None:
    """Have an empty file with the time of now."""
    with _usable(path):
        _made(path.parent)
        # Not written beside and renamed: others may do the same, and of an empty file there is no half.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.utime(descriptor)
        finally:
            os.close(descriptor)


def _names(folder: Path, end: str) -> Sequence[str]:
    """What is there by a name that an image can have; a write that is under way has none."""
    with _usable(folder):
        try:
            found = os.listdir(folder)
        except FileNotFoundError:
            return []
    return sorted(_valid(name.removesuffix(end) for name in found if name.endswith(end)))


def _valid(names: Iterator[str]) -> Iterator[str]:
    for name in names:
        with suppress(InvalidArgument):
            check_name(name)
            yield name


def _read(path: Path) -> bytes | None:
    """All of a small file; None where there is none. Raises OSError, FailedPrecondition for anything else."""
    try:
        # Neither a link is followed nor the writer of a FIFO waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _unreadable(path, "it is no regular file")
        content = os.read(descriptor, _MOST_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > _MOST_BYTES:
        raise _unreadable(path, f"it is longer than {_MOST_BYTES} bytes")
    return content


def _one_line(text: str) -> str:
    words = " ".join(text.split())
    return "".join(each if each.isprintable() else "?" for each in words)[:_LONGEST_MESSAGE]


def _unreadable(path: Path, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"what is known of an image of the cluster cannot be read from {path} ({why}); start the image agent of this "
        f"node anew, which writes it"
    )


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FailedPrecondition(
            f"{path} cannot be used ({error_name(error)}); run this as root, and check the state directory"
        ) from None
