"""A file system that has turned read-only keeps no volume up: what only tidies up is told in the log and left."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from csi_driver.backends.csipins import Pin, Pins
from csi_driver.backends.rbddevices import MappedVolumes
from csi_driver.backends.rbddevices import Pin as ImagePin
from csi_driver.host.files import Files
from csi_driver.host.krbd import MappedImages
from csi_driver.host.workers import Workers
from csi_driver.volumes.stages import Stages
from tests.told_lines import told_lines

ID = "v.0123456789"
Ends = Callable[[Path, int], None]


class Failing(Files):
    """Nothing can be written or removed."""

    def __init__(self, number: int) -> None:
        self._number = number

    def remove(self, path: Path) -> None:
        raise OSError(self._number, os.strerror(self._number), str(path))

    def write_volatile(self, path: Path, content: bytes) -> None:
        raise OSError(self._number, os.strerror(self._number), str(path))


def image_of(folder: Path, number: int) -> None:
    pin = ImagePin(fsid="f", namespace="", pool_number=1, image_id="1f", image="csi-vol-v")
    volumes = MappedVolumes(folder, Failing(number), Workers(()), MappedImages("/"), 1)
    volumes.prepare()
    (folder / "attached" / f"{ID}.json").write_bytes(msgspec.json.encode(pin))
    volumes.forget(ID)


def holder_noted(folder: Path, number: int) -> None:
    pins = Pins(folder, Failing(number))
    pins.note(Pin(volume_id=ID, boot_id=pins.boot_id, holder="uid", ticket="t"))


def holder_forgotten(folder: Path, number: int) -> None:
    Pins(folder, Failing(number)).remove(ID)


def stage_of(folder: Path, number: int) -> None:
    Stages(folder, Failing(number)).remove(ID)


each = pytest.mark.parametrize("ends", [image_of, holder_noted, holder_forgotten, stage_of])


@each
def test_it_is_told_and_goes_on(tmp_path: Path, ends: Ends) -> None:
    with told_lines() as lines:
        ends(tmp_path, errno.EROFS)
    assert [line.fields["volume_id"] for line in lines] == [ID]


@each
def test_any_other_error_is_one(tmp_path: Path, ends: Ends) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        ends(tmp_path, errno.EIO)


@pytest.mark.parametrize("there", [b"other", None], ids=["other", "none"])
def test_what_is_there_already_is_not_written_again(tmp_path: Path, there: bytes | None) -> None:
    """A server starts again on a state directory that has turned read-only."""

    class ReadOnly(Files):
        def write(self, path: Path, content: bytes) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    kept = tmp_path / "rbd.json"
    if there is not None:
        kept.write_bytes(there)
    with pytest.raises(OSError, match="Read-only"):
        ReadOnly().keep(kept, b"what it is")
    Files().keep(kept, b"what it is")
    ReadOnly().keep(kept, b"what it is")
    assert kept.read_bytes() == b"what it is"
