"""`luks-csi volume move` between two servers of one node, as an administrator types it, on real dm-crypt."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.host.mounts import Mounts
from csi_driver.rpc.client import CsiClient, RemoteError
from tests.backends.rigs import GROUP, LvmRig
from tests.backends.test_life import MIB, MOUNT, SECRET
from tests.machine.node import CHEAP
from tests.machine.server import ServerProcess

PROGRAM = str(Path(sys.executable).with_name("luks-csi"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(os.environ.get("MACHINE_STATE", tmp_path), tmp_path.name)


@pytest.fixture
def files(folder: Path) -> Iterator[ServerProcess]:
    """The driver that has the volume."""
    with ServerProcess(folder / "files") as running:
        yield running


@pytest.fixture
def group(lvm_rig: LvmRig, folder: Path) -> Iterator[ServerProcess]:
    """The driver that is to have it."""
    lvm_rig.restart()
    lvm_rig.disown()
    running = ServerProcess(folder / "group", "--backend", "lvm", "--volume-group", GROUP)
    try:
        with running:
            yield running
    finally:
        Mounts().unmount(str(running.state_dir / "lvm"))
        lvm_rig.take_back()


def move(source: ServerProcess, target: ServerProcess, *options: str) -> subprocess.CompletedProcess[str]:
    places = ["--endpoint", str(source.endpoint), "--state-dir", str(source.state_dir), "--free-space-floor", "64Mi"]
    argv = [PROGRAM, "volume", "move", "life", *places, "--to-state-dir", str(target.state_dir), *options]
    return subprocess.run(argv, check=False, capture_output=True, text=True, timeout=300)


def test_a_volume_goes_from_server_to_server_and_back(
    lvm_rig: LvmRig, files: ServerProcess, group: ServerProcess
) -> None:
    stage, target = files.folder / "stage", files.folder / "pod"
    stage.mkdir()
    pool = ("--to-thin-pool", lvm_rig.parameters.thin_pool) if lvm_rig.parameters.thin_pool else ()
    with CsiClient(files.endpoint) as here, CsiClient(group.endpoint) as there:
        volume = here.create_volume(
            "life", [MOUNT], 32 * MIB, parameters={"encrypted": "true", **CHEAP}, secrets=SECRET
        )
        here.stage(volume, stage, MOUNT, SECRET)
        here.publish(volume, stage, target, MOUNT)
        (target / "file").write_text("precious")
        refused = move(files, group, "--yes", *pool)
        assert refused.returncode == 1
        assert "only a closed one can be moved" in " ".join(refused.stderr.split())
        here.unpublish(volume.id, target)
        here.unstage(volume.id, stage)
        moved = move(files, group, "--yes", *pool, "--keep", "-o", "json")
        assert moved.returncode == 0, moved.stderr
        assert "copying volume life: 100% of 48MiB" in moved.stderr
        assert json.loads(moved.stdout)["parameters"]["thin_pool"] == lvm_rig.parameters.thin_pool
        with pytest.raises(RemoteError, match=r"was moved to the driver with the state directory"):
            here.stage(volume, stage, MOUNT, SECRET)
        there.stage(volume, stage, MOUNT, SECRET)
        assert (stage / "file").read_text() == "precious"
        here.delete_volume(volume.id)  # the old copy; what the other one has open stays
        (stage / "file").write_text("more precious")
        there.unstage(volume.id, stage)
        back = move(group, files, "--yes")
        assert back.returncode == 0, back.stderr
        assert not list(there.volumes())
        here.stage(volume, stage, MOUNT, SECRET)
        assert (stage / "file").read_text() == "more precious"
        here.unstage(volume.id, stage)
        here.delete_volume(volume.id)
