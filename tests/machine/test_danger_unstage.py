"""Volumes that are put down: the right one, never one in use, and every one that nobody uses.

Public reports of each are named in the tests; what keeps a volume is said before anything of it is undone.
"""

import contextlib
import fcntl
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from csi_driver.host import keyring
from csi_driver.host.devicemapper import DeviceMapper, Target
from csi_driver.luks.device import key_prefix, volume_key_name
from csi_driver.model.errors import CommandFailed, DeviceInUse, DriverError, FailedPrecondition, NotFound
from csi_driver.model.volume import EncryptionState, VolumeRecord, mapping_name
from csi_driver.rpc.client import CsiClient, RemoteError
from csi_driver.volumes.capability import AccessMode, Capability
from tests.machine.node import BLOCK, CHEAP, EXT4, MIB, MOUNT, NAME, SECRET, SIZE, VOLUME, Node
from tests.machine.places import id_of, not_on, of_class, server_on
from tests.machine.processes import run, sleeping_in

OTHER = id_of("pvc-2")
PLAIN: Mapping[str, str] = {}
BTRFS = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="btrfs")
_BTRFS_DEVICES_READY = 0x90009427

kinds = pytest.mark.parametrize("capability", [MOUNT, BLOCK], ids=["mount", "block"])
encrypted_or_plain = pytest.mark.parametrize("parameters", [CHEAP, PLAIN], ids=["encrypted", "plain"])


def said_first_of(path: Path) -> str:
    """The pattern of the sentence for a volume that is still published at `path`."""
    return rf"{VOLUME}.*still published at {re.escape(str(path))}; unpublish it first"


