"""A closed volume goes from one backend to another and back, on real storage and real dm-crypt."""

import contextlib
import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from csi_driver.host.workers import Workers
from csi_driver.images.stopping import Stop
from csi_driver.model.errors import (
    Aborted,
    AlreadyExists,
    CommandFailed,
    DeviceInUse,
    FailedPrecondition,
    ResourceExhausted,
    Stopped,
)
from csi_driver.model.volume import FileSystemState, MovePhase, Rekey, RekeyPhase, VolumeRecord
from csi_driver.volumes.move import MoveRequest
from csi_driver.volumes.move_copy import Onlooker, move_of
from tests.backends.moving import PLAIN, SIZE, Pair, Shown, fill, is_refused, pair_in, shown, write
from tests.backends.rigs import LvmRig, lvm
from tests.machine.node import BLOCK, CHEAP, EXT4, MIB, MOUNT, NAME, Node


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(os.environ.get("MACHINE_STATE", tmp_path), f"move-{os.urandom(4).hex()}")


@pytest.fixture
def pair(lvm_rig: LvmRig, workers: Workers, folder: Path) -> Pair:
    return pair_in(folder, lvm_rig.backend(), workers, lvm_rig.parameters)


@pytest.mark.parametrize("parameters", [CHEAP, PLAIN], ids=["encrypted", "plain"])
def test_a_volume_goes_there_and_back_byte_by_byte(pair: Pair, parameters: dict[str, str]) -> None:
    content = fill(pair.files, dict(parameters))
    before, disk = pair.files.record(), pair.files.disk().read_bytes()
    copy = pair.files.store.header_copy(NAME).read_bytes() if before.luks else b""
    meter = Shown()
    moved = pair.move(onlooker=Onlooker(meter))
    assert meter.parts == [f"copying volume {NAME} of {len(disk)}", f"comparing volume {NAME} of {len(disk)}"]
    assert meter.done[-1] == len(disk)
    assert not pair.files.store.has(NAME)
    assert not pair.files.disk().parent.exists()
    assert moved == pair.group.record()
    changed = msgspec.structs.replace(before.parameters, thin_pool=pair.pool)
    assert msgspec.structs.replace(moved, revision=0) == msgspec.structs.replace(before, revision=0, parameters=changed)
    with pair.group.store.open_storage(NAME) as storage, open(storage, "rb") as ciphertext:
        assert ciphertext.read(len(disk)) == disk
    if before.luks:
        assert pair.group.store.header_copy(NAME).read_bytes() == copy
        assert pair.group.store.header_copy(NAME).stat().st_blocks * 512 < 2 * MIB
    there = shown(pair.group)
    assert there[: len(content)] == content
    assert len(there) % (4 * MIB) == 0  # whole extents
    back = pair.move(pair.group)
    assert back.parameters.thin_pool is None
    assert not pair.group.store.has(NAME)
    assert f"luks-{NAME}" not in lvm("lvs", "-o", "lv_name")
    assert back.capacity_bytes == len(there)  # as a file system may have been made in all of it
    assert shown(pair.files) == there
    assert pair.files.disk().stat().st_blocks * 512 < len(disk) - MIB, "holes stayed no holes"
    pair.files.delete()


def test_a_file_system_goes_along_and_can_be_enlarged_there(pair: Pair) -> None:
    pair.files.create(capability=EXT4)
    pair.files.stage()
    pair.files.write("precious")
    pair.files.unstage()
    pair.move()
    pair.group.stage()
    assert pair.group.read() == "precious"
    assert pair.group.expand(24 * MIB) == 24 * MIB
    pair.group.unstage()
    pair.move(pair.group)
    pair.files.stage()
    assert pair.files.read() == "precious"
    pair.files.unstage()


def test_one_that_was_never_staged_is_formatted_where_it_came_to(pair: Pair) -> None:
    pair.files.create()
    pair.move()
    pair.group.stage(capability=MOUNT)
    pair.group.write("precious")
    pair.group.unstage()
    assert pair.group.record().file_system is FileSystemState.MADE


def test_what_is_in_use_is_not_moved_and_nothing_is_changed(pair: Pair) -> None:
    fill(pair.files, dict(CHEAP))
    pair.files.stage(capability=BLOCK)
    before = pair.files.record()
    with pytest.raises(DeviceInUse, match=r"only a closed one can be moved"):
        pair.move()
    pair.files.unstage()
    loops = pair.files.loops
    with loops.attach(str(pair.files.disk()), autoclear=True) as device:
        held = os.open(device, os.O_RDONLY | os.O_EXCL)
        try:
            with pytest.raises(DeviceInUse, match=r"in use by a mapping or mount that is not the driver's"):
                pair.move()
        finally:
            os.close(held)
    assert pair.files.record() == before
    assert not pair.group.store.has(NAME)


