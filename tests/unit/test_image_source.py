"""RawReader on real files: holes, ends, and files that are none."""

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from csi_driver.images.base import MIB, Extent
from csi_driver.images.source import RawReader, Way, WayChoice
from csi_driver.model.errors import DeviceUnreadable, InvalidArgument

WHERE = "image a"


def read(reader: RawReader, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    reader.read_into(offset, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 4097, MIB - 1, MIB + 1])
def test_every_byte_of_any_size_is_in_an_extent_and_reads_back(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    path = tmp_path / "raw"
    path.write_bytes(content)
    reader = RawReader(str(path), WHERE)
    assert reader.size == size
    assert list(reader.extents()) == ([Extent(0, size, zero=False)] if size else [])
    assert read(reader, 0, size) == content
    assert read(reader, size // 2, size - size // 2) == content[size // 2 :]
    reader.close()


def test_holes_are_extents_of_zeros(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.seek(MIB)
        file.write(b"x" * MIB)
        file.truncate(10 << 30)
    reader = RawReader(str(path), WHERE)
    assert list(reader.extents()) == [
        Extent(0, MIB, zero=True),
        Extent(MIB, MIB, zero=False),
        Extent(2 * MIB, (10 << 30) - 2 * MIB, zero=True),
    ]
    assert read(reader, 2 * MIB - 1, 2) == b"x\0"
    reader.close()


def test_a_file_of_nothing_but_a_hole_is_one_extent(tmp_path: Path) -> None:
    path = tmp_path / "hole"
    path.touch()
    os.truncate(path, MIB + 1)
    reader = RawReader(str(path), WHERE)
    assert list(reader.extents()) == [Extent(0, MIB + 1, zero=True)]
    reader.close()


def test_a_file_that_was_cut_meanwhile_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(b"x" * 8192)
    reader = RawReader(str(path), WHERE)
    os.truncate(path, 5000)
    with pytest.raises(DeviceUnreadable, match=r"image a cannot be read at byte 5000 of 8192: the file ends early"):
        read(reader, 0, 8192)
    reader.close()


def test_a_read_past_the_end_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x" * 10)
    reader = RawReader(str(path), WHERE)
    with pytest.raises(DeviceUnreadable, match="ends early"):
        read(reader, 5, 6)
    reader.close()


def test_what_was_read_leaves_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "cached"
    with path.open("wb") as file:
        file.write(os.urandom(4 * MIB))
        os.fsync(file.fileno())
    if resident(path) == 0:
        pytest.skip("this file system keeps no pages")
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reader = RawReader(str(path), WHERE)
    for offset, length in ((0, 4 * MIB), (1, 4 * MIB - 2)):  # by whole blocks past the cache, or through it
        read(reader, offset, length)
        assert resident(path) <= 2  # pages that are only partly read stay (posix_fadvise(2))
    reader.close()


def test_an_open_descriptor_names_the_file_even_when_its_path_is_taken_by_another(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"first")
    with path.open("rb") as held:
        path.unlink()
        path.write_bytes(b"other")
        reader = RawReader(f"/proc/self/fd/{held.fileno()}", WHERE)
    assert read(reader, 0, 5) == b"first"
    reader.close()


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidArgument, match=r"image a is expected to be a regular file and is a FIFO"):
        RawReader(str(tmp_path / "fifo"), WHERE)


def test_a_folder_and_a_device_are_refused(tmp_path: Path) -> None:
    for path, name in ((str(tmp_path), "directory"), (os.devnull, "character device")):
        with pytest.raises(InvalidArgument, match=name):
            RawReader(path, WHERE)


def test_a_missing_file_is_named_with_its_cause(tmp_path: Path) -> None:
    with pytest.raises(DeviceUnreadable, match=r"the file of image a cannot be opened \(ENOENT"):
        RawReader(str(tmp_path / "none"), WHERE)


def test_closing_twice_is_fine_and_leaves_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(b"x")
    before = os.listdir("/proc/self/fd")
    reader = RawReader(str(path), WHERE)
    reader.close()
    reader.close()
    assert os.listdir("/proc/self/fd") == before
    with pytest.raises(DeviceUnreadable, match=errno.errorcode[errno.EBADF]):
        read(reader, 0, 1)


def resident(path: Path) -> int:
    """Pages of the file in the page cache, by mincore(2)."""
    from csi_driver.host.syscalls import check, libc

    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        import ctypes

        pages = (ctypes.c_char * (len(mapped) // mmap.PAGESIZE))()
        address = ctypes.c_char.from_buffer(mapped)
        check(libc.mincore(ctypes.byref(address), ctypes.c_size_t(len(mapped)), pages), "mincore")
        del address
    return sum(page[0] & 1 for page in (bytes(p) for p in pages))


def chosen_of(direct: float, cached: float) -> Way | None:
    """The choice between two ways that take so many seconds for each read of a MiB."""
    choice, taken = WayChoice(), []
    while choice.chosen is None:
        taken.append(choice.next())
        choice.tell(taken[-1], MIB, direct if taken[-1] is Way.DIRECT else cached)
    assert taken == [*[Way.DIRECT] * 8, *[Way.CACHED] * 8] * 2
    assert choice.next() is choice.chosen
    return choice.chosen


@pytest.mark.parametrize(("direct", "cached"), [(1.0, 0.95), (1.0, 1.0), (1.0, 2.0)])
def test_reads_go_past_the_page_cache_where_that_is_no_slower(direct: float, cached: float) -> None:
    assert chosen_of(direct, cached) is Way.DIRECT


def test_reads_go_through_the_page_cache_where_that_is_faster() -> None:
    assert chosen_of(direct=1.0, cached=0.8) is Way.CACHED


def test_a_read_counts_by_its_length() -> None:
    choice = WayChoice()
    for _ in range(16):
        choice.tell(Way.DIRECT, MIB, 1.0)
        choice.tell(Way.CACHED, 2 * MIB, 1.5)
    assert choice.chosen is Way.CACHED


def test_reads_that_are_begun_before_the_choice_is_made_go_past_the_page_cache() -> None:
    choice = WayChoice()
    taken = [choice.next() for _ in range(40)]
    assert taken[32:] == [Way.DIRECT] * 8
    assert choice.chosen is None


@pytest.mark.parametrize("way", Way)
def test_a_file_is_read_by_the_way_that_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Way) -> None:
    content = os.urandom(MIB)
    path = tmp_path / "raw"
    path.write_bytes(content)
    used, read = [], os.preadv

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        used.append(Way.DIRECT if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT else Way.CACHED)
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    reader = RawReader(str(path), WHERE)
    reader.choice.chosen = way
    buffer = memoryview(mmap.mmap(-1, MIB))
    reader.read_into(0, buffer)
    assert buffer == content
    assert used == [way]
    reader.close()
