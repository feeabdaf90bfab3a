"""The disk below an ext4 volume is full: what its journal holds and the disk does not take is lost by no check."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.host.commands import Commands
from csi_driver.host.holders import Holders
from csi_driver.host.workers import Workers
from csi_driver.keys.secret import read_secret
from csi_driver.model.errors import DriverError
from csi_driver.volumes.check import Checking, Verdict
from csi_driver.volumes.filesystem import FileSystems
from tests.machine.node import EXT4, LIMITS, MIB, NAME, SECRET, Node
from tests.machine.places import only_of_files
from tests.machine.processes import run

pytestmark = only_of_files("own disk")
_MOST = 6000
_EACH = 20


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A small file system on a disk of its own."""
    disk, place = tmp_path / "disk", tmp_path / "place"
    with disk.open("wb") as file:
        file.truncate(448 * MIB)
    run("mkfs.ext4", "-q", "-F", "-m", "0", disk)
    place.mkdir()
    run("mount", "-o", "loop", disk, place)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True, timeout=120)


def filled(place: Path) -> Path:
    """A file that takes all that is free."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        for piece in (MIB, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * piece)
                    os.fsync(file.fileno())
    return filler


def made_durably(pod: Path) -> int:
    """Folders made until the file system aborts; so many of them it has said that it has."""
    done = 0
    top = os.open(pod, os.O_RDONLY)
    with contextlib.suppress(OSError):
        for number in range(_MOST):
            os.mkdir(pod / f"d{number}")
            if number % _EACH == 0:
                os.fsync(top)
                done = number + 1
    os.close(top)
    return done


def there(folder: Path, done: int) -> int:
    return sum((folder / f"d{number}").is_dir() for number in range(done))


@pytest.fixture
def node(place: Path, workers: Workers) -> Node:
    """One whose volume is published."""
    node = Node(place, workers)
    node.create(size=256 * MIB, capability=EXT4)
    node.stage(capability=EXT4)
    return node


def test_its_next_pod_waits_for_room_and_finds_everything(place: Path, node: Node) -> None:
    pod = node.publish(capability=EXT4)
    filler = filled(place)
    done = made_durably(pod)
    assert _EACH < done < _MOST - _EACH
    node.unpublish()
    for _ in range(2):
        with pytest.raises(DriverError, match=r"its storage is full or fails|is full"):
            node.publish(capability=EXT4)
    filler.unlink()
    os.sync()
    pod = node.publish(capability=EXT4)
    assert there(pod, done) == done
    node.unpublish()
    node.unstage()


def test_a_repair_waits_for_room_too(place: Path, node: Node, workers: Workers) -> None:
    pod = node.publish(capability=EXT4)
    filler = filled(place)
    done = made_durably(pod)
    node.unpublish()
    node.unstage()
    commands = Commands(workers)
    file_systems = FileSystems(workers, commands, node.mounts, Holders(), LIMITS)
    checking = Checking(
        node.store, node.presences, workers, commands, node.mappings, node.encryption, file_systems, node.keys,
        node.homes, LIMITS,
    )  # fmt: skip
    with node.locks.hold(NAME), pytest.raises(DriverError, match=r"its storage is full or fails"):
        checking.check(NAME, read_secret(SECRET), repair=True, seconds=300)
    filler.unlink()
    os.sync()
    with node.locks.hold(NAME):
        assert checking.check(NAME, read_secret(SECRET), repair=True, seconds=300).verdict is Verdict.MENDED
    node.stage(capability=EXT4)
    assert there(node.staging_path(), done) == done
    node.unstage()