def test_a_volume_of_that_id_over_there_is_left_alone(pair: Pair) -> None:
    fill(pair.files, dict(CHEAP), 1)
    content = fill(pair.group, dict(PLAIN), 2)
    with pytest.raises(AlreadyExists, match=r"has a volume pvc-1 already"):
        pair.move()
    assert shown(pair.group)[: len(content)] == content
    assert pair.files.record().move is None
    with pytest.raises(FailedPrecondition, match=r"name that of another one"):
        pair.files.moves.move(MoveRequest(NAME), pair.files.moves.here, Onlooker(Shown()))
    pair.files.moves.undo(NAME, pair.group.moves.here)
    assert shown(pair.group)[: len(content)] == content


def test_no_room_is_told_before_anything_is_changed(pair: Pair) -> None:
    pair.files.create(size=4096 * MIB)
    with pytest.raises(ResourceExhausted, match=r"no room for volume pvc-1"):
        pair.move()
    assert pair.files.record().move is None
    pair.files.stage()
    pair.files.unstage()


def stopped(pair: Pair, at: int, source: Node | None = None) -> None:
    """Stopped by a signal once so many bytes are copied."""
    stop = Stop()

    def each(done: int) -> None:
        if done >= at:
            stop.name = "SIGINT"

    with pytest.raises(Stopped, match=r"SIGINT stopped it, \d+ % are done; the same command goes on"):
        pair.move(source, Onlooker(Shown(each=each), stop=stop))


def test_a_stopped_one_goes_on_where_it_was(pair: Pair) -> None:
    content = fill(pair.files, dict(CHEAP))
    stopped(pair, 2 * MIB)
    done = move_of(pair.group.record()).copied.end
    assert 2 * MIB <= done < pair.files.disk().stat().st_size
    with pytest.raises(FailedPrecondition, match=r"is being copied here from .*, \d+ % are there; let the same"):
        pair.group.stage(capability=BLOCK)
    meter = Shown()
    pair.move(onlooker=Onlooker(meter))
    assert meter.done[0] == done
    assert shown(pair.group)[: len(content)] == content


def test_one_that_is_used_meanwhile_is_copied_anew(pair: Pair) -> None:
    fill(pair.files, dict(CHEAP), 1)
    stopped(pair, 20 * MIB)
    content = write(pair.files, 2)
    told: list[str] = []
    meter = Shown()
    pair.move(onlooker=Onlooker(meter, told.append))
    assert told[0] == f"volume {NAME} was used since a part of it was copied, or is to go elsewhere: anew"
    assert meter.done[0] == 0
    assert shown(pair.group)[: len(content)] == content


def test_one_that_is_written_to_by_hand_is_noticed(pair: Pair) -> None:
    fill(pair.files, dict(CHEAP), 1)
    disk = pair.files.disk()
    writing = os.open(disk, os.O_RDWR)  # from before the guard
    meter = Shown(each=lambda done: done == 18 * MIB and os.pwrite(writing, b"x", 20 * MIB))
    try:
        with pytest.raises(Aborted, match=r"was written to while it was copied"):
            pair.move(onlooker=Onlooker(meter))
    finally:
        os.close(writing)
    again = Shown()
    pair.move(onlooker=Onlooker(again))
    assert again.done[0] == 0


