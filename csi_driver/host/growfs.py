"""Mounted file systems grow to fill their device: by ioctl on the mount itself, so that no other one can be meant.

Runs in a worker. Layouts: fs/ext4/ext4.h, libxfs's xfs_fs.h (xfsctl(3)), <linux/btrfs.h>.
"""

import errno
import fcntl
import os
import struct
from typing import Final

from csi_driver.host import blockdev, ext4
from csi_driver.host.handle import Handle
from csi_driver.host.syscalls import error_name
from csi_driver.model.errors import CommandFailed, DeviceUnreadable, DriverError, FailedPrecondition, ResourceExhausted

_EXT4_RESIZE: Final = 0x40086610  # EXT4_IOC_RESIZE_FS: the new number of blocks
_XFS_GEOMETRY: Final = 0x8070587C  # XFS_IOC_FSGEOMETRY_V4, 112 bytes
_XFS_GROW: Final = 0x4010586E  # XFS_IOC_FSGROWFSDATA: blocks, and the share of inodes in percent
_BTRFS_RESIZE: Final = 0x50009403  # BTRFS_IOC_RESIZE, 4096 bytes: 8 for a descriptor, then the words


def grow(where: str, mount: Handle, device: Handle, fs_type: str) -> bool:
    """Let the file system that is mounted at `mount` fill `device`, on which it is; whether it became larger.

    One that fills it already stays as it is. Raises FailedPrecondition where an ext4 carries its error flag (the kernel
    refuses, so that nothing becomes worse), DeviceUnreadable, ResourceExhausted, CommandFailed.
    """
    descriptor = os.open(mount, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return _GROW[fs_type](descriptor, device)
    except OSError as error:
        raise _failed(where, fs_type, error) from None
    finally:
        os.close(descriptor)


def _grow_ext4(descriptor: int, device: Handle) -> bool:
    found = ext4.read_superblock(device)
    if found is None or (wanted := ext4.room(found, device)) <= found.blocks:
        return False
    fcntl.ioctl(descriptor, _EXT4_RESIZE, struct.pack("=Q", wanted))
    return True


def _grow_xfs(descriptor: int, device: Handle) -> bool:
    geometry = fcntl.ioctl(descriptor, _XFS_GEOMETRY, bytes(112))
    (block,), (inode_percent,), (present,) = (
        struct.unpack_from("=I", geometry, 0),
        struct.unpack_from("=I", geometry, 28),
        struct.unpack_from("=Q", geometry, 32),
    )
    room = blockdev.size_bytes(device.fd) // block
    if room <= present:
        return False
    fcntl.ioctl(descriptor, _XFS_GROW, struct.pack("=QI4x", room, inode_percent))
    return True


def _grow_btrfs(descriptor: int, _device: Handle) -> bool:
    before = os.fstatvfs(descriptor).f_blocks
    # Of what cannot be changed fcntl takes 1024 bytes at most.
    fcntl.ioctl(descriptor, _BTRFS_RESIZE, bytearray(struct.pack("=q", 0) + b"max".ljust(4088, b"\0")))
    return os.fstatvfs(descriptor).f_blocks > before


_GROW: Final = {"ext4": _grow_ext4, "xfs": _grow_xfs, "btrfs": _grow_btrfs}


def _failed(where: str, fs_type: str, error: OSError) -> DriverError:
    text = f"the {fs_type} file system of {where} could not be enlarged: {error_name(error)}"
    if fs_type == "ext4" and error.errno == errno.EPERM:
        return FailedPrecondition(
            f"{text}; it carries its error flag, so end the volume's pods and run `luks-csi volume check` on it, with "
            f"--repair"
        )
    if error.errno == errno.EROFS:
        return FailedPrecondition(f"{text}; it went read-only after an error, so end the volume's pods and start anew")
    if error.errno in (errno.EIO, errno.EREMOTEIO):
        return DeviceUnreadable(f"{text}; look at the kernel log and the storage below it")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(f"{text}; free space on the storage below it")
    return CommandFailed(text)
