"""A seeded handful of `make images-matrix`, and the proof that it turns red: engines with a bug by the constructor."""

import random
from dataclasses import replace
from itertools import product
from pathlib import Path

from csi_driver.images.bring import Meter
from csi_driver.images.checkpoint import Operation
from csi_driver.images.requests import Clone
from csi_driver.images.store import ImageRecord
from csi_driver.images.target import Encryption
from csi_driver.luks.formats import CIPHER_KEY_BITS, HASHES, PBKDFS, SECTOR_SIZES
from tests.machine.image_lab import KINDS
from tests.machine.image_matrix import HUGE, HUGE_KINDS, SIZES, CheapLibrary, Lab, all_cases

_SEED = 7


def test_a_seeded_handful_gives_the_same_bytes(folder: Path) -> None:
    draw = random.Random(_SEED)
    small = [case for case in all_cases() if case.size != HUGE]
    chosen = [draw.choice([case for case in small if (case.kind == "raw") is raw]) for raw in (True, False)]
    result = Lab(folder).try_all(chosen)
    assert result.wrong == []
    assert (result.cases, result.opened, result.compared) == (2, 4, 12)


def test_every_choice_is_there_and_every_format_meets_every_size_and_choice() -> None:
    cases = all_cases()
    small = [case for case in cases if case.size != HUGE]
    choices = [(cipher, bits) for cipher, sizes in CIPHER_KEY_BITS.items() for bits in sizes]
    assert len({case.crypto for case in small}) == len(choices) * len(HASHES) * len(PBKDFS) * len(SECTOR_SIZES)
    assert {case.other for case in small} == {case.crypto for case in small}
    assert {(case.kind, case.size) for case in small} == {*product(KINDS, SIZES)}
    for axis in ("cipher", "hash", "pbkdf", "sector_size"):
        values = {getattr(case.crypto, axis) for case in small}
        assert {(case.kind, getattr(case.crypto, axis)) for case in small} == {*product(KINDS, values)}
    assert [case.kind for case in cases if case.size == HUGE] == [*HUGE_KINDS]


class Bugs(CheapLibrary):
    """An engine with the bug that is named."""

    bug = ""

    def clone(self, wanted: Clone, meter: Meter) -> ImageRecord:
        record = super().clone(wanted, meter)
        if wanted.operation is Operation.DECRYPT:
            with self.file(wanted.name).open("r+b") as file:
                match self.bug:
                    case "it flips a bit":
                        last = file.seek(-1, 2)
                        byte = file.read(1)[0]
                        file.seek(last)
                        file.write(bytes([byte ^ 1]))
                    case "it does not cut the padding off":
                        file.truncate(512)
        return record

    def _encryption(self, wanted: Clone) -> Encryption | None:  # type: ignore[override]  # as the real one is called
        chosen = CheapLibrary._encryption(wanted)  # noqa: SLF001 - the real one
        if chosen and self.bug == "it does not care for the cipher":
            return replace(chosen, format=replace(chosen.format, cipher="aes-xts-plain64", key_bits=256))
        return chosen


def test_planted_bugs_turn_it_red(folder: Path) -> None:
    case = next(case for case in all_cases() if (case.kind, case.size) == ("raw", 511) and "cbc" in case.crypto.cipher)
    buggy = Bugs(folder / "images")
    lab = Lab(folder, lambda _: buggy)
    for bug, wrong in (
        ("it flips a bit", "is not what 511 is between 0 and 511"),
        ("it does not cut the padding off", "has 512 bytes and is recorded with 511, expected 511"),
        ("it does not care for the cipher", "encrypted is encrypted as Crypto(cipher='aes-xts-plain64'"),
    ):
        buggy.bug = bug
        before = len(lab.result.wrong)
        lab.try_all([case])
        assert [wrong in found for found in lab.result.wrong[before:]] == [True]
