"""device-mapper of the kernel, without udev and without dmsetup."""

import contextlib
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.host import blockdev, keyring
from csi_driver.host.devicemapper import Device, DeviceMapper, Target
from csi_driver.host.dmcontrol import Command, call
from csi_driver.host.holders import Holders, describe
from csi_driver.host.loop import AttachedLoop, LoopDevices
from csi_driver.model.errors import DeviceAbsent, DeviceInUse, FailedPrecondition, MappingMismatch
from tests.machine.kernel import suspend
from tests.machine.udev import settle

MIB = 1 << 20
SECTORS = 2048  # of one MiB
NAME = "luks-test-volume"
UUID = "CRYPT-LUKS2-00000000000000000000000000000000-luks-test-volume"
KEY = "0123456789abcdef" * 4


@pytest.fixture
def mapper() -> Iterator[DeviceMapper]:
    mapper = DeviceMapper()
    settle()  # what is removed late would be this test's name
    before = mapper.names()
    nodes = sorted(os.listdir("/dev/mapper"))
    yield mapper
    for name in set(mapper.names()) - set(before):
        mapper.resume(name)
        mapper.remove(name)
    settle()
    assert sorted(os.listdir("/dev/mapper")) == nodes


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[AttachedLoop]:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    with LoopDevices().attach(str(image), autoclear=True) as loop:
        yield loop
    # pytest keeps the folders of past tests, and /tmp may be memory.
    image.unlink()


def linear(loop: AttachedLoop, length: int = 8 * SECTORS, offset: int = 0) -> Target:
    return Target(0, length, "linear", f"{loop.major}:{loop.minor} {offset}")


def write(device: Device, content: bytes, offset: int = 0) -> None:
    descriptor = os.open(device.path, os.O_WRONLY | os.O_SYNC)
    try:
        os.pwrite(descriptor, content, offset)
    finally:
        os.close(descriptor)


def test_a_mapping_is_created_seen_and_removed(mapper: DeviceMapper, loop: AttachedLoop) -> None:
    device = mapper.create(NAME, UUID, [linear(loop)])
    assert device == mapper.get(NAME)
    assert (device.name, device.uuid) == (NAME, UUID)
    assert device.targets == (linear(loop),)
    assert device.backing == ((loop.major, loop.minor),)
    assert device.size_bytes == blockdev.size_bytes(device.path) == 8 * MIB
    assert (device.suspended, device.read_only, device.open_count) == (False, False, 0)
    assert blockdev.device_number(device.path) == (device.major, device.minor)
    assert stat.S_IMODE(os.stat(device.path).st_mode) == 0o600
    assert NAME in mapper.names()
    write(device, b"pattern")
    assert Path(loop.info.backing_path).read_bytes()[:7] == b"pattern"
    mapper.remove(NAME)
    assert mapper.get(NAME) is None
    assert not os.path.lexists(device.path)
    mapper.remove(NAME)


def test_a_handle_holds_the_device_that_has_the_name(mapper: DeviceMapper, loop: AttachedLoop) -> None:
    device = mapper.create(NAME, UUID, [linear(loop)])
    write(device, b"content")
    with mapper.open(NAME) as handle:
        assert (str(handle), handle.number) == (device.path, (device.major, device.minor))
        assert (handle.device.uuid, handle.device.open_count) == (UUID, 1)
        assert not os.get_inheritable(handle.fd)
        assert os.pread(handle.fd, 7, 0) == b"content"
        with open(handle, "r+b", buffering=0) as file:
            file.write(bytes(512))
        with pytest.raises(DeviceInUse):
            mapper.remove(NAME)
    handle.close()
    mapper.remove(NAME)
    with pytest.raises(DeviceAbsent, match=f"mapping {NAME} is not there"):
        mapper.open(NAME)


def test_a_mapping_is_opened_and_named_anew_whatever_its_name_leads_to(
    mapper: DeviceMapper, loop: AttachedLoop, tmp_path: Path
) -> None:
    """A late event of udev takes the name away; on a host without one another device's may be left there."""
    device = mapper.create(NAME, UUID, [linear(loop, 8)])
    write(device, b"content")
    other = mapper.create("other", "", [linear(loop, 8, 8)])
    (tmp_path / "file").write_bytes(b"foreign" * 100)
    path = Path("/dev/mapper", NAME)
    for wrong in ("absent", f"/dev/dm-{other.minor}", str(tmp_path / "file"), "/dev/null"):
        path.unlink()
        if wrong != "absent":
            path.symlink_to(wrong)
        with mapper.open(NAME) as handle:
            assert os.pread(handle.fd, 7, 0) == b"content"
        mapper.resume(NAME)
        assert blockdev.device_number(str(path)) == (device.major, device.minor)


