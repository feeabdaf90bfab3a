"""Processes as tests look for them: by their kernel name, within a time."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from csi_driver.host.workers import LauncherProcess

T = TypeVar("T")


def wait_for(look: Callable[[], T | None], what: str, seconds: float = 30.0) -> T:
    """What `look` finds as soon as it finds something."""
    deadline = time.monotonic() + seconds
    while (found := look()) is None or found is False:
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.005)
    return found


def run(*argv: str | Path | bytes) -> str:
    """What a program said that has to succeed."""
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


@contextlib.contextmanager
def sleeping_in(folder: Path | bytes) -> Iterator[int]:
    """A process whose working directory is that folder; it ends with the block."""
    with subprocess.Popen(["sleep", "300"], cwd=folder) as holder:
        try:
            wait_for(lambda: Path(f"/proc/{holder.pid}/comm").read_text() == "sleep\n", "the holder")
            yield holder.pid
        finally:
            holder.kill()


def pids_of(name: str) -> list[int]:
    """The living processes of that kernel name, as /proc/<pid>/comm has it."""
    return [pid for pid, found in _processes().items() if found.name == name and found.state not in "ZX"]


def first_pid(name: str) -> int | None:
    """One of them."""
    return next(iter(pids_of(name)), None)


def children_of(parent: int) -> list[int]:
    """The living processes that `parent` has started."""
    return [pid for pid, found in _processes().items() if found.parent == parent and found.state not in "ZX"]


def stopped_below(parent: int) -> int | None:
    """A descendant of `parent` that was stopped by a signal."""
    found, below = _processes(), {parent}
    while more := {pid for pid, one in found.items() if one.parent in below} - below:
        below |= more
    return next((pid for pid in below if pid in found and found[pid].state == "T"), None)


def has_ended(pid: int) -> bool:
    """Whether the process is gone or dead."""
    return (found := _stat(pid)) is None or found.state in "ZX"


@dataclass(frozen=True)
class _Stat:
    """What /proc/<pid>/stat tells (proc(5))."""

    name: str
    state: str
    parent: int


def _stat(pid: int) -> _Stat | None:
    try:
        head, _, tail = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")
    except OSError:
        return None
    state, parent = tail.split()[:2]
    return _Stat(head.partition("(")[2], state, int(parent))


def _processes() -> dict[int, _Stat]:
    found = {int(entry): _stat(int(entry)) for entry in filter(str.isdigit, os.listdir("/proc"))}
    return {pid: stat for pid, stat in found.items() if stat is not None}


def launcher_inside(*prefix: str) -> Callable[[socket.socket, Sequence[str]], LauncherProcess]:
    """Starts the worker launcher below a program that changes its surroundings, such as unshare(1)."""

    def spawn(control: socket.socket, warm: Sequence[str]) -> LauncherProcess:
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", "csi_driver.host.launcher", str(control.fileno()), *warm],
            pass_fds=(control.fileno(),),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    return spawn
