"""Mounts of this process's mount namespace: looked at, made and ended, by descriptor where that can be."""

import contextlib
import errno
import fcntl
import os
import struct
from typing import Final

from csi_driver.host import blockdev
from csi_driver.host.files import read_file
from csi_driver.host.handle import Handle, open_handle
from csi_driver.host.mountinfo import Mount, MountTable, mount_id_of
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
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_NOT_TAKEN: Final = frozenset({errno.EIO, errno.ENOSPC, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ENODATA})
"""What a device answers that cannot be read or does not take a write, because its storage is full or fails."""
_MOUNT_ATTR: Final = struct.Struct("=4Q")
_FITHAW: Final = 0xC0045878


class Mounts:
    """Looks at, makes and ends mounts. Nothing is cached: other processes mount too.

    `mountinfo` is the table that is read, this process's by default.
    """

    def __init__(self, mountinfo: str = "/proc/self/mountinfo") -> None:
        self._mountinfo = mountinfo

    def table(self) -> MountTable:
        """All mounts that this process sees now."""
        return MountTable(read_file(self._mountinfo))

    def at(self, path: str) -> Mount | None:
        """The topmost mount at `path`, as `MountTable.at`."""
        return self.table().at(path)

    def open(self, mount: Mount) -> Handle:
        """A handle on the root of this very mount. Raises FailedPrecondition when another one has its place by now."""
        try:
            handle = open_handle(mount.mount_point, os.O_PATH)
        except OSError as error:
            raise FailedPrecondition(
                f"{mount.mount_point} cannot be opened ({error_name(error)}); call again"
            ) from None
        if mount_id_of(handle.fd) != mount.mount_id:
            handle.close()
            raise FailedPrecondition(f"something else was mounted over {mount.mount_point} meanwhile; unmount that")
        return handle

    def mount(
        self, device: Handle, target: str, fs_type: str, flags: int, data: str, repair: str = "its own check"
    ) -> None:
        """Mount the file system on a device; `flags` and `data` as `parse_options` gives them.

        `repair` is the command that an error advises for a damaged one: the device's own name may be gone by then.

        The kernel takes no descriptor for a source: it gets a name that means this device, which keeps its number as
        long as it is open here, or the path of the descriptor. Raises FailedPrecondition (file system damaged,
        unsupported or refused its options), DeviceAbsent, DeviceUnreadable, DeviceInUse, NotFound (no mount point),
        CommandFailed.
        """
        arguments = (os.fsencode(blockdev.name_of(device)), os.fsencode(target), fs_type.encode(), flags, data.encode())
        try:
            check(libc.mount(*arguments), "mount")
        except OSError as error:
            raise _mount_error(error, device, target, fs_type, data, repair) from None

    def replay_ext4(self, device: Handle) -> None:
        """Have the kernel replay the journal of an ext4 that nobody uses, and show it nowhere; none to replay is fine.

        What was replayed is on the device before the journal ends, or that stays as it is: to e2fsck(8) a replay that
        the device does not take is one that is done. Raises DeviceUnreadable where it is not taken. What else is wrong
        with the file system is for a check to tell. Linux 5.2.
        """
        opened = syscall("fsopen", b"ext4", _FSOPEN_CLOEXEC)
        try:
            syscall("fsconfig", opened, _FSCONFIG_SET_STRING, b"source", os.fsencode(blockdev.name_of(device)), 0)
            syscall("fsconfig", opened, _FSCONFIG_SET_FLAG, b"ro", None, 0)
            syscall("fsconfig", opened, _FSCONFIG_CMD_CREATE, None, None, 0)
        except OSError as error:
            if error.errno in _NOT_TAKEN:
                raise DeviceUnreadable(
                    f"the journal of the ext4 on {device} cannot be replayed ({error_name(error)}), and data would be "
                    f"lost without it; its storage is full or fails: free room there, or check it, and try again"
                ) from None
        finally:
            os.close(opened)

    def bind(self, source: Handle, target: str, *, read_only: bool) -> None:
        """Show the file or folder `source` at `target`; a read-only one is never writable, not even for a moment.

        Raises NotFound, FailedPrecondition (kernel before 5.12), CommandFailed.
        """
        try:
            if read_only:
                _bind_read_only(source, os.fsencode(target))
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

    def unmount_volume(self, mount: Mount) -> None:
        """End this very mount of a file system, which is thawed if somebody has left it frozen; gone is fine.

        A frozen one would be gone from sight and keep its device for good
        (findings/umount-of-frozen-file-system.sh). Raises as `unmount`.
        """
        present = self.at(mount.mount_point)
        if present is None or present.mount_id != mount.mount_id:
            return
        self.thaw(mount)
        self.unmount(present.mount_point)

    def thaw(self, mount: Mount) -> bool:
        """Let a frozen file system (fsfreeze(8)) go on; whether it was frozen. Raises FailedPrecondition."""
        with contextlib.suppress(OSError), self.open(mount) as handle:
            descriptor = os.open(handle, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                fcntl.ioctl(descriptor, _FITHAW, 0)
                return True
            finally:
                os.close(descriptor)
        return False

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
        table = self.table()
        folder = os.path.realpath(path)
        while True:
            found = table.at(folder)
            if found is not None:
                return found.propagation
            if folder == "/":
                return "private"
            folder = os.path.dirname(folder)


def _bind_read_only(source: Handle, target: bytes) -> None:
    tree = syscall("open_tree", source.fd, b"", _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH)
    try:
        attributes = _MOUNT_ATTR.pack(_MOUNT_ATTR_RDONLY, 0, 0, 0)
        syscall("mount_setattr", tree, b"", _AT_EMPTY_PATH, attributes, _MOUNT_ATTR.size)
        syscall("move_mount", tree, b"", AT_FDCWD, target, _MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(tree)


def _mount_error(error: OSError, device: Handle, target: str, fs_type: str, data: str, repair: str) -> DriverError:
    text = f"{device} could not be mounted at {target} as {fs_type}: {error_name(error)}"
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
        return NotFound(f"{text}; {target} is missing or no folder")
    return CommandFailed(text)
