"""Mapped devices beside a real udev: it leaves their content alone, and its lateness harms and delays nothing.

`python -m tests.machine.guest --udev` has one; elsewhere these are skipped.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.host.devicemapper import DeviceMapper, Target
from csi_driver.host.dmcontrol import Command, UdevFlag, call, format_table
from csi_driver.host.loop import AttachedLoop, LoopDevices
from csi_driver.host.syscalls import udev_is_running
from tests.machine.guest_init import UDEV_LOG
from tests.machine.kernel import suspend
from tests.machine.udev import settle, udevadm

pytestmark = [
    pytest.mark.skipif(not udev_is_running(), reason="no udev runs here: python -m tests.machine.guest --udev"),
    pytest.mark.timeout(1200),  # a device costs the guest's udev a second where the machine is busy
    pytest.mark.usefixtures("folder"),  # first: at the end it looks for what the others left
]

in_guest = pytest.mark.skipif(not os.path.exists(UDEV_LOG), reason="only for a udev that is the guest's own")

MIB = 1 << 20
NAME = "luks-udev-test"
UUID = f"CRYPT-LUKS2-{'0' * 32}-{NAME}"
LABEL = "label-of-a-pod"
FS_UUID = "5eed5eed-0000-4000-8000-00000000feed"
ROUNDS = 50


@pytest.fixture
def mapper() -> Iterator[DeviceMapper]:
    """Removes what the test made."""
    mapper = DeviceMapper()
    before = mapper.names()
    yield mapper
    for name in set(mapper.names()) - set(before):
        mapper.remove(name)
    settle()


@pytest.fixture
def loop(folder: Path) -> Iterator[AttachedLoop]:
    """A disk with a labelled file system from its second MiB on; each MiB from the 64th on begins with its number."""
    disk = folder / "disk"
    with disk.open("wb") as file:
        file.truncate((64 + ROUNDS) * MIB)
        for number in range(ROUNDS):
            os.pwrite(file.fileno(), bytes([number]) * 4096, (64 + number) * MIB)
    subprocess.run(
        ["mkfs.ext4", "-q", "-L", LABEL, "-U", FS_UUID, "-E", f"offset={MIB}", disk, f"{32 * 1024}k"],
        check=True,
        timeout=60,
    )
    with LoopDevices().attach(str(disk), autoclear=True) as loop:
        yield loop
    disk.unlink()


@pytest.fixture
def rules() -> Iterator[Path]:
    """A file for rules that end with the test."""
    file = Path("/run/udev/rules.d/59-luks-csi.rules")
    file.parent.mkdir(exist_ok=True)
    yield file
    file.unlink(missing_ok=True)
    udevadm("control", "--reload")


def at(loop: AttachedLoop, mib: int, length: int = 1) -> Target:
    return Target(0, length * 2048, "linear", f"{loop.major}:{loop.minor} {mib * 2048}")


def seen(major: int, minor: int) -> list[str]:
    """What udev knows of a device's content, and reads of it."""
    settle()
    properties = udevadm("info", "--query=property", f"/dev/dm-{minor}").splitlines()
    found = [line for line in properties if line.startswith(("ID_FS_", "ID_PART_", "SYSTEMD_READY=1"))]
    links = [Path("/dev/disk/by-label", LABEL), Path("/dev/disk/by-uuid", FS_UUID)]
    found += [str(link) for link in links if os.path.lexists(link)]
    if int(Path(f"/sys/dev/block/{major}:{minor}/stat").read_text().split()[0]):
        found.append("reads")
    return found


@contextmanager
def late_udev() -> Iterator[None]:
    """A udev that handles nothing until the end."""
    settle()
    udevadm("control", "--stop-exec-queue")
    try:
        yield
    finally:
        udevadm("control", "--start-exec-queue")
        settle()


def test_what_a_pod_wrote_is_neither_looked_at_nor_linked(mapper: DeviceMapper, loop: AttachedLoop) -> None:
    device = mapper.create(NAME, UUID, [at(loop, 1, 32)])
    assert seen(device.major, device.minor) == []
    assert os.readlink(device.path) == f"../dm-{device.minor}"
    # mkfs in the pod, a package's `udevadm trigger`, a boot, an expansion.
    os.close(os.open(device.path, os.O_RDWR))
    assert seen(device.major, device.minor) == []
    for action in ("change", "add"):
        udevadm("trigger", "--settle", f"--action={action}", f"/dev/dm-{device.minor}")
        assert seen(device.major, device.minor) == []
        assert os.readlink(device.path) == f"../dm-{device.minor}"
    mapper.reload(NAME, [at(loop, 1, 33)])
    assert seen(device.major, device.minor) == []
    suspend(NAME)
    mapper.resume(NAME)
    assert seen(device.major, device.minor) == []
    assert os.readlink(device.path) == f"../dm-{device.minor}"