def content_of(path: Path) -> bytes:
    """The beginning of a block device, read anew."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(descriptor, 16, 0)
    finally:
        os.close(descriptor)


def put(path: Path | str, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, content, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@kinds
@encrypted_or_plain
@pytest.mark.parametrize("published", [False, True], ids=["staged", "published"])
def test_an_unstage_at_another_path_succeeds_and_changes_nothing(
    node: Node, capability: Capability, parameters: Mapping[str, str], *, published: bool
) -> None:
    """CSI: the call is about the volume at that path, where it is not staged."""
    node.create(parameters=parameters, capability=capability)
    node.stage(capability=capability)
    targets = [node.publish(capability=capability)] if published else []
    before = node.mapping(), node.loops_of(), node.is_mounted()
    node.unstage(path=node.folder / "elsewhere")
    assert (node.mapping(), node.loops_of(), node.is_mounted()) == before
    targets.append(node.publish(capability=capability, target=node.target_path("pod-2")))
    for target in targets:
        node.unpublish(target=target)
    node.unstage()
    assert node.closed()


@kinds
@encrypted_or_plain
def test_kubernetes106729_a_published_volume_is_not_unstaged_and_nothing_of_it_is_undone(
    node: Node, capability: Capability, parameters: Mapping[str, str]
) -> None:
    """Refused before anything is unmounted or closed: the next pod is published, and no number becomes free."""
    node.create(parameters=parameters, capability=capability)
    node.stage(capability=capability)
    target = node.publish(capability=capability)
    before = node.mapping(), node.loops_of(), node.is_mounted()
    with pytest.raises(FailedPrecondition, match=said_first_of(target)):
        node.unstage()
    assert (node.mapping(), node.loops_of(), node.is_mounted()) == before
    second = node.publish(capability=capability, target=node.target_path("pod-2"))
    for path, left in ((target, second), (second, None)):
        node.unpublish(target=path)
        if left is not None:
            with pytest.raises(FailedPrecondition, match=said_first_of(left)):
                node.unstage()
    node.unstage()
    assert node.closed()


def test_the_device_that_a_pod_sees_never_becomes_another_volumes(node: Node) -> None:
    """Unstaged while published, a device number went to the next volume, and the old target read and wrote that."""
    for volume in (VOLUME, OTHER):
        node.create(volume, capability=BLOCK)
    node.stage(capability=BLOCK)
    target = node.publish(capability=BLOCK)
    put(target, b"the first volume")
    with contextlib.suppress(FailedPrecondition):
        node.unstage()
    node.stage(OTHER, BLOCK)
    put(node.open_mapping(OTHER).path, b"the other volume")
    assert content_of(target) == b"the first volume"
    node.unpublish()
    node.unstage()
    node.unstage(OTHER)


@contextlib.contextmanager
def taken_below(minor: int) -> Iterator[None]:
    """Whichever mapped device is made next has that number."""
    mapper = DeviceMapper()
    fillers: list[str] = []
    while True:
        made = mapper.create(f"filler-{len(fillers)}", "", [Target(0, 8, "zero", "")])
        fillers.append(made.name)
        if made.minor >= minor:
            mapper.remove(fillers.pop())
            break
    yield
    for name in fillers:
        mapper.remove(name)


@pytest.fixture
def stale(node: Node) -> Iterator[Node]:
    """The node below /dev/mapper of a staged volume whose mapping is gone has the number of another volume's.

    That is what is left where no udev runs and a process is killed between removing a mapping and unlinking its node.
    """
    for volume in (VOLUME, OTHER):
        node.create(volume, capability=BLOCK)
    node.disk(OTHER)  # where that is a mapped device too, it has its number before
    node.stage(capability=BLOCK)
    left = Path(node.open_mapping().path)
    number = left.stat().st_rdev
    run("dmsetup", "remove", "--noudevsync", left.name)
    with contextlib.suppress(FileExistsError):
        os.mknod(left, 0o60600, number)
    with taken_below(os.minor(number)):
        node.stage(OTHER, BLOCK)
    assert Path(node.open_mapping(OTHER).path).stat().st_rdev == number
    yield node
    for volume in (VOLUME, OTHER):
        node.unstage(volume)
    left.unlink(missing_ok=True)


def test_a_stale_node_goes_with_the_unstage(stale: Node) -> None:
    stale.unstage()
    assert not Path("/dev/mapper", mapping_name(VOLUME)).exists()
    assert stale.mapping(OTHER) is not None


def test_a_stale_node_of_a_mapping_is_never_published(stale: Node) -> None:
    with pytest.raises(FailedPrecondition, match=VOLUME):
        stale.publish(capability=BLOCK)
    assert not stale.mounts.at(str(stale.target_path()))


def test_a_stale_node_of_a_mapping_does_not_grow(stale: Node) -> None:
    with pytest.raises((FailedPrecondition, NotFound), match=VOLUME):
        stale.expand(2 * SIZE)
    assert stale.open_mapping(OTHER).size_bytes == SIZE


def test_a_stale_node_of_a_mapping_has_no_usage(stale: Node) -> None:
    left = f"/dev/mapper/{mapping_name(VOLUME)}"
    with pytest.raises((FailedPrecondition, NotFound), match=VOLUME):
        stale.usages.of(VOLUME, left)


def test_a_staging_path_that_is_a_link_is_refused(node: Node) -> None:
    real, link = node.folder / "real", node.staging_path()
    real.mkdir()
    link.parent.mkdir()
    link.symlink_to(real)
    node.create()
    with pytest.raises(FailedPrecondition, match=rf"{re.escape(str(link))}.*symbolic link"):
        node.stage()
    assert not node.mounts.at(str(real))
    assert node.encryption_state() is EncryptionState.PREPARED
    assert node.closed()


def test_a_volume_that_0_1_0_staged_through_a_link_can_be_put_down(used: Node) -> None:
    """It mounted what the link leads to and recorded the link."""
    real, link = used.folder / "real", used.staging_path()
    used.stage(path=real)
    link.parent.mkdir()
    link.symlink_to(real)
    mapping = used.open_mapping()
    stage = {
        "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "stage": {
            "staging_path": str(link), "block": False, "device": mapping.path, "fs_type": "ext4", "mount_options": [],
            "read_only": False, "luks_uuid": used.header().uuid,
        },
    }  # fmt: skip
    (used.state / "stages" / VOLUME).write_text(json.dumps(stage))
    used.unstage()
    assert not used.mounts.at(str(real))
    assert used.closed()


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_holder_in_a_folder_whose_name_is_no_utf8_is_named(folder: Path, log_format: str) -> None:
    staging_path = folder / "stage"
    staging_path.mkdir()
    with server_on(folder, "--log-format", log_format) as server, CsiClient(server.endpoint) as client:
        volume = client.create_volume(NAME, [EXT4], SIZE, parameters=of_class(CHEAP), secrets=SECRET)
        client.stage(volume, staging_path, EXT4, SECRET)
        latin = bytes(staging_path) + b"/caf\xe9"
        os.mkdir(latin)
        with sleeping_in(latin) as holder, pytest.raises(RemoteError) as busy:
            client.unstage(VOLUME, staging_path)
        client.unstage(VOLUME, staging_path)
        client.delete_volume(VOLUME)
        told = [line for line in server.log().splitlines() if f"process {holder} (sleep)" in line]
    assert re.search(rf"process {holder} \(sleep\).*/caf", str(busy.value))
    assert busy.value.code == "FAILED_PRECONDITION"
    assert len(told) == 1
    assert "UnicodeEncodeError" not in server.log()


def test_targets_that_lie_in_each_other_can_be_put_down(used: Node) -> None:
    used.stage()
    outer = used.publish()
    inner = used.publish(target=outer / "inner")
    with contextlib.suppress(DeviceInUse):
        used.unpublish(target=outer)
    used.unpublish(target=inner)
    used.unpublish(target=outer)
    used.unstage()
    assert used.closed()


def test_the_staging_path_is_no_target(used: Node) -> None:
    """Published there, the next unpublish took the stage away."""
    used.stage()
    with contextlib.suppress(DriverError):
        used.publish(target=used.staging_path())
    with contextlib.suppress(DriverError):
        used.unpublish(target=used.staging_path())
    assert used.is_mounted()
    assert used.read() == "precious"
    used.unstage()


def test_topolvm1225_all_mounts_stacked_at_the_staging_path_go(used: Node) -> None:
    used.stage()
    for _ in range(2):
        run("mount", "--bind", used.staging_path(), used.staging_path())
    used.unstage()
    assert used.closed()


def test_lh3080_a_sub_path_that_a_dead_pod_left_is_named_and_nothing_is_undone(used: Node) -> None:
    used.stage()
    target = used.publish()
    (target / "html").mkdir()
    left = used.folder / "pods" / "volume-subpaths" / "0"
    left.mkdir(parents=True)
    run("mount", "--bind", target / "html", left)
    used.unpublish()
    with pytest.raises(FailedPrecondition, match=re.escape(str(left))):
        used.unstage()
    assert used.is_mounted()
    run("umount", left)
    used.unstage()
    assert used.closed()


@pytest.fixture
def renamed(node: Node) -> Iterator[Node]:
    """A staged btrfs whose source in mountinfo is another name, as udev's `btrfs ready $devnode` makes it.

    A node of its own: newer kernels leave a name that leads to the same node, as udev's links do.
    """
    node.create(size=256 * MIB, capability=BTRFS)
    node.stage(capability=BTRFS)
    node.write()
    device = Path(f"/dev/another-name-of-{VOLUME}")
    os.mknod(device, 0o60600, Path(node.open_mapping().path).stat().st_rdev)
    control = os.open("/dev/btrfs-control", os.O_RDWR)
    try:
        fcntl.ioctl(control, _BTRFS_DEVICES_READY, bytearray(struct.pack("=q4088s", 0, os.fsencode(device))))
    finally:
        os.close(control)
    mount = node.mounts.at(str(node.staging_path()))
    assert mount is not None
    assert mount.source == str(device)
    yield node
    device.unlink()


def test_topolvm877_a_btrfs_whose_device_got_another_name_is_used_grown_and_put_down(renamed: Node) -> None:
    renamed.stage(capability=BTRFS)
    target = renamed.publish(capability=BTRFS)
    assert (target / "file").read_text() == "precious"
    assert renamed.expand(300 * MIB) == 300 * MIB
    assert os.statvfs(target).f_blocks * os.statvfs(target).f_frsize == 300 * MIB
    with pytest.raises(FailedPrecondition, match=said_first_of(target)):
        renamed.unstage()
    renamed.unpublish()
    renamed.unstage()
    assert renamed.closed()
    renamed.stage(capability=BTRFS)
    assert renamed.read() == "precious"
    renamed.unstage()
    renamed.delete()


@pytest.mark.parametrize("moment", ["published", "unpublished"])
def test_kubernetes102408_kubelets_own_loop_device_is_named(node: Node, moment: str) -> None:
    """Kubelet binds a loop device to what it mounted of a block volume's target, and may leave it."""
    node.create(capability=BLOCK)
    node.stage(capability=BLOCK)
    target = node.publish(capability=BLOCK)
    kubelets = node.folder / "volumeDevices" / "dev" / "uid"
    kubelets.parent.mkdir(parents=True)
    kubelets.touch()
    run("mount", "--bind", target, kubelets)
    loop = run("losetup", "--find", "--show", kubelets)
    run("umount", "--lazy", kubelets)
    if moment == "published":
        with pytest.raises(FailedPrecondition, match=said_first_of(target)):
            node.unstage()
    node.unpublish()
    with pytest.raises(FailedPrecondition, match=rf"{loop}\b"):
        node.unstage()
    assert node.mapping()
    run("losetup", "--detach", loop)
    node.unstage()
    assert node.closed()


