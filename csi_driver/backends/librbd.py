"""What librbd is asked of images, by ctypes, within sessions of `csi_driver.backends.librados`, which says how.

Names and numbers are those of <rbd/librbd.h> (Ceph 16 and newer). All raise OSError, FileNotFoundError for no image.
"""

import ctypes
import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from ctypes import byref, c_char_p, c_int, c_int64, c_size_t, c_ssize_t, c_ubyte, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from csi_driver.backends.librados import Session, Where, check, declaring, opened_pool, pool_name, touch
from csi_driver.backends.librados import library as rados
from csi_driver.model.errors import FailedPrecondition

_FEATURES: Final = {
    "layering": 1 << 0,
    "exclusive-lock": 1 << 2,
    "object-map": 1 << 3,
    "fast-diff": 1 << 4,
    "deep-flatten": 1 << 5,
}
_OPTION_FORMAT: Final = 0
_OPTION_FEATURES: Final = 1
_OPTION_DATA_POOL: Final = 10
_IMAGE_FORMAT: Final = 2
_ID_BYTES: Final = 64 << 10
_SOME_BYTES: Final = 16 << 10
_SOME_CLIENTS: Final = 16
_PIECE: Final = 4 << 20
_NOT_OF_PARENTS, _BY_OBJECTS = 0, 1
_TRASH: Final = "rbd_trash"
_KEEPING: Final = (0, 1, 2)  # rbd_snap_namespace_type_t: of users, of groups, of the trash while clones need them


@dataclass(frozen=True)
class Image:
    """An image; `id` tells it from every other one of its pool that had its name, `data_pool` is none but its own."""

    id: str
    size: int
    data_pool: str | None = None


@dataclass(frozen=True)
class Lock:
    """An image's lock, and the client that has it."""

    id: str
    locker: str
    address: str


def info(session: Session, where: Where, image: str) -> Image | None:
    """The image of that name, whoever made it."""
    size, identity = c_uint64(), ctypes.create_string_buffer(_ID_BYTES)
    try:
        with _opened(session, where, image) as opened:
            check(library().rbd_get_size(opened, byref(size)))
            check(library().rbd_get_id(opened, identity, len(identity)))
            number = check(library().rbd_get_data_pool_id(opened))
    except FileNotFoundError:
        return None
    try:
        data_pool = pool_name(session, number)
    except FileNotFoundError:
        raise FailedPrecondition(
            f"the image {image} in the pool {where.pool} has its data in the pool {number}, which is gone; restore it"
        ) from None
    return Image(identity.value.decode(), size.value, data_pool if data_pool != where.pool else None)


def make(session: Session, where: Where, image: str, size: int, features: Sequence[str], data_pool: str | None) -> None:
    """Make a blank image of `size` bytes. Raises FileExistsError."""
    rbd, options = library(), c_void_p()
    rbd.rbd_image_options_create(byref(options))
    try:
        check(rbd.rbd_image_options_set_uint64(options, _OPTION_FORMAT, _IMAGE_FORMAT))
        check(rbd.rbd_image_options_set_uint64(options, _OPTION_FEATURES, sum(_FEATURES[each] for each in features)))
        if data_pool is not None:
            check(rbd.rbd_image_options_set_string(options, _OPTION_DATA_POOL, data_pool.encode()))
        with opened_pool(session, where) as pool:
            check(rbd.rbd_create4(pool, image.encode(), size, options))
    finally:
        rbd.rbd_image_options_destroy(options)


def resize(session: Session, where: Where, image: str, size: int) -> None:
    """Give it `size` bytes; where it is mapped that is seen when this returns.

    It is never made shorter, whoever has lengthened it meanwhile: librbd looks when it alone may change the image. Its
    rbd_resize does not (findings/librbd-resize-shrinks.sh).
    """
    found = c_uint64()
    with _opened(session, where, image, writable=True) as opened:
        code = library().rbd_resize2(opened, size, _MAY_SHRINK, _Progress(lambda *_: 0), None)
        check(library().rbd_get_size(opened, byref(found)))
    if found.value < size:
        check(code)


def remove(session: Session, where: Where, image: str, only: str | None = None) -> None:
    """Remove it, and what is left of one that was half made or half removed; absent is fine.

    With an id nothing is done to another image that has the name.
    """
    if only is not None and (found := info(session, where, image)) is not None and found.id != only:
        return
    with suppress(FileNotFoundError):
        _remove(session, where, image)
        return
    # It takes its way through the trash, which the first one to be removed makes: in a full pool that is this error
    # (findings/librbd-remove-in-full-pool.sh).
    if info(session, where, image) is not None:
        touch(session, where, _TRASH)
        _remove(session, where, image)


