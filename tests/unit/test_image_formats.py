"""What is taken as an image and what is refused, and that the answer agrees with qemu's where that is installed."""

import json
import os
import random
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csi_driver.images.base import ImageFormat
from csi_driver.images.formats import Inspected, Wrapping, check_source, detect_wrapping, inspect
from csi_driver.images.imagefile import ImageFile
from csi_driver.images.vhdx import crc32c
from csi_driver.model.errors import DeviceUnreadable, InvalidArgument
from tests import headers
from tests.image_builders import (
    BLOCK,
    CLUSTER,
    DISK,
    FIRST_DATA,
    GRAIN,
    GRAIN_DIRECTORY,
    GRAIN_TABLE,
    L1_TABLE,
    L2_TABLE,
    MIB,
    VHD_BLOCK,
    checksummed,
    file_of,
    patched,
    qcow2,
    vdi,
    vhd,
    vhd_footer,
    vhdx,
    vmdk,
    vmdk_stream,
)
from tests.image_corpus import GOOD, HOSTILE, MOST_BYTES, Good, Hostile

WHERE = "image ubuntu"
# On CI a missing qemu-img is a failure, elsewhere the files made here must do.
FORMATS = {"vpc": ImageFormat.VHD}
QEMU_IMG = bool(shutil.which("qemu-img") or os.environ.get("CI"))


def inspected(path: Path, most_bytes: int = MOST_BYTES) -> Inspected:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return inspect(descriptor, WHERE, most_bytes)
    finally:
        os.close(descriptor)


def inspected_bytes(content: bytes) -> Inspected:
    """The same for a file in memory."""
    descriptor = os.memfd_create("image")
    try:
        os.write(descriptor, content)
        return inspect(descriptor, WHERE, MOST_BYTES)
    finally:
        os.close(descriptor)


def qemu_img(*arguments: str) -> bytes:
    return subprocess.run(["qemu-img", *arguments], check=True, capture_output=True, timeout=120).stdout


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_the_corpus_is_refused_with_a_sentence_of_its_own(hostile: Hostile, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=hostile.sentence) as refused:
        inspected(hostile.make(tmp_path))
    sentence = str(refused.value)
    assert sentence.startswith(f"{WHERE} is refused: ")
    assert "\n" not in sentence
    assert len(sentence) < 500


def test_the_corpus_names_each_file_once() -> None:
    names = [hostile.name for hostile in HOSTILE] + [good.name for good in GOOD]
    assert len(names) == len(set(names)) >= 25


@pytest.mark.parametrize("good", GOOD, ids=lambda good: good.name)
def test_good_files_are_taken_and_qemu_reads_the_same_disk_in_them(good: Good, tmp_path: Path) -> None:
    path = good.make(tmp_path)
    found = inspected(path)
    assert (found.format, found.virtual_size) == (good.format, good.virtual_size)
    if not QEMU_IMG or good.disk is None or good.format is ImageFormat.RAW:
        return
    name = "vpc" if good.format is ImageFormat.VHD else good.format
    facts = json.loads(qemu_img("info", "--output=json", "-f", name, str(path)))
    assert facts["virtual-size"] == good.virtual_size
    qemu_img("convert", "-f", name, "-O", "raw", str(path), str(tmp_path / "out.raw"))
    assert (tmp_path / "out.raw").read_bytes() == good.disk


MADE_BY_QEMU = [
    ("qcow2", "compat=0.10"),
    ("qcow2", "cluster_size=512"),
    ("qcow2", "cluster_size=2M"),
    ("qcow2", "extended_l2=on"),
    ("qcow2", "lazy_refcounts=on"),
    ("qcow2", "preallocation=metadata"),
    ("qcow2", "preallocation=falloc,refcount_bits=1"),
    ("qcow2", "compressed"),
    ("qcow2", "compressed,compression_type=zstd"),
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
    ("vmdk", "subformat=streamOptimized"),
    ("vhdx", "subformat=dynamic"),
    ("vhdx", "subformat=fixed,block_size=1M"),
    ("vpc", "subformat=dynamic,force_size"),
    ("vdi", ""),
]


