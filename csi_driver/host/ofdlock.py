"""Locks on open file descriptions (fcntl(2), F_OFD_SETLK).

Like flock(2) they belong to the open file and not to a process, so a loop device carries the lock of the descriptor it
was made from. Unlike flock they are in nobody's way: cryptsetup takes flock of a plain file and would wait for good.
"""

import errno
import fcntl
import struct
from typing import Final

_FLOCK: Final = struct.Struct("hhqqi4x")
_WHOLE_FILE: Final = (0, 0, 0)  # from the start, to whatever the end will be
_MARK: Final = (0, 1 << 62, 1)  # one byte where nobody else locks: qemu judges a file by locks on bytes 100 to 203


def try_lock(descriptor: int) -> bool:
    """Lock the whole file exclusively, without waiting; False when another open file has it. Raises OSError."""
    return _try(descriptor, fcntl.F_WRLCK, _WHOLE_FILE)


def try_share(descriptor: int) -> bool:
    """Say that the file is in use, as any number may; False when somebody has claimed it. Raises OSError."""
    return _try(descriptor, fcntl.F_RDLCK, _MARK)


def try_claim(descriptor: int) -> bool:
    """Have for oneself a file that is open for writing; False while anybody shares it. Raises OSError."""
    return _try(descriptor, fcntl.F_WRLCK, _MARK)


def is_locked(descriptor: int) -> bool:
    """Whether another open file holds a lock on the file. Raises OSError."""
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, *_WHOLE_FILE, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _try(descriptor: int, kind: int, extent: tuple[int, int, int]) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, *extent, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True
