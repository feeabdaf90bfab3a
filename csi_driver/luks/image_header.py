"""The LUKS header of an image file: LUKS2 written with a volume key of our own, LUKS2 and LUKS1 read and opened.

An image is a plain LUKS2 device. One token in its header, of type `luks-csi`, says how long the payload is, as the last
sector may be padded. A header is unauthenticated, so the token is believed only about that padding: what it says is
taken if it ends within the last sector of the data, else the data is the payload.
"""

import fcntl
import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Annotated, Self

import msgspec

from csi_driver.host import blockdev
from csi_driver.luks.device import SEALS, write_at
from csi_driver.luks.formats import CIPHER_KEY_BITS, LuksFormat
from csi_driver.luks.header import BINARY_SIZE, HEADER_PROBE, Copy, Header, is_luks1, parse, repaired
from csi_driver.luks.header_metadata import refusal
from csi_driver.luks.header_rules import DEFAULT_LIMITS, Limits, validate
from csi_driver.luks.libcryptsetup import crypt_device
from csi_driver.luks.luks1 import parse_luks1
from csi_driver.model.errors import DeviceUnreadable, InvalidHeader
from csi_driver.model.reading import decode
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import LuksIdentity

TOKEN_TYPE = "luks-csi"
"""Type of the token that this driver writes; libcryptsetup has no handler for it and leaves it alone."""

ReadAt = Callable[[int, int], bytes]
"""(offset, length) to the bytes there, fewer only where the image ends. Raises OSError or a DriverError."""

_USUAL_HEADER = 64 * 1024


class _Token(msgspec.Struct, frozen=True):
    """Our token. The length is text, as LUKS2 writes every number that may exceed 32 bits."""

    type: str
    keyslots: tuple[str, ...] = ()
    payload_bytes: Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{1,19}\Z")] | None = None


class _Tokens(msgspec.Struct, frozen=True):
    tokens: dict[str, _Token | None]


