"""The LUKS2 header, read from bytes: both copies of the binary header, their checksums, and the JSON metadata.

Written against the LUKS2 On-Disk Format Specification 1.1.0 and the checks that libcryptsetup makes when it loads a
header. No input and output here: callers hand in the bytes that lie before the volume's data, and `parse` either gives
the facts or raises an error of `csi_driver.model.errors`. Whether the facts are acceptable for a volume is asked in
`csi_driver.luks.header_rules`; what a device without a header holds, in `csi_driver.luks.header_probe`.

A header is unauthenticated: whoever can write to the storage can forge it, checksums included (CVE-2021-4122,
CVE-2025-59054). Two parsers that read the same bytes differently are how such a forgery gets through, so:

- A copy counts as damaged only where libcryptsetup would see it so (magic, version, place, size, checksum). A copy
  whose checksum is right and whose content displeases us is refused, never passed over in favour of the other one.
- The JSON text has one form only (`csi_driver.luks.header_metadata`).
- `repaired` gives bytes in which both copies say what was parsed. Only those go on to libcryptsetup.
"""

import hashlib
import re
import struct
from collections.abc import Mapping
from enum import StrEnum

from msgspec import Struct

from csi_driver.luks.header_metadata import Config, Digest, Keyslot, Segment, Token, decode, refusal
from csi_driver.model.errors import DeviceBlank, ForeignSignature

HEADER_SIZES = tuple(0x4000 << power for power in range(9))
"""Sizes in bytes that one header copy may have, and so the offsets where a secondary copy may lie (16 KiB to 4 MiB)."""
HEADER_PROBE = 2 * HEADER_SIZES[-1]
"""Bytes from the start of a device that hold both copies whatever their size."""
BINARY_SIZE = 4096
"""Bytes of the binary header; the JSON area follows it."""

PRIMARY_MAGIC = b"LUKS\xba\xbe"
SECONDARY_MAGIC = b"SKUL\xba\xbe"
# magic, version, hdr_size, seqid, label, checksum_alg, salt, uuid, subsystem, hdr_offset, padding, csum
_BINARY = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s")
_CHECKSUM_AT = _BINARY.size - 64
_CHECKSUMS = ("sha256", "sha512")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


class Copy(StrEnum):
    """The two copies of a header."""

    PRIMARY = "primary"
    SECONDARY = "secondary"


class Header(Struct, frozen=True):
    """What a LUKS2 header says; ids are the decimal strings of the metadata.

    `source` is the copy the facts were read from. `damaged_copy` is the other one if it is damaged or older (a power
    cut between the two writes of an update leaves that), None when both copies agree.
    """

    uuid: str
    seqid: int
    hdr_size: int
    label: str
    subsystem: str
    keyslots: Mapping[str, Keyslot]
    tokens: Mapping[str, Token]
    segments: Mapping[str, Segment]
    digests: Mapping[str, Digest]
    config: Config
    source: Copy
    damaged_copy: Copy | None

    @property
    def key_digest(self) -> str:
        """The digest of the volume key in hexadecimal digits, to be pinned; "" unless there is exactly one digest."""
        return next(iter(self.digests.values())).digest.hex() if len(self.digests) == 1 else ""


class _Binary(Struct, frozen=True):
    """One copy with a right checksum; `json` is its whole JSON area."""

    hdr_size: int
    seqid: int
    label: str
    checksum_alg: str
    uuid: str
    subsystem: str
    json: bytes


def parse(area: bytes, where: str, changed_from: str | None = None) -> Header:
    """Read the header in `area`: HEADER_PROBE bytes see every header, fewer may end in an error, never in other facts.

    `where` names volume and device in errors ("volume pvc-1 on /dev/loop3"). Of two good copies with different
    sequence ids the newer one is the header; of one good copy and a damaged one, the good one. `changed_from` is the
    UUID that the older copy may still have where a change of the UUID was cut. Raises DeviceBlank when all is zero,
    ForeignSignature when there is other data (LUKS1 included) where the primary copy should be, and
    InvalidHeader when no copy is good, the two contradict each other, or the metadata is not what LUKS2 allows.
    """
    _refuse_other_content(area, where)
    primary = _read_copy(area, 0, where)
    if primary and len(area) < 2 * primary.hdr_size:
        raise refusal(where, f"expected two copies of {primary.hdr_size} bytes, found {len(area)} bytes in all")
    places = (primary.hdr_size,) if primary else HEADER_SIZES
    found = (_read_copy(area, place, where) for place in places)
    secondary = next((copy for copy in found if copy), None)
    chosen, source, damaged = _choose(primary, secondary, where, changed_from)
    if not _UUID.fullmatch(chosen.uuid):
        raise refusal(where, f"expected a UUID, found {chosen.uuid!r}")
    if chosen.hdr_size not in HEADER_SIZES:
        raise refusal(where, f"expected a header of 16 KiB to 4 MiB, a power of two, found {chosen.hdr_size} bytes")
    metadata = decode(chosen.json, where)
    return Header(
        uuid=chosen.uuid,
        seqid=chosen.seqid,
        hdr_size=chosen.hdr_size,
        label=chosen.label,
        subsystem=chosen.subsystem,
        keyslots=metadata.keyslots,
        tokens=metadata.tokens,
        segments=metadata.segments,
        digests=metadata.digests,
        config=metadata.config,
        source=source,
        damaged_copy=damaged,
    )


