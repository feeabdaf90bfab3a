"""Devices that are absent, short, failing, blank or somebody else's: never formatted, never taken for new.

Field problems 1, 3 and 22, and the data-loss list. test_danger_selftest.py plants the bugs that these tests are for.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from csi_driver.host.loop import LoopDevices
from csi_driver.host.workers import Workers
from csi_driver.luks.blank import prove_blank, prove_payload_blank, prove_unwritten, written_spans
from csi_driver.model.errors import (
    DeviceAbsent,
    DeviceBlank,
    DeviceMismatch,
    DeviceShort,
    DeviceUnreadable,
    DriverError,
    FailedPrecondition,
    ForeignSignature,
    NotFound,
)
from csi_driver.model.volume import EncryptionState, FileSystemState
from tests.machine import disks
from tests.machine.block_backend import BlockBackend, FaultyDevice
from tests.machine.node import BLANK, DATA_OFFSET, MIB, SIZE, VOLUME, Node, fingerprint
from tests.machine.places import BACKEND, DEVICE, IN_GROUP, not_on, only_of_files, skip_elsewhere
from tests.machine.processes import run

PV_LABEL = b"LABELONE" + (1).to_bytes(8, "little")
GPT = b"EFI PART" + b"\0\0\1\0"
SIGNATURES = {
    "LVM2 physical volume": (512, PV_LABEL),
    "GPT partition table": (512, GPT),
    "LUKS1": (0, b"LUKS\xba\xbe\x00\x01"),
    "LUKS2": (0, b"LUKS\xba\xbe\x00\x02"),
    "swap": (4096 - 10, b"SWAPSPACE2"),
}


@pytest.fixture
def disk(folder: Path) -> Iterator[FaultyDevice]:
    skip_elsewhere("own disk")
    disk = FaultyDevice(folder / "disk", SIZE + DATA_OFFSET)
    yield disk
    disk.close()


@pytest.fixture
def faulty(folder: Path, workers: Workers, disk: FaultyDevice) -> Node:
    """A driver whose volume lies on a disk that can fail."""
    return Node(folder, workers, backend=BlockBackend({VOLUME: disk.path}))


def check_comes_back_blank(node: Node) -> None:
    """LH#10416: the storage of a volume with data is replaced by a blank one, then the right one returns."""
    if BACKEND != "csi":  # where a claim that is gone is its own error
        with disks.away(node), pytest.raises(DeviceAbsent, match=disks.GONE):
            node.stage()
    with disks.blank_instead(node):
        for _ in range(2):
            words = rf"volume {VOLUME} on {DEVICE}, found only zeros.*nothing was wri"
            with pytest.raises(DeviceBlank, match=words):
                node.stage()
        assert node.encryption_state() is EncryptionState.ENCRYPTED
        assert node.closed()
        assert fingerprint(node.disk()) == BLANK, "something was written to the blank device"
    node.stage()
    assert node.read() == "precious"
    node.unstage()


def test_lh10416_device_comes_back_blank(used: Node) -> None:
    check_comes_back_blank(used)


@not_on("below", "csi")
def test_lh10416_device_is_absent_before_the_first_stage(node: Node) -> None:
    node.create()
    disks.lose(node)
    with pytest.raises(DeviceAbsent):
        node.stage()
    assert node.encryption_state() is EncryptionState.PREPARED
    assert not node.disk().exists()


@only_of_files("files")
def test_hc1346_a_folder_or_a_link_in_place_of_the_device_is_refused(node: Node) -> None:
    node.create()
    real = node.disk().with_name("real")
    node.disk().rename(real)
    node.disk().symlink_to(real)
    with pytest.raises(DeviceMismatch, match="is a symbolic link"):
        node.stage()
    assert fingerprint(real) == BLANK
    node.disk().unlink()
    node.disk().mkdir()
    with pytest.raises(DeviceMismatch, match="is a directory"):
        node.stage()
    assert node.encryption_state() is EncryptionState.PREPARED


