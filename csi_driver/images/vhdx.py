"""vhdx, read far enough to trust it to qemu: checksums right, nothing left in its log, no parent, every block there.

Source: [MS-VHDX] 2.0. Of the two copies of the region table the first one counts, as for qemu.
"""

import struct
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from csi_driver.images.base import MIB
from csi_driver.images.imagefile import SECTOR, ImageFile

MAGIC: Final = b"vhdxfile"

_KIB: Final = 1024
_HEADERS_AT: Final = (64 * _KIB, 128 * _KIB)
_HEADER_BYTES: Final = 4 * _KIB
# signature, checksum, sequence number, GUIDs (file write, data write, log), log version, version, log (length, offset)
_HEADER: Final = struct.Struct("<4sIQ16s16s16sHHIQ")
_REGIONS_AT: Final = 192 * _KIB
_TABLE_BYTES: Final = 64 * _KIB
_MOST_ENTRIES: Final = 2047
# signature, checksum, entries, reserved; then per entry: GUID, offset, length, required
_REGIONS: Final = struct.Struct("<4sIII")
_REGION: Final = struct.Struct("<16sQII")
# signature, reserved, entries, reserved; then per entry: GUID, offset in the region, length, flags, reserved
_METADATA: Final = struct.Struct("<8sHH20s")
_ITEM: Final = struct.Struct("<16sIIII")
_REQUIRED_REGION, _REQUIRED_ITEM = 1, 4

_BAT: Final = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le
_METADATA_REGION: Final = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
_PARAMETERS: Final = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
_DISK_SIZE: Final = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8").bytes_le
_DISK_ID: Final = UUID("beca12ab-b2e6-4523-93ef-c309e000c746").bytes_le
_LOGICAL_SECTOR: Final = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f").bytes_le
_PHYSICAL_SECTOR: Final = UUID("cda348c7-445d-4471-9cc9-e9885251c556").bytes_le
_PARENT: Final = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
_ITEM_BYTES: Final = {_PARAMETERS: 8, _DISK_SIZE: 8, _DISK_ID: 16, _LOGICAL_SECTOR: 4, _PHYSICAL_SECTOR: 4}
_HAS_PARENT: Final = 2

_SECTORS_PER_CHUNK: Final = 1 << 23
_STATE: Final = 7
_BLOCK_OFFSET: Final = (1 << 64) - MIB
_READ_AS_ZEROS, _PRESENT, _PARTIAL = {0, 1, 2, 3, 5}, 6, 7
_MERGE: Final = "merge it with its parent, or convert it where the parent is"
_CONVERT: Final = "convert it to qcow2"
_FETCH: Final = "it is damaged, fetch it again"


@dataclass(frozen=True)
class _Region:
    offset: int
    length: int


def virtual_size(image: ImageFile) -> int:
    """The bytes of the disk in `image`, which begins with MAGIC. Raises InvalidArgument, DeviceUnreadable."""
    log = _check_headers(image)
    regions = _read_regions(image, log)
    items = _read_items(image, regions[_METADATA_REGION])
    block, flags = struct.unpack("<II", items[_PARAMETERS])
    size = int.from_bytes(items[_DISK_SIZE], "little")
    sector = int.from_bytes(items[_LOGICAL_SECTOR], "little")
    if flags & _HAS_PARENT or _PARENT in items:
        raise image.refusal(f"it is a vhdx with a parent; {_MERGE}")
    if sector != SECTOR:
        raise image.refusal(
            f"it is a vhdx with logical sectors of {sector} bytes, expected {SECTOR}; convert it to one with {SECTOR}"
        )
    if block & (block - 1) or not MIB <= block <= 256 * MIB:
        raise image.refusal(
            f"it is a vhdx with blocks of {block} bytes, expected a power of two from 1 to 256 MiB; {_FETCH}"
        )
    image.require_size(size)
    _check_blocks(image, regions[_BAT], block, size)
    return size


def _check_headers(image: ImageFile) -> _Region:
    """Where the log lies. Of two headers the one with the higher sequence number counts; a cut write may damage one."""
    copies = [image.read(at, _HEADER_BYTES, "vhdx header") for at in _HEADERS_AT]
    good = [_HEADER.unpack_from(copy) for copy in copies if copy.startswith(b"head") and _checksum_is_right(copy)]
    if not good:
        raise image.refusal(f"it is a vhdx with no header whose checksum is right; {_FETCH}")
    newest = max(good, key=lambda header: int(header[2]))
    if len(good) == 2 and good[0][2] == good[1][2] and good[0] != good[1]:
        raise image.refusal(
            f"it is a vhdx whose two headers have one sequence number and contradict each other; {_FETCH}"
        )
    *_, log, log_version, version, length, offset = newest
    if version != 1 or log_version:
        raise image.refusal(
            f"it is a vhdx of version {version} with a log of version {log_version}, expected 1 and 0; {_CONVERT}"
        )
    if log.strip(b"\0"):
        raise image.refusal(
            "it is a vhdx with a log that must be replayed, it was not closed cleanly; run `qemu-img check -f vhdx -r "
            "all FILE`"
        )
    return _Region(offset, length)


