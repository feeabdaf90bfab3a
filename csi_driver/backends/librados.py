"""What librados is asked, by ctypes, in workers of their own (`csi_driver.host.workers.Workers.apart`).

A session with a cluster is dear to begin (10 ms, ten threads) and cheap to use (0.1 ms a question), so a worker keeps
the ones that it has. A question that the cluster does not answer hangs a process that can be killed, and a crash of the
library ends no server. Names and numbers are those of <rados/librados.h> (Ceph 16 and newer).

All raise OSError with the number that the library gave, `Refused` where no session is to be had.
"""

import ctypes
import errno
import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from ctypes import byref, c_char_p, c_int, c_int64, c_size_t, c_ubyte, c_uint64, c_void_p
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from csi_driver.host.handle import Handle
from csi_driver.model.errors import FailedPrecondition

_FSID_BYTES: Final = 37
_SOME_BYTES: Final = 64 << 10
_SOME_KEYS: Final = 1000
_EQUAL: Final = 1  # LIBRADOS_CMPXATTR_OP_EQ
_IF_ABSENT: Final = 0  # LIBRADOS_CREATE_IDEMPOTENT
_FULL_FORCE: Final = 128  # LIBRADOS_OPERATION_FULL_FORCE
_MOST_SESSIONS: Final = 4  # each has ten threads
_GRACE_SECONDS: Final = 5.0
# A session is as old as its worker: a right may be new since, a fence may have been lifted.
_STALE: Final = (errno.EPERM, errno.EACCES, errno.ESHUTDOWN, errno.ENOTCONN)
_IN_STEPS: Final = ("make", "resize", "remove", "overwrite", "rename", "describe", "break_lock")  # of librbd
# No file of the host is read or written, and nothing is told to anybody, whatever the cluster's own configuration wants
# of its clients: an admin socket would tell the key.
_OPTIONS: Final = {
    "keyring": "/dev/null",
    "admin_socket": "",
    "log_file": "",
    "log_to_stderr": "false",
    "log_to_syslog": "false",
    "err_to_stderr": "false",
    "err_to_syslog": "false",
    "ms_async_op_threads": "1",
}

_sessions: Final[dict[tuple[str, str], tuple[str, c_void_p]]] = {}  # and the key of each; the last used one is last

Session = c_void_p
"""What functions here and of `librbd` get first (rados_t)."""


class Refused(OSError):
    """The cluster takes no session of that user."""


class NoPool(OSError):
    """The cluster has no pool of that name: nothing that lies in it is gone by that."""


@dataclass(frozen=True)
class Login:
    """Who asks which cluster; repr leaves the key out."""

    monitors: str
    user: str
    key: str = field(repr=False)

    @property
    def name(self) -> tuple[str, str]:
        """By what its session is known."""
        return self.monitors, self.user


@dataclass(frozen=True)
class Where:
    """A pool, in it a namespace or ""."""

    pool: str
    namespace: str


def question(login: Login, function: Callable[..., object], args: Sequence[object], seconds: float) -> bytes:
    """What `answer` reads."""
    return pickle.dumps((login, function, args, seconds))


def answer(asked: Handle, into: Handle) -> None:
    """Do what the file in memory `asked` has, and write the result, of any length, to the one `into`.

    This process is killed a little behind the question's time, by the kernel: nobody else does it where the server was
    killed, and what comes much later could be meant for an image that is another one by then.
    """
    login, function, args, seconds = pickle.loads(os.pread(asked.fd, os.fstat(asked.fd).st_size, 0))  # noqa: S301 - from our own parent
    signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE_SECONDS)
    try:
        result = _asked(login, function, args)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    with open(into.fd, "wb", closefd=False) as file:
        file.write(pickle.dumps(result))


def _asked(login: Login, function: Callable[..., object], args: Sequence[object]) -> object:
    """In the session that is kept, or in a new one; it is asked again there where the kept one is refused.

    But for what librbd changes in several steps: some of them may be done, and the next call goes on with those.
    """
    was_kept = login.name in _sessions
    try:
        session = _session(login)
        if was_kept:
            check(library().rados_wait_for_latest_osdmap(session))  # else pools and their names are as it began
        return function(session, *args)
    except OSError as error:
        if error.errno not in _STALE:
            raise
        _end_session(login.name)
        if not was_kept or function.__name__ in _IN_STEPS:
            raise
    return function(_session(login), *args)


