"""Images of every format, made byte by byte without qemu. All hold DISK, so that what reads one can be compared."""

import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID

from csi_driver.images.vhdx import crc32c

MIB = 1 << 20
Make = Callable[[Path], Path]
Field = tuple[int, str, Any]
"""What to change in a file: offset (from the end if negative), struct format, value or tuple of values."""

_HOLE = bytes(64 * 1024)


def _disk() -> bytes:
    numbers = random.Random(20)
    letters = bytes(numbers.choices(b"abcdefgh\n", k=64 * 1024))
    return numbers.randbytes(64 * 1024) + _HOLE + letters + numbers.randbytes(512)


DISK = _disk()
"""Random bytes, a hole, text that compresses, and a last sector that fills no cluster, grain or block."""


def file_of(name: str, content: Callable[[], bytes]) -> Make:
    """A maker of the file `name` with `content`; long zeros become holes."""

    def make(folder: Path) -> Path:
        path = folder / name
        whole = content()
        with path.open("wb") as file:
            for start in range(0, len(whole), 64 * 1024):
                if piece := whole[start : start + 64 * 1024].rstrip(b"\0"):
                    file.seek(start)
                    file.write(piece)
            file.truncate(len(whole))
        return path

    return make


def patched(content: bytes, *fields: Field) -> bytes:
    """`content` with some fields changed."""
    changed = bytearray(content)
    for offset, form, value in fields:
        values = value if isinstance(value, tuple) else (value,)
        struct.pack_into(form, changed, offset if offset >= 0 else len(changed) + offset, *values)
    return bytes(changed)


def _pieces(size: int) -> Iterable[tuple[int, bytes]]:
    """DISK in pieces that are not holes, by number, the last one not filled up."""
    for start in range(0, len(DISK), size):
        if (piece := DISK[start : start + size]).strip(b"\0"):
            yield start // size, piece


# qcow2: header, refcount table, refcount block, L1 table, L2 table, data; a cluster each

CLUSTER = 4096
REFCOUNT_TABLE, L1_TABLE, L2_TABLE, FIRST_DATA = CLUSTER, 3 * CLUSTER, 4 * CLUSTER, 5 * CLUSTER
_COMPRESSED_SHIFT = 62 - (12 - 8)


