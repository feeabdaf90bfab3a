"""What mkfs leaves, whole or killed, and what a mount leaves are told apart: mkfs never runs over a used volume."""

import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_driver.host.devicemapper import DeviceMapper, Target
from csi_driver.host.loop import AttachedLoop, LoopDevices
from csi_driver.luks.never_mounted import prove_never_mounted
from csi_driver.model.errors import ForeignSignature
from csi_driver.volumes.filesystem import mkfs_command
from tests.machine.node import DATA_OFFSET, MIB

SIZE = 320 * MIB
NAME = "never-mounted"
FILE_SYSTEMS = ("ext4", "xfs", "btrfs")
KILLS = 3
SEED = int(os.environ.get("SEED") or "20261128")


@dataclass
class Volume:
    """The inside of a volume at `path`, over the sparse file `storage`."""

    path: str
    storage: Path
    offset: int
    mount_point: Path

    def prove_unused(self) -> None:
        prove_never_mounted("the test's volume", self.path, SIZE, str(self.storage), self.offset)

    def is_unused(self) -> bool:
        try:
            self.prove_unused()
        except ForeignSignature:
            return False
        return True

    def make(self, fs_type: str, seconds: float | None = None) -> None:
        """mkfs as the driver has it, killed after a time."""
        mkfs = subprocess.Popen(
            [*mkfs_command(fs_type, ()), self.path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            assert mkfs.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            mkfs.kill()
            mkfs.wait()

    def use(self, act: Callable[[Path], object], *options: str) -> None:
        """Do something in the mounted file system."""
        self.mount_point.mkdir(exist_ok=True)
        subprocess.run(["mount", *options, self.path, self.mount_point], check=True, timeout=120)
        try:
            act(self.mount_point)
        finally:
            subprocess.run(["umount", self.mount_point], check=True, timeout=120)

    def write(self, at: int, content: bytes) -> None:
        with open(self.path, "r+b", buffering=0) as device:
            os.pwrite(device.fileno(), content, at)
            os.fsync(device.fileno())


@dataclass
class Lab:
    """Makes fresh volumes, one at a time."""

    folder: Path
    sector: int
    loop: AttachedLoop | None = None

    def fresh(self) -> Volume:
        self.close()
        offset = DATA_OFFSET if self.sector else 0
        storage = self.folder / "storage"
        storage.unlink(missing_ok=True)
        with storage.open("wb") as file:
            file.truncate(SIZE + offset)
        self.loop = LoopDevices().attach(str(storage), autoclear=True)
        if not self.sector:
            return Volume(self.loop.name, storage, offset, self.folder / "mount")
        key = random.randbytes(64).hex()
        below = f"{self.loop.major}:{self.loop.minor} {offset // 512} 2 sector_size:{self.sector} iv_large_sectors"
        table = [Target(0, SIZE // 512, "crypt", f"aes-xts-plain64 {key} 0 {below}")]
        mapping = DeviceMapper().create(NAME, f"{NAME}-uuid", table)
        return Volume(mapping.path, storage, offset, self.folder / "mount")

    def close(self) -> None:
        DeviceMapper().remove(NAME)
        if self.loop is not None:
            self.loop.close()


@pytest.fixture
def lab(request: pytest.FixtureRequest, folder: Path) -> Iterator[Lab]:
    """Encrypted in sectors of 512 bytes, unless a test says otherwise; 0 is not encrypted."""
    lab = Lab(folder, getattr(request, "param", 512))
    yield lab
    lab.close()


ON_ALL = pytest.mark.parametrize("lab", [0, 512, 4096], ids=["plain", "512", "4096"], indirect=True)


@pytest.fixture
def volume(lab: Lab) -> Volume:
    return lab.fresh()


def nothing(_: Path) -> None:
    """A mount that is used for nothing."""


def write_files(folder: Path) -> None:
    for number in range(3):
        (folder / f"file{number}").write_bytes(b"precious " * 30000)


@ON_ALL
def test_a_volume_into_which_nobody_wrote_is_unused(volume: Volume) -> None:
    assert volume.is_unused()


@ON_ALL
@pytest.mark.parametrize("fs_type", FILE_SYSTEMS)
def test_what_mkfs_leaves_is_unused_wherever_it_was_killed(lab: Lab, fs_type: str) -> None:
    began = time.monotonic()
    whole = lab.fresh()
    whole.make(fs_type)
    seconds = time.monotonic() - began
    assert whole.is_unused()
    moments = random.Random(SEED)
    for _ in range(KILLS):
        volume, moment = lab.fresh(), moments.uniform(0, seconds)
        volume.make(fs_type, moment)
        assert volume.is_unused(), f"killed after {moment:.3f} s, seed {SEED}"
        volume.make(fs_type, moment)
        assert volume.is_unused(), f"killed twice after {moment:.3f} s, seed {SEED}"


@ON_ALL
@pytest.mark.parametrize("fs_type", FILE_SYSTEMS)
def test_a_file_system_that_was_mounted_is_used(volume: Volume, fs_type: str) -> None:
    volume.make(fs_type)
    volume.use(nothing)
    assert not volume.is_unused()
    volume.use(write_files)
    assert not volume.is_unused()


@pytest.mark.parametrize("lost", [4096, 128 << 10], ids=["its first block", "its first 128 KiB"])
@pytest.mark.parametrize("fs_type", FILE_SYSTEMS)
def test_a_used_file_system_that_lost_its_superblock_is_used(volume: Volume, fs_type: str, lost: int) -> None:
    volume.make(fs_type)
    volume.use(write_files)
    volume.write(0, bytes(lost))
    assert not volume.is_unused()


@pytest.mark.parametrize("fs_type", FILE_SYSTEMS)
def test_a_superblock_that_a_power_cut_took_from_mkfs_is_no_use(volume: Volume, fs_type: str) -> None:
    volume.make(fs_type)
    volume.write(0, bytes(128 << 10))
    assert volume.is_unused()


@pytest.mark.parametrize("fs_type", FILE_SYSTEMS)
def test_a_used_file_system_without_superblock_is_known_by_its_second_one(volume: Volume, fs_type: str) -> None:
    """Where what is in its files could be tables of a file system."""
    volume.make(fs_type)
    volume.use(lambda folder: (folder / "n").write_bytes(b"".join(n.to_bytes(4, "little") for n in range(30000))))
    volume.write(0, bytes(128 << 10))
    assert not volume.is_unused()


@pytest.mark.parametrize("at", [0, 4096, 10 * MIB + 4096, SIZE - 512], ids=str)
@pytest.mark.parametrize(
    "content", [b"diary, a page of it. " * 40, random.Random(1).randbytes(700)], ids=["text", "noise"]
)
def test_data_without_any_file_system_is_data(volume: Volume, at: int, content: bytes) -> None:
    volume.write(at, content[: SIZE - at])
    with pytest.raises(ForeignSignature, match=r"the test's volume .* holds data; nothing was written, restore"):
        volume.prove_unused()


@pytest.mark.parametrize(
    ("at", "magic"), [(510, b"\x55\xaa"), (512, b"EFI PART"), (512, b"LABELONE"), (4086, b"SWAPSPACE2")]
)
def test_somebody_elses_signature_is_data(volume: Volume, at: int, magic: bytes) -> None:
    volume.write(at, magic)
    assert not volume.is_unused()