def _session(login: Login) -> c_void_p:
    """The session with the cluster as that user, begun if there is none with this key. Raises Refused."""
    kept = _sessions.pop(login.name, None)
    if kept is not None and kept[0] == login.key:
        _sessions[login.name] = kept  # now the one that was used last
        return kept[1]
    if kept is not None:
        library().rados_shutdown(kept[1])
    while len(_sessions) >= _MOST_SESSIONS:
        _end_session(next(iter(_sessions)))
    rados, session = library(), c_void_p()
    check(rados.rados_create2(byref(session), b"ceph", f"client.{login.user}".encode(), 0))
    try:
        for option, content in {**_OPTIONS, "mon_host": login.monitors, "key": login.key}.items():
            check(rados.rados_conf_set(session, option.encode(), content.encode()))
        if (code := rados.rados_connect(session)) < 0:
            raise Refused(-code, os.strerror(-code))
    except OSError:
        rados.rados_shutdown(session)
        raise
    _sessions[login.name] = login.key, session
    return session


def _end_session(name: tuple[str, str]) -> None:
    kept = _sessions.pop(name, None)
    if kept is not None:
        library().rados_shutdown(kept[1])


# --- the cluster -----------------------------------------------------------------------------------------------------


def uuid(session: Session) -> str:
    """The cluster's fsid."""
    into = ctypes.create_string_buffer(_FSID_BYTES)
    check(library().rados_cluster_fsid(session, into, _FSID_BYTES))
    return into.value.decode()


def pools(session: Session) -> Sequence[str]:
    """The names of its pools."""
    size = check(library().rados_pool_list(session, None, 0))
    into = ctypes.create_string_buffer(size)
    check(library().rados_pool_list(session, into, size))
    return [name.decode(errors="replace") for name in into.raw.split(b"\0") if name]


def pool_name(session: Session, number: int) -> str:
    """The name of the pool with that number."""
    into = ctypes.create_string_buffer(_SOME_BYTES)
    check(library().rados_pool_reverse_lookup(session, number, into, len(into)))
    return into.value.decode()


def command(session: Session, words: Mapping[str, object]) -> bytes:
    """What the monitors answer to a command; `ceph --verbose` shows the words of each."""
    rados, said, status = library(), c_void_p(), c_void_p()
    said_size, status_size = c_size_t(), c_size_t()
    wanted = (c_char_p * 1)(json.dumps(words).encode())
    code = rados.rados_mon_command(
        session, wanted, 1, None, 0, byref(said), byref(said_size), byref(status), byref(status_size)
    )
    try:
        if code < 0:
            text = ctypes.string_at(status, status_size.value).decode(errors="replace") if status.value else ""
            raise OSError(-code, text or os.strerror(-code))
        return ctypes.string_at(said, said_size.value) if said.value else b""
    finally:
        for each in (said, status):
            if each.value:
                rados.rados_buffer_free(each)


# --- objects ---------------------------------------------------------------------------------------------------------


@contextmanager
def opened_pool(session: Session, where: Where) -> Iterator[c_void_p]:
    """The pool for as long as the block takes. Raises NoPool."""
    rados, pool = library(), c_void_p()
    code = rados.rados_ioctx_create(session, where.pool.encode(), byref(pool))
    if code == -errno.ENOENT:
        raise NoPool(errno.ENOENT, where.pool)
    check(code)
    try:
        rados.rados_ioctx_set_namespace(pool, where.namespace.encode())
        rados.rados_set_pool_full_try(pool)  # a full pool is an error at once, and no wait without end
        yield pool
    finally:
        rados.rados_ioctx_destroy(pool)


def get(session: Session, where: Where, name: str) -> bytes | None:
    """All of an object, as it is at one moment; None where it is absent."""
    size = _SOME_BYTES
    with suppress(FileNotFoundError), opened_pool(session, where) as pool:
        while True:
            into = ctypes.create_string_buffer(size)
            found = check(library().rados_read(pool, name.encode(), into, size, 0))
            if found < size:
                return into.raw[:found]
            size *= 4
    return None


