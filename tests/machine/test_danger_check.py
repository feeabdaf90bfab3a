"""`luks-csi volume check`: a closed volume's file system checked and mended, with no server and no name to know.

Before, an operator had to stage it as a block device and run e2fsck on a path that is gone when the stage ends
(deckhouse#3610); the advice of a failed mount named such a path.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from csi_driver.model.errors import FailedPrecondition
from csi_driver.volumes.capability import AccessMode, Capability
from tests.machine.node import BLOCK, CHEAP, EXT4, MIB, PASSPHRASE, SIZE, VOLUME, Node, fingerprint
from tests.machine.places import hide, not_on

CLI = str(Path(sys.executable).with_name("luks-csi"))
XFS = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="xfs")
BTRFS = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="btrfs")
KINDS = {"ext4": (EXT4, SIZE), "xfs": (XFS, 304 * MIB), "btrfs": (BTRFS, 256 * MIB)}
LARGE = 640 * MIB
"""From 512 MiB on, mke2fs chooses blocks of 4096 bytes, and this driver such sectors."""
PLAIN: dict[str, str] = {}

pytestmark = not_on("command", "csi")
encrypted_or_plain = pytest.mark.parametrize("parameters", [CHEAP, PLAIN], ids=["encrypted", "plain"])


def check(
    node: Node, *options: str, volume: str = VOLUME, passphrase: str = PASSPHRASE
) -> subprocess.CompletedProcess[str]:
    hide(volume)
    plain = volume == VOLUME and node.record().encryption is None  # for which a secret is refused
    secret = [] if plain else ["--passphrase-file", "-"]
    return subprocess.run(
        [CLI, "volume", "check", volume, "--state-dir", node.state, *secret, *options],
        input=passphrase, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def verdict(node: Node, *options: str) -> str:
    """What came of a check; its exit code says the same, and nothing is left open."""
    done = check(node, "-o", "json", *options)
    assert node.closed(), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (found["verdict"] == "damaged"), done.stderr
    assert found["volume_id"] == VOLUME
    assert "/proc/self/fd" not in found["said"]
    return str(found["verdict"])


def repair(node: Node) -> str:
    return verdict(node, "--repair", "--yes")


def made(node: Node, fs_type: str, parameters: dict[str, str], size: int | None = None) -> Capability:
    """A volume with a file in it, unstaged."""
    capability, least = KINDS[fs_type]
    node.create(size=size or least, parameters=parameters, capability=capability)
    node.stage(capability=capability)
    node.write()
    node.unstage()
    return capability


@contextmanager
def opened(node: Node) -> Iterator[Path]:
    """The device inside the volume, as a block volume shows it."""
    node.stage(capability=BLOCK)
    try:
        mapping = node.mapping()
        yield Path(mapping.path if mapping else node.plain_device())
    finally:
        node.unstage()


def overwrite(node: Node, at: int, content: bytes) -> None:
    with opened(node) as path, path.open("r+b", buffering=0) as device:
        os.pwrite(device.fileno(), content, at)
        os.fsync(device.fileno())


def raise_flag(node: Node) -> None:
    """As ext4 does when it finds itself damaged."""
    node.stage()
    mount = node.mounts.at(str(node.staging_path()))
    assert mount is not None
    name = Path(f"/sys/dev/block/{mount.device[0]}:{mount.device[1]}").resolve().name
    Path("/sys/fs/ext4", name, "trigger_fs_error").write_text("a test")
    node.unstage()


@pytest.mark.parametrize("fs_type", KINDS)
@encrypted_or_plain
def test_a_well_one_is_found_well_and_nothing_is_changed(node: Node, fs_type: str, parameters: dict[str, str]) -> None:
    capability = made(node, fs_type, parameters)
    before, record = fingerprint(node.disk()), node.record()
    assert verdict(node) == "well"
    assert fingerprint(node.disk()) == before
    assert node.record() == record
    assert repair(node) == "well"
    node.stage(capability=capability)
    assert node.read() == "precious"
    node.unstage()


@pytest.mark.parametrize("size", [SIZE, LARGE], ids=["blocks of 1024", "blocks of 4096"])
@encrypted_or_plain
def test_deckhouse3610_an_ext4_that_a_pod_cannot_have_any_more_is_mended(
    node: Node, parameters: dict[str, str], size: int
) -> None:
    made(node, "ext4", parameters, size)
    overwrite(node, 1024 + 0x3FC, bytes(4))  # the checksum of the superblock, ext4(5)
    raised = pytest.raises(FailedPrecondition, match=rf"volume check {VOLUME} --repair")
    with raised as refused:
        node.stage()
    assert "/dev/mapper" not in str(refused.value).partition(";")[2]
    assert verdict(node) == "damaged"
    with pytest.raises(FailedPrecondition):
        node.stage()
    assert repair(node) == "mended"
    assert verdict(node) == "well"
    node.stage()
    assert node.read() == "precious"
    node.unstage()


def test_democratic_csi392_the_error_flag_is_taken_away(node: Node) -> None:
    made(node, "ext4", dict(CHEAP))
    raise_flag(node)
    assert verdict(node) == "damaged"
    assert repair(node) == "mended"
    assert verdict(node) == "well"


@encrypted_or_plain
def test_an_xfs_is_mended_too(node: Node, parameters: dict[str, str]) -> None:
    capability = made(node, "xfs", parameters)
    with opened(node) as path:
        argv = ["xfs_db", "-x", "-c", "agf 0", "-c", "write -d freeblks 1", str(path)]
        subprocess.run(argv, check=True, timeout=120, capture_output=True)
    assert verdict(node) == "damaged"
    assert repair(node) == "mended"
    node.stage(capability=capability)
    assert node.read() == "precious"
    node.unstage()


@encrypted_or_plain
def test_one_in_use_is_left_alone(node: Node, parameters: dict[str, str]) -> None:
    made(node, "ext4", parameters)
    node.stage()
    target = node.publish()
    done = check(node, "--repair", "--yes")
    assert done.returncode == 1
    assert f"volume {VOLUME} is in use at" in done.stderr
    assert str(target) in done.stderr
    assert node.read() == "precious"
    node.unpublish()
    node.unstage()
    node.stage(capability=BLOCK)
    done = check(node)
    assert done.returncode == 1
    assert f"volume {VOLUME} is in use" in done.stderr
    node.unstage()
    with node.locks.hold(VOLUME):
        done = check(node)
    assert done.returncode == 1
    assert "still at work" in done.stderr
    assert verdict(node) == "well"


@encrypted_or_plain
def test_what_has_no_file_system_is_told_and_gets_none(node: Node, parameters: dict[str, str]) -> None:
    node.create(parameters=parameters)
    before, record = fingerprint(node.disk()), node.record()
    done = check(node, "--repair", "--yes")
    assert done.returncode == 1
    assert ("never staged" if parameters else "no file system yet") in done.stderr
    assert (fingerprint(node.disk()), node.record()) == (before, record)
    with opened(node) as path:
        path.write_bytes(b"")
    before = fingerprint(node.disk())
    done = check(node, "--repair", "--yes")
    assert done.returncode == 1
    assert "no file system that is known here" in done.stderr
    assert fingerprint(node.disk()) == before
    assert node.closed()


def test_a_file_system_that_a_pod_made_on_a_block_volume_is_checked(node: Node) -> None:
    node.create(capability=BLOCK)
    with opened(node) as path:
        subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True, timeout=120)
    assert verdict(node) == "well"


def test_a_wrong_secret_opens_nothing(node: Node) -> None:
    made(node, "ext4", dict(CHEAP))
    done = check(node, passphrase="wrong")
    assert done.returncode == 1
    assert "opens no key slot" in done.stderr
    assert node.closed()
    done = check(node, volume="unknown")
    assert done.returncode == 1
    assert "does not exist" in done.stderr


def test_without_a_yes_nothing_is_mended(node: Node) -> None:
    made(node, "ext4", dict(CHEAP))
    done = check(node, "--repair")
    assert done.returncode == 2
    assert "backup" in done.stderr


def test_a_stage_mends_what_needs_no_decision(node: Node) -> None:
    """As kubelet's own mounts do; so an enlargement goes well after the next stage."""
    made(node, "ext4", dict(CHEAP))
    raise_flag(node)
    node.stage()
    assert node.healing.healed() == 1
    assert node.read() == "precious"
    assert node.expand(2 * SIZE) == 2 * SIZE
    node.unstage()
    node.stage()
    assert node.healing.healed() == 1
    node.unstage()
