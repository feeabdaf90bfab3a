"""Where a volume is on its node and how it is, as people are told."""

from pathlib import Path

import pytest

from csi_driver.host.fshealth import Ailment
from csi_driver.volumes.condition import Condition
from tests.told_lines import told_lines
from tests.unit.test_staging_model import BLOCK, KEY, WRONG_KEY, Rig


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    rig = Rig(tmp_path)
    for name in ("enc-1", "plain-1"):
        rig.create(name)
    return rig


def condition(rig: Rig, name: str) -> Condition:
    return rig.conditions.of(name, rig.record(name))


@pytest.mark.parametrize("name", ["enc-1", "plain-1"])
@pytest.mark.parametrize("block", [False, True])
def test_it_follows_a_volume_through_its_day(rig: Rig, name: str, block: bool) -> None:  # noqa: FBT001 - a parameter
    closed = condition(rig, name)
    assert (closed, closed.is_closed) == (Condition(None, (), None, "closed"), True)
    if block:
        rig.stage(name, BLOCK)
        assert condition(rig, name) == Condition(rig.staging_path(name), (), healthy=True, health="well")
        rig.unstage(name)
        return
    rig.stage(name)
    rig.publish(name)
    found = condition(rig, name)
    assert found.staged_at == rig.staging_path(name)
    assert (len(found.published_at), found.healthy, found.health) == (1, True, "well")
    assert found.is_staged_at(rig.staging_path(name))
    assert found.is_published_at(found.published_at[0])
    assert found.is_at(found.published_at[0])
    assert not found.is_staged_at(found.published_at[0])
    assert not found.is_published_at(rig.staging_path(name))
    rig.unpublish(name)
    rig.unstage(name)
    assert condition(rig, name) == closed


def test_a_volume_that_never_was_is_closed(rig: Rig) -> None:
    assert rig.conditions.of("nope").is_closed


def test_a_sick_file_system_is_told_with_its_cure(rig: Rig) -> None:
    rig.stage("enc-1")
    mount = next(each for each in rig.kernel.mounted if each.mount_point == rig.staging_path("enc-1"))
    rig.kernel.ailing[mount.device] = Ailment.READ_ONLY
    found = condition(rig, "enc-1")
    assert found.healthy is False
    assert "its file system went read-only after an error" in found.health
    assert "`luks-csi volume check enc-1 --repair`" in found.health


def test_a_mount_that_is_gone_is_told(rig: Rig) -> None:
    rig.stage("enc-1")
    rig.kernel.mounted.clear()
    found = condition(rig, "enc-1")
    assert (found.healthy, found.staged_at) == (False, rig.staging_path("enc-1"))
    assert "gone or not its own; unstage and stage it" in found.health


def test_what_is_open_without_a_stage_can_be_taken_down_from_anywhere(rig: Rig) -> None:
    rig.stage("enc-1")
    rig.stages.remove("enc-1")
    found = condition(rig, "enc-1")
    assert (found.staged_at, found.healthy, found.is_closed) == (None, False, False)
    assert found.is_staged_at("/anywhere")
    assert "no stage is recorded" in found.health


def test_a_secret_that_no_longer_opens_it_is_told(rig: Rig) -> None:
    rig.stage("enc-1", key=KEY)
    rig.stage("enc-1", key=WRONG_KEY)
    assert "its secret no longer opens it" in condition(rig, "enc-1").health


def test_a_stage_with_a_secret_that_protects_nothing_is_warned_of_once(rig: Rig) -> None:
    with told_lines() as lines:
        for name in ("enc-1", "plain-1", "plain-1"):
            rig.stage(name, key=KEY)
    assert [line.fields for line in lines if line.level == "warning"] == [{"volume_id": "plain-1"}]
