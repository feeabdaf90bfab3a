import os
from collections.abc import Callable
from pathlib import Path

import pytest

from csi_driver.host.loop import LoopDevices
from csi_driver.model.errors import DeviceAbsent, DeviceMismatch

MAKE: dict[str, Callable[[Path], None]] = {
    "directory": Path.mkdir,
    "FIFO": os.mkfifo,
    "symbolic link": lambda path: path.symlink_to("target"),
}


@pytest.mark.parametrize("kind", MAKE)
def test_only_regular_files_are_bound(kind: str, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(bytes(512))
    MAKE[kind](tmp_path / "file")
    with pytest.raises(DeviceMismatch, match=f"file is expected to be a regular file and is a {kind}"):
        LoopDevices().attach(str(tmp_path / "file"), autoclear=True)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceAbsent, match="absent is not there"):
        LoopDevices().attach(str(tmp_path / "absent"), autoclear=True)
    assert LoopDevices().find(str(tmp_path / "absent")) == []


def test_a_loop_device_that_does_not_exist_is_not_bound() -> None:
    loops = LoopDevices()
    assert loops.info("/dev/loop1048000") is None
    loops.detach("/dev/loop1048000")
    with pytest.raises(DeviceAbsent, match="loop1048000"):
        loops.open("/dev/loop1048000")


def test_another_device_is_not_taken_for_a_loop_device() -> None:
    with pytest.raises(DeviceMismatch, match="/dev/null is expected to be a loop device"):
        LoopDevices().info("/dev/null")
