"""What every backend must do, on real storage: CONTRIBUTING.md tells how a further one is written against this."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import pytest

from csi_driver.backends.base import Backend, shared
from csi_driver.host.handle import Handle
from csi_driver.model.errors import (
    Aborted,
    DeviceAbsent,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
)
from csi_driver.model.volume import EncryptionState, FileSystemState, LuksIdentity, VolumeRecord
from tests.backends.rigs import Rig

MIB = 1 << 20
SIZE = 16 * MIB
GONE_SECONDS = 5.0


class Killed(BaseException):
    """The process ends at this very step."""


def record_of(rig: Rig, volume_id: str = "pvc-1") -> VolumeRecord:
    """As of an encrypted volume: what is below its mapping is never shown to anybody."""
    return VolumeRecord(
        id=rig.id_of(volume_id),
        name=volume_id,
        capacity_bytes=SIZE,
        parameters=msgspec.structs.replace(rig.parameters, encrypted=True),
        encryption=EncryptionState.PREPARED,
        created="now",
    )


def length(device: Handle) -> int:
    with open(device, "rb", buffering=0) as file:
        return file.seek(0, os.SEEK_END)


def is_clear(device: Handle, start: int = 0) -> bool:
    with open(device, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(start)
        while piece := file.read(MIB):
            if piece.strip(b"\0"):
                return False
    return True


def write(device: Handle, content: bytes, at: int = 0) -> None:
    with open(device, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), content, at)
        os.fsync(file.fileno())


def gone(rig: Rig, backend: Backend, name: str = "pvc-1") -> bool:
    """Whether nothing shows the volume any more: a device with its last user goes by and by, or is let go of."""
    volume_id = rig.id_of(name)
    if shared(backend) is not None:
        backend.detach(volume_id)
    deadline = time.monotonic() + GONE_SECONDS
    while (found := backend.device_of(volume_id)) is not None and time.monotonic() < deadline:
        found.close()
        time.sleep(0.02)
    return found is None


def check_made(rig: Rig, name: str = "pvc-1", size: int = SIZE) -> None:
    with rig.backend().attach(rig.id_of(name), lasting=False) as device:
        assert size <= length(device) < size + rig.rounding
        assert is_clear(device)


def test_a_volume_is_blank_and_as_long_as_asked_for(rig: Rig) -> None:
    backend = rig.backend()
    for name, size in (("pvc-2", SIZE), ("pvc-1", 33 * MIB), ("a.b-c--d", SIZE + 512)):
        record = record_of(rig, name)
        assert not backend.has(record.id)
        assert backend.create(record, size) == backend.get(record.id) == record
        assert backend.has(record.id)
        check_made(rig, name, size)
    assert list(backend.ids()) == [rig.id_of(name) for name in ("a.b-c--d", "pvc-1", "pvc-2")]
    assert not backend.orphans()
    with pytest.raises(FailedPrecondition, match=r"volume pvc-1\S* cannot be made: .* may hold data"):
        backend.create(record_of(rig), SIZE)


def test_records_are_compared_and_swapped_and_outlive_the_node(rig: Rig) -> None:
    backend = rig.backend()
    first = backend.create(record_of(rig), SIZE)
    second = backend.update(msgspec.structs.replace(first, file_system=FileSystemState.RAW))
    assert second.revision == 1
    with pytest.raises(Aborted, match=r"changed by another writer"):
        backend.update(first)
    rig.restart()
    again = rig.backend()
    assert again.get(rig.id_of("pvc-1")) == second
    assert again.is_newest(second) == rig.knows_newest
    assert list(again.ids()) == [rig.id_of("pvc-1")]
    check_made(rig)


def test_what_is_not_there_is_said_to_be_absent(rig: Rig) -> None:
    backend = rig.backend()
    with pytest.raises(NotFound):
        backend.get(rig.id_of("nix"))
    with pytest.raises(NotFound):
        backend.grow(rig.id_of("nix"), SIZE)
    with pytest.raises(NotFound):
        backend.update(record_of(rig, "nix"))
    with pytest.raises(DeviceAbsent):
        backend.attach(rig.id_of("nix"), lasting=False)
    with pytest.raises(DeviceAbsent):
        backend.open_storage(rig.id_of("nix"))
    assert backend.device_of(rig.id_of("nix")) is None
    assert not backend.is_device_of(rig.id_of("nix"), (7, 1000))
    backend.detach(rig.id_of("nix"))
    backend.guard(rig.id_of("nix"))
    backend.delete(rig.id_of("nix"))
    assert not backend.has_header_copy(rig.id_of("nix"))


def test_a_device_is_the_volumes_own_and_goes_with_its_last_user(rig: Rig) -> None:
    backend = rig.backend()
    for name in ("pvc-1", "pvc-2"):
        backend.create(record_of(rig, name), SIZE)
    with (
        backend.attach(rig.id_of("pvc-1"), lasting=False) as device,
        backend.attach(rig.id_of("pvc-2"), lasting=False) as other,
    ):
        with rig.backend().attach(rig.id_of("pvc-1"), lasting=False) as again:
            assert again.number == device.number
        assert backend.is_device_of(rig.id_of("pvc-1"), device.number)
        assert not backend.is_device_of(rig.id_of("pvc-1"), other.number)
        assert not backend.is_device_of(rig.id_of("pvc-1"), (device.major, 1 << 19))
        found = rig.backend().device_of(rig.id_of("pvc-2"))
        assert found is not None
        with found:
            assert found.number == other.number
        backend.guard(rig.id_of("pvc-1"))
        write(device, b"one")
        write(other, b"other")
        with backend.open_storage(rig.id_of("pvc-1")) as storage, open(storage, "rb") as file:
            assert file.read(3) == b"one"
    assert gone(rig, backend, "pvc-1")
    assert gone(rig, backend, "pvc-2")
    backend.detach(rig.id_of("pvc-1"))


def test_a_lasting_device_stays_until_it_is_let_go_of(rig: Rig) -> None:
    backend = rig.backend()
    backend.create(record_of(rig), SIZE)
    backend.attach(rig.id_of("pvc-1"), lasting=True).close()
    with backend.storage(rig.id_of("pvc-1")) as storage:
        write(storage, b"kept")
    time.sleep(0.1)
    found = backend.device_of(rig.id_of("pvc-1"))
    assert found is not None
    with found, open(found, "rb") as file:
        assert file.read(4) == b"kept"
    for _ in range(2):
        backend.detach(rig.id_of("pvc-1"))
        assert gone(rig, backend)


def test_a_volume_in_use_is_not_deleted(rig: Rig) -> None:
    backend = rig.backend()
    record = backend.create(record_of(rig), SIZE)
    with backend.attach(rig.id_of("pvc-1"), lasting=False) as device:
        backend.guard(rig.id_of("pvc-1"))
        with pytest.raises(
            DeviceInUse, match=r"volume pvc-1\S* cannot be deleted: .*/dev\S*; unpublish and unstage it"
        ):
            backend.delete(rig.id_of("pvc-1"))
        assert backend.get(rig.id_of("pvc-1")) == record
        assert is_clear(device)
    assert gone(rig, backend)
    for _ in range(2):
        backend.delete(rig.id_of("pvc-1"))
        assert not backend.has(rig.id_of("pvc-1"))
    assert not backend.ids()
    backend.create(record_of(rig), SIZE)
    check_made(rig)


@pytest.mark.parametrize("attached", [False, True])
def test_a_volume_grows_keeps_its_content_and_shows_nothing_of_others(rig: Rig, *, attached: bool) -> None:
    backend = rig.backend()
    backend.create(record_of(rig), SIZE)
    with contextlib.ExitStack() as stack:
        with backend.attach(rig.id_of("pvc-1"), lasting=False) as device:
            write(device, b"content", SIZE - 512)
            if attached:
                stack.enter_context(backend.attach(rig.id_of("pvc-1"), lasting=False))
        assert attached or gone(rig, backend)
        for size, expected in ((SIZE, SIZE), (1, SIZE), (41 * MIB, 41 * MIB), (20 * MIB, 41 * MIB)):
            backend.grow(rig.id_of("pvc-1"), size)
            with backend.attach(rig.id_of("pvc-1"), lasting=False) as device:
                backend.refresh(device)
                assert expected <= length(device) < expected + rig.rounding
                assert is_clear(device, SIZE)
                with open(device, "rb") as file:
                    assert os.pread(file.fileno(), 7, SIZE - 512) == b"content"


def test_what_has_no_room_is_refused_and_leaves_nothing(rig: Rig) -> None:
    backend = rig.backend()
    room = backend.space(rig.parameters)
    assert 0 < room.available <= room.free <= room.total
    with pytest.raises(ResourceExhausted, match=r"no room for volume pvc-1"):
        backend.create(record_of(rig), room.total + (1 << 30))
    assert not backend.ids()
    assert not backend.orphans()
    backend.create(record_of(rig), SIZE)
    with pytest.raises(ResourceExhausted, match=r"no room for volume pvc-1"):
        backend.grow(rig.id_of("pvc-1"), room.total + (1 << 30))
    check_made(rig)


def check_foreign(rig: Rig) -> None:
    look = rig.put_foreign(rig.id_of("pvc-1"))
    before = look()
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match=r"pvc-1"):
            rig.backend().create(record_of(rig), SIZE)
        assert look() == before


def test_foreign_storage_of_the_name_is_left_alone(rig: Rig) -> None:
    check_foreign(rig)


def test_a_header_copy_is_the_last_one_that_was_kept_whole(rig: Rig) -> None:
    backend = rig.backend()
    backend.create(record_of(rig), SIZE)
    assert not backend.has_header_copy(rig.id_of("pvc-1"))

    def put(content: bytes, path: str) -> None:
        Path(path).write_bytes(content)

    def cut(path: str) -> None:
        Path(path).write_bytes(b"ha")
        raise Aborted("cut")

    for content in (b"first", b"second"):
        backend.keep_header_copy(rig.id_of("pvc-1"), partial(put, content))
        with pytest.raises(Aborted):
            backend.keep_header_copy(rig.id_of("pvc-1"), cut)
        assert rig.backend().header_copy(rig.id_of("pvc-1")).read_bytes() == content
    assert rig.backend().has_header_copy(rig.id_of("pvc-1"))


def test_many_callers_get_in_nobodys_way(rig: Rig) -> None:
    backend, names = rig.backend(), [f"pvc-{number}" for number in range(4)]
    start = threading.Barrier(len(names))

    def live(name: str) -> None:
        start.wait()
        volume_id = rig.id_of(name)
        record = backend.create(record_of(rig, name), SIZE)
        with backend.attach(volume_id, lasting=False) as device:
            assert is_clear(device)
            write(device, name.encode())
        backend.grow(volume_id, 2 * SIZE)
        assert backend.get(volume_id) == record
        with backend.attach(volume_id, lasting=False) as device, open(device, "rb") as file:
            assert file.read(len(name)) == name.encode()
        assert gone(rig, backend, name)
        backend.delete(volume_id)

    with ThreadPoolExecutor(len(names)) as pool:
        for done in [pool.submit(live, name) for name in names]:
            done.result()
    assert not backend.ids()
    assert not backend.orphans()


# --- kills -----------------------------------------------------------------------------------------------------------


def steps_of(rig: Rig, act: Callable[[Backend], object]) -> list[str]:
    seen: list[str] = []
    backend = rig.backend(seen.append)
    seen.clear()
    act(backend)
    return seen


def at_every_step(
    rig: Rig, before: Callable[[Backend], object], act: Callable[[Backend], object], after: Callable[[str], None]
) -> None:
    before(rig.backend())
    steps = steps_of(rig, act)
    rig.backend().delete(rig.id_of("pvc-1"))
    assert len(steps) > 1
    for number, name in enumerate(steps):
        before(rig.backend())
        started = rig.backend(step := Countdown())
        step.left = number
        with pytest.raises((Killed, DriverError)):
            act(started)
        after(name)
        rig.backend().delete(rig.id_of("pvc-1"))
        assert not rig.backend().orphans(), name
        assert not rig.backend().ids(), name


class Countdown:
    """A step that kills when `left` were done; never as long as that is None."""

    def __init__(self) -> None:
        self.left: int | None = None

    def __call__(self, _: str) -> None:
        if self.left is None:
            return
        self.left -= 1
        if self.left < 0:
            raise Killed


def test_killed_at_every_step_of_its_creation_a_volume_is_there_or_made_by_the_next_call(rig: Rig) -> None:
    def after(step: str) -> None:
        backend = rig.backend()
        if not backend.has(rig.id_of("pvc-1")):
            backend.create(record_of(rig), SIZE)
        assert backend.get(rig.id_of("pvc-1")) == record_of(rig), step
        assert not backend.orphans(), step
        check_made(rig)

    at_every_step(rig, lambda _: None, lambda backend: backend.create(record_of(rig), SIZE), after)


def test_killed_at_every_step_of_its_growth_a_volume_is_whole_and_grows_with_the_next_call(rig: Rig) -> None:
    def before(backend: Backend) -> None:
        backend.create(record_of(rig), SIZE)
        with backend.attach(rig.id_of("pvc-1"), lasting=False) as device:
            write(device, b"content")

    def after(step: str) -> None:
        backend = rig.backend()
        backend.grow(rig.id_of("pvc-1"), 2 * SIZE)
        with backend.attach(rig.id_of("pvc-1"), lasting=False) as device, open(device, "rb") as file:
            assert 2 * SIZE <= length(device) < 2 * SIZE + rig.rounding, step
            assert is_clear(device, 4096), step
            assert file.read(7) == b"content", step

    at_every_step(rig, before, lambda backend: backend.grow(rig.id_of("pvc-1"), 2 * SIZE), after)


def test_killed_at_every_step_of_its_deletion_a_volume_is_whole_or_gone_with_the_next_call(rig: Rig) -> None:
    luks = LuksIdentity(uuid="u", cipher="aes-xts-plain64", key_bits=512, sector_size=512, data_offset=MIB)
    record = msgspec.structs.replace(
        record_of(rig),
        encryption=EncryptionState.ENCRYPTED,
        luks=luks,
        parameters=msgspec.structs.replace(rig.parameters, encrypted=True, erase_on_delete=True),
    )

    def after(step: str) -> None:
        backend = rig.backend()
        with contextlib.suppress(NotFound):
            assert backend.get(rig.id_of("pvc-1")) == record, step
            with backend.attach(rig.id_of("pvc-1"), lasting=False) as device:
                assert length(device) >= SIZE
        backend.delete(rig.id_of("pvc-1"))
        assert not backend.has(rig.id_of("pvc-1"))
        backend.create(record_of(rig), SIZE)
        check_made(rig)

    at_every_step(
        rig, lambda backend: backend.create(record, SIZE), lambda backend: backend.delete(rig.id_of("pvc-1")), after
    )
