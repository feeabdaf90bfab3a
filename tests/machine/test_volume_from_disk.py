"""An installed disk with partitions: encrypted, and cloned for two VMs by the real server, on real dm-crypt."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.host import blockdev
from csi_driver.host.devicemapper import Target
from csi_driver.host.workers import Workers
from csi_driver.images.base import MIB
from csi_driver.images.checkpoint import Operation
from csi_driver.images.library import ImageLibrary
from csi_driver.images.requests import Clone, Import
from csi_driver.keys.secret import read_secret
from csi_driver.rpc.client import CsiClient, RemoteError, RemoteVolume
from tests.machine.image_lab import MS_RDONLY, cryptsetup, digest_of, mounted, unmetered
from tests.machine.node import BLOCK, Node
from tests.machine.server import ServerProcess
from tests.volume_images import BOOT, BOOT_FILE, DATA, DISK_BYTES, GREETING, SECRET, make_disk

CLAIM = 64 * MIB
SEALED = {"backingImage": "sealed", "encrypted": "true"}
KEY = {**SECRET, "CRYPTO_PBKDF": "pbkdf2", "CRYPTO_KEY_HASH": "sha512"}  # the cheapest that a secret can wish
WRONG = {"CRYPTO_KEY_VALUE": "another one"}
MACHINES = ("vm-1", "vm-2")
MARK = b"a VM wrote this"
MARK_AT = 40 * MIB


class Machines:
    """Two VMs' disks from one encrypted image, by the server's socket."""

    def __init__(self, folder: Path, client: CsiClient, node: Node) -> None:
        self.folder = folder
        self.client = client
        self.node = node

    def start(self, name: str) -> RemoteVolume:
        volume = self.client.create_volume(name, [BLOCK], CLAIM, parameters=SEALED, secrets=KEY)
        self.stage(volume)
        return volume

    def stage(self, volume: RemoteVolume) -> None:
        path = self.node.staging_path(volume.id)
        path.mkdir(parents=True, exist_ok=True)
        self.client.stage(volume, path, BLOCK, KEY)
        self.client.publish(volume, path, self.pod(volume), BLOCK)

    def stop(self, volume: RemoteVolume) -> None:
        self.client.unpublish(volume.id, self.pod(volume))
        self.client.unstage(volume.id, self.node.staging_path(volume.id))

    def pod(self, volume: RemoteVolume) -> Path:
        path = self.node.target_path(volume.id)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def check_inside(self, volume: RemoteVolume, disk: Path) -> None:
        """All of the disk is there: by a partition reader, by the kernel's ext4, by every byte."""
        device = self.pod(volume)
        assert blockdev.size_bytes(str(device)) == CLAIM
        assert partitions(device) == [BOOT, DATA]
        with (
            partition(self.node, device, *BOOT) as boot,
            mounted(boot, self.folder / "boot", "ext4", MS_RDONLY) as inside,
        ):
            assert (inside / BOOT_FILE).read_text() == GREETING
        assert digest_of(device, DISK_BYTES) == digest_of(disk)

    def refused(
        self, code: str, said: str, name: str = "vm-3", secrets: Mapping[str, str] = KEY, **changed: str
    ) -> None:
        """CreateVolume is refused with that code and these words, and nothing of the volume is there."""
        size = int(changed.pop("size", CLAIM))
        with pytest.raises(RemoteError, match=said) as refused:
            self.client.create_volume(name, [BLOCK], size, parameters=SEALED | changed, secrets=secrets)
        assert refused.value.code == code
        assert not self.node.disk(name).exists()


def partitions(device: Path) -> list[tuple[int, int]]:
    """Start and length in bytes of what util-linux finds in the partition table."""
    command = ["partx", "--show", "--noheadings", "--output", "START,SECTORS", str(device)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()
    return [(int(start) * 512, int(length) * 512) for start, length in map(str.split, lines)]


@contextmanager
def partition(node: Node, device: Path, start: int, length: int) -> Iterator[str]:
    """A part of a device as a device, as kpartx makes it."""
    major, minor = blockdev.device_number(str(device))
    name = f"part-{major}-{minor}"
    target = Target(0, length // 512, "linear", f"{major}:{minor} {start // 512}")
    made = node.mapper.create(name, f"PART-{name}", [target])
    try:
        yield made.path
    finally:
        node.mapper.remove(name)


def test_an_installed_disk_becomes_two_machines_with_identities_of_their_own(folder: Path, workers: Workers) -> None:
    disk = make_disk(folder / "disk.raw")
    library = ImageLibrary(folder / "state/images")
    library.import_(Import("installed", str(disk)), unmetered)
    clone = Clone("installed", "sealed", Operation.ENCRYPT, new_key=read_secret(KEY), verify=True)
    image = library.clone(clone, unmetered)
    assert image.luks is not None
    library.delete("installed")
    file = library.file("sealed")
    before = digest_of(file)
    node = Node(folder, workers)
    with ServerProcess(folder) as server, CsiClient(server.endpoint) as client:
        machines = Machines(folder, client, node)
        machines.refused("FAILED_PRECONDITION", "opens no key slot of image sealed", secrets=WRONG)
        machines.refused("FAILED_PRECONDITION", "provisioner-secret-name", secrets={})
        machines.refused(
            "INVALID_ARGUMENT", 'is encrypted and the StorageClass says encrypted "false"', encrypted="false"
        )
        machines.refused("OUT_OF_RANGE", f"has {DISK_BYTES} bytes", size=str(DISK_BYTES - 512))
        machines.refused("RESOURCE_EXHAUSTED", "image gone is not on this node; import it", backingImage="gone")

        first, second = (machines.start(name) for name in MACHINES)
        assert first.capacity_bytes == CLAIM
        for volume in (first, second):
            machines.check_inside(volume, disk)
        kernels = {node.open_mapping(name).uuid for name in MACHINES}
        assert len(kernels) == 2
        assert not any(image.luks.uuid.replace("-", "") in uuid for uuid in kernels)

        with machines.pod(first).open("r+b", buffering=0) as device:
            for at in (0, MARK_AT):
                os.pwrite(device.fileno(), MARK, at)
            os.fsync(device.fileno())
        machines.check_inside(second, disk)
        assert digest_of(file) == before, "the image was written to"
        for volume in (first, second):
            machines.stop(volume)

        path = node.staging_path(first.id)
        with pytest.raises(RemoteError, match=r"opens no key slot of volume vm-1") as refused:
            client.stage(first, path, BLOCK, WRONG)
        assert refused.value.code == "UNAUTHENTICATED"
        assert node.closed(first.id)

        library.delete("sealed")
        server.stop()
        server.start()
        assert client.create_volume(first.id, [BLOCK], CLAIM, parameters=SEALED, secrets=KEY) == first
        machines.stage(first)
        with machines.pod(first).open("rb", buffering=0) as device:
            assert [os.pread(device.fileno(), len(MARK), at) for at in (0, MARK_AT)] == [MARK, MARK]
        machines.stop(first)
        uuids = {cryptsetup("luksUUID", str(node.disk(name))).strip() for name in MACHINES}
        recorded = {record.luks.uuid for name in MACHINES if (record := node.record(name)).luks}
        assert uuids == recorded
        assert len(uuids | {image.luks.uuid}) == 3
        for volume in (first, second):
            client.delete_volume(volume.id)
        assert list(client.volumes()) == []
