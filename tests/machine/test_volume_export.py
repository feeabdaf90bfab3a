"""A volume as an image on real dm-crypt: written, made an image, and a volume of that image has the same bytes."""

import os
from pathlib import Path

import pytest

from csi_driver.host.loop import LoopDevices
from csi_driver.images.base import MIB
from csi_driver.images.library import ImageLibrary
from csi_driver.images.store import ImageRecord
from csi_driver.luks.header import parse
from csi_driver.model.errors import DeviceInUse, FailedPrecondition, Unauthenticated
from csi_driver.model.volume import EncryptionState
from csi_driver.volumes.export import Export
from tests.headers import head_of
from tests.machine.image_lab import digest_of, unmetered
from tests.machine.node import BLOCK, CHEAP, NONE, SECRET, Node, fingerprint

SIZE = 64 * MIB
PRECIOUS = "precious"  # what Node.write writes
LINE = "a-line-that-nobody-else-has"
OF_IMAGE = {"backingImage": "copy", "encrypted": "true"}
OF_PLAIN = {"backingImage": "copy"}
WRONG = {"CRYPTO_KEY_VALUE": "another one"}


def export(node: Node, volume: str, secret: str | None = None) -> ImageRecord:
    library = ImageLibrary(node.state / "images")
    return node.exports.export(Export(volume, "copy", secret), library, unmetered)


def image_file(node: Node) -> Path:
    return node.state / "images/ready/copy/image"


def holds(path: Path, text: str) -> bool:
    return text.encode() in path.read_bytes()


def written_raw(node: Node, volume: str, *, encrypted: bool) -> str:
    """A volume with noise and a line in it, as a VM has written them; returns the digest of all that it shows."""
    secret = SECRET if encrypted else NONE
    node.create(volume, size=SIZE, parameters=CHEAP if encrypted else NONE, capability=BLOCK, secret=secret)
    node.stage(volume, BLOCK, secret=secret)
    target = node.publish(volume, BLOCK)
    with target.open("r+b") as disk:
        disk.write(os.urandom(3 * MIB) + LINE.encode())
        disk.seek(SIZE - MIB)
        disk.write(os.urandom(MIB))
        os.fsync(disk.fileno())
    found = digest_of(target)
    with pytest.raises(DeviceInUse, match=rf"volume {volume} is in use at .*mount and only a closed one becomes an im"):
        export(node, volume)
    node.unpublish(volume, target=target)
    with pytest.raises(DeviceInUse, match=r"is in use and only a closed one becomes an image"):
        export(node, volume)
    node.unstage(volume)
    return found


def test_a_disk_that_a_vm_wrote_is_the_same_in_a_volume_of_its_image_and_never_in_plain(node: Node) -> None:
    written = written_raw(node, "vm-1", encrypted=True)
    before = fingerprint(node.disk("vm-1"))
    record = export(node, "vm-1", "images/vm-key")
    assert (record.size, record.secret, record.luks) == (SIZE, "images/vm-key", node.record("vm-1").luks)
    assert fingerprint(node.disk("vm-1")) == before, "the volume was written to"
    assert node.closed("vm-1")
    assert not holds(image_file(node), LINE)
    node.create("vm-2", size=SIZE, parameters=OF_IMAGE, capability=BLOCK)
    with pytest.raises(Unauthenticated, match=r"opens no key slot of volume vm-2"):
        node.stage("vm-2", BLOCK, secret=WRONG)
    for name in ("vm-1", "vm-2"):  # both at once: each has an identity of its own
        node.stage(name, BLOCK)
        assert digest_of(node.publish(name, BLOCK)) == written
    assert len({parse(head_of(node.disk(name)), name).uuid for name in ("vm-1", "vm-2")}) == 2
    for name in ("vm-1", "vm-2"):
        node.unpublish(name)
        node.unstage(name)


def test_a_file_system_is_found_again_and_grown(node: Node) -> None:
    node.staged_once()
    export(node, "pvc-1")
    node.create("pvc-2", size=2 * SIZE, parameters=OF_IMAGE)
    node.stage("pvc-2")
    assert node.read("pvc-2") == PRECIOUS
    usage = os.statvfs(node.staging_path("pvc-2"))
    assert usage.f_blocks * usage.f_frsize > SIZE, "the file system was not grown"
    node.write("another", "pvc-2")
    node.unstage("pvc-2")
    node.stage()
    assert node.read() == PRECIOUS
    node.unstage()
    assert node.encryption_state("pvc-2") is EncryptionState.ENCRYPTED


def test_a_plain_volume_is_a_raw_image(node: Node) -> None:
    written = written_raw(node, "vm-1", encrypted=False)
    record = export(node, "vm-1")
    assert (record.format, record.size) == ("raw", SIZE)
    assert digest_of(image_file(node)) == written
    node.create("vm-2", size=SIZE, parameters=OF_PLAIN, capability=BLOCK, secret=NONE)
    node.stage("vm-2", BLOCK, secret=NONE)
    assert digest_of(node.publish("vm-2", BLOCK)) == written
    node.unpublish("vm-2")
    node.unstage("vm-2")


def test_what_is_attached_by_hand_or_was_never_staged_is_refused(node: Node) -> None:
    node.create("new")
    with pytest.raises(FailedPrecondition, match=r"volume new was never staged, so there is nothing in it"):
        export(node, "new")
    node.staged_once()
    with (
        LoopDevices().attach(str(node.disk()), autoclear=True),
        pytest.raises(DeviceInUse, match=r"volume pvc-1 is in use and only a closed one becomes an image"),
    ):
        export(node, "pvc-1")
    export(node, "pvc-1")
