"""Mounts of this process's mount namespace: read from mountinfo, made and ended by system calls."""

import errno
import os
import re
import struct
from dataclasses import dataclass
from typing import Final

from csi_driver.host.files import read_file
from csi_driver.host.syscalls import AT_FDCWD, check, error_name, libc, syscall
from csi_driver.model.errors import (
    CommandFailed,
    DeviceAbsent,
    DeviceInUse,
    DeviceUnreadable,
    DriverError,
    FailedPrecondition,
    NotFound,
)

_MS_BIND: Final = 0x1000
_UMOUNT_NOFOLLOW: Final = 8
_OPEN_TREE_CLONE: Final = 1
_AT_EMPTY_PATH: Final = 0x1000
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_MOUNT_ATTR_RDONLY: Final = 1
_FSOPEN_CLOEXEC: Final = 1
_MOUNT_ATTR: Final = struct.Struct("=4Q")
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")
_REPAIR: Final = {
    "ext4": "'e2fsck -f {device}'",
    "xfs": "'xfs_repair {device}'",
    "btrfs": "'btrfs check {device}'",
}


@dataclass(frozen=True)
class Mount:
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


class Mounts:
    """Looks at, makes and ends mounts. Nothing is cached: other processes mount too.

    `mountinfo` is the table that is read, this process's by default.
    """

    def __init__(self, mountinfo: str = "/proc/self/mountinfo") -> None:
        self._mountinfo = mountinfo

    def table(self) -> list[Mount]:
        """All mounts that this process sees, in the kernel's order."""
        return parse_mountinfo(read_file(self._mountinfo))

    def at(self, path: str) -> Mount | None:
        """The topmost mount whose mount point is exactly `path` (absolute), or None.

        Links in the folders above are followed as the kernel does; a link at the end is not, like in `unmount`.
        Only lines that hold the path are parsed: this runs in every publish.
        """
        content = read_file(self._mountinfo)
        found = _topmost(content, path)
        if found is None:
            resolved = _resolved(path)
            if resolved != path:
                found = _topmost(content, resolved)
        return found

    def of_device(self, major: int, minor: int) -> list[Mount]:
        """Mounts of the file system on this block device.

        btrfs shows a number of its own in mountinfo, so the source's device number counts as well.
        """
        number = os.makedev(major, minor)
        return [
            mount for mount in self.table() if mount.device == (major, minor) or _block_number(mount.source) == number
        ]

    def mount(self, source: str, target: str, fs_type: str, flags: int, data: str) -> None:
        """Mount the file system on a device; `flags` and `data` as `parse_options` gives them.

        Raises FailedPrecondition (file system damaged, unsupported or refused its options), DeviceAbsent,
        DeviceUnreadable, DeviceInUse, NotFound (no mount point), CommandFailed.
        """
        arguments = (os.fsencode(source), os.fsencode(target), fs_type.encode(), flags, data.encode())
        try:
            check(libc.mount(*arguments), "mount")
        except OSError as error:
            raise _mount_error(error, source, target, fs_type, data) from None

    def bind(self, source: str, target: str, *, read_only: bool) -> None:
        """Show the file or folder `source` at `target`; a read-only one is never writable, not even for a moment.

        Raises NotFound, FailedPrecondition (kernel before 5.12), CommandFailed.
        """
        try:
            if read_only:
                _bind_read_only(os.fsencode(source), os.fsencode(target))
            else:
                check(libc.mount(os.fsencode(source), os.fsencode(target), None, _MS_BIND, None), "mount")
        except OSError as error:
            text = f"{source} could not be bind-mounted at {target}: {error_name(error)}"
            # Kernels disagree on the number for a folder on a file and the reverse.
            if error.errno in (errno.ENOENT, errno.ENOTDIR) or os.path.isdir(source) != os.path.isdir(target):
                raise NotFound(f"{text}; both must exist, both as folders or both as files") from None
            if error.errno == errno.ENOSYS:
                raise FailedPrecondition(f"{text}; a read-only bind mount needs Linux 5.12 or newer") from None
            if error.errno == errno.EPERM:
                raise FailedPrecondition(f"{text}; run as root with CAP_SYS_ADMIN") from None
            raise CommandFailed(text) from None

    def unmount(self, path: str) -> None:
        """End the topmost mount at `path`; nothing mounted or nothing there is fine. Never detaches lazily.

        Raises DeviceInUse when files in it are open (the caller names whose), FailedPrecondition, CommandFailed.
        """
        try:
            check(libc.umount2(os.fsencode(path), _UMOUNT_NOFOLLOW), "umount2")
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return
            if error.errno == errno.EINVAL and self.at(path) is None:
                return
            text = f"{path} could not be unmounted: {error_name(error)}"
            if error.errno == errno.EBUSY:
                raise DeviceInUse(f"{text}; end what uses it and call again") from None
            if error.errno == errno.EPERM:
                raise FailedPrecondition(f"{text}; run as root with CAP_SYS_ADMIN") from None
            raise CommandFailed(text) from None

    def knows(self, fs_type: str) -> bool:
        """Whether the kernel can mount this type; it loads the module if it must (Linux 5.2). Raises OSError."""
        try:
            os.close(syscall("fsopen", fs_type.encode(), _FSOPEN_CLOEXEC))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return False
            raise
        return True

    def propagation(self, path: str) -> str:
        """Propagation of the mount that `path` (absolute) lies in: see `Mount`."""
        content = read_file(self._mountinfo)
        folder = os.path.realpath(path)
        while True:
            found = _topmost(content, folder)
            if found is not None:
                return found.propagation
            if folder == "/":
                return "private"
            folder = os.path.dirname(folder)


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


