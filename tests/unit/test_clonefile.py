"""Files copied with their holes, and a disk that is full."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from csi_driver.host.clonefile import FileIdentity, clone_file
from csi_driver.images.base import MIB
from tests.image_clones import make_source


def sparse(path: Path) -> bytes:
    """A file of pieces, holes and an odd end; its content."""
    with path.open("wb") as file:
        for at, piece in ((0, b"a" * 5000), (3 * MIB, b"b" * (MIB + 7)), (9 * MIB, b"c")):
            file.seek(at)
            file.write(piece)
        file.truncate(10 * MIB + 3)
    return path.read_bytes()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same file system", "another file system"])
@pytest.mark.parametrize("size", [16 * MIB, 10 * MIB + 3, 5 * MIB])
def test_a_file_is_copied_with_its_holes(tmp_path: Path, size: int, *, elsewhere: bool) -> None:
    content = sparse(tmp_path / "source").ljust(size, b"\0")[:size]
    with contextlib.ExitStack() as stack:
        target = tmp_path / "target"
        if elsewhere:
            target = Path("/dev/shm", f"luks-csi-{os.getpid()}-{tmp_path.name}")
            stack.callback(lambda: target.unlink(missing_ok=True))
        target.write_bytes(b"what was there before")
        clone_file("image x", FileIdentity.of(tmp_path / "source"), str(target), size)
        assert target.read_bytes() == content
        assert target.stat().st_blocks * 512 <= 2 * MIB


def test_a_full_disk_is_told_by_its_number(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", 2 * MIB)
    (tmp_path / "target").touch()
    script = (
        "import resource, signal, sys\n"
        "from csi_driver.host.clonefile import FileIdentity, clone_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try:\n"
        "    clone_file('image x', FileIdentity.of(sys.argv[1]), sys.argv[2], 2 << 20)\n"
        "except OSError as error:\n"
        "    print(error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, source, tmp_path / "target"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == str(errno.EFBIG)
