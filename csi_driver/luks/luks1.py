"""The header of LUKS version 1, told in the words of LUKS2, as `cryptsetup convert` would write it.

So one set of rules (`csi_driver.luks.header_rules`) holds for both. LUKS1 is read and never written. Source: LUKS1
On-Disk Format Specification 1.2.3; cryptsetup and QEMU write it alike but for where the parts lie.
"""

import re
import struct
from typing import Final

from csi_driver.luks.header import PRIMARY_MAGIC, Copy, Header
from csi_driver.luks.header_metadata import (
    AntiForensic,
    Area,
    Config,
    Decimal,
    Digest,
    Keyslot,
    Pbkdf2,
    Segment,
    refusal,
)

# magic, version, cipher, its mode, hash, payload offset in sectors, bytes of the key, digest, its salt and iterations
_HEADER: Final = struct.Struct(">6sH32s32s32sII20s32sI40s")
# state, iterations, salt, offset in sectors, stripes
_SLOT: Final = struct.Struct(">II32sII")
_SLOTS: Final = 8
_ACTIVE, _FREE = 0x00AC71F3, 0x0000DEAD
_SECTOR: Final = 512
_HALF: Final = 2048
"""LUKS2 counts its header twice, so half of the 4 KiB before the first key slot."""
_NAME: Final = re.compile(rb"([a-z0-9:-]{1,31})\0*")
_UUID: Final = re.compile(rb"([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})\0*")
LUKS1_BYTES: Final = 2 * _HALF
"""What `parse_luks1` must see."""


def parse_luks1(area: bytes, where: str) -> Header:
    """Read the header in `area`, which begins with it. `where` names the image in errors. Raises InvalidHeader."""
    if len(area) < LUKS1_BYTES:
        raise refusal(where, f"expected {LUKS1_BYTES} bytes of LUKS1 header, found {len(area)}")
    magic, version, cipher, mode, hash_name, payload, key_bytes, digest, salt, iterations, uuid = _HEADER.unpack_from(
        area
    )
    if magic != PRIMARY_MAGIC or version != 1:
        raise refusal(where, "expected LUKS version 1, found another one")
    cipher, mode, hash_name = (
        _text(_NAME, field, where, name) for field, name in ((cipher, "cipher"), (mode, "mode"), (hash_name, "hash"))
    )
    encryption, offset = f"{cipher}-{mode}", payload * _SECTOR
    slots: dict[str, Keyslot] = {}
    for number in range(_SLOTS):
        state, cost, slot_salt, at, stripes = _SLOT.unpack_from(area, _HEADER.size + number * _SLOT.size)
        if state == _FREE:
            continue
        if state != _ACTIVE:
            raise refusal(where, f"expected key slot {number} to be in use or free, found the state {state:#x}")
        slots[str(number)] = Keyslot(
            type="luks2",
            key_size=key_bytes,
            area=Area("raw", Decimal(at * _SECTOR), Decimal(_slot_bytes(key_bytes, stripes)), encryption, key_bytes),
            af=AntiForensic("luks1", stripes, hash_name),
            kdf=Pbkdf2(hash_name, cost, slot_salt),
        )
    return Header(
        uuid=_text(_UUID, uuid, where, "UUID"),
        seqid=1,
        hdr_size=_HALF,
        label="",
        subsystem="",
        keyslots=slots,
        tokens={},
        segments={"0": Segment("crypt", Decimal(offset), "dynamic", Decimal(0), encryption, _SECTOR)},
        digests={"0": Digest("pbkdf2", tuple(slots), ("0",), hash_name, iterations, salt, digest)},
        config=Config(Decimal(0), Decimal(max(offset - LUKS1_BYTES, 0))),
        source=Copy.PRIMARY,
        damaged_copy=None,
    )


def _slot_bytes(key_bytes: int, stripes: int) -> int:
    """The bytes of a slot's key material, whole sectors."""
    return -(-key_bytes * stripes // _SECTOR) * _SECTOR


def _text(form: re.Pattern[bytes], field: bytes, where: str, name: str) -> str:
    if not (found := form.fullmatch(field)):
        raise refusal(where, f"expected a {name}, found {field[:40]!r}")
    return found[1].decode()