def test_a_device_whose_content_was_looked_at_is_left_alone_from_the_next_resume_on(
    mapper: DeviceMapper, loop: AttachedLoop
) -> None:
    """The planted fault: without the flags, as libcryptsetup opens devices, the label is a link on the host."""
    call(Command.DEV_CREATE, NAME, uuid=UUID)
    target = at(loop, 1, 32)
    table = format_table([(target.start, target.length, target.type, target.params)])
    call(Command.TABLE_LOAD, NAME, data=table, target_count=1)
    call(Command.DEV_SUSPEND, NAME, udev=UdevFlag.PRIMARY_SOURCE)
    device = mapper.get(NAME)
    assert device is not None
    found = seen(device.major, device.minor)
    assert {f"ID_FS_LABEL={LABEL}", f"/dev/disk/by-label/{LABEL}", f"/dev/disk/by-uuid/{FS_UUID}", "reads"} <= {*found}
    suspend(NAME)
    mapper.resume(NAME)
    assert seen(device.major, device.minor) == ["reads"]


def test_devices_that_come_and_go_quickly_are_the_right_ones(mapper: DeviceMapper, loop: AttachedLoop) -> None:
    """Names and numbers are used again at once, while udev is busy with their last bearers."""
    for number in range(ROUNDS):
        name = f"{NAME}-{number % 3 % 2}"
        device = mapper.create(name, f"{UUID}-{number}", [at(loop, 64 + number)])
        if number == ROUNDS // 2:
            udevadm("trigger", "--action=change", "--subsystem-match=block")
        with mapper.open(name) as handle:
            assert handle.device.uuid == f"{UUID}-{number}"
            assert os.fstat(handle.fd).st_rdev == os.makedev(device.major, device.minor)
            with open(f"/proc/self/fd/{handle.fd}", "rb", buffering=0) as file:
                assert file.read(4096) == bytes([number]) * 4096
        mapper.remove(name)
        assert mapper.get(name) is None
    settle()
    assert [name for name in os.listdir("/dev/mapper") if name.startswith(NAME)] == []


def test_nothing_waits_for_a_udev_that_is_late_and_its_late_events_mislead_nobody(
    mapper: DeviceMapper, loop: AttachedLoop
) -> None:
    with late_udev():
        mapper.create(NAME, UUID, [at(loop, 64)])
        mapper.remove(NAME)
        first = mapper.create("other", "", [at(loop, 65)])
        device = mapper.create(NAME, UUID, [at(loop, 66)])
        assert (first.minor, device.minor) == (first.minor, first.minor + 1)
        assert os.readlink(device.path) == f"../dm-{device.minor}"
        with mapper.open(NAME) as handle:
            assert os.read(handle.fd, 1) == bytes([2])
    for name, found, content in (("other", first, 1), (NAME, device, 2)):
        assert os.readlink(found.path) == f"../dm-{found.minor}"
        with mapper.open(name) as handle:
            assert os.read(handle.fd, 1) == bytes([content])
    with late_udev():
        mapper.remove(NAME)
        mapper.remove("other")
        assert not os.path.lexists(device.path)
    assert not os.path.lexists(device.path)
    assert not os.path.lexists(first.path)


@in_guest
def test_the_rule_in_the_threat_model_keeps_udev_off_an_unencrypted_volume(folder: Path, rules: Path) -> None:
    disk = folder / "plain"
    with disk.open("wb") as file:
        file.truncate(16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-L", LABEL, disk], check=True, timeout=60)
    link = Path("/dev/disk/by-label", LABEL)

    def is_linked() -> bool:
        with LoopDevices().attach(str(disk), autoclear=True):
            settle()
            return os.path.lexists(link)

    assert is_linked()
    settle()
    text = Path("docs/threat-model.md").read_text()
    rule = next(line.strip() for line in text.splitlines() if line.strip().startswith('KERNEL=="loop*"'))
    rules.write_text(rule.replace("/var/lib/luks-csi", str(folder)) + "\n")
    udevadm("control", "--reload")
    assert not is_linked()


@in_guest
def test_udev_has_nothing_to_complain_of(mapper: DeviceMapper, loop: AttachedLoop) -> None:
    def complaints() -> list[str]:
        return [line for line in Path(UDEV_LOG).read_text().splitlines() if line.startswith("dm-")]

    before = len(complaints())
    for number in range(5):
        mapper.create(NAME, UUID, [at(loop, 1, 32)])
        if number % 2:
            settle()
        mapper.reload(NAME, [at(loop, 1, 33)])
        mapper.remove(NAME)
    settle()
    assert complaints()[before:] == []
    # The planted fault: a node of our own where udev wants its link.
    os.mknod("/dev/mapper/in-the-way", 0o600 | 0o060000, os.makedev(1, 0))
    try:
        call(Command.DEV_CREATE, "in-the-way")
        call(Command.TABLE_LOAD, "in-the-way", data=format_table([(0, 8, "error", "")]), target_count=1)
        call(Command.DEV_SUSPEND, "in-the-way", udev=UdevFlag.PRIMARY_SOURCE | UdevFlag.DISABLE_DISK_RULES)
        settle()
        assert any("/dev/mapper/in-the-way" in line for line in complaints())
    finally:
        mapper.remove("in-the-way")
