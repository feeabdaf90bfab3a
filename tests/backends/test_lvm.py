"""What the LVM backend alone promises, thick and thin."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

import msgspec
import pytest

from csi_driver.backends.lvm import LvmBackend
from csi_driver.backends.lvmrecords import NAME, OWNER
from csi_driver.backends.lvmtool import OURS, LogicalVolume, dm_name
from csi_driver.backends.lvmvolume import UNSEEN_TAG
from csi_driver.host import deadline
from csi_driver.host.commands import Commands, ProgramFailed
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.workers import Workers
from csi_driver.model.errors import (
    Aborted,
    CommandFailed,
    DeviceAbsent,
    DeviceInUse,
    FailedPrecondition,
    ResourceExhausted,
)
from csi_driver.model.volume import EncryptionState, LuksIdentity, VolumeRecord
from csi_driver.volumes.driver import WARM
from tests.backends.rigs import GROUP, POOL, LvmRig, SteppedGroup, lvm
from tests.backends.test_conformance import MIB, SIZE, Killed, check_made, gone, is_clear, record_of, write
from tests.machine.processes import pids_of, wait_for

P = ParamSpec("P")
R = TypeVar("R")


def backend_of(rig: LvmRig, *, zero_seconds: float = 20.0, pool_limit: float = 0.8) -> LvmBackend:
    rig.zero_seconds, rig.pool_limit = zero_seconds, pool_limit
    try:
        made = rig.backend()
    finally:
        rig.zero_seconds, rig.pool_limit = 20.0, 0.8
    return made


def test_a_large_volume_is_cleared_in_several_calls(thick: LvmRig) -> None:
    """Each call clears some and says how much; no call begins anew, and there is no volume before the last one."""
    backend = backend_of(thick, zero_seconds=0)
    size, calls, seen = 100 * MIB, 0, [-1]
    while True:
        calls += 1
        try:
            backend.create(record_of(thick), size)
            break
        except Aborted as error:
            done = int(str(error).split(" % ")[0].rsplit(" ", 1)[1])
            assert done > seen[-1], "it begins anew"
            seen.append(done)
            assert not backend.has("pvc-1")
            assert backend.orphans() == [str(thick.state / "lvm/new/pvc-1")]
    assert calls == 4
    check_made(thick, size=size)
    with pytest.raises(Aborted, match=r"is being cleared"):
        backend.grow("pvc-1", 200 * MIB)
    with pytest.raises(Aborted, match=r"is being cleared"):  # it would be seen
        backend.attach("pvc-1", lasting=False)
    with thick.backend().attach("pvc-1", lasting=False) as device:
        assert is_clear(device)
    assert gone(thick, backend)


def test_one_call_clears_for_as_long_as_its_caller_waits(thick: LvmRig) -> None:
    backend = backend_of(thick, zero_seconds=0)
    with deadline.within(600):
        backend.create(record_of(thick), 100 * MIB)
    check_made(thick, size=100 * MIB)
    with deadline.within(1), pytest.raises(Aborted, match=r"is being cleared, \d+ % are done"):
        backend.create(record_of(thick, "pvc-2"), 100 * MIB)
    backend.delete("pvc-2")


@pytest.fixture
def taken(lvm_rig: LvmRig) -> Iterator[LvmRig]:
    """A group that another state directory may get, for the length of the test."""
    yield lvm_rig
    lvm_rig.take_back()


def test_a_group_has_one_driver_and_changes_hands_by_command_alone(taken: LvmRig) -> None:
    taken.backend().create(record_of(taken), SIZE)
    taken.restart()
    taken.owner = "another"
    with pytest.raises(FailedPrecondition, match=r"belongs to the driver .* the identity rig.* lvchange --deltag"):
        taken.backend()
    taken.disown()
    assert taken.backend().has("pvc-1")
    taken.restart()
    taken.owner = "rig"
    with pytest.raises(FailedPrecondition, match=r"the identity another"):
        taken.backend()


def test_of_two_that_take_a_group_at_once_not_both_get_it(taken: LvmRig) -> None:
    taken.restart()
    taken.disown()
    make_group = taken.make_group

    class Raced(SteppedGroup):
        def retag(self, name: str, old: str | None, new: str | None) -> None:
            if new == f"{OWNER}rig":
                lvm("lvchange", "--addtag", f"{OWNER}another", f"{GROUP}/{name}")
            super().retag(name, old, new)

    taken.make_group = Raced
    try:
        with pytest.raises(FailedPrecondition, match=r"the identity another"):
            taken.backend()
    finally:
        taken.make_group = make_group
    assert f"{OWNER}rig" not in lvm("lvs", "-o", "lv_tags", f"{GROUP}/{NAME}")


def test_a_pool_that_was_left_suspended_is_resumed_before_it_is_used(thin: LvmRig) -> None:
    """As a killed lvextend leaves it: what is written would wait for ever."""
    backend, mapper = thin.backend(), DeviceMapper()
    backend.create(record_of(thin), SIZE)
    name = f"{dm_name(GROUP, POOL)}-tpool"
    with backend.attach("pvc-1", lasting=False) as device:
        mapper.suspend(name)
        try:
            with backend.attach("pvc-1", lasting=False):
                assert not _is_suspended(mapper, name)
            write(device, b"content")
            mapper.suspend(name)
            backend.create(record_of(thin, "pvc-2"), SIZE)
            assert not _is_suspended(mapper, name)
        finally:
            mapper.resume(name)
    check_made(thin, "pvc-2")


def _is_suspended(mapper: DeviceMapper, name: str) -> bool:
    found = mapper.get(name)
    return found is not None and found.suspended


def test_a_cut_volume_is_deleted_or_made_anew_with_another_size(thick: LvmRig) -> None:
    backend = backend_of(thick, zero_seconds=0)
    for _ in range(2):
        with pytest.raises(Aborted):
            backend.create(record_of(thick), 100 * MIB)
    thick.backend().create(record_of(thick), 40 * MIB)
    check_made(thick, size=40 * MIB)
    backend.delete("pvc-1")
    with pytest.raises(Aborted):
        backend.create(record_of(thick), 100 * MIB)
    backend.delete("pvc-1")
    assert not backend.orphans()


def test_a_plain_thick_volume_in_use_shows_no_extents_that_are_not_cleared(thick: LvmRig) -> None:
    backend = thick.backend()
    backend.create(plain_of(thick), SIZE)
    with backend.attach("pvc-1", lasting=False):
        with pytest.raises(FailedPrecondition, match=r"is not encrypted, is attached, .*unstage it, then enlarge it"):
            backend.grow("pvc-1", 2 * SIZE)
        backend.grow("pvc-1", SIZE)
    assert gone(thick, backend)
    backend.grow("pvc-1", 2 * SIZE)
    check_made(thick, size=2 * SIZE)


def test_a_volume_without_its_record_is_never_made_over(lvm_rig: LvmRig) -> None:
    backend = lvm_rig.backend()
    backend.create(record_of(lvm_rig), SIZE)
    with backend.attach("pvc-1", lasting=False) as device:
        write(device, b"precious")
    assert gone(lvm_rig, backend)
    os.rename(lvm_rig.state / "lvm/volumes/pvc-1", lvm_rig.state / "lvm/aside")
    assert backend.orphans() == [f"{GROUP}/pvc-1"]
    with pytest.raises(FailedPrecondition, match=r"luks-pvc-1 was made for it before, has no record and may hold data"):
        backend.create(record_of(lvm_rig), SIZE)
    backend.delete("pvc-1")
    assert backend.remove_orphans("pvc-1") == []
    os.rename(lvm_rig.state / "lvm/aside", lvm_rig.state / "lvm/volumes/pvc-1")
    with backend.attach("pvc-1", lasting=False) as device, open(device, "rb") as file:
        assert file.read(8) == b"precious"


def test_a_logical_volume_that_took_the_name_is_left_alone(lvm_rig: LvmRig) -> None:
    backend = lvm_rig.backend()
    backend.create(record_of(lvm_rig), SIZE)
    lvm("lvremove", f"{GROUP}/luks-pvc-1")
    look = lvm_rig.put_foreign("pvc-1")
    before = look()
    with pytest.raises(DeviceAbsent, match=r"has no logical volume vg-test/luks-pvc-1 with the UUID"):
        backend.attach("pvc-1", lasting=False)
    with pytest.raises(DeviceAbsent, match=r"has no logical volume"):
        backend.grow("pvc-1", 2 * SIZE)
    backend.delete("pvc-1")
    assert not backend.has("pvc-1")
    assert look() == before


def test_what_a_killed_program_has_shown_is_hidden_again(lvm_rig: LvmRig) -> None:
    """Found by make faults: the stage failed, and the device stayed. Also where an earlier call has shown it still."""

    def killed(step: str) -> None:
        if step == "after lvchange":
            raise CommandFailed("its worker process was killed")

    backend = lvm_rig.backend()
    backend.create(record_of(lvm_rig), SIZE)
    with pytest.raises(CommandFailed, match="was killed"):
        lvm_rig.backend(killed).attach("pvc-1", lasting=True)
    wait_for(lambda: DeviceMapper().get(dm_name(GROUP, "luks-pvc-1")) is None, "the end of the device")
    backend.attach("pvc-1", lasting=False).close()
    assert gone(lvm_rig, backend)


@pytest.mark.usefixtures("thick")
def test_lvm_keeps_what_tells_that_it_has_ended(tmp_path: Path, workers: Workers) -> None:
    """It closes all descriptors but the first three (lvm(8)), the volume's lock too."""
    os.mkfifo(script := tmp_path / "script")

    def waits(pid: int) -> bool:
        return str(script) in Path(f"/proc/{pid}/cmdline").read_text() and not Path(f"/proc/{pid}/fd/3").exists()

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(Commands(workers).run, ["lvm", str(script)], timeout=60)
        pid = wait_for(lambda: next((pid for pid in pids_of("lvm") if waits(pid)), None), "lvm, waiting for its script")
        kept = os.readlink(f"/proc/{pid}/fd/0")
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        assert kept.startswith("socket:")
        assert kept == os.readlink(f"/proc/{parent}/fd/0")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ProgramFailed, match="was ended by signal 9"):
            call.result(60)


