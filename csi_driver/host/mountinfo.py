"""The mount table of a process as the kernel shows it (proc(5)), read once and asked many things.

Only lines that matter are parsed: this runs in every publish, and a node may have thousands of mounts.
"""

import fcntl
import os
import re
import stat
import uuid
from collections.abc import Iterator
from typing import Final

from msgspec import Struct

from csi_driver.host.blockdev import kernel_name
from csi_driver.host.files import read_attribute

_OCTAL: Final = re.compile(rb"\\([0-7]{3})")
# A file that is bind-mounted: what device nodes of volumes are. The root of such a line is not "/".
_BOUND_NODE: Final = re.compile(rb"^\d+ \d+ \d+:\d+ /[^ ]+ .* - (?:dev)?tmpfs .*$", re.MULTILINE)
_BTRFS: Final = re.compile(rb"^.* - btrfs .*$", re.MULTILINE)
_BTRFS_FOLDER: Final = "/sys/fs/btrfs"
_BTRFS_FS_INFO: Final = 0x8400941F  # BTRFS_IOC_FS_INFO, <linux/btrfs.h>: 1024 bytes, the fsid at 16


class Mount(Struct, frozen=True):
    """One line of mountinfo (proc(5)); paths are as this process sees them, without escapes.

    `propagation` is "private", "shared", "slave", "shared,slave" or "unbindable" (mount_namespaces(7)).
    """

    mount_id: int
    parent_id: int
    device: tuple[int, int]
    root: str
    mount_point: str
    options: frozenset[str]
    fs_type: str
    source: str
    super_options: frozenset[str]
    propagation: str = "private"