def _remove(session: Session, where: Where, image: str) -> None:
    with opened_pool(session, where) as pool:
        check(library().rbd_remove(pool, image.encode()))


def is_unwritten(session: Session, where: Where, image: str) -> bool:
    """Whether nothing was ever written to it that is still there."""
    size, found = c_uint64(), list[int]()

    def note(offset: int, _: int, exists: int, __: object) -> int:
        found.extend([offset] if exists else [])
        return 0

    with _opened(session, where, image) as opened:
        check(library().rbd_get_size(opened, byref(size)))
        each = _Extent(note)
        check(library().rbd_diff_iterate2(opened, None, 0, size.value, _NOT_OF_PARENTS, _BY_OBJECTS, each, None))
    return not found


class _Snapshot(ctypes.Structure):
    """rbd_snap_info_t."""

    _fields_ = (("id", c_uint64), ("size", c_uint64), ("name", c_char_p))


def snapshots(session: Session, where: Where, image: str) -> int:
    """How many snapshots it has that keep it: those of mirroring go with an image."""
    rbd, room, kind, kept = library(), c_int(), c_int(), 0
    with _opened(session, where, image) as opened:
        while True:
            found = (_Snapshot * max(1, room.value))()
            code = rbd.rbd_snap_list(opened, found, byref(room))
            if code != -errno.ERANGE:
                break
        try:
            for one in found[: check(code)]:
                check(rbd.rbd_snap_get_namespace_type(opened, one.id, byref(kind)))
                kept += kind.value in _KEEPING
        finally:
            rbd.rbd_snap_list_end(found)
    return kept


class _Group(ctypes.Structure):
    """rbd_group_info_t."""

    _fields_ = (("name", c_char_p), ("pool", c_int64))


def group(session: Session, where: Where, image: str) -> str:
    """The name of the group that it is in, which keeps it; "" for none."""
    found = _Group()
    with _opened(session, where, image) as opened:
        check(library().rbd_get_group(opened, byref(found), ctypes.sizeof(found)))
        try:
            return (found.name or b"").decode(errors="replace")
        finally:
            library().rbd_group_info_cleanup(byref(found), ctypes.sizeof(found))


def overwrite(session: Session, where: Where, image: str, length: int) -> None:
    """Random bytes over its first `length` bytes, without mapping it."""
    size = c_uint64()
    with _opened(session, where, image, writable=True) as opened:
        check(library().rbd_get_size(opened, byref(size)))
        for at in range(0, end := min(length, size.value), _PIECE):
            content = os.urandom(min(_PIECE, end - at))
            check(library().rbd_write(opened, at, len(content), content))
        check(library().rbd_flush(opened))


def rename(session: Session, where: Where, image: str, name: str) -> None:
    """Give it another name, in one step; who has it open goes on. Raises FileExistsError."""
    with opened_pool(session, where) as pool:
        check(library().rbd_rename(pool, image.encode(), name.encode()))


def describe(session: Session, where: Where, image: str, key: str, value: str) -> None:
    """Set one key of its metadata."""
    with _opened(session, where, image, writable=True) as opened:
        check(library().rbd_metadata_set(opened, key.encode(), value.encode()))


def metadata(session: Session, where: Where, image: str) -> Mapping[str, str]:
    """All of its metadata."""
    keys, values = _Words(), _Words()
    with _opened(session, where, image) as opened:
        _until_it_fits(lambda: library().rbd_metadata_list(opened, b"", 0, *keys.room(), *values.room()))
    try:
        return dict(zip(keys.all(), values.all(), strict=True))
    except ValueError:
        raise FailedPrecondition(
            f"the metadata of the image {image} in the pool {where.pool} cannot be read: a value has a NUL in it; look "
            f"at 'rbd image-meta list {where.pool}/{image}' and remove it"
        ) from None


def watchers(session: Session, where: Where, image: str) -> Sequence[str]:
    """The addresses of those who have it open for writing."""
    count, found = c_size_t(_SOME_CLIENTS), (_Watcher * 0)()

    def ask() -> int:
        nonlocal found
        found = (_Watcher * count.value)()
        return int(library().rbd_watchers_list(opened, found, byref(count)))

    with _opened(session, where, image) as opened:
        _until_it_fits(ask)
    try:
        return [each.address.decode() for each in found[: count.value]]
    finally:
        library().rbd_watchers_list_cleanup(found, count.value)


