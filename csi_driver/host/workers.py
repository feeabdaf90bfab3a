"""Worker processes: everything that can touch a volume's device or key runs in one.

The server starts one launcher (`csi_driver.host.launcher`), a small single-threaded process that forks workers. For
each session, the length of one call of the driver, it gives out a worker that serves nobody else meanwhile and inherits
the volume locks of the call, so a volume stays locked as long as a worker of a killed server is at work on it. Devices
come with each request, as open descriptors (`csi_driver.host.handle`): while the worker works on one, that one cannot
become another. A worker that hangs on a device (state D) costs an error, never a thread of the server.
"""

import contextlib
import io
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import ParamSpec, Protocol, TypeVar, cast

from csi_driver.host.handle import Handle
from csi_driver.host.held import held_descriptors, starting
from csi_driver.model.errors import CommandFailed, DeadlineExceeded, DriverError

P = ParamSpec("P")
R = TypeVar("R")

MESSAGE_BYTES = 128 * 1024
MOST_DESCRIPTORS = 16
END = b"end"
_KILL_GRACE_SECONDS = 2.0
_START_SECONDS = 30.0


class _Packer(pickle.Pickler):
    """Leaves the descriptors of handles out: they go beside the message."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.descriptors: list[int] = []

    def persistent_id(self, obj: object) -> tuple[int, str] | None:
        """A handle becomes the place of its descriptor, and its name."""
        if not isinstance(obj, Handle):
            return None
        self.descriptors.append(obj.fd)
        return len(self.descriptors) - 1, obj.name


class _Unpacker(pickle.Unpickler):
    """Makes handles of descriptors that came beside the message."""

    def __init__(self, message: bytes, descriptors: Sequence[int]) -> None:
        super().__init__(io.BytesIO(message))
        self._descriptors = descriptors

    def persistent_load(self, pid: tuple[int, str]) -> Handle:
        """The handle of what `_Packer` left out."""
        place, name = pid
        return Handle(self._descriptors[place], name)


def pack(request: object) -> tuple[bytes, list[int]]:
    """A request as bytes, and the descriptors that must go with it."""
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(request)
    return file.getvalue(), packer.descriptors


def unpack(message: bytes, descriptors: Sequence[int]) -> object:
    """The request that `pack` made, from our own parent over a private socket."""
    return _Unpacker(message, descriptors).load()


class LauncherProcess(Protocol):
    """The running launcher, as `subprocess.Popen` shows it."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


