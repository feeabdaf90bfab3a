"""How mkfs is called."""

import pytest

from csi_driver.volumes.filesystem import mkfs_command
from csi_driver.volumes.parameters import FILE_SYSTEMS, check_mkfs_options

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
