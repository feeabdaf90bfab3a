"""Open mappings that are zombies, somebody else's, or on another device: closed or refused, never used.

Field problems 2 and 3. test_danger_selftest.py plants the bug "any mapping of that name will do".
"""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.host.devicemapper import Device, Target
from csi_driver.host.workers import Workers
from csi_driver.luks.device import dm_uuid
from csi_driver.model.errors import DeviceInUse, MappingMismatch
from csi_driver.model.volume import mapping_name
from tests.machine import disks
from tests.machine.block_backend import BlockBackend, FaultyDevice
from tests.machine.kernel import suspend
from tests.machine.node import DATA_OFFSET, MIB, PASSPHRASE, SIZE, VOLUME, Node
from tests.machine.places import only_of_files, skip_elsewhere
from tests.machine.processes import run

NAME = mapping_name(VOLUME)
SECTORS = SIZE // 512


def uuid_of(node: Node) -> str:
    identity = node.record().luks
    assert identity is not None
    return dm_uuid(NAME, identity.uuid)


def is_the_volumes_own(node: Node) -> None:
    """The volume is staged through a mapping of its own device, with its data."""
    mapping = node.open_mapping()
    assert mapping.uuid == uuid_of(node)
    assert node.presences.of(VOLUME, node.record()).is_complete
    assert node.read() == "precious"
    node.write("still writable")
    assert node.read() == "still writable"


def check_replaced(node: Node, zombie: Device) -> None:
    """A mapping that cannot be the volume's is closed and the volume opened anew."""
    node.stage()
    assert node.open_mapping().targets != zombie.targets
    is_the_volumes_own(node)
    node.unstage()


@pytest.mark.parametrize("target", ["error", "zero"])
def test_lh9385_a_zombie_mapping_without_a_device(used: Node, target: str) -> None:
    """`cryptsetup status` says "device: (null)": the table lost its device, the name and UUID are ours."""
    check_replaced(used, used.mapper.create(NAME, uuid_of(used), [Target(0, SECTORS, target, "")]))


def test_lh9385_a_mapping_without_a_table(used: Node) -> None:
    subprocess.run(
        ["dmsetup", "create", NAME, "--notable", "--uuid", uuid_of(used), "--noudevsync"],
        check=True, timeout=120, env={**os.environ, "DM_DISABLE_UDEV": "1"},
    )  # fmt: skip
    zombie = used.mapping()
    assert zombie is not None
    assert not zombie.targets
    check_replaced(used, zombie)


@contextlib.contextmanager
def vanishing_disk() -> Iterator[tuple[str, Path]]:
    """A SCSI disk of 64 MiB that can be pulled: its numbers, and the file that pulls it."""
    for module in ("sd_mod", "scsi_debug dev_size_mb=64"):
        subprocess.run(["modprobe", *module.split()], check=True, timeout=120)
    try:
        deadline = time.monotonic() + 10
        while not (found := [*Path("/sys/bus/pseudo/drivers/scsi_debug").glob("adapter*/host*/target*/*/block/*")]):
            assert time.monotonic() < deadline, "scsi_debug shows no disk"
            time.sleep(0.02)
        yield (found[0] / "dev").read_text().strip(), found[0] / "device/delete"
    finally:
        subprocess.run(["modprobe", "-r", "scsi_debug"], check=False, timeout=120, capture_output=True)
        subprocess.run(["rmmod", "scsi_debug"], check=False, timeout=120, capture_output=True)


def test_lh9403_the_device_below_an_open_mapping_is_gone(used: Node) -> None:
    """HC PR1364: mkfs ran 708 times against such a mapping."""
    with vanishing_disk() as (device, pull):
        table = f"aes-xts-plain64 {'00' * 64} 0 {device} {DATA_OFFSET // 512}"
        zombie = used.mapper.create(NAME, uuid_of(used), [Target(0, SECTORS, "crypt", table)])
        pull.write_text("1")
        assert not used.mappings.backings(zombie)
        check_replaced(used, zombie)


def open_copy(node: Node, folder: Path) -> None:
    """Open a byte for byte copy of the volume, LUKS UUID and all, under the volume's mapping name."""
    copy = disks.copy_of(node, folder / "copy.img")
    subprocess.run(
        ["cryptsetup", "open", "--key-file", "-", "--disable-keyring", str(copy), NAME],
        input=PASSPHRASE.encode(), check=True, timeout=120, env={**os.environ, "DM_DISABLE_UDEV": "1"},
    )  # fmt: skip


def test_csi_cloudscale153_the_mapping_lies_on_another_device(used: Node, folder: Path) -> None:
    """Same name, same LUKS UUID, same key: only the device below tells."""
    open_copy(used, folder)
    other = used.open_mapping()
    assert other.uuid == uuid_of(used)
    check_replaced(used, other)


def test_csi_cloudscale153_a_mapping_on_another_device_that_is_in_use_is_refused(used: Node, folder: Path) -> None:
    open_copy(used, folder)
    with open(f"/dev/mapper/{NAME}", "rb", buffering=0):
        words = rf"old mapping of volume {VOLUME} cannot be used.*in use.*process {os.getpid()} \("
        with pytest.raises(DeviceInUse, match=words):
            used.stage()
        assert not used.is_mounted()
        assert not disks.is_in_use(used)
    used.stage()
    is_the_volumes_own(used)
    used.unstage()


