"""What is odd about a node: left-over flags, links, mounts and folders, no device-mapper, a launcher that was stopped.

Each was seen, in public reports or with this driver; what it is, the tests say.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from csi_driver.host import loopcontrol
from csi_driver.host.commands import Commands, Completed, ProgramFailed
from csi_driver.host.handle import Handle
from csi_driver.host.workers import Workers
from csi_driver.model.errors import FailedPrecondition, NotFound
from csi_driver.rpc.client import CsiClient, RemoteError
from csi_driver.volumes.capability import AccessMode, Capability
from tests.machine.node import BLOCK, CHEAP, EXT4, MIB, MOUNT, NAME, SECRET, SIZE, VOLUME, Node
from tests.machine.places import of_class, only_of_files, server_on, skip_plain_thick
from tests.machine.processes import children_of, has_ended, run, wait_for
from tests.machine.server import ServerProcess

PLAIN: Mapping[str, str] = {}
XFS = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="xfs")
BTRFS = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="btrfs")
READER_BLOCK = Capability(AccessMode.SINGLE_NODE_READER_ONLY, block=True)

encrypted_or_plain = pytest.mark.parametrize("parameters", [CHEAP, PLAIN], ids=["encrypted", "plain"])
kinds = pytest.mark.parametrize("capability", [MOUNT, BLOCK], ids=["mount", "block"])


def file_system_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_blocks * found.f_frsize


@pytest.fixture
def small_host(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system that is smaller than its disk where staging paths are, as the host's own."""
    image, point = folder / "host.img", folder / "stage"

    def mount(fs_type: str) -> Path:
        with image.open("wb") as file:
            file.truncate(400 * MIB)
        make = {"btrfs": ("-q",), "xfs": ("-q",), "ext4": ("-q", "-F")}[fs_type]
        run(f"mkfs.{fs_type}", *make, image)
        with image.open("r+b") as file:
            file.truncate(600 * MIB)
        point.mkdir()
        run("mount", "-o", "loop", image, point)
        return point

    yield mount
    if point.exists():
        subprocess.run(["umount", "--recursive", point], check=True, timeout=120)


@pytest.mark.parametrize(("fs_type", "size"), [("btrfs", 256 * MIB), ("xfs", 304 * MIB), ("ext4", SIZE)])
@encrypted_or_plain
def test_only_the_volumes_own_file_system_grows(
    small_host: Callable[[str], Path], node: Node, fs_type: str, size: int, parameters: Mapping[str, str]
) -> None:
    """Unmounted by hand, the host's file system at the staging path was enlarged, or nothing was, and OK was said."""
    skip_plain_thick(parameters)
    host = small_host(fs_type)
    capability = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type=fs_type)
    node.create(size=size, parameters=parameters, capability=capability)
    node.stage(capability=capability)
    before, own = file_system_bytes(host), file_system_bytes(node.staging_path())
    run("umount", node.staging_path())
    with pytest.raises((FailedPrecondition, NotFound), match=rf"{VOLUME}.*(not staged|not mounted|stage it)"):
        node.expand(size + 64 * MIB)
    assert file_system_bytes(host) == before
    node.stage(capability=capability)
    assert node.expand(size + 64 * MIB) == size + 64 * MIB
    assert file_system_bytes(node.staging_path()) > own
    assert file_system_bytes(host) == before
    node.unstage()


@encrypted_or_plain
def test_a_volume_grows_through_its_staging_path_whatever_else_shows_it(
    node: Node, parameters: Mapping[str, str]
) -> None:
    """The first mount in the kernel's list is a pod's read-only one, by whose name nothing can be enlarged."""
    skip_plain_thick(parameters)
    node.create(parameters=parameters)
    node.stage()
    reader = node.publish(read_only=True)
    assert node.expand(20 * MIB, path=reader) == 20 * MIB
    run("umount", node.staging_path())
    node.stage()
    assert node.expand(32 * MIB) == 32 * MIB
    assert file_system_bytes(reader) == file_system_bytes(node.staging_path()) > 24 * MIB
    node.unpublish()
    node.unstage()


