"""Facts about block devices: size, numbers, block size, and writing them back."""

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from csi_driver.host.files import read_attribute
from csi_driver.host.handle import Handle
from csi_driver.host.syscalls import error_name
from csi_driver.model.errors import CommandFailed, DeviceAbsent, DeviceMismatch, DeviceUnreadable

_BLKGETSIZE64: Final = 0x80081272
_BLKROSET: Final = 0x125D
_BLKROGET: Final = 0x125E
_BLKZEROOUT: Final = 0x127F
_ZEROED_AT_ONCE: Final = 32 << 20
_WRITTEN_AT_ONCE: Final = 1 << 20


def is_node_of(path: str, number: tuple[int, int]) -> bool:
    """Whether `path`, links followed, is a node of the block device of that number; False when absent."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return stat.S_ISBLK(found.st_mode) and found.st_rdev == os.makedev(*number)


def name_of(device: Handle) -> str:
    """For what takes no descriptor: the name that people know if it means this device, else the kernel's, else the path
    of the descriptor. It means this device for as long as that is held open.
    """
    number = device.number
    with suppress(OSError):  # what is no block device has no kernel's name
        for name in (device.name, f"/dev/{kernel_name(number)}"):
            if is_node_of(name, number):
                return name
    return device.path


def device_number(path: str) -> tuple[int, int]:
    """(major, minor) of the block device at `path`, links followed.

    Raises DeviceAbsent when there is nothing, DeviceMismatch when it is no block device.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DeviceAbsent(f"the device {path} is not there; check that its storage is attached to this node") from None
    if not stat.S_ISBLK(status.st_mode):
        raise DeviceMismatch(f"{path} is expected to be a block device and is a {kind(status.st_mode)}")
    return os.major(status.st_rdev), os.minor(status.st_rdev)


def size_bytes(device: str | int) -> int:
    """Size in bytes of a block device, by path or open descriptor (BLKGETSIZE64, blkdev).

    Raises DeviceAbsent, DeviceMismatch (no block device), DeviceUnreadable.
    """
    with _opened(device) as descriptor:
        answer = fcntl.ioctl(descriptor, _BLKGETSIZE64, bytes(8))
    return int(struct.unpack("=Q", answer)[0])


def size_of(number: tuple[int, int]) -> int:
    """Size in bytes of the block device of that number, without opening it (sysfs, in sectors of 512 bytes).

    Raises DeviceAbsent.
    """
    major, minor = number
    try:
        return int(read_attribute(f"/sys/dev/block/{major}:{minor}/size")) * 512
    except OSError as error:
        raise DeviceAbsent(f"the device {major}:{minor} is not there any more ({error_name(error)})") from None


def mapping_uuids() -> list[str]:
    """The device-mapper UUIDs of all mapped devices of this node (sysfs); no table is read, and no key in one."""
    found = []
    for entry in os.scandir("/sys/block"):
        with suppress(OSError):  # no mapped device
            found.append(os.fsdecode(read_attribute(f"{entry.path}/dm/uuid").removesuffix(b"\n")))
    return found


def mapping_name_of(number: tuple[int, int]) -> str | None:
    """The name below /dev/mapper of the mapped device of that number (sysfs); None for what is none."""
    major, minor = number
    try:
        return os.fsdecode(read_attribute(f"/sys/dev/block/{major}:{minor}/dm/name").removesuffix(b"\n"))
    except OSError:
        return None


def mapping_uuid_of(number: tuple[int, int]) -> str | None:
    """The device-mapper UUID of the mapped device of that number (sysfs); None for what is none."""
    major, minor = number
    try:
        return os.fsdecode(read_attribute(f"/sys/dev/block/{major}:{minor}/dm/uuid").removesuffix(b"\n"))
    except OSError:
        return None


def is_going(number: tuple[int, int]) -> bool:
    """Whether it is a loop device that goes away with its last user (sysfs, loop/autoclear)."""
    major, minor = number
    try:
        return read_attribute(f"/sys/dev/block/{major}:{minor}/loop/autoclear").strip() == b"1"
    except OSError:
        return False


def kernel_name(number: tuple[int, int]) -> str:
    """The kernel's name of the block device of that number, such as "dm-3". Raises OSError when there is none."""
    major, minor = number
    return os.path.basename(os.readlink(f"/sys/dev/block/{major}:{minor}"))


def fsync_device(device: Handle) -> None:
    """Write back the page cache of the device and flush its write cache; may take as long as the device does.

    Raises DeviceAbsent, DeviceUnreadable when the device rejects the writes.
    """
    try:
        os.fsync(device.fd)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC):
            raise DeviceUnreadable(
                f"the device {device} did not take all that was written to it ({error_name(error)}); its storage is "
                f"full or fails: free room there, or check it, and try again"
            ) from None
        raise _failed(device.name, error) from None