def check_came_meanwhile(rig: LvmRig) -> None:
    def killed(step: str) -> None:
        if step == "before lvcreate":
            raise Killed

    with pytest.raises(Killed):
        rig.backend(killed).create(record_of(rig), SIZE)
    look = rig.put_foreign("pvc-1")
    before = look()
    with contextlib.suppress(FailedPrecondition):
        rig.backend().create(record_of(rig), SIZE)
    assert look() == before
    rig.backend().delete("pvc-1")
    assert look() == before
    assert not rig.backend().orphans()


def test_one_that_came_before_a_cut_creation_went_on_is_left_alone(lvm_rig: LvmRig) -> None:
    check_came_meanwhile(lvm_rig)


def test_one_whose_tag_was_taken_away_is_refused(lvm_rig: LvmRig) -> None:
    backend = lvm_rig.backend()
    backend.create(record_of(lvm_rig), SIZE)
    lvm("lvchange", "--deltag", "luks-csi", f"{GROUP}/luks-pvc-1")
    with pytest.raises(FailedPrecondition, match=r"lacks the tags luks-csi and luks-csi\.id=pvc-1"):
        backend.delete("pvc-1")
    lvm("lvchange", "--addtag", "luks-csi", f"{GROUP}/luks-pvc-1")
    backend.delete("pvc-1")
    assert not backend.orphans()