def has(session: Session, where: Where, name: str) -> bool:
    """Whether an object is there."""
    with suppress(FileNotFoundError), opened_pool(session, where) as pool:
        check(library().rados_stat(pool, name.encode(), byref(c_uint64()), byref(c_int64())))
        return True
    return False


def append(session: Session, where: Where, name: str, content: bytes) -> None:
    """Lengthen an object, or make it, in one step that is done or is not; in a pool that is full too.

    It is a line of a log, and without it nothing could be removed from such a pool, nor given to another node.
    """
    with _changed(session, where, name, _FULL_FORCE) as change:
        library().rados_write_op_append(change, content, len(content))


def touch(session: Session, where: Where, name: str) -> None:
    """Have an object there, empty if it is not; in a pool that is full too."""
    with _changed(session, where, name, _FULL_FORCE) as change:
        library().rados_write_op_create(change, _IF_ABSENT, None)


def put(session: Session, where: Where, name: str, content: bytes) -> None:
    """Replace an object's content, in one step."""
    with opened_pool(session, where) as pool:
        check(library().rados_write_full(pool, name.encode(), content, len(content)))


def drop(session: Session, where: Where, name: str) -> None:
    """Remove an object; absent is fine."""
    with suppress(FileNotFoundError), opened_pool(session, where) as pool:
        check(library().rados_remove(pool, name.encode()))


def keys(session: Session, where: Where, name: str) -> Sequence[str]:
    """The keys of an object's map, sorted."""
    found, more = list[bytes](), True
    with suppress(FileNotFoundError), opened_pool(session, where) as pool:
        while more:
            page, more = _page(pool, name, found[-1] if found else b"")
            found += page
    return sorted(key.decode() for key in found)


def _page(pool: c_void_p, name: str, after: bytes) -> tuple[Sequence[bytes], bool]:
    """Keys behind `after`, and whether there are more."""
    rados, entries, more, code = library(), c_void_p(), c_ubyte(), c_int()
    with _operation(rados.rados_create_read_op, rados.rados_release_read_op) as reading, _ended(entries):
        rados.rados_read_op_omap_get_keys2(reading, after, _SOME_KEYS, byref(entries), byref(more), byref(code))
        check(rados.rados_read_op_operate(reading, pool, name.encode(), 0))
        check(code.value)
        return [key for key, _ in _pairs(entries)], bool(more.value)


def value(session: Session, where: Where, name: str, key: str) -> str | None:
    """A value of an object's map; None where there is none."""
    rados, entries, code = library(), c_void_p(), c_int()
    wanted, sizes = _array(key)
    with (
        suppress(FileNotFoundError),
        opened_pool(session, where) as pool,
        _operation(rados.rados_create_read_op, rados.rados_release_read_op) as reading,
        _ended(entries),
    ):
        rados.rados_read_op_omap_get_vals_by_keys2(reading, wanted, 1, sizes, byref(entries), byref(code))
        check(rados.rados_read_op_operate(reading, pool, name.encode(), 0))
        check(code.value)
        return next((content.decode() for _, content in _pairs(entries)), None)
    return None


def set_value(session: Session, where: Where, name: str, key: str, content: str) -> None:
    """Set a value of an object's map, which is made if it is absent."""
    (wanted, sizes), (contents, content_sizes) = _array(key), _array(content)
    with _changed(session, where, name) as change:
        library().rados_write_op_omap_set2(change, wanted, contents, sizes, content_sizes, 1)


def drop_value(session: Session, where: Where, name: str, key: str, only: str | None = None) -> None:
    """Remove a value of an object's map, in one step only if it is `only`; absent or another one is fine."""
    rados = library()
    wanted, sizes = _array(key)
    with (
        suppress(FileNotFoundError),
        opened_pool(session, where) as pool,
        _operation(rados.rados_create_write_op, rados.rados_release_write_op) as change,
    ):
        if only is not None:
            text, kept = key.encode(), only.encode()
            rados.rados_write_op_omap_cmp2(change, text, _EQUAL, kept, len(text), len(kept), None)
        rados.rados_write_op_omap_rm_keys2(change, wanted, sizes, 1)
        code = rados.rados_write_op_operate(change, pool, name.encode(), None, 0)
        if only is None or code != -errno.ECANCELED:
            check(code)


# --- the binding -----------------------------------------------------------------------------------------------------


