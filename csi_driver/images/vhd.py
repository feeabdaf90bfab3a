"""vhd of fixed and of dynamic size: a footer that is checked, and of a dynamic one every block.

A fixed one is the raw disk with the footer behind it. Where the footer's checksum and size are right it is a vhd, else
something that ends like one by chance. Source: Microsoft's Virtual Hard Disk Image Format Specification 1.0, and where
qemu's reader looks. Numbers are big-endian.
"""

import struct
from dataclasses import dataclass
from typing import Final

from csi_driver.images.base import MIB
from csi_driver.images.imagefile import SECTOR, ImageFile

MAGIC: Final = b"conectix"

# cookie, features, version, offset of the dynamic header, time, creator (application, version, system), sizes
# (original, current), geometry, type, checksum, unique id, saved state
_FOOTER: Final = struct.Struct(">8sIIQI4sI4sQQIII16sB")
_CHECKSUM_AT: Final = 64
# cookie, offset (unused), offset of the block table, version, entries, bytes of a block, checksum, id of the parent
_DYNAMIC: Final = struct.Struct(">8sQQIIII16s")
_DYNAMIC_BYTES: Final = 1024
_DYNAMIC_CHECKSUM_AT: Final = 36
_FIXED_TYPE, _DYNAMIC_TYPE, _DIFFERENCING_TYPE = 2, 3, 4
_VERSION: Final = 1
"""The major version, the upper 16 bits."""
_ABSENT: Final = 0xFFFF_FFFF
_MOST_ENTRIES: Final = 8 << 20
"""2 TiB, more than the format has, in blocks of 256 KiB."""
_FETCH: Final = "it is damaged, fetch it again"
_MERGE: Final = "merge it with its parent (Merge-VHD of Hyper-V) and give the result"


@dataclass(frozen=True)
class _Footer:
    """What a footer says; `size` is the disk's in bytes."""

    dynamic_at: int
    size: int
    type: int


def fixed_size(image: ImageFile) -> int | None:
    """The bytes of the disk before the footer of a fixed vhd; None where `image` does not end with a footer.

    Raises InvalidArgument, DeviceUnreadable.
    """
    if image.size <= SECTOR or (footer := _footer(image.peek(image.size - SECTOR, SECTOR))) is None:
        return None
    if footer.type != _FIXED_TYPE:
        raise image.refusal("it ends like a dynamic vhd and does not begin like one; " + _FETCH)
    if footer.size != image.size - SECTOR:
        raise image.refusal(
            f"it is a vhd of fixed size whose footer tells a disk of {footer.size} bytes, found "
            f"{image.size - SECTOR} before it; it is truncated or damaged, fetch it again"
        )
    image.require_size(footer.size)
    return footer.size


def virtual_size(image: ImageFile) -> int:
    """The bytes of the disk in `image`, which begins with MAGIC: dynamic. Raises InvalidArgument, DeviceUnreadable."""
    footer = _footer(image.read(0, SECTOR, "vhd footer"))
    if footer is None:
        raise image.refusal(f"it is a vhd whose first footer has a wrong checksum or version; {_FETCH}")
    if footer.type == _DIFFERENCING_TYPE:
        raise image.refusal(f"it is a differencing vhd, a parent has the rest; {_MERGE}")
    if footer.type != _DYNAMIC_TYPE:
        raise image.refusal(f"it is a vhd of type {footer.type} with a footer at its start, expected 3; {_FETCH}")
    image.require_size(footer.size)
    _check_blocks(image, footer)
    return footer.size


def _footer(area: bytes) -> _Footer | None:
    """The footer in a sector; None where it is none, or damaged."""
    if len(area) < SECTOR or not area.startswith(MAGIC) or not _checksum_is_right(area, _CHECKSUM_AT):
        return None
    _, _, version, dynamic_at, _, _, _, _, _, size, _, kind, *_ = _FOOTER.unpack_from(area)
    return _Footer(dynamic_at, size, kind) if version >> 16 == _VERSION else None


def _check_blocks(image: ImageFile, footer: _Footer) -> None:
    """Refuse an image that maps a part of its disk to what is not in the file."""
    header = image.read(footer.dynamic_at, _DYNAMIC_BYTES, "dynamic vhd header")
    cookie, _, table_at, version, entries, block, _, parent = _DYNAMIC.unpack_from(header)
    if cookie != b"cxsparse" or version >> 16 != _VERSION or not _checksum_is_right(header, _DYNAMIC_CHECKSUM_AT):
        raise image.refusal(f"it is a vhd with a dynamic header whose checksum or version is wrong; {_FETCH}")
    if parent.strip(b"\0"):
        raise image.refusal(f"it is a vhd with a parent; {_MERGE}")
    if block & (block - 1) or not SECTOR <= block <= 256 * MIB:
        raise image.refusal(
            f"it is a vhd with blocks of {block} bytes, expected a power of two from 512 to 256 MiB; {_FETCH}"
        )
    blocks = -(-footer.size // block)
    if not blocks <= entries <= _MOST_ENTRIES:
        raise image.refusal(
            f"it is a vhd with {entries} entries in its block table, expected {blocks} to {_MOST_ENTRIES}; {_FETCH}"
        )
    image.require(table_at, entries * 4, "vhd block table")
    bitmap = -(-block // (8 * SECTOR * SECTOR)) * SECTOR
    for number, sector in enumerate(image.numbers("I", "big", table_at, blocks, "vhd block table")):
        if sector != _ABSENT:
            position = number * block
            needed = bitmap + min(block, footer.size - position)
            image.require(sector * SECTOR, needed, f"block at offset {position} of the disk")


def _checksum_is_right(area: bytes, at: int) -> bool:
    """Whether the 4 bytes at `at` are the complement of the sum of the other bytes."""
    total = sum(area) - sum(area[at : at + 4])
    return area[at : at + 4] == (~total & 0xFFFF_FFFF).to_bytes(4, "big")
