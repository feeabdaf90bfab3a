"""A seeded handful of `make images-kills`, and the proof that it turns red: engines with a bug by the constructor."""

import contextlib
from pathlib import Path

import msgspec
import pytest

from csi_driver.host.files import Files
from csi_driver.images.base import MIB
from csi_driver.images.bring import Meter
from csi_driver.images.checkpoint import Operation, SourceChanged
from csi_driver.images.requests import Clone
from csi_driver.images.store import ImageRecord, ImageStore
from tests.machine.image_kills import Build, Lab
from tests.machine.image_matrix import CheapLibrary
from tests.machine.leaks import adopting_orphans

_SIZE = 8 * MIB + 512
_SEED = 7
_KILLS = {"import": 1, "encrypt": 1, "decrypt": 2}  # encrypt takes a qemu-nbd each time
_MOST_ROUNDS = 10


def test_a_seeded_handful_of_kills_loses_nothing(folder: Path) -> None:
    with adopting_orphans():
        lab = Lab(folder, _SEED, _SIZE, CheapLibrary)
        for operation, count in _KILLS.items():
            lab.try_operation(operation, count)
    result = lab.result
    assert (result.kills, result.lost) == (sum(_KILLS.values()), [])
    assert result.completed
    assert result.changed


class Planted(CheapLibrary):
    """An engine with the bug of its subclass."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder


class TakesWhatIsThere(Planted):
    """A file in the making is taken for a whole one."""

    def clone(self, wanted: Clone, meter: Meter) -> ImageRecord:
        part = self._folder / "new" / wanted.name / "part"
        if not part.exists():
            return super().clone(wanted, meter)
        record = msgspec.structs.replace(self.get(wanted.source), name=wanted.name)
        ImageStore(self._folder, Files()).finish(record, part)
        return record


class IgnoresChanges(Planted):
    """A source that was changed meanwhile is not told."""

    def clone(self, wanted: Clone, meter: Meter) -> ImageRecord:
        with contextlib.suppress(SourceChanged):
            return super().clone(wanted, meter)
        return self.get(wanted.source)


@pytest.mark.parametrize(
    ("build", "lost"),
    [
        (TakesWhatIsThere, "the result has the digest"),
        (IgnoresChanges, "a source that was changed meanwhile was not noticed: 0"),
    ],
)
def test_a_planted_bug_turns_it_red(folder: Path, build: Build, lost: str) -> None:
    with adopting_orphans():
        lab = Lab(folder, _SEED, _SIZE, build)
        for _ in range(_MOST_ROUNDS):  # a kill may come before there is anything to lose
            lab.try_operation(Operation.IGNORE, 1)
            if lab.result.lost:
                break
    assert lost in lab.result.lost[0]