class VolumeKey:
    """A volume key in memory that is wiped when its block ends; shows nothing of it in repr or str."""

    __slots__ = ("value",)

    def __init__(self, value: bytearray) -> None:
        self.value = value

    @classmethod
    def fresh(cls, bits: int) -> Self:
        """A key of `bits` from the kernel's random numbers."""
        value = bytearray(bits // 8)
        with open("/dev/urandom", "rb", buffering=0) as source:
            if source.readinto(value) != len(value):
                raise OSError("the kernel's random number generator gave too few bytes")
        return cls(value)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.value[:] = bytes(len(self.value))

    def __repr__(self) -> str:
        return "VolumeKey(…)"


class ImageHeader(msgspec.Struct, frozen=True):
    """A checked header. `payload` is the length of what is inside, in bytes; `where` names the image in errors."""

    where: str
    header: Header
    identity: LuksIdentity
    payload: int
    pieces: Mapping[int, bytes]
    """All that opens a key slot, as it was when it was checked: offset to bytes."""

    def volume_key(self, passphrase: Passphrase) -> VolumeKey:
        """Open a key slot. Raises Unauthenticated when `passphrase` opens none.

        libcryptsetup sees a sealed copy of what was checked, in memory.
        """
        copy = os.memfd_create("luks-header", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(copy, self.identity.data_offset)
            for offset, piece in self.pieces.items():
                write_at(copy, piece, offset)
            fcntl.fcntl(copy, fcntl.F_ADD_SEALS, SEALS)
            with crypt_device(self.where, f"/proc/self/fd/{copy}") as device:
                device.load(1 if is_luks1(self.pieces[0]) else 2)
                return VolumeKey(device.volume_key(passphrase))
        finally:
            os.close(copy)


def read_image_header(where: str, read: ReadAt, size: int, limits: Limits = DEFAULT_LIMITS) -> ImageHeader:
    """The header of an image of `size` bytes, checked by every rule for volumes; its UUID and cipher are its own.

    LUKS1 is read too, in LUKS2's words. Raises DeviceUnreadable, DeviceBlank, ForeignSignature (no LUKS),
    InvalidHeader, DeviceShort (data cut off).
    """
    area, header = _read_header(where, read, size)
    identity = identity_of(where, header)
    validate(header, identity, size, where, limits=limits)
    if identity.key_bits not in CIPHER_KEY_BITS[identity.cipher]:
        raise refusal(where, f"expected a key that {identity.cipher} takes, found {identity.key_bits} bits")
    pieces = {0: repaired(area, header)[: 2 * header.hdr_size]}
    for slot in header.keyslots.values():
        pieces[slot.area.offset] = _read(where, read, slot.area.offset, slot.area.size)
    return ImageHeader(where, header, identity, _payload(area, header, identity, size), pieces)


def write_image_header(
    where: str, path: str, chosen: LuksFormat, payload: int, passphrase: Passphrase, key: VolumeKey
) -> LuksIdentity:
    """luksFormat for the file at `path`, after proof that it is whole: all rules hold and the passphrase gives `key`.

    It is made in memory and then written in one piece: libcryptsetup's many small writes would each wait for those of
    the data beside them. The header is durable when this returns. Returns its identity, the digest of the volume key
    in it. Raises OSError, ResourceExhausted, CommandFailed.
    """
    size = chosen.data_offset + padded(payload, chosen.sector_size)
    memory = os.memfd_create("luks-header", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memory, size)
        with crypt_device(where, f"/proc/self/fd/{memory}") as device:
            device.format(chosen, str(uuid.uuid4()), passphrase, key.value)
            device.set_token(msgspec.json.encode(_Token(TOKEN_TYPE, (), str(payload))))
        found = read_image_header(
            where, lambda at, length: blockdev.read_at(memory, at, length), size, limits_of(chosen)
        )
        with found.volume_key(passphrase) as opened:
            if opened.value != key.value or found.payload != payload:
                raise refusal(where, "expected the header that was just made, found another")
        header = blockdev.read_at(memory, 0, chosen.data_offset)
    finally:
        os.close(memory)
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        write_at(descriptor, header, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return found.identity


def limits_of(chosen: LuksFormat) -> Limits:
    """What opening a header of our own may cost: whoever chose its format decided that."""
    return msgspec.structs.replace(DEFAULT_LIMITS, memory_kib=max(DEFAULT_LIMITS.memory_kib, chosen.memory_kib))


def padded(length: int, unit: int) -> int:
    """`length` rounded up to whole units."""
    return -(-length // unit) * unit


def _read_header(where: str, read: ReadAt, size: int) -> tuple[bytes, Header]:
    area = _read(where, read, 0, min(size, _USUAL_HEADER))
    if is_luks1(area):
        return area, parse_luks1(area, where)
    try:
        return area, parse(area, where)
    except InvalidHeader:
        # A damaged primary copy, or a larger one: the secondary one may lie anywhere up to 4 MiB.
        area = _read(where, read, 0, min(size, HEADER_PROBE))
        return area, parse(area, where)


def _read(where: str, read: ReadAt, offset: int, length: int) -> bytes:
    try:
        found = read(offset, length)
    except OSError as error:
        raise DeviceUnreadable(
            f"the LUKS2 header of {where} cannot be read ({error.strerror}); look at the kernel log and the storage"
        ) from None
    if len(found) < length:
        raise refusal(where, f"expected {length} bytes at {offset}, found the end of the image behind {len(found)}")
    return found


def identity_of(where: str, header: Header) -> LuksIdentity:
    """What a header says of itself, in the words of a volume's record. Raises InvalidHeader without a segment 0."""
    segment = header.segments.get("0")
    if segment is None:
        raise refusal(where, f"expected segment 0 alone, found {', '.join(header.segments) or 'none'}")
    slot = next(iter(header.keyslots.values()), None)
    return LuksIdentity(
        uuid=header.uuid,
        cipher=segment.encryption,
        key_bits=slot.key_size * 8 if slot else 0,
        sector_size=segment.sector_size,
        data_offset=int(segment.offset),
        digest=header.key_digest,
    )


def _payload(area: bytes, header: Header, identity: LuksIdentity, size: int) -> int:
    data = (size - identity.data_offset) // identity.sector_size * identity.sector_size
    if not header.tokens:
        return data
    start = BINARY_SIZE + (0 if header.source is Copy.PRIMARY else header.hdr_size)
    text = area[start : start - BINARY_SIZE + header.hdr_size].rstrip(b"\0")
    with suppress(msgspec.MsgspecError):
        tokens = decode(text, _Tokens).tokens.values()
        told = [token.payload_bytes for token in tokens if token and token.type == TOKEN_TYPE]
        if len(told) == 1 and told[0] and padded(int(told[0]), identity.sector_size) == data:
            return int(told[0])
    return data
