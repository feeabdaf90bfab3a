"""Files that must be refused as images, each with the sentence that refuses it, and good ones of every format.

All are made here, byte by byte; the LUKS2 ones begin with a header that the real cryptsetup made.
"""

import gzip
import lzma
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from csi_driver.images.base import ImageFormat
from tests import headers
from tests.image_builders import (
    BLOCK,
    BLOCK_SIZE_AT,
    BLOCK_TABLE,
    CLUSTER,
    DISK,
    FIRST_DATA,
    FLAGS_AT,
    GRAIN_DIRECTORY,
    GRAIN_TABLE,
    HEADERS,
    L1_TABLE,
    L2_TABLE,
    METADATA,
    MIB,
    REGIONS,
    SECTOR_AT,
    SIZE_AT,
    VDI_TABLE,
    VHD_BLOCK,
    VHD_HEADER,
    VHD_TABLE,
    Field,
    Make,
    checksummed,
    descriptor,
    file_of,
    guid,
    luks1,
    patched,
    qcow2,
    qcow2_extended,
    vdi,
    vhd,
    vhd_fixed,
    vhd_footer,
    vhdx,
    vmdk,
    vmdk_stream,
)

MOST_BYTES = 8 * MIB
"""The limit under which the corpus is refused and the good files are not."""

FAR = 1 << 50


class Hostile(NamedTuple):
    """A file to be refused with a sentence that `sentence`, a regular expression, is found in."""

    name: str
    make: Make
    sentence: str


class Good(NamedTuple):
    """A file to be taken. `disk` is what it holds, None where that is encrypted."""

    name: str
    make: Make
    format: ImageFormat
    virtual_size: int
    disk: bytes | None


def _extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")


def _qcow2(*fields: Field, version: int = 3, **more: Any) -> Make:
    return file_of("disk.qcow2", lambda: patched(qcow2(version, **more), *fields))


def _backed(name: bytes) -> Make:
    fields = ((8, ">Q", 512), (16, ">I", len(name)), (512, f"{len(name)}s", name))
    return _qcow2(*fields, extension=_extension(0xE2792ACA, b"raw"))


def _vmdk(*fields: Field) -> Make:
    return file_of("disk.vmdk", lambda: patched(vmdk(), *fields))


def _described(kind: str = "monolithicSparse", **more: str) -> Make:
    return file_of("disk.vmdk", lambda: vmdk(descriptor(kind, **more)))


def _stream(*fields: Field) -> Make:
    return file_of("disk.vmdk", lambda: patched(vmdk_stream(), *fields))


def _vhdx(*fields: Field, checksums: bool = True) -> Make:
    def content() -> bytes:
        changed = patched(vhdx(), *fields)
        return checksummed(changed) if checksums and fields else changed

    return file_of("disk.vhdx", content)


def _both_headers(at: int, form: str, value: Any) -> Make:
    return _vhdx(*((header + at, form, value) for header in HEADERS))


def _luks(change: Callable[[bytes], bytes] = bytes, size: int = headers.DEVICE_SIZE) -> Make:
    def content() -> bytes:
        return change(headers.formatted()[:MIB]).ljust(size, b"\0")[:size]

    return file_of("disk.luks", content)


def _forged(change: headers.Change) -> Make:
    return _luks(lambda area: headers.forged(area, change))


def _null_cipher(metadata: headers.Metadata) -> None:
    metadata["segments"]["0"]["encryption"] = "cipher_null-ecb"


def _no_keyslots(metadata: headers.Metadata) -> None:
    metadata["keyslots"].clear()
    metadata["digests"]["0"]["keyslots"] = []


def _detached(metadata: headers.Metadata) -> None:
    metadata["segments"]["0"]["offset"] = "0"


def _reencrypting(metadata: headers.Metadata) -> None:
    metadata["config"]["requirements"] = {"mandatory": ["online-reencrypt-v2"]}


def _huge_keyslots(folder: Path) -> Path:
    """Whole, with data and mostly a hole: room for key slots that could be as long as somebody likes."""
    size = 128 * MIB + 4096

    def change(metadata: headers.Metadata) -> None:
        metadata["segments"]["0"]["offset"] = str(size + 2 * headers.HDR_SIZE)
        metadata["config"]["keyslots_size"] = str(size)

    path = _forged(change)(folder)
    os.truncate(path, size + 2 * headers.HDR_SIZE + MIB)
    return path


def _damaged(offset: int) -> Callable[[bytes], bytes]:
    return lambda area: headers.with_field(area, "csum", bytes(64), offset)


