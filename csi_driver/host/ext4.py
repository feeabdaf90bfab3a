"""What the superblock of an ext4 says (fs/ext4/ext4.h, ext4(5)); read in a worker, as a dead device never answers."""

import os
import struct
from typing import Final

from msgspec import Struct

from csi_driver.host import blockdev
from csi_driver.host.handle import Handle

_MAGIC: Final = 0xEF53
_ERROR_FS: Final = 2
_64BIT: Final = 0x80
_MOST_LOG_SIZE: Final = 6  # of a block, above 1 KiB: EXT4_MAX_BLOCK_LOG_SIZE


class Superblock(Struct, frozen=True):
    """A file system's size and error flag."""

    block_bytes: int
    blocks: int
    flagged: bool
    """Whether errors were found in it: s_state, s_error_count."""


def read_superblock(device: Handle) -> Superblock | None:
    """None where there is no ext4. Raises OSError."""
    with open(device, "rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read, and decrypted, ahead
        content = os.pread(opened.fileno(), 1024, 1024)
    if len(content) < 1024 or _field(content, "<H", 0x38) != _MAGIC or _field(content, "<I", 0x18) > _MOST_LOG_SIZE:
        return None
    high = _field(content, "<I", 0x150) if _field(content, "<I", 0x60) & _64BIT else 0
    return Superblock(
        block_bytes=1024 << _field(content, "<I", 0x18),
        blocks=_field(content, "<I", 0x04) | high << 32,
        flagged=bool(_field(content, "<H", 0x3A) & _ERROR_FS or _field(content, "<I", 0x194)),
    )


def room(found: Superblock, device: Handle) -> int:
    """How many of its blocks the device has room for, as mke2fs and resize2fs count.

    In whole pages: the kernel reads a device's end by the page.
    """
    page = os.sysconf("SC_PAGESIZE")
    return blockdev.size_bytes(device.fd) // max(found.block_bytes, page) * max(1, page // found.block_bytes)


def _field(content: bytes, form: str, at: int) -> int:
    value: int = struct.unpack_from(form, content, at)[0]
    return value
