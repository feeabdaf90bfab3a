"""Processes, memory, swap and disks of this machine, for people and for metrics.

It loads psutil, which neither start-up nor a call that goes well waits for: import it where somebody asks.
"""

import contextlib
import os
import re
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

_SWAPS: Final = Path("/proc/swaps")
_BLOCK_DEVICES: Final = Path("/sys/dev/block")


@dataclass(frozen=True)
class Swap:
    """Bytes of swap that are on, and those of its areas that are not known to be encrypted."""

    total: int
    plain: tuple[str, ...]


@dataclass(frozen=True)
class Disk:
    """The file system of a folder; `device` as its mount names it, `total` in bytes."""

    device: str
    fs_type: str
    total: int


@dataclass(frozen=True)
class ProcessFacts:
    """A process: its name, and its state in psutil's words, "disk-sleep" for state D of proc(5)."""

    name: str
    state: str


@dataclass(frozen=True)
class OwnProcesses:
    """The calling process and all below it; resident memory in bytes, what they share counted in each."""

    count: int
    resident: int


def process_facts(pid: int) -> ProcessFacts:
    """Name and state of a process, "?" once it is gone.

    The name is the kernel's, of 15 bytes at most: for a longer one psutil reads the command line, out of the process's
    memory, which one that hangs may keep locked.
    """
    try:
        name = os.fsdecode(Path(f"/proc/{pid}/comm").read_bytes().removesuffix(b"\n"))
        return ProcessFacts(name, str(psutil.Process(pid).status()))
    except (OSError, psutil.Error):
        return ProcessFacts("?", "?")


class Machine:
    """What psutil tells of the machine that this runs on."""

    def __init__(self, swaps: Path = _SWAPS, block_devices: Path = _BLOCK_DEVICES) -> None:
        self._swaps = swaps
        self._block_devices = block_devices

    def available_memory(self) -> int:
        """Bytes that can be had without swapping."""
        return int(psutil.virtual_memory().available)

    def swap(self) -> Swap:
        """Swap that is on. An area is encrypted on dm-crypt, whatever lies between; zram is memory."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # counters that some kernels lack, and nobody wants here
            total = int(psutil.swap_memory().total)
        return Swap(total, tuple(path for path in self._areas() if not self._is_safe_area(path)))

    def disk(self, folder: Path) -> Disk:
        """The file system of `folder`, its mount found by text: no other file system is touched. Raises OSError."""
        total, path = int(psutil.disk_usage(str(folder)).total), folder.resolve()
        above = [mount for mount in psutil.disk_partitions(all=True) if path.is_relative_to(mount.mountpoint)]
        mount = max(above, key=lambda each: len(each.mountpoint))
        return Disk(str(mount.device), str(mount.fstype), total)

    def own_processes(self) -> OwnProcesses:
        """The server, its launcher and workers, and the programs that they run."""
        this = psutil.Process()
        resident = []
        for process in (this, *this.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                resident.append(int(process.memory_info().rss))
        return OwnProcesses(len(resident), sum(resident))

    def _areas(self) -> list[str]:
        rows = self._swaps.read_bytes().splitlines()[1:]
        return [
            os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda at: bytes([int(at[1], 8)]), row.split()[0])) for row in rows
        ]

    def _is_safe_area(self, path: str) -> bool:
        try:
            status = os.stat(path)
        except OSError:
            return False  # a file that this container does not see
        number = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
        return self._is_safe(self._block_devices / f"{os.major(number)}:{os.minor(number)}")

    def _is_safe(self, device: Path) -> bool:
        if _content(device / "dm/uuid").startswith("CRYPT-"):
            return True
        if (device / "backing_dev").exists():  # zram
            return _content(device / "backing_dev") in ("", "none")
        below = sorted((device / "slaves").glob("*"))
        return bool(below) and all(map(self._is_safe, below))


def _content(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
