"""Bytes into a blank target: holes stay holes, and where one call ends makes no difference to the digest."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csi_driver.host.copying import PIECE, Stretch, copy, copy_file, look, stamp
from csi_driver.host.handle import Handle, open_handle
from csi_driver.model.errors import CommandFailed, DeviceShort

SIZE = 5 * PIECE + 1536


def made(path: Path, size: int = SIZE) -> Path:
    """A sparse file with content in the first piece, in the middle of the third, and at the very end."""
    with path.open("wb") as file:
        for at, content in ((0, b"begin"), (2 * PIECE + 8192, b"middle" * 1000), (size - 3, b"end")):
            file.seek(at)
            file.write(content)
    return path


def blank(path: Path, size: int = SIZE) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def copied(source: Path, target: Path, budget: int = 1 << 40) -> str:
    """Copy in as many calls as it takes; the digest."""
    done = Stretch(0, "", 0)
    with open_handle(str(source), os.O_RDONLY) as reading, open_handle(str(target), os.O_RDWR) as writing:
        while done.end < SIZE:
            done = copy(reading, writing, done.end, SIZE, done.digest, budget)
    return done.digest


def seen(path: Path, budget: int = 1 << 40) -> str:
    done = Stretch(0, "", 0)
    with open_handle(str(path), os.O_RDONLY) as reading:
        while done.end < SIZE:
            done = look(reading, done.end, SIZE, done.digest, budget)
    return done.digest


def test_what_is_copied_is_the_same_and_its_holes_are_holes(tmp_path: Path) -> None:
    source, target = made(tmp_path / "source"), blank(tmp_path / "target")
    digest = copied(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 <= 6 * 4096
    assert seen(target) == seen(source) == digest


def test_a_hole_costs_no_read(tmp_path: Path) -> None:
    source, target = made(tmp_path / "source"), blank(tmp_path / "target")
    with open_handle(str(source), os.O_RDONLY) as reading, open_handle(str(target), os.O_RDWR) as writing:
        assert copy(reading, writing, 0, SIZE, "", 1 << 40).read < 4 * PIECE
        assert copy(reading, writing, 3 * PIECE, SIZE, "", 1) == copy(reading, writing, 3 * PIECE, SIZE, "", PIECE)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6 * PIECE), st.integers(1, 6 * PIECE))
def test_where_a_call_ends_makes_no_difference(
    tmp_path_factory: pytest.TempPathFactory, budget: int, other: int
) -> None:
    folder = tmp_path_factory.mktemp("copy")
    source, target = made(folder / "source"), blank(folder / "target")
    assert copied(source, target, budget) == seen(target, other) == seen(source)
    assert target.read_bytes() == source.read_bytes()


def test_zeros_that_are_written_count_as_a_hole(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    full = tmp_path / "full"
    full.write_bytes(source.read_bytes())
    assert seen(full) == seen(source)


@pytest.mark.parametrize("at", [0, 2 * PIECE + 8192, SIZE - 3, PIECE, 4 * PIECE])
def test_each_other_byte_gives_another_digest(tmp_path: Path, at: int) -> None:
    source = made(tmp_path / "source")
    before = seen(source)
    with source.open("r+b") as file:
        file.seek(at)
        file.write(b"x")
    assert seen(source) != before


def test_the_same_content_at_another_place_gives_another_digest(tmp_path: Path) -> None:
    one, two = blank(tmp_path / "one"), blank(tmp_path / "two")
    for path, at in ((one, PIECE), (two, 2 * PIECE)):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"same")
    assert seen(one) != seen(two)


def test_a_source_that_ends_too_soon_is_told(tmp_path: Path) -> None:
    source, target = made(tmp_path / "source"), blank(tmp_path / "target")
    os.truncate(source, 2 * PIECE + 10_000)
    with pytest.raises(DeviceShort, match=rf"source is expected to have {SIZE} bytes and ends at"):
        copied(source, target)


def test_a_full_target_is_told() -> None:
    descriptor, source = os.open("/dev/full", os.O_RDWR), os.memfd_create("source")
    os.pwrite(source, b"content", 0)
    os.ftruncate(source, SIZE)
    told = pytest.raises(CommandFailed, match=r"/dev/full cannot be written \(.*[Nn][Oo].?[Ss][Pp]")
    with Handle(descriptor, "/dev/full") as full, Handle(source, "source") as reading, told:
        copy(reading, full, 0, SIZE, "", SIZE)


def test_a_file_is_copied_with_its_holes_over_what_a_cut_call_left(tmp_path: Path) -> None:
    source, target = made(tmp_path / "source"), tmp_path / "target"
    target.write_bytes(b"half" * 10_000_000)
    copy_file(str(source), str(target))
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 <= 6 * 4096


def test_a_write_changes_the_stamp(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    os.utime(source, ns=(1, 1))
    with open_handle(str(source), os.O_RDONLY) as reading:
        before = stamp(reading)
        assert stamp(reading) == before
        with source.open("r+b") as file:
            file.write(b"x")
        assert stamp(reading) != before
