"""Volumes from images on real dm-crypt: what is inside, whose identity they have, what a cut leaves."""

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

import msgspec
import pytest

from csi_driver.host.clonefile import FileIdentity, clone_file
from csi_driver.host.handle import Handle
from csi_driver.host.loop import LoopDevices
from csi_driver.host.workers import Workers
from csi_driver.images.base import MIB
from csi_driver.luks.cloned import change_uuid
from csi_driver.luks.header import parse
from csi_driver.model.errors import DriverError, FailedPrecondition, Unauthenticated
from csi_driver.model.volume import EncryptionState, FileSystemState, VolumeRecord
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.driver import WARM
from csi_driver.volumes.keyslots import KeySlots
from tests import headers
from tests.fake_kernel import Killed
from tests.machine.image_lab import digest_of, mounted
from tests.machine.node import BLOCK, EXT4, Node, fingerprint
from tests.volume_images import (
    BOOT_FILE,
    DISK_BYTES,
    GREETING,
    SECRET,
    Made,
    encrypted_image,
    make_disk,
    make_file_system,
    put_image,
)

P = ParamSpec("P")
R = TypeVar("R")

CLAIM = 64 * MIB
PLAIN = {"backingImage": "plain"}
SEALED = {"backingImage": "sealed", "encrypted": "true"}
WRONG = {"CRYPTO_KEY_VALUE": "another one"}
MACHINES = ("vm-1", "vm-2")
XFS = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="xfs")


@pytest.fixture(scope="session")
def file_systems(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Made]:
    """An ext4 file system, plain and encrypted with a cheap key slot."""
    state = os.environ.get("MACHINE_STATE")
    folder = Path(state, "file-systems") if state else tmp_path_factory.mktemp("file-systems")
    folder.mkdir(exist_ok=True)
    plain = make_file_system(folder / "plain.raw")
    return {"plain": Made(plain, DISK_BYTES), "sealed": encrypted_image(plain, folder / "sealed")}


@pytest.fixture
def stocked(folder: Path, workers: Workers, file_systems: Mapping[str, Made]) -> Node:
    """A driver with both images."""
    for name, made in file_systems.items():
        put_image(folder / "state", name, made)
    return Node(folder, workers)


def image_file(node: Node, name: str) -> Path:
    return node.state / "images/ready" / name / "image"


def room(node: Node, volume: str) -> int:
    usage = os.statvfs(node.staging_path(volume))
    return usage.f_blocks * usage.f_frsize


def greeting(node: Node, volume: str) -> str:
    return (node.staging_path(volume) / BOOT_FILE).read_text()


def check_own(node: Node) -> None:
    """Two volumes of one encrypted image, staged at once: theirs alone are identity, content and size."""
    image = image_file(node, "sealed")
    before = fingerprint(image)
    for name in MACHINES:
        node.create(name, size=CLAIM, parameters=SEALED, capability=EXT4, secret=SECRET)
    uuids = {parse(headers.head_of(file), str(file)).uuid for file in (image, *map(node.disk, MACHINES))}
    assert len(uuids) == 3, "image and volumes do not each have a LUKS UUID of their own"
    with ExitStack() as staged:
        for name in MACHINES:
            node.stage(name, EXT4, secret=SECRET)
            staged.callback(node.unstage, name)
            assert greeting(node, name) == GREETING
            assert CLAIM * 3 // 4 < room(node, name) <= CLAIM, "the file system was not grown"
        node.write("precious", "vm-1")
        assert not (node.staging_path("vm-2") / "file").exists()
        assert fingerprint(image) == before, "the image was written to"
        node.unstage("vm-2")  # takes its key out of the kernel, and no other one's
        assert node.expand(2 * CLAIM, "vm-1") == 2 * CLAIM
        assert room(node, "vm-1") > CLAIM
        assert node.read("vm-1") == "precious"
    for name in MACHINES:
        assert (node.encryption_state(name), node.file_system_state(name)) == (
            EncryptionState.ENCRYPTED,
            FileSystemState.RAW,
        )


def test_volumes_of_one_encrypted_image_share_nothing(stocked: Node) -> None:
    check_own(stocked)


