"""vdi of VirtualBox, version 1.1, read far enough to trust it to qemu: no parent, every block in the file.

Source: VirtualBox's VDICore.h, and where qemu's reader looks. Numbers are little-endian.
"""

import struct
from typing import Final

from csi_driver.images.base import MIB
from csi_driver.images.imagefile import SECTOR, ImageFile

MAGIC: Final = b"\x7f\x10\xda\xbe"
MAGIC_AT: Final = 64
"""A line of text stands before it, which differs from program to program."""

# version, bytes of the header, type, flags, comment, offsets (block table, data), geometry, bytes of a sector, unused,
# bytes of the disk, of a block and of its extra data, blocks (all, allocated), ids (own, snapshot, link, parent)
_HEADER: Final = struct.Struct("<IIII256sII12sIIQIIII16s16s16s16s")
_HEADER_AT: Final = MAGIC_AT + len(MAGIC)
_VERSION: Final = 0x0001_0001
_DYNAMIC, _FIXED = 1, 2
_BLOCK: Final = MIB
"""VirtualBox makes no other blocks, and qemu reads none."""
_FREE: Final = 0xFFFF_FFFE
"""From here on an entry is no block: reads as zeros, or never written."""
_MOST_BLOCKS: Final = 0x1FFF_FFF8
_FETCH: Final = "it is damaged, fetch it again"


def virtual_size(image: ImageFile) -> int:
    """The bytes of the disk in `image`, which has MAGIC at MAGIC_AT. Raises InvalidArgument, DeviceUnreadable."""
    header = image.read(_HEADER_AT, _HEADER.size, "vdi header")
    (
        version, _, kind, _, _, table_at, data_at, _, sector, _, size, block, extra, blocks, _, _, _, link, parent
    ) = _HEADER.unpack(header)  # fmt: skip
    if version != _VERSION:
        raise image.refusal(
            f"it is a vdi of version {version >> 16}.{version & 0xFFFF}, expected 1.1; convert it with VirtualBox: "
            "VBoxManage clonemedium"
        )
    if kind not in {_DYNAMIC, _FIXED} or (link + parent).strip(b"\0"):
        raise image.refusal(
            f"it is a vdi of type {kind} that lacks what its parent has, a snapshot; make one image of it with "
            "VirtualBox: VBoxManage clonemedium"
        )
    if (sector, block, extra) != (SECTOR, _BLOCK, 0):
        raise image.refusal(
            f"it is a vdi with sectors of {sector} bytes and blocks of {block} and {extra}, expected {SECTOR}, "
            f"{_BLOCK} and 0; convert it with VirtualBox: VBoxManage clonemedium"
        )
    if table_at % SECTOR or data_at % SECTOR or not table_at:
        raise image.refusal(f"it is a vdi with its tables at {table_at} and {data_at}, between two sectors; {_FETCH}")
    image.require_size(size)
    needed = -(-size // block)
    if not needed <= blocks <= _MOST_BLOCKS:
        raise image.refusal(f"it is a vdi with {blocks} blocks, expected {needed} to {_MOST_BLOCKS}; {_FETCH}")
    image.require(table_at, blocks * 4, "vdi block table")
    for number, entry in enumerate(image.numbers("I", "little", table_at, needed, "vdi block table")):
        if entry < _FREE:
            position = number * block
            name = f"block at offset {position} of the disk"
            image.require(data_at + entry * block, min(block, size - position), name)
    return int(size)