@not_on("given", "rbd")
@kinds
@encrypted_or_plain
def test_kubernetes85476_a_volume_that_nobody_uses_is_unstaged_by_its_deletion(
    node: Node, capability: Capability, parameters: Mapping[str, str]
) -> None:
    """Kubelet died between unpublish and unstage and forgot the volume: no unstage comes any more."""
    node.create(parameters=parameters, capability=capability)
    node.stage(capability=capability)
    node.publish(capability=capability)
    node.unpublish()
    node.delete()
    assert node.closed()
    assert not node.disk().exists()
    node.delete()
    node.unstage()


def keeps_its_key(record: VolumeRecord) -> bool:
    """Whether the volume key lies in root's user keyring."""
    assert record.luks is not None
    return keyring.find_user(volume_key_name(record.luks.uuid)) is not None


def cut_before_the_mapping_goes(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unstage as a kill leaves it that comes when the mapping is about to be removed."""

    def is_killed(*_: object) -> None:
        raise CommandFailed("killed here")

    with monkeypatch.context() as planted:
        planted.setattr(DeviceMapper, "remove", is_killed)
        with pytest.raises(CommandFailed, match="killed here"):
            node.unstage()


def test_no_key_outlives_its_mapping_where_a_kill_comes_between(used: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storm of 2026-11: a mapping that is left is found by its name, a key that is left by nobody."""
    used.stage()
    record = used.record()
    assert keeps_its_key(record)
    cut_before_the_mapping_goes(used, monkeypatch)
    assert used.mapping()
    assert not keeps_its_key(record)
    used.unstage()
    assert used.closed()


def test_a_block_volume_whose_unstage_was_cut_is_opened_anew(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it could not grow in its next pod, for want of the key."""
    node.create(capability=BLOCK)
    node.stage(capability=BLOCK)
    cut_before_the_mapping_goes(node, monkeypatch)
    node.stage(capability=BLOCK)
    assert keeps_its_key(node.record())
    node.unstage()


def test_a_published_block_volume_that_has_lost_its_key_is_not_opened_anew(node: Node) -> None:
    """A pod that has it published and not open would have a node of another device, or of none."""
    node.create(capability=BLOCK)
    node.stage(capability=BLOCK)
    target = node.publish(capability=BLOCK)
    put(target, b"the first volume")
    before = node.mapping()
    identity = node.record().luks
    assert identity is not None
    keyring.unlink_all(key_prefix(identity.uuid))
    node.stage(capability=BLOCK)
    node.stage(capability=BLOCK, secret={"CRYPTO_KEY_VALUE": "wrong"})
    assert node.mapping() == before
    assert content_of(target) == b"the first volume"
    node.unpublish()
    node.unstage()


def test_the_key_of_a_mapping_that_is_in_use_stays(node: Node) -> None:
    """It is what lets the volume grow."""
    node.create(capability=BLOCK)
    node.stage(capability=BLOCK)
    record = node.record()
    with open(node.open_mapping().path, "rb"), pytest.raises(DeviceInUse):
        node.unstage()
    assert keeps_its_key(record)
    node.unstage()
    assert not keeps_its_key(record)


@not_on("given", "rbd")
def test_a_deletion_ends_an_unstage_that_was_cut_when_the_mapping_was_closed(used: Node) -> None:
    """By a kill, or by hand: what is left is a record of the stage, and the key."""
    used.stage()
    record = used.record()
    run("umount", used.staging_path())
    run("dmsetup", "remove", "--noudevsync", "--retry", used.open_mapping().name)
    assert keeps_its_key(record)
    used.delete()
    assert not keeps_its_key(record)


@encrypted_or_plain
def test_kubernetes85476_a_volume_that_a_process_uses_is_not_deleted(node: Node, parameters: Mapping[str, str]) -> None:
    node.create(parameters=parameters)
    node.stage()
    node.write()
    with sleeping_in(node.staging_path()) as holder:
        with pytest.raises(FailedPrecondition, match=rf"process {holder} \("):
            node.delete()
        assert node.disk().exists()
        assert node.is_mounted()
        assert node.read() == "precious"
    node.unstage()
    node.delete()


def test_a_btrfs_is_known_by_any_of_its_mounts_that_can_be_asked(node: Node) -> None:
    """The first one may lie below another mount: what is seen at its path is not it."""
    node.create(size=256 * MIB, capability=BTRFS)
    node.stage(capability=BTRFS)
    target = node.publish(capability=BTRFS)
    run("mount", "--make-private", node.staging_path())  # else the other place would have it too
    run("mount", "-t", "tmpfs", "over-it", node.staging_path())
    try:
        with pytest.raises(DeviceInUse, match=rf"volume {VOLUME} is still published at .*{re.escape(str(target))}"):
            node.unstage()
    finally:
        run("umount", node.staging_path())
    node.unpublish()
    node.unstage()
    assert node.closed()


@encrypted_or_plain
def test_a_btrfs_is_mounted_from_a_name_that_means_its_device(node: Node, parameters: Mapping[str, str]) -> None:
    """mkfs.btrfs tells the kernel the path it got, and one of a descriptor means another device to the next mkfs."""
    for volume in ("one", "two"):
        node.create(volume, size=256 * MIB, capability=BTRFS, parameters=parameters)
        node.stage(volume, BTRFS)
        found = node.mounts.at(str(node.staging_path(volume)))
        assert found is not None
        assert os.stat(found.source).st_rdev == os.makedev(*(node.presences.of(id_of(volume)).number or (0, 0)))
        assert not found.source.startswith("/proc")
    for volume in ("one", "two"):
        node.unstage(volume)
        node.delete(volume)


@kinds
def test_what_shows_another_volume_is_not_unpublished(node: Node, capability: Capability) -> None:
    for volume in (VOLUME, OTHER):
        node.create(volume, capability=capability)
        node.stage(volume, capability)
    target = node.publish(OTHER, capability)
    places = [target] if capability.block else [target, node.staging_path(OTHER)]
    for place in places:
        with pytest.raises(FailedPrecondition, match=rf"{VOLUME} .*{re.escape(str(place))}.*luks-{OTHER} of another"):
            node.unpublish(target=place)
        assert node.mounts.at(str(place))
    node.unpublish(OTHER, target=target)
    for volume in (VOLUME, OTHER):
        node.unstage(volume)
        node.delete(volume)
