"""Who keeps a device, a file or a file system busy, found in /proc and /sys and told in words.

Everything here is read while it changes: a process that ends meanwhile is left out. Nothing here touches the file
systems in question (statx(2) with AT_STATX_DONT_SYNC), and what a hanging process or loop device may keep locked is
waited for but a moment, so a hanging device does not hang the search.
"""

import contextlib
import ctypes
import functools
import os
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import Struct

from csi_driver.host import loopcontrol
from csi_driver.host.mountinfo import Mount, parse_mountinfo
from csi_driver.host.patience import within
from csi_driver.host.syscalls import AT_FDCWD, libc

_TIME_LIMIT: Final = 3.0
_READ_LIMIT: Final = 1.0
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_BASIC_AND_MNT_ID: Final = 0x7FF | 0x1000
_S_IFBLK: Final = 0o060000


class Holder(Struct, frozen=True):
    """A user of something: a process with its name and state as psutil tells them, or the kernel itself (`pid` 0)."""

    pid: int
    name: str
    state: str
    what: str

    def __str__(self) -> str:
        if not self.pid:
            return self.what
        stuck = ", in uninterruptible sleep (state D)" if self.state == "disk-sleep" else ""
        return f"process {self.pid} ({self.name}{stuck}): {self.what}"


def describe(holders: Sequence[Holder], limit: int = 5) -> str:
    """The holders in one line, the first `limit` of them."""
    if not holders:
        return "a user that could not be found"
    more = f" and {len(holders) - limit} more" if len(holders) > limit else ""
    return "; ".join(str(holder) for holder in holders[:limit]) + more


class Holders:
    """Searches all processes that this one sees; each search ends after a few seconds with what it has found.

    `proc` is where they are seen.
    """

    def __init__(self, proc: str = "/proc") -> None:
        self._proc = proc

    def of_device(self, major: int, minor: int) -> list[Holder]:
        """Everything that keeps the block device busy.

        Devices on top, swap, processes that have it open, and mounts of it in any mount namespace.
        """
        number = os.makedev(major, minor)
        names = _names(major, minor)
        found = [*_devices_on_top(major, minor), *_swap(names)]
        for process in _processes(self._proc):
            for link, facts in process.files():
                if facts.is_block and facts.rdev == number:
                    found.append(process.holder(f"has /dev/{names[0]} open as {link}"))
                    break
        return _without_repetition([*found, *self._mounted(major, minor, names, own=True)])

    def of_file(self, path: str | os.PathLike[str]) -> list[Holder]:
        """Processes that have the file open, by device and inode."""
        wanted = _statx(os.fsencode(path))
        if wanted is None:
            return []
        found = []
        for process in _processes(self._proc):
            for link, facts in process.files():
                if (facts.dev, facts.inode) == (wanted.dev, wanted.inode):
                    found.append(process.holder(f"has {os.fspath(path)} open as {link}"))
                    break
        return found

    def of_mount(self, device: tuple[int, int]) -> list[Holder]:
        """What keeps the file system of a block device mounted or busy.

        Mounts of it in other mount namespaces, and processes with open files, working folder, root or mapped files
        below it.
        """
        major, minor = device
        names = _names(major, minor)
        return _without_repetition([*self._using(major, minor, names), *self._mounted(major, minor, names, own=False)])

    def of_place(self, mount: Mount) -> list[Holder]:
        """Processes with an open file, working folder or root in this very mount, not in others of its file system."""
        return [
            process.holder(f"uses {_link(f'{process.folder}/{link}') or 'a file in it'} as {link}")
            for process in _processes(self._proc)
            if (link := next((link for link, facts in process.files() if facts.mount_id == mount.mount_id), None))
        ]

    def _mounted(self, major: int, minor: int, names: list[str], *, own: bool) -> Iterator[Holder]:
        seen = set() if own else {_link("/proc/self/ns/mnt")}
        for process in _processes(self._proc):
            namespace = _link(f"{process.folder}/ns/mnt")
            if namespace is None or namespace in seen:
                continue
            seen.add(namespace)
            places = [mount.mount_point for mount in process.mounts() if _is_on(mount, major, minor, names)]
            if places:
                more = f" and {len(places) - 1} more" if len(places) > 1 else ""
                yield process.holder(f"has it mounted at {places[0]}{more} in mount namespace {namespace}")

    def _using(self, major: int, minor: int, names: list[str]) -> Iterator[Holder]:
        by_namespace: dict[str | None, frozenset[int]] = {}
        for process in _processes(self._proc):
            namespace = _link(f"{process.folder}/ns/mnt")
            if namespace not in by_namespace:
                mounts = process.mounts()
                by_namespace[namespace] = frozenset(m.mount_id for m in mounts if _is_on(m, major, minor, names))
            ids = by_namespace[namespace]
            number = os.makedev(major, minor)
            for link, facts in process.files():
                if facts.mount_id in ids or facts.dev == number:
                    yield process.holder(f"uses {_link(f'{process.folder}/{link}') or 'a file in it'} as {link}")
                    break
            else:
                if process.maps(major, minor):
                    yield process.holder("has a file in it mapped into memory")
        for loop in _loops():
            inside = loop.status.device == os.makedev(major, minor)
            if inside or any(_is_on(mount, major, minor, names) for mount in _mounts_above(loop.path)):
                yield Holder(0, "", "", f"loop device {loop.node} is bound to {loop.path}")


class _Facts(Struct, frozen=True):
    """What statx(2) says about an open file."""

    is_block: bool
    rdev: int
    dev: int
    inode: int
    mount_id: int


