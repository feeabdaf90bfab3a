"""`luks-csi doctor` and `luks-csi orphans`."""

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from csi_driver.cli.doctor import doctor
from csi_driver.cli.orphans import orphans
from csi_driver.host.files import Files
from csi_driver.host.holders import Holders
from csi_driver.host.locks import VolumeLocks
from csi_driver.model.settings import Settings
from csi_driver.volumes.driver import Driver, build_driver
from csi_driver.volumes.finding import Finding
from csi_driver.volumes.stages import Stage, Stages
from tests.fakes import FakeHealth

FINE = Finding("clock", ok=True, fatal=False, found="2026-11-20T00:00:00Z")
WARNING = Finding("swap", ok=False, fatal=False, found="swap is on", advice="turn swap off or encrypt it")
FATAL = Finding("dm-crypt", ok=False, fatal=True, found="no device-mapper", advice="load the kernel module dm_mod")


class FoundHealth(FakeHealth):
    def __init__(self, *findings: Finding) -> None:
        super().__init__()
        self._findings = list(findings)

    def findings(self) -> list[Finding]:
        return self._findings


def run(*findings: Finding, arguments: tuple[str, ...] = ()) -> Result:
    def build(settings: Settings) -> Driver:
        return dataclasses.replace(build_driver(settings), health=FoundHealth(*findings))

    return CliRunner().invoke(doctor, arguments, obj=build)


def test_each_finding_has_a_mark_and_what_is_amiss_has_advice() -> None:
    done = run(FATAL, WARNING, FINE)
    assert done.stdout.splitlines() == [
        "FAIL  dm-crypt  no device-mapper",
        "                -> load the kernel module dm_mod",
        "warn  swap      swap is on",
        "                -> turn swap off or encrypt it",
        "ok    clock     2026-11-20T00:00:00Z",
    ]


@pytest.mark.parametrize(("findings", "code"), [((FINE, WARNING), 0), ((FINE, FATAL), 1)])
def test_only_what_stops_staging_fails(findings: tuple[Finding, ...], code: int) -> None:
    assert run(*findings).exit_code == code
    assert run(*findings, arguments=("--output", "json")).exit_code == code


def test_json_has_the_findings_as_they_are() -> None:
    found = json.loads(run(WARNING, arguments=("-o", "json")).stdout)
    assert found == [dataclasses.asdict(WARNING)]


def test_long_findings_are_broken_where_the_terminal_ends() -> None:
    long = Finding("programs", ok=False, fatal=False, found="not installed: " + "mkfs.xfs " * 20, advice="install")
    for line in run(long).stdout.splitlines():
        assert len(line) <= 100


def looked_at(state_dir: Path) -> dict[str, dict[str, object]]:
    done = CliRunner().invoke(doctor, ["--state-dir", str(state_dir), "-o", "json"])
    return {finding["name"]: finding for finding in json.loads(done.stdout)}


def test_before_the_first_start_nothing_is_amiss_with_a_state_directory_that_can_be_made(tmp_path: Path) -> None:
    found = looked_at(tmp_path / "lib" / "none")
    assert found["state directory"]["ok"]
    assert found["state directory"]["found"] == (
        f"{tmp_path}/lib/none is not there yet; the first start of the driver makes it"
    )
    assert found["libcryptsetup"]["ok"], found["libcryptsetup"]
    assert found["programs"]["ok"], found["programs"]
    assert "orphans" not in found
    assert not (tmp_path / "lib").exists()
    found = looked_at(tmp_path)
    assert (found["orphans"]["ok"], found["orphans"]["found"]) == (True, "none; no driver was started here yet")
    assert (found["free space"]["ok"], found["free space"]["found"]) == (
        True, "not looked at; no driver was started here yet",
    )  # fmt: skip


def test_a_state_directory_that_cannot_be_made_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = looked_at(tmp_path / "file" / "none")["state directory"]
    assert (found["ok"], found["fatal"]) == (False, True)
    assert f"is not there and cannot be made in {tmp_path}/file" in str(found["found"])
    assert found["advice"] == "name another folder"


def test_a_state_directory_that_goes_away_while_the_driver_runs_is_a_finding(tmp_path: Path) -> None:
    driver = build_driver(Settings(state_dir=tmp_path / "state", endpoint=tmp_path / "csi.sock"))
    driver.start()
    (tmp_path / "state").rename(tmp_path / "gone")
    try:
        found = next(finding for finding in driver.health.findings() if finding.name == "state directory")
    finally:
        driver.stop()
    assert not found.ok
    assert "is not the one that this driver was started with" in found.found


