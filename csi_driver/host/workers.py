"""Worker processes: everything that can touch a volume's device or key runs in one.

The server starts one launcher (`csi_driver.host.launcher`), a small single-threaded process that forks workers. A
worker serves one session at a time, the length of one call of the driver. With each request come the volume locks of
the call, so that a volume stays locked as long as a worker of a killed server is at work on it, and devices, as open
descriptors (`csi_driver.host.handle`): while the worker works on one, that one cannot become another. It has let go of
them all when it answers. A worker that hangs on a device (state D) costs an error, never a thread of the server. One
whose session has ended is kept for another: a fresh fork pays for every page that it touches, several times what
opening a mapping costs. What opens something that is dear to open, and starts threads perhaps, has workers apart, which
keep it (`Workers.apart`).
"""

import contextlib
import errno
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
from functools import partial
from itertools import chain
from typing import ParamSpec, Protocol, TypeVar, cast

from csi_driver.host.handle import Handle
from csi_driver.host.held import held_descriptors, starting
from csi_driver.model.errors import CommandFailed, DeadlineExceeded, DriverError, Unavailable

P = ParamSpec("P")
R = TypeVar("R")

# Below malloc's first threshold of 128 KiB, above which each receive maps and unmaps memory (mallopt(3)).
MESSAGE_BYTES = 124 * 1024
MOST_DESCRIPTORS = 16
WORD_BYTES = 16
NEW = b"new"
STARTED = b"started"
REFUSED = b"refused"
_MOST_IDLE = 2
_MOST_IDLE_APART = 8
_KILL_GRACE_SECONDS = 2.0
_START_SECONDS = 30.0
_LIMITS = (errno.EMFILE, errno.ENFILE)


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


class _Worker:
    """A worker process, by our end of its socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._pidfd: int | None = None
        self._stdin: int | None = None

    def await_start(self, what: str) -> None:
        """Wait until it runs, the first time. Raises DeadlineExceeded, CommandFailed."""
        if self._pidfd is not None:
            return
        if not _readable(self.connection.fileno(), _START_SECONDS):
            raise DeadlineExceeded(f"{what} did not start in time: the node is overloaded; the call may be repeated")
        word, descriptors, _, _ = socket.recv_fds(self.connection, WORD_BYTES, 2)
        self._pidfd, self._stdin = (*descriptors, None, None)[:2]
        if not word:
            raise CommandFailed(f"{what} failed: the worker launcher was killed; call again")
        if self._stdin is None:
            lacking = "descriptors of this process" if word == STARTED else "processes, descriptors or memory"
            raise CommandFailed(
                f"{what} failed: a limit of {lacking} is reached on this node; raise it, and call again"
            )

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone, killed for its memory perhaps (pidfd_open(2))."""
        return self._pidfd is not None and _readable(self._pidfd, 0)

    def kill(self) -> bool:
        """Kill it; whether it has ended then."""
        if self._pidfd is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        return _readable(self._pidfd, _KILL_GRACE_SECONDS)

    def left(self) -> str:
        """What to say of the programs that it ran, once it has ended; they are waited for.

        They are killed with it (PR_SET_PDEATHSIG, prctl(2)), and may be in a system call still that makes what is
        looked for after the error.
        """
        if self._stdin is None or _readable(self._stdin, _KILL_GRACE_SECONDS, 0):
            return ""
        return ", and what it ran has not ended yet: the device does not answer, look at the kernel log"

    def close(self) -> None:
        """Let go of it: it ends when it has ended what it is at."""
        self.connection.close()
        for descriptor in (self._pidfd, self._stdin):
            if descriptor is not None:
                os.close(descriptor)
        self._pidfd = self._stdin = None


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
        self._idle: dict[str, list[_Worker]] = {}
        self._session: ContextVar[_Session | None] = ContextVar("worker_session", default=None)

    def start(self) -> None:
        """Start the launcher if it does not run, with one worker; returns before they are ready."""
        with self._guard:
            if self._launcher is not None and self._launcher.poll() is None:
                return
            self._let_go()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs, starting():
                self._launcher = self._spawn(theirs, self._warm)
            self._control = ours
            with contextlib.suppress(OSError):  # it has ended already: who needs a worker is told
                self._idle[""] = [_new_worker(ours)]

    def stop(self) -> None:
        """End the launcher and the idle workers; those that are still at work end by themselves."""
        with self._guard:
            self._let_go()
            if self._launcher is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._launcher.wait(_KILL_GRACE_SECONDS)
                if self._launcher.poll() is None:
                    self._launcher.kill()
                    self._launcher.wait(_KILL_GRACE_SECONDS)
                self._launcher = None

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Let all calls of the block run in one worker."""
        with self.apart(""):
            yield

    @contextlib.contextmanager
    def apart(self, kind: str) -> Iterator[None]:
        """`session` in a worker that nobody has but those who ask for that kind: what it has open stays open."""
        session = _Session(partial(self._take, kind), partial(self._give_back, kind))
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
        (DriverError, OSError), DeadlineExceeded when the worker had to be killed, CommandFailed when it died,
        Unavailable at a limit of open files.
        """
        session = self._session.get()
        if session is not None:
            return cast("R", session.call(what, timeout, function, args, kwargs))
        with self.session():
            return self.call(what, timeout, function, *args, **kwargs)

    def dismiss(self, kind: str) -> None:
        """Let go of those of a kind that are idle, with all that they have open."""
        with self._guard:
            for worker in self._idle.pop(kind, []):
                worker.close()

    def _take(self, kind: str) -> _Worker:
        """An idle worker, the one that worked last, as its memory is its own already; or a new one."""
        for _ in range(2):
            self.start()
            with self._guard:
                idle = self._idle.get(kind)
                while idle:
                    if not (worker := idle.pop()).has_ended:
                        return worker
                    worker.close()
                control, launcher = self._control, self._launcher
            try:
                if control is not None:
                    return _new_worker(control)
            except OSError as error:
                if error.errno in _LIMITS:
                    raise Unavailable(
                        f"no worker process can be asked for: {error.strerror}; raise the limit of open files of the "
                        f"driver (ulimit -n) or of this node (fs.file-max), or call again later"
                    ) from None
            # The launcher was killed; a new one serves as well, as it holds no state.
            if launcher is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    launcher.wait(_KILL_GRACE_SECONDS)
        raise CommandFailed("no worker process can be started: the launcher does not run; restart the driver")

    def _give_back(self, kind: str, worker: _Worker) -> None:
        with self._guard:
            idle = self._idle.setdefault(kind, [])
            kept = self._control is not None and len(idle) < (_MOST_IDLE_APART if kind else _MOST_IDLE)
            if kept:
                idle.append(worker)
        if not kept:
            worker.close()

    def _let_go(self) -> None:
        """Of a launcher and its workers, whether they live or not."""
        if self._control is not None:
            self._control.close()
            self._control = None
        for worker in chain.from_iterable(self._idle.values()):
            worker.close()
        self._idle.clear()


