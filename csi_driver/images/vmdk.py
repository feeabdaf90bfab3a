"""vmdk in one file, monolithicSparse or streamOptimized, read far enough to trust it to qemu.

A vmdk may name other files in its descriptor: qemu would open any file of the host that is named as a FLAT extent or as
a parent. Source: VMware's Virtual Disk Format 5.0, and where qemu's reader looks.
"""

import re
import struct
from dataclasses import dataclass
from typing import Final

from csi_driver.images.imagefile import SECTOR, ImageFile
from csi_driver.luks.header_metadata import shorten

MAGIC: Final = b"KDMV"

# magic, version, flags, capacity, grain, descriptor (offset, length), entries per grain table, grain directories
# (redundant, primary), overhead, unclean shutdown, line ends, compression. Offsets and lengths in sectors.
_HEADER: Final = struct.Struct("<4sIIQQQQIQQQB4sH")
_LINE_ENDS: Final = b"\n \r\n"
_REDUNDANT, _MARKERS = 1 << 1, 1 << 17
_DEFLATE: Final = 1
_AT_END: Final = (1 << 64) - 1
_FOOTER: Final = struct.pack("<II", 0, 3)
"""Size and type of the marker before the footer."""
_GRAIN_MARKER: Final = struct.Struct("<QI")
_MOST_DESCRIPTOR_SECTORS: Final = 128
_QEMU_DESCRIPTOR_BYTES: Final = 20 * SECTOR
"""How much qemu reads behind the header as the descriptor, whatever the header says."""
_MOST_TABLES: Final = 32 << 20
_NO_GRAIN = (0, 1)  # not there, zeros
_SPARSE, _STREAM = "monolithicSparse", "streamOptimized"
# No \s: it runs over line ends, and a text of empty lines would then take hours.
_TYPE: Final = re.compile(r'^[ \t]*createType[ \t]*=[ \t]*"?([^"\r\n]*)', re.MULTILINE | re.IGNORECASE)
_PARENT: Final = re.compile(r"parentCID[ \t]*=[ \t]*(\w*)", re.IGNORECASE)
_EXTENT: Final = re.compile(
    r'^[ \t]*(?:RW|RDONLY|NOACCESS)[ \t]+\d+[ \t]+(\w+)(?:[ \t]+"([^"\r\n]*))?', re.MULTILINE | re.IGNORECASE
)
_REPACK: Final = "make one image of it where its other files are: `qemu-img convert -f vmdk -O qcow2 FILE NEW`"


