"""`luks-csi doctor` and `luks-csi volume show` on a machine that has what it takes."""

import json
import re
import subprocess
from pathlib import Path

from click.testing import CliRunner

from csi_driver.cli.doctor import doctor
from csi_driver.cli.node_view import see
from csi_driver.cli.record import record_rows
from csi_driver.host.mounts import Mounts
from csi_driver.luks.device import volume_key_name
from csi_driver.model.volume import volume_id_for
from tests.handles import mount_tmpfs
from tests.machine.node import Node
from tests.machine.processes import run


def findings(state_dir: Path, code: int = 0) -> dict[str, dict[str, object]]:
    done = CliRunner().invoke(doctor, ["--state-dir", str(state_dir), "--kubelet-dir", "/", "-o", "json"])
    assert done.exit_code == code, done.output
    return {finding["name"]: finding for finding in json.loads(done.stdout)}


def test_nothing_fatal_is_missing_here(node: Node) -> None:
    found = findings(node.state)
    assert [name for name, finding in found.items() if finding["fatal"]] == [
        "dm-crypt", "loop devices", "libcryptsetup", "state directory", "mount propagation",
    ]  # fmt: skip
    assert all(finding["ok"] for finding in found.values() if finding["fatal"])
    assert found["mount propagation"]["found"] == "/ is shared"
    assert found["file systems"]["found"] == "the kernel mounts ext4, xfs, btrfs"
    assert found["orphans"]["ok"]


def test_private_mounts_are_fatal(node: Node, folder: Path) -> None:
    kubelet = folder / "kubelet"
    kubelet.mkdir()
    mounts = Mounts()
    mount_tmpfs(kubelet)
    try:
        assert "shared" in mounts.propagation(str(kubelet))
        done = CliRunner().invoke(doctor, ["--state-dir", str(node.state), "--kubelet-dir", str(kubelet)])
        assert done.exit_code == 0
        subprocess.run(["mount", "--make-private", kubelet], check=True)
        done = CliRunner().invoke(doctor, ["--state-dir", str(node.state), "--kubelet-dir", str(kubelet)])
        assert done.exit_code == 1
        assert "FAIL  mount propagation" in done.stdout
        assert "-> mount it with mountPropagation: Bidirectional" in done.stdout
    finally:
        mounts.unmount(str(kubelet))


def test_a_file_system_that_the_kernel_does_not_know_is_not_known() -> None:
    assert Mounts().knows("ext4")
    assert not Mounts().knows("nosuchfs")


def test_the_record_of_a_formatted_volume_is_shown(node: Node) -> None:
    node.staged_once()
    seen = see(volume_id_for("pvc-1"), Path("/run/nobody.sock"), node.state)
    assert seen.record is not None
    assert seen.source == f"read from {node.state}"
    assert seen.condition is not None
    assert seen.condition.is_closed
    rows = dict(record_rows(seen.record))
    assert rows["encryption"] == "encrypted"
    assert rows["LUKS UUID"] == node.header().uuid
    assert rows["file system"] == "ext4"
    node.delete()


_MS_PRIVATE = 1 << 18


def test_a_key_of_a_volume_that_is_not_open_is_told(used: Node) -> None:
    used.stage()
    identity = used.record().luks
    assert identity is not None
    name = volume_key_name(identity.uuid)
    assert name not in str(findings(used.state)["keys left"]["found"])
    run("umount", used.staging_path())
    run("dmsetup", "remove", "--noudevsync", "--retry", used.open_mapping().name)
    left = findings(used.state)["keys left"]
    assert not left["ok"]
    assert re.match(rf"of volumes that .* root keeps the volume keys .*{name} in keyring 0x\w+", str(left["found"]))
    used.unstage()
    assert name not in str(findings(used.state)["keys left"]["found"])
