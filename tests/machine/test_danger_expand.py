"""Expansion of staged volumes: without a secret, after a restart, from elsewhere, to the byte.

Field problems 5, 6 and 7. Longhorn's and Ceph-CSI's StorageClasses name no node-expand secret. The bug that reddens
these tests: the volume key left in the thread keyring of the worker that opened the mapping.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from csi_driver.host import blockdev, keyring, loopcontrol
from csi_driver.host.workers import Workers
from csi_driver.luks.device import volume_key_name
from csi_driver.model.errors import FailedPrecondition, NotFound, OutOfRange, Unauthenticated
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.driver import WARM
from tests.machine.node import BLOCK, CHEAP, DATA_OFFSET, EXT4, MIB, SECRET, SIZE, VOLUME, Node
from tests.machine.places import only_of_files, skip_plain_thick
from tests.machine.processes import launcher_inside
from tests.told_lines import told_lines

LARGER = 40 * MIB + 512
XFS = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="xfs")
BTRFS = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="btrfs")
WRONG = {"CRYPTO_KEY_VALUE": "wrong"}

IN_A_NEW_SESSION = (
    sys.executable,
    "-c",
    # 1: KEYCTL_JOIN_SESSION_KEYRING
    (
        "import os, sys; from csi_driver.host.syscalls import syscall; syscall('keyctl', 1, None); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    ),
)
IN_NEW_NAMESPACES = (*IN_A_NEW_SESSION, "/usr/bin/unshare", "--fork", "--pid", "--mount", "--ipc", "--uts")


def file_system_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_blocks * found.f_frsize


def is_as_long(node: Node, found: int, size: int, before: int = DATA_OFFSET) -> bool:
    """Whether that is the length of a volume's device: to the byte or, staged anew in a group, up to an extent more."""
    return size <= found <= node.rounded(size + before) - before


def is_sized_to_the_byte(node: Node, size: int) -> None:
    """Record, storage, loop device and mapping agree."""
    assert node.record().capacity_bytes == size
    assert node.disk_bytes() == node.rounded(size + DATA_OFFSET)
    if node.place is None:
        (loop,) = node.loops_of()
        assert loop.size_bytes == size + DATA_OFFSET
    assert node.open_mapping().size_bytes == blockdev.size_bytes(node.open_mapping().path)
    assert is_as_long(node, node.open_mapping().size_bytes, size)


@pytest.fixture
def restart() -> Iterator[Callable[..., Node]]:
    """The driver after a restart, with a new launcher, started below the programs given."""
    made: list[Workers] = []

    def restart(node: Node, *prefix: str) -> Node:
        made.append(Workers(WARM, launcher_inside(*prefix)))
        return Node(node.folder, made[-1])

    yield restart
    for workers in made:
        workers.stop()


Restart = Callable[..., Node]


@pytest.mark.parametrize(
    ("capability", "size", "larger"),
    [(EXT4, SIZE, LARGER), (XFS, 304 * MIB, 352 * MIB + 4096), (BTRFS, 256 * MIB, 320 * MIB + 4096)],
    ids=["ext4", "xfs", "btrfs"],
)
def test_kubernetes95367_a_mount_grows_without_a_secret_after_a_restart(
    node: Node, restart: Restart, capability: Capability, size: int, larger: int
) -> None:
    first = restart(node)
    first.create(size=size, capability=capability)
    first.stage(capability=capability)
    first.write()
    target = first.publish(capability=capability)
    before = file_system_bytes(target)
    first.workers.stop()
    second = restart(node, *IN_A_NEW_SESSION)
    assert second.grow(larger) == larger
    with told_lines() as lines:
        assert second.expand(larger, path=target) == larger
    assert "file system grown" in [line.event for line in lines]
    is_sized_to_the_byte(second, larger)
    assert file_system_bytes(target) - before > 0.9 * (larger - size)
    assert (target / "file").read_text() == "precious"
    with told_lines() as lines:
        assert second.expand(larger) == larger, "a repetition"
    assert "file system grown" not in [line.event for line in lines]
    second.unpublish()
    second.unstage()
    second.stage(capability=capability)
    assert second.read() == "precious"
    is_sized_to_the_byte(second, larger)
    second.unstage()


