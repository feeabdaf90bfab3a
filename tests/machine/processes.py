"""Processes as tests look for them: by their kernel name, within a time."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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


def pids_of(name: str) -> list[int]:
    """The living processes of that kernel name, as /proc/<pid>/comm has it."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            head, _, tail = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")
        except OSError:
            continue
        if head.partition("(")[2] == name and tail.split()[0] not in "ZX":
            found.append(int(entry))
    return found


def first_pid(name: str) -> int | None:
    """One of them."""
    return next(iter(pids_of(name)), None)


def has_ended(pid: int) -> bool:
    """Whether the process is gone or dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


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
