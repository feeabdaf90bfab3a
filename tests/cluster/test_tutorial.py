"""docs/tutorial-vm.md, done as it stands there, but for a smaller volume and for the VM's program: a shell, which shows
what a VM would read.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.documents import Volume
from tests.cluster.driver import BUSYBOX, Driver, volume_of
from tests.cluster.leftovers import assert_clean
from tests.cluster.settings import ROOT, binaries

_BLOCK = re.compile(r"^```(sh|yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINE = "a-line-of-the-image"
_LINES = 200_000
_SECONDS = 240
_CHANGES = {
    "disk.yaml": [("storage: 10Gi", "storage: 64Mi")],  # the test's nodes have little room
    "vm.yaml": [
        ("image: REGISTRY/qemu", f"image: {BUSYBOX}"),
        (r"command:\n( +- .*\n)+", "command: [sleep, infinity]\n"),
    ],
}


class Shell:
    """One shell that does a document from top to bottom: what a block sets, a later one uses."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._folder = folder
        environment = {
            "PATH": f"{binaries()}:{os.environ['PATH']}",
            "KUBECONFIG": str(cluster.control_plane.kubeconfig),
            "KUBECACHEDIR": str(folder / "cache"),
        }
        self._environment = os.environ | environment
        self._done: list[str] = []

    def run(self, commands: str) -> str:
        """Run a block, behind the variables and functions of those before; what it printed."""
        kept = [line for line in "\n".join(self._done).splitlines() if re.match(r"\w+=|\w+\(\) ", line)]
        self._done.append(commands)
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", "\n".join([*kept, commands])],
            stdin=subprocess.DEVNULL,
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
        assert done.returncode == 0, f"{commands}{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture
def blocks(tmp_path: Path) -> Iterator[str]:
    """The commands, one block at a time; the manifests lie in files of the names that they tell."""

    def found() -> Iterator[str]:
        for kind, text in _BLOCK.findall((ROOT / "docs/tutorial-vm.md").read_text()):
            if kind == "sh":
                yield text
                continue
            name = text.splitlines()[0].removeprefix("# ")
            for there, here in _CHANGES.get(name, ()):
                text, count = re.subn(there, here, text)  # noqa: PLW2901 - the same manifest
                assert count == 1
            (tmp_path / name).write_text(text)

    return found()


@pytest.fixture
def nothing_left(cluster: Cluster, driver: Driver) -> Iterator[None]:
    """What the document makes is gone at the end, also where a step of it failed."""
    yield
    if cluster.get("Namespace", "vms"):
        cluster.delete_namespace("vms")
    cluster.delete({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "disk-encrypted"}})
    for name in ("disk", "disk-encrypted"):
        driver.exec(cluster.node(1), ["sh", "-c", f"luks-csi image delete {name} --yes || true"])


@pytest.mark.usefixtures("nothing_left")
def test_it_is_done_from_the_image_to_the_end(cluster: Cluster, blocks: Iterator[str], tmp_path: Path) -> None:
    raw, shell = tmp_path / "disk.raw", Shell(cluster, tmp_path)
    raw.write_text(f"{_LINE}\n" * _LINES)
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(raw.with_suffix(".qcow2"))]
    subprocess.run(convert, check=True, timeout=60)

    passphrase, image, disk, vm, seen, end = blocks
    shell.run(passphrase)
    assert re.search(r"^disk-encrypted .*encrypt", shell.run(image), re.MULTILINE)
    shell.run(disk)
    shell.run(vm)
    volume = Volume(cluster.node(1), volume_of(cluster, "disk", "vms"))
    count = ["sh", "-c", f"head -c {len(_LINE) * _LINES + _LINES} /dev/disk | grep -c -x {_LINE}"]
    assert cluster.pod_exec("vm", count, "vms").decode().strip() == str(_LINES)
    assert "Version:       \t2" in volume.header(volume.file)
    assert volume.lines_with(_LINE, volume.file) == 0
    assert re.search(r"\b64Mi\b.*\byes\b", shell.run(seen))
    shell.run(end)

    assert not (tmp_path / "vm.key").exists()
    cluster.wait("end of the volume", lambda: not cluster.items("PersistentVolume"))
    assert_clean(cluster.node(1))