def _starting(content: bytes) -> Make:
    return file_of("disk.img", lambda: content.ljust(MIB, b"\0"))


def _ending(content: bytes) -> Make:
    return file_of("disk.img", lambda: bytes(MIB) + content.ljust(512, b"\0"))


def _vhd(*fields: Field, header: Sequence[Field] = (), **footer: Any) -> Make:
    """A dynamic vhd; what is changed in its footer or dynamic header has a right checksum, `fields` do not."""
    return file_of("disk.vhd", lambda: patched(vhd(*header, footer=vhd_footer(**footer)), *fields))


def _vdi(*fields: Field) -> Make:
    return file_of("disk.vdi", lambda: patched(vdi(), *fields))


def _luks1(*fields: Field, size: int = 2 * MIB, **names: bytes) -> Make:
    return file_of("disk.luks", lambda: luks1(*fields, **names).ljust(MIB, b"\0").ljust(size, b"\0")[:size])


def _text(content: bytes) -> Make:
    return file_of("disk.img", lambda: content)


def _unbound(metadata: headers.Metadata) -> None:
    metadata["keyslots"]["3"] = metadata["keyslots"]["0"]
    metadata["digests"]["1"] = metadata["digests"]["0"] | {"keyslots": ["3"], "segments": []}


def _ignored_slot(metadata: headers.Metadata) -> None:
    metadata["keyslots"]["0"]["priority"] = 0


def _half_reencrypted(metadata: headers.Metadata) -> None:
    _reencrypting(metadata)
    area = {"type": "none", "offset": "290816", "size": "4096"}
    metadata["keyslots"]["1"] = {
        "type": "reencrypt", "key_size": 1, "mode": "reencrypt", "direction": "forward", "area": area,
    }  # fmt: skip