@pytest.fixture
def read_only_loop(folder: Path) -> Iterator[str]:
    """The next free loop device carries the read-only flag of its last user."""
    file = folder / "earlier.img"
    file.write_bytes(bytes(MIB))
    device = run("losetup", "--find", "--show", file)
    run("blockdev", "--setro", device)
    run("losetup", "--detach", device)
    flag = Path("/sys/block", Path(device).name, "ro")
    assert flag.read_text().strip() == "1"
    yield device
    run("blockdev", "--setrw", device)


@only_of_files("loop")
@encrypted_or_plain
@kinds
def test_rawfile_localpv106_a_read_only_flag_of_an_earlier_user_is_taken_off(
    node: Node, read_only_loop: str, parameters: Mapping[str, str], capability: Capability
) -> None:
    node.create(parameters=parameters, capability=capability)
    for _ in range(2):
        node.stage(capability=capability)
        (loop,) = node.loops_of()
        assert loop.path == read_only_loop
        assert not loop.read_only
        target = node.publish(capability=capability)
        with (target if capability.block else target / "file").open("r+b" if capability.block else "wb") as file:
            file.write(b"precious")
            file.flush()
            os.fsync(file.fileno())
        node.unpublish()
        node.unstage()
        run("blockdev", "--setro", read_only_loop)


@only_of_files("files")
def test_a_plain_volume_needs_no_device_mapper(folder: Path) -> None:
    """It could be staged where there is none, and never be put down."""
    hidden = 'mount -t tmpfs none /dev/mapper && exec "$@"'
    program = (
        "unshare", "--mount", "sh", "-c", hidden, "sh", str(Path(sys.executable).with_name("luks-csi")), "serve",
    )  # fmt: skip
    paths = {"mount": EXT4, "block": BLOCK}
    server = ServerProcess(folder, program=program)
    with contextlib.closing(CsiClient(server.endpoint, 60)) as client, contextlib.ExitStack() as undo:
        undo.callback(server.stop)
        server.start(healthy=False)
        for name, capability in paths.items():
            staging_path, target = folder / "stage" / name, folder / "pods" / name
            staging_path.mkdir(parents=True)
            volume = client.create_volume(name, [capability], SIZE)
            for _ in range(2):
                client.stage(volume, staging_path, capability)
                client.publish(volume, staging_path, target, capability)
                assert client.usage(name, target)
                client.unpublish(name, target)
                client.unstage(name, staging_path)
            client.delete_volume(name)
        secret = client.create_volume(NAME, [EXT4], SIZE, parameters=CHEAP, secrets=SECRET)
        (folder / "stage" / VOLUME).mkdir()
        with pytest.raises(RemoteError, match="device-mapper") as refused:
            client.stage(secret, folder / "stage" / VOLUME, EXT4, SECRET)
        assert refused.value.code == "FAILED_PRECONDITION"
        client.unstage(VOLUME, folder / "stage" / VOLUME)
        client.delete_volume(VOLUME)


@kinds
def test_folders_of_the_driver_that_are_gone_are_made_again(node: Node, capability: Capability) -> None:
    """Somebody tidied up below the state directory while the server ran."""

    def lose() -> None:
        for name in ("locks", "stages"):
            shutil.rmtree(node.state / name, ignore_errors=True)  # one that nothing needed is not there yet

    lose()
    node.create(capability=capability)
    lose()
    node.stage(capability=capability)
    node.publish(capability=capability)
    lose()
    node.unpublish()
    lose()
    node.unstage()
    assert node.closed()
    lose()
    node.delete()


