"""The whole life of a volume over the real server on a volume group, and csi-sanity on it."""

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.dmnodes import remove_name
from csi_driver.host.handle import Handle
from csi_driver.host.mounts import Mounts
from csi_driver.rpc.client import CsiClient, RemoteError
from csi_driver.volumes.capability import AccessMode, Capability
from tests.backends.rigs import GROUP, LvmRig, lvm
from tests.machine.server import ServerProcess

MIB = 1 << 20
MOUNT = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="ext4")
BLOCK = Capability(AccessMode.SINGLE_NODE_WRITER, block=True)
CHEAP = {"pbkdf": "pbkdf2", "pbkdfIterations": "1000"}
SECRET = {"CRYPTO_KEY_VALUE": "plain oak table, seven chairs"}
NEW_SECRET = {"CRYPTO_KEY_VALUE": "one more chair", "CRYPTO_KEY_VALUE_PREVIOUS": SECRET["CRYPTO_KEY_VALUE"]}


@pytest.fixture
def server(lvm_rig: LvmRig, tmp_path: Path) -> Iterator[ServerProcess]:
    """A server with a state directory of its own, to which the volume group comes as one that was another's."""
    lvm_rig.restart()
    lvm_rig.disown()
    folder = Path(os.environ.get("MACHINE_STATE", tmp_path), tmp_path.name)
    running = ServerProcess(folder, "--backend", "lvm", "--volume-group", GROUP)
    running.start()
    try:
        yield running
    finally:
        running.stop()
        Mounts().unmount(str(running.state_dir / "lvm"))
        lvm_rig.take_back()


def classes(rig: LvmRig, *, encrypted: bool = True) -> Mapping[str, str]:
    pool = {"thinPool": rig.parameters.thin_pool} if rig.parameters.thin_pool else {}
    return {"backend": "lvm", **pool, **({"encrypted": "true", **CHEAP} if encrypted else {})}


def refuse_others(device: Handle) -> None:
    """Nobody gets a second mapping of a volume in use, nor takes it away: that is why the backend has no guard."""
    with device:
        node = f"/dev/dm-{device.minor}"
    opened = ["cryptsetup", "open", "--key-file", "-", node, "second"]
    found = subprocess.run(opened, check=False, input=SECRET["CRYPTO_KEY_VALUE"], capture_output=True, text=True)
    assert found.returncode == 5, found  # cryptsetup(8): device already exists or device is busy
    assert "in use" in found.stderr
    with pytest.raises(subprocess.CalledProcessError):
        lvm("lvremove", f"{GROUP}/luks-life")


def devices() -> list[str]:
    return [name for name in DeviceMapper().names() if re.search(r"pvc|life", name)]


def test_a_volume_is_made_used_restarted_enlarged_given_another_key_and_deleted(
    lvm_rig: LvmRig, server: ServerProcess
) -> None:
    stage, target = server.folder / "stage", server.folder / "pod"
    for folder in (stage, target):
        folder.mkdir()
    with CsiClient(server.endpoint) as client:
        room = client.capacity(classes(lvm_rig))
        assert room > 64 * MIB
        volume = client.create_volume("life", [MOUNT], 32 * MIB, parameters=classes(lvm_rig), secrets=SECRET)
        assert volume.context["backend"] == "lvm"
        client.stage(volume, stage, MOUNT, SECRET)
        client.publish(volume, stage, target, MOUNT)
        (target / "file").write_text("precious")
        (logical,) = (name for name in devices() if name.startswith(GROUP.replace("-", "--")))
        refuse_others(DeviceMapper().open(logical))
    server.kill()
    server.start()
    with CsiClient(server.endpoint) as client:
        client.stage(volume, stage, MOUNT, SECRET)
        assert client.expand_volume(volume.id, 80 * MIB) == 80 * MIB
        assert client.expand_on_node(volume.id, target, 80 * MIB) == 80 * MIB
        (usage, *_) = client.usage(volume.id, target)
        assert usage.total > 60 * MIB
        with pytest.raises(RemoteError, match=r"is still published at"):
            client.unstage(volume.id, stage)
        client.unpublish(volume.id, target)
        client.unstage(volume.id, stage)
        assert not devices()
        client.stage(volume, stage, MOUNT, NEW_SECRET)
        client.unstage(volume.id, stage)
        client.stage(volume, stage, MOUNT, {"CRYPTO_KEY_VALUE": NEW_SECRET["CRYPTO_KEY_VALUE"]})
        assert (stage / "file").read_text() == "precious"
        client.unstage(volume.id, stage)
        client.delete_volume(volume.id)
        client.delete_volume(volume.id)
        assert not list(client.volumes())
    assert not devices()
    assert "luks-life" not in lvm("lvs", GROUP)


