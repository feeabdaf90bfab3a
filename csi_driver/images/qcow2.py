"""qcow2, versions 2 and 3, read far enough to trust it to qemu: whole, closed, not encrypted, naming no other file.

Every pointer is followed from the header to the clusters. Source: QEMU's docs/interop/qcow2, and the limits of qemu's
own reader.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from csi_driver.images.base import MIB
from csi_driver.images.imagefile import SECTOR, ImageFile
from csi_driver.luks.header_metadata import shorten

MAGIC: Final = b"QFI\xfb"

# magic, version, backing file (offset, length), cluster bits, size, encryption, L1 table (entries, offset),
# refcount table (offset, clusters), snapshots (number, offset)
_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQ")
# features (incompatible, compatible, autoclear), refcount order, header length
_HEADER_3: Final = struct.Struct(">QQQII")
_COMPRESSION_AT: Final = 104
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_KNOWN_FEATURES: Final = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED_L2
_EXTENSION_DATA_FILE: Final = 0x44415441
_EXTENSION_ENCRYPTION: Final = 0x0537BE77
_ENCRYPTIONS: Final = {1: "AES", 2: "LUKS"}
_COMPRESSIONS: Final = (0, 1)  # zlib, zstd
_OFFSET: Final = (1 << 56) - SECTOR
_COMPRESSED: Final = 1 << 62
_READS_AS_ZEROS: Final = 1
_SUBCLUSTERS: Final = 32
_LEAST_SNAPSHOT: Final = 40
_MOST_HEADER: Final = 512
_MOST_NAME: Final = 1023
_MOST_L1_ENTRIES: Final = 32 * MIB // 8
_MOST_REFCOUNT_BYTES: Final = 8 * MIB
_QCOW: Final = "`qemu-img convert -f qcow -O qcow2 FILE NEW`"
_PLAIN: Final = "`qemu-img convert -f qcow2 -O qcow2 FILE NEW`"
_FLATTEN: Final = f"make one image of it where its other files are: {_PLAIN}"
_REPAIR: Final = "repair it with `qemu-img check -f qcow2 -r all FILE`"
_DECRYPT: Final = {
    "LUKS": "`qemu-img convert --object secret,id=key,file=PASSPHRASE --image-opts "
    "driver=qcow2,file.filename=FILE,encrypt.key-secret=key -O qcow2 NEW`",
    "AES": "`qemu-img convert --object secret,id=key,file=PASSPHRASE --image-opts "
    "driver=qcow2,file.filename=FILE,encrypt.format=aes,encrypt.key-secret=key -O qcow2 NEW`",
}


@dataclass(frozen=True)
class _Header:
    """The fields that matter here; sizes and offsets in bytes."""

    version: int
    backing_offset: int
    backing_length: int
    cluster_bits: int
    size: int
    encryption: int
    l1_entries: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshots: int
    snapshots_offset: int
    features: int = 0
    refcount_order: int = 4
    length: int = _HEADER.size

    @property
    def cluster(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended(self) -> bool:
        return bool(self.features & _EXTENDED_L2)

    @property
    def per_table(self) -> int:
        """Clusters that one L2 table maps."""
        return self.cluster // (16 if self.extended else 8)

    @property
    def tables(self) -> int:
        """L2 tables that the disk needs."""
        return -(-self.size // (self.cluster * self.per_table))


def virtual_size(image: ImageFile) -> int:
    """The bytes of the disk in `image`, which begins with MAGIC. Raises InvalidArgument, DeviceUnreadable."""
    header = _read_header(image)
    if header.backing_offset:
        name = image.peek(header.backing_offset, min(header.backing_length, _MOST_NAME)).decode(errors="replace")
        raise image.refusal(f"it is a qcow2 with the backing file {shorten(name)!r}; {_FLATTEN}")
    _check_features(image, header)
    image.require_size(header.size)
    _check_layout(image, header)
    _check_clusters(image, header)
    return header.size


def _read_header(image: ImageFile) -> _Header:
    header = _Header(*_HEADER.unpack(image.read(0, _HEADER.size, "qcow2 header"))[1:])
    if header.version == 3:
        more = image.read(_HEADER.size, _HEADER_3.size, "qcow2 header")
        features, _, _, order, length = _HEADER_3.unpack(more)
        header = replace(header, features=features, refcount_order=order, length=length)
        if not _HEADER.size + _HEADER_3.size <= length <= _MOST_HEADER:
            raise image.refusal(f"it is a qcow2 with a header of {length} bytes, expected 104 to 512; it is damaged")
        image.require(0, length, "qcow2 header")
    elif header.version != 2:
        raise image.refusal(f"it is a qcow image of version {header.version}, expected 2 or 3; convert it: {_QCOW}")
    if not 9 <= header.cluster_bits <= 21:
        raise image.refusal(
            f"it is a qcow2 with clusters of 2^{header.cluster_bits} bytes, expected 2^9 to 2^21; it is damaged"
        )
    if header.backing_offset > header.cluster:
        raise image.refusal("it is a qcow2 with a backing file whose name lies outside its header; it is damaged")
    return header


def _check_features(image: ImageFile, header: _Header) -> None:
    area = image.peek(0, header.cluster)
    extensions = set(_extensions(image, area, header.length))
    if header.features & _DATA_FILE or _EXTENSION_DATA_FILE in extensions:
        raise image.refusal(f"it is a qcow2 with an external data file; {_FLATTEN}")
    if header.encryption or _EXTENSION_ENCRYPTION in extensions:
        method = _ENCRYPTIONS.get(header.encryption, f"method {header.encryption}")
        raise image.refusal(
            f"it is a qcow2 encrypted by QEMU ({method}), which is not LUKS2; decrypt it with "
            f"{_DECRYPT.get(method, 'the program that made it')}"
        )
    if unknown := header.features & ~_KNOWN_FEATURES:
        raise image.refusal(
            f"it is a qcow2 with unknown incompatible features ({unknown:#x}); convert it with the QEMU that made it"
        )
    if header.features & _CORRUPT:
        raise image.refusal(f"it is a qcow2 that is marked corrupt; {_REPAIR}")
    if header.features & _DIRTY:
        raise image.refusal(f"it is a qcow2 that was not closed cleanly; {_REPAIR}")
    compression = area[_COMPRESSION_AT] if header.length > _COMPRESSION_AT else 0
    if compression not in _COMPRESSIONS or bool(compression) != bool(header.features & _COMPRESSION):
        raise image.refusal(
            f"it is a qcow2 with compression type {compression}, which its features contradict or nobody knows; "
            "convert it with the QEMU that made it"
        )


def _extensions(image: ImageFile, area: bytes, start: int) -> Iterator[int]:
    """Types of the header extensions; `area` is the first cluster, `start` the end of the header in it."""
    while start + 8 <= len(area):
        kind, length = struct.unpack_from(">II", area, start)
        if not kind:
            return
        start += 8 + (length + 7) // 8 * 8
        if start > len(area):
            raise image.refusal("it is a qcow2 with a header extension that leaves the header; it is damaged")
        yield kind


def _check_layout(image: ImageFile, header: _Header) -> None:
    if header.extended and header.cluster_bits < 14:
        raise image.refusal(
            f"it is a qcow2 with extended L2 entries in clusters of {header.cluster} bytes; it is damaged"
        )
    if not header.tables <= header.l1_entries <= _MOST_L1_ENTRIES:
        raise image.refusal(
            f"it is a qcow2 with {header.l1_entries} entries in its L1 table, expected {header.tables} to "
            f"{_MOST_L1_ENTRIES}; it is damaged"
        )
    refcounts = header.refcount_clusters * header.cluster
    if not 0 < refcounts <= _MOST_REFCOUNT_BYTES or header.refcount_order > 6:
        raise image.refusal("it is a qcow2 without a usable reference count table; it is damaged")
    for name, offset, length in (
        ("L1 table", header.l1_offset, header.l1_entries * 8),
        ("reference count table", header.refcount_offset, refcounts),
        ("snapshot table", header.snapshots_offset, header.snapshots * _LEAST_SNAPSHOT),
    ):
        if length:
            _require_cluster(image, header, offset, name)
            image.require(offset, length, name)


def _check_clusters(image: ImageFile, header: _Header) -> None:
    """Refuse an image that maps a part of its disk to what is not in the file."""
    last_whole, inside, tables = image.size - header.cluster, header.cluster - 1, 0
    for number, pointer in enumerate(image.numbers("Q", "big", header.l1_offset, header.tables, "L1 table")):
        if not (offset := pointer & _OFFSET):
            continue
        name = f"L2 table {number}"
        _require_cluster(image, header, offset, name)
        tables += 1
        if tables * header.cluster > image.size:  # a table mapped again and again would keep us busy for hours
            raise image.refusal(f"it is a qcow2 with more L2 tables than fit into {image.size} bytes; it is damaged")
        table = image.table("Q", "big", offset, header.cluster // 8, name)
        bitmaps = table[1::2] if header.extended else None
        first = number * header.per_table * header.cluster
        for slot, entry in enumerate(table[::2] if header.extended else table):
            start = entry & _OFFSET
            if not entry or (start <= last_whole and start and not start & inside and not entry & _COMPRESSED):
                continue
            if (position := first + slot * header.cluster) < header.size:
                _check_cluster(image, header, entry, bitmaps[slot] if bitmaps else None, position)


def _check_cluster(image: ImageFile, header: _Header, entry: int, bitmap: int | None, position: int) -> None:
    """`position` is where the cluster stands in the disk; what lies past the disk's end need not be there."""
    name = f"cluster at offset {position} of the disk"
    if entry & _COMPRESSED:
        shift = 62 - (header.cluster_bits - 8)
        start, more = entry & (1 << shift) - 1, (entry & _COMPRESSED - 1) >> shift
        # Where in its last sector compressed data ends is not recorded: the file may end there too.
        last_sector = (start // SECTOR + more) * SECTOR
        image.require(start, max(last_sector - start, 0) + 1, name)
        return
    needed = min(header.cluster, header.size - position)
    if bitmap is not None:
        allocated = bitmap & (1 << _SUBCLUSTERS) - 1
        needed = min(needed, allocated.bit_length() * (header.cluster // _SUBCLUSTERS))
    elif entry & _READS_AS_ZEROS:
        return
    if (start := entry & _OFFSET) and needed:
        _require_cluster(image, header, start, name)
        image.require(start, needed, name)


def _require_cluster(image: ImageFile, header: _Header, offset: int, name: str) -> None:
    if offset % header.cluster or not offset:
        raise image.refusal(f"its {name} lies at offset {offset} of the file, where no cluster begins; it is damaged")