def test_what_is_open_is_what_its_handle_says_while_names_and_numbers_change_hands(
    mapper: DeviceMapper, loop: AttachedLoop
) -> None:
    rounds = 100
    with open(loop.path, "r+b", buffering=0) as disk:
        for number in range(rounds):
            os.pwrite(disk.fileno(), number.to_bytes(2, "little") + bytes(510), number * 4096)
        os.fsync(disk.fileno())
    ended, seen = threading.Event(), threading.Event()

    def change() -> None:
        """Two names that swap two numbers, and never the same content; the last ones stay until one was opened."""
        try:
            for number in range(rounds):
                for name in (NAME, "other")[:: 1 - number % 2 * 2]:
                    mapper.create(name, f"{name}-{number}", [linear(loop, 8, number * 8)])
                if number == rounds - 1:
                    seen.wait(60)
                for name in (NAME, "other"):
                    while True:
                        with contextlib.suppress(DeviceInUse):
                            mapper.remove(name)
                            break
        finally:
            ended.set()

    changer = threading.Thread(target=change)
    changer.start()
    opened = set()
    while not ended.is_set():
        with contextlib.suppress(DeviceAbsent), mapper.open(NAME) as handle:
            content = int.from_bytes(os.pread(handle.fd, 2, 0), "little")
            assert handle.device.uuid == f"{NAME}-{content}"
            opened.add(content)
            seen.set()
    changer.join()
    assert opened


def test_without_the_kernels_node_the_name_is_a_node(mapper: DeviceMapper, loop: AttachedLoop) -> None:
    """As where /dev is a container's own."""
    device = mapper.create(NAME, UUID, [linear(loop)])
    node, hidden = f"/dev/dm-{device.minor}", f"/dev/dm-{device.minor}.hidden"
    assert os.readlink(device.path) == f"../dm-{device.minor}"
    os.rename(node, hidden)
    try:
        for _ in range(2):
            with mapper.open(NAME) as handle:
                assert os.fstat(handle.fd).st_rdev == os.makedev(device.major, device.minor)
            assert stat.S_ISBLK(os.lstat(device.path).st_mode)
        # Another device's number, too, is no reason to take it.
        os.symlink("null", node)
        with mapper.open(NAME) as handle:
            assert os.fstat(handle.fd).st_rdev == os.makedev(device.major, device.minor)
    finally:
        os.rename(hidden, node)
    mapper.remove(NAME)
    assert not os.path.lexists(device.path)