@cache
def qcow2(version: int = 3, *, compressed: bool = False, extension: bytes = b"") -> bytes:
    """A qcow2 with clusters of 4 KiB; `extension` stands behind the header."""
    data = bytearray()
    l2 = [0] * (CLUSTER // 8)
    used: Counter[int] = Counter(range(5))
    for number, piece in _pieces(CLUSTER):
        whole = piece.ljust(CLUSTER, b"\0")
        if compressed:
            squeezer = zlib.compressobj(9, zlib.DEFLATED, -12)
            squeezed = squeezer.compress(whole) + squeezer.flush()
            if len(squeezed) < CLUSTER:
                start = FIRST_DATA + len(data)
                data += squeezed
                last = start + len(squeezed) - 1
                l2[number] = 1 << 62 | (last // 512 - start // 512) << _COMPRESSED_SHIFT | start
                used.update(range(start // CLUSTER, last // CLUSTER + 1))
                continue
        data += bytes(-len(data) % CLUSTER)
        l2[number] = 1 << 63 | FIRST_DATA + len(data)
        used[(FIRST_DATA + len(data)) // CLUSTER] += 1
        data += whole
    data += bytes(-len(data) % CLUSTER)
    header = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", version, 0, 0, 12, len(DISK), 0, 1, L1_TABLE, REFCOUNT_TABLE, 1, 0, 0
    )
    if version == 3:
        header += struct.pack(">QQQIIQ", 0, 0, 0, 4, 112, 0)
    refcounts = b"".join(struct.pack(">H", used[cluster]) for cluster in range(CLUSTER // 2))
    clusters = (
        header + extension,
        struct.pack(">Q", 2 * CLUSTER),
        refcounts,
        struct.pack(">Q", 1 << 63 | L2_TABLE),
        struct.pack(f">{len(l2)}Q", *l2),
    )
    return b"".join(cluster.ljust(CLUSTER, b"\0") for cluster in clusters) + bytes(data)


def qcow2_extended() -> bytes:
    """A qcow2 with extended L2 entries and clusters of 16 KiB: one subcluster of 512 bytes, the file ends behind it."""
    bits, features = 14, 1 << 4
    cluster = 1 << bits
    header = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, bits, cluster, 0, 1, 3 * cluster, cluster, 1, 0, 0
    ) + struct.pack(">QQQIIQ", features, 0, 0, 4, 112, 0)
    clusters = (
        header,
        struct.pack(">Q", 2 * cluster),
        struct.pack(">6H", *[1] * 6),
        struct.pack(">Q", 1 << 63 | 4 * cluster),
        struct.pack(">QQ", 1 << 63 | 5 * cluster, 1),
    )
    return b"".join(content.ljust(cluster, b"\0") for content in clusters) + DISK[:512]


# vmdk: header, descriptor, then tables and grains, or grains and tables

GRAIN = 128
SECTORS = len(DISK) // 512
GRAIN_DIRECTORY, GRAIN_TABLE = 21 * 512, 22 * 512


def descriptor(kind: str, *, extents: str = "", parent: str = "ffffffff", more: str = "") -> bytes:
    """The text behind the header of a vmdk."""
    extents = extents or f'RW {SECTORS} SPARSE "disk.vmdk"\n'
    return (
        f'# Disk DescriptorFile\nversion=1\nCID=5c7a8f01\nparentCID={parent}\ncreateType="{kind}"\n{more}\n'
        f'# Extent description\n{extents}\n# The Disk Data Base\n#DDB\nddb.adapterType = "ide"\n'
    ).encode()


def _vmdk_header(version: int, flags: int, directory: int, overhead: int, compression: int) -> bytes:
    fields = (b"KDMV", version, flags, SECTORS, GRAIN, 1, 20, 512, 0, directory, overhead, 0, b"\n \r\n", compression)
    return struct.pack("<4sIIQQQQIQQQB4sH", *fields).ljust(512, b"\0")


def vmdk(text: bytes | None = None) -> bytes:
    """A monolithicSparse vmdk with grains of 64 KiB; `text` instead of its descriptor."""
    text = descriptor("monolithicSparse") if text is None else text
    table, data = [0] * 512, b""
    for number, piece in _pieces(GRAIN * 512):
        table[number] = GRAIN + len(data) // 512
        data += piece
    head = _vmdk_header(1, 1, GRAIN_DIRECTORY // 512, GRAIN, 0) + text.ljust(20 * 512, b"\0")
    tables = struct.pack("<I", GRAIN_TABLE // 512).ljust(512, b"\0") + struct.pack("<512I", *table)
    return (head + tables).ljust(GRAIN * 512, b"\0") + data


def vmdk_stream(text: bytes | None = None) -> bytes:
    """A streamOptimized vmdk whose tables follow the grains and whose footer tells where."""
    text = descriptor("streamOptimized") if text is None else text
    flags = 1 | 1 << 16 | 1 << 17
    content = (_vmdk_header(3, flags, (1 << 64) - 1, GRAIN, 1) + text.ljust(20 * 512, b"\0")).ljust(GRAIN * 512, b"\0")
    table = [0] * 512
    for number, piece in _pieces(GRAIN * 512):
        squeezed = zlib.compress(piece.ljust(GRAIN * 512, b"\0"))
        table[number] = len(content) // 512
        grain = struct.pack("<QI", number * GRAIN, len(squeezed)) + squeezed
        content += grain + bytes(-len(grain) % 512)
    content += _marker(4, 1)
    at = len(content) // 512
    content += struct.pack("<512I", *table) + _marker(1, 2)
    directory = len(content) // 512
    content += struct.pack("<I", at).ljust(512, b"\0") + _marker(1, 3)
    return content + _vmdk_header(3, flags, directory, GRAIN, 1) + bytes(512)


def _marker(sectors: int, kind: int) -> bytes:
    return struct.pack("<QII", sectors, 0, kind).ljust(512, b"\0")


# vhdx: headers, log, block table, metadata, one block; a MiB each

HEADERS, REGIONS, BLOCK_TABLE, METADATA, BLOCK = (64 * 1024, 128 * 1024), 192 * 1024, 2 * MIB, 3 * MIB, 4 * MIB
ITEMS = METADATA + 64 * 1024
BLOCK_SIZE_AT, FLAGS_AT, SIZE_AT, SECTOR_AT = ITEMS, ITEMS + 4, ITEMS + 8, ITEMS + 32


def guid(text: str) -> bytes:
    """A GUID as the format stores it."""
    return UUID(text).bytes_le


@cache
def vhdx() -> bytes:
    """A dynamic vhdx with one block of 1 MiB."""
    headers = (
        struct.pack("<4sIQ16s16s16sHHIQ", b"head", 0, number, b"w" * 16, b"d" * 16, bytes(16), 0, 1, MIB, MIB)
        for number in (7, 8)
    )
    regions = struct.pack("<4sIII", b"regi", 0, 2, 0)
    regions += struct.pack("<16sQII", guid("2dc27766-f623-4200-9d64-115e9bfd4a08"), BLOCK_TABLE, MIB, 1)
    regions += struct.pack("<16sQII", guid("8b7ca206-4790-4b9a-b8fe-575f050f886e"), METADATA, MIB, 1)
    items = (
        ("caa16737-fa36-4d43-b3b6-33f0aa44e76b", 0, 8, 4),
        ("2fa54224-cd1b-4876-b211-5dbed83bf4b8", 8, 8, 6),
        ("beca12ab-b2e6-4523-93ef-c309e000c746", 16, 16, 6),
        ("8141bf1d-a96f-4709-ba47-f233a8faab5f", 32, 4, 6),
        ("cda348c7-445d-4471-9cc9-e9885251c556", 36, 4, 6),
    )
    metadata = struct.pack("<8sHH20s", b"metadata", 0, len(items), b"")
    for name, offset, length, flags in items:
        metadata += struct.pack("<16sIIII", guid(name), 64 * 1024 + offset, length, flags, 0)
    values = struct.pack("<IIQ16sII", MIB, 0, len(DISK), b"i" * 16, 512, 512)
    table = struct.pack("<Q", BLOCK | 6)
    content = bytearray(5 * MIB)
    places = (*HEADERS, REGIONS, REGIONS + 64 * 1024, METADATA, ITEMS, BLOCK_TABLE, BLOCK)
    pieces = (*headers, regions, regions, metadata, values, table, DISK)
    for at, piece in zip((0, *places), (b"vhdxfile", *pieces), strict=True):
        content[at : at + len(piece)] = piece
    return checksummed(bytes(content))


# vhd: footer, dynamic header, block table, then a bitmap of a sector and a block; fixed: the disk and the footer

VHD_HEADER, VHD_TABLE, VHD_BLOCK = 512, 1536, 64 * 1024


def vhd_footer(kind: int = 3, size: int = len(DISK), dynamic_at: int = VHD_HEADER, creator: bytes = b"win ") -> bytes:
    """The sector that every vhd ends with, its checksum right."""
    fields = (b"conectix", 2, 0x10000, dynamic_at, 0, creator, 0x60001, b"Wi2k", size, size, 0x00010411, kind, 0)
    footer = struct.pack(">8sIIQI4sI4sQQIII16sB", *fields, b"u" * 16, 0).ljust(512, b"\0")
    return vhd_checksummed(footer, 64)


def vhd_checksummed(area: bytes, at: int) -> bytes:
    """`area` with the checksum right that lies at `at`."""
    blanked = patched(area, (at, ">I", 0))
    return patched(blanked, (at, ">I", ~sum(blanked) & 0xFFFFFFFF))


def vhd_fixed() -> bytes:
    """A vhd of fixed size."""
    return DISK + vhd_footer(2, dynamic_at=(1 << 64) - 1)


def vhd(*header: Field, footer: bytes | None = None) -> bytes:
    """A dynamic vhd with blocks of 64 KiB; `header` changes its dynamic header."""
    footer = vhd_footer() if footer is None else footer
    blocks = -(-len(DISK) // VHD_BLOCK)
    fields = (b"cxsparse", (1 << 64) - 1, VHD_TABLE, 0x10000, blocks, VHD_BLOCK)
    dynamic = patched(struct.pack(">8sQQIII", *fields).ljust(1024, b"\0"), *header)
    table, data, first = [(1 << 32) - 1] * 128, b"", 4
    for number, piece in _pieces(VHD_BLOCK):
        table[number] = first + len(data) // 512
        data += b"\xff" * 16 + bytes(496) + piece.ljust(VHD_BLOCK, b"\0")
    return footer + vhd_checksummed(dynamic, 36) + struct.pack(">128I", *table) + data + footer


# vdi: header, block table, blocks of 1 MiB

VDI_TABLE = 512


def vdi() -> bytes:
    """A dynamic vdi with one block."""
    fields = (0xBEDA107F, 0x10001, 400, 1, 0, b"", VDI_TABLE, 1024, b"", 512, 0, len(DISK), MIB, 0, 1, 1)
    header = b"<<< made here >>>\n".ljust(64, b"\0") + struct.pack("<IIIII256sII12sIIQIIII", *fields)
    return (header.ljust(512, b"\0") + bytes(512) + DISK).ljust(1024 + MIB, b"\0")


# LUKS1, as the specification lays it out


def luks1(*fields: Field, cipher: bytes = b"aes", mode: bytes = b"xts-plain64", hash_name: bytes = b"sha256") -> bytes:
    """The 4 KiB before the first key slot, of which one is in use; its data begins at 1 MiB."""
    uuid = b"6f1c2b1e-0a55-4c3e-9d3c-5a3c8b0f7d21"
    head = struct.pack(
        ">6sH32s32s32sII20s32sI40s", b"LUKS\xba\xbe", 1, cipher, mode, hash_name, 2048, 64, b"d" * 20, b"s" * 32, 1000,
        uuid,
    )  # fmt: skip
    slots = b"".join(
        struct.pack(">II32sII", 0xDEAD if number else 0xAC71F3, 1000, b"s" * 32, 8 + number * 504, 4000)
        for number in range(8)
    )
    return patched((head + slots).ljust(4096, b"\0"), *fields)


def checksummed(content: bytes) -> bytes:
    """A vhdx with the checksums of headers and region tables right again."""
    changed = bytearray(content)
    for at, length in ((HEADERS[0], 4096), (HEADERS[1], 4096), (REGIONS, 65536), (REGIONS + 65536, 65536)):
        changed[at + 4 : at + 8] = bytes(4)
        changed[at + 4 : at + 8] = crc32c(bytes(changed[at : at + length])).to_bytes(4, "little")
    return bytes(changed)
