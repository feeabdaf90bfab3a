"""Sick file systems of staged volumes: made well where nobody else is on them, else told with the cure."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from csi_driver.host.ext4 import Superblock, read_superblock
from csi_driver.host.fshealth import Ailment, FileSystemHealth, carries_error_flag
from csi_driver.host.handle import Handle
from csi_driver.host.mountinfo import Mount
from csi_driver.host.mounts import Mounts
from csi_driver.host.patience import within
from csi_driver.model.errors import CommandFailed, DeadlineExceeded, DeviceInUse, DeviceUnreadable, FailedPrecondition
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.publish import PublishRequest
from tests.fake_kernel import Killed
from tests.told_lines import told_lines
from tests.unit.test_staging_model import MIB, MOUNT, Rig, no_fault, one_fault

READ_ONLY = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, mount_flags=("ro",))
CURE = "end the volume's pods .*`luks-csi volume check enc-1 --repair`"


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    """A volume that is staged."""
    rig = Rig(tmp_path)
    rig.create("enc-1")
    rig.stage("enc-1")
    return rig


def staging(rig: Rig, name: str = "enc-1") -> Mount:
    return next(mount for mount in rig.kernel.mounted if mount.mount_point == rig.staging_path(name))


def flag(rig: Rig, name: str = "enc-1", *, broken: bool = False) -> None:
    content = rig.kernel.read(rig.device(name))
    content.inside.flagged, content.inside.broken = True, broken
    rig.kernel.write(rig.device(name), content)
    rig.kernel.ailing[staging(rig, name).device] = Ailment.ERROR_FLAG


def publish_elsewhere(rig: Rig) -> None:
    target = str(rig.folder / "pods" / "second")
    rig.publishing.publish(
        PublishRequest("enc-1", rig.staging_path("enc-1"), target, MOUNT, read_only=False, context={})
    )


@pytest.mark.parametrize("ailment", [Ailment.READ_ONLY, Ailment.SHUT_DOWN])
@pytest.mark.parametrize("call", [Rig.publish, Rig.stage], ids=["publish", "stage"])
def test_it_is_mounted_anew_told_and_counted(rig: Rig, ailment: Ailment, call: Callable[[Rig, str], None]) -> None:
    before = staging(rig)
    rig.kernel.ailing[before.device] = ailment
    with told_lines() as lines:
        call(rig, "enc-1")
    assert staging(rig) is not before
    assert not rig.kernel.ailing
    assert [
        (line.event, line.fields["volume_id"], line.fields["reason"]) for line in lines if "healed" in line.event
    ] == [("a sick file system was healed", "enc-1", str(ailment))]
    assert rig.healing.healed() == 1


def test_a_frozen_one_is_thawed_and_stays_mounted(rig: Rig) -> None:
    before = staging(rig)
    rig.kernel.frozen.add(before.device)
    rig.publish("enc-1")
    assert staging(rig) is before
    assert not rig.kernel.frozen
    assert rig.healing.healed() == 1


def test_a_well_one_is_left_alone(rig: Rig) -> None:
    steps: list[str] = []
    before = staging(rig)
    rig.kernel.plan = steps.append
    rig.publish("enc-1")
    assert staging(rig) is before
    assert steps == ["before bind", "after bind"]
    assert rig.healing.healed() == 0


def test_one_with_its_error_flag_is_checked_and_mended(rig: Rig) -> None:
    flag(rig)
    rig.publish("enc-1")
    assert not rig.kernel.read(rig.device("enc-1")).inside.flagged


def test_before_its_first_mount_too(rig: Rig) -> None:
    flag(rig)
    rig.unstage("enc-1")
    rig.stage("enc-1")
    assert not rig.kernel.read(rig.device("enc-1")).inside.flagged
    assert rig.healing.healed() == 1


def test_one_that_cannot_be_mended_is_told_each_time_and_nothing_is_open_after_a_failed_stage(rig: Rig) -> None:
    flag(rig, broken=True)
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match=rf"enc-1 is damaged .*exit code 4: UNEXPECTED.*{CURE[:20]}"):
            rig.publish("enc-1")
        assert not rig.kernel.mounted, "nothing is mounted that a check has left half mended"
    rig.unstage("enc-1")
    with pytest.raises(FailedPrecondition, match=r"enc-1 is damaged"):
        rig.stage("enc-1")
    assert rig.kernel.traces("enc-1") == []
    assert rig.healing.healed() == 0


def test_one_that_is_mounted_in_another_mount_namespace_is_neither_checked_nor_mounted(rig: Rig) -> None:
    flag(rig)
    number = staging(rig).device
    rig.kernel.elsewhere.add(number)
    steps: list[str] = []
    rig.kernel.plan = steps.append
    for _ in range(2):
        with pytest.raises(DeviceInUse, match=r"volume enc-1 .* kept in use by a user that could not be found; end"):
            rig.publish("enc-1")
    assert "before e2fsck" not in steps
    rig.kernel.elsewhere.clear()
    rig.publish("enc-1")
    assert "before e2fsck" in steps


@pytest.mark.parametrize("staged", [True, False], ids=["at a publish", "at a stage"])
def test_nothing_is_checked_whose_journal_the_storage_does_not_take(rig: Rig, *, staged: bool) -> None:
    flag(rig)
    rig.kernel.takes_no_writes = True
    call = rig.publish
    if not staged:
        rig.unstage("enc-1")
        call = rig.stage
    steps: list[str] = []
    rig.kernel.plan = steps.append
    for _ in range(2):
        with pytest.raises(DeviceUnreadable, match="cannot be replayed"):
            call("enc-1")
    assert "before e2fsck" not in steps
    rig.kernel.takes_no_writes = False
    call("enc-1")
    assert steps.index("after replay_ext4") < steps.index("before e2fsck") < steps.index("before fsync_device")
    assert rig.healing.healed() == 1


def test_a_check_that_takes_too_long_says_what_has_more_time(rig: Rig) -> None:
    def plan(step: str) -> None:
        if step == "before e2fsck":
            raise DeadlineExceeded("e2fsck did not end within 300 s and was killed")

    flag(rig)
    rig.kernel.plan = plan
    with pytest.raises(DeadlineExceeded, match=r"was killed; end the volume's pods, .*enc-1 --repair`, which has more"):
        rig.publish("enc-1")


@pytest.mark.parametrize("ailment", Ailment)
def test_with_another_pod_on_it_the_next_one_is_refused(rig: Rig, ailment: Ailment) -> None:
    rig.publish("enc-1")
    rig.kernel.ailing[staging(rig).device] = ailment
    rig.kernel.frozen.add(staging(rig).device)
    rig.publish("enc-1")  # who has it keeps it
    calls: tuple[Callable[[], None], ...] = (lambda: publish_elsewhere(rig), lambda: rig.stage("enc-1"))
    for call in calls:
        with pytest.raises(FailedPrecondition, match=rf"ext4 .* enc-1 {ailment} and is in use at .*/enc-1; {CURE}"):
            call()
    assert rig.kernel.frozen, "a file system in use is not thawed"
    rig.unpublish("enc-1")
    publish_elsewhere(rig)
    assert rig.healing.healed() == 2, "thawed, and mounted anew"


@pytest.mark.parametrize("kind", ["kill", "fail"])
@pytest.mark.parametrize("name", ["enc-1", "plain-1"])
def test_a_healing_that_is_cut_anywhere_is_gone_on_with_by_the_next_publish(
    tmp_path: Path, name: str, kind: str
) -> None:
    """Kubelet does not stage again what it has seen staged: it asks for the publication alone, for ever."""
    steps: list[str] = []
    sick(tmp_path / "recorded", name, steps.append).publish(name)
    cut_at = steps.index("before bind")
    assert cut_at > 6
    for step in range(cut_at):
        rig = sick(tmp_path / str(step), name, one_fault(kind, step))
        with contextlib.suppress(Killed, CommandFailed):
            rig.publish(name)
        rig.kernel.plan = no_fault
        if kind == "kill":
            rig.restart()
        rig.publish(name)
        assert staging(rig, name).fs_type == "ext4"
        inside = rig.kernel.read(rig.device(name)).inside
        assert (inside.files, inside.flagged) == ({"a": "written"}, False)
        assert rig.guarded(name)
        rig.unpublish(name)
        rig.unstage(name)
        assert rig.kernel.traces(name) == []


def sick(folder: Path, name: str, plan: Callable[[str], None]) -> Rig:
    """A driver that goes by the plan from now on; its volume is staged and carries the error flag."""
    rig = Rig(folder)
    rig.create(name)
    rig.stage(name)
    rig.write(name, "a", "written")
    flag(rig, name)
    rig.kernel.plan = plan
    return rig


def test_a_stage_that_somebody_unmounted_is_mounted_again_and_told(rig: Rig) -> None:
    rig.kernel.mounted.remove(staging(rig))
    with told_lines() as lines:
        rig.publish("enc-1")
    assert staging(rig).fs_type == "ext4"
    assert "a staged volume was not mounted any more" in [line.event for line in lines]


def test_nothing_is_mounted_over_what_has_taken_its_place(rig: Rig) -> None:
    ours = staging(rig)
    rig.kernel.mounted[:] = [msgspec.structs.replace(ours, device=(0, 99), source="stranger")]
    with pytest.raises(FailedPrecondition, match=r"enc-1 is no longer mounted at .*; unstage and stage the volume"):
        rig.publish("enc-1")
    assert [mount.source for mount in rig.kernel.mounted] == ["stranger"]


@pytest.mark.parametrize("ailment", Ailment)
def test_nothing_is_enlarged_on_it(rig: Rig, ailment: Ailment) -> None:
    rig.kernel.ailing[staging(rig).device] = ailment
    with pytest.raises(FailedPrecondition, match=rf"{ailment} and cannot be enlarged; {CURE}"):
        rig.expand("enc-1", 96 * MIB)
    assert rig.kernel.size(rig.device("enc-1")) == 64 * MIB
    rig.publish("enc-1")
    rig.expand("enc-1", 96 * MIB)
    assert rig.kernel.size(rig.device("enc-1")) == 96 * MIB


def test_a_stage_to_be_read_is_left_as_it_is(rig: Rig) -> None:
    flag(rig)
    rig.unstage("enc-1")
    rig.stage("enc-1", READ_ONLY)
    rig.stage("enc-1", READ_ONLY)
    assert rig.kernel.read(rig.device("enc-1")).inside.flagged


# --- what the kernel tells -------------------------------------------------------------------------------------------


def mount_of(fs_type: str = "ext4", *super_options: str) -> Mount:
    device = os.stat("/dev").st_dev
    return Mount(
        1, 1, (os.major(device), os.minor(device)), "/", "/dev", frozenset(), fs_type, "x", frozenset(super_options)
    )


@pytest.mark.parametrize(
    ("options", "ailment"),
    [
        (("ro",), Ailment.READ_ONLY),
        (("rw", "emergency_ro"), Ailment.READ_ONLY),
        (("rw", "shutdown"), Ailment.SHUT_DOWN),
        (("rw",), None),
    ],
)
def test_the_mount_table_tells_of_aborts(options: tuple[str, ...], ailment: Ailment | None) -> None:
    assert FileSystemHealth(Mounts()).ailment(mount_of("btrfs", *options)) is ailment


class HangingMounts(Mounts):
    """The device of what is mounted does not answer: nobody comes back from it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def open(self, mount: Mount) -> Handle:
        self.asked += 1
        read, _ = os.pipe()
        os.read(read, 1)
        raise AssertionError("unreachable")