def test_a_mapping_that_goes_while_it_is_opened_leaves_no_name(
    mapper: DeviceMapper, loop: AttachedLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that stayed would lead to whatever mapping gets the number next."""
    mapper.create(NAME, UUID, [linear(loop)])
    real = mapper.get

    def gone(name: str) -> Device | None:
        found = real(name)
        if found is not None:
            mapper.remove(NAME)
        return found

    monkeypatch.setattr(mapper, "get", gone)
    with pytest.raises(DeviceAbsent), mapper.open(NAME):
        pass
    assert not os.path.lexists(f"/dev/mapper/{NAME}")


def test_a_read_only_mapping_cannot_be_written(mapper: DeviceMapper, loop: AttachedLoop) -> None:
    device = mapper.create(NAME, UUID, [linear(loop)], read_only=True)
    assert device.read_only
    with open(device.path, "r+b", buffering=0) as file, pytest.raises(PermissionError):
        file.write(bytes(512))
    mapper.reload(NAME, [linear(loop, 4 * SECTORS)])
    again = mapper.get(NAME)
    assert again is not None
    assert again.read_only


def test_a_taken_name_or_uuid_is_refused_and_the_first_stays(mapper: DeviceMapper, loop: AttachedLoop) -> None:
    first = mapper.create(NAME, UUID, [linear(loop)])
    with pytest.raises(MappingMismatch, match=f"name {NAME} or its UUID"):
        mapper.create(NAME, "other", [linear(loop)])
    with pytest.raises(MappingMismatch, match="other-name or its UUID"):
        mapper.create("other-name", UUID, [linear(loop)])
    assert mapper.get(NAME) == first
    assert mapper.get("other-name") is None


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target(0, 8, "no-such-target", ""), "it knows no-such-target"),
        (Target(0, 8, "linear", "4095:1048575 0"), "device below is absent|log says why"),
        (Target(0, 1 << 30, "linear", "{loop} 0"), "log says why"),
        (Target(0, 8, "linear", "nonsense"), "log says why"),
        (Target(0, 8, "crypt", "aes-xts-plain64 :64:logon:absent 0 {loop} 0"), "volume key is not in this thread"),
    ],
)
def test_a_table_that_is_refused_leaves_nothing(
    mapper: DeviceMapper, loop: AttachedLoop, target: Target, words: str
) -> None:
    wrong = Target(0, target.length, target.type, target.params.format(loop=f"{loop.major}:{loop.minor}"))
    with pytest.raises(FailedPrecondition, match=rf"load a table into {NAME} .*({words})"):
        mapper.create(NAME, UUID, [wrong])
    assert mapper.get(NAME) is None
    assert not os.path.lexists(f"/dev/mapper/{NAME}")

    first = mapper.create(NAME, UUID, [linear(loop)])
    with pytest.raises(FailedPrecondition, match=rf"({words})"):
        mapper.reload(NAME, [wrong])
    assert mapper.get(NAME) == first
    write(first, b"still alive")
    # An inactive table would become live here.
    suspend(NAME)
    mapper.resume(NAME)
    assert mapper.get(NAME) == first


def test_a_failing_load_shows_no_key(mapper: DeviceMapper) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        mapper.create(NAME, UUID, [Target(0, 8, "crypt", f"aes-xts-plain64 {KEY} 0 4095:1048575 0")])
    assert KEY not in f"{caught.value}{caught.value.__cause__}{caught.value.__context__}"


def test_a_reload_grows_an_open_device(mapper: DeviceMapper, loop: AttachedLoop) -> None:
    device = mapper.create(NAME, UUID, [linear(loop, 4 * SECTORS)])
    with open(device.path, "rb") as user:
        assert blockdev.size_bytes(user.fileno()) == 4 * MIB
        mapper.reload(NAME, [linear(loop, 12 * SECTORS)])
        assert blockdev.size_bytes(user.fileno()) == 12 * MIB
        grown = mapper.get(NAME)
        assert grown is not None
        assert (grown.size_bytes, grown.suspended, grown.open_count) == (12 * MIB, False, 1)
    write(grown, b"end", 12 * MIB - 3)


def test_a_reload_of_an_absent_mapping_says_so(mapper: DeviceMapper, loop: AttachedLoop) -> None:
    with pytest.raises(FailedPrecondition, match=rf"{NAME} is not there"):
        mapper.reload(NAME, [linear(loop)])
    with pytest.raises(FailedPrecondition, match=rf"{NAME}: ENXIO.* is not there"):
        mapper.resume(NAME)


def test_a_suspended_device_holds_writes_and_its_writer_is_told_to_be_stuck(
    mapper: DeviceMapper, loop: AttachedLoop
) -> None:
    device = mapper.create(NAME, UUID, [linear(loop)])
    suspend(NAME)
    suspended = mapper.get(NAME)
    assert suspended is not None
    assert suspended.suspended
    code = "import os, sys; d = os.open(sys.argv[1], os.O_WRONLY | os.O_SYNC); os.write(d, b'x' * 4096)"
    with subprocess.Popen([sys.executable, "-c", code, device.path]) as writer:
        try:
            deadline = time.monotonic() + 20
            while "state D" not in (text := describe(Holders().of_device(device.major, device.minor))):
                assert time.monotonic() < deadline, text
                time.sleep(0.05)
            assert f"process {writer.pid} (" in text
            assert writer.poll() is None
        finally:
            mapper.resume(NAME)
        assert writer.wait(30) == 0
    assert Path(loop.info.backing_path).read_bytes()[:4096] == b"x" * 4096


def test_a_mapping_without_a_table_is_seen_as_empty(mapper: DeviceMapper) -> None:
    call(Command.DEV_CREATE, NAME, uuid=UUID)
    device = mapper.get(NAME)
    assert device is not None
    assert (device.targets, device.size_bytes, device.backing) == ((), 0, ())
    with pytest.raises(DeviceAbsent, match=f"{NAME} has no table; remove it with 'dmsetup remove {NAME}'"):
        mapper.open(NAME)
    mapper.remove(NAME)


def test_an_open_mapping_is_not_removed_and_its_users_are_found(mapper: DeviceMapper, loop: AttachedLoop) -> None:
    device = mapper.create(NAME, UUID, [linear(loop)])
    upper = mapper.create("upper", "", [Target(0, 8, "linear", f"{device.major}:{device.minor} 0")])
    with pytest.raises(DeviceInUse, match=f"mapping {NAME} cannot be removed because it is open"):
        mapper.remove(NAME)
    assert os.path.exists(device.path)
    text = describe(Holders().of_device(device.major, device.minor))
    assert text == f"device /dev/dm-{upper.minor} (upper) is on top of it"
    assert f"device /dev/dm-{device.minor} ({NAME}) is on top" in describe(Holders().of_device(loop.major, loop.minor))
    mapper.remove("upper")
    with open(device.path, "rb") as user:
        with pytest.raises(DeviceInUse):
            mapper.remove(NAME)
        text = describe(Holders().of_device(device.major, device.minor))
        assert f"has /dev/dm-{device.minor} open as fd/{user.fileno()}" in text
    mapper.remove(NAME)


def test_a_loop_device_stays_under_a_mapping_and_goes_with_it(mapper: DeviceMapper, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    loops = LoopDevices()
    with loops.attach(str(image), autoclear=True) as loop:
        mapper.create(NAME, UUID, [linear(loop, 8)])
    assert [info.path for info in loops.find(str(image))] == [loop.name]
    with loops.attach(str(image), autoclear=True) as again:
        assert again.name == loop.name
    mapper.remove(NAME)
    assert loops.find(str(image)) == []


def test_stale_nodes_go_and_other_files_stay(mapper: DeviceMapper, loop: AttachedLoop) -> None:
    path = f"/dev/mapper/{NAME}"

    def node() -> None:
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(253, 77))

    def link() -> None:
        os.symlink("../dm-77", path)

    for make in (node, link):
        make()
        mapper.remove(NAME)
        assert not os.path.lexists(path)
        make()
        device = mapper.create(NAME, UUID, [linear(loop)])
        assert blockdev.device_number(path) == (device.major, device.minor)
        mapper.remove(NAME)
    Path(path).touch()
    try:
        mapper.remove(NAME)
        assert os.path.isfile(path)
    finally:
        os.unlink(path)


def test_answers_larger_than_the_first_buffer_are_whole(mapper: DeviceMapper) -> None:
    targets = [Target(n * 8, 8, "zero" if n % 2 else "error", "") for n in range(500)]
    device = mapper.create(NAME, UUID, targets)
    assert device.targets == tuple(targets)
    names = [f"{n:03}-{'n' * 123}" for n in range(130)]
    for name in names:
        mapper.create(name, "", [Target(0, 8, "error", "")])
    try:
        assert set(names) <= set(mapper.names())
    finally:
        for name in names:
            mapper.remove(name)


def test_a_crypt_mapping_shows_its_device_and_not_its_key(mapper: DeviceMapper, loop: AttachedLoop) -> None:
    target = Target(0, SECTORS, "crypt", f"aes-xts-plain64 {KEY} 0 {loop.major}:{loop.minor} 8")
    device = mapper.create(NAME, UUID, [target])
    assert device.backing == ((loop.major, loop.minor),)
    assert KEY not in repr(device)
    write(device, b"plain" * 100)
    assert b"plain" not in Path(loop.info.backing_path).read_bytes()


def test_a_key_reference_is_reloaded_by_another_thread_through_the_user_keyring(
    mapper: DeviceMapper, loop: AttachedLoop
) -> None:
    description = "cryptsetup:test-d0"
    table = f"aes-xts-plain64 :32:logon:{description} 0 {loop.major}:{loop.minor} 0"
    # A worker opens the device and ends; its key lives on in the user keyring only.
    opener = (
        "import sys; from csi_driver.host import keyring; from csi_driver.host.devicemapper import *\n"
        "from csi_driver.host.syscalls import syscall\n"
        f"syscall('add_key', b'logon', b'{description}', bytes(range(32)), 32, -1)\n"
        f"DeviceMapper().create('{NAME}', '{UUID}', [Target(0, 2048, 'crypt', '{table}')])\n"
        f"keyring.link_to_user('{description}')\n"
    )
    grower = (
        "import sys; from csi_driver.host import keyring; from csi_driver.host.devicemapper import *\n"
        "from csi_driver.host.syscalls import syscall\n"
        "syscall('keyctl', 1, None)\n"  # a session keyring of its own: nothing is inherited
        f"mapper = DeviceMapper(); target = Target(0, 4096, 'crypt', '{table}')\n"
        "try:\n"
        f"    mapper.reload('{NAME}', [target]); sys.exit('grew without the key')\n"
        "except FailedPrecondition as error:\n"
        "    assert 'volume key is not in this thread' in str(error), error\n"
        f"assert keyring.link_into_thread('{description}')\n"
        f"mapper.reload('{NAME}', [target])\n"
    )
    try:
        subprocess.run([sys.executable, "-c", opener], check=True, timeout=60)
        first = mapper.get(NAME)
        assert first is not None
        write(first, b"content" * 100)
        subprocess.run([sys.executable, "-c", grower], check=True, timeout=60)
        grown = mapper.get(NAME)
        assert grown is not None
        assert grown.size_bytes == 2 * MIB
        with open(grown.path, "rb") as file:
            assert file.read(700) == b"content" * 100
        assert keyring.find_user(description) is not None
    finally:
        assert keyring.unlink_from_user(description)
    assert keyring.find_user(description) is None
    assert not keyring.unlink_from_user(description)