@pytest.mark.parametrize("parameters", [CHEAP, {}], ids=["encrypted", "plain"])
def test_cc3945_a_block_volume_grows_and_nothing_inside_is_touched(
    node: Node, restart: Restart, parameters: dict[str, str]
) -> None:
    """HC#208: no file system is looked for in a block volume, not even one that is there."""
    skip_plain_thick(parameters)
    first = restart(node)
    first.create(parameters=parameters, capability=BLOCK)
    first.stage(capability=BLOCK)
    target = first.publish(capability=BLOCK)
    subprocess.run(["mkfs.ext4", "-q", "-F", target], check=True, timeout=120)
    with target.open("rb") as device:
        before = device.read(SIZE)
    first.workers.stop()
    second = restart(node, *IN_NEW_NAMESPACES)
    second.grow(LARGER)
    assert second.expand(LARGER, path=target) == LARGER
    assert is_as_long(second, blockdev.size_bytes(str(target)), LARGER, DATA_OFFSET if parameters else 0)
    assert second.record().capacity_bytes == LARGER
    with target.open("rb") as device:
        assert device.read(SIZE) == before
    second.unpublish()
    second.unstage()


def container(folder: Path, name: str) -> tuple[str, ...]:
    """The start of a command line that runs the rest in a privileged runc container on this root file system.

    It has its own pid, mount, ipc and uts namespaces and, from runc, a new session keyring. The control socket of the
    launcher, whose number is the first that is all digits, goes in as descriptor 3.
    """
    bundle = folder / name
    (bundle / "rootfs").mkdir(parents=True)
    capabilities = [
        f"CAP_{one}"
        for one in ("SYS_ADMIN", "MKNOD", "IPC_LOCK", "SYS_RESOURCE", "SYS_RAWIO", "DAC_OVERRIDE", "CHOWN", "FOWNER")
    ]
    spec = {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {
            "user": {"uid": 0, "gid": 0},
            "cwd": os.getcwd(),
            "args": ["set by the test"],
            "env": [f"PATH={os.environ['PATH']}"],
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        },
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")],
            "resources": {"devices": [{"allow": True, "access": "rwm"}]},
        },
    }
    (bundle / "config.json").write_text(json.dumps(spec))
    program = """
import json, os, pathlib, sys
bundle, *argv = sys.argv[1:]
number = next(word for word in argv if word.isdigit())
os.dup2(int(number), 3)
argv[argv.index(number)] = "3"
file = pathlib.Path(bundle, "config.json")
spec = json.loads(file.read_text())
spec["process"]["args"] = argv
file.write_text(json.dumps(spec))
runc = ["runc", "--root", bundle + "/state", "run", "--preserve-fds", "1", "--bundle", bundle]
os.execvp("runc", [*runc, pathlib.Path(bundle).name])
"""
    mounts = 'mount --rbind / "$0/rootfs" && exec "$@"'
    return (
        *("unshare", "--mount", "--propagation", "private", "sh", "-c", mounts, str(bundle)),
        *(sys.executable, "-c", program, str(bundle)),
    )


def test_spec445_a_volume_grows_without_a_secret_in_another_container(node: Node, restart: Restart) -> None:
    """Opened by a driver in one container, resized by its successor in the next: DaemonSet pods come and go."""
    first = restart(node, *container(node.folder, "first"))
    first.create(capability=BLOCK)
    first.stage(capability=BLOCK)
    assert first.workers.call("luks-look", 20, os.getpid) < 20, "not a pid namespace of its own"
    first.workers.stop()
    second = restart(node, *container(node.folder, "second"))
    second.grow(LARGER)
    assert second.expand(LARGER) == LARGER
    is_sized_to_the_byte(second, LARGER)
    second.unstage()


def test_spec445_with_a_secret_when_the_kernel_has_lost_the_key(used: Node) -> None:
    used.stage()
    identity = used.record().luks
    assert identity is not None
    assert keyring.unlink_from_user(volume_key_name(identity.uuid))
    with pytest.raises(FailedPrecondition, match=r"brought no secret; .* name a node-expand secret"):
        used.expand(LARGER)
    assert used.open_mapping().size_bytes == SIZE
    assert used.expand(LARGER, secret=SECRET) == LARGER
    is_sized_to_the_byte(used, LARGER)
    assert used.read() == "precious"
    used.unstage()


@pytest.mark.parametrize("grown_before", [False, True], ids=["node-alone", "controller-first"])
def test_spec445_a_wrong_secret_changes_nothing(used: Node, *, grown_before: bool) -> None:
    used.stage()
    if grown_before:
        used.grow(LARGER)
    record, length = used.record(), used.disk_bytes()
    before = file_system_bytes(used.staging_path())
    with pytest.raises(Unauthenticated, match="opens no key slot"):
        used.expand(LARGER, secret=WRONG)
    assert used.record() == record
    assert used.disk_bytes() == length
    assert used.open_mapping().size_bytes == SIZE
    assert file_system_bytes(used.staging_path()) == before
    assert used.expand(LARGER) == LARGER
    is_sized_to_the_byte(used, LARGER)
    used.unstage()