def test_a_plain_image_makes_a_plain_volume_that_is_grown_and_keeps_what_is_written(stocked: Node) -> None:
    image = fingerprint(image_file(stocked, "plain"))
    stocked.create(size=CLAIM, parameters=PLAIN, secret={})
    for number in range(2):
        stocked.stage(secret={})
        assert stocked.mapping() is None
        assert greeting(stocked, "pvc-1") == GREETING
        assert CLAIM * 3 // 4 < room(stocked, "pvc-1") <= CLAIM
        if number:
            assert stocked.read() == "precious"
        stocked.write()
        stocked.unstage()
    assert stocked.record().encryption is None
    assert fingerprint(image_file(stocked, "plain")) == image
    stocked.create("block", size=CLAIM, parameters=PLAIN, capability=BLOCK, secret={})
    stocked.stage("block", BLOCK, secret={})
    target = stocked.publish("block", BLOCK)
    assert digest_of(target, DISK_BYTES) == digest_of(image_file(stocked, "plain"))
    stocked.unpublish("block")
    stocked.unstage("block")


def test_what_the_image_holds_is_never_formatted_whatever_is_asked_for(stocked: Node) -> None:
    disk = make_disk(stocked.folder / "disk.raw")
    put_image(stocked.state, "disk", encrypted_image(disk, stocked.folder / "made"))
    stocked.create("disk", size=CLAIM, parameters=SEALED | {"backingImage": "disk"}, secret=SECRET)
    before = fingerprint(stocked.disk("disk"))
    with pytest.raises(FailedPrecondition, match=r"starts from image disk and never gets a file system.*MBR partition"):
        stocked.stage("disk", secret=SECRET)
    stocked.create("other", size=512 * MIB, parameters=SEALED | {"fstype": "xfs"}, secret=SECRET)
    with pytest.raises(FailedPrecondition, match=r"holds the file system ext4 and xfs was asked for"):
        stocked.stage("other", XFS, secret=SECRET)
    stocked.create("wrong", size=CLAIM, parameters=SEALED, secret=SECRET)
    with pytest.raises(Unauthenticated, match=r"opens no key slot of volume wrong"):
        stocked.stage("wrong", secret=WRONG)
    assert fingerprint(stocked.disk("disk")) == before
    assert all(stocked.closed(volume) for volume in ("disk", "other", "wrong"))


def test_blocks_are_shared_where_the_file_system_can_do_that(folder: Path, workers: Workers) -> None:
    with (folder / "xfs.img").open("wb") as file:
        file.truncate(400 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(folder / "xfs.img")], check=True, timeout=60)
    with (folder / "noise").open("wb") as file:
        file.write(os.urandom(64 * MIB))
    with (
        LoopDevices().attach(str(folder / "xfs.img"), autoclear=True) as loop,
        mounted(loop.path, folder / "xfs", "xfs") as xfs,
    ):
        put_image(xfs / "state", "plain", Made(folder / "noise", 64 * MIB))
        node = Node(xfs, workers)
        free = node.store.space().free
        node.create(size=2 * CLAIM, parameters=PLAIN, capability=BLOCK, secret={})
        assert free - node.store.space().free < 4 * MIB
        assert digest_of(node.disk(), 64 * MIB) == digest_of(folder / "noise")
        assert node.disk().stat().st_size == 2 * CLAIM


@pytest.mark.parametrize(("fs_type", "size"), [("xfs", 300 * MIB), ("btrfs", 256 * MIB)])
def test_volumes_whose_file_systems_have_one_uuid_keep_apart(
    folder: Path, workers: Workers, fs_type: str, size: int
) -> None:
    with (folder / "source").open("wb") as file:
        file.truncate(size)
    subprocess.run([f"mkfs.{fs_type}", "-q", str(folder / "source")], check=True, timeout=60)
    put_image(folder / "state", "plain", Made(folder / "source", size))
    node, capability = Node(folder, workers), Capability(AccessMode.SINGLE_NODE_WRITER, False, fs_type)
    one_at_a_time = fs_type == "btrfs" and tuple(map(int, os.uname().release.split(".")[:2])) < (6, 7)
    first, second = MACHINES
    for name in MACHINES:
        node.create(name, size=2 * size, parameters=PLAIN, capability=capability, secret={})
    node.stage(first, capability, secret={})
    node.write("precious", first)
    if one_at_a_time:
        with pytest.raises(FailedPrecondition, match=r"btrfs file system of the same UUID is mounted on this node"):
            node.stage(second, capability, secret={})
        assert node.closed(second)
        node.unstage(first)
    node.stage(second, capability, secret={})
    assert not (node.staging_path(second) / "file").exists()
    assert size < room(node, second) <= 2 * size, "the file system was not grown"
    for name in MACHINES:
        node.unstage(name)
    node.stage(first, capability, secret={})
    assert node.read(first) == "precious"
    node.unstage(first)


