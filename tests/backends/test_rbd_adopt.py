"""Volumes that Ceph-CSI made become ours where they lie, by the command beside a server; what is in them is there."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from csi_driver.host.krbd import MappedImages
from csi_driver.keys.metadata import MetadataWrapper
from csi_driver.model.errors import DeviceInUse
from csi_driver.model.secret import Passphrase
from csi_driver.rpc.client import CsiClient, RemoteVolume
from csi_driver.volumes.capability import AccessMode, Capability
from tests.backends.ceph import POOL, USER
from tests.backends.ceph_csi import BLOCK_OF_NEW, BLOCK_OF_OLD, CephCsiVolume
from tests.backends.rigs import RbdRig
from tests.backends.test_rbd_life import left
from tests.machine.server import PROGRAM, ServerProcess

MIB = 1 << 20
MOUNT = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="ext4")
PASSPHRASE, DEK = "plain oak table, seven chairs", "MDEyMzQ1Njc4OWFiY2RlZjAxMjM="


class Node:
    """A server with one state directory, and the commands beside it."""

    def __init__(self, rig: RbdRig, folder: Path) -> None:
        self.folder = folder
        options = ("--backend", "rbd", "--ceph-config", str(rig.config))
        self.kms_config = folder / "kms.json"
        self.server = ServerProcess(folder, *options, "--kms-config", str(self.kms_config))
        self.secret = {"userID": USER, "userKey": rig.ceph.key, "encryptionPassphrase": PASSPHRASE}

    def run(self, *words: str, secret: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        """`luks-csi WORDS` with the secret as a folder."""
        folder = self.folder / "secret"
        folder.mkdir(exist_ok=True)
        for name, value in (secret or self.secret).items():
            (folder / name).write_text(value)
        beside = ("--state-dir", self.server.state_dir, "--endpoint", self.server.endpoint)
        argv = [PROGRAM[0], *words, "--secret-dir", folder, *beside, "--kms-config", self.kms_config]
        return subprocess.run([str(each) for each in argv], check=False, capture_output=True, text=True, timeout=300)

    def adopt(self, handle: str, *words: str, secret: Mapping[str, str] | None = None) -> RemoteVolume:
        """The volume `data` that comes of it, as a PersistentVolume tells the driver."""
        done = self.run("volume", "adopt", "data", handle, *words, "-o", "json", secret=secret)
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)
        return RemoteVolume(made["id"], made["capacity_bytes"], {"encrypted": "true"})

    def refused(self, handle: str, *words: str, secret: Mapping[str, str] | None = None) -> str:
        """What is said where it does not come to that."""
        done = self.run("volume", "adopt", "data", handle, *words, secret=secret)
        assert done.returncode, done.stdout
        return done.stderr


@pytest.fixture
def node(rbd_rig: RbdRig, tmp_path: Path) -> Node:
    made = Node(rbd_rig, Path(os.environ.get("MACHINE_STATE", tmp_path), tmp_path.name))
    made.folder.mkdir()
    return made


def used_by_ceph_csi(node: Node, volume: CephCsiVolume, dek: str = "") -> None:
    """Made, formatted, and written to."""
    volume.create(dek=dek)
    with volume.staged(node.folder / "of-ceph-csi") as path:
        (path / "file").write_text("precious")


def seen(client: CsiClient, node: Node, volume: RemoteVolume, secret: Mapping[str, str]) -> str:
    """What is in it, by attaching and staging; it stays attached."""
    stage = node.folder / "stage"
    stage.mkdir(exist_ok=True)
    context = client.attach(volume, "node-1", MOUNT, secret)
    client.stage(volume, stage, MOUNT, secret, context)
    try:
        return (stage / "file").read_text()
    finally:
        client.unstage(volume.id, stage)


@pytest.mark.parametrize("options", [BLOCK_OF_OLD, BLOCK_OF_NEW], ids=["3.9", "3.15"])
def test_a_volume_of_ceph_csi_is_adopted_staged_enlarged_and_deleted(
    rbd_rig: RbdRig, node: Node, options: Sequence[str]
) -> None:
    peer = CephCsiVolume(rbd_rig.ceph, PASSPHRASE.encode(), options=options)
    used_by_ceph_csi(node, peer)
    with node.server as server, CsiClient(server.endpoint) as client:
        with peer.staged(node.folder / "of-ceph-csi"):
            assert "is open at" in node.refused(peer.handle)
        wrong = {**node.secret, "encryptionPassphrase": "another"}
        assert "passphrase opens no key slot" in node.refused(peer.handle, secret=wrong).replace("the ", "", 1)
        assert rbd_rig.ceph.asked("rbd", "ls", POOL) == [peer.image]
        volume = node.adopt(peer.handle)
        assert volume.capacity_bytes == 48 * MIB
        assert rbd_rig.ceph.asked("rbd", "ls", POOL) == [f"csi-vol-{volume.id}"]
        assert node.adopt(peer.handle) == volume, "the command was repeated"
        assert seen(client, node, volume, node.secret) == "precious"
        assert client.expand_volume(volume.id, 80 * MIB, node.secret) == 80 * MIB
        assert seen(client, node, volume, node.secret) == "precious"
        client.detach(volume.id, "node-1", node.secret)
        client.delete_volume(volume.id, node.secret)
        assert rbd_rig.ceph.asked("rbd", "ls", POOL) == []
    assert not left()


def test_the_wrapped_key_of_an_image_opens_it_and_gives_way_to_another_one(rbd_rig: RbdRig, node: Node) -> None:
    peer = CephCsiVolume(rbd_rig.ceph, DEK.encode(), kms="of-the-class")
    wrapper = MetadataWrapper("the KMS", lambda: Passphrase(PASSPHRASE.encode()))
    dek = wrapper.wrap(peer.handle, Passphrase(DEK.encode())).text
    used_by_ceph_csi(node, peer, dek)
    node.kms_config.write_text(json.dumps({"of-the-class": {"encryptionKMSType": "metadata"}}))
    with node.server as server, CsiClient(server.endpoint) as client:
        assert "does not unwrap the key" in node.refused(
            peer.handle, secret={**node.secret, "encryptionPassphrase": "another"}
        )
        assert "image tells where its key is" in node.refused(peer.handle, "--kms", "a", "--kms-type", "metadata")
        volume = node.adopt(peer.handle)
        assert seen(client, node, volume, node.secret) == "precious"
        done = node.run("keys", "rotate", volume.id, "--yes")
        assert done.returncode == 0, done.stderr
        assert seen(client, node, volume, node.secret) == "precious"
    assert not left()


def test_a_look_that_was_killed_leaves_an_image_that_the_next_one_lets_go_of(rbd_rig: RbdRig, node: Node) -> None:
    peer = CephCsiVolume(rbd_rig.ceph, PASSPHRASE.encode())
    peer.create()
    peer.tell("encrypted", "encrypted")
    cut, after = rbd_rig.backend().foreign, rbd_rig.backend().foreign
    foreign = cut.find(peer.handle, "data")
    held = cut.looked_at(foreign)
    held.__enter__().close()  # what a kill does to descriptors; the image stays mapped
    assert len(list(MappedImages().all())) == 1
    with after.looked_at(after.find(peer.handle, "data")) as device:
        with (
            pytest.raises(OSError, match=r"(?i)read-only|not permitted"),
            open(device.path, "r+b", buffering=0) as raw,
        ):
            raw.write(b"x")
        assert len(list(MappedImages().all())) == 1
    assert not list(MappedImages().all())
    peer.tell("encrypted", "encryptionPrepared")  # which is formatted
    with peer.staged(node.folder / "of-ceph-csi"), pytest.raises(DeviceInUse, match=r"is open at"):
        after.looked_at(foreign).__enter__()
    assert not list(MappedImages().all())