def test_a_device_that_does_not_answer_holds_up_nobody() -> None:
    mounts = HangingMounts()
    health = FileSystemHealth(mounts)
    assert not health.thaw(mount_of())
    assert health.ailment(mount_of("xfs")) is None
    assert mounts.asked == 2


def test_what_ends_in_time_is_heard() -> None:
    assert within(30, lambda: "said") == "said"


def superblock(
    *, magic: int = 0xEF53, state: int = 1, errors: int = 0, high: int = 0, features: int = 0, log_size: int = 2
) -> bytes:
    block = bytearray(4096)
    for at, length, value in (
        (0x404, 4, 300_000),  # blocks
        (0x418, 4, log_size),  # of 4096 bytes
        (0x438, 2, magic),
        (0x43A, 2, state),
        (0x460, 4, features),
        (0x550, 4, high),
        (0x594, 4, errors),
    ):
        block[at : at + length] = value.to_bytes(length, "little")
    return bytes(block)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (superblock(), Superblock(4096, 300_000, flagged=False)),
        (superblock(state=3), Superblock(4096, 300_000, flagged=True)),
        (superblock(errors=1), Superblock(4096, 300_000, flagged=True)),
        (superblock(high=1), Superblock(4096, 300_000, flagged=False)),
        (superblock(high=1, features=0x80), Superblock(4096, 300_000 + (1 << 32), flagged=False)),
        (superblock(magic=0, state=3), None),
        (superblock(log_size=6), Superblock(65536, 300_000, flagged=False)),
        (superblock(log_size=7), None),
        (superblock(log_size=0xFFFFFFFF), None),
        (b"short", None),
    ],
)
def test_the_superblock_tells_of_size_and_errors(tmp_path: Path, content: bytes, found: Superblock | None) -> None:
    (tmp_path / "device").write_bytes(content)
    with Handle(os.open(tmp_path / "device", os.O_RDONLY), "device") as device:
        assert read_superblock(device) == found
        assert carries_error_flag(device) is (found is not None and found.flagged)


def test_a_device_that_cannot_be_read_carries_no_flag(tmp_path: Path) -> None:
    with Handle(os.open(tmp_path, os.O_RDONLY), "device") as device:
        assert not carries_error_flag(device)


@pytest.mark.parametrize(("count", "ailment"), [("0\n", None), ("3\n", Ailment.ERROR_FLAG)])
def test_sysfs_tells_of_errors_while_it_is_mounted(tmp_path: Path, count: str, ailment: Ailment | None) -> None:
    name = next(entry for entry in sorted(os.listdir("/sys/dev/block")))
    major, minor = map(int, name.split(":"))
    kernel_name = os.path.basename(os.readlink(f"/sys/dev/block/{name}"))
    (tmp_path / kernel_name).mkdir()
    (tmp_path / kernel_name / "errors_count").write_text(count)
    mount = Mount(1, 1, (major, minor), "/", "/x", frozenset(), "ext4", "x", frozenset({"rw"}))
    assert FileSystemHealth(Mounts(), str(tmp_path)).ailment(mount) is ailment