def _topmost(content: bytes, path: str) -> Mount | None:
    wanted = b" " + _escaped(path) + b" "
    found: list[Mount] = []
    position = content.find(wanted)
    while position >= 0:
        start = content.rfind(b"\n", 0, position) + 1
        end = content.find(b"\n", position)
        mount = _parse(content[start:end])
        # The root field or the source of another mount may hold the same text.
        if mount.mount_point == path:
            found.append(mount)
        position = content.find(wanted, end)
    parents = {mount.parent_id for mount in found if mount.parent_id != mount.mount_id}
    return next((mount for mount in reversed(found) if mount.mount_id not in parents), None)


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


def _block_number(source: str) -> int | None:
    if not source.startswith("/dev/"):
        return None
    try:
        return os.stat(source).st_rdev
    except OSError:
        return None


def _bind_read_only(source: bytes, target: bytes) -> None:
    tree = syscall("open_tree", AT_FDCWD, source, _OPEN_TREE_CLONE | os.O_CLOEXEC)
    try:
        attributes = _MOUNT_ATTR.pack(_MOUNT_ATTR_RDONLY, 0, 0, 0)
        syscall("mount_setattr", tree, b"", _AT_EMPTY_PATH, attributes, _MOUNT_ATTR.size)
        syscall("move_mount", tree, b"", AT_FDCWD, target, _MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(tree)


def _mount_error(error: OSError, source: str, target: str, fs_type: str, data: str) -> DriverError:
    text = f"{source} could not be mounted at {target} as {fs_type}: {error_name(error)}"
    repair = _REPAIR.get(fs_type, "its file system's own check").format(device=source)
    number = error.errno
    damaged = f"the {fs_type} file system is damaged: back the volume up and run {repair}"
    read_only = "the device is read-only: mount it with 'ro'"
    advice = {
        errno.EUCLEAN: damaged,
        errno.EBADMSG: damaged,
        errno.EINVAL: f"the kernel found no {fs_type} file system it can use or refused the options '{data}': see the "
        f"kernel log, and run {repair} if the file system is damaged",
        errno.ENODEV: f"the kernel does not know {fs_type}: load its module",
        errno.EROFS: read_only,
        errno.EACCES: read_only,
        errno.EPERM: "run as root with CAP_SYS_ADMIN",
        # btrfs before Linux 6.7
        errno.EEXIST: f"a {fs_type} file system of the same UUID is mounted on this node, such as another volume of "
        f"the same image: use one of them at a time",
    }
    if number in advice:
        return FailedPrecondition(f"{text}; {advice[number]}")
    if number in (errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT):
        return DeviceUnreadable(f"{text}; the device answers with errors: check its storage")
    if number == errno.EBUSY:
        return DeviceInUse(f"{text}; the device or the mount point is in use")
    if number in (errno.ENXIO, errno.ENOTBLK):
        return DeviceAbsent(f"{text}; there is no block device")
    if number in (errno.ENOENT, errno.ENOTDIR):
        missing = source if not os.path.exists(source) else target
        return (DeviceAbsent if missing == source else NotFound)(f"{text}; {missing} is missing or no folder")
    return CommandFailed(text)
