"""Which boot of the kernel this is: what is open, mounted or mapped belongs to one boot."""

from pathlib import Path
from typing import Final

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """The kernel's id of this boot (random(4))."""
    return _BOOT_ID.read_text().strip()