def spawn_launcher(control: socket.socket, warm: Sequence[str]) -> LauncherProcess:
    """Start a launcher that serves `control`; returns before it is ready."""
    return subprocess.Popen(
        [sys.executable, "-m", "csi_driver.host.launcher", str(control.fileno()), *warm],
        pass_fds=(control.fileno(),),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


class Workers:
    """Client of the launcher; safe for many threads.

    `warm` names what the launcher loads ahead: modules, or functions without arguments as "module:function".
    """

    def __init__(
        self, warm: Sequence[str], spawn: Callable[[socket.socket, Sequence[str]], LauncherProcess] = spawn_launcher
    ) -> None:
        self._warm = tuple(warm)
        self._spawn = spawn
        self._guard = threading.Lock()
        self._launcher: LauncherProcess | None = None
        self._control: socket.socket | None = None
        self._session: ContextVar[_Session | None] = ContextVar("worker_session", default=None)

    def start(self) -> None:
        """Start the launcher if it does not run; returns before it is ready."""
        with self._guard:
            if self._launcher is not None and self._launcher.poll() is None:
                return
            if self._control is not None:
                self._control.close()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs, starting():
                self._launcher = self._spawn(theirs, self._warm)
            self._control = ours

    def stop(self) -> None:
        """End the launcher; workers that are still at work end by themselves."""
        with self._guard:
            if self._control is not None:
                self._control.close()
                self._control = None
            if self._launcher is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._launcher.wait(_KILL_GRACE_SECONDS)
                if self._launcher.poll() is None:
                    self._launcher.kill()
                    self._launcher.wait(_KILL_GRACE_SECONDS)
                self._launcher = None

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Let all calls of the block run in one worker, which inherits the locks held now."""
        session = _Session(self._launch)
        token = self._session.set(session)
        try:
            yield
        finally:
            self._session.reset(token)
            session.close()

    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `function` in a worker for at most `timeout` seconds and return its result.

        `function` is a module's function or a method of an object without state; `what` names the work in errors, its
        first word the process. Arguments and result travel pickled over a private socket, the descriptor of a Handle
        among the arguments with them; the worker has it until the function returns. Raises what the function raised
        (DriverError, OSError), DeadlineExceeded when the worker had to be killed, CommandFailed when it died.
        """
        session = self._session.get()
        if session is not None:
            return cast("R", session.call(what, timeout, *pack((what, function, args, kwargs))))
        with self.session():
            return self.call(what, timeout, function, *args, **kwargs)

    def _launch(self) -> socket.socket:
        """Ask for a worker; returns our end of its session."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            for _ in range(2):
                self.start()
                control = self._control
                try:
                    if control is not None:
                        socket.send_fds(control, [b"worker"], [theirs.fileno(), *held_descriptors()])
                        return ours
                except OSError:
                    # The launcher was killed; a new one serves as well, as it holds no state.
                    if self._launcher is not None:
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            self._launcher.wait(_KILL_GRACE_SECONDS)
        ours.close()
        raise CommandFailed("no worker process can be started: the launcher does not run; restart the driver")


class _Session:
    """One worker, from the first call to `close`; after a killed one the next call gets a new one."""

    def __init__(self, launch: Callable[[], socket.socket]) -> None:
        self._launch = launch
        self._socket: socket.socket | None = None
        self._pidfd: int | None = None

    def call(self, what: str, timeout: float, request: bytes, descriptors: Sequence[int]) -> object:
        """Send one request and wait for its answer."""
        if self._socket is None:
            self._start(what)
        with contextlib.suppress(ConnectionError):  # a worker that died tells by the end of its socket
            socket.send_fds(self._connected, [request], descriptors)
        if not self._readable(self._connected.fileno(), timeout):
            raise self._killed(what)
        try:
            message = self._connected.recv(MESSAGE_BYTES)
        except ConnectionResetError:  # it died before it had read the request
            message = b""
        if not message:
            self._abandon()
            raise CommandFailed(f"{what} failed: its worker process was killed before it could answer; call again")
        succeeded, outcome = pickle.loads(message)  # noqa: S301 -- from our own child, over a private socket
        if succeeded:
            return outcome
        if isinstance(outcome, DriverError | OSError):
            raise outcome
        raise CommandFailed(f"{what} failed: {outcome}")

    def close(self) -> None:
        """End the session; returns when the worker no longer holds the volume locks."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.send(END)
                if self._readable(self._socket.fileno(), _KILL_GRACE_SECONDS):
                    self._socket.recv(MESSAGE_BYTES)
            self._abandon()

    @property
    def _connected(self) -> socket.socket:
        if self._socket is None:
            raise CommandFailed("the worker session has ended")
        return self._socket

    def _start(self, what: str) -> None:
        self._socket = self._launch()
        if not self._readable(self._socket.fileno(), _START_SECONDS):
            self._abandon()
            raise DeadlineExceeded(f"{what} did not start in time: the node is overloaded; the call may be repeated")
        message, descriptors, _, _ = socket.recv_fds(self._socket, MESSAGE_BYTES, 1)
        if not message:
            self._abandon()
            raise CommandFailed(f"{what} failed: the worker launcher was killed; call again")
        self._pidfd = descriptors[0]

    def _killed(self, what: str) -> DeadlineExceeded:
        pidfd, self._pidfd = self._pidfd, None
        self._abandon()
        if pidfd is None:
            return DeadlineExceeded(f"{what} did not end within its time limit")
        try:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if self._readable(pidfd, _KILL_GRACE_SECONDS):
                return DeadlineExceeded(f"{what} did not end within its time limit and was killed")
        finally:
            os.close(pidfd)
        return DeadlineExceeded(
            f"{what} did not end within its time limit and cannot be killed: the device does not answer; "
            f"look at the kernel log and the storage below it"
        )

    def _abandon(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    @staticmethod
    def _readable(descriptor: int, timeout: float) -> bool:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        return bool(poller.poll(timeout * 1000))
