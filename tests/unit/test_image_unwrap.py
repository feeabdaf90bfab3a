"""Unpacking .gz, .xz and .zst: whole or not at all, with holes, in bounded memory."""

import bz2
import gzip
import lzma
import os
import random
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from csi_driver.images.formats import Wrapping
from csi_driver.images.unwrap import unwrap
from csi_driver.model.errors import CommandFailed, DeviceUnreadable, InvalidArgument
from tests.small_folder import in_a_small_folder

MIB = 1 << 20
HOLE = 64 << 10
NOISE = random.Random(5).randbytes(300_000)


def zstd(content: bytes, *, checked: bool = False) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=checked).compress(content)


def zstd_unsized(content: bytes) -> bytes:
    """As zstd(1) writes from a pipe: the frame does not say its size."""
    packing = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    return packing.compress(content) + packing.flush()


PACK: dict[Wrapping, Callable[[bytes], bytes]] = {
    Wrapping.GZIP: lambda content: gzip.compress(content, 1, mtime=0),
    Wrapping.XZ: lambda content: lzma.compress(content, preset=0),
    Wrapping.ZSTD: zstd,
}
EACH = pytest.mark.parametrize("wrapping", PACK)


def unpack(
    packed: bytes,
    wrapping: Wrapping,
    folder: Path,
    most_bytes: int = 64 * MIB,
    progress: Callable[[int], None] = lambda _: None,
    warn: Callable[[str], None] = pytest.fail,
) -> bytes:
    """What comes out; the size that is told and what is left in the folder are checked."""
    source, path = folder / "source", folder / "image"
    source.write_bytes(packed)
    path.unlink(missing_ok=True)
    try:
        with source.open("rb") as opened:
            size = unwrap(opened.fileno(), wrapping, path, most_bytes, "image ubuntu", progress, warn)
    except BaseException:
        assert os.listdir(folder) == ["source"], "nothing is left of what failed"
        raise
    assert sorted(os.listdir(folder)) == ["image", "source"]
    content = path.read_bytes()
    assert size == len(content)
    assert path.stat().st_mode & 0o777 == 0o600
    return content


@EACH
@pytest.mark.parametrize(
    "content",
    [b"x", bytes(1), NOISE, bytes(3 * MIB), bytes(HOLE) + b"x" * HOLE + bytes(5), NOISE + bytes(MIB) + NOISE],
    ids=["byte", "zero", "noise", "zeros", "mixed", "hole-inside"],
)
def test_what_was_packed_comes_out(tmp_path: Path, wrapping: Wrapping, content: bytes) -> None:
    steps: list[int] = []
    packed = PACK[wrapping](content)
    assert unpack(packed, wrapping, tmp_path, progress=steps.append) == content
    assert steps == sorted(steps)
    assert steps[-1] == len(packed)


@given(
    wrapping=st.sampled_from(list(PACK)),
    runs=st.lists(
        st.tuples(st.booleans(), st.sampled_from([1, 511, 4096, HOLE - 1, HOLE, HOLE + 1, MIB - 1, MIB, MIB + 1])),
        min_size=1,
        max_size=3,
    ),
)
@settings(max_examples=15)
def test_any_mixture_of_data_and_zeros_comes_out(
    tmp_path_factory: pytest.TempPathFactory, wrapping: Wrapping, runs: list[tuple[bool, int]]
) -> None:
    folder = tmp_path_factory.mktemp("mixture")
    content = b"".join(b"\x55" * length if data else bytes(length) for data, length in runs)
    assert unpack(PACK[wrapping](content), wrapping, folder) == content


@EACH
def test_zeros_are_holes(tmp_path: Path, wrapping: Wrapping) -> None:
    content = bytes(2 * MIB) + b"x" * HOLE + bytes(13 * MIB) + b"y" + bytes(MIB)
    assert unpack(PACK[wrapping](content), wrapping, tmp_path) == content
    assert (tmp_path / "image").stat().st_blocks * 512 <= 3 * HOLE


