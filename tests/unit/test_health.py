"""What `doctor` says of memory, swap, disks and the kernel's key quota, and that none of it makes Probe fail."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from csi_driver.backends import librbd
from csi_driver.backends.rbdaccess import CephAccess
from csi_driver.backends.records import RecordCodec
from csi_driver.host.commands import Commands
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.files import Files
from csi_driver.host.holders import Holders
from csi_driver.host.keyquota import KeyQuota, read_key_quota
from csi_driver.host.krbd import MappedImages
from csi_driver.host.machine import Disk, Machine, OwnProcesses, Swap
from csi_driver.host.mounts import Mounts
from csi_driver.keys.ledger import KeyEntry, KeyLedger
from csi_driver.luks.mapping import Mappings
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.settings import Limits, Service, Settings
from csi_driver.model.volume import (
    EncryptionState,
    KeyTrail,
    Move,
    MovePhase,
    Rekey,
    RekeyPhase,
    VolumeParameters,
    VolumeRecord,
)
from csi_driver.volumes.driver import build_driver
from csi_driver.volumes.finding import Finding
from csi_driver.volumes.health import Health
from csi_driver.volumes.stages import Stages
from tests.told_lines import told_lines

GIB = 1 << 30
ROOMY = KeyQuota(11, 1_000_000, 500, 25_000_000)


class FakeMachine(Machine):
    def __init__(self) -> None:
        super().__init__()
        self.memory = 8 * GIB
        self.swapping = Swap(0, ())
        self.of_state = Disk("/dev/sda1", "ext4", 100 * GIB)

    def available_memory(self) -> int:
        return self.memory

    def swap(self) -> Swap:
        return self.swapping

    def disk(self, folder: Path) -> Disk:
        return self.of_state

    def own_processes(self) -> OwnProcesses:
        return OwnProcesses(3, 4096)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(node_id="n", state_dir=tmp_path, kubelet_dir=tmp_path / "none", free_space_floor=10 * GIB)


Found = Callable[..., Finding]
Build = Callable[..., Health]


@pytest.fixture
def health() -> Iterator[Build]:
    """Make the health of a driver, on this machine where nothing else is given."""
    with contextlib.ExitStack() as stack:

        def build(settings: Settings, machine: Machine, quota: KeyQuota = ROOMY) -> Health:
            driver, mapper = build_driver(settings), DeviceMapper()
            stack.callback(driver.stop)
            mappings = Mappings(mapper, Holders())
            return Health(
                settings, driver.backend, Stages(settings.state_dir, Files()),
                Commands(driver.workers), mapper, mappings, Mounts(), lambda: None, list, lambda: machine,
                lambda: quota,
            )  # fmt: skip

        yield build


@pytest.fixture
def found(health: Build) -> Found:
    """Make one finding, which is never fatal."""

    def find(name: str, settings: Settings, machine: Machine, quota: KeyQuota = ROOMY) -> Finding:
        (finding,) = (each for each in health(settings, machine, quota).findings() if each.name == name)
        assert not finding.fatal
        return finding

    return find


def test_swap_that_is_not_encrypted_is_named(found: Found, settings: Settings) -> None:
    machine = FakeMachine()
    assert found("swap", settings, machine).found == "no swap"
    machine.swapping = Swap(2 * GIB, ())
    assert found("swap", settings, machine) == Finding(
        "swap", ok=True, fatal=False, found="2.0 GiB of swap, encrypted or in memory"
    )
    machine.swapping = Swap(2 * GIB, ("/dev/sda2", "/swap"))
    finding = found("swap", settings, machine)
    assert not finding.ok
    assert "/dev/sda2, /swap is not known to be encrypted" in finding.found


def test_memory_that_key_derivations_may_want_and_is_not_there_is_told(found: Found, settings: Settings) -> None:
    machine = FakeMachine()
    costly = replace(settings, limits=Limits(pbkdf_memory_kib=1 << 20, unlocks_at_once=9))
    assert found("memory", settings, machine).ok
    finding = found("memory", costly, machine)
    assert not finding.ok
    assert finding.found == "9 key derivations at once of up to 1024 MiB, and 8.0 GiB of memory are available"
    assert "--unlocks-at-once" in finding.advice


def cannot_be_loaded() -> str:
    raise FailedPrecondition("librados.so.2 cannot be loaded")


def refused(_: CephAccess) -> str:
    raise FailedPrecondition("the Ceph cluster one refuses client.a; correct the key")


def test_what_images_of_ceph_need_is_looked_for_where_they_are_used(
    found: Found, health: Build, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, of_ceph = FakeMachine(), replace(settings, backend="rbd")
    for other in (settings, replace(of_ceph, services=frozenset({Service.CONTROLLER}))):
        assert "krbd" not in {finding.name for finding in health(other, machine).findings()}
    monkeypatch.setattr(MappedImages, "is_loaded", False)
    finding = found("krbd", of_ceph, machine)
    assert (finding.ok, finding.found) == (
        False, "the kernel's module rbd is not loaded, and the first volume has to load it",
    )  # fmt: skip
    monkeypatch.setattr(MappedImages, "is_loaded", True)
    assert found("krbd", of_ceph, machine).ok
    assert "ceph" not in {finding.name for finding in health(settings, machine).findings()}
    monkeypatch.setattr(librbd, "version", lambda: "librados 3.0.0, librbd 1.16.0")
    assert found("ceph", of_ceph, machine).found == "librados 3.0.0, librbd 1.16.0"
    monkeypatch.setattr(librbd, "version", cannot_be_loaded)
    assert "install the package librbd1" in found("ceph", of_ceph, machine).advice
    assert found("clusters", of_ceph, machine).found == "the server has no user of its own: each call brings one"
    monkeypatch.setattr(CephAccess, "reached", refused)
    assert found("clusters", of_ceph, machine) == Finding(
        "clusters", ok=False, fatal=False, found="the Ceph cluster one refuses client.a", advice="correct the key"
    )


def test_a_disk_that_a_restart_empties_is_told(found: Found, settings: Settings) -> None:
    machine = FakeMachine()
    assert found("disk", settings, machine).found == f"{settings.state_dir} is on /dev/sda1 (ext4, 100.0 GiB)"
    machine.of_state = Disk("overlay", "overlay", GIB)
    assert not found("disk", settings, machine).ok


def test_a_floor_below_kubelets_threshold_is_told_with_the_least(found: Found, settings: Settings) -> None:
    machine = FakeMachine()
    assert found("free-space floor", settings, machine).ok
    finding = found("free-space floor", replace(settings, free_space_floor=10 * GIB - 1), machine)
    assert not finding.ok
    assert "less than 10 % of the file system" in finding.found
    assert "set --free-space-floor to 10.0 GiB or more" in finding.advice


def test_kubelets_threshold_does_not_count_on_another_file_system(found: Found, settings: Settings) -> None:
    elsewhere = replace(settings, free_space_floor=1, kubelet_dir=Path("/proc"))
    assert found("free-space floor", elsewhere, FakeMachine()).ok


@pytest.mark.parametrize(
    ("quota", "ok"),
    [
        (ROOMY, True),
        (KeyQuota(799_999, 1_000_000, 0, 25_000_000), True),
        (KeyQuota(800_000, 1_000_000, 0, 25_000_000), False),
        (KeyQuota(5, 1_000_000, 20_000_000, 25_000_000), False),
        (KeyQuota(0, 0, 0, 0), True),
    ],
)
def test_a_key_quota_that_runs_out_is_told_with_its_numbers(
    found: Found, settings: Settings, quota: KeyQuota, *, ok: bool
) -> None:
    finding = found("kernel keys", settings, FakeMachine(), quota)
    assert finding.ok == ok
    assert (
        f"root has {quota.keys} of {quota.most_keys} keys, {quota.bytes} of {quota.most_bytes} bytes" in finding.found
    )
    assert ok or "kernel.keys.root_maxbytes" in finding.advice


def test_probe_warns_of_the_key_quota_and_does_not_fail_by_it(health: Build, settings: Settings) -> None:
    full = KeyQuota(200, 200, 20_000, 20_000)
    calm, warned = health(settings, FakeMachine()), health(settings, FakeMachine(), full)
    with told_lines() as logs:
        assert warned.obstacle() == calm.obstacle()
    (line,) = logs
    assert (line.level, line.event) == ("warning", "kernel keys run out")
    assert "200 of 200 keys" in line.fields["found"]


def test_figures_for_metrics(health: Build, settings: Settings) -> None:
    one = health(settings, FakeMachine(), KeyQuota(3, 4, 1, 10))
    assert (one.root_keys(), one.root_keys_percent(), one.processes(), one.resident_bytes()) == (3, 75, 3, 4096)


def test_the_quota_is_roots_row(tmp_path: Path) -> None:
    users = tmp_path / "key-users"
    users.write_text("    0:    11 10/10 5/1000000 50/25000000\n 1000:     9 9/9 9/200 99/20000\n")
    assert read_key_quota(users) == KeyQuota(5, 1_000_000, 50, 25_000_000)


def test_before_the_first_key_there_are_only_limits(tmp_path: Path) -> None:
    (tmp_path / "key-users").write_text("")
    (tmp_path / "root_maxkeys").write_text("1000000\n")
    (tmp_path / "root_maxbytes").write_text("25000000\n")
    assert read_key_quota(tmp_path / "key-users", tmp_path) == KeyQuota(0, 1_000_000, 0, 25_000_000)


def test_this_kernels_quota_can_be_read() -> None:
    quota = read_key_quota()
    assert quota.most_keys > 0
    assert quota.most_bytes > 0
    assert 0 <= quota.used <= 1


def test_keys_that_need_somebody_are_told(found: Found, settings: Settings) -> None:
    (settings.state_dir / "loopfile/volumes").mkdir(parents=True)
    assert found("volume keys", settings, FakeMachine()).found == "each volume has its own, and none is left in a KMS"
    kept = KeyTrail(kms_id="kms", type="vault", name="gone.0123456789abcdef")
    KeyLedger(settings.state_dir, Files()).note(KeyEntry(volume="gone", key=kept, leaving=True))
    finding = found("volume keys", settings, FakeMachine())
    assert (finding.ok, finding.found) == (False, "a KMS keeps 1 keys for nothing")
    assert finding.advice == "look at them with `luks-csi keys leftovers`"
    record = VolumeRecord(
        id="cut", name="cut", capacity_bytes=1, parameters=VolumeParameters(encrypted=True), created="now",
        encryption=EncryptionState.ENCRYPTED, rekey=Rekey(phase=RekeyPhase.ADDING),
    )  # fmt: skip
    put(settings, record)
    assert found("volume keys", settings, FakeMachine()).found == "a change of the key is under way or was cut: cut"
    foreign = msgspec.structs.replace(kept, foreign=True)
    put(settings, msgspec.structs.replace(record, id="copy", rekey=None, key=foreign))
    finding = found("volume keys", settings, FakeMachine())
    assert "volume copy opens with the key of what it was adopted from" in finding.found
    assert "luks-csi keys rotate copy" in finding.advice


def test_a_move_to_another_backend_that_was_cut_is_told_and_a_copy_that_is_kept_is_no_fault(
    found: Found, settings: Settings
) -> None:
    (settings.state_dir / "loopfile/volumes").mkdir(parents=True)
    assert found("moves", settings, FakeMachine()).found == "no volume is on its way to another backend"
    record = VolumeRecord(
        id="old", name="old", capacity_bytes=1, parameters=VolumeParameters(), created="now",
        move=Move(phase=MovePhase.LEFT, id="1", other="/var/lib/other", volume_id="old"),
    )  # fmt: skip
    put(settings, record)
    finding = found("moves", settings, FakeMachine())
    assert (finding.ok, finding.found) == (True, "old copies of volumes that have left are kept: old")
    for phase in (MovePhase.LEAVING, MovePhase.ARRIVING, MovePhase.ARRIVED):
        move = Move(phase=phase, id="2", other="/var/lib/other", volume_id=phase)
        put(settings, msgspec.structs.replace(record, id=str(phase), move=move))
    finding = found("moves", settings, FakeMachine())
    assert (finding.ok, finding.fatal) == (False, False)
    assert finding.found == (
        "a move to or from another backend is under way or was cut: arrived (arrived, /var/lib/other), "
        "arriving (arriving, /var/lib/other), leaving (leaving, /var/lib/other)"
    )
    assert "run the same `luks-csi volume move` again" in finding.advice


def put(settings: Settings, record: VolumeRecord) -> None:
    folder = settings.state_dir / "loopfile/volumes" / record.id
    folder.mkdir(parents=True)
    (folder / "record.json").write_bytes(RecordCodec().encode(record))
