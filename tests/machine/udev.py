"""The udev of the machine that tests run on."""

import contextlib
import subprocess

from csi_driver.host.syscalls import udev_is_running

_LOOKS = 60


def udevadm(*arguments: str) -> str:
    """What it prints; CalledProcessError."""
    return subprocess.run(["udevadm", *arguments], check=True, timeout=120, capture_output=True, text=True).stdout


def settle() -> None:
    """Until udev has done all that it was told of; nothing where none runs. CalledProcessError."""
    if not udev_is_running():
        return
    # Once, on a busy machine, a call of ten minutes waited for a udevd that was idle: each new call speaks to it.
    for _ in range(_LOOKS - 1):
        with contextlib.suppress(subprocess.CalledProcessError):
            udevadm("settle", "--timeout=10")
            return
    udevadm("settle", "--timeout=10")