@pytest.mark.parametrize(
    ("wrapping", "packed"),
    [
        (Wrapping.GZIP, gzip.compress(NOISE, mtime=0) + gzip.compress(b"more", mtime=0) + gzip.compress(b"", mtime=0)),
        (Wrapping.XZ, lzma.compress(NOISE) + lzma.compress(b"more") + lzma.compress(b"")),
        (Wrapping.XZ, lzma.compress(NOISE) + bytes(4) + lzma.compress(b"more") + bytes(300_000)),
        (Wrapping.ZSTD, zstd(NOISE) + zstd(b"more") + zstd(b"")),
        # RFC 8878: a frame that names dictionary 0, which is none, and holds a block as it is.
        (Wrapping.ZSTD, zstd(NOISE) + bytes.fromhex("28b52ffd 21 00 04 210000") + b"more"),
        (Wrapping.ZSTD, zstd(NOISE, checked=True) + zstd_unsized(b"") + zstd_unsized(b"more")),
        (Wrapping.ZSTD, b"\x5a\x2a\x4d\x18\x03\0\0\0abc" + zstd(NOISE) + b"\x50\x2a\x4d\x18\0\0\0\0" + zstd(b"more")),
    ],
)
def test_several_members_are_one_image(tmp_path: Path, wrapping: Wrapping, packed: bytes) -> None:
    assert unpack(packed, wrapping, tmp_path) == NOISE + b"more"


@pytest.mark.parametrize(
    ("wrapping", "command"),
    [
        (Wrapping.GZIP, ("gzip", "-n1")),
        (Wrapping.XZ, ("xz", "-1", "--block-size=100000")),
        (Wrapping.ZSTD, ("zstd", "-q", "-1", "--long=27")),
    ],
)
def test_what_the_usual_programs_write_comes_out(tmp_path: Path, wrapping: Wrapping, command: tuple[str, ...]) -> None:
    content = NOISE + bytes(MIB)
    packed = subprocess.run([*command, "-c"], input=content, stdout=subprocess.PIPE, check=True).stdout
    assert unpack(packed, wrapping, tmp_path) == content


SMALL = NOISE[:60] + b"a" * 500


@pytest.mark.parametrize(
    ("wrapping", "packed"),
    [
        (Wrapping.GZIP, gzip.compress(SMALL, mtime=0)),
        (Wrapping.XZ, lzma.compress(SMALL)),
        (Wrapping.XZ, lzma.compress(SMALL, check=lzma.CHECK_NONE)),
        (Wrapping.ZSTD, zstd(SMALL)),
        (Wrapping.ZSTD, zstd(SMALL, checked=True)),
        (Wrapping.ZSTD, zstd_unsized(NOISE[:100])),
    ],
    ids=["gzip", "xz", "xz-unchecked", "zstd", "zstd-checked", "zstd-unsized"],
)
def test_a_stream_that_is_cut_anywhere_is_refused(tmp_path: Path, wrapping: Wrapping, packed: bytes) -> None:
    assert unpack(packed, wrapping, tmp_path)
    (tmp_path / "image").unlink()
    for length in range(1, len(packed)):
        with pytest.raises(InvalidArgument, match=rf"image ubuntu is refused: its {wrapping} stream ends before"):
            unpack(packed[:length], wrapping, tmp_path)


@pytest.mark.parametrize("where", [HOLE, 4 * HOLE - 1, 4 * HOLE, 4 * HOLE + 1, -1, -5])
@EACH
def test_a_large_stream_that_is_cut_is_refused(tmp_path: Path, wrapping: Wrapping, where: int) -> None:
    with pytest.raises(InvalidArgument, match=r"ends before its end"):
        unpack(PACK[wrapping](NOISE)[:where], wrapping, tmp_path)


