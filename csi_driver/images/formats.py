"""What the file of an image is, from its own bytes, before any qemu tool sees it.

The answer is recorded and named to every tool from then on, so nothing probes the file again: a guest that writes a
qcow2 header into its raw disk gains nothing. What cannot be told apart from a raw disk is raw, an iso too.
"""

import os
import re
import stat
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from csi_driver.host.blockdev import kind
from csi_driver.images import qcow2, vhdx, vmdk
from csi_driver.images.base import ImageFormat
from csi_driver.images.imagefile import SECTOR, ImageFile
from csi_driver.luks.header import (
    BINARY_SIZE,
    HEADER_PROBE,
    HEADER_SIZES,
    PRIMARY_MAGIC,
    SECONDARY_MAGIC,
    Header,
    is_luks1,
    parse,
)
from csi_driver.luks.header_rules import Limits, validate
from csi_driver.model.errors import FailedPrecondition, InvalidArgument
from csi_driver.model.volume import LuksIdentity

HEAD_BYTES: Final = 64 * 1024
"""How much of the start of a file its signature may take."""

_CONTAINERS: Final = (
    (qcow2.MAGIC, ImageFormat.QCOW2, qcow2.virtual_size),
    (vmdk.MAGIC, ImageFormat.VMDK, vmdk.virtual_size),
    (vhdx.MAGIC, ImageFormat.VHDX, vhdx.virtual_size),
)

_UNPACK: Final = "unpack it and give the image inside"
_CONVERT: Final = "convert it to qcow2 or raw with `qemu-img convert`"
_FOREIGN: Final = tuple(
    (offset, re.compile(pattern, re.DOTALL), name, advice)
    for offset, pattern, name, advice in (
        (0, rb"conectix", "a vhd disk", _CONVERT),
        (64, rb"\x7f\x10\xda\xbe", "a vdi disk", _CONVERT),
        (0, rb"Witho(utFreeSpace|uFreSpacExt)", "a Parallels disk", _CONVERT),
        (0, rb"QED\0", "a qed disk", _CONVERT),
        (0, rb"Bochs Virtual HD Image", "a Bochs disk", _CONVERT),
        (0, rb"COWD\x01\0\0\0", "a VMware COWD extent", _CONVERT),
        (0, rb"\xbe\xba\xfe\xca\0{4}\x01\0\0\0\x02\0\0\0", "a VMware seSparse extent", _CONVERT),
        (0, rb"#!/bin/sh\n#V2\.0 Format\n", "a cloop disk", _CONVERT),
        (0, rb"\x3a\xff\x26\xed\x01\0", "an Android sparse image", "convert it with `simg2img`"),
        (
            0,
            rb"(?i:\s*# Disk DescriptorFile)|(?:#[^\n]*\n| *\r?\n)*version=\d",
            "the descriptor of a vmdk, a text that names other files",
            "convert it to qcow2 with `qemu-img convert` where they are",
        ),
        (0, rb"\s*json:", "a name in QEMU's json: notation, not an image", "give the image that it describes"),
        (0, rb"(?i:\s*<(!doctype|html|\?xml))", "a page of text", "look at what the server answered"),
        (0, rb"BZh[1-9]1AY&SY", "compressed with bzip2", "give it raw or as .gz, .xz or .zst"),
        (0, rb"\x04\x22\x4d\x18", "compressed with lz4", "give it raw or as .gz, .xz or .zst"),
        (0, rb"PK\x03\x04", "a zip archive", _UNPACK),
        (0, rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
        (257, rb"ustar(\0|  \0)", "a tar archive or OVA", _UNPACK),
    )
)

ANY_COST: Final = Limits(memory_kib=1 << 32, time=1 << 32, cpus=1 << 32, iterations=1 << 32, keyslots=32)
"""For a header that is only read: what a key slot costs is asked when it is opened, by whoever pays."""


class Wrapping(StrEnum):
    """How a file is compressed around the image."""

    GZIP = "gzip"
    XZ = "xz"
    ZSTD = "zstd"


# RFC 1952 and its only method; the xz file format; RFC 8878, which may begin with a skippable frame.
_WRAPPINGS: Final = (
    (re.compile(rb"\x1f\x8b\x08"), Wrapping.GZIP),
    (re.compile(rb"\xfd7zXZ\0"), Wrapping.XZ),
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), Wrapping.ZSTD),
)


@dataclass(frozen=True)
class Inspected:
    """What an image file is. `virtual_size` is the bytes of payload: what a VM sees, behind the header of a LUKS2.

    `luks` is what the header of a LUKS2 image says, None for every other format.
    """

    format: ImageFormat
    virtual_size: int
    luks: LuksIdentity | None = None


def detect_wrapping(head: bytes) -> Wrapping | None:
    """The compression of a file that begins with `head` (6 bytes do); None where it is not compressed."""
    return next((wrapping for pattern, wrapping in _WRAPPINGS if pattern.match(head)), None)


def check_source(source: str) -> None:
    """Refuse a source that is neither a path nor an http(s) address: QEMU takes `json:…` and `nbd:…` as instructions.

    Raises InvalidArgument.
    """
    prefix = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", source)
    if prefix and prefix[1].lower() not in {"http", "https"}:
        raise InvalidArgument(
            f"the source is refused: it begins with {prefix[0]!r}, which QEMU takes as instructions and not as a name; "
            f"give a path (./{prefix[0]}… for a file of that name) or an http(s) address"
        )