@pytest.mark.parametrize("uuid", ["", "LVM-abcdef", "CRYPT-LUKS2-00000000000000000000000000000000-other"])
def test_scaleway41_a_foreign_device_has_the_mappings_name(used: Node, uuid: str) -> None:
    """Not ours to close: refused, and left as it is."""
    foreign = used.mapper.create(NAME, uuid, [Target(0, SECTORS, "zero", "")])
    with pytest.raises(MappingMismatch, match=rf"/dev/mapper/{NAME} has the UUID .* not opened by this driver"):
        used.stage()
    used.unstage()
    assert used.mapping() == foreign
    assert not disks.is_in_use(used)
    used.mapper.remove(NAME)
    used.stage()
    used.unstage()


def test_scaleway41_a_foreign_device_before_the_first_format(node: Node) -> None:
    node.create()
    foreign = node.mapper.create(NAME, "LVM-abcdef", [Target(0, SECTORS, "zero", "")])
    with pytest.raises(MappingMismatch, match=re.escape(NAME)):
        node.stage()
    assert node.mapping() == foreign
    node.mapper.remove(NAME)
    node.stage()
    node.unstage()


def test_lh9385_the_mapping_of_a_deleted_volume_of_the_same_name_is_closed(used: Node, folder: Path) -> None:
    """A new volume pvc-1 must not get the open mapping of the old one."""
    open_copy(used, folder)
    used.delete()
    used.create()
    used.stage()
    assert used.presences.of(VOLUME, used.record()).is_complete
    assert not (used.staging_path() / "file").exists()
    used.unstage()


def test_lh9403_a_mapping_that_nobody_uses_is_opened_anew(used: Node) -> None:
    """A server that died between open and mount left it; the next stage does not trust it."""
    used.stage()
    subprocess.run(["umount", used.staging_path()], check=True, timeout=120)
    used.stage()
    is_the_volumes_own(used)
    used.unstage()


def test_lh9385_a_staged_volume_whose_mapping_became_a_zombie(used: Node) -> None:
    """The mount is there and dead: staging again does not answer "done", it mends."""
    used.stage()
    used.mapper.reload(NAME, [Target(0, SECTORS, "error", "")])
    used.stage()
    is_the_volumes_own(used)
    used.unstage()


def test_lh11510_a_suspended_mapping_is_resumed_by_the_next_stage(used: Node) -> None:
    """A tool that was killed left it suspended: every write of the pod would hang for good."""
    used.stage()
    suspend(NAME)
    used.stage()
    assert not used.open_mapping().suspended
    is_the_volumes_own(used)
    used.unstage()


def test_lh11510_a_suspended_zombie_is_closed(used: Node) -> None:
    zombie = used.mapper.create(NAME, uuid_of(used), [Target(0, SECTORS, "error", "")])
    suspend(NAME, noflush=True)
    check_replaced(used, zombie)


def test_lh11510_unstage_resumes_a_suspended_mapping(used: Node) -> None:
    used.stage()
    used.write("precious")
    suspend(NAME)
    used.unstage()
    assert used.closed()
    used.stage()
    assert used.read() == "precious"
    used.unstage()


def test_a_complete_stage_is_repeated_without_the_key(used: Node) -> None:
    used.stage()
    used.stage(secret={})
    used.stage(secret={"CRYPTO_KEY_VALUE": "wrong"})
    used.unstage()


def test_a_device_that_somebody_else_has_mapped_is_refused_and_he_is_named(folder: Path, workers: Workers) -> None:
    """Device-mapper lays a second mapping over it all the same, and two file systems would write to one device."""
    skip_elsewhere("own disk")
    disk = FaultyDevice(folder / "disk", SIZE + DATA_OFFSET)
    try:
        node = Node(folder, workers, backend=BlockBackend({VOLUME: disk.path}))
        node.staged_once()
        command = ["cryptsetup", "open", "--key-file", "-", disk.path, "second"]
        subprocess.run(command, input=PASSPHRASE.encode(), check=True, timeout=120)
        try:
            with pytest.raises(DeviceInUse, match=rf"volume {VOLUME} on .* is open as /dev/mapper/second too"):
                node.stage()
            assert node.closed()
        finally:
            run("cryptsetup", "close", "second")
        node.stage()
        is_the_volumes_own(node)
        node.unstage()
    finally:
        disk.close()


@only_of_files("files")
def test_two_mappings_of_one_file_cannot_be(used: Node) -> None:
    """Loop does not stop a file from being bound twice. While it is staged the file system does, and then the look at
    what is bound already.
    """
    used.stage()
    assert len(used.loops_of()) == 1
    bind = ["losetup", "--find", "--show", str(used.disk())]
    for open_it in (bind, ["cryptsetup", "open", "--key-file", "-", str(used.disk()), "second"]):
        refused = subprocess.run(open_it, check=False, input=PASSPHRASE.encode(), capture_output=True, timeout=120)
        assert refused.returncode == 1, refused
    assert len(used.loops_of()) == 1
    used.unstage()
    foreign = subprocess.run(bind, check=True, capture_output=True, text=True, timeout=120).stdout.strip()
    try:
        with pytest.raises(DeviceInUse, match=rf"bound to {foreign} by somebody else"):
            used.stage()
    finally:
        subprocess.run(["losetup", "-d", foreign], check=True, timeout=120)
    used.stage()
    is_the_volumes_own(used)
    used.unstage()


def test_a_size_of_the_mapper_is_the_capacity(used: Node) -> None:
    """LH#9205: the 16 MiB of the header are the backend's, not the pod's."""
    used.stage()
    assert used.open_mapping().size_bytes == SIZE == used.record().capacity_bytes
    assert used.disk_bytes() == used.rounded(SIZE + DATA_OFFSET) == SIZE + 16 * MIB
    used.unstage()
