"""A seeded handful of `make images-random`, and the proof that it turns red."""

import random
from pathlib import Path

import pytest

from csi_driver.images.base import Extent, Reader
from csi_driver.images.source import RawReader
from csi_driver.images.store import ImageRecord
from tests.machine.image_random import Image, Lab, drawn

_SEED = 7


def test_a_seeded_handful_reads_as_qemu_reads_it(folder: Path) -> None:
    draw = random.Random(_SEED)
    images = [drawn(draw, number) for number in range(8)]
    result = Lab(folder).try_all(images)
    assert result.wrong == []
    assert (result.images, len(result.formats)) == (8, len({image.format for image in images}))
    assert result.bytes == sum(image.size for image in images)


def test_everything_is_drawn() -> None:
    draw = random.Random(_SEED)
    images = [drawn(draw, number) for number in range(1000)]
    options = {option for image in images for option in image.options}
    assert {image.format for image in images} == {"qcow2", "vmdk", "vhdx", "vpc", "vdi"}
    assert {f"cluster_size={1 << bits}" for bits in range(9, 22)} <= options
    assert {"extended_l2=on", "compression_type=zstd", "compat=0.10", "subformat=streamOptimized"} <= options
    for kind in ("compressed", "snapshot", "bitmap", "changes"):
        assert any(getattr(image, kind) for image in images)


class Bugs(RawReader):
    """A reader with the bug that is named."""

    bug = ""

    def extents(self) -> list[Extent]:  # type: ignore[override]  # an iterable, as it is used
        if self.bug == "it takes data for a hole":
            return [Extent(0, self.size, zero=True)]
        length = self.size - 512 * (self.bug == "it ends early")
        return [Extent(0, length, zero=False)]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        super().read_into(offset, buffer)
        buffer[-1] ^= self.bug == "it flips a bit"


@pytest.mark.parametrize(
    ("bug", "wrong"),
    [
        ("it flips a bit", "is not what qemu-img gives between 0 and 4096"),
        ("it takes data for a hole", "is not what qemu-img gives between 0 and 4096"),
        ("it ends early", "its extents end at 3584, expected 4096"),
        ("", ""),
    ],
)
def test_planted_bugs_turn_it_red(folder: Path, bug: str, wrong: str) -> None:
    def buggy(record: ImageRecord, file: Path) -> Reader:
        reader = Bugs(str(file), record.name)
        reader.bug = bug
        return reader  # type: ignore[return-value]

    found = Lab(folder, buggy).try_all([Image(0, "vpc", 4096, ("subformat=fixed", "force_size"))]).wrong
    assert [wrong in sentence for sentence in found] == [True] * bool(bug)
