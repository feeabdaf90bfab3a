"""A seeded handful of kills of a move to another volume key, and the proof that it turns red."""

from pathlib import Path

import pytest

from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.workers import Workers
from csi_driver.luks.two_keys import Mover
from csi_driver.model.errors import FailedPrecondition
from tests.machine import conversion_kills
from tests.machine.conversion_kills import Result, run, run_all
from tests.machine.node import Node


def test_a_seeded_handful_of_kills_loses_nothing(folder: Path) -> None:
    result = run_all(folder, seed=3, count=2)
    assert result.lost == []
    assert result.points > 200
    assert result.kills == 2 * len(conversion_kills.KINDS)


def test_a_copy_that_is_not_compared_again_loses_what_was_written_meanwhile(
    folder: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mover, "copy_again", lambda *_: None)
    monkeypatch.setattr(conversion_kills, "killed", lambda *_: None)  # in this process, where the bug is
    result = Result()
    for attempt in range(10):  # the writer must hit the chunk that is on its way
        place = folder / str(attempt)
        place.mkdir()
        run(place, workers, "in use", attempt, result)
        if result.lost:
            return
    pytest.fail("the planted bug was not noticed")


def test_a_table_that_comes_late_is_noticed(folder: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted is still written to at its old place, by a mapping that goes on by the table that it had."""
    monkeypatch.setattr(DeviceMapper, "load", lambda *_: None)
    monkeypatch.setattr(conversion_kills, "killed", lambda *_: None)
    with pytest.raises(FailedPrecondition, match="restore its newest record"):
        run(folder, workers, "in use", 0, Result())
    node = Node(folder, workers)
    node.unstage()
