"""Harvester's document on encrypted data volumes: its secret and class as they stand there, and the check on the node
that its test plan describes.
"""

from collections.abc import Callable, Iterator

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.documents import MANIFESTS, Workload, applied, workload
from tests.cluster.driver import DEPLOY, installed

_NAMESPACE = "longhorn-system"
_CLASS, _PASSPHRASE = "harvester-longhorn-encryption", "Some secret value here"


@pytest.fixture(scope="module", autouse=True)
def harvester(cluster: Cluster) -> Iterator[None]:
    """The driver under Longhorn's name; namespace, secret and class."""
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": _NAMESPACE}}
    with installed(cluster, DEPLOY / "names/longhorn"), applied(cluster, namespace, MANIFESTS / "harvester.yaml"):
        yield


@pytest.fixture(scope="module", params=["Filesystem", "Block"])
def running(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Workload]:
    """A pod on an encrypted data volume."""
    with workload(cluster, _CLASS, block=request.param == "Block") as used:
        used.create()
        used.wait_running()
        yield used


def test_the_header_is_made_as_the_secret_wishes(running: Workload) -> None:
    volume = running.volume()
    for device in (volume.file, *volume.loops()):
        header = volume.header(device)
        for line in (
            "Version:       \t2",
            "\tcipher: aes-xts-plain64",
            "\tKey:        256 bits",
            "\tPBKDF:      argon2i\n",
            "\tAF hash:    sha256",
            "\tHash:       sha256",
        ):
            assert line in header, header


def test_luks_open_on_the_node_tells_a_wrong_from_a_right_passphrase_and_opens_nothing(
    running: Workload, tell: Callable[[str], None]
) -> None:
    text = running.write()
    volume = running.volume()
    before = volume.opened()
    (loop,) = volume.loops()
    for device in (loop, volume.file):
        wrong = volume.luks_open(device, "Some other value here")
        assert (wrong.code, wrong.said) == (2, "No key available with this passphrase.")
        right = volume.luks_open(device, _PASSPHRASE)
        tell(f"harvester: the right passphrase on {device}: exit code {right.code}, {right.said}")
        if device == loop:
            assert (right.code, right.said) == (
                5,
                f"Cannot use device {loop} which is in use (already mapped or mounted).",
            )
        else:  # the guard (docs/operations.md): what cryptsetup makes of it when it may not bind the file to a device
            assert right.code == 1
            assert right.said.startswith("Attaching loopback device failed")
        assert volume.node.run("dmsetup info second", check=False).code == 1
        assert volume.opened() == before
    assert running.reads() == text
    assert running.write() == running.reads()
