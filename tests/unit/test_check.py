"""`luks-csi volume check`: what it refuses, what it runs, what it prints; nothing is formatted or made by it."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from click.testing import CliRunner, Result

from csi_driver.cli.volume import volume
from csi_driver.host.commands import Completed
from csi_driver.host.handle import Handle
from csi_driver.host.log import log
from csi_driver.keys.secret import SecretKey
from csi_driver.model.errors import DeviceInUse, DeviceUnreadable, FailedPrecondition, NotFound, Unauthenticated
from csi_driver.model.settings import Limits, Settings
from csi_driver.volumes.check import Checked, Checking, Verdict
from csi_driver.volumes.driver import Driver, build_driver
from csi_driver.volumes.filesystem import FSCK, PROGRAMS
from csi_driver.volumes.offline import Offline
from csi_driver.volumes.presence import Presences
from tests.fake_host import at_home
from tests.fake_kernel import KernelCommands, KernelMounts, KernelWorkers
from tests.unit.test_staging_model import BLOCK, KEY, WRONG_KEY, Rig

SECONDS = 60.0


class Scripted(KernelCommands):
    """Programs that end as they are told, one after the other."""

    def __init__(self, rig: Rig, *codes: int) -> None:
        super().__init__(rig.kernel)
        self.rig, self.codes = rig, list(codes)
        self.ran: list[list[str]] = []

    def run(
        self,
        argv: Sequence[str | Handle],
        *,
        timeout: float,
        ok_codes: Sequence[int] = (0,),
        by_name: bool = False,
    ) -> Completed:
        assert timeout == SECONDS
        self.ran.append([str(one) for one in argv])
        assert self.rig.guarded(Path(self.rig.kernel.loops.bound[self.loop(argv[-1])].info.backing_path).parent.name)
        code = self.codes.pop(0)
        assert code in ok_codes
        if argv[1:3] == ["-f", "-y"]:
            self.mend(str(argv[-1]))
        return Completed(code, f"said {len(self.ran)}\n", "")

    def loop(self, device: str | Handle) -> str:
        return self.rig.kernel.loop_below(str(device))

    def mend(self, device: str) -> None:
        content = self.rig.kernel.read(device)
        content.inside.flagged = False
        self.rig.kernel.write(device, content)


def checking(rig: Rig, commands: KernelCommands) -> Checking:
    workers = KernelWorkers(rig.kernel)
    presences = Presences(rig.backend, rig.stages, rig.mappings, KernelMounts(rig.kernel))
    return Checking(
        rig.backend,
        presences,
        workers,
        commands,
        rig.mappings,
        rig.encryption,
        rig.file_systems,
        rig.keys,
        at_home(rig.backend),
        Limits(),
    )


def check(rig: Rig, *codes: int, name: str = "enc-1", repair: bool = False, key: SecretKey = KEY) -> Checked:
    """A check in which the programs end with these codes, all of them run; it leaves nothing open."""
    commands = Scripted(rig, *codes)
    try:
        return checking(rig, commands).check(name, key, repair=repair, seconds=SECONDS)
    finally:
        assert not commands.codes
        assert rig.kernel.traces(name) == []
        assert not rig.guarded(name)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    """Two volumes with a file system, closed."""
    rig = Rig(tmp_path)
    for name in ("enc-1", "plain-1"):
        rig.create(name)
        rig.stage(name)
        rig.unstage(name)
    return rig


@pytest.mark.parametrize("name", ["enc-1", "plain-1"])
def test_a_well_one_is_looked_at_once_even_if_it_may_be_mended(rig: Rig, name: str) -> None:
    record = rig.record(name)
    for repair in (False, True):
        found = check(rig, 0, name=name, repair=repair)
        assert (found.volume_id, found.fs_type, found.verdict) == (name, "ext4", Verdict.WELL)
    assert rig.record(name) == record


@pytest.mark.parametrize(
    ("codes", "repair", "verdict"),
    [
        ((4,), False, Verdict.DAMAGED),
        ((4, 1, 0), True, Verdict.MENDED),
        ((4, 0, 4), True, Verdict.DAMAGED),
        ((8, 8, 8), True, Verdict.DAMAGED),
    ],
)
def test_what_helped_a_second_check_says(rig: Rig, codes: tuple[int, ...], *, repair: bool, verdict: Verdict) -> None:
    found = check(rig, *codes, repair=repair)
    assert found.verdict is verdict
    device = "/dev/mapper/luks-enc-1"
    first = [f"$ e2fsck -f -n {device}", "said 1", f"exit code {codes[0]}"]
    assert found.said.splitlines()[:3] == first
    assert found.said.count("$ e2fsck -f -y") == repair


def test_nothing_is_mended_whose_journal_the_storage_does_not_take(rig: Rig) -> None:
    rig.kernel.takes_no_writes = True
    with pytest.raises(DeviceUnreadable, match="cannot be replayed"):
        check(rig, 4, repair=True)
    rig.kernel.takes_no_writes = False
    assert check(rig, 4, 1, 0, repair=True).verdict is Verdict.MENDED


def test_what_the_device_did_not_take_is_not_mended(rig: Rig) -> None:
    def plan(step: str) -> None:
        if step == "before fsync_device":
            raise DeviceUnreadable("the device did not take it")

    rig.kernel.plan = plan
    with pytest.raises(DeviceUnreadable, match="did not take it"):
        check(rig, 4, 1, repair=True)


def test_the_error_flag_is_a_damage_that_e2fsck_does_not_tell(rig: Rig) -> None:
    rig.stage("enc-1")
    content = rig.kernel.read(rig.device("enc-1"))
    content.inside.flagged = True
    rig.kernel.write(rig.device("enc-1"), content)
    rig.unstage("enc-1")
    assert check(rig, 0).verdict is Verdict.DAMAGED
    assert check(rig, 0, 1, 0, repair=True).verdict is Verdict.MENDED


def published(rig: Rig) -> None:
    rig.stage("enc-1")
    rig.publish("enc-1")


USES: dict[str, Callable[[Rig], None]] = {
    "staged": lambda rig: rig.stage("enc-1"),
    "as a block device": lambda rig: rig.stage("enc-1", BLOCK),
    "published": published,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_one_in_use_is_left_alone(rig: Rig, use: Callable[[Rig], None]) -> None:
    use(rig)
    before = rig.kernel.traces("enc-1")
    with pytest.raises(DeviceInUse, match=r"volume enc-1 is in use.* end its pods"):
        checking(rig, Scripted(rig)).check("enc-1", KEY, repair=True, seconds=SECONDS)
    assert rig.kernel.traces("enc-1") == before


def test_a_mapping_that_a_killed_call_left_is_no_user(rig: Rig) -> None:
    rig.stage("enc-1")
    KernelMounts(rig.kernel).unmount(rig.staging_path("enc-1"))
    with pytest.raises(DeviceInUse):
        checking(rig, Scripted(rig)).check("enc-1", KEY, repair=False, seconds=SECONDS)
    rig.stages.remove("enc-1")
    assert check(rig, 0).verdict is Verdict.WELL


def test_what_was_never_made_is_told(rig: Rig) -> None:
    for name, words in (("enc-2", "was never staged"), ("plain-2", "has no file system yet")):
        rig.create(name)
        with pytest.raises(FailedPrecondition, match=words):
            check(rig, name=name, repair=True)
    rig.stage("enc-2", BLOCK)
    rig.unstage("enc-2")
    with pytest.raises(FailedPrecondition, match="no file system that is known here"):
        check(rig, name="enc-2", repair=True)
    assert rig.kernel.formats == 2
    with pytest.raises(NotFound):
        check(rig, name="other")


def test_a_wrong_secret_opens_nothing(rig: Rig) -> None:
    with pytest.raises(Unauthenticated):
        check(rig, key=WRONG_KEY, repair=True)


def test_each_file_system_has_what_checks_and_mends_it() -> None:
    for fs_type, (look, mend) in FSCK.items():
        assert look[0] == mend[0]
        assert look != mend
        assert look[0] in PROGRAMS[fs_type]


# --- the command -----------------------------------------------------------------------------------------------------


class FakeChecking(Checking):
    def __init__(self, verdict: Verdict) -> None:
        self._verdict = verdict
        self.asked: list[tuple[str, SecretKey, bool, float]] = []

    def check(self, volume_id: str, key: SecretKey, *, repair: bool, seconds: float) -> Checked:
        self.asked.append((volume_id, key, repair, seconds))
        return Checked(volume_id, "ext4", self._verdict, "$ e2fsck\nfine\x1b[31m")


def run(rig: Rig, fake: FakeChecking, *arguments: str) -> Result:
    def build(settings: Settings) -> Driver:
        assert settings.state_dir == rig.folder
        return dataclasses.replace(
            build_driver(settings), offline=lambda: cast(Offline, SimpleNamespace(checking=fake))
        )

    key = rig.folder / "key"
    key.write_text("right\n")
    argv = ["check", *arguments, "--state-dir", str(rig.folder), "--passphrase-file", str(key)]
    try:
        return CliRunner().invoke(volume, argv, obj=build)
    finally:
        log.set_up()  # the command sets up the logs of its process


@pytest.mark.parametrize(
    ("verdict", "code", "words"),
    [(Verdict.WELL, 0, "is well"), (Verdict.MENDED, 0, "was mended"), (Verdict.DAMAGED, 1, "is DAMAGED")],
)
def test_the_command_prints_what_was_said_and_a_verdict(rig: Rig, verdict: Verdict, code: int, words: str) -> None:
    fake = FakeChecking(verdict)
    done = run(rig, fake, "enc-1")
    assert done.exit_code == code
    assert done.stdout.startswith("$ e2fsck\nfine")
    assert "\x1b" not in done.stdout
    assert f"the ext4 file system of volume enc-1 {words}" in done.stdout.splitlines()[-1]
    assert fake.asked == [("enc-1", KEY, False, 86400.0)]
    done = run(rig, fake, "enc-1", "-o", "json", "--repair", "--yes", "--seconds", "5")
    assert done.exit_code == code
    assert json.loads(done.stdout)["verdict"] == verdict
    assert fake.asked[-1] == ("enc-1", KEY, True, 5.0)


def test_a_repair_wants_a_yes_and_an_id_that_can_be_one(rig: Rig) -> None:
    fake = FakeChecking(Verdict.WELL)
    assert "backup" in run(rig, fake, "enc-1", "--repair").output
    assert run(rig, fake, "../enc-1").exit_code == 2
    done = run(rig, fake, "unknown")
    assert isinstance(done.exception, NotFound)
    assert fake.asked == []
    assert not (rig.folder / "locks" / "unknown").exists()