def test_a_staged_volume_whose_stage_was_forgotten_can_be_staged_and_used_again(used: Node) -> None:
    used.stage()
    shutil.rmtree(used.state / "stages")
    used.stage()
    assert (used.publish() / "file").read_text() == "precious"
    used.unpublish()
    used.unstage()


def test_blockstor192_a_secret_that_changed_is_told_before_the_reboot(folder: Path) -> None:
    """Kubelet stages again after its restart: that succeeds, and one line warns that no later stage would."""
    staging_path = folder / "stage"
    staging_path.mkdir()
    with server_on(folder) as server, CsiClient(server.endpoint, 60) as client:

        def warnings() -> list[str]:
            lines = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
            found = [line for line in lines if line["level"] == "warning" and line.get("volume_id") == VOLUME]
            return [str(line["event"]) for line in found]

        volume = client.create_volume(NAME, [EXT4], SIZE, parameters=of_class(CHEAP), secrets=SECRET)
        for _ in range(2):
            client.stage(volume, staging_path, EXT4, SECRET)
        client.stage(volume, staging_path, EXT4)  # no secret at all is none that drifted
        assert warnings() == []
        client.stage(volume, staging_path, EXT4, {"CRYPTO_KEY_VALUE": "another one"})
        told = wait_for(lambda: warnings() or None, "the warning", 10)
        assert len(told) == 1
        assert "secret" in told[0]
        assert "another one" not in server.log()
        client.unstage(VOLUME, staging_path)
        with pytest.raises(RemoteError) as refused:
            client.stage(volume, staging_path, EXT4, {"CRYPTO_KEY_VALUE": "another one"})
        assert refused.value.code == "UNAUTHENTICATED"
        client.delete_volume(VOLUME)


def test_a_stopped_launcher_costs_errors_and_no_threads(folder: Path) -> None:
    staging_path = folder / "stage"
    staging_path.mkdir()
    limits = [f"--{what}-seconds=3" for what in ("format", "unlock", "mount")]
    with server_on(folder, *limits) as server, CsiClient(server.endpoint, 60) as client:
        volume = client.create_volume(NAME, [EXT4], SIZE, parameters=of_class(CHEAP), secrets=SECRET)
        client.stage(volume, staging_path, EXT4, SECRET)
        (staging_path / "file").write_text("precious")
        (launcher,) = children_of(server.pid)
        os.kill(launcher, signal.SIGSTOP)
        for worker in children_of(launcher):  # idle: a call would go to one of them
            os.kill(worker, signal.SIGKILL)
            wait_for(partial(has_ended, worker), "the end of a worker")  # else the call learns of it too late
        try:
            with CsiClient(server.endpoint, 10) as impatient:
                impatient.probe()
                assert impatient.usage(VOLUME, staging_path)
            with pytest.raises(RemoteError, match=rf"volume {VOLUME}") as late:
                client.unstage(VOLUME, staging_path)
        finally:
            os.kill(launcher, signal.SIGCONT)
        assert late.value.code == "DEADLINE_EXCEEDED"

        client.stage(volume, staging_path, EXT4, SECRET)  # nothing that waited has its lock
        assert (staging_path / "file").read_text() == "precious"
        client.unstage(VOLUME, staging_path)
        client.delete_volume(VOLUME)


class Unmounting(Commands):
    """Ends a mount when a program has failed because of it, as another call may end its own."""

    place: Path
    failures: int = 0

    def run(
        self, argv: Sequence[str | Handle], *, timeout: float, ok_codes: Sequence[int] = (0,), by_name: bool = False
    ) -> Completed:
        try:
            return super().run(argv, timeout=timeout, ok_codes=ok_codes, by_name=by_name)
        except ProgramFailed:
            self.failures += 1
            run("umount", self.place)
            raise


