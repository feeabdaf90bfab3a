"""The udev of the machine that tests run on."""

import subprocess

from csi_driver.host.syscalls import udev_is_running


def udevadm(*arguments: str) -> str:
    """What it prints; CalledProcessError."""
    return subprocess.run(["udevadm", *arguments], check=True, timeout=620, capture_output=True, text=True).stdout


def settle() -> None:
    """Until udev has done all that it was told of; nothing where none runs."""
    if udev_is_running():
        udevadm("settle", "--timeout=600")
