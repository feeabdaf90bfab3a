"""A server that lives for months: what it remembers does not grow with the volumes that it has seen."""

from collections.abc import Sized
from pathlib import Path

from csi_driver.host.locks import VolumeLocks
from tests.fake_host import NoHolders


def test_nothing_is_kept_of_a_lock_that_was_released(tmp_path: Path) -> None:
    locks = VolumeLocks(tmp_path, NoHolders(), lambda _: False)
    for number in range(100):
        with locks.hold(f"pvc-{number}"):
            pass
    assert {name: kept for name, kept in vars(locks).items() if isinstance(kept, Sized) and len(kept)} == {}
    assert not list(tmp_path.iterdir())