@pytest.mark.parametrize(("format", "options"), MADE_BY_QEMU if QEMU_IMG else [])
@pytest.mark.parametrize("size", [512, 3 * 1024 * 1024 + 512])
def test_what_qemu_makes_is_taken_with_its_size(format: str, options: str, size: int, tmp_path: Path) -> None:
    source, path = tmp_path / "source.raw", tmp_path / "disk"
    source.write_bytes(DISK[:size])
    os.truncate(source, size)
    compressed = options.startswith("compressed")
    chosen = options.removeprefix("compressed").removeprefix(",")
    flags = (["-c"] if compressed else []) + (["-o", chosen] if chosen else [])
    qemu_img("convert", "-f", "raw", "-O", format, *flags, str(source), str(path))
    facts = json.loads(qemu_img("info", "--output=json", "-f", format, str(path)))
    found = inspected(path)
    assert (found.format, found.virtual_size) == (FORMATS.get(format, format), facts["virtual-size"])
    assert facts["virtual-size"] == size


@pytest.mark.parametrize("format", ["parallels", "qed", "qcow"] if QEMU_IMG else [])
def test_other_formats_of_qemu_are_refused_by_name(format: str, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", format, str(path), "8M")
    with pytest.raises(InvalidArgument, match=format.capitalize()[1:]):
        inspected(path)


# Each ends with the last byte that its disk needs.
WHOLE: dict[str, bytes] = {
    "qcow2": qcow2()[: 512 - CLUSTER],
    "vmdk": vmdk(),
    "vmdk stream": vmdk_stream(),
    "vhdx": vhdx()[: BLOCK + len(DISK)],
    "vhd": vhd()[: len(DISK) % VHD_BLOCK - VHD_BLOCK - 512],
    "vdi": vdi()[: 1024 + len(DISK)],
}


@pytest.mark.parametrize("content", WHOLE.values(), ids=WHOLE)
@settings(max_examples=30)
@given(part=st.floats(0, 1, exclude_max=True))
def test_a_container_is_refused_wherever_it_was_cut(content: bytes, part: float) -> None:
    told_by = 68  # bytes
    cut = told_by + int(part * (len(content) - told_by))
    with pytest.raises(InvalidArgument, match="truncated"):
        inspected_bytes(content[:cut])


@pytest.mark.parametrize("content", WHOLE.values(), ids=WHOLE)
def test_a_container_that_ends_with_its_disk_is_taken(content: bytes) -> None:
    assert inspected_bytes(content).virtual_size == len(DISK)


_STREAM_TAIL = len(WHOLE["vmdk stream"]) - 10 * 512
# Where the metadata of each lies, in 8 bytes that are not all zero.
METADATA = {
    name: [at for start, end in spans for at in range(start, end, 8) if any(WHOLE[name][at : at + 8])]
    for name, spans in (
        ("qcow2", [(0, FIRST_DATA)]),
        ("vmdk", [(0, GRAIN * 512)]),
        ("vmdk stream", [(0, GRAIN * 512), (_STREAM_TAIL, len(WHOLE["vmdk stream"]))]),
        ("vhdx", [(0, BLOCK)]),
        ("vhd", [(0, 2048)]),
        ("vdi", [(0, 1024)]),
    )
}


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=20)
@given(seed=st.integers(0, 1 << 32))
def test_a_container_with_random_damage_is_refused_or_within_the_limit(name: str, seed: int) -> None:
    numbers = random.Random(seed)
    fields = [(numbers.choice(METADATA[name]), "8s", numbers.randbytes(8)) for _ in range(numbers.randint(1, 3))]
    damaged = patched(WHOLE[name], *fields)
    with suppress(InvalidArgument):
        found = inspected_bytes(checksummed(damaged) if name == "vhdx" else damaged)
        assert 0 < found.virtual_size <= MOST_BYTES


