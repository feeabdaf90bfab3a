"""A seeded handful of `make faults`, and the proof that it turns red: bugs planted through the seams of the host."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from csi_driver.host.commands import Commands
from csi_driver.host.devicemapper import Device
from csi_driver.host.handle import Handle
from csi_driver.host.loop import AttachedLoop
from csi_driver.images.cluster import ClusterImages
from csi_driver.images.store import ImageStore
from csi_driver.luks.blank import prove_blank
from csi_driver.luks.mapping import Fit
from csi_driver.model.settings import Settings
from csi_driver.model.volume import VolumeRecord
from csi_driver.volumes.drift import KeyDrift
from csi_driver.volumes.driver import Driver, build_driver
from csi_driver.volumes.filesystem import FileSystems
from csi_driver.volumes.from_image import BackingImages
from csi_driver.volumes.keyslots import KeySlots
from csi_driver.volumes.presence import Presences
from csi_driver.volumes.provision import Provisioning
from csi_driver.volumes.stage import Staging
from csi_driver.volumes.stages import Stages
from tests.fake_host import at_home
from tests.machine.fault_points import FaultyFiles, FaultyLoops, FaultyWorkers, Injector, Kind, P, Point, R, faulty_host
from tests.machine.fault_server import Build, faulty_driver
from tests.machine.faults import LEAST_POINTS, Case, Result, cases_of, lab

_HANDFUL = 40
_SEED = 7


@pytest.fixture(scope="module")
def points() -> list[Point]:
    with lab() as recorded:
        return recorded.record()


def tried(build: Build, cases: Sequence[Case]) -> Result:
    assert cases
    with lab(build, _SEED) as laboratory:
        return laboratory.try_all(cases)


def cases_at(points: Sequence[Point], scenario: str, call: str, seam: str, kind: Kind) -> list[Case]:
    """The cases of one kind at the first use of a seam."""
    return [
        case
        for case in cases_of(points)
        if (case.point.scenario, case.point.call, case.point.seam, case.point.nth, case.kind)
        == (scenario, call, seam, 1, kind)
    ]


@pytest.mark.timeout(1500)
def test_a_seeded_handful_loses_and_leaks_nothing(points: list[Point]) -> None:
    assert len(points) >= LEAST_POINTS
    result = tried(faulty_driver, random.Random(_SEED).sample(cases_of(points), _HANDFUL))
    assert (result.cases, result.lost, result.leaked) == (_HANDFUL, {}, {})
    assert result.kills > _HANDFUL // 4


@pytest.mark.parametrize("seam", ["worker luks-format", "worker mkfs.ext4"])
def test_a_child_of_a_killed_server_keeps_the_volume_busy_until_it_ends(points: list[Point], seam: str) -> None:
    result = tried(faulty_driver, cases_at(points, "mount", "stage", seam, Kind.DURING))
    assert (result.busy, result.lost, result.leaked) == (1, {}, {})


def test_a_clone_of_an_image_is_whole_or_gone_on_with_wherever_it_is_cut(points: list[Point]) -> None:
    cut = [
        case
        for seam in ("worker luks-clone", "worker luks-identity")
        for kind in (Kind.DURING, Kind.AFTER, Kind.WORKER)
        for case in cases_at(points, "image", "create", seam, kind)
    ]
    result = tried(faulty_driver, cut)
    assert (result.cases, result.busy, result.lost, result.leaked) == (6, 2, {}, {})


class _LosingFiles(FaultyFiles):
    """Records without fsync: what a killed server has written is gone."""

    def __init__(self, injector: Injector) -> None:
        super().__init__(injector)
        self._before: dict[Path, bytes | None] = {}
        injector.before_death.append(self._lose)

    def write(self, path: Path, content: bytes) -> None:
        self._before.setdefault(path, path.read_bytes() if path.exists() else None)
        super().write(path, content)

    def _lose(self) -> None:
        for path, content in self._before.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)


class _LeakyLoops(FaultyLoops):
    """Loop devices that stay when nobody uses them any more."""

    def attach(self, path: str, *, autoclear: bool, read_only: bool = False) -> AttachedLoop:
        return super().attach(path, autoclear=False, read_only=read_only)


class _CarelessWorkers(FaultyWorkers):
    """Takes every device for blank."""

    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        if function is prove_blank:
            return None  # type: ignore[return-value]
        return super().call(what, timeout, function, *args, **kwargs)


class _CarelessPresences(Presences):
    """Takes any open mapping of the volume's name for the volume's."""

    def fit(self, volume_id: str, mapping: Device, uuid: str) -> Fit:
        return Fit.FITS


class _SameIdentity(KeySlots):
    """Takes a clone as it is, with its image's LUKS UUID."""

    def take_identity(self, record: VolumeRecord, clone: Handle) -> VolumeRecord:
        assert record.luks is not None
        assert record.cloned_uuid is not None
        luks = msgspec.structs.replace(record.luks, uuid=record.cloned_uuid)
        return super().take_identity(msgspec.structs.replace(record, luks=luks), clone)


