"""Block volumes and what pods see: never probed, never formatted; options honoured from the first moment.

Field problems 18, 21 and 26.
"""

import contextlib
import os
import subprocess
import threading
from pathlib import Path

import pytest

from csi_driver.model.errors import AlreadyExists, DeviceInUse, FailedPrecondition, InvalidArgument
from csi_driver.model.volume import FileSystemState
from csi_driver.volumes.capability import AccessMode, Capability
from tests.machine import disks
from tests.machine.node import BLOCK, CHEAP, DATA_OFFSET, EXT4, MIB, SECRET, SIZE, VOLUME, Node
from tests.machine.places import not_on, only_of_files

PATTERN = bytes(range(256)) * 16
POD = Capability(AccessMode.SINGLE_NODE_SINGLE_WRITER, block=False)
POD_BLOCK = Capability(AccessMode.SINGLE_NODE_SINGLE_WRITER, block=True)
READER = Capability(AccessMode.SINGLE_NODE_READER_ONLY, block=False)


def read_device(path: Path, size: int = SIZE) -> bytes:
    with path.open("rb") as device:
        return device.read(size)


def write_device(path: Path, content: bytes, at: int = 0) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, content, at)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def used_as_block(node: Node, content: bytes, at: int = 0) -> None:
    """A pod wrote to the volume as a block device."""
    node.create(capability=BLOCK)
    node.stage(capability=BLOCK)
    write_device(node.publish(capability=BLOCK), content, at)
    node.unpublish()
    node.unstage()


@pytest.mark.parametrize("at", [0, 8 * MIB], ids=["start", "middle"])
def test_cc3945_a_block_volume_is_never_given_a_file_system(node: Node, at: int) -> None:
    """Staged as a mount it fails, naming what was found; what the pod wrote is there afterwards."""
    used_as_block(node, PATTERN, at)
    assert node.file_system_state() is FileSystemState.RAW
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match=f"volume {VOLUME} was used as a block device and never gets"):
            node.stage()
        assert node.closed()
    assert node.file_system_state() is FileSystemState.RAW
    node.stage(capability=BLOCK)
    target = node.publish(capability=BLOCK)
    assert read_device(target)[at : at + len(PATTERN)] == PATTERN
    node.unpublish()
    node.unstage()


@only_of_files("loop")
def test_what_an_unstage_found_busy_and_let_go_of_is_given_to_no_pod(node: Node) -> None:
    """With its last user the loop device would be another volume's below the pod."""
    plain = {"encrypted": "false"}
    node.create(parameters=plain, capability=BLOCK)
    node.stage(capability=BLOCK)
    node.publish(capability=BLOCK)
    user = os.open(node.plain_device(VOLUME), os.O_RDWR)
    try:
        node.unpublish()
        with pytest.raises(DeviceInUse):
            node.unstage()
        with pytest.raises(FailedPrecondition, match="unstage and stage the volume"):
            node.publish(capability=BLOCK)
        with pytest.raises(DeviceInUse):
            node.stage(capability=BLOCK)
    finally:
        os.close(user)
    node.unstage()
    node.stage(capability=BLOCK)
    node.publish(capability=BLOCK)
    node.unpublish()
    node.unstage()


def test_hc208_what_was_found_is_named(node: Node) -> None:
    used_as_block(node, b"SWAPSPACE2", 4086)
    with pytest.raises(FailedPrecondition, match="it holds swap, so use it as a block device again"):
        node.stage()


def test_hc349_even_an_untouched_block_volume_is_not_formatted(node: Node) -> None:
    """That it was shown once is enough: somebody may have written anything."""
    node.create(capability=BLOCK)
    node.stage(capability=BLOCK)
    node.unstage()
    with pytest.raises(FailedPrecondition, match="holds no file system that is known here"):
        node.stage()
    assert node.closed()


