"""Durable files: whole or not at all, and in the order that survives a power cut."""

import errno
import os
import stat
from pathlib import Path

import pytest

from csi_driver.host.files import Files


class Watched(Files):
    """Notes what is synced when, with what the names meant at that moment."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def sync_folder(self, folder: Path) -> None:
        self.seen.append((f"sync {folder.name}", ",".join(sorted(os.listdir(folder)))))
        super().sync_folder(folder)

    def fill(self, path: Path, content: bytes, *, durable: bool) -> None:
        super().fill(path, content, durable=durable)
        self.seen.append((f"filled{' durably' if durable else ''}", ",".join(sorted(os.listdir(path.parent)))))


class Full(Files):
    """A disk that is full in the middle of a write."""

    def fill(self, path: Path, content: bytes, *, durable: bool) -> None:
        super().fill(path, content[:3], durable=durable)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_content_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for content in (b"first", b"", b"x" * (3 << 20), b"short"):
        Files().write(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["record.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_reader_that_has_the_old_file_keeps_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    Files().write(path, b"old")
    with path.open("rb") as reader:
        Files().write(path, b"newer and longer")
        assert reader.read() == b"old"


def test_a_durable_write_fills_aside_then_renames_then_syncs_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "pvc-1"
    folder.mkdir()
    files = Watched()
    files.write(folder / "record.json", b"content")
    assert files.seen == [("filled durably", ".record.json.new"), ("sync pvc-1", "record.json")]


def test_a_volatile_write_syncs_nothing(tmp_path: Path) -> None:
    files = Watched()
    files.write_volatile(tmp_path / "stage", b"content")
    assert files.seen == [("filled", ".stage.new")]
    assert (tmp_path / "stage").read_bytes() == b"content"


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "record.json"
    if before is not None:
        path.write_bytes(before)
    for write in (Full().write, Full().write_volatile):
        with pytest.raises(OSError, match=r"No space left"):
            write(path, b"newer")
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == (
        {} if before is None else {"record.json": before}
    )


def test_what_a_killed_write_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".record.json.new").write_bytes(b"half a rec" * 100)
    Files().write(tmp_path / "record.json", b"whole")
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"record.json": b"whole"}


def test_a_rename_is_durable_in_both_folders(tmp_path: Path) -> None:
    for name in ("new", "volumes"):
        (tmp_path / name).mkdir()
    (tmp_path / "new" / "pvc-1").mkdir()
    files = Watched()
    files.rename(tmp_path / "new" / "pvc-1", tmp_path / "volumes" / "pvc-1")
    assert files.seen == [("sync volumes", "pvc-1"), ("sync new", "")]
    files.rename(tmp_path / "volumes" / "pvc-1", tmp_path / "volumes" / "pvc-2")
    assert files.seen[2:] == [("sync volumes", "pvc-2")]


def test_a_folder_of_files_is_removed_and_that_made_durable(tmp_path: Path) -> None:
    folder = tmp_path / "trash" / "pvc-1"
    folder.mkdir(parents=True)
    for name in ("disk.img", "record.json", ".record.json.new"):
        (folder / name).write_bytes(b"x")
    files = Watched()
    files.remove_folder(folder)
    files.remove_folder(folder)
    assert files.seen == [("sync trash", "")]


def test_a_folder_that_holds_a_folder_is_not_ours_to_remove(tmp_path: Path) -> None:
    inner = tmp_path / "pvc-1" / "precious"
    inner.mkdir(parents=True)
    (inner / "data").write_bytes(b"x")
    with pytest.raises(OSError, match=r"directory|permitted"):
        Files().remove_folder(tmp_path / "pvc-1")
    assert (inner / "data").read_bytes() == b"x"


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"x")
    folder = tmp_path / "pvc-1"
    folder.mkdir()
    (folder / "disk.img").symlink_to(target)
    Files().remove_folder(folder)
    assert target.read_bytes() == b"x"


def test_removing_what_is_absent_is_fine(tmp_path: Path) -> None:
    Files().remove(tmp_path / "absent")
    Files().remove_folder(tmp_path / "absent")


def test_a_file_gets_its_size_as_a_hole(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    Files().set_size(path, 1 << 40, new=True)
    assert (path.stat().st_size, path.stat().st_blocks) == (1 << 40, 0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        Files().set_size(path, 1, new=True)
    with pytest.raises(FileNotFoundError):
        Files().set_size(tmp_path / "absent", 1)
    with path.open("r+b") as file:
        file.write(b"data")
    Files().set_size(path, 1 << 41)
    assert path.stat().st_size == 1 << 41
    with path.open("rb") as file:
        assert file.read(8) == b"data\0\0\0\0"


def test_a_folder_is_for_its_owner_only(tmp_path: Path) -> None:
    Files().make_folder(tmp_path / "pvc-1")
    assert stat.S_IMODE((tmp_path / "pvc-1").stat().st_mode) == 0o700
    with pytest.raises(FileExistsError):
        Files().make_folder(tmp_path / "pvc-1")


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was fsynced, by its name at that moment, and what it held: a file its bytes, a folder its names."""
    seen: list[tuple[str, str]] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        found = ",".join(sorted(os.listdir(path))) if path.is_dir() else str(path.stat().st_size)
        seen.append((path.name, found))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return seen


