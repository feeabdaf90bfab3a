"""Mounts of the kernel: file systems on loop devices, bind mounts, propagation, what keeps them busy."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.host.holders import Holders, describe
from csi_driver.host.loop import AttachedLoop, LoopDevices
from csi_driver.host.mountoptions import parse_options
from csi_driver.host.mounts import Mounts
from csi_driver.model.errors import CommandFailed, DeviceAbsent, DeviceInUse, FailedPrecondition, NotFound
from tests.handles import bind_path, mount_path, mount_tmpfs
from tests.machine import kernel

MIB = 1 << 20
OPTIONS = {
    "ext4": ["nosuid", "noatime", "commit=7", "errors=remount-ro", "discard", "data=ordered", "barrier=1"],
    "xfs": ["nodev", "nouuid", "inode64", "logbufs=8", "logbsize=256k", "allocsize=1m", "discard"],
    "btrfs": ["noexec", "compress=zstd:3", "space_cache=v2", "ssd", "autodefrag", "commit=7", "discard=async"],
}
MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}


@pytest.fixture
def mounts() -> Iterator[Mounts]:
    found = Mounts()
    before = kernel.mounts()
    yield found
    assert kernel.mounts() == before, "a mount is left over"


@pytest.fixture
def device(tmp_path: Path) -> Iterator[AttachedLoop]:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(320 * MIB)
    with LoopDevices().attach(str(image), autoclear=True) as loop:
        yield loop
    # pytest keeps the folders of past tests, and /tmp may be memory.
    image.unlink()


@pytest.fixture
def point(tmp_path: Path) -> Path:
    path = tmp_path / "a mount\\point"
    path.mkdir()
    return path


@pytest.fixture
def mounted(device: AttachedLoop, point: Path, mounts: Mounts) -> Iterator[Path]:
    subprocess.run([*MKFS["ext4"], device.name], check=True)
    mounts.mount(device, str(point), "ext4", 0, "")
    yield point
    mounts.unmount(str(point))


def unmount_when_idle(mounts: Mounts, path: Path) -> None:
    """An open that is refused keeps the mount busy while it is being refused."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return mounts.unmount(str(path))
        except DeviceInUse:
            assert time.monotonic() < deadline


@pytest.mark.parametrize("fs_type", OPTIONS)
def test_a_file_system_is_mounted_with_all_its_options(
    device: AttachedLoop, point: Path, mounts: Mounts, fs_type: str
) -> None:
    subprocess.run([*MKFS[fs_type], device.name], check=True)
    options = parse_options(OPTIONS[fs_type], fs_type)
    assert mounts.at(str(point)) is None
    mounts.mount(device, str(point), fs_type, options.flags, options.data)
    try:
        found = mounts.at(str(point))
        assert found is not None
        assert (found.source, found.fs_type, found.mount_point) == (device.name, fs_type, str(point))
        assert OPTIONS[fs_type][0] in found.options
        assert "rw" in found.options
        assert mounts.table().of_device(device.number) == [found]
        (point / "file").write_text("content")
    finally:
        mounts.unmount(str(point))
    assert mounts.at(str(point)) is None
    mounts.unmount(str(point))


def test_a_blank_device_is_refused_with_what_to_do(device: AttachedLoop, point: Path, mounts: Mounts) -> None:
    with pytest.raises(FailedPrecondition, match=rf"{device.name} .*EINVAL.*no ext4 .*, and run `mend it` if"):
        mounts.mount(device, str(point), "ext4", 0, "", "`mend it`")


def test_a_damaged_file_system_is_refused_with_what_to_do(device: AttachedLoop, point: Path, mounts: Mounts) -> None:
    subprocess.run([*MKFS["xfs"], device.name], check=True)
    # The checksum of the super block is at 224 (XFS on-disk format).
    os.pwrite(device.fd, b"\xff\xff\xff\xff", 224)
    os.fsync(device.fd)
    with pytest.raises(FailedPrecondition, match=r"xfs file system is damaged: back the volume up and run `mend it`$"):
        mounts.mount(device, str(point), "xfs", 0, "", "`mend it`")


def test_what_is_missing_is_named(device: AttachedLoop, point: Path, mounts: Mounts) -> None:
    with pytest.raises(NotFound, match="/nowhere is missing"):
        mounts.mount(device, f"{point}/nowhere", "ext4", 0, "")
    with pytest.raises(FailedPrecondition, match="does not know nofs: load its module"):
        mounts.mount(device, str(point), "nofs", 0, "")
    with pytest.raises(DeviceAbsent, match="there is no block device"):
        mount_path(mounts, str(point), str(point), "ext4")


