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
from csi_driver.host.handle import Handle
from csi_driver.host.hardening import harden_process
from csi_driver.host.held import holding
from csi_driver.host.syscalls import libc
from csi_driver.host.workers import END, MESSAGE_BYTES, MOST_DESCRIPTORS, REFUSED, STARTED, WORD_BYTES, unpack
from csi_driver.model.errors import DriverError

_PR_SET_NAME: Final = 15


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
                pid = os.fork()
            except OSError:  # a limit of processes, or memory: the next one may get what ends meanwhile
                with contextlib.suppress(OSError):
                    server.send(REFUSED)
                continue
            if pid == 0:
                control.close()
                _work(server)
            # The server may have given up on this one, and then it has ended at once.
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(pid)
                try:
                    socket.send_fds(server, [STARTED], [pidfd])
                finally:
                    os.close(pidfd)


def _work(server: socket.socket) -> NoReturn:
    """Serve one session after the other until the server is gone."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        while _serve_session(server):
            pass
        code = 0
    except OSError:
        pass  # the server is gone: there is nobody to answer to
    finally:
        os._exit(code)


def _serve_session(server: socket.socket) -> bool:
    """Answer requests until the end of the session; whether the server wants another one."""
    _set_name("luks-idle")
    locks: list[int] = []
    try:
        while True:
            request, descriptors, _, _ = socket.recv_fds(server, MESSAGE_BYTES, MOST_DESCRIPTORS)
            if request in (b"", END):
                break
            answer = pickle.dumps(_answer(request, descriptors, locks))
            with contextlib.suppress(BrokenPipeError):  # a killed server hears no answer
                server.send(answer)
    finally:
        keyring.clear_thread()  # a volume key must not outlive its session here
        for lock in locks:
            os.close(lock)
    if request:
        server.send(END)  # the server may lock the volume again at once
    return bool(request)


def _answer(request: bytes, descriptors: Sequence[int], locks: list[int]) -> tuple[bool, object]:
    """Do what is asked for; the locks that came with it join `locks`, the other descriptors are closed afterwards."""
    given = set(descriptors)
    try:
        what, brought, function, args, kwargs = cast(
            "tuple[str, tuple[Handle, ...], Callable[..., object], Any, Any]", unpack(request, descriptors)
        )
        locks += (lock.fd for lock in brought)
        given.difference_update(locks)
        with holding(*locks, *given):
            _set_name(what.partition(" ")[0])
            return True, function(*args, **kwargs)
    except (DriverError, OSError) as error:
        return False, error
    except Exception as error:  # noqa: BLE001 -- a worker answers whatever happens
        # Only the type: the text of an unforeseen error may quote its arguments, and those may be secret.
        return False, f"unforeseen {type(error).__name__}"
    finally:
        for descriptor in given:
            os.close(descriptor)


def _set_name(name: str) -> None:
    """Show the work in the list of processes (prctl(2))."""
    shown = ctypes.create_string_buffer(name.encode()[:15])
    libc.prctl(_PR_SET_NAME, ctypes.addressof(shown), 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
