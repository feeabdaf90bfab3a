"""Whether the first bytes of a device are blank, or what a killed luksFormat left. Pure functions over bytes."""

from csi_driver.luks.header import BINARY_SIZE, HEADER_SIZES, PRIMARY_MAGIC, SECONDARY_MAGIC

METADATA_SIZE = HEADER_SIZES[0]
"""Bytes of one header copy as luksFormat makes it by itself; this driver asks for no other size."""

_SECTOR = 512
_UUID_FIELD = slice(168, 208)  # of the binary header
_JSON_BYTES = bytes(range(0x20, 0x7F)) + b"\0"
# 512 random bytes have 221 different values on average with a standard deviation of 4.5
_LEAST_RANDOM_VALUES = 180


def is_blank_or_ours(area: bytes, uuid: str) -> bool:
    """Whether `area`, all that lies before the data, can be what a luksFormat with `uuid` left, wherever it was killed.

    luksFormat zeroes the area, fills the key slots' part with random bytes, then writes both copies of the header, and
    any of these writes may be torn. So each copy's first sector holds zeros or the LUKS magic with our UUID, the
    rest of its binary header zeros, its JSON area text or zeros, and every sector of the key slots' part zeros or
    random bytes. Whatever has a structure (a file system's superblock, somebody's LUKS header) is not ours, nor is an
    `area` too short for both copies.
    """
    if len(area) < 2 * METADATA_SIZE:
        return False
    return area == bytes(len(area)) or (
        _is_copy_of_ours(area[:METADATA_SIZE], PRIMARY_MAGIC, uuid)
        and _is_copy_of_ours(area[METADATA_SIZE : 2 * METADATA_SIZE], SECONDARY_MAGIC, uuid)
        and all(_is_blank_or_random(area[at : at + _SECTOR]) for at in range(2 * METADATA_SIZE, len(area), _SECTOR))
    )


def _is_copy_of_ours(copy: bytes, magic: bytes, uuid: str) -> bool:
    sector = copy[:_SECTOR]
    ours = sector.startswith(magic + b"\0\2") and sector[_UUID_FIELD] == uuid.encode().ljust(40, b"\0")
    return (
        (ours or not sector.strip(b"\0"))
        and not copy[_SECTOR:BINARY_SIZE].strip(b"\0")
        and not copy[BINARY_SIZE:].translate(None, delete=_JSON_BYTES)
    )


def _is_blank_or_random(sector: bytes) -> bool:
    return not sector.strip(b"\0") or len(set(sector)) >= _LEAST_RANDOM_VALUES