def check(code: int) -> int:
    """What a function returned, or the error that it is."""
    if code < 0:
        raise OSError(-code, os.strerror(-code))
    return code


@contextmanager
def declaring(name: str) -> Iterator[ctypes.CDLL]:
    """A library of Ceph's, whose functions the block declares. Raises FailedPrecondition."""
    try:
        yield ctypes.CDLL(name)
    except OSError as error:
        raise FailedPrecondition(f"{name} cannot be loaded ({error}); install the package librbd1") from None
    except AttributeError as error:
        raise FailedPrecondition(f"{name} is too old ({error}); install librbd1 of Ceph 16 or newer") from None


@cache
def library() -> ctypes.CDLL:
    """librados, loaded once. Raises FailedPrecondition."""
    with declaring("librados.so.2") as rados:
        _declare(rados)
    return rados


def _declare(rados: ctypes.CDLL) -> None:
    rados.rados_create_read_op.restype = rados.rados_create_write_op.restype = c_void_p
    # Of those that take a number: without it one is passed as a C int.
    rados.rados_create2.argtypes = (c_void_p, c_char_p, c_char_p, c_uint64)
    rados.rados_mon_command.argtypes = (
        c_void_p, c_void_p, c_size_t, c_char_p, c_size_t, c_void_p, c_void_p, c_void_p, c_void_p,
    )  # fmt: skip
    rados.rados_pool_list.argtypes = (c_void_p, c_char_p, c_size_t)
    rados.rados_pool_reverse_lookup.argtypes = (c_void_p, c_int64, c_char_p, c_size_t)
    rados.rados_cluster_fsid.argtypes = (c_void_p, c_char_p, c_size_t)
    rados.rados_read.argtypes = (c_void_p, c_char_p, c_char_p, c_size_t, c_uint64)
    rados.rados_write_op_create.argtypes = (c_void_p, c_int, c_char_p)
    rados.rados_write_op_append.argtypes = (c_void_p, c_char_p, c_size_t)
    rados.rados_write_full.argtypes = (c_void_p, c_char_p, c_char_p, c_size_t)
    rados.rados_read_op_omap_get_keys2.argtypes = (c_void_p, c_char_p, c_uint64, c_void_p, c_void_p, c_void_p)
    rados.rados_read_op_omap_get_vals_by_keys2.argtypes = (c_void_p, c_void_p, c_size_t, c_void_p, c_void_p, c_void_p)
    rados.rados_write_op_omap_set2.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_size_t)
    rados.rados_write_op_omap_cmp2.argtypes = (c_void_p, c_char_p, c_ubyte, c_char_p, c_size_t, c_size_t, c_void_p)
    rados.rados_write_op_omap_rm_keys2.argtypes = (c_void_p, c_void_p, c_void_p, c_size_t)


@contextmanager
def _operation(create: Callable[[], int], release: Callable[[c_void_p], None]) -> Iterator[c_void_p]:
    operation = c_void_p(create())
    try:
        yield operation
    finally:
        release(operation)


@contextmanager
def _changed(session: Session, where: Where, name: str, flags: int = 0) -> Iterator[c_void_p]:
    """A change of an object, which the block says; made behind it, in one step that is done or is not."""
    rados = library()
    with (
        opened_pool(session, where) as pool,
        _operation(rados.rados_create_write_op, rados.rados_release_write_op) as change,
    ):
        yield change
        check(rados.rados_write_op_operate(change, pool, name.encode(), None, flags))


@contextmanager
def _ended(entries: c_void_p) -> Iterator[None]:
    try:
        yield
    finally:
        if entries.value:
            library().rados_omap_get_end(entries)


def _pairs(entries: c_void_p) -> Iterator[tuple[bytes, bytes]]:
    """The entries of a map, which need not be text that ends with NUL."""
    while True:
        key, content, key_size, content_size = c_void_p(), c_void_p(), c_size_t(), c_size_t()
        sizes = byref(key_size), byref(content_size)
        check(library().rados_omap_get_next2(entries, byref(key), byref(content), *sizes))
        if key.value is None:
            return
        yield ctypes.string_at(key, key_size.value), ctypes.string_at(content, content_size.value)


def _array(text: str) -> tuple[Any, Any]:
    """An array of that one text, and one of its length."""
    content = text.encode()
    return (c_char_p * 1)(content), (c_size_t * 1)(len(content))