def test_a_volume_that_is_open_by_hand_is_neither_staged_nor_deleted(lvm_rig: LvmRig, server: ServerProcess) -> None:
    stage = server.folder / "stage"
    stage.mkdir()
    with CsiClient(server.endpoint) as client:
        volume = client.create_volume("life", [MOUNT], 32 * MIB, parameters=classes(lvm_rig), secrets=SECRET)
        client.stage(volume, stage, MOUNT, SECRET)
        (stage / "file").write_text("precious")
        client.unstage(volume.id, stage)
        lvm("lvchange", "-ay", "-K", f"{GROUP}/luks-life")
        (logical,) = devices()
        opened = ["cryptsetup", "open", "--key-file", "-", f"/dev/mapper/{logical}", "second"]
        subprocess.run(opened, check=True, input=SECRET["CRYPTO_KEY_VALUE"], capture_output=True, text=True, timeout=60)
        try:
            said = r"open as /dev/mapper/second too.*cryptsetup close second"
            with pytest.raises(RemoteError, match=said):
                client.stage(volume, stage, MOUNT, SECRET)
            with pytest.raises(RemoteError, match=said):
                client.delete_volume(volume.id)
        finally:
            subprocess.run(["cryptsetup", "close", "second"], check=True, timeout=60)
        client.stage(volume, stage, MOUNT, SECRET)
        assert (stage / "file").read_text() == "precious"
        client.unstage(volume.id, stage)
        client.delete_volume(volume.id)
    assert not devices()
    remove_name(logical)  # lvchange by hand made it, and there is no udev here to take it away


def test_a_plain_block_volume_lasts_from_stage_to_unstage(lvm_rig: LvmRig, server: ServerProcess) -> None:
    stage, target = server.folder / "stage", server.folder / "pod"
    stage.mkdir()
    with CsiClient(server.endpoint) as client:
        volume = client.create_volume("life", [BLOCK], 32 * MIB, parameters=classes(lvm_rig, encrypted=False))
        client.stage(volume, stage, BLOCK)
        client.publish(volume, stage, target, BLOCK)
        with target.open("r+b") as device:
            assert device.read(MIB) == bytes(MIB)
            device.seek(0)
            device.write(b"precious")
        with pytest.raises(RemoteError, match=r"FAILED_PRECONDITION|published|in use"):
            client.delete_volume(volume.id)
        client.unpublish(volume.id, target)
        client.publish(volume, stage, target, BLOCK)
        with target.open("rb") as device:
            assert device.read(8) == b"precious"
        client.unpublish(volume.id, target)
        client.unstage(volume.id, stage)
        assert not devices()
        client.delete_volume(volume.id)
    assert "luks-life" not in lvm("lvs", GROUP)


def test_what_this_backend_cannot_is_said_in_a_sentence(server: ServerProcess) -> None:
    with CsiClient(server.endpoint) as client:
        with pytest.raises(RemoteError, match=r"the backend lvm makes blank volumes only"):
            client.create_volume("life", [BLOCK], 32 * MIB, parameters={"backingImage": "debian"})
        with pytest.raises(RemoteError, match=r"/nix is no thin pool that can be used"):
            client.create_volume("life", [BLOCK], 32 * MIB, parameters={"thinPool": "nix"})
        assert not list(client.volumes())
