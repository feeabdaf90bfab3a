"""Loop devices of the kernel: bound once, locked, gone when nobody uses them."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.host import blockdev, loopcontrol, ofdlock
from csi_driver.host.holders import Holders, describe
from csi_driver.host.loop import AttachedLoop, LoopDevices
from csi_driver.host.mounts import Mounts
from csi_driver.model.errors import DeviceAbsent, DeviceInUse, DriverError
from tests.handles import bind_path
from tests.machine.kernel import bound_loops

MIB = 1 << 20


@pytest.fixture
def loops() -> Iterator[LoopDevices]:
    devices = LoopDevices()
    before = bound_loops()
    yield devices
    assert bound_loops() == before, "a loop device is left over"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
    return path


def locked(path: Path) -> bool:
    with path.open("rb") as file:
        return ofdlock.is_locked(file.fileno())


def test_a_bound_file_is_found_by_identity_and_gone_with_the_last_handle(loops: LoopDevices, image: Path) -> None:
    with loops.attach(str(image), autoclear=True) as loop:
        status = image.stat()
        info = loop.info
        assert (info.backing_device, info.backing_inode) == (status.st_dev, status.st_ino)
        assert (info.backing_path, info.size_bytes) == (str(image), 8 * MIB)
        assert (info.autoclear, info.read_only) == (True, False)
        assert (loop.major, loop.minor) == blockdev.device_number(loop.name)
        name = Path(loop.name).name
        assert Path(f"/sys/block/{name}/queue/logical_block_size").read_text().strip() == "512"
        link = image.with_name("link")
        os.link(image, link)
        assert loops.find(str(link)) == [info]
        assert loops.info(loop.name) == info
    assert loops.find(str(image)) == []
    assert loops.info(loop.name) is None
    loop.close()
    assert not locked(image)


def test_what_is_written_reaches_the_file(loops: LoopDevices, image: Path) -> None:
    with loops.attach(str(image), autoclear=True) as loop:
        os.pwrite(loop.fd, b"pattern" * 100, 4096)
        blockdev.fsync_device(loop)
        assert image.read_bytes()[4096 : 4096 + 700] == b"pattern" * 100


def test_the_device_holds_the_lock_for_as_long_as_something_uses_it(loops: LoopDevices, image: Path) -> None:
    loop = loops.attach(str(image), autoclear=True)
    assert locked(image)
    user = os.open(loop.name, os.O_RDONLY)
    loop.close()
    assert locked(image)
    assert [info.path for info in loops.find(str(image))] == [loop.name]
    os.close(user)
    assert not locked(image)


def test_a_second_attach_gives_the_same_device(loops: LoopDevices, image: Path) -> None:
    with loops.attach(str(image), autoclear=True) as first:
        with loops.attach(str(image), autoclear=True) as second:
            assert second.info == first.info
            assert second.fd != first.fd
            os.pwrite(second.fd, b"x", 0)
        assert loops.info(first.name) == first.info


@pytest.mark.parametrize(("autoclear", "read_only"), [(True, True), (False, False)])
def test_other_flags_on_a_bound_file_are_refused(
    loops: LoopDevices, image: Path, *, autoclear: bool, read_only: bool
) -> None:
    with loops.attach(str(image), autoclear=True) as loop:
        with pytest.raises(DeviceInUse, match=f"is bound to {loop.name} and was wanted"):
            loops.attach(str(image), autoclear=autoclear, read_only=read_only)
        assert loops.find(str(image)) == [loop.info]


def test_a_read_only_device_cannot_be_written(loops: LoopDevices, image: Path) -> None:
    with loops.attach(str(image), autoclear=True, read_only=True) as loop:
        assert loop.info.read_only
        with open(loop.name, "r+b", buffering=0) as device, pytest.raises(PermissionError):
            device.write(bytes(512))


def test_a_file_that_losetup_bound_is_refused_by_its_device(loops: LoopDevices, image: Path) -> None:
    foreign = subprocess.run(["losetup", "-f", "--show", str(image)], check=True, capture_output=True, text=True)
    device = foreign.stdout.strip()
    try:
        with pytest.raises(DeviceInUse, match=f"is bound to {device} by somebody else"):
            loops.attach(str(image), autoclear=True)
        assert [info.path for info in loops.find(str(image))] == [device]
        assert not locked(image)
    finally:
        loops.detach(device)


def test_a_file_that_a_process_locked_is_refused_by_its_number(loops: LoopDevices, image: Path) -> None:
    code = (
        "import sys; from csi_driver.host.ofdlock import try_lock\n"
        "f = open(sys.argv[1], 'r+b'); try_lock(f.fileno()); print(flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(image)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(DeviceInUse, match=rf"is locked by .*{child.pid}"):
            loops.attach(str(image), autoclear=True)
        assert loops.find(str(image)) == []


def test_without_autoclear_it_stays_until_it_is_detached(loops: LoopDevices, image: Path) -> None:
    loop = loops.attach(str(image), autoclear=False)
    loop.close()
    assert loops.info(loop.name) == loop.info
    assert locked(image)
    loops.detach(loop.name)
    assert loops.info(loop.name) is None
    assert not locked(image)
    loops.detach(loop.name)


def test_detach_of_a_device_in_use_says_so_and_the_last_close_frees_it(loops: LoopDevices, image: Path) -> None:
    loop = loops.attach(str(image), autoclear=False)
    with loop, pytest.raises(DeviceInUse, match=f"{loop.name} of {image} is still open"):
        loops.detach(loop.name)
    assert loops.find(str(image)) == []


def test_it_grows_with_the_file(loops: LoopDevices, image: Path) -> None:
    with loops.attach(str(image), autoclear=True) as loop:
        os.truncate(image, 12 * MIB + 512)
        assert blockdev.size_bytes(loop.name) == 8 * MIB
        loops.set_capacity(loop)
        assert blockdev.size_bytes(loop.fd) == 12 * MIB + 512
        info = loops.info(loop.name)
        assert info is not None
        assert info.size_bytes == 12 * MIB + 512


def test_an_unbound_device_is_absent(loops: LoopDevices, image: Path) -> None:
    loop = loops.attach(str(image), autoclear=True)
    loop.close()
    with pytest.raises(DeviceAbsent, match="is not bound to a file"):
        loops.open(loop.name)


def test_a_missing_node_is_made(loops: LoopDevices, image: Path) -> None:
    with loops.attach(str(image), autoclear=True) as loop:
        os.unlink(loop.name)
        assert loops.info(loop.name) == loop.info
        assert blockdev.device_number(loop.name) == (loop.major, loop.minor)


def test_many_at_once_get_one_device_for_one_file(loops: LoopDevices, image: Path, tmp_path: Path) -> None:
    others = [tmp_path / f"other-{number}" for number in range(8)]
    for other in others:
        other.write_bytes(bytes(4096))
    handles: list[AttachedLoop] = []
    errors: list[DriverError] = []
    start = threading.Barrier(16)

    def attach(path: Path) -> None:
        start.wait(10)
        try:
            handles.append(loops.attach(str(path), autoclear=True))
        except DriverError as error:
            errors.append(error)

    threads = [threading.Thread(target=attach, args=(path,)) for path in [*others, *[image] * 8]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    try:
        assert errors == []
        assert len(handles) == 16
        assert len({handle.name for handle in handles}) == 9
        assert len(loops.find(str(image))) == 1
    finally:
        for handle in handles:
            handle.close()


def test_a_guarded_file_is_open_to_its_loop_device_alone(loops: LoopDevices, image: Path) -> None:
    with loops.attach(str(image), autoclear=True) as loop:
        loops.guard(str(image))
        for refused in (["losetup", "-f", "--show"], ["truncate", "-s", "0"], ["rm", "-f"]):
            done = subprocess.run([*refused, str(image)], check=False, capture_output=True, text=True, timeout=120)
            assert "Operation not permitted" in done.stderr
        assert loops.find(str(image)) == [loop.info]
        os.pwrite(loop.fd, b"pattern" * 100, 4096)
        blockdev.fsync_device(loop)
        assert image.read_bytes()[4096 : 4096 + 700] == b"pattern" * 100
        loops.unguard(str(image))
        os.truncate(image, 12 * MIB)
        loops.guard(str(image))
        loops.set_capacity(loop)
        assert blockdev.size_bytes(loop.name) == 12 * MIB


def test_a_guard_that_a_power_cut_left_is_in_nobodys_way(loops: LoopDevices, image: Path) -> None:
    loops.attach(str(image), autoclear=True).close()
    loops.guard(str(image))  # bound to nothing: as it is
    with image.open("r+b"):
        pass
    subprocess.run(["chattr", "+a", str(image)], check=True, timeout=120)
    with loops.attach(str(image), autoclear=True) as loop:
        assert not loop.info.read_only
    with image.open("r+b"):
        pass
    for absent in (image.with_name("absent"), image.parent):
        loops.unguard(str(absent))


def test_where_the_file_system_knows_no_guard_a_loop_device_works_without(loops: LoopDevices, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "ramfs", "none", str(tmp_path)], check=True, timeout=120)
    try:
        image = tmp_path / "disk.img"
        image.write_bytes(bytes(MIB))
        with loops.attach(str(image), autoclear=True):
            loops.guard(str(image))
        loops.unguard(str(image))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=120)


def test_a_killed_process_leaves_no_device_and_no_lock(loops: LoopDevices, image: Path) -> None:
    code = (
        "import sys; from csi_driver.host.loop import LoopDevices\n"
        "loop = LoopDevices().attach(sys.argv[1], autoclear=True); print(loop.name, flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(image)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        path = child.stdout.readline().strip()
        assert [info.path for info in loops.find(str(image))] == [path]
        child.send_signal(signal.SIGKILL)
        child.wait(30)
    assert loops.find(str(image)) == []
    assert not locked(image)


def test_an_empty_file_gives_an_empty_device_and_nothing_is_left(loops: LoopDevices, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with loops.attach(str(tmp_path / "empty"), autoclear=True) as loop:
        assert loop.info.size_bytes == 0


def test_on_a_full_read_only_file_system_the_error_has_errno(loops: LoopDevices, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path)], check=True)
    try:
        (tmp_path / "disk.img").write_bytes(bytes(4096))
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        with pytest.raises(DriverError, match=errno.errorcode[errno.EROFS]):
            loops.attach(str(tmp_path / "disk.img"), autoclear=True)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_cryptsetup_is_not_kept_waiting_by_the_lock(loops: LoopDevices, image: Path) -> None:
    key = ["--key-file", "-", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
    big = image.with_name("big.img")
    with big.open("wb") as file:
        file.truncate(32 * MIB)
    subprocess.run(["cryptsetup", "luksFormat", "-q", *key, str(big)], input=b"key", check=True, timeout=60)
    with loops.attach(str(big), autoclear=True):
        dumped = subprocess.run(["cryptsetup", "luksDump", str(big)], check=True, capture_output=True, timeout=120)
    assert b"LUKS header information" in dumped.stdout


def test_a_loop_device_on_a_devices_node_is_its_holder_whatever_its_path_has_become(
    loops: LoopDevices, image: Path, tmp_path: Path
) -> None:
    """Kubelet binds one to a block volume by a mount of the node that later goes."""
    point = tmp_path / "node"
    point.touch()
    with loops.attach(str(image), autoclear=True) as volume:
        bind_path(Mounts(), volume.name, str(point))
        kubelets = subprocess.check_output(["losetup", "--find", "--show", str(point)], text=True).strip()
        try:
            text = describe(Holders().of_device(volume.major, volume.minor))
            assert f"loop device {kubelets} (bound to {point}, as kubelet does for block volumes)" in text
            subprocess.run(["umount", "--lazy", str(point)], check=True)
            text = describe(Holders().of_device(volume.major, volume.minor))
            assert f"loop device {kubelets} (bound to it by a path that is gone, as kubelet does" in text
        finally:
            subprocess.run(["losetup", "--detach", kubelets], check=True)
        assert "loop device" not in describe(Holders().of_device(volume.major, volume.minor))


def test_a_device_that_is_free_and_held_by_somebody_is_passed_over(loops: LoopDevices, image: Path) -> None:
    free = loopcontrol.free_node()
    holder = os.open(free, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    try:
        assert loopcontrol.free_node() == free, "the kernel names a device that nobody can bind"
        with loops.attach(str(image), autoclear=True) as loop:
            assert loop.name != free
    finally:
        os.close(holder)


def test_a_number_that_is_another_files_by_now_is_not_released(loops: LoopDevices, image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    with other.open("wb") as file:
        file.truncate(MIB)
    with loops.attach(str(image), autoclear=True) as found:
        expected = found.info
    with loops.attach(str(other), autoclear=True) as taken:
        assert taken.name == expected.path, "another number was free"
        loops.detach(expected.path, expected)
        assert loops.info(taken.name) == taken.info