# --- cut -------------------------------------------------------------------------------------------------------------


class Planted(Workers):
    """Workers in whose processes something happens in place of `function`; None ends the server there."""

    def __init__(self, function: Callable[..., object], instead: Callable[..., object] | None) -> None:
        super().__init__((*WARM, __name__))
        self._function = function
        self._instead = instead

    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        if cast("object", function) is self._function:
            if self._instead is None:
                raise Killed
            function = cast("Callable[P, R]", self._instead)
        return super().call(what, timeout, function, *args, **kwargs)


@pytest.fixture
def planted() -> Iterator[Callable[[Callable[..., object], Callable[..., object] | None], Workers]]:
    made: list[Workers] = []

    def make(function: Callable[..., object], instead: Callable[..., object] | None) -> Workers:
        made.append(Planted(function, instead))
        return made[-1]

    yield make
    for workers in made:
        workers.stop()


Plant = Callable[[Callable[..., object], Callable[..., object] | None], Workers]


def test_a_volume_that_was_cut_before_it_had_its_identity_gets_it_at_the_latest_when_it_is_staged(
    stocked: Node, workers: Workers, planted: Plant
) -> None:
    dying = Node(stocked.folder, planted(change_uuid, None))
    with pytest.raises(Killed):
        dying.create(size=CLAIM, parameters=SEALED, capability=EXT4, secret=SECRET)
    image = parse(headers.head_of(image_file(stocked, "sealed")), "image").uuid
    assert stocked.encryption_state() is EncryptionState.CLONING
    assert stocked.header().uuid == image
    with pytest.raises(FailedPrecondition, match="CRYPTO_KEY_VALUE"):
        stocked.stage(capability=EXT4, secret={})
    after = Node(stocked.folder, workers)
    after.stage(capability=EXT4, secret=SECRET)
    assert after.encryption_state() is EncryptionState.ENCRYPTED
    assert greeting(after, "pvc-1") == GREETING
    after.unstage()
    assert after.header().uuid != image
    after.delete()


# --- these tests can fail --------------------------------------------------------------------------------------------


class KeepsIdentity(KeySlots):
    """A clone is taken as it is, with the image's LUKS UUID."""

    def take_identity(self, record: VolumeRecord, clone: Handle) -> VolumeRecord:
        assert record.luks is not None
        assert record.cloned_uuid is not None
        luks = msgspec.structs.replace(record.luks, uuid=record.cloned_uuid)
        return msgspec.structs.replace(record, luks=luks, encryption=EncryptionState.ENCRYPTED, cloned_uuid=None)


def link(where: str, source: FileIdentity, target: str, size: int) -> bool:  # noqa: ARG001 - as clone_file
    """The volume is the image's own file."""
    os.unlink(target)
    os.link(source.path, target)
    os.truncate(target, size)
    return True


def test_an_identity_that_is_not_changed_is_noticed(stocked: Node, workers: Workers) -> None:
    with pytest.raises(AssertionError, match="a LUKS UUID of their own"):
        check_own(Node(stocked.folder, workers, make_slots=KeepsIdentity))


def test_a_volume_that_is_the_images_own_file_is_noticed(stocked: Node, planted: Plant) -> None:
    shared = image_file(stocked, "sealed")  # with all tests
    subprocess.run(["cp", "--sparse=always", shared, shared.with_name("own")], check=True, timeout=120)
    shared.with_name("own").rename(shared)
    before = digest_of(shared)
    with pytest.raises((AssertionError, DriverError)):
        check_own(Node(stocked.folder, planted(clone_file, link)))
    assert digest_of(shared) != before, "the planted bug did not write to the image"
