"""A node on which kubelet's folder is seen at two places, as bind mounts that share their mounts make it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.keys.secret import read_secret
from csi_driver.volumes.publish import PublishRequest
from csi_driver.volumes.stage import StageRequest
from tests.machine.node import MOUNT, NONE, SECRET, VOLUME, Node
from tests.machine.processes import run


@pytest.fixture(params=["over itself", "elsewhere"])
def kubelet(folder: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder whose mounts propagate to a second view of it: hidden below the first, or at another path."""
    disk, other = folder / "disk", folder / "other"
    kubelet = disk / "kubelet"
    disk.mkdir()
    other.mkdir()
    run("mount", "-t", "tmpfs", "seen-twice", str(disk))
    run("mount", "--make-shared", str(disk))
    kubelet.mkdir()
    run("mount", "--bind", str(kubelet), str(kubelet if request.param == "over itself" else other))
    yield kubelet
    if request.param == "elsewhere":
        run("umount", "-R", str(other))
    run("umount", "-R", str(disk))


def test_what_propagation_shows_of_a_stage_elsewhere_keeps_no_volume(node: Node, kubelet: Path) -> None:
    staging, target = kubelet / "stage", kubelet / "pod"
    staging.mkdir()
    node.create()
    request = StageRequest(VOLUME, str(staging), MOUNT, read_secret(SECRET), NONE)
    node.staging.stage(request)
    node.publishing.publish(PublishRequest(VOLUME, str(staging), str(target), MOUNT, read_only=False, context=NONE))
    (target / "file").write_text("seen")
    node.staging.stage(request)

    node.publishing.unpublish(VOLUME, str(target))
    node.staging.unstage(VOLUME, str(staging))

    assert node.closed()
