"""Mounts by path, for tests that have one."""

import os
import subprocess

from csi_driver.host.handle import Handle
from csi_driver.host.mounts import Mounts


def handle_on(path: str | os.PathLike[str]) -> Handle:
    """A handle on what lies at `path`, links followed; for reading where it is a device, else for its place only."""
    flags = os.O_PATH if os.path.isdir(path) else os.O_RDONLY
    return Handle(os.open(path, flags | os.O_CLOEXEC), os.fspath(path))


def mount_path(mounts: Mounts, source: str, target: str, fs_type: str, flags: int = 0, data: str = "") -> None:
    """Mount the device at that path."""
    with handle_on(source) as device:
        mounts.mount(device, target, fs_type, flags, data)


def bind_path(mounts: Mounts, source: str, target: str, *, read_only: bool = False) -> None:
    """Bind-mount the file or folder at that path."""
    with handle_on(source) as shown:
        mounts.bind(shown, target, read_only=read_only)


def mount_tmpfs(target: str | os.PathLike[str], options: str = "size=50%") -> None:
    """A tmpfs there."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", target], check=True)
