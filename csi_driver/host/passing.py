"""A block device handed on as an open descriptor over a unix socket (SCM_RIGHTS, unix(7)), from root to root.

One message for each connection, with the descriptor and words about it. What is handed on stays what it is when who
handed it on has ended.
"""

import contextlib
import errno
import json
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, Self

from csi_driver.host.blockdev import kind
from csi_driver.host.handle import Handle
from csi_driver.host.log import log
from csi_driver.host.syscalls import error_name
from csi_driver.model.errors import Aborted, CommandFailed, DeadlineExceeded, DeviceMismatch, PermissionDenied

_LARGEST: Final = 4096
_CREDENTIALS: Final = struct.Struct("=iII")  # pid, uid, gid: SO_PEERCRED of unix(7)
_SECONDS: Final = 5.0
_WAITING: Final = 16

Peer = Callable[[socket.socket], int]
"""The user id of who is at the other end."""


def peer_uid(connection: socket.socket) -> int:
    """Who is at the other end, as the kernel tells it."""
    answer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(answer)[1])


class Passing:
    """Hands `device` on to every root that connects to the socket at `path`; `words` go with it.

    A context manager: the socket is there while it is open, in place of one that an earlier process left. It is made
    aside and renamed: who connects meets the new one or the old one.
    """

    def __init__(self, path: Path, device: Handle, words: Mapping[str, str], peer: Peer = peer_uid) -> None:
        self._path = path
        self._device = device
        self._words = json.dumps(dict(words)).encode()
        self._peer = peer
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._thread = threading.Thread(target=self._serve, name="passing", daemon=True)
        self._inode = 0

    def __enter__(self) -> Self:
        fresh = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()
        with _within(fresh.parent) as folder:
            self._socket.bind(f"{folder}/{fresh.name}")
        os.chmod(fresh, 0o600)
        self._socket.listen(_WAITING)
        self._inode = fresh.stat().st_ino
        os.rename(fresh, self._path)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:  # not one that has taken its place
                self._path.unlink()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # it was closed
            with connection:
                try:
                    connection.settimeout(_SECONDS)
                    if (user := self._peer(connection)) != 0:
                        log.warning("a device was refused to somebody who is not root", user=user)
                        continue
                    socket.send_fds(connection, [self._words], [self._device.fd])
                except OSError as error:
                    log.warning("a device could not be handed on", error=error_name(error))


def remove_dead(path: Path) -> None:
    """Remove a socket that nobody answers at, as a process leaves it that lost its power; one that comes now stays."""
    if _answers(path):
        return
    aside = path.with_name(f".{path.name}.gone")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if _answers(aside):  # it took the place of the dead one in between
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking, _within(path.parent) as folder:
        asking.settimeout(_SECONDS)
        try:
            asking.connect(f"{folder}/{path.name}")
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # in doubt it stays
    return True


def receive(path: Path, what: str, seconds: float = _SECONDS, peer: Peer = peer_uid) -> tuple[Handle, dict[str, str]]:
    """The block device that the socket at `path` hands on, and the words that came with it; `what` names it in errors.

    Raises Aborted where nobody is there, DeadlineExceeded, PermissionDenied (it is no root's socket), DeviceMismatch
    (what came is no block device), CommandFailed.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(seconds)
        try:
            with _within(path.parent) as folder:
                connection.connect(f"{folder}/{path.name}")
            if (user := peer(connection)) != 0:
                raise PermissionDenied(f"{what}: the socket {path} is user {user}'s and not root's; remove it")
            content, descriptors, flags, _ = socket.recv_fds(connection, _LARGEST, 4, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            raise DeadlineExceeded(f"{what}: who holds it does not answer at {path}; look at its log") from None
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE):
                raise Aborted(f"{what}: nobody holds it at {path} now; this is tried again") from None
            raise CommandFailed(f"{what}: the socket {path} failed: {error_name(error)}") from None
    try:
        return _checked(what, path, content, descriptors, flags)
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def _checked(
    what: str, path: Path, content: bytes, descriptors: list[int], flags: int
) -> tuple[Handle, dict[str, str]]:
    if not content and not descriptors:
        raise Aborted(f"{what}: who holds it at {path} ended just now; this is tried again")
    try:
        words = json.loads(content)
    except ValueError:
        words = None
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(descriptors) != 1 or not _are_words(words):
        raise CommandFailed(f"{what}: {path} answered with something that no holder of a device says")
    mode = os.fstat(descriptors[0]).st_mode
    if not stat.S_ISBLK(mode):
        raise DeviceMismatch(f"{what}: {path} is expected to hand on a block device and handed on a {kind(mode)}")
    return Handle(descriptors[0], str(path)), dict(words)


def _are_words(found: object) -> bool:
    return isinstance(found, dict) and all(isinstance(each, str) for each in (*found, *found.values()))


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[str]:
    """A short path of a folder: the name of a socket has 107 bytes at most (unix(7))."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