HOSTILE = [
    Hostile("qcow2 with a backing file", _backed(b"/etc/shadow"), "backing file '/etc/shadow'"),
    Hostile("qcow2 with a json: backing file", _backed(b'json:{"driver":"file"}'), r"backing file 'json:\{"),
    Hostile("qcow2 with a backing file's name elsewhere", _qcow2((8, ">Q", FAR)), "name lies outside its header"),
    Hostile("qcow2 with a data file", _qcow2((72, ">Q", 4)), "external data file"),
    Hostile(
        "qcow2 with a data file's name alone",
        _qcow2(extension=_extension(0x44415441, b"/etc/shadow")),
        "external data file",
    ),
    Hostile("qcow2 encrypted with AES", _qcow2((32, ">I", 1)), r"encrypted by QEMU \(AES\)"),
    Hostile("qcow2 encrypted with LUKS", _qcow2((32, ">I", 2)), r"encrypted by QEMU \(LUKS\)"),
    Hostile("qcow2 with a feature of the future", _qcow2((72, ">Q", 1 << 7)), "unknown incompatible features"),
    Hostile("qcow2 marked corrupt", _qcow2((72, ">Q", 2)), "marked corrupt"),
    Hostile("qcow2 not closed", _qcow2((72, ">Q", 1)), "not closed cleanly"),
    Hostile("qcow2 with unknown compression", _qcow2((72, ">Q", 8), (104, "B", 7)), "compression type 7"),
    Hostile("qcow2 that hides its compression", _qcow2((104, "B", 1)), "compression type 1"),
    Hostile("qcow of version 1", _qcow2((4, ">I", 1)), "version 1, expected 2 or 3"),
    Hostile("qcow2 with a header of 4 GiB", _qcow2((100, ">I", (1 << 32) - 8)), "header of 4294967288 bytes"),
    Hostile(
        "qcow2 with a huge extension", _qcow2((112, ">II", (5, (1 << 32) - 1))), "extension that leaves the header"
    ),
    Hostile("qcow2 with huge clusters", _qcow2((20, ">I", 63)), r"clusters of 2\^63 bytes"),
    Hostile("qcow2 with small subclusters", _qcow2((72, ">Q", 16)), "extended L2 entries in clusters of 4096"),
    Hostile("qcow2 over the limit", _qcow2((24, ">Q", FAR)), "at most 8388608 are allowed"),
    Hostile("qcow2 without a disk", _qcow2((24, ">Q", 0)), "virtual size is 0 bytes"),
    Hostile("qcow2 with half a sector", _qcow2((24, ">Q", 1000)), "virtual size is 1000 bytes"),
    Hostile("qcow2 with a short L1 table", _qcow2((24, ">Q", 8 * MIB)), "1 entries in its L1 table, expected 4"),
    Hostile("qcow2 with a huge L1 table", _qcow2((36, ">I", (1 << 32) - 1)), "4294967295 entries in its L1 table"),
    Hostile("qcow2 with its L1 table elsewhere", _qcow2((40, ">Q", FAR)), "L1 table .* past the end"),
    Hostile("qcow2 with its L1 table in the header", _qcow2((40, ">Q", 0)), "L1 table lies at offset 0"),
    Hostile("qcow2 with its refcounts elsewhere", _qcow2((48, ">Q", FAR)), "reference count table .* past the end"),
    Hostile("qcow2 without refcounts", _qcow2((56, ">I", 0)), "without a usable reference count table"),
    Hostile("qcow2 with its snapshots elsewhere", _qcow2((60, ">IQ", (1, FAR))), "snapshot table .* past the end"),
    Hostile("qcow2 with an L2 table elsewhere", _qcow2((L1_TABLE, ">Q", FAR)), "L2 table 0 .* past the end"),
    Hostile(
        "qcow2 with an L2 table between clusters", _qcow2((L1_TABLE, ">Q", CLUSTER + 512)), "where no cluster begins"
    ),
    Hostile("qcow2 with a cluster elsewhere", _qcow2((L2_TABLE, ">Q", FAR)), "cluster at offset 0 .* past the end"),
    Hostile(
        "qcow2 with a cluster between clusters", _qcow2((L2_TABLE, ">Q", FIRST_DATA + 512)), "where no cluster begins"
    ),
    Hostile(
        "qcow2 with a compressed cluster elsewhere",
        _qcow2((L2_TABLE, ">Q", 1 << 62 | FAR)),
        "cluster at offset 0 .* past the end",
    ),
    Hostile("qcow2 cut in its header", file_of("disk.qcow2", lambda: qcow2()[:80]), "header .* past the end"),
    Hostile("qcow2 cut in its data", file_of("disk.qcow2", lambda: qcow2()[:-CLUSTER]), "disk .* past the end"),
    Hostile(
        "vmdk text with a FLAT extent",
        file_of("disk.vmdk", lambda: descriptor("monolithicFlat", extents='RW 8 FLAT "/etc/shadow" 0')),
        "descriptor of a vmdk",
    ),
    Hostile(
        "vmdk text without its title",
        file_of("disk.vmdk", lambda: b'# a\n\r\n\nversion=1\nCID=1\nRW 8 FLAT "/etc/shadow" 0\n'),
        "descriptor of a vmdk",
    ),
    Hostile("vmdk of another type", _described("monolithicFlat"), "type 'monolithicFlat'"),
    Hostile("vmdk in pieces", _described("twoGbMaxExtentSparse"), "type 'twoGbMaxExtentSparse'"),
    Hostile("vmdk of two types", _described(more='createType="vmfs"'), "type 'monolithicSparse, vmfs'"),
    Hostile("vmdk with a FLAT extent", _described(extents='RW 8 FLAT "/etc/shadow" 0'), "extents FLAT '/etc/shadow'"),
    Hostile("vmdk with two extents", _described(extents='RW 8 SPARSE "a"\nRW 8 SPARSE "b"'), "SPARSE 'a', SPARSE 'b'"),
    Hostile("vmdk with an extent elsewhere", _described(extents='RW 8 SPARSE "../b"'), "SPARSE '../b'"),
    Hostile("vmdk without an extent", _described(extents="#"), "extents none"),
    Hostile("vmdk with a parent", _described(parent="5c7a8f02"), "with a parent"),
    Hostile("vmdk with a parent's name", _described(more='parentFileNameHint="/etc/shadow"'), "with a parent"),
    Hostile(
        "vmdk with a parent behind its descriptor",
        file_of(
            "disk.vmdk",
            lambda: patched(
                vmdk(descriptor("monolithicSparse").ljust(600, b"#") + b'\nparentFileNameHint="/etc/shadow"\n'),
                (36, "<Q", 1),
            ),
        ),
        "with a parent",
    ),
    Hostile(
        "vmdk with a descriptor of empty lines",
        file_of("disk.vmdk", lambda: patched(vmdk(b"\n" * 64 * 1024), (36, "<Q", 128))),
        "type 'none'",
    ),
    Hostile("vmdk with a descriptor of 1 TiB", _vmdk((36, "<Q", 1 << 31)), "without a descriptor"),
    Hostile("vmdk without a descriptor", _vmdk((28, "<QQ", (0, 0))), "without a descriptor"),
    Hostile("vmdk with a capacity of 0", _vmdk((12, "<Q", 0)), "descriptor names other files"),
    Hostile("vmdk over the limit", _vmdk((12, "<Q", FAR)), "at most 8388608 are allowed"),
    Hostile("vmdk of the future", _vmdk((4, "<I", 4)), "version 4, expected 1 to 3"),
    Hostile("vmdk that went through a text transfer", _vmdk((73, "4s", b"\n \n ")), "line ends were changed"),
    Hostile("vmdk not closed", _vmdk((72, "B", 1)), "not closed cleanly"),
    Hostile("vmdk that denies its compression", _vmdk((77, "<H", 1)), "type monolithicSparse with compression 1"),
    Hostile("vmdk with odd grains", _vmdk((20, "<Q", 100)), "512 grains of 100 sectors"),
    Hostile("vmdk with its directory elsewhere", _vmdk((56, "<Q", FAR)), "grain directory .* past the end"),
    Hostile("vmdk with a table elsewhere", _vmdk((GRAIN_DIRECTORY, "<I", 1 << 31)), "grain table 0 .* past the end"),
    Hostile("vmdk with a grain elsewhere", _vmdk((GRAIN_TABLE, "<I", 1 << 31)), "grain at offset 0 .* past the end"),
    Hostile("vmdk cut in its data", file_of("disk.vmdk", lambda: vmdk()[:-512]), "disk .* past the end"),
    Hostile("vmdk with metadata that never ends", _vmdk((64, "<Q", FAR)), "metadata .* past the end"),
    Hostile(
        "vmdk stream without its footer", file_of("disk.vmdk", lambda: vmdk_stream()[:-1024]), "without the footer"
    ),
    Hostile(
        "vmdk stream over the limit in its footer", _stream((-1024 + 12, "<Q", FAR)), "at most 8388608 are allowed"
    ),
    Hostile("vmdk stream with a footer to itself", _stream((-1024 + 56, "<q", -1)), "footer leads to no disk"),
    Hostile("vmdk stream without markers", _stream((8, "<I", 1 | 1 << 16)), "no markers"),
    Hostile("vhdx with a parent", _vhdx((FLAGS_AT, "<I", 2)), "with a parent"),
    Hostile("vhdx with a part in a parent", _vhdx((BLOCK_TABLE, "<Q", BLOCK | 7)), "lacks a part of its block"),
    Hostile("vhdx with a block in no state", _vhdx((BLOCK_TABLE, "<Q", BLOCK | 4)), "no known state"),
    Hostile("vhdx with a block in its header", _vhdx((BLOCK_TABLE, "<Q", 6)), "no known state"),
    Hostile("vhdx with a block elsewhere", _vhdx((BLOCK_TABLE, "<Q", FAR | 6)), "block at offset 0 .* past the end"),
    Hostile("vhdx with a log", _both_headers(48, "16s", b"log" * 5), "log that must be replayed"),
    Hostile("vhdx of the future", _both_headers(66, "<H", 2), "version 2 with a log of version 0"),
    Hostile(
        "vhdx with wrong header checksums", _vhdx(*((at + 8, "B", 9) for at in HEADERS), checksums=False), "no header"
    ),
    Hostile("vhdx with headers that differ", _vhdx((HEADERS[0] + 8, "<Q", 8), (HEADERS[0] + 16, "B", 1)), "contradict"),
    Hostile("vhdx with a wrong region checksum", _vhdx((REGIONS + 40, "B", 1), checksums=False), "region table whose"),
    Hostile(
        "vhdx with an unknown region", _vhdx((REGIONS + 8, "<I", 3), (REGIONS + 80 + 28, "<I", 1)), "unknown region"
    ),
    Hostile("vhdx without metadata", _vhdx((REGIONS + 8, "<I", 1)), "without a block table or metadata"),
    Hostile("vhdx with a region elsewhere", _vhdx((REGIONS + 32, "<Q", FAR)), "region .* past the end"),
    Hostile("vhdx with a region between", _vhdx((REGIONS + 32, "<Q", MIB + 512)), "region out of place"),
    Hostile("vhdx with regions that overlap", _vhdx((REGIONS + 64, "<Q", BLOCK_TABLE)), "region out of place"),
    Hostile(
        "vhdx with a region twice",
        _vhdx((REGIONS + 48, "16s", guid("2dc27766-f623-4200-9d64-115e9bfd4a08"))),
        "names one region twice",
    ),
    Hostile("vhdx with its log elsewhere", _both_headers(72, "<Q", FAR), "vhdx region .* past the end"),
    Hostile("vhdx with a metadata table that is none", _vhdx((METADATA, "8s", b"")), "metadata table that is none"),
    Hostile("vhdx with unknown metadata", _vhdx((METADATA + 32, "16s", b"?" * 16)), "unknown metadata"),
    Hostile("vhdx with metadata elsewhere", _vhdx((METADATA + 32 + 16, "<I", FAR >> 20)), "twice or out of place"),
    Hostile("vhdx with metadata missing", _vhdx((METADATA + 10, "<H", 4)), "without the metadata cda348c7"),
    Hostile(
        "vhdx with a parent's place",
        _vhdx(
            (METADATA + 10, "<H", 6),
            (METADATA + 32 * 6, "16s", guid("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")),
            (METADATA + 32 * 6 + 16, "<III", (64 * 1024 + 40, 20, 4)),
        ),
        "with a parent",
    ),
    Hostile("vhdx with sectors of 4096", _vhdx((SECTOR_AT, "<I", 4096)), "logical sectors of 4096 bytes"),
    Hostile("vhdx with odd blocks", _vhdx((BLOCK_SIZE_AT, "<I", 3 * MIB)), "blocks of 3145728 bytes"),
    Hostile("vhdx over the limit", _vhdx((SIZE_AT, "<Q", FAR)), "at most 8388608 are allowed"),
    Hostile("vhdx with a short block table", _vhdx((REGIONS + 40, "<I", 0)), "block table has no room"),
    Hostile(
        "vhdx cut in its data", file_of("disk.vhdx", lambda: vhdx()[: BLOCK + len(DISK) - 1]), "disk .* past the end"
    ),
    Hostile(
        "LUKS1 with a cipher that is none of ours", _luks1(cipher=b"serpent"), "LUKS1 .*found 'serpent-xts-plain64'"
    ),
    Hostile("LUKS1 with a name that never ends", _luks1(cipher=b"a" * 32), "LUKS1 .*expected a cipher"),
    Hostile("LUKS1 with a weak hash", _luks1(hash_name=b"md5"), "LUKS1 .*found 'md5'"),
    Hostile("LUKS1 without a key slot", _luks1((208, ">I", 0xDEAD)), "LUKS1 without data or without a key slot"),
    Hostile("LUKS1 with a key slot in no state", _luks1((208, ">I", 1)), "key slot 0 to be in use or free"),
    Hostile("LUKS1 with a key slot elsewhere", _luks1((248, ">I", 1 << 31)), "area of key slot 0 within"),
    Hostile("LUKS1 with few stripes", _luks1((252, ">I", 1)), "expected 4000 stripes"),
    Hostile("LUKS1 with a huge key", _luks1((108, ">I", 1 << 31)), "LUKS1 with a header that must not be used"),
    Hostile("LUKS1 without a UUID", _luks1((168, "40s", b"")), "expected a UUID"),
    Hostile("LUKS1 detached", _luks1((104, ">I", 0)), "detached LUKS1 header"),
    Hostile("LUKS1 header alone", _luks1(size=MIB), "LUKS1 header without data"),
    Hostile("LUKS1 cut in its header", _luks1(size=4000), "LUKS1 header, found 4000"),
    Hostile("LUKS1 cut within a sector", _luks1(size=2 * MIB - 100), "LUKS1 .*expected whole sectors of 512"),
    Hostile("LUKS2 with an unbound key slot", _forged(_unbound), "`cryptsetup luksKillSlot FILE 3`"),
    Hostile("LUKS2 with a key slot that is not in use", _forged(_ignored_slot), "`cryptsetup config FILE --key-slot 0"),
    Hostile(
        "LUKS2 with metadata that is no UTF-8",
        _luks(lambda area: headers.with_json(area, b'{"keyslots":{"\xc7":{}}}')),
        "LUKS2 with a header that must not be used",
    ),
    Hostile("LUKS2 half reencrypted", _forged(_half_reencrypted), "`cryptsetup reencrypt --resume-only"),
    Hostile("LUKS2 with one damaged header", _luks(_damaged(headers.HDR_SIZE)), "damaged or outdated secondary header"),
    Hostile(
        "LUKS2 with both damaged", _luks(lambda area: _damaged(0)(_damaged(headers.HDR_SIZE)(area))), "both damaged"
    ),
    Hostile("LUKS2 with its first header wiped", _luks(lambda area: bytes(4096) + area[4096:]), "first header wiped"),
    Hostile("LUKS2 without a cipher", _forged(_null_cipher), "cipher_null-ecb"),
    Hostile("LUKS2 without a key slot", _forged(_no_keyslots), "without data or without a key slot"),
    Hostile("LUKS2 in the middle of a reencryption", _forged(_reencrypting), "online-reencrypt"),
    Hostile("LUKS2 with a huge key slot area", _huge_keyslots, "at most 134217728 bytes for the key slot area"),
    Hostile("LUKS2 detached", _forged(_detached), "detached LUKS2 header"),
    Hostile("LUKS2 header alone", _luks(size=headers.DATA_OFFSET), "header without data"),
    Hostile("LUKS2 cut within a sector", _luks(size=headers.DEVICE_SIZE - 100), "expected whole sectors of 512"),
    Hostile("LUKS2 over the limit", _luks(size=headers.DATA_OFFSET + MOST_BYTES + 512), "at most 8388608 are allowed"),
    Hostile("nothing", file_of("disk.img", bytes), "is empty"),
    Hostile("raw over the limit", file_of("disk.img", lambda: bytes(MOST_BYTES + 1)), "at most 8388608 are allowed"),
    Hostile("vhd, differencing", _vhd(kind=4), "differencing vhd"),
    Hostile("vhd with a parent", _vhd(header=[(40, "16s", b"p" * 16)]), "a vhd with a parent"),
    Hostile("vhd of a type that is none", _vhd(kind=5), "vhd of type 5"),
    Hostile("vhd with a wrong footer checksum", _vhd((8, ">I", 9)), "first footer has a wrong checksum"),
    Hostile("vhd with a wrong header checksum", _vhd((VHD_HEADER + 28, ">I", 5)), "dynamic header whose checksum"),
    Hostile("vhd with its header elsewhere", _vhd(dynamic_at=FAR), "dynamic vhd header .* past the end"),
    Hostile("vhd with its table elsewhere", _vhd(header=[(16, ">Q", FAR)]), "vhd block table .* past the end"),
    Hostile("vhd with a short table", _vhd(header=[(28, ">I", 1)]), "1 entries in its block table, expected 4"),
    Hostile("vhd with a huge table", _vhd(header=[(28, ">I", 1 << 31)]), "2147483648 entries in its block table"),
    Hostile("vhd with odd blocks", _vhd(header=[(32, ">I", 3000)]), "blocks of 3000 bytes"),
    Hostile("vhd with a block elsewhere", _vhd((VHD_TABLE, ">I", 1 << 31)), "block at offset 0 .* past the end"),
    Hostile("vhd over the limit", _vhd(size=FAR), "at most 8388608 are allowed"),
    Hostile("vhd without a disk", _vhd(size=0), "virtual size is 0 bytes"),
    Hostile("vhd cut in its data", file_of("disk.vhd", lambda: vhd()[: -VHD_BLOCK - 512]), "disk .* past the end"),
    Hostile("vhd, fixed, cut at its start", file_of("disk.vhd", lambda: vhd_fixed()[512:]), "footer tells a disk of"),
    Hostile("vhd, dynamic, cut at its start", file_of("disk.vhd", lambda: vhd()[512:]), "does not begin like one"),
    Hostile("vdi with a parent", _vdi((440, "16s", b"p" * 16)), "lacks what its parent has"),
    Hostile("vdi that is a snapshot", _vdi((76, "<I", 4)), "of type 4 that lacks"),
    Hostile("vdi of version 1.0", _vdi((68, "<I", 0x10000)), "version 1.0, expected 1.1"),
    Hostile("vdi with odd blocks", _vdi((376, "<I", 2 * MIB)), "blocks of 2097152 and 0"),
    Hostile("vdi with its table elsewhere", _vdi((340, "<I", 1 << 31)), "vdi block table .* past the end"),
    Hostile("vdi with its table between sectors", _vdi((340, "<I", 513)), "between two sectors"),
    Hostile("vdi with a short table", _vdi((384, "<I", 0)), "0 blocks, expected 1"),
    Hostile("vdi with a block elsewhere", _vdi((VDI_TABLE, "<I", 1 << 30)), "block at offset 0 .* past the end"),
    Hostile("vdi over the limit", _vdi((368, "<Q", FAR)), "at most 8388608 are allowed"),
    Hostile("vdi cut in its header", file_of("disk.vdi", lambda: vdi()[:400]), "vdi header .* past the end"),
    Hostile("vdi cut in its data", file_of("disk.vdi", lambda: vdi()[: 1023 + len(DISK)]), "disk .* past the end"),
    Hostile("Parallels", _starting(b"WithoutFreeSpace\2"), "a Parallels disk"),
    Hostile("Parallels, extended", _starting(b"WithouFreSpacExt\2"), "a Parallels disk"),
    Hostile("qed", _starting(b"QED\0\0\0\1\0"), "a qed disk"),
    Hostile("Bochs", _starting(b"Bochs Virtual HD Image\0"), "a Bochs disk"),
    Hostile("dmg", _ending(b"koly" + struct.pack(">II", 4, 512)), "a dmg disk"),
    Hostile("cloop", _starting(b"#!/bin/sh\n#V2.0 Format\n"), "a cloop disk"),
    Hostile("VMware COWD", _starting(b"COWD\1\0\0\0"), "COWD"),
    Hostile("VMware seSparse", _starting(struct.pack("<QQ", 0xCAFEBABE, 0x200000001)), "seSparse"),
    Hostile("Android sparse", _starting(b"\x3a\xff\x26\xed\1\0\0\0"), "simg2img"),
    Hostile("json: text", _starting(b'json:{"driver":"raw","file":"/etc/shadow"}'), "json: notation"),
    Hostile("an error page", file_of("disk.img", lambda: b"\n<!DOCTYPE html><title>404</title>"), "page of text"),
    Hostile("bzip2", _starting(b"BZh91AY&SY"), "compressed with bzip2"),
    Hostile("lz4", _starting(b"\x04\x22\x4d\x18"), "compressed with lz4"),
    Hostile("lzma alone", file_of("disk.img", lambda: lzma.compress(DISK, lzma.FORMAT_ALONE)), "as lzma alone"),
    Hostile("lzip", _starting(b"LZIP\1\x0c"), "compressed with lzip"),
    Hostile("lzop", _starting(b"\x89LZO\0\r\n\x1a\n"), "compressed with lzop"),
    Hostile("compress", _starting(b"\x1f\x9d\x90"), "compressed with compress"),
    Hostile("7z", _starting(b"7z\xbc\xaf\x27\x1c"), "a 7z archive"),
    Hostile("rar", _starting(b"Rar!\x1a\7\1\0"), "a rar archive"),
    Hostile("cab", _starting(b"MSCF\0\0\0\0"), "a cabinet archive"),
    Hostile("cpio", _starting(b"070701000A0B"), "a cpio archive"),
    Hostile("ar", _starting(b"!<arch>\ndebian-binary"), "an ar archive"),
    Hostile("rpm", _starting(b"\xed\xab\xee\xdb\3"), "an RPM package"),
    Hostile("xar", _starting(b"xar!\0\x1c\0\1"), "a xar archive"),
    Hostile("zip without files", _starting(b"PK\5\6"), "a zip archive that is empty"),
    Hostile(
        "tar, damaged", _starting(b"disk.ovf".ljust(257, b"\0") + b"ustar\x0000"), "tar archive whose first header"
    ),
    Hostile("VMA", _starting(b"VMA\0\0\0\0\1"), "a backup of Proxmox"),
    Hostile("WIM", _starting(b"MSWIM\0\0\0"), "a Windows image"),
    Hostile("partclone", _starting(b"partclone-image\x000002"), "a backup of partclone"),
    Hostile("partclone, before 2017", _starting(b"partclone-imageEXTFS\0"), "a backup of partclone"),
    Hostile("ntfsclone", _starting(b"\0ntfsclone-image"), "a backup of ntfsclone"),
    Hostile("E01", _starting(b"EVF\t\r\n\xff\0"), "an EnCase image"),
    Hostile("AFF", _starting(b"AFF10\r\n\0"), "an AFF image"),
    Hostile("ASIF", _starting(b"shdw\0"), "an Apple sparse image"),
    Hostile("sparseimage", _starting(b"sprs\0"), "an Apple sparseimage"),
    Hostile("dmg, encrypted", _starting(b"encrcdsa\0"), "an encrypted dmg"),
    Hostile("a saved state", _starting(b"QEVM\0\0\0\3"), "a state of a virtual machine"),
    Hostile("ELF", _starting(b"\x7fELF\2\1\1\0"), "an ELF program"),
    Hostile("PDF", _starting(b"%PDF-1.7\n"), "a PDF document"),
    Hostile("a Git LFS pointer", _text(b"version https://git-lfs.github.com/spec/v1\nsize 5\n"), "a Git LFS pointer"),
    Hostile("a JSON error", _text(b'{"errors":[{"status":404}]}\n'), "a JSON text"),
    Hostile("a list of checksums", _text(b"# of today\n" + b"ab" * 32 + b" *disk.img\n"), "a list of checksums"),
    Hostile("a list of checksums as BSD has it", _text(b"SHA256 (disk.img) = ab\n"), "a list of checksums"),
    Hostile("a sentence", _text(b"404 page not found\n"), "a text of 19 bytes"),
    Hostile("a text in UTF-16", _text('{"error": "not found"}\r\n'.encode("utf-16")), "a text of 50 bytes"),
    Hostile(
        "a text in UTF-16, the other way", _text(b"\xfe\xff" + "né".encode("utf-16-be") * 40000), "a text of 160002"
    ),
    Hostile("a text in Latin-1", _text("Datei für héute nicht gefunden\n".encode("latin-1")), "a text of 31 bytes"),
    Hostile("a text in another language", _text("não há nada".encode() * 9000), "a text of 117000 bytes"),
    Hostile("gzip in gzip", file_of("disk.img", lambda: gzip.compress(DISK)), "packed with gzip a second time"),
    Hostile("xz in gzip", file_of("disk.img", lambda: lzma.compress(DISK)), "packed with xz a second time"),
    Hostile("zstd in gzip", _starting(b"\x28\xb5\x2f\xfd"), "packed with zstd a second time"),
]
"""(name, maker, sentence): what must never be taken for an image."""

