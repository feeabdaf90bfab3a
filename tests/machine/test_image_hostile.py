"""`make images-hostile` whole but in one process, a handful of it by the command, and the proof that it turns red."""

import os
import random
import re
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.machine import image_plants
from tests.machine.image_hostile import CASES, LEAST_HOSTILE, Case, Lab, Run, by_command, try_in_one_process
from tests.machine.opens import Ran, WatchedCall

pytestmark = pytest.mark.timeout(1500)

_SEED = 7
_HANDFUL = 2


def named(*names: str) -> list[Case]:
    found = [case for case in CASES if case.name in names]
    assert len(found) == len(names)
    return found


def planted(plant: str) -> Run:
    """A command with a bug in it."""

    def run(arguments: Sequence[str]) -> Ran:
        with WatchedCall(partial(image_plants.main, plant, list(arguments))) as call:
            return call.end(120)

    return run


def test_every_hostile_file_and_address_is_refused(folder: Path) -> None:
    result = try_in_one_process(folder, CASES)
    hostile = sum(case.sentence is not None for case in CASES)
    assert result.hits == []
    assert (result.refused, result.taken) == (hostile, len(CASES) - hostile)
    assert hostile >= LEAST_HOSTILE
    assert result.opened


def test_a_seeded_handful_is_refused_by_the_command(folder: Path) -> None:
    result = Lab(folder).try_all(random.Random(_SEED).sample(CASES, _HANDFUL))
    assert (result.refused + result.taken, result.hits) == (_HANDFUL, [])


_BACKING, _GOOD = "qcow2 with a backing file", "raw"


@pytest.mark.parametrize(
    ("plant", "case", "hit"),
    [
        ("probing", _BACKING, r"opened /usr/bin/qemu-img"),
        ("unpacking", _BACKING, r"wrote /var/tmp/planted\.raw( \(deleted\))?"),
        ("leaving", _BACKING, r"images/new/hostile/part is left"),
        ("taking", _BACKING, r"it was taken"),
        ("mumbling", _BACKING, r"it was refused with another sentence: luks-csi: the image is refused"),
        ("mumbling", _GOOD, r""),
    ],
)
def test_a_planted_bug_turns_it_red(folder: Path, plant: str, case: str, hit: str) -> None:
    hits = Lab(folder, planted(plant)).try_all(named(case)).hits
    if hit:
        assert any(re.fullmatch(f"{case}: {hit}", found) for found in hits), hits
    else:
        assert hits == []


@pytest.mark.parametrize(("place", "seen"), [(None, True), ("/tmp", False)])
def test_what_a_command_leaves_among_its_temporary_files_is_seen_and_what_others_do_in_tmp_is_not(
    folder: Path, place: str | None, *, seen: bool
) -> None:
    made: list[str] = []

    def run(arguments: Sequence[str]) -> Ran:
        made.append(tempfile.mkdtemp(dir=place))
        return by_command(arguments)

    try:
        hits = Lab(folder, run).try_all(named(_GOOD)).hits
    finally:
        for path in made:
            os.rmdir(path)
    assert hits == [f"{_GOOD}: the source or the folder for temporary files is not what it was"] * seen


def test_a_file_that_is_opened_in_passing_is_seen_in_one_process_too(folder: Path) -> None:
    def made(given: Path) -> Path:
        Path("/etc/hostname").read_bytes()
        path = given / "disk.img"
        path.touch()
        return path

    result = try_in_one_process(folder, [Case("opens another file", made, "is empty")])
    assert result.hits == ["opened /etc/hostname"]
