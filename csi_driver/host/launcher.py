"""The process that forks workers; started by `csi_driver.host.workers.Workers` with its control socket's number.

A message on the control socket asks for one worker; attached are the session's socket and the volume locks to inherit.
What the worker does (functions, arguments, secrets) it reads from the session's socket: the launcher never sees it.
A worker serves one session at a time and may serve another when it has ended: a fresh fork pays for every page that it
touches, several times what opening a mapping costs.
"""

import contextlib
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from csi_driver.host import keyring
from csi_driver.host.hardening import harden_process
from csi_driver.host.held import holding
from csi_driver.host.workers import END, MESSAGE_BYTES, MOST_DESCRIPTORS, unpack
from csi_driver.model.errors import DriverError

_MOST_IDLE = 2


def main(arguments: list[str]) -> int:
    """Serve until the server closes its end of the control socket. Arguments: its number, then what to warm up."""
    control = socket.socket(fileno=int(arguments[0]))
    harden_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the server's to handle
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the workers
    for name in arguments[1:]:
        module, _, function = name.partition(":")
        loaded = importlib.import_module(module)
        if function:
            getattr(loaded, function)()
    gc.freeze()  # keeps the collector from unsharing the memory of every worker
    _Launcher(control).run()
    return 0


@dataclass(frozen=True)
class _Worker:
    """A forked worker: the handle by which the server may kill it, and the socket on which it gets sessions."""

    pidfd: int
    door: socket.socket

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone, killed for its memory perhaps (pidfd_open(2))."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return bool(poller.poll(0))

    def dismiss(self) -> None:
        """Let go of it; an idle one ends."""
        os.close(self.pidfd)
        self.door.close()


class _Launcher:
    """Keeps the workers; the one that worked last is taken first, as its memory is its own already."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._poller = select.poll()
        self._poller.register(control, select.POLLIN)
        self._workers: dict[int, _Worker] = {}
        self._idle: list[_Worker] = [self._fork(())]

    def run(self) -> None:
        """Serve until the server closes its end of the control socket."""
        while True:
            for descriptor, _ in self._poller.poll():
                if descriptor != self._control.fileno():
                    self._hear(self._workers[descriptor])
                    continue
                request, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE_BYTES, MOST_DESCRIPTORS)
                if not request:
                    return
                self._give(descriptors)

    def _hear(self, worker: _Worker) -> None:
        """A worker says that its session has ended, or has ended itself."""
        with contextlib.suppress(ConnectionResetError):  # it was killed with a session unread
            if worker.door.recv(MESSAGE_BYTES) and len(self._idle) < _MOST_IDLE:
                self._idle.append(worker)
                return
        if worker in self._idle:
            self._idle.remove(worker)
        self._poller.unregister(worker.door)
        del self._workers[worker.door.fileno()]
        worker.dismiss()

    def _give(self, descriptors: Sequence[int]) -> None:
        """Give a session to a worker, close our copies, then tell the server.

        The order matters: the server sends its first request, and may end the session, only when no copy of a lock is
        left here that would outlive the session.
        """
        while self._idle and self._idle[-1].has_ended:
            self._idle.pop()  # its door tells so too, later
        worker = self._idle.pop() if self._idle else self._fork(descriptors)
        with contextlib.suppress(OSError):  # a worker that was killed tells by the end of its session
            socket.send_fds(worker.door, [b"session"], list(descriptors))
        session, *locks = descriptors
        for lock in locks:
            os.close(lock)
        with socket.socket(fileno=session) as server, contextlib.suppress(OSError):
            socket.send_fds(server, [b"started"], [worker.pidfd])

    def _fork(self, received: Sequence[int]) -> _Worker:
        """Fork a worker; `received` are descriptors of a session that it must not have by inheritance."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            self._control.close()
            ours.close()
            for descriptor in received:
                os.close(descriptor)
            for other in self._workers.values():
                other.dismiss()
            _work(theirs)
        theirs.close()
        worker = _Worker(os.pidfd_open(pid), ours)
        self._workers[ours.fileno()] = worker
        self._poller.register(ours, select.POLLIN)
        return worker


def _work(door: socket.socket) -> NoReturn:
    """Serve sessions until the launcher, and with it the server, is gone."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        while True:
            _set_name("luks-idle")
            request, descriptors, _, _ = socket.recv_fds(door, MESSAGE_BYTES, MOST_DESCRIPTORS)
            if not request:
                break
            session, *locks = descriptors
            with socket.socket(fileno=session) as server:
                _serve(server, locks)
            door.send(END)
        code = 0
    except OSError:
        pass  # the server is gone: there is nobody to answer to
    finally:
        os._exit(code)


def _serve(server: socket.socket, locks: Sequence[int]) -> None:
    try:
        with holding(*locks):
            while True:
                request, descriptors, _, _ = socket.recv_fds(server, MESSAGE_BYTES, MOST_DESCRIPTORS)
                if request in (b"", END):
                    break
                answer = pickle.dumps(_answer(request, descriptors))
                with contextlib.suppress(BrokenPipeError):  # a killed server hears no answer
                    server.send(answer)
    finally:
        keyring.clear_thread()  # a volume key must not outlive its session here
        for lock in locks:
            os.close(lock)
    with contextlib.suppress(BrokenPipeError):
        server.send(END)  # the server may lock the volume again at once


def _answer(request: bytes, descriptors: Sequence[int]) -> tuple[bool, object]:
    try:
        with holding(*descriptors):
            what, function, args, kwargs = cast(
                "tuple[str, Callable[..., object], Any, Any]", unpack(request, descriptors)
            )
            _set_name(what.partition(" ")[0])
            return True, function(*args, **kwargs)
    except (DriverError, OSError) as error:
        return False, error
    except Exception as error:  # noqa: BLE001 -- a worker answers whatever happens
        # Only the type: the text of an unforeseen error may quote its arguments, and those may be secret.
        return False, f"unforeseen {type(error).__name__}"
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _set_name(name: str) -> None:
    Path("/proc/self/comm").write_text(name[:15])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
