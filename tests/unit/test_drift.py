"""A secret that no longer opens its staged volume: told while the volume works on, tried no more often than needed."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from csi_driver.keys.secret import SecretKey, read_secret
from csi_driver.model.errors import DeadlineExceeded
from csi_driver.model.secret import Passphrase
from tests.told_lines import Line, told_lines
from tests.unit.test_staging_model import BLOCK, KEY, NO_KEY, WRONG_KEY, Rig

TOLD = "the secret of a staged volume no longer opens it"
UNTRIED = "the secret of a staged volume could not be tried"


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    rig = Rig(tmp_path)
    rig.create("enc-1")
    rig.stage("enc-1")
    return rig


def tried_and_told(rig: Rig, key: SecretKey, name: str = "enc-1") -> tuple[int, list[str]]:
    """How often a repeated stage derived a key, and the warnings that it logged."""
    steps: list[str] = []
    rig.kernel.plan = steps.append
    with told_lines() as lines:
        rig.stage(name, key=key)
    return steps.count("before check_passphrase"), without_uses(lines)


def without_uses(lines: Sequence[Line]) -> list[str]:
    """The events but for those of the audit trail."""
    return [line.event for line in lines if line.event != "key used"]


def test_a_secret_that_drifted_is_tried_once_and_told_each_time(rig: Rig) -> None:
    assert tried_and_told(rig, WRONG_KEY) == (1, [TOLD])
    assert tried_and_told(rig, WRONG_KEY) == (0, [TOLD])
    assert rig.stages.drifted() == ["enc-1"]
    assert tried_and_told(rig, KEY) == (1, [])
    assert rig.stages.drifted() == []


def test_a_new_passphrase_beside_the_one_that_opens_it_is_no_drift(rig: Rig) -> None:
    changed = read_secret({"CRYPTO_KEY_VALUE": "new", "CRYPTO_KEY_VALUE_PREVIOUS": "right"})
    assert tried_and_told(rig, changed) == (2, [])
    assert tried_and_told(rig, changed) == (0, [])
    neither = read_secret({"CRYPTO_KEY_VALUE": "new", "CRYPTO_KEY_VALUE_PREVIOUS": "wrong"})
    assert tried_and_told(rig, neither) == (2, [TOLD])


def test_a_call_without_a_passphrase_tells_nothing(rig: Rig) -> None:
    assert tried_and_told(rig, NO_KEY) == (0, [])
    rig.stage("enc-1", key=WRONG_KEY)
    assert tried_and_told(rig, NO_KEY) == (0, [])
    assert rig.stages.drifted() == ["enc-1"], "what was seen last holds"


def test_the_secret_that_opened_it_is_not_tried_again(rig: Rig) -> None:
    assert tried_and_told(rig, KEY) == (0, [])


def test_after_a_restart_it_is_tried_once(rig: Rig) -> None:
    rig.stage("enc-1", key=WRONG_KEY)
    rig.restart()
    assert rig.stages.drifted() == ["enc-1"], "what was found outlives the process"
    assert tried_and_told(rig, KEY) == (1, [])
    assert tried_and_told(rig, KEY) == (0, [])
    assert rig.stages.drifted() == []


def test_the_stage_is_written_only_when_that_changes(rig: Rig) -> None:
    def written(key: SecretKey) -> bool:
        steps: list[str] = []
        rig.kernel.plan = steps.append
        rig.stage("enc-1", key=key)
        return any("fill" in step or "rename" in step for step in steps)

    assert [written(key) for key in (KEY, WRONG_KEY, WRONG_KEY, KEY, KEY)] == [False, True, False, True, False]


def rebooted(rig: Rig, _: str) -> None:
    rig.reboot()


@pytest.mark.parametrize("leave", [Rig.unstage, rebooted])
def test_nothing_is_left_of_it_when_the_volume_is_not_staged(rig: Rig, leave: Callable[[Rig, str], None]) -> None:
    rig.stage("enc-1", key=WRONG_KEY)
    leave(rig, "enc-1")
    assert rig.stages.drifted() == []
    rig.stage("enc-1")
    assert tried_and_told(rig, KEY) == (0, [])


def test_what_hinders_the_look_is_no_error_and_it_is_made_again(rig: Rig) -> None:
    def busy(step: str) -> None:
        if step == "before check_passphrase":
            raise DeadlineExceeded("other volumes are being unlocked")

    rig.kernel.plan = busy
    with told_lines() as lines:
        rig.stage("enc-1", key=WRONG_KEY)
    assert without_uses(lines) == [UNTRIED]
    assert rig.stages.drifted() == []
    assert tried_and_told(rig, WRONG_KEY) == (1, [TOLD])


def test_a_full_or_read_only_state_directory_is_no_error(rig: Rig) -> None:
    def read_only(step: str) -> None:
        if "fill" in step:
            raise OSError(30, "Read-only file system")

    rig.kernel.plan = read_only
    with told_lines() as lines:
        rig.stage("enc-1", key=WRONG_KEY)
    assert without_uses(lines) == [TOLD, "a stage could not be written"]


def test_block_volumes_drift_too_and_plain_ones_have_no_key(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    for name in ("enc-2", "plain-1"):
        rig.create(name)
        rig.stage(name, BLOCK)
        rig.stage(name, BLOCK, WRONG_KEY)
    assert rig.stages.drifted() == ["enc-2"]


def test_nothing_that_is_kept_tells_the_passphrase(rig: Rig) -> None:
    key = SecretKey(passphrase=Passphrase(b"another one"))
    with told_lines() as lines:
        rig.stage("enc-1", key=key)
    kept = b"".join(path.read_bytes() for path in (rig.folder / "stages").iterdir())
    assert b"another one" not in kept
    assert "another one" not in f"{lines}{vars(rig.drift)}"
    digests = [Passphrase(b"another one").digest(bytes([number])) for number in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]
