"""A handful of `make operator-random`, and the bugs that it must notice."""

from pathlib import Path

import pytest

from tests.operator.plants import program
from tests.operator.random import run

_LITTLE_PATIENCE = 20.0  # of a run that never becomes good; that of others does not end so soon


def test_everything_converges_while_all_are_killed(tmp_path: Path) -> None:
    verdict = run(tmp_path, 7, 12)
    assert verdict.is_good, (str(verdict), verdict.lost, verdict.left, verdict.wrong)
    assert (verdict.images, str(verdict).split()[-3:]) == (12, ["lost=0", "left=0", "wrong=0"])


def test_an_agent_that_removes_no_file_is_noticed(tmp_path: Path) -> None:
    verdict = run(tmp_path, 7, 6, {"image-agent": program("keeps")}, _LITTLE_PATIENCE)
    assert not verdict.is_good
    assert any(": ready/image-" in each for each in verdict.left), verdict.left


def test_an_operator_that_forgets_copies_is_noticed(tmp_path: Path) -> None:
    verdict = run(tmp_path, 7, 6, {"operator": program("forgets")}, _LITTLE_PATIENCE)
    assert not verdict.is_good
    assert any("Ready, 1 of 2 copies" in each for each in verdict.lost), verdict.lost


def test_an_operator_that_lets_go_of_files_is_noticed(tmp_path: Path) -> None:
    verdict = run(tmp_path, 7, 6, {"operator": program("hasty")}, _LITTLE_PATIENCE)
    assert not verdict.is_good
    assert any(": ready/image-" in each for each in verdict.left), verdict.left


@pytest.mark.parametrize("word", ["lost", "left", "wrong"])
def test_a_verdict_with_findings_is_not_good(word: str) -> None:
    from tests.operator.random import Verdict

    assert Verdict(ready=1, kills=1).is_good
    assert not Verdict(ready=1, kills=1, **{word: ["something"]}).is_good  # type: ignore[arg-type]  # names of fields
    assert not Verdict(ready=0, kills=1).is_good