@pytest.mark.parametrize("by_hand", [False, True], ids=["untouched", "written to"])
def test_a_device_that_was_free_while_its_move_was_stopped_is_read_once_more(pair: Pair, *, by_hand: bool) -> None:
    fill(pair.files, dict(PLAIN))
    pair.move()
    stopped(pair, 2 * MIB, pair.group)
    done = move_of(pair.files.record()).copied.end
    if by_hand:
        with pair.group.store.attach(NAME, lasting=False) as device:
            writing = os.open(device, os.O_RDWR | os.O_EXCL)
            os.pwrite(writing, b"kept", MIB // 2)
            os.fsync(writing)
            os.close(writing)
        pair.group.store.detach(NAME)
    content = shown_of(pair.group)
    meter, told = Shown(), list[str]()
    pair.move(pair.group, onlooker=Onlooker(meter, told.append))
    assert meter.parts[0] == f"looking again at volume {NAME} of {done}"
    assert bool(told) is by_hand
    assert shown(pair.files)[: len(content)] == content


def shown_of(node: Node) -> bytes:
    """What the volume's storage holds, without a stage, which would take the move's tag off."""
    with node.store.open_storage(NAME) as storage, open(storage, "rb") as reading:
        return reading.read(SIZE)


def test_a_move_is_given_up(pair: Pair) -> None:
    content = fill(pair.files, dict(CHEAP))
    stopped(pair, 2 * MIB)
    pair.files.moves.undo(NAME, pair.group.moves.here)
    assert not pair.group.store.has(NAME)
    assert pair.files.record().move is None
    assert shown(pair.files) == content
    pair.move(keep=True)
    with pytest.raises(FailedPrecondition, match=r"move it back from there"):
        pair.files.moves.undo(NAME, pair.group.moves.here)
    assert shown(pair.group)[: len(content)] == content


def test_what_is_kept_cannot_be_used_and_can_be_deleted(pair: Pair) -> None:
    content = fill(pair.files, dict(CHEAP))
    pair.move(keep=True)
    assert pair.files.disk().exists()
    with pytest.raises(FailedPrecondition, match=r"was moved to the driver with the state directory .*/group/state"):
        pair.files.stage(capability=BLOCK)
    with pytest.raises(FailedPrecondition, match=r"was moved to the driver"):
        pair.files.grow(64 * MIB)
    pair.group.stage(capability=BLOCK)
    pair.files.delete()  # which leaves what the other driver has open alone
    assert pair.group.mapping() is not None
    pair.group.unstage()
    assert shown(pair.group)[: len(content)] == content


def test_one_that_went_over_there_is_not_resurrected_unasked(pair: Pair) -> None:
    content = fill(pair.files, dict(CHEAP))
    pair.move(keep=True)
    pair.group.delete()
    with pytest.raises(FailedPrecondition, match=r"is not there any more; the old copy here was left as it is"):
        pair.move()
    assert is_refused(pair.files)
    pair.files.moves.undo(NAME, pair.group.moves.here)
    assert shown(pair.files) == content


def test_a_copy_that_is_not_the_same_never_counts(pair: Pair) -> None:
    """The target's storage loses a write."""
    content = fill(pair.files, dict(CHEAP))

    disk = pair.files.disk().stat().st_size

    def lose() -> None:
        with pair.group.store.storage(NAME) as storage, open(storage, "r+b", buffering=0) as device:
            os.pwrite(device.fileno(), bytes(4096), 20 * MIB)
            os.fsync(device.fileno())

    def each(done: int) -> None:
        if done == disk:
            lose()

    meter = Shown(each=each)
    with pytest.raises(CommandFailed, match=r"is not what was written: expected the digest .*the copy was removed"):
        pair.move(onlooker=Onlooker(meter))
    assert not pair.group.store.has(NAME)
    assert shown(pair.files) == content
    pair.move()
    assert shown(pair.group)[: len(content)] == content


def test_a_change_under_way_is_ended_first(pair: Pair) -> None:
    fill(pair.files, dict(CHEAP))
    record = pair.files.record()
    pair.files.store.update(msgspec.structs.replace(record, rekey=Rekey(phase=RekeyPhase.ADDING)))
    with pytest.raises(FailedPrecondition, match=r"the passphrase of volume pvc-1 is being changed"):
        pair.move()


def test_one_of_two_states_is_always_used_and_never_both(pair: Pair) -> None:
    """Between the two records that say it, the driver that has it now asks the other one."""
    content = fill(pair.files, dict(CHEAP))
    stopped(pair, 2 * MIB)
    update, seen = pair.files.store.update, []

    class Cut(BaseException):
        pass

    def cut(record: VolumeRecord) -> VolumeRecord:
        update(record)
        seen.append(record)
        raise Cut

    pair.files.store.update = cut  # type: ignore[method-assign]
    with pytest.raises(Cut):
        pair.move()
    pair.files.store.update = update  # type: ignore[method-assign]
    assert [move_of(record).phase for record in seen] == [MovePhase.LEFT]
    assert move_of(pair.group.record()).phase is MovePhase.ARRIVED
    assert is_refused(pair.files)
    assert shown(pair.group)[: len(content)] == content
    assert pair.group.record().move is None
    pair.move()
    assert not pair.files.store.has(NAME)


def test_an_arrived_copy_is_not_used_while_the_volume_is_where_it_was(pair: Pair) -> None:
    content = fill(pair.files, dict(CHEAP))
    stopped(pair, 2 * MIB)
    arriving = pair.group.record()
    move = msgspec.structs.replace(move_of(arriving), phase=MovePhase.ARRIVED)
    pair.group.store.update(msgspec.structs.replace(arriving, move=move))
    with pytest.raises(FailedPrecondition, match=r"nobody knows whether it may still be used there; run the same"):
        pair.group.stage(capability=BLOCK)
    assert shown(pair.files) == content


def test_a_full_target_is_told_and_gone_on_with(lvm_rig: LvmRig, workers: Workers, folder: Path) -> None:
    small = folder / "files"
    small.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "none", str(small)], check=True)
    try:
        pair = pair_in(folder, lvm_rig.backend(), workers, lvm_rig.parameters)
        content = fill(pair.group, dict(CHEAP))
        ballast = small / "ballast"

        def each(done: int) -> None:
            if done == 16 * MIB:
                _fill_up(ballast)

        with pytest.raises(ResourceExhausted, match=r"the storage to which volume pvc-1 is moved is full"):
            pair.move(pair.group, Onlooker(Shown(each=each)))
        assert 16 * MIB <= move_of(pair.files.record()).copied.end < 22 * MIB
        ballast.unlink()
        pair.move(pair.group)
        assert shown(pair.files) == content
        pair.files.delete()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def _fill_up(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
