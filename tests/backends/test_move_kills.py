"""A seeded handful of kills of a move to another backend, and the proof that it turns red."""

import os
from pathlib import Path

import pytest

from csi_driver.model.volume import Span, VolumeRecord
from csi_driver.volumes.move_copy import MoveCopy, move_of
from csi_driver.volumes.moved import Homes
from tests.backends import move_kills
from tests.backends.move_kills import Case, Result, run, run_all
from tests.backends.rigs import LvmRig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = Path(os.environ.get("MACHINE_STATE", tmp_path), f"kills-{os.urandom(4).hex()}")
    made.mkdir()
    return made


def name_of(rig: LvmRig) -> str:
    return "lvm-thin" if rig.parameters.thin_pool else "lvm-thick"


def test_a_seeded_handful_of_kills_loses_nothing(lvm_rig: LvmRig) -> None:
    result = run_all(lvm_rig, lvm_rig.state.parent, name_of(lvm_rig), seed=3, count=1)
    assert result.lost == []
    assert result.points > 200
    assert result.kills == len(move_kills.KINDS)


def test_a_volume_that_can_be_used_in_both_places_is_noticed(
    lvm_rig: LvmRig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def anywhere(_: Homes, record: VolumeRecord) -> VolumeRecord:
        return record

    monkeypatch.setattr(Homes, "here", anywhere)
    case = Case(lvm_rig.state.parent, folder, name_of(lvm_rig), "files")
    steps = run(lvm_rig, case, "plain", 0, Result())
    result = Result()
    run(lvm_rig, case, "plain", steps // 2 // 2 * 2, result)
    assert any("it can be used in 2 places" in each for each in result.lost)


def test_a_copy_of_half_is_noticed(lvm_rig: LvmRig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not written counts as written, and nobody reads it back."""

    def copied(self: MoveCopy, target: VolumeRecord, *_: object) -> VolumeRecord:
        return self._noted(target, copied=Span(end=move_of(target).size))

    def compared(self: MoveCopy, target: VolumeRecord, *_: object) -> VolumeRecord:
        return self._noted(target, compared=move_of(target).copied)

    monkeypatch.setattr(MoveCopy, "copy", copied)
    monkeypatch.setattr(MoveCopy, "compare", compared)
    monkeypatch.setattr(Case, "killed", lambda *_: 0)  # in this process, where the bug is
    result = Result()
    run(lvm_rig, Case(lvm_rig.state.parent, folder, name_of(lvm_rig), "files"), "plain", 1, result)
    assert any("the content is another one" in each for each in result.lost)
