"""The one image out of a zip, a tar or an OVA, and archives that are refused."""

import io
import os
import random
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csi_driver.images.formats import Wrapping, detect_wrapping
from csi_driver.images.unwrap import unwrap
from csi_driver.model.errors import InvalidArgument
from tests.image_builders import DISK, patched

MIB = 1 << 20


def unpack(
    packed: bytes, folder: Path, most_bytes: int = 64 * MIB, progress: Callable[[int], None] = lambda _: None
) -> bytes:
    """What comes out of what it begins like; nothing is left of what failed."""
    source, path = folder / "source", folder / "image"
    source.write_bytes(packed)
    path.unlink(missing_ok=True)
    wrapping = detect_wrapping(packed[:512])
    assert wrapping in (Wrapping.ZIP, Wrapping.TAR)
    try:
        with source.open("rb") as opened:
            unwrap(opened.fileno(), wrapping, path, most_bytes, "image ubuntu", progress)
    except BaseException:
        assert os.listdir(folder) == ["source"]
        raise
    return path.read_bytes()


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED, zip64: bool = False) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            with archive.open(name, "w", force_zip64=zip64) as member:
                member.write(content)
    return file.getvalue()


def tarred(*members: tuple[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


OVA = (("vm.ovf", b"<Envelope/>"), ("vm.mf", b"SHA256(vm.ovf)= ab"), ("vm-disk1.vmdk", DISK))
LONG = ("a" * 90 + "/") * 3 + "disk.img"
TAKEN = {
    "zip": zipped(("disk.img", DISK)),
    "zip, stored": zipped(("disk.img", DISK), method=zipfile.ZIP_STORED),
    "zip64": zipped(("disk.img", DISK), zip64=True),
    "zip with more": zipped(("README.txt", b"read"), ("vm/disk.img", DISK), ("vm/disk.img.sha256", b"ab")),
    "tar": tarred(("disk.img", DISK)),
    "ova": tarred(*OVA),
    "tar of GNU": tarred((LONG, DISK), form=tarfile.GNU_FORMAT),
    "pax": tarred((LONG, DISK), form=tarfile.PAX_FORMAT),
}


@pytest.mark.parametrize("packed", TAKEN.values(), ids=TAKEN)
def test_the_one_image_comes_out(packed: bytes, tmp_path: Path) -> None:
    steps: list[int] = []
    assert unpack(packed, tmp_path, progress=steps.append) == DISK
    assert steps == sorted(steps)
    assert 0 < steps[-1] <= len(packed)


def test_what_tar_writes_of_a_sparse_disk_comes_out(tmp_path: Path) -> None:
    """As Google's images: GNU's old sparse members."""
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.write(DISK)
        file.truncate(3 * MIB)
    command = ["tar", "--format=oldgnu", "--sparse", "-C", str(tmp_path), "-cf", "-", "disk.raw"]
    packed = subprocess.run(command, capture_output=True, check=True).stdout
    disk.unlink()
    assert len(packed) < 2 * MIB
    assert unpack(packed, tmp_path) == DISK.ljust(3 * MIB, b"\0")


def test_a_tar_of_version_7_has_no_signature_and_is_told_by_its_sum(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(DISK)
    command = ["tar", "--format=v7", "-C", str(tmp_path), "-cf", "-", "disk.raw"]
    packed = subprocess.run(command, capture_output=True, check=True).stdout
    (tmp_path / "disk.raw").unlink()
    assert b"ustar" not in packed[:512]
    assert unpack(packed, tmp_path) == DISK
    assert detect_wrapping(patched(packed[:512], (0, "B", 0x7F))) is None
    assert detect_wrapping(bytes(512)) is None


def central(packed: bytes) -> int:
    """Where the first entry of a zip's directory lies."""
    return packed.index(b"PK\1\2")


ZIP = TAKEN["zip"]
_END = (2 * MIB, central(ZIP), 0)
REFUSED = {
    "a zip of two": (zipped(("a.img", DISK), ("b.img", DISK)), r"a zip with 2 files that can be images \(a.img, b"),
    "a tar of two": (tarred(("a b.img", DISK), ("b.img", DISK)), r"`tar -xOf FILE 'a b.img' \| luks-csi image import"),
    "an OVA without a disk": (tarred(*OVA[:2]), "a tar without an image"),
    "many files": (zipped(*((f"{n}.html", b"x") for n in range(99))), r"99 files .*4.html, …\)"),
    "an encrypted zip": (patched(ZIP, (6, "<H", 1), (central(ZIP) + 8, "<H", 1)), "is encrypted"),
    "a zip with PPMd": (
        patched(ZIP, (8, "<H", 98), (central(ZIP) + 10, "<H", 98)), "98, expected 0 or 8; unpack it with the program"
    ),
    "a zip with LZMA": (zipped(("disk.img", DISK), method=zipfile.ZIP_LZMA), "compression 14, expected 0 or 8"),
    "a zip with a wrong sum": (patched(ZIP, (central(ZIP) + 16, "<I", 7)), "is damaged"),
    "a zip with a huge directory": (
        ZIP[: central(ZIP)] + bytes(2 * MIB) + ZIP[-22:-10] + struct.pack("<IIH", *_END), "is damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("packed", "sentence"), REFUSED.values(), ids=REFUSED)
def test_other_archives_are_refused(packed: bytes, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=rf"^image ubuntu is refused: .*{sentence}"):
        unpack(packed, tmp_path)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_would_fill_the_memory_is_not_read(kind: bytes, tmp_path: Path) -> None:
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, 32 * MIB
    with pytest.raises(InvalidArgument, match="it has a header of 33554432 bytes"):
        unpack(member.tobuf(tarfile.GNU_FORMAT) + bytes(32 * MIB) + tarred(("disk.img", DISK)), tmp_path)


def test_a_bomb_ends_at_the_limit(tmp_path: Path) -> None:
    for packed in (zipped(("disk.img", bytes(3 * MIB))), tarred(("disk.img", bytes(3 * MIB)))):
        with pytest.raises(InvalidArgument, match="more than the 1048576 bytes that are allowed"):
            unpack(packed, tmp_path, most_bytes=MIB)


@pytest.mark.parametrize("name", TAKEN)
@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 32))
def test_a_damaged_archive_is_refused_or_gives_one_image(
    tmp_path_factory: pytest.TempPathFactory, name: str, seed: int
) -> None:
    packed, draw = TAKEN[name], random.Random(seed)
    places = [*range(min(600, len(packed))), *range(max(len(packed) - 200, 0), len(packed))]
    fields = [(draw.choice(places), "B", draw.randrange(256)) for _ in range(draw.randint(1, 4))]
    damaged = patched(packed, *fields)[: len(packed) - draw.choice((0, 0, draw.randrange(len(packed) - 512)))]
    if detect_wrapping(damaged[:512]) in (Wrapping.ZIP, Wrapping.TAR):
        with suppress(InvalidArgument):
            assert unpack(damaged, tmp_path_factory.mktemp("damaged"))
