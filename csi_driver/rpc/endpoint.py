"""Where the server listens: its unix socket, who may use it and whose it is; and how addresses are written."""

import contextlib
import fcntl
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from csi_driver.model.errors import DeviceInUse, FailedPrecondition, InvalidArgument

_LONGEST_SOCKET_NAME = 107  # sun_path of unix(7), less the closing NUL
_ANSWER_SECONDS = 2.0
_START_SECONDS = 15.0
_PAUSE = 0.05
_SCHEME = "unix:"


def endpoint_path(text: str) -> Path:
    """Read an endpoint: /path, unix:/path or unix:///path. Raises InvalidArgument."""
    path = text.removeprefix(_SCHEME)
    if path.startswith("//"):
        path = "/" + path.lstrip("/") if path.startswith("///") else ""
    found = Path(path)
    if not found.is_absolute() or not found.name or ".." in found.parts:
        raise InvalidArgument(f"the endpoint is {text!r}; it must be the absolute path of a unix socket")
    if len(os.fsencode(_newcomer(found))) > _LONGEST_SOCKET_NAME:
        most = _LONGEST_SOCKET_NAME - len(os.fsencode(_newcomer(found))) + len(os.fsencode(found))
        raise InvalidArgument(f"the endpoint {found} is too long for a unix socket; use at most {most} bytes")
    return found


def host_and_port(text: str) -> tuple[str, int]:
    """Read host:port, [IPv6]:port or :port, the host "" for all of IPv4. Raises InvalidArgument."""
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if (
        not colon
        or not re.fullmatch(r"[0-9]{1,5}", port)
        or not 0 < int(port) < 1 << 16
        or (":" in bare) != (bare != host)
    ):
        raise InvalidArgument(f"the address is {text!r}; it must be host:port, such as 127.0.0.1:9090 or [::1]:9090")
    return bare, int(port)


def address_of(path: Path) -> str:
    """The socket as grpcio names it."""
    return _SCHEME + quote(str(path))


class Listener(Protocol):
    """What is needed of a gRPC server here; grpcio itself is slow to load."""

    def add_insecure_port(self, address: str) -> int: ...

    def start(self) -> None: ...


def listen_on(server: Listener, path: Path) -> None:
    """Let a server listen on the socket `path` and start it. Raises RuntimeError, as grpcio does, if that cannot be."""
    server.add_insecure_port(address_of(path))
    server.start()


class Endpoint:
    """A listening socket at `path`, from `place` to `remove`.

    grpcio would take that of another server, which takes its own away again (findings/grpcio-stop-removes-socket.sh).

    Another server that is just starting in the folder, as the registrations of several drivers do at a node's boot, is
    waited for `start_seconds`.
    """

    def __init__(self, path: Path, start_seconds: float = _START_SECONDS) -> None:
        self._path = path
        self._start_seconds = start_seconds
        self._identity: tuple[int, int] | None = None

    def place(self, listen: Callable[[Path], None]) -> None:
        """Let `listen` make its socket and put it at the path; only root may connect, from the first moment on.

        A socket on which nobody answers is replaced. Raises DeviceInUse when somebody does, FailedPrecondition when
        the path cannot be used.
        """
        newcomer = _newcomer(self._path)
        try:
            self._path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            with _alone_in(self._path.parent, self._start_seconds):
                self._refuse_taken()
                # Made under another name, so that whoever finds a socket at the path finds one that is being served.
                newcomer.unlink(missing_ok=True)
                mask = os.umask(0o177)
                try:
                    listen(newcomer)
                finally:
                    os.umask(mask)
                newcomer.rename(self._path)
            made = self._path.lstat()
        except OSError as error:
            raise FailedPrecondition(
                f"the endpoint {self._path} cannot be made ({error.strerror}); choose a path in a writable folder"
            ) from None
        except RuntimeError:
            raise FailedPrecondition(
                f"the endpoint {self._path} cannot be made: nothing can listen in its folder; choose a path on a file "
                f"system that holds sockets"
            ) from None
        self._identity = (made.st_dev, made.st_ino)

    def remove(self) -> None:
        """Take the socket away, unless another one stands there by now; repeating is fine."""
        with contextlib.suppress(FileNotFoundError):
            found = self._path.lstat()
            if (found.st_dev, found.st_ino) == self._identity:
                self._path.unlink()
        self._identity = None

    def _refuse_taken(self) -> None:
        try:
            kind = self._path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(kind):
            raise FailedPrecondition(f"the endpoint {self._path} exists and is no socket; remove it or choose another")
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(_ANSWER_SECONDS)
            try:
                peer.connect(str(self._path))
            except ConnectionRefusedError:
                return
            except (TimeoutError, BlockingIOError):
                pass  # a queue that is full has an owner
        raise DeviceInUse(
            f"another server answers on the endpoint {self._path}; stop that one first or choose another endpoint"
        )


def _newcomer(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


@contextlib.contextmanager
def _alone_in(folder: Path, seconds: float) -> Iterator[None]:
    """Keep two servers that start at once from replacing each other's socket."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + seconds
        while not _locked(descriptor):
            if time.monotonic() > deadline:
                raise DeviceInUse(f"another server is just starting in {folder}; try again when it has started")
            time.sleep(_PAUSE)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
