"""The attribute "append only" of a file (ioctl_iflags(2), chattr(1) `a`).

Who has such a file open for writing goes on, anywhere in it; nobody can open it for writing anew, bind it to a writable
loop device, shorten, rename or remove it. Reading stays free.
"""

import array
import errno
import fcntl
from typing import Final

_GETFLAGS: Final = 0x80086601
_SETFLAGS: Final = 0x40086602
_APPEND: Final = 0x20
_UNKNOWN: Final = (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL)


def set_append_only(descriptor: int, *, on: bool) -> None:
    """Set or clear it on an open file, read-only is enough; without effect where the file system has no such thing.

    Raises OSError: EPERM without CAP_LINUX_IMMUTABLE, EROFS.
    """
    try:
        flags = array.array("I", [0, 0])  # the kernel reads and writes an int and speaks of a long
        fcntl.ioctl(descriptor, _GETFLAGS, flags)
        wanted = flags[0] | _APPEND if on else flags[0] & ~_APPEND
        if wanted != flags[0]:
            flags[0] = wanted
            fcntl.ioctl(descriptor, _SETFLAGS, flags)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
