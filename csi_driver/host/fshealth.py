"""What ails a mounted file system, from what the kernel tells at next to no cost; a dead device holds up nobody."""

import errno
import os
from enum import Enum, StrEnum, auto
from typing import Final

from csi_driver.host import blockdev, ext4
from csi_driver.host.files import read_attribute
from csi_driver.host.handle import Handle
from csi_driver.host.mountinfo import Mount
from csi_driver.host.mounts import Mounts
from csi_driver.host.patience import within
from csi_driver.model.errors import FailedPrecondition

_LIMIT_SECONDS: Final = 1.0


class Ailment(StrEnum):
    """What is wrong with a file system, as the end of a sentence about it."""

    READ_ONLY = "went read-only after an error"
    SHUT_DOWN = "was shut down after an error"
    ERROR_FLAG = "carries its error flag"


class FileSystemHealth:
    """Looks at mounts that should be writable."""

    def __init__(self, mounts: Mounts, ext4_folder: str = "/sys/fs/ext4") -> None:
        self._mounts = mounts
        self._ext4_folder = ext4_folder

    def ailment(self, mount: Mount) -> Ailment | None:
        """What is wrong with it; None when nothing can be seen. Whether it is frozen, `thaw` alone can tell."""
        if not mount.super_options.isdisjoint({"ro", "emergency_ro"}):
            return Ailment.READ_ONLY
        if "shutdown" in mount.super_options or (
            mount.fs_type == "xfs"
            and within(_LIMIT_SECONDS, lambda: self._is_shut_down(mount), ("open", mount.mount_id))
        ):
            return Ailment.SHUT_DOWN
        return Ailment.ERROR_FLAG if mount.fs_type == "ext4" and self._counts_errors(mount) else None

    def thaw(self, mount: Mount) -> bool:
        """Let it go on if it is frozen (fsfreeze(8)), and whether it was; only where nobody else uses it."""

        def thaw() -> bool:
            try:
                return self._mounts.thaw(mount)
            except FailedPrecondition:  # it has gone meanwhile
                return False

        return within(_LIMIT_SECONDS, thaw, ("thaw", mount.mount_id)) or False

    def _is_shut_down(self, mount: Mount) -> bool:
        """Whether its root cannot even be opened (xfs_file_open in the kernel's fs/xfs)."""
        try:
            with self._mounts.open(mount) as handle:
                os.close(os.open(handle, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except FailedPrecondition:
            return False
        except OSError as error:
            return error.errno == errno.EIO
        return False

    def _counts_errors(self, mount: Mount) -> bool:
        """Whether ext4 has noted errors since it was last checked (the kernel's Documentation/ABI, sysfs-fs-ext4)."""
        try:
            return int(read_attribute(f"{self._ext4_folder}/{blockdev.kernel_name(mount.device)}/errors_count")) > 0
        except (OSError, ValueError):
            return False


class Mounting(Enum):
    """What became of a file system that was to be mounted."""

    LEFT_ALONE = auto()
    """It is an ext4 that carries its error flag."""
    FULL = auto()
    """It is mounted, and as large as its device."""
    MOUNTED = auto()
    """It is mounted, and may have to grow."""


def mount_unless_flagged(
    mounts: Mounts, device: Handle, target: str, fs_type: str, flags: int, data: str, repair: str
) -> Mounting:
    """`Mounts.mount`, but for an ext4 that carries its error flag: that one is left alone.

    Runs in a worker, as it reads the device. A journal that is replayed may enlarge an ext4 and never makes it smaller.
    """
    found = _superblock(device) if fs_type == "ext4" else None
    if found is not None and found.flagged:
        return Mounting.LEFT_ALONE
    is_full = found is not None and ext4.room(found, device) <= found.blocks
    mounts.mount(device, target, fs_type, flags, data, repair)
    return Mounting.FULL if is_full else Mounting.MOUNTED


def carries_error_flag(device: Handle) -> bool:
    """Whether the superblock of an ext4 that is not mounted says that errors were found. Runs in a worker."""
    found = _superblock(device)
    return found is not None and found.flagged


def _superblock(device: Handle) -> ext4.Superblock | None:
    """None also of a device that cannot be read: to mount it says why."""
    try:
        return ext4.read_superblock(device)
    except OSError:
        return None
