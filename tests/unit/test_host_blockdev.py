import os
import stat
from pathlib import Path

import pytest

from csi_driver.host import blockdev
from csi_driver.host.syscalls import check, libc, syscall
from csi_driver.model.errors import DeviceAbsent, DeviceMismatch

CALLS = [blockdev.device_number, blockdev.size_bytes]


@pytest.mark.parametrize("call", CALLS)
def test_an_absent_device_is_named(call: type, tmp_path: Path) -> None:
    with pytest.raises(DeviceAbsent, match="absent is not there"):
        call(str(tmp_path / "absent"))
    (tmp_path / "file").touch()
    with pytest.raises(DeviceAbsent):
        call(str(tmp_path / "file" / "below"))


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_block_device_is_refused(call: type, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    for path, kind in (
        (tmp_path / "file", "regular file"),
        (tmp_path, "directory"),
        (tmp_path / "fifo", "FIFO"),
        (Path("/dev/null"), "character device"),
    ):
        with pytest.raises(DeviceMismatch, match=f"is expected to be a block device and is a {kind}"):
            call(str(path))


def test_an_open_file_is_no_block_device_either(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, pytest.raises(DeviceMismatch, match="something else"):
        blockdev.size_bytes(file.fileno())


def test_a_node_is_known_by_kind_and_number(tmp_path: Path) -> None:
    assert not blockdev.is_node_of(str(tmp_path), (7, 0))
    assert not blockdev.is_node_of(str(tmp_path / "absent"), (7, 0))
    assert not blockdev.is_node_of("/dev/null", (1, 3)), "a character device"


def test_kinds_have_names() -> None:
    assert blockdev.kind(stat.S_IFLNK | 0o777) == "symbolic link"
    assert blockdev.kind(0) == "file of unknown type"


def test_a_failed_call_carries_errno_and_its_name() -> None:
    with pytest.raises(FileNotFoundError, match="umount2: No such file"):
        check(libc.umount2(b"/absent", 0), "umount2")
    with pytest.raises(FileNotFoundError, match="open_tree"):
        syscall("open_tree", -100, b"/absent", 0)
