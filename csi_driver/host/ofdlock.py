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


def try_lock(descriptor: int) -> bool:
    """Lock the whole file exclusively, without waiting; False when another open file has it. Raises OSError."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, *_WHOLE_FILE, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def is_locked(descriptor: int) -> bool:
    """Whether another open file holds a lock on the file. Raises OSError."""
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, *_WHOLE_FILE, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