@not_on("below", "csi")
@pytest.mark.parametrize("length", disks.SHORTER)
def test_lh9205_a_short_device_is_never_formatted(node: Node, length: int) -> None:
    node.create()
    disks.shorten(node, length)
    with pytest.raises(DeviceShort, match=f"is {length} bytes long and {SIZE + DATA_OFFSET} are recorded"):
        node.stage()
    assert node.encryption_state() is EncryptionState.PREPARED
    assert node.closed()
    assert fingerprint(node.disk()) == BLANK


@not_on("below", "csi")
def test_lh9205_a_device_that_became_short_is_not_opened(used: Node) -> None:
    disks.shorten(used, disks.SHORTER[-1])
    with pytest.raises(DeviceShort):
        used.stage()
    assert used.closed()
    disks.lengthen(used, SIZE + DATA_OFFSET)
    used.stage()
    assert used.read() == "precious"
    used.unstage()


@pytest.mark.parametrize("at", [0, 8 * MIB, DATA_OFFSET, SIZE + DATA_OFFSET - 4096], ids=str)
def test_lh14042_read_errors_before_the_first_format(faulty: Node, disk: FaultyDevice, at: int) -> None:
    faulty.create()
    disk.fail(at, 4096)
    with pytest.raises(DeviceUnreadable, match=rf"volume {VOLUME} on .* cannot be read"):
        faulty.stage()
    assert faulty.encryption_state() is EncryptionState.PREPARED
    assert faulty.closed()
    disk.heal()
    assert fingerprint(disk.file) == BLANK, "something was written to a device that could not be read"
    faulty.stage()
    faulty.unstage()


def test_lh14042_read_errors_in_the_header_of_a_volume_with_data(faulty: Node, disk: FaultyDevice) -> None:
    faulty.staged_once()
    disk.fail(0, 64 * 1024)
    with pytest.raises(DeviceUnreadable, match="LUKS2 header of volume"):
        faulty.stage()
    assert faulty.encryption_state() is EncryptionState.ENCRYPTED
    assert faulty.closed()
    disk.heal()
    faulty.stage()
    assert faulty.read() == "precious"
    faulty.unstage()


def test_lh14042_read_errors_inside_never_end_in_mkfs(faulty: Node, disk: FaultyDevice) -> None:
    faulty.staged_once()
    disk.fail(DATA_OFFSET, 4 * MIB)
    with pytest.raises(FailedPrecondition) as refused:
        faulty.stage()
    assert "could not be mounted" in str(refused.value)
    assert faulty.file_system_state() is FileSystemState.MADE
    assert faulty.closed()
    disk.heal()
    faulty.stage()
    assert faulty.read() == "precious"
    faulty.unstage()


def test_lh14042_write_errors_while_formatting_end_in_an_error_and_a_later_call_mends_it(
    faulty: Node, disk: FaultyDevice
) -> None:
    faulty.create()
    disk.fail_writes()
    with pytest.raises(DriverError, match=f"volume {VOLUME} on"):
        faulty.stage()
    assert faulty.encryption_state() is EncryptionState.FORMATTING
    assert faulty.closed()
    disk.heal()
    faulty.stage()
    faulty.write()
    assert faulty.read() == "precious"
    faulty.unstage()


def test_lh13668_writes_that_are_acknowledged_and_lost_are_not_taken_for_a_format(
    faulty: Node, disk: FaultyDevice
) -> None:
    faulty.create()
    disk.drop_writes()
    with pytest.raises(DriverError):
        faulty.stage()
    assert faulty.encryption_state() is EncryptionState.FORMATTING
    assert faulty.closed()
    disk.heal()
    faulty.stage()
    faulty.unstage()