def test_options_that_the_kernel_refuses_are_told(mounted: Path, device: AttachedLoop, mounts: Mounts) -> None:
    with pytest.raises(FailedPrecondition, match="refused the options 'nonsense=1'"):
        mounts.mount(device, str(mounted), "xfs", 0, "nonsense=1")


def test_a_bind_mount_shows_the_same_file_system(mounted: Path, tmp_path: Path, mounts: Mounts) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (mounted / "file").write_text("content")
    bind_path(mounts, str(mounted), str(target), read_only=False)
    try:
        assert (target / "file").read_text() == "content"
        (target / "file").write_text("more")
        upper, lower = mounts.at(str(target)), mounts.at(str(mounted))
        assert upper is not None
        assert lower is not None
        assert upper.device == lower.device
        assert "rw" in upper.options
    finally:
        mounts.unmount(str(target))
    assert (mounted / "file").read_text() == "more"


def test_a_read_only_bind_mount_leaves_the_source_writable(mounted: Path, tmp_path: Path, mounts: Mounts) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (mounted / "file").write_text("content")
    bind_path(mounts, str(mounted), str(target), read_only=True)
    try:
        with pytest.raises(OSError, match="Read-only file system"):
            (target / "file").write_text("more")
        (mounted / "file").write_text("more")
        found = mounts.at(str(target))
        assert found is not None
        assert "ro" in found.options
        assert "rw" in found.super_options
    finally:
        mounts.unmount(str(target))


def test_a_read_only_bind_mount_is_never_writable(mounted: Path, tmp_path: Path, mounts: Mounts) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (mounted / "file").touch()
    done = threading.Event()
    writes: list[str] = []

    def write() -> None:
        while not done.is_set():
            try:
                os.close(os.open(target / "file", os.O_WRONLY))
                writes.append("opened")
            except OSError as error:
                writes.append(type(error).__name__ if isinstance(error, FileNotFoundError) else "refused")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        deadline = time.monotonic() + 20
        while writes.count("refused") < 50:
            assert time.monotonic() < deadline, "the writer never met the mount"
            bind_path(mounts, str(mounted), str(target), read_only=True)
            unmount_when_idle(mounts, target)
    finally:
        done.set()
        writer.join(30)
        unmount_when_idle(mounts, target)
    assert "opened" not in writes


@pytest.mark.parametrize("read_only", [False, True])
def test_a_block_device_is_bound_onto_a_file(
    device: AttachedLoop, tmp_path: Path, mounts: Mounts, *, read_only: bool
) -> None:
    target = tmp_path / "block"
    target.touch()
    bind_path(mounts, device.name, str(target), read_only=read_only)
    try:
        assert os.stat(target).st_rdev == os.makedev(device.major, device.minor)
        found = mounts.at(str(target))
        assert found is not None
        assert found.root == f"/{Path(device.name).name}"
    finally:
        mounts.unmount(str(target))
    assert target.is_file()


def test_a_folder_is_not_bound_onto_a_file(mounted: Path, tmp_path: Path, mounts: Mounts) -> None:
    (tmp_path / "file").touch()
    for read_only in (False, True):
        with pytest.raises(NotFound, match="both as folders or both as files"):
            bind_path(mounts, str(mounted), str(tmp_path / "file"), read_only=read_only)


def test_of_stacked_mounts_the_upper_is_seen_and_ended_first(mounted: Path, mounts: Mounts) -> None:
    below = mounts.at(str(mounted))
    mount_tmpfs(mounted)
    upper = mounts.at(str(mounted))
    assert upper is not None
    assert upper.fs_type == "tmpfs"
    mounts.unmount(str(mounted))
    assert mounts.at(str(mounted)) == below


def test_links_above_a_mount_point_are_followed_and_one_at_its_end_is_not(
    mounted: Path, tmp_path: Path, mounts: Mounts
) -> None:
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(mounted)
    found = mounts.at(f"{tmp_path}/folder/{mounted.name}")
    assert found is not None
    assert found.mount_point == str(mounted)
    assert mounts.at(f"{tmp_path}/link") is None
    mounts.unmount(f"{tmp_path}/link")
    assert mounts.at(str(mounted)) == found


