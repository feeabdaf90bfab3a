"""Volumes that start from an image: imported and encrypted by hand in the driver's container, as its document says."""

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.driver import PASSPHRASE, STATE, Driver, pod, secret, storage_class
from tests.cluster.pods import Pods
from tests.cluster.sentences import said

_PATTERN = "a-line-of-the-image"
_LINES = 200_000
_IMAGE, _ENCRYPTED, _CLASS = "disk", "disk-encrypted", "from-image"
_QCOW2 = f"{STATE}/{_IMAGE}.qcow2"
_CLONE = ("luks-csi", "image", "clone", _IMAGE, _ENCRYPTED, "--encryption", "encrypt", "--passphrase-file", "-")


@pytest.fixture(scope="module", autouse=True)
def images(cluster: Cluster, driver: Driver) -> Iterator[None]:
    """A qcow2 image and its encrypted clone on node 1, and a class that names the clone."""
    node = cluster.node(1)
    of_image = storage_class(_CLASS, {"backingImage": _ENCRYPTED})
    for name in ("pbkdf", "pbkdfIterations"):  # the image's header decides
        del of_image["parameters"][name]
    disk = f"{STATE}/{_IMAGE}.raw"
    make = f"yes {_PATTERN} | head -n {_LINES} > {disk}; qemu-img convert -f raw -O qcow2 {disk} {_QCOW2}; rm {disk}"
    driver.exec(node, ["sh", "-ec", make])
    try:
        driver.exec(node, ["luks-csi", "image", "import", _QCOW2, _IMAGE])
        pod = driver.pod(node)["metadata"]["name"]
        cluster.pod_exec(pod, _CLONE, "luks-csi", container="driver", stdin=PASSPHRASE.encode(), timeout=120)
        cluster.apply([of_image])
        yield
        cluster.delete([of_image])
    finally:
        for name in (_IMAGE, _ENCRYPTED):
            driver.exec(node, ["sh", "-c", f"luks-csi image delete {name} --yes; rm -f {_QCOW2}"])


def test_a_pod_finds_the_images_disk_in_its_encrypted_volume(pods: Pods) -> None:
    pods.claim(size="64Mi", storage_class=_CLASS, volumeMode="Block")
    pods.start("vm", block=True)
    assert pods.sh("vm", f"grep -a -c -x {_PATTERN} /dev/data") == str(_LINES)
    assert pods.sh("vm", "blockdev --getsize64 /dev/data") == str(64 << 20)
    volume = pods.volume()
    assert volume.lines_with(_PATTERN, volume.file) == 0
    pods.sh("vm", "echo another > /dev/data; sync")
    pods.end("vm")
    pods.start("again", block=True)
    assert pods.sh("again", "head -n 1 /dev/data") == "another"


def test_a_secret_that_does_not_open_the_image_is_told_of_at_the_claim(pods: Pods) -> None:
    pods.cluster.apply([secret(passphrase="not the one of the image")], pods.namespace)
    pods.claim(size="64Mi", storage_class=_CLASS, volumeMode="Block")
    pods.cluster.apply([pod("vm", block=True)], pods.namespace)
    said(pods, "PersistentVolumeClaim", "data", "opens no key slot of image disk-encrypted")