def test_a_long_name_with_many_hyphens_is_a_volume_like_any_other(lvm_rig: LvmRig) -> None:
    backend, name = lvm_rig.backend(), "a" + "-b" * 31
    backend.create(record_of(lvm_rig, name), SIZE)
    check_made(lvm_rig, name)
    assert gone(lvm_rig, backend, name)
    backend.delete(name)


def test_records_that_are_not_mounted_are_no_empty_node(lvm_rig: LvmRig) -> None:
    backend = lvm_rig.backend()
    backend.create(record_of(lvm_rig), SIZE)
    lvm_rig.restart()
    for call in (backend.ids, lambda: backend.get("pvc-1"), lambda: backend.delete("pvc-1"), backend.orphans):
        with pytest.raises(FailedPrecondition, match=r"the records of the volume group vg-test are not mounted at"):
            call()
    assert list(lvm_rig.backend().ids()) == ["pvc-1"]


def test_lost_records_and_another_group_are_refused(lvm_rig: LvmRig) -> None:
    lvm_rig.backend().create(record_of(lvm_rig), SIZE)
    memory = lvm_rig.state / "lvm.json"
    content = memory.read_text()
    lvm_rig.restart()
    lvm("lvrename", GROUP, "luks_csi_records", "aside")
    try:
        for state in (content, None):
            memory.unlink(missing_ok=True)
            if state is not None:
                memory.write_text(state)
            with pytest.raises(FailedPrecondition, match=r"which has their records, is gone; restore it"):
                lvm_rig.backend()
    finally:
        lvm("lvrename", GROUP, "aside", "luks_csi_records")
    memory.write_text(content.replace('"group":"', '"group":"x'))
    with pytest.raises(FailedPrecondition, match=r"is not the one that this node had: expected the UUID x"):
        lvm_rig.backend()
    memory.unlink()  # a node whose own disk is new
    assert list(lvm_rig.backend().ids()) == ["pvc-1"]


