"""The disk of the state directory is not mounted: nothing is deleted, nothing is made on the disk below it.

Seen in the field (dynamic-localpv 244): the driver answered OK to the deletion of volumes that it could not see, and
made new ones on the node's root disk. The bug that reddens these tests: `StateDirectory.check` that looks at nothing.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.host.mounts import Mounts
from csi_driver.rpc.client import CsiClient, RemoteError
from tests.handles import mount_tmpfs
from tests.machine.node import EXT4, MIB, SECRET
from tests.machine.processes import wait_for
from tests.machine.server import ServerProcess

CHEAP = {"encrypted": "true", "pbkdf": "pbkdf2", "pbkdfIterations": "1000"}
SIZE = 32 * MIB


@pytest.fixture
def disk(folder: Path) -> Iterator[Path]:
    """The mount point `state`, with a disk of its own on it."""
    state = folder / "state"
    state.mkdir()
    mounts = Mounts()
    mount_tmpfs(state, "size=128m")
    yield state
    while mounts.at(str(state)):
        mounts.unmount(str(state))


def refused_start(server: ServerProcess, *options: str) -> str:
    """The one sentence of a server that does not start."""
    program = str(Path(sys.executable).with_name("luks-csi"))
    place = ("--endpoint", str(server.endpoint), "--state-dir", str(server.state_dir), "--node-id", "node-1")
    ended = subprocess.run(
        [program, "serve", *place, *options], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    return ended.stderr.splitlines()[-1]


def probed(client: CsiClient) -> str:
    """What Probe says; it looks anew every 10 s at most."""
    try:
        client.probe()
    except RemoteError as error:
        return str(error)
    return ""


def code(error: pytest.ExceptionInfo[RemoteError]) -> str:
    return error.value.code


def test_a_disk_that_is_not_mounted_at_start_is_noticed_without_a_setting(folder: Path, disk: Path) -> None:
    server = ServerProcess(folder)
    with server, CsiClient(server.endpoint) as client:
        client.create_volume("kept", [EXT4], SIZE, parameters=CHEAP, secrets=SECRET)
    moved = folder / "aside"
    moved.mkdir()
    subprocess.run(["mount", "--bind", str(disk), str(moved)], check=True)
    try:
        Mounts().unmount(str(disk))
        said = refused_start(server)
        assert f"the state directory {disk} is not the one that this driver had" in said
        assert f"remove {server.endpoint}.identity" in said
        assert list(disk.iterdir()) == []
        subprocess.run(["mount", "--bind", str(moved), str(disk)], check=True)
    finally:
        Mounts().unmount(str(moved))
    with server, CsiClient(server.endpoint) as client:
        assert [volume.id for volume in client.volumes()] == ["kept"]
        client.delete_volume("kept")


def test_a_mount_can_be_required(folder: Path, disk: Path) -> None:
    server = ServerProcess(folder, "--require-mount")
    with server, CsiClient(server.endpoint) as client:
        assert list(client.volumes()) == []
    Mounts().unmount(str(disk))
    Path(f"{server.endpoint}.identity").unlink()
    assert f"the state directory {disk} must be a mount of the node and is none" in refused_start(
        server, "--require-mount"
    )
    assert list(disk.iterdir()) == []


def test_what_is_mounted_over_it_while_the_server_runs_stops_changes_and_probe_and_no_undoing(
    folder: Path, disk: Path
) -> None:
    with ServerProcess(folder) as server, CsiClient(server.endpoint) as client:
        path = folder / "stage"
        path.mkdir()
        volume = client.create_volume("kept", [EXT4], SIZE, parameters=CHEAP, secrets=SECRET)
        client.stage(volume, path, EXT4, SECRET)
        client.publish(volume, path, folder / "pod", EXT4)
        mount_tmpfs(disk, "size=1m")
        for name in ("locks", "stages"):  # a state directory too, but another one
            (disk / name).mkdir()
        with pytest.raises(RemoteError, match=r"not the one that this driver was started with") as refused:
            client.create_volume("new", [EXT4], SIZE, parameters=CHEAP, secrets=SECRET)
        assert code(refused) == "FAILED_PRECONDITION"
        with pytest.raises(RemoteError, match=r"not the one") as refused:
            client.delete_volume("kept")
        assert code(refused) == "FAILED_PRECONDITION"
        with pytest.raises(RemoteError, match=r"not the one") as refused:
            client.expand_volume("kept", 2 * SIZE)
        assert code(refused) == "FAILED_PRECONDITION"
        with pytest.raises(RemoteError, match=r"not the one") as refused:
            client.stage(volume, path, EXT4, SECRET)
        assert code(refused) == "FAILED_PRECONDITION"
        with pytest.raises(RemoteError, match=r"not the one") as refused:
            client.expand_on_node("kept", folder / "pod", 2 * SIZE)
        assert code(refused) == "FAILED_PRECONDITION"
        wait_for(lambda: "not the one that this driver was started with" in probed(client), "Probe")
        client.unpublish("kept", folder / "pod")
        client.unstage("kept", path)
        Mounts().unmount(str(disk))
        client.expand_volume("kept", 2 * SIZE)
        client.delete_volume("kept")
