"""What a call that failed must not leave behind: nobody may ever ask again for a volume that could not be made."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from csi_driver.backends.loopfile import LoopfileBackend
from csi_driver.backends.records import RecordCodec
from csi_driver.host.files import Files
from csi_driver.host.locks import VolumeLocks
from csi_driver.keys.secret import read_secret
from csi_driver.model.errors import DriverError
from csi_driver.model.settings import Settings
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.provision import CreateRequest, Provisioning
from tests.fake_host import FakeLoops, NoHolders, SteppedFiles, no_images, no_kms

MIB = 1 << 20
REQUEST = CreateRequest("pvc-1", MIB, 0, (Capability(AccessMode.SINGLE_NODE_WRITER, block=True),), {}, read_secret({}))


def fail_once(number: int) -> Callable[[str], None]:
    """Lets the step of that number fail with EIO, and none after it."""
    left = [number]

    def step(_: str) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    return step


def create(folder: Path, step: Callable[[str], None]) -> None:
    """CreateVolume under its lock, as the server makes it."""
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    backend = LoopfileBackend(folder / "loopfile", 0, SteppedFiles(step), FakeLoops(), RecordCodec())
    backend.prepare()
    locks = VolumeLocks(folder / "locks", NoHolders(), backend.has)
    with locks.hold("pvc-1"):
        made = Provisioning(Settings(node_id="node-1"), backend, no_images(), lambda: None, lambda _: None, no_kms())
        made.create(REQUEST)


def test_a_create_that_fails_leaves_neither_volume_nor_lock(tmp_path: Path) -> None:
    steps: list[str] = []
    create(tmp_path / "recorded", steps.append)
    assert len(steps) > 10
    for number in range(len(steps)):
        folder = tmp_path / str(number)
        with pytest.raises(DriverError):
            create(folder, fail_once(number))
        assert [path for path in folder.rglob("*") if path.is_file() or path.name == "pvc-1"] == [], steps[number]


def test_what_a_killed_write_left_goes_with_the_file(tmp_path: Path) -> None:
    for name in ("stage", ".stage.new", "other"):
        (tmp_path / name).write_bytes(b"x")
    Files().remove(tmp_path / "stage")
    assert os.listdir(tmp_path) == ["other"]