@contextlib.contextmanager
def another_disk(folder: Path) -> Iterator[str]:
    disk = folder / "another"
    with disk.open("wb") as file:
        file.truncate(200 * MIB)
    shown = subprocess.run(["losetup", "--find", "--show", disk], check=True, stdout=subprocess.PIPE, text=True)
    loop = shown.stdout.strip()
    try:
        yield loop
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)


def test_a_group_that_lost_a_disk_keeps_what_is_on_the_others(lvm_rig: LvmRig, tmp_path: Path) -> None:
    lvm_rig.backend().create(record_of(lvm_rig), SIZE)
    with another_disk(tmp_path) as disk:
        lvm("vgextend", GROUP, disk)
    try:
        lvm_rig.restart()
        memory = lvm_rig.state / "lvm.json"
        known = memory.read_bytes()
        memory.unlink()
        with pytest.raises(FailedPrecondition, match=r"the volume group vg-test lacks disks"):
            lvm_rig.backend()
        memory.write_bytes(known)
        backend = lvm_rig.backend()
        backend.attach("pvc-1", lasting=False).close()
        backend.detach("pvc-1")
        assert backend.space(lvm_rig.parameters).available == 0
        refused = r"no room for volume pvc-.: the volume group vg-test lacks disks"
        with pytest.raises(ResourceExhausted, match=refused):
            backend.create(record_of(lvm_rig, "pvc-2"), SIZE)
        with pytest.raises(ResourceExhausted, match=refused):
            backend.grow("pvc-1", 2 * SIZE)
        backend.delete("pvc-1")
    finally:
        lvm("vgreduce", "--removemissing", GROUP)
    backend.create(record_of(lvm_rig, "pvc-2"), SIZE)
    assert list(backend.ids()) == ["pvc-2"]


def test_records_that_an_older_metadata_calls_new_are_not_formatted(lvm_rig: LvmRig) -> None:
    lvm_rig.backend().create(record_of(lvm_rig), SIZE)
    lvm_rig.restart()
    made, making = "luks-csi.records=made", "luks-csi.records=making"
    lvm("lvchange", "--deltag", made, "--addtag", making, f"{GROUP}/luks_csi_records")
    memory = lvm_rig.state / "lvm.json"
    known = memory.read_bytes()
    with pytest.raises(FailedPrecondition, match=r"tagged as never used, and this node has used it"):
        lvm_rig.backend()
    memory.unlink()
    with pytest.raises(FailedPrecondition, match=r"is tagged as never used and holds records that were mounted"):
        lvm_rig.backend()
    memory.write_bytes(known)
    lvm("lvchange", "--deltag", making, "--addtag", made, f"{GROUP}/luks_csi_records")
    assert list(lvm_rig.backend().ids()) == ["pvc-1"]


