"""What the tests of workers let workers do; small, as every launcher loads it."""

import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from csi_driver.host.commands import Completed, run_program
from csi_driver.host.handle import Handle
from csi_driver.host.syscalls import NUMBERS, libc, syscall
from csi_driver.model.secret import Passphrase

P = ParamSpec("P")
R = TypeVar("R")

_THREAD_KEYRING = -1
_SEARCH = 10
_PR_GET_DUMPABLE = 3


def identity(*args: object, **kwargs: object) -> tuple[int, int, tuple[object, ...], dict[str, object]]:
    """Process, parent, and what came."""
    return os.getpid(), os.getppid(), args, kwargs


def fail(error: BaseException) -> None:
    raise error


def fail_unforeseen(text: str) -> None:
    raise ValueError(text)


def unpicklable() -> object:
    return lambda: None


def nap(seconds: float, note: str = "", key: Passphrase | None = None) -> int:
    """Tell in a file who naps, then nap."""
    if note:
        _tell(note)
    time.sleep(seconds)
    return len(key.reveal()) if key else 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_first(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Be stopped, and do the work once somebody sends SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)
    return function(*args, **kwargs)


def run_stopped_program(argv: Sequence[str | Handle], **kwargs: Any) -> Completed:
    """The same in a program: it is stopped before it begins."""
    return run_program(("sh", "-c", 'kill -STOP $$; exec "$@"', "sh", *argv), **kwargs)


def run_as_its_parent_dies(argv: Sequence[str]) -> Completed:
    """As a worker that is killed between its program's fork and prctl(2): the program has another parent by then."""
    os.getpid = lambda: 1
    return run_program(argv, timeout=10)


def leave() -> None:
    raise SystemExit(0)


def open_files() -> list[str]:
    """What this worker's descriptors are."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return found


def comm() -> str:
    return Path("/proc/self/comm").read_text().strip()


def hardening() -> tuple[tuple[int, int], int]:
    """The core limit, and whether the process may be dumped."""
    return resource.getrlimit(resource.RLIMIT_CORE), int(libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0))


def add_thread_key(name: str) -> tuple[int, bool]:
    syscall("add_key", b"user", name.encode(), b"payload", 7, _THREAD_KEYRING)
    return has_thread_key(name)


def lose_keyrings() -> None:
    """Be on a kernel without keyrings, which says what a seccomp filter on them does (ENOSYS or EPERM)."""
    NUMBERS.update(keyctl=NUMBERS["open_tree"] + 10_000, add_key=NUMBERS["open_tree"] + 10_001)


def has_thread_key(name: str) -> tuple[int, bool]:
    try:
        syscall("keyctl", _SEARCH, _THREAD_KEYRING, b"user", name.encode(), 0)
    except OSError:
        return os.getpid(), False
    return os.getpid(), True


def read_through(handle: Handle, note: str = "", seconds: float = 0.0) -> tuple[str, str, bytes]:
    """What a handle is here: its name, what its path leads to, what can be read through it.

    With `note` only after so many seconds, and the pid is in that file meanwhile.
    """
    if note:
        _tell(note)
        time.sleep(seconds)
    with open(handle, "rb") as file:
        return handle.name, os.readlink(handle.path), file.read()


def run_when_told(gate: str, argv: Sequence[str], **kwargs: Any) -> Completed:
    """`run_program` of somebody who has to wait: who waits is in `<gate>.waits`, and goes on when `gate` is there."""
    _tell(f"{gate}.waits")
    while not Path(gate).exists():
        time.sleep(0.02)
    return run_program(argv, **kwargs)


def _tell(note: str) -> None:
    """Who is at work, in a file that is whole as soon as it is there."""
    aside = Path(f"{note}.new")
    aside.write_text(str(os.getpid()))
    aside.rename(note)
