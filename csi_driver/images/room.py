"""Room that is left to others while something of unknown length is written beside them."""

import os
from typing import Final

from csi_driver.images.base import MIB
from csi_driver.model.errors import ResourceExhausted

EVERY: Final = 64 * MIB
"""Bytes after which room is to be looked at again."""

_KEPT_BYTES: Final = 1024 * MIB
_KEPT_PART: Final = 20  # a twentieth of a small file system


def check_room(descriptor: int, what: str) -> None:
    """Raise ResourceExhausted when the file system of an open file is nearly full: the volumes on it need room too.

    `what` names the work, as in "to unpack image debian". 1 GiB is kept, or a twentieth of the file system. Raises
    OSError.
    """
    found = os.fstatvfs(descriptor)
    free = found.f_bavail * found.f_frsize
    kept = min(_KEPT_BYTES, found.f_blocks * found.f_frsize // _KEPT_PART)
    if free < kept:
        raise ResourceExhausted(
            f"no space is left {what}: {free} bytes are free, and {kept} are kept for what else is on the disk; check "
            f"that it is as large as it should be, and make room"
        )