class MountTable:
    """The mounts of one moment, as `content` of mountinfo tells them."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def at(self, path: str) -> Mount | None:
        """The topmost mount whose mount point is exactly `path` (absolute), or None.

        Links in the folders above are followed as the kernel does; a link at the end is not, like in `unmount`.
        """
        found = self._topmost(path)
        if found is None:
            resolved = _resolved(path)
            if resolved != path:
                found = self._topmost(resolved)
        return found

    def of_device(self, number: tuple[int, int], fs_type: str | None = None) -> list[Mount]:
        """The mounts of the file system on this block device, by identity; `fs_type` if that is known.

        btrfs shows a number of its own in the table and, as source, any name that the device ever had: it is asked.
        """
        mounts = [mount for mount in map(_parse, self._lines(b" %d:%d " % number)) if mount.device == number]
        fsid = _btrfs_on(number) if fs_type in (None, "btrfs") else None
        if fsid is None:
            return mounts
        verdicts: dict[tuple[int, int], bool] = {}
        found = [_parse(line) for line in _BTRFS.findall(self._content)]
        for mount in found:
            if mount.device not in verdicts and (shown := _btrfs_at(mount)) is not None:
                verdicts[mount.device] = shown == fsid
        return [*mounts, *(mount for mount in found if verdicts.get(mount.device))]

    def of_node(self, number: tuple[int, int]) -> list[Mount]:
        """The places where the node of this block device is bind-mounted, whatever name it was bound by."""
        device = os.makedev(*number)
        mounts = [_parse(line) for line in _BOUND_NODE.findall(self._content)]
        return [mount for mount in mounts if _block_device(mount.mount_point) == device]

    def is_last(self, mount: Mount) -> bool:
        """Whether no other mount shows its file system, so that to unmount it ends that."""
        others = map(_parse, self._lines(b" %d:%d " % mount.device))
        return not any(other.device == mount.device and other.mount_id != mount.mount_id for other in others)

    def place(self, mount: Mount) -> tuple[tuple[int, int], str]:
        """Where it is mounted, by identity: the copies that propagation makes share it (mount_namespaces(7))."""
        parent = self._parent(mount)
        if parent is None:
            return mount.device, mount.mount_point
        inside = os.path.relpath(mount.mount_point, parent.mount_point)
        return parent.device, os.path.normpath(os.path.join(parent.root, inside))

    def _topmost(self, path: str) -> Mount | None:
        point = _escaped(path)
        # The root field or the source of another mount may hold the same text.
        found = [_parse(line) for line in self._lines(b" " + point + b" ") if line.split(b" ", 5)[4] == point]
        parents = {mount.parent_id for mount in found if mount.parent_id != mount.mount_id}
        tops = [mount for mount in reversed(found) if mount.mount_id not in parents]
        # A folder that is bind-mounted over itself has what is mounted below it twice: hidden, and in the deeper mount.
        return max(tops, key=self._depth) if len(tops) > 1 else next(iter(tops), None)

    def _depth(self, mount: Mount) -> int:
        parent = self._parent(mount)
        return -1 if parent is None else len(parent.mount_point)

    def _parent(self, mount: Mount) -> Mount | None:
        start = b"%d " % mount.parent_id
        return next((_parse(line) for line in self._lines(start) if line.startswith(start)), None)

    def _lines(self, text: bytes) -> Iterator[bytes]:
        """The lines that hold `text`."""
        content = self._content
        position = content.find(text)
        while position >= 0:
            start = content.rfind(b"\n", 0, position) + 1
            end = content.find(b"\n", position)
            yield content[start:end]
            position = content.find(text, end)


def parse_mountinfo(content: bytes) -> list[Mount]:
    """Parse /proc/<pid>/mountinfo (proc(5)); lines that a dying process left half written are skipped."""
    return [_parse(line) for line in content.splitlines() if b" - " in line]


def _parse(line: bytes) -> Mount:
    head, tail = line.split(b" - ", 1)
    mount_id, parent_id, device, root, mount_point, options, *fields = head.split(b" ")
    fs_type, source, super_options = tail.split(b" ", 2)
    major, minor = device.split(b":")
    return Mount(
        mount_id=int(mount_id),
        parent_id=int(parent_id),
        device=(int(major), int(minor)),
        root=_plain(root),
        mount_point=_plain(mount_point),
        options=frozenset(options.decode(errors="surrogateescape").split(",")),
        fs_type=_plain(fs_type),
        source=_plain(source),
        super_options=frozenset(super_options.decode(errors="surrogateescape").split(",")),
        propagation=_propagation(fields),
    )


def _propagation(fields: list[bytes]) -> str:
    tags = {field.split(b":")[0] for field in fields}
    if b"unbindable" in tags:
        return "unbindable"
    names = [name for tag, name in ((b"shared", "shared"), (b"master", "slave")) if tag in tags]
    return ",".join(names) or "private"


def _plain(field: bytes) -> str:
    if b"\\" in field:
        field = _OCTAL.sub(lambda match: bytes([int(match.group(1), 8)]), field)
    return os.fsdecode(field)


def _escaped(path: str) -> bytes:
    """`path` as mountinfo shows it: the kernel's seq_path escapes blank, tab, newline and backslash."""
    field = os.fsencode(path)
    for character in (b"\\", b" ", b"\t", b"\n"):
        if character in field:
            field = field.replace(character, b"\\%03o" % character[0])
    return field


def _resolved(path: str) -> str:
    folder, name = os.path.split(os.path.abspath(path))
    if not name:
        return folder
    try:
        descriptor = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return path
    try:
        return os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), name)
    finally:
        os.close(descriptor)


def _btrfs_on(number: tuple[int, int]) -> str | None:
    """The UUID of the mounted btrfs that has this device (sysfs), or None."""
    try:
        name = kernel_name(number)
        known = os.listdir(_BTRFS_FOLDER)
    except OSError:
        return None
    return next((fsid for fsid in known if os.path.exists(f"{_BTRFS_FOLDER}/{fsid}/devices/{name}")), None)


def mount_id_of(descriptor: int) -> int:
    """The mount that an open descriptor lies in (proc(5), fdinfo)."""
    return int(read_attribute(f"/proc/self/fdinfo/{descriptor}").partition(b"mnt_id:")[2].split(None, 1)[0])


def _btrfs_at(mount: Mount) -> str | None:
    """The UUID of a mounted btrfs, asked of itself; None where another mount lies over it, or it does not answer."""
    try:
        descriptor = os.open(mount.mount_point, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if mount_id_of(descriptor) != mount.mount_id:
            return None
        return str(uuid.UUID(bytes=fcntl.ioctl(descriptor, _BTRFS_FS_INFO, bytes(1024))[16:32]))
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _block_device(path: str) -> int | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_rdev if stat.S_ISBLK(found.st_mode) else None
