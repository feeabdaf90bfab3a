"""Room that is left to others while something large is written beside them."""

import os
from typing import Final

from csi_driver.images.base import MIB
from csi_driver.model.errors import ResourceExhausted

EVERY: Final = 64 * MIB
"""Bytes after which room is to be looked at again."""

_KEPT_BYTES: Final = 1024 * MIB
_KEPT_PART: Final = 20  # a twentieth of a small file system


def spare_bytes(descriptor: int) -> int:
    """What may still be written to the file system of an open file: the volumes on it need room too.

    1 GiB is kept, or a twentieth of the file system. Negative where less than that is free. Raises OSError.
    """
    free, kept = _room(descriptor)
    return free - kept


def check_room(descriptor: int, what: str, wanted: int = 0) -> None:
    """Raise ResourceExhausted when `wanted` bytes are not to spare. `what` is the work, as in "to unpack image a".

    Raises OSError.
    """
    free, kept = _room(descriptor)
    if free - kept < wanted:
        raise ResourceExhausted(
            f"no space is left {what}: {f'{wanted} bytes are wanted, ' if wanted else ''}{free} bytes are free, and "
            f"{kept} are kept for what else is on the disk; check that it is as large as it should be, and make room"
        )


def _room(descriptor: int) -> tuple[int, int]:
    found = os.fstatvfs(descriptor)
    return found.f_bavail * found.f_frsize, min(_KEPT_BYTES, found.f_blocks * found.f_frsize // _KEPT_PART)
