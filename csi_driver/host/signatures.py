"""Names for what lies on a device: enough to tell a person what was found, never a reason to write."""

import os
from typing import Final

from csi_driver.host.blockdev import read_at
from csi_driver.model.errors import DeviceUnreadable

HEAD_BYTES: Final = 128 * 1024
"""How much of the start of a device `name_of` wants to see."""

_MAGICS: Final = (
    (0, b"LUKS\xba\xbe\x00\x01", "LUKS1"),
    (0, b"LUKS\xba\xbe\x00\x02", "LUKS2"),
    (0x438, b"\x53\xef", "ext4"),
    (0, b"XFSB", "xfs"),
    (0x10040, b"_BHRfS_M", "btrfs"),
    (512, b"LABELONE", "LVM2 physical volume"),
    (4096 - 10, b"SWAPSPACE2", "swap"),
    (4096, b"\xfc\x4e\x2b\xa9", "Linux RAID"),
    (0, b"-FVE-FS-", "BitLocker"),
    (0, b"hsqs", "squashfs"),
    (0x8001, b"CD001", "iso9660"),
    (0, b"QFI\xfb", "qcow2 image"),
    (3, b"NTFS    ", "ntfs"),
    (512, b"EFI PART", "GPT partition table"),
    (4096, b"EFI PART", "GPT partition table"),
    (510, b"\x55\xaa", "MBR partition table"),
)


def name_of(head: bytes) -> str | None:
    """The name of the signature in the first HEAD_BYTES of a device; None for data without one that is known here."""
    for offset, magic, name in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return name
    return None


def read_signature(where: str, path: str | os.PathLike[str]) -> str | None:
    """Read the start of `path` and name what is there; `where` names volume and device in errors.

    Raises DeviceUnreadable.
    """
    try:
        with open(path, "rb", buffering=0) as device:
            return name_of(read_at(device.fileno(), 0, HEAD_BYTES))
    except OSError as error:
        raise DeviceUnreadable(
            f"{where} cannot be read ({error.strerror}); check the kernel log and the storage below it"
        ) from None
