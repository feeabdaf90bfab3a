"""The process that forks workers; started by `csi_driver.host.workers.Workers` with its control socket's number.

A message on the control socket asks for one worker; attached is the worker's end of its socket. What the worker does
(functions, arguments, secrets, devices, locks) it reads from there: the launcher never sees it.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn, cast

from csi_driver.host import keyring
from csi_driver.host.hardening import harden_process
from csi_driver.host.held import holding
from csi_driver.host.syscalls import libc
from csi_driver.host.workers import MESSAGE_BYTES, MOST_DESCRIPTORS, REFUSED, STARTED, WORD_BYTES, unpack
from csi_driver.model.errors import DriverError, FailedPrecondition

_PR_SET_NAME: Final = 15
_IDLE: Final = "luks-idle"
_STDIN: Final = 0


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
    serve(control)
    return 0


def serve(control: socket.socket) -> None:
    """Fork workers until the server closes its end of the control socket."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, WORD_BYTES, 1)
        if not request:
            return
        with socket.socket(fileno=descriptors[0]) as server:
            try:
                _fork(control, server)
            except OSError:  # a limit: the next one may get what ends meanwhile; or the server has given this one up
                with contextlib.suppress(OSError):
                    server.send(REFUSED)


def _fork(control: socket.socket, server: socket.socket) -> None:
    """Fork a worker; the server gets its pidfd, and the other end of its standard input.

    What it runs has the same standard input, and keeps it: lvm(8) closes all descriptors but the first three. It reads
    nothing there, and the server sees when the last of them has ended.
    """
    told, stdin = socket.socketpair()
    with told, stdin:
        told.shutdown(socket.SHUT_WR)
        if (pid := os.fork()) == 0:
            try:
                os.dup2(stdin.fileno(), _STDIN)
                for ours in (control, told, stdin):
                    ours.close()
                _work(server)
            finally:
                os._exit(1)  # whatever happens: two would serve the same socket
        # An error here ends the worker too: the server closes its socket.
        pidfd = os.pidfd_open(pid)
        try:
            socket.send_fds(server, [STARTED], [pidfd, told.fileno()])
        finally:
            os.close(pidfd)


def _work(server: socket.socket) -> NoReturn:
    """Answer one request after the other until the server is gone."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _set_name(_IDLE)
        while _serve_request(server):
            _set_name(_IDLE)
        code = 0
    except OSError:
        pass  # the server is gone: there is nobody to answer to
    finally:
        os._exit(code)


def _serve_request(server: socket.socket) -> bool:
    """Answer a request, once all that came with it is let go: the server may lock the volume again at once."""
    request, descriptors, flags, _ = socket.recv_fds(server, MESSAGE_BYTES, MOST_DESCRIPTORS)
    if not request:
        return False
    try:
        if flags & socket.MSG_CTRUNC:  # not all came, and of a lock nobody would miss it
            answer = pickle.dumps((False, "it cannot have as many files open; raise that limit for the driver"))
        else:
            answer = pickle.dumps(_answer(request, descriptors))
    finally:
        with contextlib.suppress(FailedPrecondition):  # no key can be where keyrings are refused
            keyring.clear_thread()  # a volume key must not outlive its call here
        for descriptor in descriptors:
            os.close(descriptor)
    server.send(answer)
    return True


def _answer(request: bytes, descriptors: Sequence[int]) -> tuple[bool, object]:
    """Do what is asked for; whatever it starts has the descriptors too, locks and devices."""
    try:
        what, function, args, kwargs = cast("tuple[str, Callable[..., object], Any, Any]", unpack(request, descriptors))
        with holding(*descriptors):
            _set_name(what.partition(" ")[0])
            return True, function(*args, **kwargs)
    except (DriverError, OSError) as error:
        return False, error
    except Exception as error:  # noqa: BLE001 -- a worker answers whatever happens
        # Only the type: the text of an unforeseen error may quote its arguments, and those may be secret.
        return False, f"unforeseen {type(error).__name__}"


def _set_name(name: str) -> None:
    """Show the work in the list of processes (prctl(2))."""
    shown = ctypes.create_string_buffer(name.encode()[:15])
    libc.prctl(_PR_SET_NAME, ctypes.addressof(shown), 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
