"""An image that is LUKS already, version 2 or 1: what its header says, and what to run where it must not be used."""

from typing import Final

import msgspec

from csi_driver.images.imagefile import ImageFile
from csi_driver.luks.formats import READABLE_HASHES
from csi_driver.luks.header import BINARY_SIZE, HEADER_PROBE, HEADER_SIZES, Header, is_luks1, parse
from csi_driver.luks.header_rules import Limits, validate
from csi_driver.luks.luks1 import LUKS1_BYTES, parse_luks1
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.reading import decode
from csi_driver.model.volume import LuksIdentity

ANY_COST: Final = Limits(
    memory_kib=1 << 32, time=1 << 32, cpus=1 << 32, iterations=1 << 32, keyslots=32, hashes=READABLE_HASHES
)
"""For a header that is only read: what a key slot costs is asked when it is opened, by whoever pays."""

_ANEW: Final = "make the image anew"
_FINISH: Final = (
    "it was not reencrypted to its end: `cryptsetup reencrypt --resume-only --force-offline-reencrypt FILE`"
)


class _Slot(msgspec.Struct, frozen=True):
    type: str = ""
    priority: int = 1


class _Digest(msgspec.Struct, frozen=True):
    keyslots: tuple[str, ...] = ()
    segments: tuple[str, ...] = ()


class _Metadata(msgspec.Struct, frozen=True):
    """What of LUKS2's metadata tells why cryptsetup left it in a state that is refused."""

    keyslots: dict[str, _Slot] = {}
    digests: dict[str, _Digest] = {}


def inspect_luks(image: ImageFile) -> tuple[LuksIdentity, int]:
    """What the header of `image` says, and the bytes of data behind it. Raises InvalidArgument, DeviceUnreadable."""
    area = image.peek(0, HEADER_PROBE)
    first = is_luks1(area)
    version = 1 if first else 2
    try:
        header = parse_luks1(area[:LUKS1_BYTES], image.where) if first else parse(area, image.where)
        identity = _identity(image, header, version)
        validate(header, identity, image.size, image.where, limits=ANY_COST)
    except FailedPrecondition as error:
        # Around the reason stands what a volume's reader needs.
        reason = str(error).removeprefix(f"the LUKS2 header of {image.where} is refused: ").partition("; ")[0]
        advice = _ANEW if first else _mend(area)
        raise image.refusal(f"it is LUKS{version} with a header that must not be used ({reason}); {advice}") from None
    payload = image.size - identity.data_offset
    if payload % identity.sector_size:
        raise image.refusal(
            f"it is LUKS{version} with {payload} bytes of data, expected whole sectors of {identity.sector_size}; it "
            "is truncated, fetch it again"
        )
    image.require_limit(payload)
    return identity, payload


def _identity(image: ImageFile, header: Header, version: int) -> LuksIdentity:
    """What the header says of itself, for the rules that a volume's header must keep."""
    if header.damaged_copy:
        raise image.refusal(
            f"it is LUKS2 with a damaged or outdated {header.damaged_copy} header; mend it with `cryptsetup repair "
            f"FILE`"
        )
    segment, slot = header.segments.get("0"), next(iter(header.keyslots.values()), None)
    if segment is None or slot is None:
        raise image.refusal(f"it is LUKS{version} without data or without a key slot, no key opens it; {_ANEW}")
    if segment.offset < 2 * header.hdr_size + header.config.keyslots_size:
        raise image.refusal(
            f"it is a detached LUKS{version} header, its data begins at {segment.offset} of another file; give a whole "
            "device"
        )
    if image.size < segment.offset + segment.sector_size:
        raise image.refusal(
            f"it is a LUKS{version} header without data: expected more than {segment.offset} bytes, found "
            f"{image.size}; it is truncated or a header backup, give the whole image"
        )
    return LuksIdentity(
        uuid=header.uuid,
        cipher=segment.encryption,
        key_bits=slot.key_size * 8,
        sector_size=segment.sector_size,
        data_offset=int(segment.offset),  # the record takes plain numbers
        digest=header.key_digest,
    )


def _mend(area: bytes) -> str:
    """What to run on a header that cryptsetup left in a state that is refused; the metadata may be anything."""
    text = area[BINARY_SIZE : HEADER_SIZES[0]].partition(b"\0")[0]
    try:
        metadata = decode(text, _Metadata)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return _ANEW
    if any(slot.type == "reencrypt" for slot in metadata.keyslots.values()):
        return _FINISH
    for digest in metadata.digests.values():
        for slot in digest.keyslots:
            if not digest.segments and slot.isdecimal():
                return f"its key slot {slot} opens nothing of it: `cryptsetup luksKillSlot FILE {slot}`"
    for name, found in metadata.keyslots.items():
        if not found.priority and name.isdecimal():
            return f"`cryptsetup config FILE --key-slot {name} --priority normal` puts it to use"
    return _ANEW
