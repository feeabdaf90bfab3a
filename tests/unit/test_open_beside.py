"""A volume's device that somebody has open beside the driver: nothing is done to it until that is closed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from csi_driver.host import blockdev
from csi_driver.keys.secret import read_secret
from csi_driver.model.errors import DeviceInUse
from tests.fake_kernel import FakeMapping
from tests.unit.test_check import Scripted, checking
from tests.unit.test_staging_model import KEY, Rig, no_fault

SECONDS = 60.0
NEW = read_secret({"CRYPTO_KEY_VALUE": "a new one"}).passphrase


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    """A volume that was used, closed, and open as `rec` on a loop device of its own."""
    rig = Rig(tmp_path)
    rig.create("enc-1")
    rig.stage("enc-1")
    rig.write("enc-1", "a", "written")
    rig.unstage("enc-1")
    with rig.backend.attach("enc-1", lasting=False) as loop:
        rig.kernel.loops.use(loop.name)
        rig.kernel.mappings["rec"] = FakeMapping("rec", "CRYPT-LUKS2-0-rec", 77, loop.name, 1, open_count=1)
    return rig


def close(rig: Rig) -> None:
    rig.kernel.loops.release(rig.kernel.mappings.pop("rec").loop)


CALLS: dict[str, Callable[[Rig], object]] = {
    "stage": lambda rig: rig.stage("enc-1"),
    "check": lambda rig: checking(rig, Scripted(rig)).check("enc-1", KEY, repair=True, seconds=SECONDS),
    "rotate": lambda rig: rig.rekeying.rotate("enc-1", KEY, NEW),
    "delete": lambda rig: rig.delete("enc-1"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_open_beside_is_named_with_what_closes_it_and_nothing_is_done(
    rig: Rig, call: Callable[[Rig], object]
) -> None:
    before = rig.record("enc-1"), rig.kernel.traces("enc-1"), rig.kernel.read("/dev/mapper/rec")
    with pytest.raises(DeviceInUse, match=r"volume enc-1 on .* open as /dev/mapper/rec too.*cryptsetup close rec"):
        call(rig)
    assert before == (rig.record("enc-1"), rig.kernel.traces("enc-1"), rig.kernel.read("/dev/mapper/rec"))
    close(rig)
    rig.stage("enc-1")
    assert rig.kernel.read(rig.device("enc-1")).inside.files == {"a": "written"}
    rig.unstage("enc-1")


def test_what_is_opened_while_a_stage_derives_the_key_is_seen_behind_it(rig: Rig) -> None:
    close(rig)
    (traces, kernel) = rig.kernel.traces("enc-1"), rig.kernel

    def plan(step: str) -> None:
        if step == "before open_device":
            (loop,) = kernel.loops.bound
            kernel.loops.use(loop)
            kernel.mappings["rec"] = FakeMapping("rec", "CRYPT-LUKS2-0-rec", 77, loop, 1, open_count=1)

    kernel.plan = plan
    with pytest.raises(DeviceInUse, match="open as /dev/mapper/rec too"):
        rig.stage("enc-1")
    kernel.plan = no_fault
    close(rig)
    assert kernel.traces("enc-1") == traces == []
    rig.stage("enc-1")


def test_a_stage_that_is_complete_does_not_ask(rig: Rig) -> None:
    close(rig)
    rig.stage("enc-1")
    loop = rig.kernel.mappings["luks-enc-1"].loop
    rig.kernel.mappings["rec"] = FakeMapping("rec", "CRYPT-LUKS2-0-rec", 77, loop, 1)
    rig.stage("enc-1")


def test_a_device_that_has_gone_has_nobody_on_it() -> None:
    assert blockdev.on_top_of((4095, 1)) == []
