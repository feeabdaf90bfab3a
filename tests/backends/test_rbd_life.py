"""The whole life of a volume of Ceph over real servers, a central controller and a node, with Ceph-CSI's secrets."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.krbd import MappedImages
from csi_driver.rpc.client import CsiClient, RemoteError
from csi_driver.volumes.capability import AccessMode, Capability
from tests.backends.ceph import CLUSTER, POOL, USER
from tests.backends.rigs import RbdRig
from tests.machine.server import ServerProcess

MIB = 1 << 20
MOUNT = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="ext4")
BLOCK = Capability(AccessMode.SINGLE_NODE_WRITER, block=True)
CLASS = {
    "clusterID": CLUSTER,
    "pool": POOL,
    "imageFeatures": "layering",
    "encrypted": "true",
    "csi.storage.k8s.io/fstype": "ext4",
    "pbkdf": "pbkdf2",
    "pbkdfIterations": "1000",
}
OLD, NEW = "plain oak table, seven chairs", "one more chair"


class Servers:
    """A controller without devices and a node, each with a state directory of its own, neither with a Secret."""

    def __init__(self, folder: Path, rig: RbdRig) -> None:
        options = ("--backend", "rbd", "--ceph-config", str(rig.config))
        self.controller = ServerProcess(folder / "controller", *options, "--services", "controller")
        self.node = ServerProcess(folder / "node", *options, "--services", "node")


@pytest.fixture
def servers(rbd_rig: RbdRig, tmp_path: Path) -> Iterator[Servers]:
    """Both, running."""
    made = Servers(Path(os.environ.get("MACHINE_STATE", tmp_path), tmp_path.name), rbd_rig)
    try:
        for one in (made.controller, made.node):
            one.start()
        yield made
    finally:
        for one in (made.controller, made.node):
            one.stop()


@pytest.fixture
def user(rbd_rig: RbdRig) -> Mapping[str, str]:
    """What `csi-rbd-secret` of the document holds of Ceph."""
    return {"userID": USER, "userKey": rbd_rig.ceph.key}


def left() -> list[str]:
    devices = [one.path for one in MappedImages().all()]
    return devices + [name for name in DeviceMapper().names() if name.startswith("luks-")]


def test_a_volume_is_made_used_restarted_enlarged_given_another_key_and_deleted(
    servers: Servers, user: Mapping[str, str]
) -> None:
    node, secret = servers.node, {**user, "encryptionPassphrase": OLD}
    stage, target = node.folder / "stage", node.folder / "pod"
    for folder in (stage, target):
        folder.mkdir()
    with CsiClient(servers.controller.endpoint) as control, CsiClient(node.endpoint) as client:
        volume = control.create_volume("life", [MOUNT], 32 * MIB, parameters=CLASS, secrets=secret)
        assert (volume.context["backend"], volume.topologies) == ("rbd", ())
        context = control.attach(volume, "node-1", MOUNT, secret)
        with pytest.raises(RemoteError, match=r"node node-1 has it"):
            control.attach(volume, "node-2", MOUNT, secret)
        client.stage(volume, stage, MOUNT, secret, context)
        client.publish(volume, stage, target, MOUNT)
        (target / "file").write_text("precious")
    for one in (servers.controller, node):
        one.kill()
        one.start()
    with CsiClient(servers.controller.endpoint) as control, CsiClient(node.endpoint) as client:
        client.stage(volume, stage, MOUNT, secret, context)
        assert control.expand_volume(volume.id, 80 * MIB, secret) == 80 * MIB
        assert client.expand_on_node(volume.id, target, 80 * MIB) == 80 * MIB
        (usage, *_) = client.usage(volume.id, target)
        assert usage.total > 60 * MIB
        with pytest.raises(RemoteError, match=r"it was given to node-1; unpublish and unstage it first"):
            control.delete_volume(volume.id, secret)
        client.unpublish(volume.id, target)
        client.unstage(volume.id, stage)
        assert not left()
        both = {**user, "CRYPTO_KEY_VALUE": NEW, "CRYPTO_KEY_VALUE_PREVIOUS": OLD}
        for brought in (both, {**user, "CRYPTO_KEY_VALUE": NEW}):
            client.stage(volume, stage, MOUNT, brought, context)
            assert (stage / "file").read_text() == "precious"
            client.unstage(volume.id, stage)
        control.detach(volume.id, "node-1", secret)
        for _ in range(2):
            control.delete_volume(volume.id, secret)
        with pytest.raises(RemoteError, match=r"nobody told a user of the Ceph cluster"):
            list(control.volumes())
    assert not left()


def test_calls_that_bring_no_secret_have_the_servers_own(rbd_rig: RbdRig, tmp_path: Path) -> None:
    folder = Path(os.environ.get("MACHINE_STATE", tmp_path), tmp_path.name)
    options = ("--backend", "rbd", "--ceph-config", str(rbd_rig.config), "--ceph-secret", str(rbd_rig.secret))
    stage, target = folder / "stage", folder / "pod"
    with ServerProcess(folder, *options) as server, CsiClient(server.endpoint) as client:
        stage.mkdir()
        plain = {**CLASS, "encrypted": "false"}
        del plain["pbkdf"], plain["pbkdfIterations"]
        assert client.capacity(plain) > 64 * MIB
        volume = client.create_volume("life", [BLOCK], 32 * MIB, parameters=plain)
        assert [one.id for one in client.volumes()] == [volume.id]
        client.attach(volume, "node-1", BLOCK)
        client.stage(volume, stage, BLOCK)
        client.publish(volume, stage, target, BLOCK)
        with target.open("r+b") as device:
            assert device.read(MIB) == bytes(MIB)
        client.unpublish(volume.id, target)
        client.unstage(volume.id, stage)
        client.detach(volume.id, "node-1")
        client.delete_volume(volume.id)
        assert not list(client.volumes())
        with pytest.raises(RemoteError, match=r"the backend rbd makes blank volumes only"):
            client.create_volume("life", [BLOCK], 32 * MIB, parameters={**plain, "backingImage": "debian"})
    assert not left()