def test_a_pool_above_its_limit_takes_nothing_new_and_says_so(thin: LvmRig) -> None:
    backend = backend_of(thin, pool_limit=0.25)
    backend.create(record_of(thin), 48 * MIB)
    assert backend.ailment("pvc-1") is None
    with backend.attach("pvc-1", lasting=False) as device:
        for at in range(0, 48 * MIB, MIB):
            write(device, os.urandom(64 << 10) * 16, at)
        with thin.backend().attach("pvc-1", lasting=False) as again:
            assert again.number == device.number
        lower = backend_of(thin, pool_limit=0.15)
        for call in (
            lambda: lower.create(record_of(thin, "pvc-2"), SIZE),
            lambda: lower.grow("pvc-1", 64 * MIB),
        ):
            with pytest.raises(ResourceExhausted, match=r"thin pool vg-test/thin-pool: .* of its data .*extend it"):
                call()
        assert lower.space(thin.parameters).available == 0
        assert "vg-test/thin-pool is nearly full" in (lower.ailment("pvc-1") or "")
        assert len(lower.full_pools()) == 1
        assert 15 <= lower.fullest_pool() <= 25
        lvm("lvextend", "-L", "+256M", f"{GROUP}/{POOL}")
        lower.grow("pvc-1", 52 * MIB)
    assert gone(thin, backend)
    backend.delete("pvc-1")


def test_a_full_pool_gives_room_back_by_deletions_that_erase_too(thin: LvmRig) -> None:
    backend = backend_of(thin, pool_limit=1.0)
    luks = LuksIdentity(uuid="u", cipher="aes-xts-plain64", key_bits=512, sector_size=512, data_offset=MIB)
    parameters = msgspec.structs.replace(thin.parameters, encrypted=True, erase_on_delete=True)
    encrypted = {"encryption": EncryptionState.ENCRYPTED, "luks": luks, "parameters": parameters}
    backend.create(msgspec.structs.replace(record_of(thin), **encrypted), SIZE)
    with backend.attach("pvc-1", lasting=False) as device:
        for at in range(0, SIZE, MIB):
            write(device, b"x" * MIB, at)
    lvm("lvchange", "--errorwhenfull", "y", f"{GROUP}/{POOL}")
    lvm("lvcreate", "--type", "thin", "--thinpool", POOL, "-V", "1G", "-n", "filler", GROUP)
    try:
        with DeviceMapper().open(dm_name(GROUP, "filler")) as device, contextlib.suppress(OSError):
            for at in range(0, 1 << 30, MIB):
                write(device, b"x" * MIB, at)
        with pytest.raises(FailedPrecondition, match=r"takes no more writes"):
            backend.attach("pvc-1", lasting=False)
        backend.delete("pvc-1")
    finally:
        lvm("lvremove", f"{GROUP}/filler")
    assert gone(thin, backend)


@pytest.mark.parametrize("kind", [("-L", "8M"), ("--thinpool", POOL)], ids=["snapshot", "external origin"])
def test_what_an_administrator_made_of_a_volume_keeps_it(thin: LvmRig, kind: tuple[str, str]) -> None:
    """lvremove takes snapshots along, and what has it as external origin."""
    backend = thin.backend()
    parameters = msgspec.structs.replace(thin.parameters, thin_pool=None)
    backend.create(msgspec.structs.replace(record_of(thin), parameters=parameters), SIZE)
    DeviceMapper().target_version("snapshot")  # loads the module
    lvm("lvchange", "-an", f"{GROUP}/luks-pvc-1")
    lvm("lvchange", "-pr", f"{GROUP}/luks-pvc-1")
    lvm("lvcreate", "-s", *kind, "-n", "backup-of-monday", f"{GROUP}/luks-pvc-1")
    try:
        with pytest.raises(DeviceInUse, match=r"LVM would remove backup-of-monday of the volume group vg-test with it"):
            backend.delete("pvc-1")
        assert backend.has("pvc-1")
    finally:
        lvm("lvremove", f"{GROUP}/backup-of-monday")
    backend.delete("pvc-1")
    assert gone(thin, backend)