def test_a_busy_mount_is_not_ended_and_its_user_is_found(mounted: Path, device: AttachedLoop, mounts: Mounts) -> None:
    code = "import os, sys; os.chdir(sys.argv[1]); print(flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", code, str(mounted)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(DeviceInUse, match=r"could not be unmounted: EBUSY"):
            mounts.unmount(str(mounted))
        holders = Holders().of_mount((device.major, device.minor))
        assert [holder.pid for holder in holders] == [child.pid]
        assert f"uses {mounted} as cwd" in describe(holders)
    assert mounts.at(str(mounted)) is not None


@pytest.mark.parametrize("fs_type", MKFS)
def test_a_file_in_it_that_is_open_names_its_process(
    device: AttachedLoop, point: Path, mounts: Mounts, fs_type: str
) -> None:
    subprocess.run([*MKFS[fs_type], device.name], check=True)
    mounts.mount(device, str(point), fs_type, 0, "")
    try:
        with (point / "file").open("wb") as file:
            holders = Holders().of_mount((device.major, device.minor))
            assert [holder.pid for holder in holders] == [os.getpid()]
            assert f"uses {point}/file as fd/{file.fileno()}" in describe(holders)
    finally:
        mounts.unmount(str(point))


def test_a_file_that_is_mapped_only_names_its_process(mounted: Path, device: AttachedLoop) -> None:
    (mounted / "file").write_bytes(bytes(4096))
    code = (
        "import mmap, sys; file = open(sys.argv[1], 'r+b'); area = mmap.mmap(file.fileno(), 0)\n"
        # The map of Python keeps a descriptor of its own.
        "import os; os.closerange(3, 20); print(flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(mounted / "file")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        holders = Holders().of_mount((device.major, device.minor))
        assert [(holder.pid, holder.what) for holder in holders] == [(child.pid, "has a file in it mapped into memory")]


def test_a_loop_device_on_a_file_in_it_is_named(mounted: Path, device: AttachedLoop) -> None:
    (mounted / "inner.img").write_bytes(bytes(MIB))
    with LoopDevices().attach(str(mounted / "inner.img"), autoclear=True) as inner:
        text = describe(Holders().of_mount((device.major, device.minor)))
        assert f"loop device {inner.name} is bound to {mounted}/inner.img" in text


@pytest.mark.parametrize("fs_type", MKFS)
def test_another_mount_namespace_is_named(device: AttachedLoop, point: Path, mounts: Mounts, fs_type: str) -> None:
    subprocess.run([*MKFS[fs_type], device.name], check=True)
    mounts.mount(device, str(point), fs_type, 0, "")
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; read line"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            mounts.unmount(str(point))
            assert mounts.table().of_device(device.number) == []
            for holders in (
                Holders().of_mount((device.major, device.minor)),
                [holder for holder in Holders().of_device(device.major, device.minor) if holder.pid != os.getpid()],
            ):
                assert [holder.pid for holder in holders] == [child.pid]
                assert f"has it mounted at {point} in mount namespace mnt:[" in describe(holders)
        finally:
            child.communicate(b"\n", timeout=120)
    assert Holders().of_mount((device.major, device.minor)) == []


def test_an_open_device_names_its_process(device: AttachedLoop) -> None:
    text = describe(Holders().of_device(device.major, device.minor))
    assert f"process {os.getpid()} (" in text
    assert f"has {device.name} open as fd/{device.fd}" in text


def test_swap_on_a_device_is_named(device: AttachedLoop) -> None:
    subprocess.run(["mkswap", "-q", device.name], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if subprocess.run(["swapon", device.name], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this kernel has no swap")
    try:
        assert f"it is used as swap ({device.name})" in describe(Holders().of_device(device.major, device.minor))
    finally:
        subprocess.run(["swapoff", device.name], check=True)


def test_propagation_is_told(point: Path, mounts: Mounts) -> None:
    mount_tmpfs(point)
    try:
        changes = {
            "--make-private": "private",
            "--make-shared": "shared",
            # A slave whose group has no other member is private.
            "--make-slave": "private",
            "--make-unbindable": "unbindable",
        }
        for change, expected in changes.items():
            subprocess.run(["mount", change, str(point)], check=True)
            assert mounts.propagation(str(point / "below")) == expected
    finally:
        mounts.unmount(str(point))


def test_unmounting_a_folder_that_is_no_mount_is_fine_and_other_failures_are_not(point: Path, mounts: Mounts) -> None:
    mounts.unmount(str(point))
    with pytest.raises(CommandFailed, match="ENAMETOOLONG"):
        mounts.unmount("/" + "n" * 5000)