def test_lh13668_zeros_read_while_the_storage_is_degraded(faulty: Node, disk: FaultyDevice) -> None:
    faulty.staged_once()
    disk.read_as_zeros()
    with pytest.raises(DeviceBlank, match="nothing was written"):
        faulty.stage()
    assert faulty.encryption_state() is EncryptionState.ENCRYPTED
    disk.heal()
    faulty.stage()
    assert faulty.read() == "precious"
    faulty.unstage()


def test_lh13668_zeros_inside_are_never_given_a_new_file_system(used: Node) -> None:
    with used.disk().open("r+b") as file:
        file.seek(DATA_OFFSET)
        file.write(bytes(4 * MIB))
    before = fingerprint(used.disk())
    with pytest.raises(FailedPrecondition, match="could not be mounted"):
        used.stage()
    assert used.file_system_state() is FileSystemState.MADE
    assert used.closed()
    assert fingerprint(used.disk()) == before


def check_foreign_signature(node: Node, name: str, offset: int, magic: bytes) -> None:
    """Somebody's data lies where a new volume should be."""
    node.create()
    with node.disk().open("r+b") as file:
        file.seek(offset)
        file.write(magic)
    before = fingerprint(node.disk())
    with pytest.raises(ForeignSignature, match=f"holds a {name} signature; nothing was written"):
        node.stage()
    assert fingerprint(node.disk()) == before, "somebody's data was overwritten"
    assert node.encryption_state() is EncryptionState.PREPARED
    assert node.closed()


@pytest.mark.parametrize("name", SIGNATURES)
def test_hc1346_a_foreign_signature_before_the_first_format(node: Node, name: str) -> None:
    check_foreign_signature(node, name, *SIGNATURES[name])


@pytest.mark.parametrize(("fs_type", "size"), [("ext4", SIZE), ("xfs", 320 * MIB), ("btrfs", 256 * MIB)])
def test_csi_driver_lvm140_a_file_system_before_the_first_format(node: Node, fs_type: str, size: int) -> None:
    node.create(size=size)
    force = "-F" if fs_type == "ext4" else "-f"
    subprocess.run([f"mkfs.{fs_type}", "-q", force, node.disk()], check=True, capture_output=True, timeout=120)
    with pytest.raises(ForeignSignature, match=f"holds a {fs_type} signature"):
        node.stage()
    assert node.encryption_state() is EncryptionState.PREPARED
    assert node.closed()


def test_a_disk_that_cannot_say_what_was_written_is_no_proof(disk: FaultyDevice, folder: Path) -> None:
    """An error of lseek(2) was taken for a file system without SEEK_DATA, where samples have to do."""
    mount_point, storage = folder / "mount", folder / "mount" / "storage"
    mount_point.mkdir()
    run("mkfs.ext4", "-q", "-b", "4096", disk.path)
    run("mount", disk.path, mount_point)
    with storage.open("wb") as file:  # more pieces than the inode can name: the rest is told by a block of its own
        for piece in range(64):
            os.pwrite(file.fileno(), b"x", piece * 64 * 1024)
        os.ftruncate(file.fileno(), 8 * MIB)
    run("umount", mount_point)
    run("mount", "-o", "ro", disk.path, mount_point)
    try:
        assert storage.stat().st_size == 8 * MIB
        disk.fail(0, SIZE + DATA_OFFSET)
        with pytest.raises(DeviceUnreadable, match=rf"^{storage} cannot be asked what was ever written to it \(Input"):
            written_spans(storage, 0, 8 * MIB)
        disk.heal()
        spans = written_spans(storage, 0, 8 * MIB)
        assert spans is not None
        assert len(spans) == 64
    finally:
        run("umount", mount_point)


def test_a_stage_that_failed_leaves_the_file_as_free_as_it_was(node: Node) -> None:
    """The administrator who was told of it has to be able to put it right."""
    node.create()
    with node.disk().open("r+b") as file:
        file.write(b"diary")
    with pytest.raises(ForeignSignature):
        node.stage()
    with node.disk().open("r+b") as file:
        file.write(bytes(5))
    node.stage()
    node.unstage()


