"""A disk that is soon full."""

import subprocess
import sys
from pathlib import Path

import pytest


def in_a_small_folder(folder: Path, script: str, *arguments: str) -> str:
    """What Python prints that runs `script` in `folder`, a file system of 256 KiB there that nobody else sees."""
    mount = 'mount -t tmpfs -o size=256k none "$1" && cd "$1" && shift && exec "$@"'
    alone: list[str | Path] = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*alone, "mount", "-t", "tmpfs", "none", folder], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    command: list[str | Path] = [*alone, "sh", "-c", mount, "sh", folder, sys.executable, "-c", script, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