def test_a_pool_that_does_not_zero_is_refused(thin: LvmRig) -> None:
    thin.backend().create(record_of(thin), SIZE)
    lvm("lvchange", "--zero", "n", f"{GROUP}/{POOL}")
    try:
        with pytest.raises(FailedPrecondition, match=r"does not clear new blocks.*run lvchange --zero y"):
            thin.backend().create(record_of(thin, "pvc-2"), SIZE)
    finally:
        lvm("lvchange", "--zero", "y", f"{GROUP}/{POOL}")


def test_a_pool_that_is_none_is_refused(thick: LvmRig) -> None:
    thick.parameters = msgspec.structs.replace(thick.parameters, thin_pool="nix")
    try:
        with pytest.raises(FailedPrecondition, match=r"vg-test/nix is no thin pool that can be used; make it with"):
            thick.backend().create(record_of(thick), SIZE)
    finally:
        thick.parameters = msgspec.structs.replace(thick.parameters, thin_pool=None)
    assert not thick.backend().orphans()


def tags_of(volume_id: str) -> str:
    return lvm("lvs", "--noheadings", "-o", "lv_tags", f"{GROUP}/luks-{volume_id}")


def settled(rig: LvmRig, content: bytes) -> None:
    """A volume whose content was shown, and so may be anybody's."""
    backend = rig.backend()
    with backend.attach("pvc-1", lasting=False) as device:
        write(device, content)
    assert gone(rig, backend)


def holds(rig: LvmRig, content: bytes) -> bool:
    with rig.backend().attach("pvc-1", lasting=False) as device, open(device, "rb") as file:
        found = file.read(len(content)) == content
    assert gone(rig, rig.backend())
    return found


def test_an_older_record_of_what_is_clear_overwrites_nothing(thick: LvmRig) -> None:
    backend, path = thick.backend(), thick.state / "lvm/volumes/pvc-1/lv.json"
    backend.create(record_of(thick), SIZE)
    fresh = path.read_bytes()
    settled(thick, b"precious")
    for older in (fresh, fresh.replace(b'"clear":%d' % SIZE, b'"clear":0')):
        path.write_bytes(older)
        assert holds(thick, b"precious")
    assert UNSEEN_TAG not in tags_of("pvc-1")


def test_an_older_record_of_a_volume_in_growth_overwrites_nothing_that_was_seen(thick: LvmRig) -> None:
    backend, path = thick.backend(), thick.state / "lvm/volumes/pvc-1/lv.json"
    backend.create(record_of(thick), SIZE)
    older = path.read_bytes().replace(b'"clear":%d' % SIZE, b'"clear":0')
    settled(thick, b"precious")

    def killed(step: str) -> None:
        if step == "after lvextend":
            raise Killed

    with pytest.raises(Killed):
        thick.backend(killed).grow("pvc-1", 2 * SIZE)
    path.write_bytes(older)
    assert holds(thick, b"precious")
    with thick.backend().attach("pvc-1", lasting=False) as device, open(device, "rb") as file:
        file.seek(SIZE)
        assert not any(file.read(SIZE))


def test_records_of_before_it_was_whole_remove_no_volume(lvm_rig: LvmRig) -> None:
    backend = lvm_rig.backend()
    backend.create(record_of(lvm_rig), SIZE)
    settled(lvm_rig, b"precious")
    folder, aside = lvm_rig.state / "lvm/volumes/pvc-1", lvm_rig.state / "lvm/aside"
    os.rename(folder, aside)
    for call in (lambda: backend.create(record_of(lvm_rig), SIZE), lambda: backend.delete("pvc-1")):
        shutil.copytree(aside, lvm_rig.state / "lvm/new/pvc-1")
        with contextlib.suppress(FailedPrecondition):
            call()
        assert backend.orphans() == [f"{GROUP}/pvc-1"]
    os.rename(aside, folder)
    assert holds(lvm_rig, b"precious")