def test_cc3945_the_file_system_that_the_pod_made_is_mounted(node: Node) -> None:
    node.create(capability=BLOCK)
    node.stage(capability=BLOCK)
    target = node.publish(capability=BLOCK)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-L", "the-pods-own", target], check=True, timeout=120)
    node.unpublish()
    node.unstage()
    node.stage()
    assert node.file_system_state() is FileSystemState.RAW
    node.write("in the pod's own")
    assert b"the-pods-own" in read_device(Path(node.open_mapping().path), 4096)
    with pytest.raises(AlreadyExists, match="with ext4, asked for with xfs"):
        node.stage(capability=Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="xfs"))
    node.unstage()
    with pytest.raises(FailedPrecondition, match="holds the file system ext4 and xfs was asked for; it is never made"):
        node.stage(capability=Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="xfs"))
    assert node.closed()


def test_hc208_a_mounted_volume_used_as_block_and_mounted_again_keeps_its_data(used: Node) -> None:
    used.stage(capability=BLOCK)
    assert used.file_system_state() is FileSystemState.MADE
    target = used.publish(capability=BLOCK)
    assert b"precious" in read_device(target)
    used.unpublish()
    used.unstage()
    used.stage()
    assert used.read() == "precious"
    used.unstage()


def test_cc3945_a_stage_as_block_is_another_stage_than_one_as_mount(used: Node) -> None:
    used.stage()
    with pytest.raises(AlreadyExists, match="as a mount, asked for as a block device"):
        used.stage(capability=BLOCK)
    with pytest.raises(FailedPrecondition, match="staged as a mount and was to be published as a block device"):
        used.publish(capability=BLOCK)
    assert used.read() == "precious"
    used.unstage()


def test_the_plaintext_is_not_in_the_backing_file(node: Node) -> None:
    used_as_block(node, PATTERN * 16, MIB)
    assert PATTERN[:256] not in node.disk().read_bytes()
    assert node.disk_bytes() == node.rounded(SIZE + DATA_OFFSET)


FLAGS = {
    "discard": "allow_discards",
    "noReadWorkqueue": "no_read_workqueue",
    "noWriteWorkqueue": "no_write_workqueue",
}


@pytest.mark.parametrize("parameter", FLAGS)
def test_cc3563_a_flag_of_the_class_is_in_the_table(node: Node, parameter: str) -> None:
    """Off by default, on where the StorageClass says so, also after an expansion and the next stage."""
    others = set(FLAGS.values()) - {FLAGS[parameter]}
    node.create(parameters={**CHEAP, parameter: "true"})
    node.create("pvc-default")
    for _ in range(2):
        node.stage()
        node.expand(2 * SIZE)
        words = set(node.open_mapping().targets[0].params.split())
        assert FLAGS[parameter] in words
        assert not others & words
        node.unstage()
    node.stage("pvc-default")
    assert not set(FLAGS.values()) & set(node.open_mapping("pvc-default").targets[0].params.split())
    node.unstage("pvc-default")


@not_on("allocated", "rbd")
@not_on("thick", "lvm-thick")
@pytest.mark.parametrize("discard", ["true", "false"])
def test_linstor458_freed_space_returns_to_the_backend_only_with_discard(node: Node, discard: str) -> None:
    node.create(parameters={**CHEAP, "discard": discard})
    node.stage()
    with (node.staging_path() / "large").open("wb") as file:
        file.write(os.urandom(8 * MIB))
        os.fsync(file.fileno())
    full = disks.allocated(node)
    (node.staging_path() / "large").unlink()
    os.sync()
    trimmed = subprocess.run(["fstrim", node.staging_path()], capture_output=True, check=False, timeout=120)
    os.sync()
    freed = full - disks.allocated(node)
    assert (trimmed.returncode == 0) == (discard == "true"), trimmed.stderr
    assert (freed > 6 * MIB) == (discard == "true")
    node.unstage()


