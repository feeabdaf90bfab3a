"""What leads to a mapped device: its name below /dev/mapper, kept here and by udev, and the kernel's own node.

Names come and go: udev handles its events late, and the removal of an earlier device may take away the link that is
another's by then. Hence every look compares device numbers, and what is opened is looked at again.
"""

import contextlib
import errno
import os
import stat
from typing import Final

from csi_driver.host.syscalls import error_name
from csi_driver.model.errors import CommandFailed

_TRIES: Final = 10


def name_path(name: str) -> str:
    """Where the name of a mapping is found."""
    return f"/dev/mapper/{name}"


def ensure_name(name: str, number: int) -> None:
    """See that the name leads to the device of that number (st_rdev), whatever was there. Raises CommandFailed.

    It is a link to the kernel's node, as udev makes it and later removes it: a node would be in udev's way for good,
    and is made only where /dev is not the kernel's.
    """
    path, node = name_path(name), _kernel_node(number)
    try:
        for _ in range(_TRIES):
            if _leads_to(path, number):
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            with contextlib.suppress(FileExistsError):  # udev was quicker
                if _leads_to(node, number):
                    os.symlink(f"../{os.path.basename(node)}", path)
                else:
                    os.mknod(path, stat.S_IFBLK | 0o600, number)
    except OSError as error:
        raise CommandFailed(f"the device node {path} could not be made: {error_name(error)}") from None


def remove_name(name: str) -> None:
    """Remove the name of a mapping that is gone; absent, or a file of another kind, is left."""
    path = name_path(name)
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if stat.S_ISBLK(mode) or stat.S_ISLNK(mode):
            os.unlink(path)


def drop_node(name: str, number: int) -> None:
    """Remove the node of that number which `open_number` has made for a mapping that went at the same moment.

    The number may be another mapping's soon. A link is udev's, or leads to the kernel's node, which goes by itself.
    """
    path = name_path(name)
    with contextlib.suppress(FileNotFoundError):
        if _is_device(os.lstat(path), number):
            os.unlink(path)


def open_number(name: str, number: int) -> int | None:
    """A descriptor, for reading, of the mapped device of that number (st_rdev), by the kernel's node or by its name.

    None when the device, or what led to it, has gone meanwhile. Raises CommandFailed.
    """
    path = _kernel_node(number)
    if not _leads_to(path, number):
        ensure_name(name, number)
        path = name_path(name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            return None
        raise CommandFailed(f"the mapping {name} could not be opened at {path}: {error_name(error)}") from None
    if _is_device(os.fstat(descriptor), number):
        return descriptor
    os.close(descriptor)
    return None


def _kernel_node(number: int) -> str:
    """Where devtmpfs has the node of a mapped device."""
    return f"/dev/dm-{os.minor(number)}"


def _leads_to(path: str, number: int) -> bool:
    try:
        return _is_device(os.stat(path), number)
    except OSError:  # absent, or a link that leads nowhere
        return False


def _is_device(status: os.stat_result, number: int) -> bool:
    return stat.S_ISBLK(status.st_mode) and status.st_rdev == number
