"""A seeded handful of the first half of `make keys-kills`, and the proof that it turns red: bugs in changes of keys."""

import random
from collections.abc import Callable, Collection
from dataclasses import replace

import pytest

from csi_driver.backends.base import Backend
from csi_driver.host.handle import Handle
from csi_driver.keys.secret import SecretKey
from csi_driver.luks.rekey import Added
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Settings
from csi_driver.model.volume import NamedSlot, VolumeRecord
from csi_driver.volumes.driver import Driver, build_driver
from csi_driver.volumes.keyslots import KeySlots
from csi_driver.volumes.presence import Presences
from csi_driver.volumes.rekey import Rekeying
from csi_driver.volumes.stages import Stages
from tests.machine.fault_points import Injector, Kind, Point, faulty_host
from tests.machine.fault_scenario import SCENARIOS
from tests.machine.fault_server import Build, faulty_driver
from tests.machine.faults import cases_of, lab
from tests.machine.keys_kills import LEAST_POINTS, of_keys
from tests.machine.test_faults import cases_at, losing, tried

_SEED = 5
_HANDFUL = 4
_OF_KMS = [scenario for scenario in SCENARIOS if scenario.kms]


@pytest.fixture(scope="module")
def points() -> list[Point]:
    with lab() as recorded:
        return of_keys(recorded.record(_OF_KMS))


def test_a_seeded_handful_loses_and_leaks_nothing(points: list[Point]) -> None:
    assert len(points) >= LEAST_POINTS
    result = tried(faulty_driver, random.Random(_SEED).sample(cases_of(points), _HANDFUL))
    assert (result.cases, result.lost, result.leaked) == (_HANDFUL, {}, {})
    assert result.kills


class _OldSlotFirst(KeySlots):
    """The old key's slot goes before the record says that the new key counts."""

    def add_passphrase(
        self,
        backend: Backend,
        record: VolumeRecord,
        device: Handle,
        current: Passphrase,
        new: Passphrase,
        wishes: SecretKey,
        announce: Callable[[Added], None] = lambda _: None,
    ) -> Added:
        added = super().add_passphrase(backend, record, device, current, new, wishes, announce)
        self.remove_passphrase(backend, record, device, (added.present,), new)
        return added


class _NeverDone(KeySlots):
    """The old key's slot stays when the change has ended."""

    def remove_passphrase(
        self, backend: Backend, record: VolumeRecord, device: Handle, slots: Collection[NamedSlot], keep: Passphrase
    ) -> None:
        super().remove_passphrase(backend, record, device, (), keep)


def _with_slots(slots: type[KeySlots]) -> Build:
    def build(settings: Settings, injector: Injector) -> Driver:
        host = faulty_host(injector)
        driver = build_driver(settings, host)
        stages = Stages(settings.state_dir / "stages", host.files)
        presences = Presences(driver.backend, stages, driver.mappings, host.mounts)
        planted = Rekeying(driver.backend, presences, host.workers, slots(host.workers, settings.limits), driver.keys)
        return replace(driver, rekeying=planted)

    return build


_PLANTED = [
    (_with_slots(_OldSlotFirst), "worker luks-remove-key", Kind.AFTER),
    (_with_slots(_NeverDone), "worker luks-add-key", Kind.AFTER),
    (losing, "worker luks-remove-key", Kind.AFTER),
]


@pytest.mark.parametrize(("plant", "seam", "kind"), _PLANTED, ids=["old slot first", "never done", "losing records"])
def test_a_planted_bug_turns_it_red(points: list[Point], plant: Build, seam: str, kind: Kind) -> None:
    result = tried(plant, cases_at(points, "kms", "rotate", seam, kind))
    assert result.lost


def test_what_a_planted_bug_turns_red_is_green_without_it(points: list[Point]) -> None:
    cases = {case for _, seam, kind in _PLANTED for case in cases_at(points, "kms", "rotate", seam, kind)}
    result = tried(faulty_driver, sorted(cases, key=str))
    assert (result.cases, result.lost, result.leaked) == (2, {}, {})