class _Process(Struct, frozen=True):
    pid: int
    proc: str = "/proc"

    @property
    def folder(self) -> str:
        return f"{self.proc}/{self.pid}"

    def holder(self, what: str) -> Holder:
        from csi_driver.host.machine import process_facts  # noqa: PLC0415 - psutil, for errors only

        facts = process_facts(self.pid)
        return Holder(self.pid, facts.name, facts.state, what)

    def files(self) -> Iterator[tuple[str, _Facts]]:
        links = ["cwd", "root", "exe"]
        with contextlib.suppress(OSError):
            links += [f"fd/{name}" for name in os.listdir(f"{self.folder}/fd")]
        for link in links:
            facts = _statx(f"{self.folder}/{link}".encode())
            if facts is not None:
                yield link, facts

    def mounts(self) -> list[Mount]:
        try:
            return parse_mountinfo(_content(f"{self.folder}/mountinfo"))
        except OSError:
            return []

    def maps(self, major: int, minor: int) -> bool:
        """Whether it has a file of that device mapped; the kernel keeps its map locked while it waits in it for I/O."""
        path = f"{self.folder}/maps"

        def look() -> bool:
            try:
                return b" %02x:%02x " % (major, minor) in _content(path)
            except OSError:
                return False

        return within(_READ_LIMIT, look, path) or False


def _processes(proc: str) -> Iterator[_Process]:
    deadline = time.monotonic() + _TIME_LIMIT
    for name in sorted(filter(str.isdigit, os.listdir(proc)), key=int):
        if time.monotonic() > deadline:
            return
        yield _Process(int(name), proc)


def _statx(path: bytes) -> _Facts | None:
    buffer = ctypes.create_string_buffer(256)
    if libc.statx(AT_FDCWD, path, _AT_STATX_DONT_SYNC, _STATX_BASIC_AND_MNT_ID, buffer) < 0:
        return None
    (mode,) = struct.unpack_from("=H", buffer, 28)
    (inode,) = struct.unpack_from("=Q", buffer, 32)
    rdev_major, rdev_minor, dev_major, dev_minor, mount_id = struct.unpack_from("=4IQ", buffer, 128)
    return _Facts(
        is_block=mode & 0o170000 == _S_IFBLK,
        rdev=os.makedev(rdev_major, rdev_minor),
        dev=os.makedev(dev_major, dev_minor),
        inode=inode,
        mount_id=mount_id,
    )


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _names(major: int, minor: int) -> list[str]:
    """Names of the device below /dev: the kernel's first, then the mapping's."""
    folder = f"/sys/dev/block/{major}:{minor}"
    names = [os.path.basename(_link(folder) or f"block/{major}:{minor}")]
    with contextlib.suppress(OSError):
        names.append("mapper/" + _content(f"{folder}/dm/name").decode(errors="surrogateescape").strip())
    return names


def _is_on(mount: Mount, major: int, minor: int, names: list[str]) -> bool:
    # btrfs shows a number of its own; its source is then all there is.
    return mount.device == (major, minor) or mount.source.removeprefix("/dev/") in names


def _devices_on_top(major: int, minor: int, what: str = "it") -> Iterator[Holder]:
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(f"/sys/dev/block/{major}:{minor}/holders")):
            mapping = ""
            with contextlib.suppress(OSError):
                mapping = " (" + _content(f"/sys/block/{name}/dm/name").decode(errors="surrogateescape").strip() + ")"
            yield Holder(0, "", "", f"device /dev/{name}{mapping} is on top of {what}")
    for loop in _loops():
        if loop.status.node == os.makedev(major, minor):
            facts = _statx(os.fsencode(loop.path))
            path = loop.path if facts and facts.rdev == loop.status.node else "it by a path that is gone"
            yield Holder(0, "", "", f"loop device {loop.node} (bound to {path}, as kubelet does for block volumes)")
            yield from _devices_on_top(*loop.number, loop.node)


class _Loop(Struct, frozen=True):
    """A bound loop device. `path` is what its file was called once: kubelet's is gone by the time somebody asks."""

    node: str
    number: tuple[int, int]
    status: loopcontrol.Status
    path: str


def _loops() -> Iterator[_Loop]:
    for node in loopcontrol.bound_nodes():
        found = within(_READ_LIMIT, functools.partial(_loop, node), node)
        if found is not None:
            yield found


def _loop(node: str) -> _Loop | None:
    """What is bound to it; to open one that another process is about to close may wait for its I/O."""
    try:
        descriptor = os.open(node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        number, status = os.fstat(descriptor).st_rdev, loopcontrol.status(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    if status is None:
        return None
    return _Loop(node, (os.major(number), os.minor(number)), status, loopcontrol.backing_file(node))


def _mounts_above(path: str) -> list[Mount]:
    """The mount of this namespace that `path` lies in, topmost last; by text, so that nothing is touched."""
    mounts = _Process(os.getpid()).mounts()
    inside = [m for m in mounts if path.startswith(m.mount_point.rstrip("/") + "/")]
    longest = max((len(m.mount_point) for m in inside), default=0)
    return [m for m in inside if len(m.mount_point) == longest][-1:]


def _swap(names: list[str]) -> Iterator[Holder]:
    with contextlib.suppress(OSError):
        for line in _content("/proc/swaps").decode(errors="surrogateescape").splitlines()[1:]:
            if line.split()[0].removeprefix("/dev/") in names:
                yield Holder(0, "", "", f"it is used as swap ({line.split()[0]})")


def _without_repetition(holders: list[Holder]) -> list[Holder]:
    return list(dict.fromkeys(holders))
