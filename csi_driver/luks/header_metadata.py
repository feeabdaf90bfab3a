"""The JSON metadata of a LUKS2 header: its shape, and how it is decoded from a JSON area.

Shape: LUKS2 On-Disk Format Specification 1.1.0, chapter 3, without what this driver never takes (reencryption, linear
and hardware-encrypted segments): a member of another name or type is refused.
"""

import re
from typing import Annotated, Any, Literal

import msgspec

from csi_driver.model.errors import InvalidHeader
from csi_driver.model.reading import convert

SALT_BYTES = 32
"""Length of every salt in the metadata; libcryptsetup takes no other."""

_MOST_TEXT = 300
_ADVICE = "check that this is the volume's device, else restore its header from a backup"


class Decimal(int):
    """A number that the metadata holds as a string of decimal digits, because it may exceed 32 bits."""


_Uint32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
_Id = Annotated[str, msgspec.Meta(pattern=r"\A([0-9]|[12][0-9]|3[01])\Z")]


class Area(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a key slot's encrypted key material lies. Offset, size and key size in bytes."""

    type: Literal["raw"]
    offset: Decimal
    size: Decimal
    encryption: str
    key_size: _Uint32


class AntiForensic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a key slot spreads its key material."""

    type: Literal["luks1"]
    stripes: _Uint32
    hash: str


class Pbkdf2(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="pbkdf2"):
    """PBKDF2 as the key derivation of a key slot."""

    hash: str
    iterations: _Uint32
    salt: bytes


class Argon2i(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="argon2i"):
    """Argon2i as the key derivation of a key slot; memory in KiB."""

    time: _Uint32
    memory: _Uint32
    cpus: _Uint32
    salt: bytes


class Argon2id(Argon2i, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="argon2id"):
    """Argon2id as the key derivation of a key slot; memory in KiB."""


class Keyslot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key slot of type luks2. `key_size` is the volume key's, in bytes; priority 0 means: only when asked for."""

    type: Literal["luks2"]
    key_size: _Uint32
    area: Area
    af: AntiForensic
    kdf: Pbkdf2 | Argon2i | Argon2id
    priority: Annotated[int, msgspec.Meta(ge=0, le=2)] = 1


class Segment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A crypt segment. Offset and sector size in bytes; the size is bytes in decimal digits or "dynamic"."""

    type: Literal["crypt"]
    offset: Decimal
    size: str
    iv_tweak: Decimal
    encryption: str
    sector_size: _Uint32
    integrity: dict[str, Any] | None = None
    flags: tuple[str, ...] = ()


class Digest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the volume key of the named key slots and segments is checked against."""

    type: Literal["pbkdf2"]
    keyslots: tuple[_Id, ...]
    segments: tuple[_Id, ...]
    hash: str
    iterations: _Uint32
    salt: bytes
    digest: bytes


class Token(msgspec.Struct, frozen=True):
    """What every token has; its other members are its own affair. A token never authorises anything here."""

    type: str
    keyslots: tuple[_Id, ...]


class Requirements(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a reader of the header must support."""

    mandatory: tuple[str, ...] = ()


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes in bytes of a JSON area and of the key slot area; persistent activation flags; requirements."""

    json_size: Decimal
    keyslots_size: Decimal
    flags: tuple[str, ...] = ()
    requirements: Requirements | None = None


class Metadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole; ids are decimal strings from 0 to 31, and references between the parts are not yet checked."""

    keyslots: dict[_Id, Keyslot]
    tokens: dict[_Id, Token]
    segments: dict[_Id, Segment]
    digests: dict[_Id, Digest]
    config: Config


def decode(json_area: bytes, where: str) -> Metadata:
    """The metadata in a JSON area, which is the JSON text and zeros behind it.

    The text must be the compact form that libcryptsetup writes, byte for byte. That leaves no room for repeated
    members, comments, odd numbers or names with a NUL in them, which json-c takes and others read differently. Raises
    InvalidHeader.
    """
    text, _, rest = json_area.partition(b"\0")
    if len(text) == len(json_area) or rest.strip(b"\0"):
        raise refusal(where, "expected zeros behind the JSON metadata, found other bytes")
    try:
        document = msgspec.json.decode(text)
        if b"\\u" in text or msgspec.json.encode(document) != text.replace(b"\\/", b"/"):
            raise refusal(where, "expected JSON metadata as libcryptsetup writes it, found another form")
        _refuse_other_types(document, where)
        metadata = convert(document, Metadata, dec_hook=_decimal)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise refusal(where, f"its JSON metadata cannot be read: {error}") from None
    if metadata.config.json_size != len(json_area):
        raise refusal(where, f"expected json_size {len(json_area)}, found {metadata.config.json_size}")
    return metadata


def refusal(where: str, reason: str) -> InvalidHeader:
    """The error for a header that must not be used; `reason` names what was expected and found."""
    return InvalidHeader(f"the LUKS2 header of {where} is refused: {shorten(reason)}; {_ADVICE}")


def with_advice(error: InvalidHeader, advice: str) -> InvalidHeader:
    """A `refusal` with other advice; none has a semicolon in it."""
    return InvalidHeader(f"{str(error).rpartition('; ')[0]}; {advice}")


def shorten(text: str) -> str:
    """`text` as a sentence can hold it: a header may be made of megabytes of control characters."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in text[:_MOST_TEXT])
    return printable if len(text) <= _MOST_TEXT else printable + "…"


def _refuse_other_types(document: object, where: str) -> None:
    """Name the types that are refused as such; everything else about the shape is left to msgspec."""
    for section, wanted in (("keyslots", "luks2"), ("segments", "crypt"), ("digests", "pbkdf2")):
        members = document.get(section) if isinstance(document, dict) else None
        for key, member in members.items() if isinstance(members, dict) else ():
            if isinstance(member, dict) and (found := member.get("type")) != wanted:
                raise refusal(where, f"expected type {wanted!r} in {section} {shorten(key)}, found {found!r}")


def _decimal(kind: type, value: object) -> Decimal:
    if kind is Decimal and isinstance(value, str) and re.fullmatch(r"0|[1-9][0-9]{0,18}", value):
        return Decimal(value)
    raise ValueError(f"Expected a decimal number in a string, got {shorten(repr(value))}")