def test_a_mount_whose_loop_device_was_just_let_go_of_does_not_keep_a_btrfs_from_being_made(
    folder: Path, workers: Workers
) -> None:
    """mkfs.btrfs looks up the loop device of each mount; here the source of one names a loop device that is free."""
    place = folder / "other"
    place.mkdir()
    commands = Unmounting(workers)
    commands.place = place
    node = Node(folder, workers, make_commands=lambda _: commands)
    node.create(size=256 * MIB, capability=BTRFS)
    run("mount", "-t", "tmpfs", loopcontrol.new_node(), place)
    node.stage(capability=BTRFS)
    assert commands.failures == 1
    node.unstage()


ODD: Mapping[str, Callable[[Path], None]] = {
    "fifo": os.mkfifo,
    "empty-file": Path.touch,
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
    "folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", ODD)
def test_what_an_unpublish_finds_instead_of_a_volume_goes(node: Node, kind: str) -> None:
    target = node.folder / "odd"
    ODD[kind](target)
    node.unpublish(target=target)
    assert not os.path.lexists(target)


def test_what_holds_something_is_left_alone_by_an_unpublish(node: Node) -> None:
    file, full, link = node.folder / "file", node.folder / "full", node.folder / "link"
    file.write_text("precious")
    full.mkdir()
    (full / "file").write_text("precious")
    link.symlink_to(full)
    for target in (file, full, link):
        with pytest.raises(FailedPrecondition, match=rf"{re.escape(str(target))}.*left alone"):
            node.unpublish(target=target)
    assert file.read_text() == (full / "file").read_text() == "precious"
    assert link.is_symlink()


def test_host_path307_a_target_whose_folders_are_gone_is_made(used: Node) -> None:
    used.stage()
    target = used.publish(target=used.folder / "gone" / "volumes" / "kubernetes.io~csi" / "mount")
    assert (target / "file").read_text() == "precious"
    used.unpublish(target=target)
    assert not target.exists()
    used.unstage()


def test_hpe416_a_pod_gets_no_folder_instead_of_a_damaged_file_system(used: Node) -> None:
    used.stage(capability=BLOCK)
    descriptor = os.open(used.open_mapping().path, os.O_WRONLY)
    os.pwrite(descriptor, b"\xff" * 2048, 0)
    os.fsync(descriptor)
    os.close(descriptor)
    used.unstage()
    with pytest.raises(FailedPrecondition, match=r"could not be mounted .* as ext4") as failed:
        used.stage()
    # The advice is for a device that is there when it is read.
    for device in re.findall(r"/dev/mapper/\S+", str(failed.value).partition("run ")[2]):
        assert Path(device.rstrip("'")).exists()
    with pytest.raises(FailedPrecondition, match="not staged"):
        used.publish()
    assert not used.target_path().exists()
    assert used.closed()
    used.unstage()


@pytest.mark.parametrize("mapping_too", [False, True], ids=["mapping-lives", "all-gone"])
def test_ignition2216_after_a_soft_reboot_the_volume_is_staged_anew(used: Node, *, mapping_too: bool) -> None:
    """The boot id is the same; processes and mounts are gone, the mapping perhaps."""
    used.stage()
    used.publish()
    for path in (used.target_path(), used.staging_path()):
        run("umount", path)
    if mapping_too:
        used.mapper.remove(used.open_mapping().name)
        with pytest.raises(FailedPrecondition, match=VOLUME):
            used.publish()
        used.stage()
    assert (used.publish() / "file").read_text() == "precious"
    used.unpublish()
    used.unstage()


def test_kubernetes100840_a_block_volume_published_read_only_shows_what_is_there(used: Node) -> None:
    """What keeps a pod from writing is the container runtime: a device node has no read-only mount."""
    used.stage(capability=READER_BLOCK)
    target = used.publish(capability=READER_BLOCK, read_only=True)
    mount = used.mounts.at(str(target))
    assert mount is not None
    assert "ro" in mount.options
    with target.open("rb") as device:
        assert b"precious" in device.read(SIZE)
    used.unpublish()
    used.unstage()
