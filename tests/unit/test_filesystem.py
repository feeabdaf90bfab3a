"""How mkfs and e2fsck are called."""

import os
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import pytest

from csi_driver.host.commands import Commands, Completed
from csi_driver.host.handle import Handle
from csi_driver.host.mounts import Mounts
from csi_driver.host.workers import Workers
from csi_driver.model.settings import Limits
from csi_driver.model.volume import VolumeParameters, VolumeRecord
from csi_driver.volumes.filesystem import LEAST_BYTES, FileSystems, mkfs_command
from csi_driver.volumes.parameters import FILE_SYSTEMS, check_mkfs_options
from tests.fake_host import NoHolders
from tests.fake_kernel import P, R

DEVICE = "/dev/mapper/luks-pvc-1"


@pytest.mark.parametrize(
    ("fs_type", "options", "command"),
    [
        ("ext4", "", "mkfs.ext4 -q -F -m0 -E nodiscard,lazy_itable_init=1"),
        ("ext4", "-b 4096", "mkfs.ext4 -q -F -m0 -b 4096 -E nodiscard,lazy_itable_init=1"),
        (
            "ext4",
            "-E stride=4 -b 4096 -E stripe_width=8",
            "mkfs.ext4 -q -F -m0 -b 4096 -E nodiscard,lazy_itable_init=1,stride=4,stripe_width=8",
        ),
        ("xfs", "-d agcount=4", "mkfs.xfs -q -f -K -d agcount=4"),
        ("btrfs", "-d single", "mkfs.btrfs -q -f -K -d single"),
    ],
)
def test_options_of_the_class_stand_behind_the_drivers_own(fs_type: str, options: str, command: str) -> None:
    check_mkfs_options(fs_type, options.split())
    assert mkfs_command(fs_type, options.split()) == command.split()


@pytest.mark.parametrize("fs_type", FILE_SYSTEMS)
def test_nothing_takes_unwritten_blocks_for_zeros(fs_type: str) -> None:
    """What a fresh mapping has never written reads as noise."""
    said = " ".join(mkfs_command(fs_type, []))
    assert "assume_storage_prezeroed" not in said
    assert "lazy_journal_init" not in said


def _has_journal(file: Path) -> bool:
    """The bit of the superblock (ext4(5), Documentation/filesystems/ext4/super.rst)."""
    with file.open("rb") as disk:
        disk.seek(1024 + 0x5C)
        (compatible,) = struct.unpack("<I", disk.read(4))
    return bool(compatible & 4)


@pytest.mark.parametrize(
    "options",
    [
        "", "-b 1024", "-b 2048", "-b 4096", "-T ext3", "-T small", "-T huge", "-T largefile4",
        "-b 4096 -i 16384 -I 512", "-b 4096 -O bigalloc", "-b 4096 -O fast_commit", "-O ^resize_inode,sparse_super2",
        "-b 4096 -E packed_meta_blocks=1",
    ],
)  # fmt: skip
def test_the_smallest_ext4_has_a_journal(tmp_path: Path, options: str) -> None:
    """mke2fs leaves it out in fewer than 2048 blocks, says so and succeeds."""
    check_mkfs_options("ext4", options.split())
    for size in (LEAST_BYTES["ext4"], LEAST_BYTES["ext4"] + 4096):
        file = tmp_path / str(size)
        with file.open("wb") as disk:
            disk.truncate(size)
        subprocess.run([*mkfs_command("ext4", options.split()), str(file)], check=True, timeout=120)
        assert _has_journal(file)


def test_the_look_for_a_journal_sees_that_there_is_none(tmp_path: Path) -> None:
    file = tmp_path / "disk"
    with file.open("wb") as disk:
        disk.truncate(LEAST_BYTES["ext4"] - 4096)
    subprocess.run([*mkfs_command("ext4", ["-b", "4096"]), str(file)], check=True, timeout=120)
    assert not _has_journal(file)


class IdleWorkers(Workers):
    """Do nothing."""

    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return cast("R", None)


class TimedCommands(Commands):
    """Notes the time that programs have."""

    def __init__(self) -> None:
        super().__init__(Workers(()))
        self.seconds = 0.0

    def run(
        self, argv: Sequence[str | Handle], *, timeout: float, ok_codes: Sequence[int] = (0,), by_name: bool = False
    ) -> Completed:
        self.seconds = timeout
        return Completed(0, "", "")


@pytest.mark.parametrize(("tib", "seconds"), [(0, 300), (8, 300 + 8 * 1024)])
def test_a_check_has_more_time_on_a_larger_volume(tib: int, seconds: float) -> None:
    """What is killed at the limit begins anew at the next publish, for ever."""
    commands = TimedCommands()
    made = FileSystems(IdleWorkers(()), commands, Mounts(), NoHolders(), Limits())
    record = VolumeRecord(
        id="pvc-1", name="pvc-1", capacity_bytes=tib << 40, parameters=VolumeParameters(), created="now"
    )
    with Handle(os.open(os.devnull, os.O_RDONLY), "device") as device:
        made.mend_ext4(record, device)
    assert commands.seconds == seconds