def losing(settings: Settings, injector: Injector) -> Driver:
    return build_driver(settings, replace(faulty_host(injector), files=_LosingFiles(injector)))


def leaking(settings: Settings, injector: Injector) -> Driver:
    return build_driver(settings, replace(faulty_host(injector), loops=_LeakyLoops(injector)))


def unproven(settings: Settings, injector: Injector) -> Driver:
    return build_driver(settings, replace(faulty_host(injector), workers=_CarelessWorkers(injector)))


def reusing(settings: Settings, injector: Injector) -> Driver:
    host = faulty_host(injector)
    driver = build_driver(settings, host)
    stages = Stages(settings.state_dir / "stages", host.files)
    made = FileSystems(host.workers, Commands(host.workers), host.mounts, host.holders, settings.limits)
    presences = _CarelessPresences(driver.backend, stages, driver.mappings, host.mounts)
    drift = KeyDrift(driver.backend, stages, KeySlots(host.workers, settings.limits), driver.keys)
    staging = Staging(
        driver.backend,
        driver.state.check,
        stages,
        presences,
        host.workers,
        driver.encryption,
        made,
        driver.mappings,
        driver.healing,
        drift,
        driver.keys,
        driver.rekeying,
        at_home(driver.backend),
    )
    return replace(driver, staging=staging)


def same(settings: Settings, injector: Injector) -> Driver:
    host = faulty_host(injector)
    driver = build_driver(settings, host)
    slots = _SameIdentity(host.workers, settings.limits)
    here = settings.state_dir / "images"
    images = BackingImages(
        ImageStore(here, host.files), ClusterImages(here), host.workers, slots, driver.keys, settings.limits
    )
    provisioning = Provisioning(
        settings, driver.backend, images, driver.state.check, driver.staging.release, driver.keys
    )
    return replace(driver, provisioning=provisioning)


_PLANTED = [
    (losing, "mount", "stage", "worker luks-open", Kind.AFTER, "lost"),
    (leaking, "mount", "stage", "worker luks-open", Kind.FAIL, "leaked"),
    (unproven, "plain mount", "stage", "loop attach", Kind.FOREIGN, "lost"),
    (reusing, "mount", "restage", "loop guard", Kind.ZOMBIE, "lost"),
    (same, "image", "create", "worker luks-identity", Kind.AFTER, "lost"),
]


@pytest.mark.parametrize(("plant", "scenario", "call", "seam", "kind", "verdict"), _PLANTED)
def test_a_planted_bug_turns_it_red(
    points: list[Point], plant: Build, scenario: str, call: str, seam: str, kind: Kind, verdict: str
) -> None:
    result = tried(plant, cases_at(points, scenario, call, seam, kind))
    assert getattr(result, verdict)


def test_what_a_planted_bug_turns_red_is_green_without_it(points: list[Point]) -> None:
    result = tried(faulty_driver, [case for planted in _PLANTED for case in cases_at(points, *planted[1:5])])
    assert (result.cases, result.lost, result.leaked) == (len(_PLANTED), {}, {})