def inspect(descriptor: int, where: str, most_bytes: int) -> Inspected:
    """Tell what the regular file at `descriptor`, not compressed, is, from all of its metadata; nothing else is opened.

    `where` names the image in errors ("image ubuntu"), `most_bytes` is the biggest payload that is allowed. Raises
    InvalidArgument for every file that is refused, DeviceUnreadable.
    """
    status = os.fstat(descriptor)
    image = ImageFile(descriptor, where, status.st_size, most_bytes)
    if not stat.S_ISREG(status.st_mode):
        raise image.refusal(f"expected a regular file, found a {kind(status.st_mode)}; give a file")
    if not image.size:
        raise image.refusal("it is empty; look at how it was made")
    head = image.peek(0, HEAD_BYTES)
    for magic, format, virtual_size in _CONTAINERS:
        if head.startswith(magic):
            return Inspected(format, virtual_size(image))
    if head.startswith(PRIMARY_MAGIC):
        return _inspect_luks(image)
    _refuse_foreign(image, head)
    image.require_limit(image.size)
    return Inspected(ImageFormat.RAW, image.size)


def _inspect_luks(image: ImageFile) -> Inspected:
    area = image.peek(0, HEADER_PROBE)
    if is_luks1(area):
        raise image.refusal("it is LUKS version 1, expected 2; convert a copy with `cryptsetup convert --type luks2`")
    try:
        header = parse(area, image.where)
        identity = _identity(image, header)
        validate(header, identity, image.size, image.where, limits=ANY_COST)
    except FailedPrecondition as error:
        # Around the reason stands what a volume's reader needs.
        reason = str(error).removeprefix(f"the LUKS2 header of {image.where} is refused: ").partition("; ")[0]
        raise image.refusal(
            f"it is LUKS2 with a header that must not be used ({reason}); make the image anew"
        ) from None
    payload = image.size - identity.data_offset
    if payload % identity.sector_size:
        raise image.refusal(
            f"it is LUKS2 with {payload} bytes of data, expected whole sectors of {identity.sector_size}; it is "
            "truncated, fetch it again"
        )
    image.require_limit(payload)
    return Inspected(ImageFormat.LUKS2, payload, identity)


def _identity(image: ImageFile, header: Header) -> LuksIdentity:
    """What the header says of itself, for the rules that a volume's header must keep."""
    if header.damaged_copy:
        raise image.refusal(
            f"it is LUKS2 with a damaged or outdated {header.damaged_copy} header; mend it with `cryptsetup repair`"
        )
    segment, slot = header.segments.get("0"), next(iter(header.keyslots.values()), None)
    if segment is None or slot is None:
        raise image.refusal("it is LUKS2 without data or without a key slot, no key opens it; make the image anew")
    if segment.offset < 2 * header.hdr_size + header.config.keyslots_size:
        raise image.refusal(
            f"it is a detached LUKS2 header, its data begins at {segment.offset} of another file; give a whole device"
        )
    if image.size < segment.offset + segment.sector_size:
        raise image.refusal(
            f"it is a LUKS2 header without data: expected more than {segment.offset} bytes, found {image.size}; it is "
            "truncated or a header backup, give the whole image"
        )
    return LuksIdentity(
        uuid=header.uuid,
        cipher=segment.encryption,
        key_bits=slot.key_size * 8,
        sector_size=segment.sector_size,
        data_offset=int(segment.offset),  # the record takes plain numbers
        digest=header.key_digest,
    )


def _refuse_foreign(image: ImageFile, head: bytes) -> None:
    """Refuse what would be a raw disk but for a signature that no raw disk has by chance."""
    if wrapping := detect_wrapping(head):
        raise image.refusal(f"it is compressed with {wrapping} a second time; give it compressed once or not at all")
    for offset, pattern, name, advice in _FOREIGN:
        if pattern.match(head, offset):
            raise image.refusal(f"it is {name}; {advice}")
    tail = image.peek(max(image.size - SECTOR, 0), SECTOR)
    if tail.startswith(b"koly\0\0\0\4\0\0\2\0"):
        raise image.refusal(f"it is a dmg disk; {_CONVERT}")
    if tail.startswith(b"conectix") and _is_vhd_footer(tail):
        raise image.refusal(f"it is a vhd disk of fixed size; {_CONVERT}")
    if not head[:BINARY_SIZE].strip(b"\0") and any(_has_luks_copy(image, place) for place in HEADER_SIZES):
        raise image.refusal("it is LUKS2 with its first header wiped; mend it with `cryptsetup repair`")


def _is_vhd_footer(footer: bytes) -> bool:
    """Whether the checksum is right: the complement of the sum of the other bytes (VHD specification 1.0)."""
    total = sum(footer) - sum(footer[64:68])
    return footer[64:68] == (~total & 0xFFFF_FFFF).to_bytes(4, "big")


def _has_luks_copy(image: ImageFile, place: int) -> bool:
    copy = image.peek(place, 264)
    return copy.startswith(SECONDARY_MAGIC) and copy[256:] == place.to_bytes(8, "big")