def test_secrets_that_no_longer_open_their_staged_volumes_are_named(tmp_path: Path) -> None:
    def looked() -> dict[str, object]:
        done = CliRunner().invoke(doctor, ["--state-dir", str(tmp_path), "-o", "json"])
        findings: list[dict[str, object]] = json.loads(done.stdout)
        return next(finding for finding in findings if finding["name"] == "secrets")

    assert looked()["ok"]
    stages = Stages(tmp_path / "stages", Files())
    for name, drifted in (("pvc-1", False), ("pvc-2", True)):
        stages.put(name, Stage(staging_path="/stage", block=True, device="/dev/mapper/x", key_drift=drifted))
    found = looked()
    assert (found["ok"], found["fatal"], found["found"]) == (False, False, "the secret no longer opens: pvc-2")
    assert "before this node boots again" in str(found["advice"])


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with a half-made and a half-deleted volume, and a folder that lost its record."""
    for folder in ("locks", "stages"):
        (tmp_path / folder).mkdir()
    for folder in ("new/half-made", "trash/half-deleted", "volumes/nameless"):
        (tmp_path / "loopfile" / folder).mkdir(parents=True)
        (tmp_path / "loopfile" / folder / "disk.img").write_bytes(b"data")
    return tmp_path


def run_orphans(state: Path, *arguments: str) -> Result:
    return CliRunner().invoke(orphans, [*arguments, "--state-dir", str(state)])


def test_doctor_counts_orphans(state: Path) -> None:
    done = CliRunner().invoke(doctor, ["--state-dir", str(state), "-o", "json"])
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert found["orphans"]["found"].startswith(f"left by killed calls: {state}/loopfile/new/half-made, ")
    assert found["free space"]["name"] == "free space"


def test_orphans_are_listed(state: Path) -> None:
    expected = [f"{state}/loopfile/{name}" for name in ("new/half-made", "trash/half-deleted", "volumes/nameless")]
    assert run_orphans(state, "list").stdout.splitlines() == expected
    assert json.loads(run_orphans(state, "list", "-o", "json").stdout) == [
        {"path": path, "removed": False} for path in expected
    ]


def test_orphans_are_removed_when_told_so_and_what_may_hold_data_stays(state: Path) -> None:
    done = run_orphans(state, "remove", "--yes")
    assert done.exit_code == 0
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["removed", f"{state}/loopfile/trash/half-deleted"],
        ["removed", f"{state}/loopfile/new/half-made"],
        ["kept", f"{state}/loopfile/volumes/nameless"],
    ]
    assert [path.name for path in (state / "loopfile").glob("*/*")] == ["nameless"]
    assert json.loads(run_orphans(state, "remove", "--yes", "-o", "json").stdout) == [
        {"path": f"{state}/loopfile/volumes/nameless", "removed": False}
    ]
    assert [path.name for path in (state / "locks").iterdir()] == ["nameless"]


def test_without_a_terminal_orphans_are_removed_only_with_yes(state: Path) -> None:
    done = run_orphans(state, "remove")
    assert done.exit_code == 2
    assert "--yes" in done.stderr
    assert len(list((state / "loopfile").glob("*/*"))) == 3


def test_a_volume_that_a_call_is_at_work_on_is_left_alone(state: Path) -> None:
    with VolumeLocks(state / "locks", Holders()).hold("half-made"):
        done = run_orphans(state, "remove", "--yes")
    assert "half-made" in str(done.exception)
    assert (state / "loopfile/new/half-made/disk.img").exists()


def test_no_state_directory_is_one_sentence(tmp_path: Path) -> None:
    done = run_orphans(tmp_path / "none", "list")
    assert done.exit_code == 1
    assert f"the leftovers in {tmp_path}/none cannot be looked at (No such file or directory" in done.stderr
    assert run_orphans(tmp_path / "none", "remove", "--yes").exit_code == 1


def test_no_leftovers_is_said(tmp_path: Path) -> None:
    for folder in ("new", "trash", "volumes"):
        (tmp_path / "loopfile" / folder).mkdir(parents=True)
    assert run_orphans(tmp_path, "list").stdout == "no leftovers\n"
    assert run_orphans(tmp_path, "remove").stdout == "no leftovers\n"
    assert json.loads(run_orphans(tmp_path, "remove", "-o", "json").stdout) == []