def test_a_qcow2_that_ends_within_its_header_is_refused(tmp_path: Path) -> None:
    """Found by `make fuzz`: a header of 112 bytes in a file of 104."""
    cut = patched(qcow2(), (100, ">I", 112))[:104]
    with pytest.raises(InvalidArgument, match="reaches past the end"):
        inspected(file_of("disk.qcow2", lambda: cut)(tmp_path), 1 << 40)


def test_a_table_that_is_mapped_again_and_again_keeps_nobody_busy(tmp_path: Path) -> None:
    tables = [1 << 63 | L2_TABLE] * 512
    looped = patched(qcow2(), (24, ">Q", 1 << 30), (36, ">I", 512), (L1_TABLE, ">512Q", tuple(tables)))
    with pytest.raises(InvalidArgument, match="more L2 tables than fit"):
        inspected(file_of("disk.qcow2", lambda: looped)(tmp_path), 1 << 40)
    looped = patched(vmdk(), (12, "<Q", 1 << 23), (GRAIN_DIRECTORY, "<128I", (GRAIN_TABLE // 512 + 4,) * 128))
    with pytest.raises(InvalidArgument, match="more grain tables than fit"):
        inspected(file_of("disk.vmdk", lambda: looped)(tmp_path), 1 << 40)


def test_a_vmdk_with_too_many_tables_is_refused_and_one_that_lacks_some_reads_as_zeros(tmp_path: Path) -> None:
    many = patched(vmdk(), (12, "<Q", 1 << 38), (20, "<Q", 8), (44, "<I", 1))
    with pytest.raises(InvalidArgument, match="34359738368 grain tables"):
        inspected(file_of("disk.vmdk", lambda: many)(tmp_path), 1 << 50)
    two = patched(vmdk() + bytes(GRAIN * 512), (12, "<Q", 80 * 1024))
    assert inspected(file_of("disk.vmdk", lambda: two)(tmp_path), 1 << 40).virtual_size == 40 * MIB


def test_luks2_brings_what_its_header_says(tmp_path: Path) -> None:
    (good,) = (good for good in GOOD if good.format is ImageFormat.LUKS2)
    identity = inspected(good.make(tmp_path)).luks
    assert identity is not None
    assert (identity.uuid, identity.cipher, identity.key_bits) == (headers.UUID, "aes-xts-plain64", 512)
    assert (identity.sector_size, identity.data_offset) == (512, headers.DATA_OFFSET)
    assert identity.digest
    assert headers.accepts(headers.formatted())


def test_luks2_with_a_costly_key_slot_is_taken() -> None:
    area = headers.formatted("--sector-size", "4096", *headers.CHEAP_PBKDF2)[:MIB]

    def costly(metadata: headers.Metadata) -> None:
        salt = metadata["keyslots"]["0"]["kdf"]["salt"]
        metadata["keyslots"]["0"]["kdf"] = {"type": "argon2id", "time": 4, "memory": 4 << 20, "cpus": 4, "salt": salt}

    found = inspected_bytes(headers.forged(area, costly).ljust(headers.DEVICE_SIZE, b"\0"))
    assert found.virtual_size == headers.DEVICE_SIZE - headers.DATA_OFFSET
    assert found.luks is not None
    assert found.luks.sector_size == 4096


def test_the_limit_itself_is_allowed(tmp_path: Path) -> None:
    for good in GOOD:
        path = good.make(tmp_path)
        assert inspected(path, good.virtual_size).virtual_size == good.virtual_size
        with pytest.raises(InvalidArgument, match=f"at most {good.virtual_size - 1} are allowed"):
            inspected(path, good.virtual_size - 1)


def test_only_regular_files_are_inspected(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="found a directory"):
        inspected(tmp_path)
    with pytest.raises(InvalidArgument, match="found a character device"):
        inspected(Path("/dev/null"))


def test_a_file_that_cannot_be_read_is_no_refusal(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(DISK)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        with pytest.raises(DeviceUnreadable, match=f"{WHERE} cannot be read at offset 0"):
            inspect(descriptor, WHERE, MOST_BYTES)
    finally:
        os.close(descriptor)


def test_a_file_that_shrinks_meanwhile_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "disk").open("wb+") as file:
        image = ImageFile(file.fileno(), WHERE, 4096, MOST_BYTES)
        with pytest.raises(InvalidArgument, match="became shorter"):
            image.read(0, 512, "header")


def test_a_disk_that_ends_like_a_vhd_by_chance_is_raw() -> None:
    found = inspected_bytes(bytes(512) + b"conectix".ljust(512, b"\1"))
    assert (found.format, found.length) == (ImageFormat.RAW, 1024)


def test_a_fixed_vhd_is_a_raw_disk_and_a_footer() -> None:
    text = b"A disk may begin with anything.\n" * 16
    for disk in (DISK, text, b"\x1f\x8b\x08".ljust(512, b"\0")):
        footer = vhd_footer(2, size=len(disk), dynamic_at=(1 << 64) - 1)
        found = inspected_bytes(disk + footer)
        assert (found.format, found.length, found.warning) == (ImageFormat.RAW, len(disk), None)


def test_a_passphrase_that_is_given_for_an_image_is_not_repeated() -> None:
    with pytest.raises(InvalidArgument, match="a text of 15 bytes") as caught:
        inspected_bytes(b"correct horse 1")
    assert "correct" not in str(caught.value)


def test_a_disk_of_half_sectors_is_taken_with_a_warning() -> None:
    found = inspected_bytes(bytes(1000))
    assert (found.virtual_size, found.length) == (1000, 1000)
    assert (
        found.warning == f"{WHERE} has 1000 bytes, expected a multiple of 512 of a disk; it is taken, and may be "
        "cut short or no disk"
    )
    assert inspected_bytes(bytes(1024)).warning is None


def test_a_disk_with_an_old_luks_copy_behind_a_boot_sector_is_raw() -> None:
    area = bytearray(headers.formatted()[: 64 * 1024])
    area[:4096] = b"\xeb\x3c\x90".ljust(4096, b"\0")
    assert inspected_bytes(bytes(area)).format is ImageFormat.RAW


@pytest.mark.parametrize(
    ("head", "wrapping"),
    [
        (b"\x1f\x8b\x08\0\0\0", Wrapping.GZIP),
        (b"\xfd7zXZ\0", Wrapping.XZ),
        (b"\x28\xb5\x2f\xfd\0\0", Wrapping.ZSTD),
        (b"\x5f\x2a\x4d\x18\0\0", Wrapping.ZSTD),
        (b"\x1f\x8b\x07\0\0\0", None),
        (b"\x4f\x2a\x4d\x18\0\0", None),
        (b"QFI\xfb\0\0", None),
        (b"\x1f", None),
        (b"", None),
    ],
)
def test_compression_is_told_by_the_first_bytes(head: bytes, wrapping: Wrapping | None) -> None:
    assert detect_wrapping(head) is wrapping


@pytest.mark.parametrize("source", ['json:{"driver":"file"}', "nbd://evil/", "fd:3", "file:///etc/shadow", "JSON:x"])
def test_sources_in_qemus_notation_are_refused(source: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(source.split(":", maxsplit=1)[0] + ":")):
        check_source(source)


@pytest.mark.parametrize(
    "source", ["disk.img", "./json:a", "/images/a:b", "https://example.com/a", "HTTP://example.com/"]
)
def test_paths_and_addresses_are_sources(source: str) -> None:
    check_source(source)


def test_crc32c_gives_the_check_value_of_its_definition() -> None:
    assert crc32c(b"123456789") == 0xE3069283