@EACH
@pytest.mark.parametrize("rest", [b"\n", b"garbage", b"\x00", bytes(4), bytes(6), b"\x1f\x8c", NOISE])
@pytest.mark.parametrize("size", [10, 262_144 - 400])
def test_what_follows_the_end_is_refused(tmp_path: Path, wrapping: Wrapping, rest: bytes, size: int) -> None:
    packed = PACK[wrapping](NOISE[:size])
    if wrapping is Wrapping.XZ and rest == bytes(4):  # the padding that its format allows
        assert unpack(packed + rest, wrapping, tmp_path) == NOISE[:size]
        return
    if wrapping is Wrapping.GZIP:  # gzip(1) takes it, and tells what is no zeros
        told: list[str] = []
        assert unpack(packed + rest, wrapping, tmp_path, warn=told.append) == NOISE[:size]
        assert len(told) == bool(rest.strip(b"\0"))
        assert all("image ubuntu stands something else, which is left out" in sentence for sentence in told)
        return
    with pytest.raises(InvalidArgument, match=r"has something behind its end|ends before its end"):
        unpack(packed + rest, wrapping, tmp_path)


@pytest.mark.parametrize("rest", [b"\0\0more", b"\x1f\x8c", bytes(5) + gzip.compress(b"more", mtime=0)])
@pytest.mark.parametrize("short", range(-3, 4))
def test_what_follows_a_gzip_stream_is_what_gzip_takes_it_for(tmp_path: Path, rest: bytes, short: int) -> None:
    """Wherever the pieces end that are read, of 256 KiB."""
    stored = gzip.compress(NOISE[:200_000], 0, mtime=0)
    first = gzip.compress(NOISE[: 262_144 - len(stored) - 41 + short], 0, mtime=0)
    packed = stored + first
    assert len(packed + rest) > 262_144 - 30
    told: list[str] = []
    found = unpack(packed + rest, Wrapping.GZIP, tmp_path, warn=told.append)
    command = subprocess.run(["gzip", "-dc"], input=packed + rest, capture_output=True, check=False)
    assert (found, len(told)) == (command.stdout, command.returncode // 2)


@pytest.mark.parametrize("zeros", [1, 3, 5, 6])
def test_xz_padding_that_is_no_multiple_of_four_is_refused(tmp_path: Path, zeros: int) -> None:
    first = lzma.compress(b"one")
    for packed in (first + bytes(zeros), first + bytes(zeros) + lzma.compress(b"two")):
        with pytest.raises(InvalidArgument, match=r"has something behind its end"):
            unpack(packed, Wrapping.XZ, tmp_path)


@EACH
def test_damage_is_refused(tmp_path: Path, wrapping: Wrapping) -> None:
    packed = bytearray(zstd(NOISE, checked=True) if wrapping is Wrapping.ZSTD else PACK[wrapping](NOISE))
    packed[len(packed) // 2] ^= 0x10
    with pytest.raises(InvalidArgument, match=rf"its {wrapping} stream is damaged \(.*\); fetch or pack it again$"):
        unpack(bytes(packed), wrapping, tmp_path)


@EACH
def test_another_format_than_was_said_is_refused(tmp_path: Path, wrapping: Wrapping) -> None:
    with pytest.raises(InvalidArgument, match=rf"image ubuntu is refused: its {wrapping} stream"):
        unpack(bz2.compress(NOISE), wrapping, tmp_path)


@EACH
def test_a_bomb_is_refused_at_its_limit_and_one_byte_less_is_not(tmp_path: Path, wrapping: Wrapping) -> None:
    packed = PACK[wrapping](bytes(3 * MIB))
    with pytest.raises(InvalidArgument, match=rf"more than the {3 * MIB - 1} bytes that are allowed come out of it"):
        unpack(packed, wrapping, tmp_path, most_bytes=3 * MIB - 1)
    assert unpack(packed, wrapping, tmp_path, most_bytes=3 * MIB) == bytes(3 * MIB)


@EACH
def test_an_empty_image_is_refused(tmp_path: Path, wrapping: Wrapping) -> None:
    with pytest.raises(InvalidArgument, match=r"nothing is packed in it"):
        unpack(PACK[wrapping](b""), wrapping, tmp_path)


def zstd_bomb(size: int) -> bytes:
    """RFC 8878: blocks of a run, 4 bytes for 128 KiB each, the most that comes out of a byte."""
    runs = size // (128 << 10)
    block = (128 << 10) << 3 | 1 << 1
    return b"\x28\xb5\x2f\xfd\x00\x58" + (block.to_bytes(3, "little") + b"\0") * runs + b"\x01\0\0"


BOMBS: dict[Wrapping, Callable[[int], bytes]] = {
    Wrapping.GZIP: lambda size: gzip.compress(bytes(size), 1, mtime=0),
    Wrapping.XZ: lambda size: lzma.compress(bytes(size), preset=0),
    Wrapping.ZSTD: zstd_bomb,
}


@EACH
def test_memory_does_not_grow_with_what_comes_out(tmp_path: Path, wrapping: Wrapping) -> None:
    (tmp_path / "bomb").write_bytes(BOMBS[wrapping](24 * MIB))
    with (tmp_path / "bomb").open("rb") as bomb:
        tracemalloc.start()
        try:
            size = unwrap(bomb.fileno(), wrapping, tmp_path / "image", 24 * MIB, "bomb", lambda _: None)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert size == 24 * MIB
    assert (tmp_path / "image").stat().st_blocks == 0
    assert peak < 6 * MIB


@pytest.mark.parametrize(
    ("wrapping", "command"),
    [(Wrapping.ZSTD, ("zstd", "-q", "--long=30")), (Wrapping.XZ, ("xz", "--lzma2=preset=0,dict=256MiB"))],
)
def test_a_window_that_takes_too_much_memory_is_refused(
    tmp_path: Path, wrapping: Wrapping, command: tuple[str, ...]
) -> None:
    packed = subprocess.run([*command, "-c"], input=SMALL, stdout=subprocess.PIPE, check=True).stdout
    with pytest.raises(InvalidArgument, match=r"takes more than the 128 MiB of memory that are allowed; pack it with"):
        unpack(packed, wrapping, tmp_path)


class Stopped(Exception):
    pass


@EACH
def test_progress_can_end_it(tmp_path: Path, wrapping: Wrapping) -> None:
    def stop(_done: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        unpack(PACK[wrapping](NOISE), wrapping, tmp_path, progress=stop)


def test_a_source_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(DeviceUnreadable, match=r"image ubuntu could not be read at byte 0: Is a directory"):
            unwrap(descriptor, Wrapping.ZSTD, tmp_path / "image", MIB, "image ubuntu", lambda _: None)
    finally:
        os.close(descriptor)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "source").write_bytes(gzip.compress(NOISE, 1, mtime=0))
    unpacking = """
import os, sys
from pathlib import Path
from csi_driver.images.formats import Wrapping
from csi_driver.images.unwrap import unwrap
from csi_driver.model.errors import ResourceExhausted
try:
    unwrap(os.open(sys.argv[1], os.O_RDONLY), Wrapping.GZIP, Path("a"), 1 << 30, "image ubuntu", lambda _: None)
except ResourceExhausted as error:
    print(error, os.listdir())
"""
    assert in_a_small_folder(tmp_path / "small", unpacking, str(tmp_path / "source")) == (
        "no space is left to unpack image ubuntu to a; make room []\n"
    )


def test_a_target_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(gzip.compress(b"x", mtime=0))
    with (tmp_path / "source").open("rb") as source:
        with pytest.raises(CommandFailed, match=r"could not be unpacked to .*: No such file or directory"):
            unwrap(source.fileno(), Wrapping.GZIP, tmp_path / "absent" / "image", MIB, "image ubuntu", lambda _: None)
        (tmp_path / "image").mkdir()
        with pytest.raises(CommandFailed, match=r"could not be unpacked to .*: Is a directory"):
            unwrap(source.fileno(), Wrapping.GZIP, tmp_path / "image", MIB, "image ubuntu", lambda _: None)
    assert sorted(os.listdir(tmp_path)) == ["image", "source"]
