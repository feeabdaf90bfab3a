"""A seeded two minutes of `make storm`, and the proof that it turns red: a program that does not hold its device."""

import sys

import pytest

from tests.machine.storm import Weather, storm
from tests.machine.storm_model import Kind, Ledger

_SEED = "7"
_CALLS = 2000
_MOST_CALLS = 20_000


@pytest.mark.timeout(3600)
def test_a_seeded_storm_loses_mixes_and_leaks_nothing_and_leaves_nothing_stuck() -> None:
    ledger = storm(_SEED, _CALLS)
    assert ledger.findings == Ledger().findings
    assert ledger.calls >= _CALLS
    assert ledger.counts["kills"] > _CALLS // 200
    assert ledger.counts["records"] > _CALLS // 100


@pytest.mark.timeout(3600)
def test_a_program_that_does_not_hold_its_device_is_noticed() -> None:
    plain = Kind(encrypted=False, fs_type="ext4")
    weather = Weather(
        program=(sys.executable, "-m", "tests.machine.storm_plants"),
        kinds=(plain,) * 8,
        pace=(2, 8),
        prey="mkfs",
        until_found=True,
    )
    ledger = storm(_SEED, _MOST_CALLS, weather)
    assert ledger.findings["foreign"] or ledger.findings["lost"], "the planted bug was not noticed"