GOOD = [
    Good("raw", file_of("disk.img", lambda: DISK), ImageFormat.RAW, len(DISK), DISK),
    Good("raw of one byte", file_of("disk.img", lambda: b"\1"), ImageFormat.RAW, 1, b"\1"),
    Good("raw that ends within a character", file_of("disk.img", lambda: b"\xc3"), ImageFormat.RAW, 1, b"\xc3"),
    Good(
        "raw that begins like UTF-16",
        file_of("disk.img", lambda: b"\xff\xfe" + DISK),
        ImageFormat.RAW,
        len(DISK) + 2,
        None,
    ),
    Good("raw of an erased flash", file_of("disk.img", lambda: b"\xff" * 4096), ImageFormat.RAW, 4096, b"\xff" * 4096),
    Good("raw that begins with text", file_of("disk.img", lambda: b"text" * 99 + b"\0"), ImageFormat.RAW, 397, None),
    Good(
        "iso",
        file_of("cd.iso", lambda: bytes(0x8001) + b"CD001\1\0"),
        ImageFormat.RAW,
        0x8008,
        bytes(0x8001) + b"CD001\1\0",
    ),
    Good("qcow2 of version 2", _qcow2(version=2), ImageFormat.QCOW2, len(DISK), DISK),
    Good("qcow2", _qcow2(extension=_extension(0x6803F857, b"?" * 48)), ImageFormat.QCOW2, len(DISK), DISK),
    Good("qcow2, compressed", _qcow2(compressed=True), ImageFormat.QCOW2, len(DISK), DISK),
    Good(
        "qcow2 with subclusters",
        file_of("disk.qcow2", qcow2_extended),
        ImageFormat.QCOW2,
        16384,
        DISK[:512].ljust(16384, b"\0"),
    ),
    Good("vmdk, monolithicSparse", _vmdk(), ImageFormat.VMDK, len(DISK), DISK),
    Good("vmdk, streamOptimized", _stream(), ImageFormat.VMDK, len(DISK), DISK),
    Good("vhdx", _vhdx(), ImageFormat.VHDX, len(DISK), DISK),
    Good("vhdx with one header", _vhdx((HEADERS[1], "4s", b""), checksums=False), ImageFormat.VHDX, len(DISK), DISK),
    Good(
        "vhdx with a region and metadata that need not be known",
        _vhdx(
            (REGIONS + 8, "<I", 3),
            (REGIONS + 80, "<16sQII", (b"?" * 16, 0, 0, 0)),
            (METADATA + 10, "<H", 6),
            (METADATA + 32 * 6, "<16sIIII", (b"?" * 16, 0, 0, 0, 0)),
        ),
        ImageFormat.VHDX,
        len(DISK),
        DISK,
    ),
    Good("vhd, dynamic", _vhd(), ImageFormat.VHD, len(DISK), DISK),
    Good("vhd, fixed", file_of("disk.vhd", vhd_fixed), ImageFormat.RAW, len(DISK), DISK),
    Good("vdi", _vdi(), ImageFormat.VDI, len(DISK), DISK),
    Good(
        "vdi with a block that was never written",
        _vdi((VDI_TABLE, "<I", (1 << 32) - 1)),
        ImageFormat.VDI,
        len(DISK),
        bytes(len(DISK)),
    ),
    Good("LUKS1", _luks1(), ImageFormat.LUKS1, MIB, None),
    Good(
        "LUKS1 of before 2016",
        _luks1((108, ">I", 32), hash_name=b"sha1", mode=b"cbc-essiv:sha256"),
        ImageFormat.LUKS1,
        MIB,
        None,
    ),
    Good("LUKS2", _luks(), ImageFormat.LUKS2, MIB, None),
]
"""What must be taken, of every format."""
