"""The disk of the state directory turns read-only by an error while volumes are in use: all can be put down.

Nothing can be written down then, and a node that is drained needs no more than unmounting and closing.
"""

import errno
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.loop import LoopDevices
from csi_driver.host.mounts import Mounts
from csi_driver.model.volume import mapping_name
from csi_driver.rpc.client import CsiClient, RemoteError, RemoteVolume
from csi_driver.volumes.capability import Capability
from tests.machine.group import GroupPlace, mend_records, show_records
from tests.machine.node import BLOCK, CHEAP, EXT4, SECRET, SIZE
from tests.machine.places import IN_GROUP, RECORDS_ARE_FILES, current, id_of, of_class, server_on
from tests.machine.processes import run, wait_for

KINDS: dict[str, tuple[Capability, dict[str, str]]] = {
    "mount": (EXT4, dict(CHEAP)),
    "block": (BLOCK, dict(CHEAP)),
    "plain-mount": (EXT4, {}),
    "plain-block": (BLOCK, {}),
}


class Disks:
    """The state directory on a disk of its own, kubelet's folder on another one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state, self.kubelet, self._image = folder / "state", folder / "kubelet", folder / "disk.img"
        for path in (self.state, self.kubelet):
            path.mkdir()
        with self._image.open("wb") as image:
            image.truncate(1 << 30)
        run("mkfs.ext4", "-q", "-F", self._image)
        run("mount", "-t", "tmpfs", "none", self.kubelet)
        self.attach()

    def attach(self) -> None:
        """Mount the state directory as it is after a reboot."""
        run("mount", "-o", "loop,errors=remount-ro", self._image, self.state)

    def fail(self, *, kubelet_too: bool) -> None:
        """As ext4 does with a disk that answers with errors."""
        for place in self._places():
            number = place.stat().st_dev
            device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
            Path("/sys/fs/ext4", device.name, "trigger_fs_error").write_text("a test")
            wait_for(partial(_is_read_only, place), "the file system to turn read-only")
        if kubelet_too:
            run("mount", "-o", "remount,ro", self.kubelet)

    def _places(self) -> list[Path]:
        return [self.state, self.state / "lvm"] if IN_GROUP else [self.state]

    def mend(self) -> None:
        """What an administrator does."""
        run("umount", "--recursive", self.state)
        if isinstance(place := current(), GroupPlace):
            mend_records(place.rig)
        mended = subprocess.run(["e2fsck", "-p", "-f", self._image], check=False, timeout=60, capture_output=True)
        assert mended.returncode in (0, 1), mended.stdout
        self.attach()
        if isinstance(place, GroupPlace):
            show_records(place.rig, self.state)
        run("mount", "-o", "remount,rw", self.kubelet)

    def close(self) -> None:
        for path in (self.state, self.kubelet):
            subprocess.run(["umount", "--recursive", "--lazy", path], check=False, timeout=120, capture_output=True)

    def staging(self, name: str) -> Path:
        return self.kubelet / "staging" / name

    def pod(self, name: str) -> Path:
        return self.kubelet / "pods" / name

    def is_put_down(self, name: str) -> bool:
        disk, place, volume_id = self.state / "loopfile/volumes" / name / "disk.img", current(), id_of(name)
        mounted = [path for path in (self.staging(name), self.pod(name)) if Mounts().at(str(path))]
        is_shown = place.is_left_shown(volume_id) if place is not None else bool(LoopDevices().find(str(disk)))
        return not (DeviceMapper().get(mapping_name(volume_id)) or is_shown or mounted)


def _is_read_only(place: Path) -> bool:
    try:
        (place / "written").touch()
    except OSError as error:
        return error.errno == errno.EROFS
    return False


@pytest.fixture
def disks(folder: Path) -> Iterator[Disks]:
    disks = Disks(folder)
    yield disks
    disks.close()


def use(client: CsiClient, disks: Disks, name: str) -> RemoteVolume:
    """A volume that a pod uses."""
    capability, parameters = KINDS[name]
    volume = client.create_volume(name, [capability], SIZE, parameters=of_class(parameters), secrets=SECRET)
    disks.staging(name).mkdir(parents=True)
    client.stage(volume, disks.staging(name), capability, SECRET)
    client.publish(volume, disks.staging(name), disks.pod(name), capability)
    if not capability.block:
        with (disks.pod(name) / "file").open("w") as file:
            file.write("precious")
            file.flush()
            os.fsync(file.fileno())  # what is not synced a disk that fails may keep
    return volume


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
@pytest.mark.parametrize("kubelet_too", [False, True], ids=["state", "all"])
def test_a_state_directory_that_turned_read_only_keeps_no_volume_up(
    disks: Disks, *, restarted: bool, kubelet_too: bool
) -> None:
    with server_on(disks.folder) as server, CsiClient(server.endpoint, 60) as client:
        volumes = {name: use(client, disks, name) for name in KINDS}
        disks.fail(kubelet_too=kubelet_too)
        if restarted:
            server.kill()
            server.start(healthy=False)
        told = []
        for name in KINDS:
            for _ in range(2):
                client.unpublish(id_of(name), disks.pod(name))
            for _ in range(2):
                client.unstage(id_of(name), disks.staging(name))
            assert disks.is_put_down(name)
            if RECORDS_ARE_FILES:
                with pytest.raises(RemoteError) as refused:
                    client.delete_volume(id_of(name))
                told.append(str(refused.value))
        server.stop()
        for sentence in told:
            assert "read-only" in sentence.lower()
            assert "look for request" not in sentence, "an error that nobody foresaw"
        disks.mend()
        server.start()
        for name, (capability, _) in KINDS.items():
            client.stage(volumes[name], disks.staging(name), capability, SECRET)
            if not capability.block:
                assert (disks.staging(name) / "file").read_text() == "precious"
            client.unstage(id_of(name), disks.staging(name))
            client.delete_volume(id_of(name))


def test_a_volume_in_use_is_told_of_while_nothing_can_be_written(disks: Disks) -> None:
    """What only looks goes on, and a stage says why it cannot."""
    with server_on(disks.folder) as server, CsiClient(server.endpoint, 60) as client:
        use(client, disks, "mount")
        disks.fail(kubelet_too=False)
        assert client.usage(id_of("mount"), disks.pod("mount"))
        assert [volume.id for volume in client.volumes()] == [id_of("mount")]
        if RECORDS_ARE_FILES:
            with pytest.raises(RemoteError, match=r"(?i)read-only") as refused:
                client.create_volume("another", [EXT4], SIZE, parameters=of_class(CHEAP), secrets=SECRET)
            assert "look for request" not in str(refused.value)
        client.unpublish(id_of("mount"), disks.pod("mount"))
        client.unstage(id_of("mount"), disks.staging("mount"))
        assert disks.is_put_down("mount")