def _read_regions(image: ImageFile, log: _Region) -> dict[bytes, _Region]:
    """The regions by GUID; both that every vhdx has are there and lie in the file."""
    table = image.read(_REGIONS_AT, _TABLE_BYTES, "vhdx region table")
    signature, _, count, _ = _REGIONS.unpack_from(table)
    if signature != b"regi" or count > _MOST_ENTRIES or not _checksum_is_right(table):
        raise image.refusal(f"it is a vhdx with a region table whose checksum is wrong; {_FETCH}")
    regions: dict[bytes, _Region] = {}
    for index in range(count):
        guid, offset, length, required = _REGION.unpack_from(table, _REGIONS.size + index * _REGION.size)
        if guid not in {_BAT, _METADATA_REGION}:
            if required & _REQUIRED_REGION:
                raise image.refusal(f"it is a vhdx with the unknown region {UUID(bytes_le=guid)}; {_CONVERT}")
            continue
        if guid in regions:
            raise image.refusal(f"it is a vhdx that names one region twice; {_FETCH}")
        regions[guid] = _Region(offset, length)
    if len(regions) != 2:
        raise image.refusal(f"it is a vhdx without a block table or metadata; {_FETCH}")
    end = MIB  # of the headers
    for region in sorted((log, *regions.values()), key=lambda region: region.offset):
        if region.length:  # a vhdx may do without a log
            if region.offset % MIB or region.length % MIB or region.offset < end:
                raise image.refusal(f"it is a vhdx with a region out of place (offset {region.offset}); {_FETCH}")
            end = region.offset + region.length
            image.require(region.offset, region.length, "vhdx region")
    return regions


def _read_items(image: ImageFile, region: _Region) -> dict[bytes, bytes]:
    """The metadata by GUID: every item that a disk has, and the parent where there is one."""
    table = image.read(region.offset, _TABLE_BYTES, "vhdx metadata table")
    signature, _, count, _ = _METADATA.unpack_from(table)
    if signature != b"metadata" or count > _MOST_ENTRIES:
        raise image.refusal(f"it is a vhdx with a metadata table that is none; {_FETCH}")
    items: dict[bytes, bytes] = {}
    for index in range(count):
        guid, offset, length, flags, _ = _ITEM.unpack_from(table, _METADATA.size + index * _ITEM.size)
        if guid not in _ITEM_BYTES and guid != _PARENT:
            if flags & _REQUIRED_ITEM:
                raise image.refusal(f"it is a vhdx with the unknown metadata {UUID(bytes_le=guid)}; {_CONVERT}")
            continue
        wanted = _ITEM_BYTES.get(guid, 0)
        if guid in items or length < wanted or offset < _TABLE_BYTES or offset + length > region.length:
            raise image.refusal(f"it is a vhdx with the metadata {UUID(bytes_le=guid)} twice or out of place; {_FETCH}")
        items[guid] = image.read(region.offset + offset, wanted, "vhdx metadata")
    if missing := _ITEM_BYTES.keys() - items.keys():
        raise image.refusal(f"it is a vhdx without the metadata {UUID(bytes_le=min(missing))}; {_FETCH}")
    return items


def _check_blocks(image: ImageFile, bat: _Region, block: int, size: int) -> None:
    """Refuse an image that maps a part of its disk to what is not in the file."""
    ratio = _SECTORS_PER_CHUNK * SECTOR // block
    blocks = -(-size // block)
    entries = blocks + (blocks - 1) // ratio  # a chunk of blocks is followed by an entry for its sector bitmap
    if entries * 8 > bat.length:
        raise image.refusal(f"it is a vhdx whose block table has no room for its {blocks} blocks; {_FETCH}")
    for index, entry in enumerate(image.numbers("Q", "little", bat.offset, entries, "vhdx block table")):
        chunk, slot = divmod(index, ratio + 1)
        if slot == ratio or (state := entry & _STATE) in _READ_AS_ZEROS:
            continue
        position = (chunk * ratio + slot) * block
        if state == _PARTIAL:
            raise image.refusal(
                f"it is a vhdx that lacks a part of its block at offset {position}, a parent has it; {_MERGE}"
            )
        offset = entry & _BLOCK_OFFSET
        if state != _PRESENT or offset < MIB:
            raise image.refusal(f"it is a vhdx whose block at offset {position} is in no known state; {_FETCH}")
        image.require(offset, min(block, size - position), f"block at offset {position} of the disk")


def _checksum_is_right(area: bytes) -> bool:
    """Whether bytes 4 to 7 are the CRC-32C of `area` with zeros in their place."""
    return struct.unpack_from("<I", area, 4) == (crc32c(area[:4] + bytes(4) + area[8:]),)


def _crc32c_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # noqa: PLW2901 -- eight steps of one byte
        table.append(value)
    return table


_CRC32C: Final = _crc32c_table()


def crc32c(content: bytes) -> int:
    """CRC-32C (Castagnoli, RFC 3720 appendix B.4), which the standard library does not have."""
    crc = 0xFFFF_FFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFF_FFFF