class _Session:
    """One worker, from the first call to `close`; after a killed one the next call gets a new one."""

    def __init__(self, take: Callable[[], _Worker], give_back: Callable[[_Worker], None]) -> None:
        self._take = take
        self._give_back = give_back
        self._worker: _Worker | None = None

    def call(self, what: str, timeout: float, function: Callable[..., object], args: object, kwargs: object) -> object:
        """Send one request with the locks that are held, and wait for its answer."""
        request, descriptors = pack((what, function, args, kwargs))
        worker = self._worker or self._start(what)
        self._worker = None  # whatever ends this: who has not answered is asked for nothing else
        try:
            with contextlib.suppress(ConnectionError):  # a worker that died tells by the end of its socket
                socket.send_fds(worker.connection, [request], [*descriptors, *held_descriptors()])
            message = _answer_of(worker, what, timeout)
        except DriverError:
            worker.close()
            raise
        except BaseException:  # an interrupt: nothing is to work on beside what is undone now
            worker.kill()
            worker.left()
            worker.close()
            raise
        self._worker = worker
        succeeded, outcome = pickle.loads(message)  # noqa: S301 -- from our own child, over a private socket
        if succeeded:
            return outcome
        if isinstance(outcome, DriverError | OSError):
            raise outcome
        raise CommandFailed(f"{what} failed: {outcome}")

    def close(self) -> None:
        """End the session: the worker waits for another one."""
        worker, self._worker = self._worker, None
        if worker is not None:
            self._give_back(worker)

    def _start(self, what: str) -> _Worker:
        worker = self._take()
        try:
            worker.await_start(what)
        except BaseException:
            worker.close()
            raise
        return worker


def _answer_of(worker: _Worker, what: str, timeout: float) -> bytes:
    """What it answers. Raises DeadlineExceeded when it was killed for its time, CommandFailed when it died."""
    if not _readable(worker.connection.fileno(), timeout):
        if worker.kill():
            raise DeadlineExceeded(f"{what} did not end within its time limit and was killed{worker.left()}")
        raise DeadlineExceeded(
            f"{what} did not end within its time limit and cannot be killed: the device does not answer; look at the "
            f"kernel log and the storage below it"
        )
    message = b""
    with contextlib.suppress(ConnectionResetError):  # it died before it had read the request
        message = worker.connection.recv(MESSAGE_BYTES)
    if not message:
        raise CommandFailed(
            f"{what} failed: its worker process was killed before it could answer{worker.left()}; call again"
        )
    return message


def _new_worker(control: socket.socket) -> _Worker:
    """Ask the launcher for a worker. Raises OSError when it is gone, or at a limit of open files."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs:
            socket.send_fds(control, [NEW], [theirs.fileno()])
    except OSError:
        ours.close()
        raise
    return _Worker(ours)


def _readable(descriptor: int, timeout: float, events: int = select.POLLIN) -> bool:
    """Whether it is, or its other end is closed; without `events` only that."""
    poller = select.poll()
    poller.register(descriptor, events)
    return bool(poller.poll(timeout * 1000))