def repaired(area: bytes, header: Header) -> bytes:
    """`area` with both copies saying what `header`, which was parsed from it, says: what libcryptsetup may be given.

    With two agreeing copies that is `area` itself; else the damaged or older copy is replaced, so that no other
    reader can choose it.
    """
    if header.damaged_copy is None:
        return area
    size = header.hdr_size
    good, bad, magic = (0, size, SECONDARY_MAGIC) if header.source is Copy.PRIMARY else (size, 0, PRIMARY_MAGIC)
    copy = bytearray(area[good : good + size])
    fields = list(_BINARY.unpack_from(copy))
    fields[0], fields[9] = magic, bad
    _BINARY.pack_into(copy, 0, *fields)
    copy[_CHECKSUM_AT : _BINARY.size] = _checksum(bytes(copy), _text(fields[5])).ljust(64, b"\0")
    return area[:bad] + bytes(copy) + area[bad + size :]


def is_luks1(area: bytes) -> bool:
    """Whether `area` begins with a LUKS version 1 header."""
    return area[:8] == PRIMARY_MAGIC + b"\0\1"


def _refuse_other_content(area: bytes, where: str) -> None:
    if area.startswith(PRIMARY_MAGIC):
        if is_luks1(area):
            raise ForeignSignature(f"expected the volume's LUKS2 header on {where}, found LUKS version 1")
        return
    if not area.strip(b"\0"):
        raise DeviceBlank(
            f"expected the volume's LUKS2 header on {where}, found only zeros in its first {len(area)} bytes; "
            "nothing was written, check the storage and that this is the volume's device"
        )
    # A zeroed primary copy can be made good from the secondary one; anything else there is somebody's data, which
    # libcryptsetup does not repair over either.
    if area[:BINARY_SIZE].strip(b"\0"):
        raise ForeignSignature(
            f"expected the volume's LUKS2 header on {where}, found other data at its start; nothing was written, check "
            "that this is the volume's device, else restore its header from a backup"
        )


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _checksum(copy: bytes, algorithm: str) -> bytes:
    blanked = copy[:_CHECKSUM_AT] + bytes(_BINARY.size - _CHECKSUM_AT) + copy[_BINARY.size :]
    return hashlib.new(algorithm, blanked).digest()


def _read_copy(area: bytes, offset: int, where: str) -> _Binary | None:
    """The copy at `offset`, None if it is damaged; refuses what others may read where we cannot."""
    if len(area) < offset + BINARY_SIZE:
        return None
    fields = _BINARY.unpack_from(area, offset)
    magic, version, hdr_size, seqid, label, algorithm, _, uuid, subsystem, hdr_offset, _, checksum = fields
    if magic != (SECONDARY_MAGIC if offset else PRIMARY_MAGIC) or version != 2 or hdr_offset != offset:
        return None
    if not HEADER_SIZES[0] <= hdr_size <= HEADER_SIZES[-1] or offset not in (0, hdr_size):
        return None
    if len(area) < offset + hdr_size:
        raise refusal(where, f"expected {hdr_size} bytes of header at offset {offset}, found {len(area) - offset}")
    if (name := _text(algorithm)) not in _CHECKSUMS:
        raise refusal(where, f"expected checksum algorithm {' or '.join(_CHECKSUMS)}, found {name!r}")
    copy = area[offset : offset + hdr_size]
    expected = _checksum(copy, name)
    if checksum[: len(expected)] != expected:
        return None
    return _Binary(hdr_size, seqid, _text(label), name, _text(uuid), _text(subsystem), copy[BINARY_SIZE:])


def _choose(
    primary: _Binary | None, secondary: _Binary | None, where: str, changed_from: str | None
) -> tuple[_Binary, Copy, Copy | None]:
    if primary and secondary:
        older = min(primary, secondary, key=lambda copy: copy.seqid)
        if primary.uuid != secondary.uuid and (primary.seqid == secondary.seqid or older.uuid != changed_from):
            raise refusal(where, f"its copies have different UUIDs, {primary.uuid!r} and {secondary.uuid!r}")
        if primary.seqid > secondary.seqid:
            return primary, Copy.PRIMARY, Copy.SECONDARY
        if primary.seqid < secondary.seqid:
            return secondary, Copy.SECONDARY, Copy.PRIMARY
        if primary != secondary:
            raise refusal(where, f"its copies have the same sequence id {primary.seqid} and different content")
        return primary, Copy.PRIMARY, None
    if primary:
        return primary, Copy.PRIMARY, Copy.SECONDARY
    if secondary:
        return secondary, Copy.SECONDARY, Copy.PRIMARY
    raise refusal(where, "expected a copy with a right checksum, found both damaged")