def test_a_plain_volume_that_was_lengthened_by_hand_is_not_shown(thick: LvmRig) -> None:
    backend = thick.backend()
    backend.create(plain_of(thick), SIZE)
    settled(thick, b"precious")
    lvm("lvextend", "-L", f"{2 * SIZE}b", f"{GROUP}/luks-pvc-1")
    path = thick.state / "lvm/volumes/pvc-1/lv.json"
    # 0.1.0 wrote the second one before it tagged the volume.
    for state in (path.read_bytes(), path.read_bytes().replace(b'"settled":true', b'"settled":false')):
        path.write_bytes(state)
        with pytest.raises(FailedPrecondition, match=r"known to hold nothing of others, .*lengthened by hand"):
            backend.grow("pvc-1", 3 * SIZE)
        with pytest.raises(FailedPrecondition, match=r"known to hold nothing of others, .*lengthened by hand"):
            backend.attach("pvc-1", lasting=False)


def plain_of(rig: LvmRig) -> VolumeRecord:
    return msgspec.structs.replace(record_of(rig), encryption=None, parameters=rig.parameters)


def test_a_plain_thick_volume_that_is_shown_and_not_open_is_not_enlarged(thick: LvmRig) -> None:
    """A pod has its node, and nobody has it open just now."""
    backend = thick.backend()
    backend.create(plain_of(thick), SIZE)
    backend.attach("pvc-1", lasting=True).close()
    with pytest.raises(FailedPrecondition, match=r"is attached, .*unstage it, then enlarge it"):
        backend.grow("pvc-1", 2 * SIZE)
    backend.detach("pvc-1")
    backend.grow("pvc-1", 2 * SIZE)
    check_made(thick, size=2 * SIZE)


def test_what_was_cut_off_by_hand_is_cleared_again(thick: LvmRig) -> None:
    backend = thick.backend()
    backend.create(plain_of(thick), 2 * SIZE)
    settled(thick, b"precious")
    lvm("lvreduce", "-f", "-L", f"{SIZE}b", f"{GROUP}/luks-pvc-1")
    thick.make_dirty()
    backend.grow("pvc-1", 2 * SIZE)
    with backend.attach("pvc-1", lasting=False) as device, open(device, "rb") as file:
        file.seek(SIZE)
        assert not any(file.read(SIZE))
    assert gone(thick, backend)


# --- self-tests: a bug is planted, and what is there to notice it must ------------------------------------------------


class TrustingGroup(SteppedGroup):
    """A logical volume of the right name will be the right one."""

    def find(self, name: str) -> LogicalVolume | None:
        found = super().find(name)
        ours = {OURS, "luks-csi.id=pvc-1", f"{UNSEEN_TAG}0"}
        return replace(found, tags=found.tags | ours) if found is not None else None


class ClearsNothing(Workers):
    """New extents are blank, as those of a new disk."""

    def __init__(self) -> None:
        super().__init__(WARM)

    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        if what.startswith("luks-zero of volume"):
            return cast("R", args[2])
        return super().call(what, timeout, function, *args, **kwargs)


def test_a_backend_that_takes_foreign_storage_is_noticed(thick: LvmRig) -> None:
    thick.make_group = TrustingGroup
    try:
        with pytest.raises((AssertionError, subprocess.CalledProcessError)):
            check_came_meanwhile(thick)
    finally:
        thick.make_group = SteppedGroup


def test_a_backend_that_clears_nothing_is_noticed(thick: LvmRig) -> None:
    workers, careless = thick.workers, ClearsNothing()
    thick.workers = careless
    try:
        thick.backend().create(record_of(thick), SIZE)
        with pytest.raises(AssertionError):
            check_made(thick)
    finally:
        thick.workers = workers
        careless.stop()