def locks(session: Session, where: Where, image: str) -> Sequence[Lock]:
    """Its locks, and who has them."""
    tag, lockers, cookies, addresses = _Words(), _Words(), _Words(), _Words()
    with _opened(session, where, image) as opened:
        count = _until_it_fits(
            lambda: library().rbd_list_lockers(
                opened, byref(c_int()), *tag.room(), *lockers.room(), *cookies.room(), *addresses.room()
            )
        )
    found = zip(cookies.all(), lockers.all(), addresses.all(), strict=True) if count else ()
    return [Lock(*each) for each in found]


def break_lock(session: Session, where: Where, image: str, lock: Lock) -> None:
    """Take a lock from whoever has it."""
    with _opened(session, where, image, writable=True) as opened:
        check(library().rbd_break_lock(opened, lock.locker.encode(), lock.id.encode()))


@contextmanager
def _opened(session: Session, where: Where, name: str, *, writable: bool = False) -> Iterator[c_void_p]:
    image = c_void_p()
    opens = library().rbd_open if writable else library().rbd_open_read_only
    with opened_pool(session, where) as pool:
        check(opens(pool, name.encode(), byref(image), None))
        try:
            yield image
        finally:
            library().rbd_close(image)


_Extent = ctypes.CFUNCTYPE(c_int, c_uint64, c_size_t, c_int, c_void_p)
_Progress = ctypes.CFUNCTYPE(c_int, c_uint64, c_uint64, c_void_p)  # librbd calls it without a look whether it is one
_MAY_SHRINK: Final = 0


class _Watcher(ctypes.Structure):
    """rbd_image_watcher_t."""

    _fields_ = (("address", c_char_p), ("client", c_int64), ("cookie", c_uint64))


class _Words:
    """Room for texts that each end with NUL; the library tells how much of it was filled, or is needed."""

    def __init__(self) -> None:
        self._size = c_size_t(_SOME_BYTES)
        self._room = ctypes.create_string_buffer(0)

    def room(self) -> tuple[Any, Any]:
        """As much as was needed the last time."""
        self._size = c_size_t(max(self._size.value, _SOME_BYTES))
        self._room = ctypes.create_string_buffer(self._size.value)
        return self._room, byref(self._size)

    def all(self) -> Sequence[str]:
        """What came."""
        content = self._room.raw[: self._size.value]
        return [each.decode(errors="replace") for each in content.removesuffix(b"\0").split(b"\0")] if content else []


def _until_it_fits(ask: Callable[[], int]) -> int:
    while (code := ask()) == -errno.ERANGE:
        pass
    return check(code)


def version() -> str:
    """Of both libraries. Raises FailedPrecondition."""
    found = []
    for name, tells in (("librados", rados().rados_version), ("librbd", library().rbd_version)):
        numbers = c_int(), c_int(), c_int()
        tells(*map(byref, numbers))
        found.append(f"{name} {'.'.join(str(each.value) for each in numbers)}")
    return ", ".join(found)


@cache
def library() -> ctypes.CDLL:
    """librbd, loaded once. Raises FailedPrecondition."""
    with declaring("librbd.so.1") as rbd:
        _declare(rbd)
    return rbd


def _declare(rbd: ctypes.CDLL) -> None:
    rbd.rbd_get_data_pool_id.restype = c_int64
    # Of those that take a number: without it one is passed as a C int.
    rbd.rbd_image_options_set_uint64.argtypes = (c_void_p, c_int, c_uint64)
    rbd.rbd_create4.argtypes = (c_void_p, c_char_p, c_uint64, c_void_p)
    rbd.rbd_snap_get_namespace_type.argtypes = (c_void_p, c_uint64, c_void_p)
    rbd.rbd_resize2.argtypes = (c_void_p, c_uint64, c_ubyte, _Progress, c_void_p)
    rbd.rbd_get_group.argtypes = (c_void_p, c_void_p, c_size_t)
    rbd.rbd_group_info_cleanup.argtypes = (c_void_p, c_size_t)
    rbd.rbd_get_id.argtypes = (c_void_p, c_char_p, c_size_t)
    rbd.rbd_metadata_list.argtypes = (c_void_p, c_char_p, c_uint64, c_char_p, c_void_p, c_char_p, c_void_p)
    rbd.rbd_diff_iterate2.argtypes = (c_void_p, c_char_p, c_uint64, c_uint64, c_ubyte, c_ubyte, _Extent, c_void_p)
    rbd.rbd_write.argtypes = (c_void_p, c_uint64, c_size_t, c_char_p)
    rbd.rbd_write.restype = c_ssize_t
    rbd.rbd_watchers_list_cleanup.argtypes = (c_void_p, c_size_t)
