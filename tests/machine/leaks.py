"""What a driver can leave behind on a node, counted from the kernel and not by the names it uses.

`Facts.now` counts; two counts compared tell a leak. `clear` takes leaks away, so that one failed case does not fail the
next ones.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from csi_driver.host import keyring, loopcontrol
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.krbd import MappedImages
from csi_driver.host.loop import LoopDevices
from csi_driver.host.syscalls import libc
from csi_driver.model.errors import DriverError, FailedPrecondition

SETTLE_SECONDS = 5.0
"""How long the kernel may take to let go: autoclear and the destruction of keys happen by and by."""

_PAUSE = 0.02
_PR_SET_CHILD_SUBREAPER = 36
_MNT_DETACH = 2
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Facts:
    """All mapped devices, bound loop devices, mapped images of Ceph, mounts, volume keys, file locks, and files below a
    folder.

    Each is a line of text that says enough to find it. Loop devices without autoclear say so.
    """

    mappings: frozenset[str]
    loops: frozenset[str]
    images: frozenset[str]
    mounts: tuple[str, ...]
    keys: frozenset[str]
    locks: frozenset[str]
    files: frozenset[str]

    @classmethod
    def now(cls, folder: Path) -> Self:
        """Count; files are those below `folder`, locks those on its file system."""
        return cls(
            mappings=frozenset(_mappings()),
            loops=frozenset(_loops()),
            images=frozenset(f"{one.path} of {one.identity}" for one in MappedImages().all()),
            mounts=tuple(sorted(mount for _, mount in mounts())),
            keys=frozenset(_keys()),
            locks=frozenset(_locks(folder.stat().st_dev)),
            files=frozenset(
                os.path.join(at, name) for at, folders, names in os.walk(folder) for name in folders + names
            ),
        )

    def more_than(self, before: Self) -> list[str]:
        """What is here and was not before, as sentences."""
        found = []
        for kind in ("mappings", "loops", "images", "keys", "locks", "files"):
            found += [f"{kind}: {one}" for one in sorted(getattr(self, kind) - getattr(before, kind))]
        old = list(before.mounts)
        for mount in self.mounts:
            if mount in old:
                old.remove(mount)
            else:
                found.append(f"mounts: {mount}")
        return found


def leaked_since(before: Facts, folder: Path, seconds: float = SETTLE_SECONDS) -> list[str]:
    """What is still there after some time for the kernel to let go."""
    return settled(lambda: Facts.now(folder).more_than(before), seconds)


def settled(look: Callable[[], list[str]], seconds: float = SETTLE_SECONDS) -> list[str]:
    """What `look` finds once it finds nothing or the time is over."""
    deadline = time.monotonic() + seconds
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    return found


def mounts() -> Iterator[tuple[str, str]]:
    """Mount point of every mount that this process sees, and what is mounted there in words (proc(5))."""
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        head, _, tail = line.partition(" - ")
        fields = head.split(" ")
        point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4])
        kind, source = tail.split(" ")[:2]
        yield point, f"{kind} {source}{fields[3]} at {point}"


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Makes this process the parent of every orphan among its descendants (prctl(2))."""
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def children() -> frozenset[int]:
    """Processes that this one has started or adopted."""
    return frozenset(pid for pid, _, _ in processes_by_parent().get(os.getpid(), ()))


def orphans(known: Container[int]) -> list[str]:
    """Processes below this one besides the known ones and what is below those; the dead ones are reaped."""
    below = processes_by_parent()
    found, queue = [], [os.getpid()]
    while queue:
        for pid, words, state in below.get(queue.pop(), ()):
            if pid in known:
                continue
            if state == "Z":
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
                continue
            found.append(f"processes: {words}")
            queue.append(pid)
    return found


def processes_by_parent() -> dict[int, list[tuple[int, str, str]]]:
    """Id, words and state (proc(5)) of each process by its parent's id."""
    children: dict[int, list[tuple[int, str, str]]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            head, _, tail = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")
            state, parent = tail.split()[:2]
            children.setdefault(int(parent), []).append((int(entry), f"{head})", state))
    return children


def clear(before: Facts, folder: Path) -> None:
    """Take away everything that was not there before; for use after a leak was told."""
    after = Facts.now(folder)
    for point, words in reversed(list(mounts())):
        if words not in before.mounts:
            libc.umount2(os.fsencode(point), _MNT_DETACH)
    for mapping in after.mappings - before.mappings:
        with contextlib.suppress(Exception):
            DeviceMapper().remove(mapping.split(" ")[0])
    for loop in after.loops - before.loops:
        with contextlib.suppress(OSError):
            descriptor = os.open(loop.split(" ")[0], os.O_RDONLY)
            loopcontrol.clear(descriptor)
            os.close(descriptor)
    for image in MappedImages().all():
        if f"{image.path} of {image.identity}" not in before.images:
            with contextlib.suppress(DriverError):
                MappedImages().unmap(image)
    for key in after.keys - before.keys:
        with contextlib.suppress(Exception):
            keyring.unlink_from_user(key.split(" ")[1].removeprefix("luks-csi:").removesuffix(":"))
    for path in sorted(after.files - before.files, reverse=True):
        with contextlib.suppress(OSError, FailedPrecondition):
            LoopDevices().unguard(path)
            os.rmdir(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)


def _mappings() -> Iterator[str]:
    for device in Path("/sys/block").iterdir():
        with contextlib.suppress(OSError):
            yield f"{_line(device / 'dm/name')} {_line(device / 'dm/uuid')}"
    for node in Path("/dev/mapper").iterdir():
        if node.name != "control":
            yield f"{node.name} (the node)"


def _loops() -> Iterator[str]:
    for device in Path("/sys/block").iterdir():
        with contextlib.suppress(OSError):
            lasting = "" if _line(device / "loop/autoclear") == "1" else " without autoclear"
            yield f"/dev/{device.name} on {_line(device / 'loop/backing_file')}{lasting}"


def _keys() -> Iterator[str]:
    # Fields of /proc/keys (proc(5)): serial, flags, usage, timeout, permissions, uid, gid, type, description.
    for line in Path("/proc/keys").read_text(errors="replace").splitlines():
        fields = line.split()
        if fields[7] == "logon" or fields[8].startswith("luks-csi:"):
            yield f"{fields[0]} {' '.join(fields[8:])}"


def _locks(device: int) -> Iterator[str]:
    # Fields of /proc/locks (proc(5)): number, kind, mode, access, pid, device and inode.
    where = f"{os.major(device):02x}:{os.minor(device):02x}:"
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] in ("FLOCK", "OFDLCK") and fields[5].startswith(where):
            yield f"lock on inode {fields[5]}"


def _line(path: Path) -> str:
    return path.read_text(errors="surrogateescape").rstrip("\n")
