"""The ioctls and nodes of loop devices as the kernel lays them out; `csi_driver.host.loop` gives them meaning.

Layouts: include/uapi/linux/loop.h. Functions raise OSError as the kernel answers unless they say otherwise.
"""

import contextlib
import errno
import fcntl
import os
import stat
import struct
from enum import IntFlag
from typing import Final

from msgspec import Struct

from csi_driver.host.files import read_attribute
from csi_driver.host.syscalls import error_name
from csi_driver.model.errors import DeviceMismatch, FailedPrecondition, ResourceExhausted

_CONTROL: Final = "/dev/loop-control"
_MAJOR: Final = 7
_CLR_FD: Final = 0x4C01
_GET_STATUS64: Final = 0x4C05
_SET_CAPACITY: Final = 0x4C07
_CONFIGURE: Final = 0x4C0A
_CTL_ADD: Final = 0x4C80
_CTL_GET_FREE: Final = 0x4C82
_NEXT_NUMBER: Final = -1
_STATUS: Final = struct.Struct("=5Q 4I 64s 64s 32s 2Q")
_CONFIG_HEAD: Final = struct.Struct("=2I")
_CONFIG_RESERVED: Final = bytes(64)
_BLOCK_SIZE: Final = 512


class Flag(IntFlag):
    """lo_flags."""

    READ_ONLY = 1
    AUTOCLEAR = 4
    DIRECT_IO = 16


class Status(Struct, frozen=True):
    """struct loop_info64, as far as it is used: which file (st_dev, inode), how, and 63 bytes of its name.

    `node` is the device number of a file that is a device's node itself (lo_rdevice), 0 of any other.
    """

    device: int
    inode: int
    flags: int
    name: str
    node: int = 0


def check_control() -> None:
    """Raise FailedPrecondition when no loop device can be asked for; the kernel loads its module if it must."""
    os.close(_open_control())


def free_node() -> str:
    """The node of a loop device that was free a moment ago. Raises FailedPrecondition, ResourceExhausted."""
    return _node(_CTL_GET_FREE)


def new_node() -> str:
    """The node of a loop device that was not there before (loop(4), LOOP_CTL_ADD). Errors as `free_node`."""
    return _node(_CTL_ADD, _NEXT_NUMBER)


def _node(request: int, argument: int = 0) -> str:
    control = _open_control()
    try:
        return f"/dev/loop{fcntl.ioctl(control, request, argument)}"
    except OSError as error:
        raise ResourceExhausted(f"the kernel has no free loop device: {error_name(error)}") from None
    finally:
        os.close(control)


def open_node(path: str, *, read_only: bool) -> int:
    """Open /dev/loop<N>, made first where /dev is not the kernel's own. Raises DeviceMismatch for anything else."""
    access = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
    try:
        descriptor = os.open(path, access)
    except FileNotFoundError:
        with open(f"/sys/block/{os.path.basename(path)}/dev", encoding="ascii") as numbers:
            major, minor = map(int, numbers.read().split(":"))
        with contextlib.suppress(FileExistsError):
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(major, minor))
        descriptor = os.open(path, access)
    status = os.fstat(descriptor)
    if not stat.S_ISBLK(status.st_mode) or os.major(status.st_rdev) != _MAJOR:
        os.close(descriptor)
        raise DeviceMismatch(f"{path} is expected to be a loop device and is something else")
    return descriptor


def configure(device: int, backing: int, path: str, flags: int) -> None:
    """Bind the open file `backing` to the open loop device; `path` is a hint for people."""
    name = os.fsencode(path)[:63]
    status = _STATUS.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, name, b"", b"", 0, 0)
    fcntl.ioctl(device, _CONFIGURE, _CONFIG_HEAD.pack(backing, _BLOCK_SIZE) + status + _CONFIG_RESERVED)


def status(device: int) -> Status | None:
    """What the open loop device is bound to, or None."""
    try:
        answer = fcntl.ioctl(device, _GET_STATUS64, bytes(_STATUS.size))
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise
    number, inode, node, _, _, _, _, _, flags, name, *_ = _STATUS.unpack(answer)
    return Status(number, inode, flags, os.fsdecode(name.rstrip(b"\0")), node)


def set_capacity(device: int) -> None:
    """Take over the present size of the backing file."""
    fcntl.ioctl(device, _SET_CAPACITY, 0)


def clear(device: int) -> None:
    """Release the file, now or with the last close; not bound is fine."""
    try:
        fcntl.ioctl(device, _CLR_FD, 0)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise


def bound_nodes() -> list[str]:
    """Nodes of all bound loop devices, in the order of their numbers."""
    numbers = [int(name[4:]) for name in os.listdir("/sys/block") if name.startswith("loop") and name[4:].isdigit()]
    return [f"/dev/loop{number}" for number in sorted(numbers) if os.path.exists(f"/sys/block/loop{number}/loop")]


def backing_file(path: str) -> str:
    """The whole path of the backing file as the kernel tells it, or "" when the device is not bound."""
    try:
        name = read_attribute(f"/sys/block/{os.path.basename(path)}/loop/backing_file")
        return os.fsdecode(name.removesuffix(b"\n"))
    except OSError:
        return ""


def _open_control() -> int:
    try:
        return os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise FailedPrecondition(
            f"{_CONTROL} cannot be opened ({error_name(error)}); load the kernel module loop, run as root and share "
            f"the host's /dev"
        ) from None
