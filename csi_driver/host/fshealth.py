"""What ails a mounted file system, from what the kernel tells at next to no cost; a dead device holds up nobody."""

import errno
import os
import struct
from enum import StrEnum
from typing import Final

from csi_driver.host import blockdev
from csi_driver.host.files import read_attribute
from csi_driver.host.handle import Handle
from csi_driver.host.mountinfo import Mount
from csi_driver.host.mounts import Mounts
from csi_driver.host.patience import within
from csi_driver.model.errors import FailedPrecondition

_LIMIT_SECONDS: Final = 1.0
_EXT4_MAGIC: Final = 0xEF53
_EXT4_ERROR_FS: Final = 2


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


def mount_unless_flagged(
    mounts: Mounts, device: Handle, target: str, fs_type: str, flags: int, data: str, repair: str
) -> bool:
    """`Mounts.mount`, but for an ext4 that carries its error flag: that one is left alone. Whether it was mounted.

    Runs in a worker, as it reads the device.
    """
    if fs_type == "ext4" and carries_error_flag(device):
        return False
    mounts.mount(device, target, fs_type, flags, data, repair)
    return True


def carries_error_flag(device: Handle) -> bool:
    """Whether the superblock of an ext4 that is not mounted says that errors were found: s_state, s_error_count.

    Runs in a worker. A device that cannot be read tells nothing: to mount it says why.
    """
    try:
        with open(device, "rb", buffering=0) as opened:
            superblock = os.pread(opened.fileno(), 1024, 1024)
    except OSError:
        return False
    if len(superblock) < 1024 or struct.unpack_from("<H", superblock, 0x38)[0] != _EXT4_MAGIC:
        return False
    (state,), (errors,) = struct.unpack_from("<H", superblock, 0x3A), struct.unpack_from("<I", superblock, 0x194)
    return bool(state & _EXT4_ERROR_FS or errors)