def is_claimed(device: Handle) -> bool:
    """Whether a mounted file system, swap or a device on top has the block device for itself (O_EXCL, open(2)).

    The kernel tells it of every mount namespace. Raises DeviceAbsent, DeviceUnreadable, CommandFailed.
    """
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        raise _failed(device.name, error) from None
    return False


def on_top_of(number: tuple[int, int]) -> list[str]:
    """The devices that lie on the block device of that number (sysfs), mapped ones by their names below /dev/mapper."""
    major, minor = number
    try:
        names = os.listdir(f"/sys/dev/block/{major}:{minor}/holders")
    except OSError:  # the device has gone, and who held it
        return []
    found = []
    for name in sorted(names):
        try:
            mapping = os.fsdecode(read_attribute(f"/sys/block/{name}/dm/name").removesuffix(b"\n"))
            found.append(f"/dev/mapper/{mapping}")
        except FileNotFoundError:  # no mapped device, or one that goes at this moment
            if os.path.exists(f"/sys/block/{name}"):
                found.append(f"/dev/{name}")
        except OSError:
            continue
    return found


def zero_out(device: Handle, start: int, end: int, seconds: float) -> int:
    """Let the device read as zeros from `start` on, durably, up to `end` or as far as `seconds` go; returns how far.

    At least one piece is done. Once it returned, nothing that lay there before can be read again (BLKZEROOUT: by a
    command of the device's own that promises that, else by writing). Raises DeviceAbsent, DeviceUnreadable.
    """
    deadline = time.monotonic() + seconds
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            at = start
            while at < end and (at == start or time.monotonic() < deadline):
                length = min(_ZEROED_AT_ONCE, end - at)
                fcntl.ioctl(descriptor, _BLKZEROOUT, struct.pack("=2Q", at, length))
                at += length
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _failed(device.name, error) from None
    return at


def overwrite(device: Handle, length: int) -> None:
    """Random bytes, durably, over the first `length` bytes of the device. Raises DeviceAbsent, DeviceUnreadable."""
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            at = 0
            while at < length:
                at += os.pwrite(descriptor, os.urandom(min(_WRITTEN_AT_ONCE, length - at)), at)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _failed(device.name, error) from None


def make_writable(descriptor: int) -> None:
    """Take off the read-only flag that an earlier user of the number has left (blockdev(8)). Raises OSError."""
    if struct.unpack("=i", fcntl.ioctl(descriptor, _BLKROGET, bytes(4)))[0]:
        fcntl.ioctl(descriptor, _BLKROSET, struct.pack("=i", 0))


def read_at(descriptor: int, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on, fewer only where the device ends.

    One pread(2) may also stop short of a sector that cannot be read: the next one tells. Raises OSError.
    """
    pieces = []
    while length and (piece := os.pread(descriptor, length, offset)):
        pieces.append(piece)
        offset, length = offset + len(piece), length - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def kind(mode: int) -> str:
    """What a file mode stands for, in words for a message."""
    names = {
        stat.S_IFREG: "regular file",
        stat.S_IFDIR: "directory",
        stat.S_IFLNK: "symbolic link",
        stat.S_IFBLK: "block device",
        stat.S_IFCHR: "character device",
        stat.S_IFIFO: "FIFO",
        stat.S_IFSOCK: "socket",
    }
    return names.get(stat.S_IFMT(mode), "file of unknown type")


@contextmanager
def _opened(device: str | int) -> Iterator[int]:
    if isinstance(device, int):
        descriptor = device
    else:
        device_number(device)
        try:
            descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _failed(device, error) from None
    try:
        yield descriptor
    except OSError as error:
        raise _failed(device, error) from None
    finally:
        if not isinstance(device, int):
            os.close(descriptor)


def _failed(device: str | int, error: OSError) -> DeviceMismatch | CommandFailed:
    name = device if isinstance(device, str) else f"descriptor {device}"
    if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM):
        return DeviceAbsent(f"the device {name} is not there any more ({error_name(error)}); check its storage")
    if error.errno == errno.ENOTTY:
        return DeviceMismatch(f"{name} is expected to be a block device and is something else")
    if error.errno in (errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ENOLINK, errno.EBADE):
        return DeviceUnreadable(f"the device {name} answers with an error ({error_name(error)}); check its storage")
    return CommandFailed(f"the device {name} could not be examined: {error_name(error)}")