def test_a_read_only_publish_is_read_only_from_the_first_moment(used: Node) -> None:
    """A pod's first process never finds it writable: a bind mount that is remounted afterwards was, for a moment."""
    used.stage()
    done, opened = threading.Event(), []

    def intrude() -> None:
        while not done.is_set():
            try:
                os.close(os.open(used.target_path() / "file", os.O_WRONLY))
            except OSError:
                continue
            opened.append(True)

    thread = threading.Thread(target=intrude, daemon=True)
    thread.start()
    for _ in range(30):
        target = used.publish(read_only=True)
        for _ in range(200):  # the intruder is on the way through the mount at times
            with contextlib.suppress(DeviceInUse):
                used.unpublish()
                break
    done.set()
    thread.join(10)
    assert not opened
    target = used.publish(read_only=True)
    with pytest.raises(OSError, match="Read-only file system"):
        (target / "file").write_text("x")
    assert (target / "file").read_text() == "precious"
    with pytest.raises(AlreadyExists, match="read-only, asked for read-write"):
        used.publish()
    used.unpublish()
    used.unstage()


def test_a_reader_only_access_mode_publishes_read_only(used: Node) -> None:
    used.stage(capability=READER)
    target = used.publish(capability=READER)
    with pytest.raises(OSError, match="Read-only file system"):
        (target / "file").write_text("x")
    used.unpublish()
    used.unstage()


@pytest.mark.parametrize("capability", [POD, POD_BLOCK], ids=["mount", "block"])
def test_read_write_once_pod_is_enforced(used: Node, capability: Capability) -> None:
    used.stage(capability=capability)
    first = used.publish(capability=capability)
    assert used.publish(capability=capability) == first, "a repetition"
    second = used.target_path("second-pod")
    with pytest.raises(FailedPrecondition, match=f"ReadWriteOncePod and is published at {first} already"):
        used.publish(capability=capability, target=second)
    assert not second.exists()
    used.unpublish()
    used.publish(capability=capability, target=second)
    used.unpublish(target=second)
    used.unstage()


@pytest.mark.parametrize("capability", [EXT4, BLOCK], ids=["mount", "block"])
def test_unpublish_names_who_keeps_it_and_nobody_who_uses_it_elsewhere(used: Node, capability: Capability) -> None:
    used.stage(capability=capability)
    first = used.publish(capability=capability)
    second = used.publish(capability=capability, target=used.target_path("second-pod"))
    places = [path if capability.block else path / "file" for path in (first, second)]
    with (
        places[0].open() as mine,
        subprocess.Popen(["sleep", "60"], stdin=mine) as here,
        places[1].open() as its,
        subprocess.Popen(["sleep", "60"], stdin=its) as elsewhere,
    ):
        mine.close()
        try:
            with pytest.raises(DeviceInUse, match=rf"{VOLUME} cannot be unmounted from {first}: .*{here.pid} ") as busy:
                used.unpublish()
            assert f"process {elsewhere.pid} " not in str(busy.value)
        finally:
            here.kill()
            elsewhere.kill()
    used.unpublish()
    used.unpublish(target=second)
    used.unstage()


def test_mount_options_are_honoured_and_another_set_is_another_stage(used: Node) -> None:
    options = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, mount_flags=("noatime", "nosuid", "data=journal"))
    used.stage(capability=options)
    mount = used.mounts.at(str(used.staging_path()))
    assert mount is not None
    assert {"noatime", "nosuid"} <= mount.options
    assert "data=journal" in mount.super_options
    used.stage(capability=options)
    with pytest.raises(AlreadyExists, match="mountOptions"):
        used.stage()
    used.unstage()
    for flag in ("loop", "offset=512", "remount", "bind", "errors=panic", "journal_path=/dev/sda"):
        with pytest.raises(InvalidArgument, match=flag.partition("=")[0]):
            used.stage(capability=Capability(AccessMode.SINGLE_NODE_WRITER, block=False, mount_flags=(flag,)))
    assert used.closed()


def test_a_context_that_disagrees_with_the_record_is_refused(node: Node) -> None:
    node.create(parameters={})
    with pytest.raises(FailedPrecondition, match="encrypted='true'"):
        node.stage(secret=SECRET, context={"encrypted": "true"})
    assert node.closed()
    node.stage(capability=EXT4, secret={}, context={"encrypted": "false"})
    node.unstage()
