"""The names in a folder: whatever comes or goes shows at once, though they are seldom read."""

import time
from pathlib import Path

from csi_driver.backends.listing import SortedNames

HOUR_NS = 3600 * 10**9


def in_an_hour() -> int:
    return time.time_ns() + HOUR_NS


def test_names_are_in_order_and_read_once_while_nothing_changes(tmp_path: Path) -> None:
    for name in ("b", "c", "a"):
        (tmp_path / name).mkdir()
    names = SortedNames(tmp_path, in_an_hour)
    first = names.read()
    assert first == ("a", "b", "c")
    (tmp_path / "a" / "file").touch()
    assert names.read() is first


def test_what_comes_goes_and_is_renamed_shows(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    aside = tmp_path.with_name("aside")
    names = SortedNames(tmp_path, in_an_hour)
    assert names.read() == ("kept",)
    time.sleep(0.05)  # more than a tick: an hour ahead the clock vouches for that
    (tmp_path / "made").mkdir()
    assert names.read() == ("kept", "made")
    time.sleep(0.05)
    (tmp_path / "made").rename(aside)
    assert names.read() == ("kept",)
    time.sleep(0.05)
    aside.rename(tmp_path / "put-back")
    assert names.read() == ("kept", "put-back")
    time.sleep(0.05)
    (tmp_path / "kept").rmdir()
    assert names.read() == ("put-back",)


def test_names_read_right_after_a_change_are_not_kept(tmp_path: Path) -> None:
    """The next change may come within the same tick and leave the same time."""
    (tmp_path / "a").mkdir()
    changed = tmp_path.stat().st_ctime_ns
    names = SortedNames(tmp_path, lambda: changed + 2 * 10**9)
    assert names.read() is not names.read()
    names = SortedNames(tmp_path)
    for number in range(200):
        (tmp_path / f"{number:03}").mkdir()
        assert len(names.read()) == number + 2


def test_a_folder_in_the_place_of_another_shows(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    names = SortedNames(folder, in_an_hour)
    assert names.read() == ("old",)
    folder.rename(tmp_path / "away")
    folder.mkdir()
    assert names.read() == ()


def test_a_folder_whose_time_lies_ahead_of_the_clock_is_read_each_time(tmp_path: Path) -> None:
    names = SortedNames(tmp_path, lambda: time.time_ns() - HOUR_NS)
    (tmp_path / "a").touch()
    assert names.read() == ("a",)
    (tmp_path / "b").touch()
    assert names.read() == ("a", "b")
