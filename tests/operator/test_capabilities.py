"""The capabilities of the agent's container: by them qemu-nbd is locked up as a user of its own, and none is spare."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.operator.lab import DEPLOY, documents

_CAPABILITIES: Final[list[str]] = next(
    container["securityContext"]["capabilities"]["add"]
    for document in documents(DEPLOY / "images/node.yaml")
    for container in document["spec"]["template"]["spec"]["containers"]
)
_READS: Final = """
import contextlib, os, sys
from csi_driver.images.base import ImageFormat
from csi_driver.images.qemu import QemuReader

with contextlib.closing(QemuReader(sys.argv[1], ImageFormat.QCOW2, "image disk")) as reader:
    found = bytearray(reader.size)
    reader.read_into(0, memoryview(found))
    sys.stdout.write(f"{found == bytes(range(256)) * 4096} ")
    def status(process, word):
        return open(f"/proc/{process}/status").read().partition(word)[2].split()[0]

    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if status(process, "Name:") == "qemu-nbd" and status(status(process, "PPid:"), "PPid:") == str(os.getpid()):
                sys.stdout.write(status(process, "Uid:") + " ")
"""
_OF_ITS_OWN: Final = str(0x4C554B53)  # the sandbox's user


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("capabilities")
    (folder / "raw").write_bytes(bytes(range(256)) * 4096)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", folder / "raw", folder / "disk"], check=True)
    (folder / "disk").chmod(0o600)
    return folder / "disk"


def read(disk: Path, capabilities: list[str]) -> subprocess.CompletedProcess[str]:
    """The disk, by a process like the agent's: as root with these capabilities, and no way to others."""
    few = ",".join(["-all", *(f"+{each.lower()}" for each in capabilities)])
    within = ["setpriv", f"--bounding-set={few}", "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs"]
    argv = [*within, sys.executable, "-c", _READS, str(disk)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)


def test_with_what_the_manifest_gives_qemu_nbd_is_a_user_of_its_own(disk: Path) -> None:
    assert os.getuid() == 0
    done = read(disk, _CAPABILITIES)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["True", _OF_ITS_OWN]


@pytest.mark.parametrize("spare", _CAPABILITIES)
def test_each_capability_is_missed(disk: Path, spare: str) -> None:
    done = read(disk, [each for each in _CAPABILITIES if each != spare])
    assert done.stdout.split() != ["True", _OF_ITS_OWN], f"{spare} is spare"