@dataclass(frozen=True)
class _Header:
    """A sparse extent header; offsets and lengths in sectors."""

    version: int
    flags: int
    capacity: int
    grain: int
    descriptor: int
    descriptor_length: int
    entries: int
    redundant: int
    directory: int
    overhead: int
    unclean: int
    line_ends: bytes
    compression: int

    @property
    def compressed(self) -> bool:
        return self.compression == _DEFLATE

    @property
    def tables(self) -> int:
        """Grain tables that the disk needs."""
        return -(-self.capacity // (self.grain * self.entries))


def virtual_size(image: ImageFile) -> int:
    """The bytes of the disk in `image`, which begins with MAGIC. Raises InvalidArgument, DeviceUnreadable."""
    header = _Header(*_HEADER.unpack_from(image.read(0, SECTOR, "vmdk header"))[1:])
    if not header.capacity:
        raise image.refusal(f"it is a vmdk without a disk, its descriptor names other files; {_REPACK}")
    if header.descriptor != 1 or not 0 < header.descriptor_length <= _MOST_DESCRIPTOR_SECTORS:
        raise image.refusal(
            f"it is a vmdk extent without a descriptor behind its header, a part of a disk; {_REPACK}, FILE being the "
            "descriptor"
        )
    kind = _check_descriptor(image, header.descriptor_length * SECTOR)
    _check_header(image, header, kind)
    if header.directory == _AT_END:
        header = _read_footer(image)
        _check_header(image, header, kind)
    _check_grains(image, header)
    return header.capacity * SECTOR


def _check_descriptor(image: ImageFile, length: int) -> str:
    """The type that the descriptor's text names; refuses every text that leads out of the file."""
    image.require(SECTOR, length, "vmdk descriptor")
    area = image.peek(SECTOR, max(length, _QEMU_DESCRIPTOR_BYTES))
    text = area.partition(b"\0")[0].decode("latin-1")
    kinds = _TYPE.findall(text)
    if len(kinds) != 1 or kinds[0] not in {_SPARSE, _STREAM}:
        found = shorten(", ".join(kinds)) or "none"
        raise image.refusal(f"it is a vmdk of the type {found!r}, expected {_SPARSE} or {_STREAM}; {_REPACK}")
    parents = _PARENT.findall(text)
    if not parents or any(parent.lower() != "ffffffff" for parent in parents) or "parentfilename" in text.lower():
        raise image.refusal(f"it is a vmdk with a parent, or its descriptor does not deny one; {_REPACK}")
    extents = _EXTENT.findall(text)
    if [type.upper() for type, _ in extents] != ["SPARSE"] or re.search(r"[/\\:]", extents[0][1]):
        found = shorten(", ".join(f"{type} {name!r}" for type, name in extents)) or "none"
        raise image.refusal(f"it is a vmdk with the extents {found}, expected itself alone; {_REPACK}")
    return str(kinds[0])


def _check_header(image: ImageFile, header: _Header, kind: str) -> None:
    if header.version not in {1, 2, 3}:
        raise image.refusal(
            f"it is a vmdk of version {header.version}, expected 1 to 3; convert it with the program that made it"
        )
    if header.line_ends != _LINE_ENDS:
        raise image.refusal("it is a vmdk whose line ends were changed on its way; fetch it again, as binary data")
    if header.unclean:
        raise image.refusal(
            "it is a vmdk that was not closed cleanly; start and stop the virtual machine it belongs to"
        )
    if header.compression > _DEFLATE or header.compressed != (kind == _STREAM):
        raise image.refusal(f"it is a vmdk of type {kind} with compression {header.compression}; it is damaged")
    if header.compressed and not header.flags & _MARKERS:
        raise image.refusal("it is a streamOptimized vmdk whose grains have no markers; it is damaged")
    if header.grain & (header.grain - 1) or not 8 <= header.grain <= 1 << 17 or not 0 < header.entries <= 512:
        raise image.refusal(
            f"it is a vmdk with {header.entries} grains of {header.grain} sectors to a table, expected at most 512 of "
            "a power of two from 8 to 131072; it is damaged"
        )
    image.require_size(header.capacity * SECTOR)
    if header.tables > _MOST_TABLES:
        raise image.refusal(
            f"it is a vmdk with {header.tables} grain tables, expected at most {_MOST_TABLES}; give it larger grains"
        )
    image.require(0, header.overhead * SECTOR, "vmdk metadata")
    if header.flags & _REDUNDANT and header.directory != _AT_END:
        image.require(header.redundant * SECTOR, header.tables * 4, "redundant grain directory")


def _read_footer(image: ImageFile) -> _Header:
    """The header at the end of a stream, which then counts: a marker, the header, an end marker, a sector each."""
    tail = image.peek(max(image.size - 3 * SECTOR, 0), 3 * SECTOR)
    marker, footer, end = tail[:SECTOR], tail[SECTOR : 2 * SECTOR], tail[2 * SECTOR :]
    if image.size % SECTOR or marker[8:16] != _FOOTER or not footer.startswith(MAGIC) or end.strip(b"\0"):
        raise image.refusal(
            "it is a streamOptimized vmdk without the footer it promises; it is truncated, fetch it again"
        )
    header = _Header(*_HEADER.unpack_from(footer)[1:])
    if header.directory == _AT_END or not header.capacity:
        raise image.refusal("it is a streamOptimized vmdk whose footer leads to no disk; it is damaged")
    return header


def _check_grains(image: ImageFile, header: _Header) -> None:
    """Refuse an image that maps a part of its disk to what is not in the file."""
    directory = image.numbers("I", "little", header.directory * SECTOR, header.tables, "grain directory")
    last_whole = image.size // SECTOR - header.grain
    last = tables = 0
    for number, pointer in enumerate(directory):
        if not pointer:
            continue
        tables += 1
        if tables * header.entries * 4 > image.size:  # a table mapped again and again would keep us busy for hours
            raise image.refusal(f"it is a vmdk with more grain tables than fit into {image.size} bytes; it is damaged")
        grains = image.table("I", "little", pointer * SECTOR, header.entries, f"grain table {number}")
        last = max(last, *grains)
        if header.compressed or max(grains) <= last_whole:
            continue
        for slot, grain in enumerate(grains):
            position = (number * header.entries + slot) * header.grain
            needed = min(header.grain, header.capacity - position)
            if grain not in _NO_GRAIN and needed > 0:
                image.require(grain * SECTOR, needed * SECTOR, f"grain at offset {position * SECTOR} of the disk")
    if header.compressed and last not in _NO_GRAIN:
        # Grains of a stream do not overlap: where the last one is whole, all are there.
        _, length = _GRAIN_MARKER.unpack(image.read(last * SECTOR, _GRAIN_MARKER.size, "last grain"))
        image.require(last * SECTOR + _GRAIN_MARKER.size, length, "last grain")