@pytest.mark.parametrize(
    ("capability", "size", "larger"),
    [(EXT4, SIZE, LARGER), (XFS, 304 * MIB, 352 * MIB + 4096), (BTRFS, 256 * MIB, 320 * MIB + 4096)],
    ids=["ext4", "xfs", "btrfs"],
)
@pytest.mark.parametrize("parameters", [CHEAP, {}], ids=["encrypted", "plain"])
def test_lh11120_expanded_while_unstaged(
    node: Node, capability: Capability, size: int, larger: int, parameters: Mapping[str, str]
) -> None:
    """Offline: the next stage shows the new size, device and file system."""
    node.create(size=size, capability=capability, parameters=parameters)
    node.stage(capability=capability)
    node.write()
    before = file_system_bytes(node.staging_path())
    node.unstage()
    node.grow(larger)
    with told_lines() as lines:
        node.stage(capability=capability)
        assert file_system_bytes(node.staging_path()) - before > 0.9 * (larger - size)
        assert node.read() == "precious"
        node.unstage()
        node.stage(capability=capability)
    assert [line.event for line in lines].count("file system grown") == 1, "a second stage finds it grown"
    if parameters:
        is_sized_to_the_byte(node, larger)
    assert node.expand(larger) == larger
    node.unstage()


def test_lh12366_a_full_file_system_grows_while_it_is_written(used: Node) -> None:
    used.stage()
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012, SIM117 - the write or the sync fails
        with (used.staging_path() / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(os.urandom(MIB))
    assert used.expand(LARGER) == LARGER
    (used.staging_path() / "more").write_bytes(bytes(8 * MIB))
    assert used.read() == "precious"
    used.unstage()


def test_hv9775_it_never_shrinks(used: Node) -> None:
    used.stage()
    assert used.grow(MIB) == SIZE
    assert used.expand(MIB) == SIZE
    with pytest.raises(OutOfRange):
        used.provisioning.expand(VOLUME, 0, MIB)
    is_sized_to_the_byte(used, SIZE)
    used.unstage()


def test_cc1469_what_is_not_staged_cannot_grow_on_the_node(used: Node) -> None:
    with pytest.raises(NotFound, match="not staged"):
        used.expand(LARGER)
    used.stage()
    with pytest.raises(NotFound, match="/nowhere"):
        used.expand(LARGER, path=Path("/nowhere"))
    assert used.record().capacity_bytes == SIZE
    used.unstage()


def test_lh9205_a_volume_of_large_sectors_is_rounded_up_to_them(node: Node) -> None:
    node.create(size=SIZE + 1, parameters={**CHEAP, "sectorSize": "4096"})
    node.stage()
    is_sized_to_the_byte(node, SIZE + 4096)
    assert node.expand(LARGER) == LARGER - 512 + 4096
    is_sized_to_the_byte(node, LARGER - 512 + 4096)
    node.unstage()


@only_of_files("loop")
def test_a_device_of_large_blocks_grows_while_it_is_open_to_a_size_that_ends_within_one(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on LVM, whose volumes are longer than was asked for; dm-crypt takes no table that ends within a block."""
    monkeypatch.setattr(loopcontrol, "_BLOCK_SIZE", 4096)
    node.create(capability=BLOCK)
    node.stage(capability=BLOCK)
    with node.disk().open("ab") as file:
        file.write(bytes(LARGER + MIB - 512 - SIZE))
    assert node.expand(LARGER) == LARGER
    assert node.open_mapping().size_bytes == LARGER - 512 + 4096
    node.unstage()
    node.stage(capability=BLOCK)
    node.unstage()


@pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
def test_a_large_volume_for_files_has_large_sectors_in_every_file_system(node: Node, fs_type: str) -> None:
    capability = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type=fs_type)
    size = 640 * MIB
    node.create(size=size, capability=capability)
    node.stage(capability=capability)
    mapping = node.open_mapping()
    assert Path(f"/sys/dev/block/{mapping.major}:{mapping.minor}/queue/logical_block_size").read_text() == "4096\n"
    node.write()
    assert node.expand(size + 32 * MIB + 1) == size + 32 * MIB + 4096
    is_sized_to_the_byte(node, size + 32 * MIB + 4096)
    node.unstage()
    node.stage(capability=capability)
    assert node.read() == "precious"
    node.unstage()