def test_what_is_durable_was_fsynced_and_what_is_volatile_was_not(
    tmp_path: Path, synced: list[tuple[str, str]]
) -> None:
    """A power cut behind a call: without this an empty record, or none, is found where one was said to be written."""
    folder = tmp_path / "pvc-1"
    folder.mkdir()
    files, record, disk = Files(), folder / "record.json", folder / "disk.img"
    files.write_volatile(record, b"volatile")
    assert synced == []
    files.write(record, b"content")
    assert synced == [(".record.json.new", "7"), ("pvc-1", "record.json")]
    synced.clear()
    files.set_size(disk, 8192, new=True)
    assert synced == [("disk.img", "8192")]
    synced.clear()
    files.set_size(disk, 16384)
    assert synced == [("disk.img", "16384")]
    synced.clear()
    files.rename(folder, tmp_path / "pvc-2")
    assert synced == [(tmp_path.name, "pvc-2")]


def test_what_was_overwritten_is_gone_from_the_disk(tmp_path: Path, synced: list[tuple[str, str]]) -> None:
    """The key slots of a class with `eraseOnDelete`: in the page cache alone they would be unlinked unwritten."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"k" * 8192)
    Files().overwrite(path, 4096)
    assert synced == [("disk.img", "8192")]
    assert b"k" * 64 not in path.read_bytes()[:4096]
    assert path.read_bytes()[4096:] == b"k" * 4096


def test_a_second_name_takes_the_place_of_another_file_and_is_durable(
    tmp_path: Path, synced: list[tuple[str, str]]
) -> None:
    for name in ("made", "file"):
        (tmp_path / name).write_text(name)
    Files().link(tmp_path / "made", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "made"
    assert synced == [(tmp_path.name, "file,made")]


def test_a_write_that_the_kernel_cuts_short_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """write(2): a signal, or the last block of a disk."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, bytes(content)[:3]))
    Files().write(tmp_path / "record.json", b"whole content")
    assert (tmp_path / "record.json").read_bytes() == b"whole content"


def test_a_removal_takes_the_file_last_by_which_it_is_told_whose_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "image"
    folder.mkdir()
    for name in ("a", "owner", "z"):
        (folder / name).write_bytes(b"x")
    gone: list[str] = []

    def remove(_: Files, path: Path) -> None:
        gone.append(path.name)
        path.unlink()

    monkeypatch.setattr(Files, "remove", remove)
    Files().remove_folder(folder, last="owner")
    assert sorted(gone) == ["a", "owner", "z"]
    assert gone[-1] == "owner"
