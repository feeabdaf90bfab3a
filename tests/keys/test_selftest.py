"""Self-tests of the matrix of key sources: each plants the bug that a test is for, and that test must go red."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest

from csi_driver.keys.base import Announce, KeySource, Wrapped, Wrapping, nobody
from csi_driver.keys.metadata import MetadataWrapper
from csi_driver.model.errors import KeyLost
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail
from tests.keys import suite, test_types
from tests.keys.given import GivenSources
from tests.keys.suite import Half
from tests.keys.test_types import Case

Test = Callable[[Case, Path], None]
ALL: list[Test] = [
    test_types.test_a_key_is_made_once_and_found_again,
    test_types.test_what_is_wrapped_is_bound_to_its_volume,
    test_types.test_a_key_is_wrapped_anew_and_stays_the_same,
    test_types.test_every_use_is_told_without_the_key,
]


class Sound(MetadataWrapper):
    """Wraps as it should."""

    def __init__(self) -> None:
        super().__init__("KMS kms (given)", lambda: Passphrase(b"a passphrase"))


class Unbound(Sound):
    """What is wrapped for one volume opens any."""

    def wrap(self, name: str, key: Passphrase) -> Wrapped:
        return super().wrap("", key)

    def unwrap(self, trail: KeyTrail) -> Passphrase:
        return super().unwrap(msgspec.structs.replace(trail, name=""))


class Telling(Sound):
    """The key stands in the trail."""

    def wrap(self, name: str, key: Passphrase) -> Wrapped:
        return Wrapped(super().wrap(name, key).text, key.reveal().decode())


class Same(Sound):
    """Every volume has one key."""

    def wrap(self, name: str, key: Passphrase) -> Wrapped:
        return super().wrap(name, Passphrase(b"QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE"))


class Short(Sound):
    """Keys of 17 bytes."""

    def wrap(self, name: str, key: Passphrase) -> Wrapped:
        return super().wrap(name, Passphrase(key.reveal()[:23]))


class AnotherKey(Wrapping):
    """Wraps another key anew."""

    def rewrap(self, trail: KeyTrail) -> KeyTrail:
        return msgspec.structs.replace(trail, wrapped=self.create(trail.name).wrapped)


@dataclass
class Keeping:
    """A KMS that keeps keys, as it should."""

    keeps: ClassVar = True
    kept: dict[str, Passphrase] = field(default_factory=dict)

    def create(self, name: str, announce: Announce = nobody) -> KeyTrail:
        announce()
        self.kept.setdefault(name, Passphrase.random())
        return KeyTrail(kms_id="", type="", name=name)

    def fetch(self, trail: KeyTrail) -> Passphrase:
        if trail.name not in self.kept:
            raise KeyLost(f"there is no key {trail.name}")
        return self.kept[trail.name]

    def rewrap(self, trail: KeyTrail) -> KeyTrail:
        return trail

    def destroy(self, trail: KeyTrail) -> None:
        self.kept.pop(trail.name, None)

    def check(self) -> str:
        return "it works"

    def close(self) -> None:
        """Nothing is open."""


class MakingTwice(Keeping):
    """A cut CreateVolume that is repeated gets another key."""

    def create(self, name: str, announce: Announce = nobody) -> KeyTrail:
        self.kept.pop(name, None)
        return super().create(name, announce)


class KeepingForEver(Keeping):
    """Nothing is ever destroyed."""

    def destroy(self, trail: KeyTrail) -> None:
        """It stays."""


class DestroyingAll(Keeping):
    """The end of one key is the end of the others."""

    def destroy(self, trail: KeyTrail) -> None:
        self.kept.clear()


def case_of(source: KeySource, folder: Path) -> Case:
    return Case(GivenSources(folder / "audit.jsonl", kms=source), "given")


@pytest.mark.parametrize("test", ALL)
@pytest.mark.parametrize("source", [lambda: Wrapping(Sound()), Keeping], ids=["wrapping", "keeping"])
def test_a_sound_source_is_green(test: Test, source: Callable[[], KeySource], tmp_path: Path) -> None:
    test(case_of(source(), tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("source", "test"),
    [
        (lambda: Wrapping(Unbound()), test_types.test_what_is_wrapped_is_bound_to_its_volume),
        (lambda: Wrapping(Telling()), test_types.test_a_key_is_made_once_and_found_again),
        (lambda: Wrapping(Telling()), test_types.test_every_use_is_told_without_the_key),
        (lambda: Wrapping(Same()), test_types.test_a_key_is_made_once_and_found_again),
        (lambda: Wrapping(Short()), test_types.test_a_key_is_made_once_and_found_again),
        (lambda: AnotherKey(Sound()), test_types.test_a_key_is_wrapped_anew_and_stays_the_same),
        (MakingTwice, test_types.test_a_key_is_made_once_and_found_again),
        (KeepingForEver, test_types.test_a_key_is_made_once_and_found_again),
        (DestroyingAll, test_types.test_a_key_is_made_once_and_found_again),
    ],
    ids=["unbound", "in the trail", "in the audit", "same", "short", "another", "twice", "for ever", "all"],
)
def test_a_planted_bug_turns_it_red(source: Callable[[], KeySource], test: Test, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, KeyLost, pytest.fail.Exception)):
        test(case_of(source(), tmp_path), tmp_path)


def test_a_use_that_is_not_told_turns_it_red(tmp_path: Path) -> None:
    class Silent(GivenSources):
        def fetch(self, trail: KeyTrail, *_: object) -> Passphrase:
            return self.given[trail.kms_id].fetch(trail)

    case = Case(Silent(tmp_path / "audit.jsonl", kms=Keeping()), "given")
    with pytest.raises(AssertionError):
        test_types.test_every_use_is_told_without_the_key(case, tmp_path)


def counted(tmp_path: Path, *tests: str) -> Half:
    path = tmp_path / "test_planted.py"
    path.write_text(
        "import pytest\n" + "".join(f"def test_{number}():\n    {test}\n" for number, test in enumerate(tests))
    )
    return suite.run([sys.executable, "-m", "tests.counted", str(path)])


def test_the_summary_line_tells_of_a_red_test_and_of_one_that_did_not_run(tmp_path: Path) -> None:
    green = counted(tmp_path, "assert True", "assert True")
    assert (green.tests, green.failed, green.skipped, green.ended_well) == (2, 0, 0, True)
    red = counted(tmp_path, "assert True", "assert False")
    assert (red.tests, red.failed, red.ended_well) == (2, 1, False)
    skipped = counted(tmp_path, "assert True", "pytest.skip('not here')")
    assert (skipped.tests, skipped.skipped, skipped.ended_well) == (1, 1, False)
    dead = suite.run([sys.executable, "-c", "print('tests=9 failed=0 skipped=0 seconds=1'); exit(3)"])
    silent = suite.run([sys.executable, "-c", "pass"])
    assert suite.summed_up([green, green], 4)[1]
    assert not suite.summed_up([green, green], 5)[1], "some were not run"
    for other in (red, skipped, dead, silent):
        assert not suite.summed_up([green, other], 1)[1]
    assert suite.summed_up([green, red], 1)[0].startswith("keys: tests=4 failed=1 skipped=0 seconds=")