@pytest.mark.parametrize("at", [8 * MIB, DATA_OFFSET + 17, SIZE + DATA_OFFSET - 5], ids=str)
def test_hc1346_data_without_any_signature_is_data(node: Node, at: int) -> None:
    node.create()
    with node.disk().open("r+b") as file:
        file.seek(at)
        file.write(b"diary")
    before = fingerprint(node.disk())
    with pytest.raises(ForeignSignature, match="holds other data"):
        node.stage()
    assert fingerprint(node.disk()) == before
    assert node.encryption_state() is EncryptionState.PREPARED


@only_of_files("written")
@pytest.mark.parametrize("content", [b"diary", b"\0" * 5], ids=["data", "zeros"])
def test_of_a_sparse_file_all_that_was_ever_written_is_looked_at(folder: Path, content: bytes) -> None:
    """A few bytes in 64 GiB, where no sample is taken."""
    size, at = 64 << 30, (20 << 30) + 12345 * MIB + 200_000
    storage = folder / "storage"
    with storage.open("wb") as file:
        file.truncate(size)
        os.pwrite(file.fileno(), content, at)
    proofs: tuple[Callable[[str, str | None], None], ...] = (
        lambda path, storage: prove_blank("x", path, size, storage),
        lambda path, storage: prove_unwritten("x", path, size, "uuid", storage),
        lambda path, storage: prove_payload_blank("x", path, size, storage),
    )
    with LoopDevices().attach(str(storage), autoclear=True) as device:
        for prove in proofs:
            prove(device.path, None)
            with pytest.raises(ForeignSignature) if content.strip(b"\0") else nullcontext():
                prove(device.path, str(storage))


def test_hc1455_the_device_of_another_volume_is_refused(node: Node) -> None:
    """Two volumes whose files changed places: each knows its own LUKS UUID."""
    node.staged_once("pvc-1", "first")
    node.staged_once("pvc-2", "second")
    disks.swap(node, "pvc-1", "pvc-2")
    for volume in ("pvc-1", "pvc-2"):
        with pytest.raises(ForeignSignature, match=r"expected LUKS2 with UUID .* found UUID"):
            node.stage(volume)
        assert node.closed(volume)


@only_of_files("files")
def test_hc1455_two_volumes_on_one_file(node: Node) -> None:
    """A hard link: loop itself would bind the file twice and both would write. Once it is staged none can be made."""
    node.staged_once("pvc-1", "first")
    node.create("pvc-2", parameters={})
    node.disk("pvc-2").unlink()
    os.link(node.disk("pvc-1"), node.disk("pvc-2"))
    before = fingerprint(node.disk("pvc-1"))
    with pytest.raises(DeviceMismatch, match="has 2 hard links"):
        node.stage("pvc-2", secret={})
    assert node.closed("pvc-2")
    assert fingerprint(node.disk("pvc-1")) == before
    node.disk("pvc-2").unlink()
    node.stage("pvc-1")
    assert node.read("pvc-1") == "first"
    with pytest.raises(PermissionError):  # while it is staged
        os.link(node.disk("pvc-1"), node.disk("pvc-2"))
    node.unstage("pvc-1")


@not_on("made", "rbd", "csi")
def test_cc3402_an_interrupted_create_is_finished_with_its_encryption(node: Node) -> None:
    """Field problem 22: what a killed CreateVolume left is no volume, and the next call makes an encrypted one."""
    fresh = node.record_file().parents[2] / "new" / VOLUME
    fresh.mkdir()
    if not IN_GROUP:  # where tests/backends cuts a creation at each step
        (fresh / "disk.img").write_bytes(b"half")
    with pytest.raises(NotFound):
        node.stage()
    node.create()
    assert node.encryption_state() is EncryptionState.PREPARED
    assert not fresh.exists()
    node.stage()
    identity = node.record().luks
    assert identity is not None
    assert node.header().uuid == identity.uuid
    node.unstage()
