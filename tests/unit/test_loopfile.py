"""The loopfile backend on a real folder, with loop devices that are fake."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from csi_driver.backends.loopfile import LoopfileBackend
from csi_driver.backends.records import RecordCodec
from csi_driver.model.errors import (
    Aborted,
    DeviceAbsent,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
)
from csi_driver.model.volume import (
    Conversion,
    EncryptionState,
    FileSystemState,
    LuksIdentity,
    VolumeParameters,
    VolumeRecord,
)
from tests.fake_host import FakeLoops, Step, SteppedFiles, undisturbed
from tests.told_lines import told_lines

MIB = 1 << 20
RECORD = VolumeRecord(id="pvc-1", name="pvc-1", capacity_bytes=MIB, parameters=VolumeParameters(), created="now")


class Killed(BaseException):
    """The process ends at this very step."""


class Place:
    """A backend on a folder, and what is in that folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loops = FakeLoops()
        self.backend().prepare()

    def backend(self, step: Step = undisturbed, floor: int = 0) -> LoopfileBackend:
        return LoopfileBackend(self.folder, floor, SteppedFiles(step), self.loops, RecordCodec())

    def files(self, name: str) -> set[str]:
        found = (self.folder / name).rglob("*")
        return {str(path.relative_to(self.folder / name)) for path in found if path.is_file()}

    def disk(self, volume_id: str = "pvc-1") -> Path:
        return self.folder / "volumes" / volume_id / "disk.img"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path / "loopfile")
    yield made
    made.loops.end_of_process()


def steps_of(place: Place, action: str) -> list[str]:
    """The steps of an action, from a recorded run; they are numbered where a name comes twice."""
    seen: list[str] = []
    act(place.backend(seen.append), action)
    return seen


def act(backend: LoopfileBackend, action: str) -> None:
    if action == "create":
        backend.create(RECORD, MIB)
    elif action == "update":
        backend.update(msgspec.structs.replace(RECORD, capacity_bytes=2 * MIB))
    elif action == "grow":
        backend.grow("pvc-1", 2 * MIB)
    else:
        backend.delete("pvc-1")


def fail_at(number: int, error: BaseException) -> Step:
    left = [number]

    def step(_: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error

    return step


ERRORS = [Killed(), OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "Input/output error")]


def look(backend: LoopfileBackend) -> VolumeRecord | None:
    try:
        return backend.get("pvc-1")
    except NotFound:
        return None


@pytest.mark.parametrize("error", ERRORS, ids=["killed", "full", "broken"])
def test_create_is_whole_or_nothing_at_every_step(tmp_path: Path, error: BaseException) -> None:
    steps = steps_of(Place(tmp_path / "recorded"), "create")
    assert steps.index("after fill .record.json.new") < steps.index("before rename to volumes")
    assert steps.index("after set_size disk.img") < steps.index("before rename to volumes")
    assert len(steps) > 10
    for number in range(len(steps)):
        place = Place(tmp_path / str(number))
        with pytest.raises((Killed, OSError, DriverError)):
            act(place.backend(fail_at(number, error)), "create")
        found = look(place.backend())
        assert found in (None, RECORD), steps[number]
        assert place.files("volumes") in (set(), {"pvc-1/disk.img", "pvc-1/record.json"}), steps[number]
        if found is None:
            place.backend().create(RECORD, MIB)
        assert place.backend().get("pvc-1") == RECORD
        assert place.disk().stat().st_size == MIB
        assert place.files("new") == place.files("trash") == set()


@pytest.mark.parametrize("error", ERRORS, ids=["killed", "full", "broken"])
def test_delete_is_whole_or_nothing_at_every_step_and_a_repeat_ends_it(tmp_path: Path, error: BaseException) -> None:
    recorded = Place(tmp_path / "recorded")
    recorded.backend().create(RECORD, MIB)
    steps = steps_of(recorded, "delete")
    assert any(step == "before remove disk.img" for step in steps)
    for number in range(len(steps)):
        place = Place(tmp_path / str(number))
        place.backend().create(RECORD, MIB)
        with pytest.raises((Killed, OSError, DriverError)):
            act(place.backend(fail_at(number, error)), "delete")
        assert place.files("volumes") in (set(), {"pvc-1/disk.img", "pvc-1/record.json"}), steps[number]
        assert bool(place.files("trash")) <= bool(place.backend().orphans())
        place.backend().delete("pvc-1")
        assert not [path for path in place.folder.rglob("*") if path.parent != place.folder], steps[number]
        place.backend().create(RECORD, MIB)
        assert place.backend().get("pvc-1") == RECORD


@pytest.mark.parametrize("error", ERRORS, ids=["killed", "full", "broken"])
def test_what_is_to_be_erased_is_before_anything_is_removed(tmp_path: Path, error: BaseException) -> None:
    """At every step of a deletion: a file that is gone was overwritten before, also when the repeat ends it."""
    luks = LuksIdentity(uuid="u", cipher="aes-xts-plain64", key_bits=512, sector_size=512, data_offset=64 * 1024)
    record = msgspec.structs.replace(
        RECORD,
        encryption=EncryptionState.ENCRYPTED,
        luks=luks,
        parameters=VolumeParameters(encrypted=True, erase_on_delete=True),
    )

    def made(place: Place) -> int:
        place.backend().create(record, MIB)
        with place.disk().open("r+b") as disk:
            disk.write(b"key slots" * 7000)
            disk.seek(luks.data_offset)
            disk.write(b"data" * 1000)
        place.disk().with_name("header.luks2").write_bytes(b"key slots" * 7000)
        return os.open(place.disk(), os.O_RDONLY)

    recorded = Place(tmp_path / "recorded")
    os.close(made(recorded))
    steps = steps_of(recorded, "delete")
    for number in range(len(steps)):
        place = Place(tmp_path / str(number))
        held = made(place)
        try:
            with pytest.raises((Killed, OSError, DriverError)):
                act(place.backend(fail_at(number, error)), "delete")
            if not [*place.folder.rglob("disk.img")]:
                assert b"key slots" not in os.pread(held, luks.data_offset, 0), steps[number]
            place.backend().delete("pvc-1")
            assert b"key slots" not in os.pread(held, luks.data_offset, 0), steps[number]
            assert os.pread(held, 4000, luks.data_offset) in (b"data" * 1000, b"")  # cut, not overwritten
        finally:
            os.close(held)


@pytest.mark.parametrize("error", ERRORS, ids=["killed", "full", "broken"])
@pytest.mark.parametrize("action", ["update", "grow"])
def test_a_change_is_the_old_or_the_new_at_every_step(tmp_path: Path, error: BaseException, action: str) -> None:
    recorded = Place(tmp_path / "recorded")
    recorded.backend().create(RECORD, MIB)
    old = (RECORD, MIB)
    steps = steps_of(recorded, action)
    new = (recorded.backend().get("pvc-1"), recorded.disk().stat().st_size)
    assert old != new
    for number in range(len(steps)):
        place = Place(tmp_path / str(number))
        place.backend().create(RECORD, MIB)
        with pytest.raises((Killed, OSError, DriverError)):
            act(place.backend(fail_at(number, error)), action)
        found = (place.backend().get("pvc-1"), place.disk().stat().st_size)
        assert found in (old, new), steps[number]
        if found == old:
            act(place.backend(), action)
        assert (place.backend().get("pvc-1"), place.disk().stat().st_size) == new
        assert place.files("volumes") == {"pvc-1/disk.img", "pvc-1/record.json"}


def test_a_volume_is_a_sparse_file_and_a_record_for_root_only(place: Place) -> None:
    place.backend().create(RECORD, 64 * MIB)
    assert (place.disk().stat().st_size, place.disk().stat().st_blocks) == (64 * MIB, 0)
    for path in (place.disk(), place.disk().with_name("record.json")):
        assert path.stat().st_mode & 0o077 == 0
    assert place.disk().parent.stat().st_mode & 0o077 == 0


def test_create_never_takes_the_place_of_data_without_a_record(place: Place) -> None:
    place.backend().create(RECORD, MIB)
    place.disk().write_bytes(b"precious")
    place.disk().with_name("record.json").unlink()
    for step in (undisturbed, fail_at(0, OSError(errno.EIO, "Input/output error"))):
        with pytest.raises(FailedPrecondition, match=r"may hold data"):
            place.backend(step).create(RECORD, MIB)
        assert place.disk().read_bytes() == b"precious"


def test_ids_are_sorted(place: Place) -> None:
    for name in ("b", "a", "c"):
        place.backend().create(msgspec.structs.replace(RECORD, id=name), MIB)
    assert place.backend().ids() == ("a", "b", "c")


def test_an_unknown_volume_is_not_found(place: Place) -> None:
    backend = place.backend()
    for call in (lambda: backend.get("nix"), lambda: backend.grow("nix", MIB)):
        with pytest.raises(NotFound, match=r"volume nix"):
            call()
    with pytest.raises(NotFound):
        backend.update(msgspec.structs.replace(RECORD, id="nix"))
    with pytest.raises(DeviceAbsent):
        backend.attach("nix", lasting=False)
    assert backend.device_of("nix") is None
    assert not backend.is_device_of("nix", (7, 1000))
    backend.detach("nix")
    backend.delete("nix")


def test_of_two_writers_the_slower_one_is_told(place: Place) -> None:
    backend = place.backend()
    first = backend.create(RECORD, MIB)
    second = backend.update(msgspec.structs.replace(first, capacity_bytes=2 * MIB))
    assert (second.revision, backend.get("pvc-1")) == (1, second)
    with pytest.raises(Aborted, match=r"volume pvc-1 was changed by another writer"):
        backend.update(msgspec.structs.replace(first, capacity_bytes=3 * MIB))
    assert backend.get("pvc-1") == second
    assert backend.update(second).revision == 2


@pytest.mark.parametrize("state", [FileSystemState.NONE, FileSystemState.MAKING])
def test_a_record_by_which_something_would_be_formatted_is_never_taken(place: Place, state: FileSystemState) -> None:
    backend = place.backend()
    backend.create(msgspec.structs.replace(RECORD, file_system=state), MIB)
    with pytest.raises(FailedPrecondition, match=rf"says encryption=none and filesystem={state}, by which"):
        backend.accept_record("pvc-1")


# --- space -----------------------------------------------------------------------------------------------------------


def test_the_floor_stays_free(place: Place) -> None:
    free = place.backend().space().available
    backend = place.backend(floor=free // 2)
    assert 0 < backend.space().available <= free // 2 + (64 << 20)  # other work shares the disk
    with pytest.raises(ResourceExhausted, match=rf"no room for volume pvc-1 .* above the floor of {free // 2}"):
        backend.create(RECORD, free)
    assert backend.ids() == ()
    backend.create(RECORD, MIB)
    with pytest.raises(ResourceExhausted, match=r"no room for volume pvc-1"):
        backend.grow("pvc-1", free)
    assert place.disk().stat().st_size == MIB
    assert place.backend(floor=1 << 62).space().available == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("action", ["create", "update", "grow"])
def test_a_full_disk_is_told_as_such(place: Place, number: int, action: str) -> None:
    if action != "create":
        place.backend().create(RECORD, MIB)

    def step(name: str) -> None:
        if name.startswith(("in fill", "before set_size")):
            raise OSError(number, os.strerror(number))

    with pytest.raises(ResourceExhausted, match=r"no space for volume pvc-1 .*free space there"):
        act(place.backend(step), action)


def test_a_broken_disk_is_told_as_such(place: Place) -> None:
    def step(name: str) -> None:
        if name.startswith("in fill"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.raises(FailedPrecondition, match=r"volume pvc-1 cannot be written in .*Read-only file system"):
        act(place.backend(step), "create")


def test_grow_never_shrinks_and_keeps_the_content(place: Place) -> None:
    backend = place.backend()
    backend.create(RECORD, MIB)
    with place.disk().open("r+b") as file:
        file.write(b"ciphertext")
    for size, expected in ((MIB, MIB), (1, MIB), (3 * MIB, 3 * MIB), (2 * MIB, 3 * MIB)):
        backend.grow("pvc-1", size)
        assert place.disk().stat().st_size == expected
    assert place.disk().read_bytes()[:10] == b"ciphertext"


# --- leftovers -------------------------------------------------------------------------------------------------------


def test_leftovers_are_reported_and_removed_only_when_told(place: Place) -> None:
    backend = place.backend()
    for name in ("kept", "nameless"):
        backend.create(msgspec.structs.replace(RECORD, id=name), MIB)
    (place.folder / "volumes" / "nameless" / "record.json").unlink()
    for path in ("new/half-made", "trash/half-deleted", "trash/half-made"):
        (place.folder / path).mkdir()
        (place.folder / path / "disk.img").write_bytes(b"x")
    expected = ["new/half-made", "trash/half-deleted", "trash/half-made", "volumes/nameless"]
    assert backend.orphans() == [str(place.folder / path) for path in expected]
    assert backend.remove_orphans("kept") == backend.remove_orphans("nameless") == []
    assert backend.orphans() == [str(place.folder / path) for path in expected]
    removed = backend.remove_orphans("half-made")
    assert removed == [str(place.folder / path) for path in ("new/half-made", "trash/half-made")]
    assert backend.orphans() == [str(place.folder / path) for path in ("trash/half-deleted", "volumes/nameless")]
    assert place.files("volumes") == {"kept/disk.img", "kept/record.json", "nameless/disk.img"}


# --- loop devices ----------------------------------------------------------------------------------------------------


def test_a_device_goes_away_with_its_last_user_unless_it_lasts(place: Place) -> None:
    backend = place.backend()
    backend.create(RECORD, MIB)
    with place.backend().attach("pvc-1", lasting=False):
        assert len(place.loops.all()) == 1
    assert not place.loops.all()
    backend.attach("pvc-1", lasting=True).close()
    (left,) = place.loops.all()
    assert left.backing_path == str(place.disk())
    backend.detach("pvc-1")
    backend.detach("pvc-1")
    assert not place.loops.all()


def test_the_device_of_a_volume_is_known_by_its_file_and_not_by_its_name(place: Place) -> None:
    backend = place.backend()
    for name in ("pvc-1", "pvc-2"):
        backend.create(msgspec.structs.replace(RECORD, id=name), MIB)
    with backend.attach("pvc-1", lasting=False) as one, backend.attach("pvc-2", lasting=False) as other:
        assert backend.is_device_of("pvc-1", one.number)
        assert not backend.is_device_of("pvc-1", other.number)
        assert not backend.is_device_of("pvc-1", (one.major + 1, one.minor))
        assert not backend.is_device_of("pvc-1", (one.major, 1999))
        found = backend.device_of("pvc-2")
        assert found is not None
        assert found.name == other.name
        found.close()
        # Another file takes the place of the volume's: the device is no longer the volume's.
        place.disk().rename(place.disk().with_name("aside"))
        place.disk().write_bytes(bytes(MIB))
        assert not backend.is_device_of("pvc-1", one.number)
        assert backend.device_of("pvc-1") is None
        place.disk().unlink()
        assert not backend.is_device_of("pvc-1", one.number)
        place.disk().with_name("aside").rename(place.disk())


def test_an_attached_volume_is_not_deleted(place: Place) -> None:
    backend = place.backend()
    backend.create(RECORD, MIB)
    with backend.attach("pvc-1", lasting=False) as device:
        with pytest.raises(DeviceInUse, match=rf"still attached as {device.name}; unpublish and unstage it first"):
            backend.delete("pvc-1")
        assert backend.get("pvc-1") == RECORD
    backend.delete("pvc-1")
    assert backend.ids() == ()


@pytest.mark.parametrize("where", ["volumes", "trash", "new"])
def test_a_folder_that_somebody_put_there_is_named_and_nothing_is_removed(place: Place, where: str) -> None:
    backend = place.backend()
    backend.create(RECORD, MIB)
    strange = place.folder / where / "pvc-1" / "lost+found"
    strange.mkdir(parents=True)
    (strange.parent / "file").touch()
    before = {name: place.files(name) for name in ("volumes", "trash", "new")}
    said = rf"{strange.parent} cannot be removed: it holds the folder 'lost\+found', .*move that away and call again"
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match=said):
            backend.delete("pvc-1")
    assert strange.is_dir()
    assert {name: place.files(name) for name in before} == before
    strange.rename(place.folder / "aside")
    backend.delete("pvc-1")
    assert not any(place.files(name) for name in before)
    assert not backend.ids()


def test_looking_whether_a_file_is_attached_leaves_no_lock_behind(place: Place) -> None:
    backend = place.backend()
    backend.create(RECORD, MIB)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert backend.device_of("pvc-1") is None
        backend.detach("pvc-1")
    assert len(os.listdir("/proc/self/fd")) == before
    with backend.attach("pvc-1", lasting=False) as device:
        found = backend.device_of("pvc-1")
        assert found is not None
        assert found.name == device.name
        found.close()


def test_a_grown_file_shows_when_the_device_is_refreshed(place: Place) -> None:
    backend = place.backend()
    backend.create(RECORD, MIB)
    with backend.attach("pvc-1", lasting=False) as device:
        backend.grow("pvc-1", 2 * MIB)
        backend.refresh(device)
        assert [info.size_bytes for info in place.loops.all()] == [2 * MIB]


def test_a_record_of_another_volume_is_refused(place: Place) -> None:
    backend = place.backend()
    backend.create(RECORD, MIB)
    (place.folder / "volumes" / "pvc-1").rename(place.folder / "volumes" / "pvc-2")
    with pytest.raises(FailedPrecondition, match=r"is that of volume pvc-1"):
        backend.get("pvc-2")


# --- copies of the header, and the mark of the newest record ----------------------------------------------------------


def test_with_a_volume_every_copy_of_its_key_slots_is_overwritten(place: Place) -> None:
    """eraseOnDelete: of a header copy alone the data is opened again, as its ciphertext lies on the disk still."""
    luks = LuksIdentity(uuid="u", cipher="aes-xts-plain64", key_bits=512, sector_size=512, data_offset=64 * 1024)
    longer = msgspec.structs.replace(luks, data_offset=128 * 1024)
    record = msgspec.structs.replace(
        RECORD,
        encryption=EncryptionState.ENCRYPTED,
        luks=luks,
        conversion=Conversion(luks=longer),
        parameters=VolumeParameters(encrypted=True, erase_on_delete=True),
    )
    backend = place.backend()
    backend.create(record, MIB)
    names = ("disk.img", "next.img", "header.luks2", "header.before", "header.before.1")
    for name in names:
        with place.disk().with_name(name).open("wb") as file:
            file.write(b"key slots" * (longer.data_offset // 9))
    held = {name: os.open(place.disk().with_name(name), os.O_RDONLY) for name in names}
    try:
        backend.delete("pvc-1")
        for name, descriptor in held.items():
            assert b"key slots" not in os.pread(descriptor, longer.data_offset, 0), name
    finally:
        for descriptor in held.values():
            os.close(descriptor)


@pytest.mark.parametrize(("code", "goes"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
def test_what_cannot_be_overwritten_for_lack_of_room_goes_and_is_told(
    place: Place, monkeypatch: pytest.MonkeyPatch, code: int, *, goes: bool
) -> None:
    """A file system that writes nothing in place and is full: the deletion is what makes room."""
    luks = LuksIdentity(uuid="u", cipher="aes-xts-plain64", key_bits=512, sector_size=512, data_offset=64 * 1024)
    parameters = VolumeParameters(encrypted=True, erase_on_delete=True)
    backend = place.backend()
    backend.create(
        msgspec.structs.replace(RECORD, encryption=EncryptionState.ENCRYPTED, luks=luks, parameters=parameters), MIB
    )
    cut: list[int] = []

    def refuse(_: SteppedFiles, path: Path, _length: int) -> None:
        cut.append(path.stat().st_size)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(SteppedFiles, "overwrite", refuse)
    with (
        told_lines() as lines,
        contextlib.nullcontext() if goes else pytest.raises(FailedPrecondition, match="Input/output"),
    ):
        backend.delete("pvc-1")
    assert set(cut) == {luks.data_offset}
    assert bool([*place.folder.rglob("disk.img")]) is not goes
    assert ("a header was not overwritten" in [line.event for line in lines]) is goes


@pytest.mark.parametrize("erases", [True, False])
def test_what_a_new_header_takes_the_place_of_is_overwritten(place: Place, *, erases: bool) -> None:
    """Behind a change of key the earlier copies open with the earlier one, and so does the file behind another key."""
    luks = LuksIdentity(uuid="u", cipher="aes-xts-plain64", key_bits=512, sector_size=512, data_offset=64 * 1024)
    parameters = VolumeParameters(encrypted=True, erase_on_delete=erases)
    record = msgspec.structs.replace(RECORD, encryption=EncryptionState.ENCRYPTED, luks=luks, parameters=parameters)

    def fill(path: str) -> None:
        Path(path).write_bytes(b"new")

    backend = place.backend()
    backend.create(record, MIB)
    names = ("disk.img", "header.luks2", "header.before", "header.before.1")
    for name in (*names, "next.img"):
        with place.disk().with_name(name).open("wb") as file:
            file.write(b"key slots" * (luks.data_offset // 9))
    held = {name: os.open(place.disk().with_name(name), os.O_RDONLY) for name in names}
    try:
        backend.keep_header_copy("pvc-1", fill)
        backend.take_next("pvc-1")
        for name, descriptor in held.items():
            assert (b"key slots" in os.pread(descriptor, luks.data_offset, 0)) is not erases, name
    finally:
        for descriptor in held.values():
            os.close(descriptor)
    assert b"key slots" in place.disk().read_bytes()
    assert backend.header_copy("pvc-1").read_bytes() == b"new"


def test_a_new_copy_of_the_header_takes_those_along_that_open_with_an_older_key(place: Place) -> None:
    """What restore-header has kept has the key slots that a change of the key has removed from the device."""
    backend = place.backend()
    backend.create(RECORD, MIB)
    folder = place.disk().parent
    for name in ("header.luks2", "header.before", "header.before.1"):
        (folder / name).write_bytes(b"old")

    def full(path: str) -> None:
        Path(path).write_bytes(b"ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ResourceExhausted):
        backend.keep_header_copy("pvc-1", full)
    assert backend.header_copy("pvc-1").read_bytes() == b"old"
    assert {path.name for path in folder.iterdir() if "header" in path.name} == {
        "header.luks2", "header.before", "header.before.1",
    }  # fmt: skip

    def whole(path: str) -> None:
        Path(path).write_bytes(b"new")

    backend.keep_header_copy("pvc-1", whole)
    assert backend.header_copy("pvc-1").read_bytes() == b"new"
    assert [path.name for path in folder.iterdir() if "header" in path.name] == ["header.luks2"]


def test_a_record_that_is_older_than_the_volume_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restored one may permit what the newer one forbids: to format. The attributes are those of a file system."""
    kept: dict[tuple[str, str], bytes] = {}

    def getxattr(path: str, name: str) -> bytes:
        if (path, name) not in kept:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return kept[path, name]

    monkeypatch.setattr(os, "getxattr", lambda path, name: getxattr(os.fspath(path), name))
    monkeypatch.setattr(os, "setxattr", lambda path, name, value: kept.update({(os.fspath(path), name): value}))
    backend = place.backend()
    older = backend.create(msgspec.structs.replace(RECORD, file_system=FileSystemState.RAW), MIB)
    path = place.disk().with_name("record.json")
    content = path.read_bytes()
    newer = backend.update(older)
    assert backend.is_newest(newer)
    assert not backend.is_newest(older)
    path.write_bytes(content)
    for act_on in (backend.get, lambda _: backend.update(older)):
        with pytest.raises(FailedPrecondition, match=r"is older than the volume: .* has revision 0 and revision 1 was"):
            act_on("pvc-1")
    assert backend.accept_record("pvc-1") == older
    assert backend.get("pvc-1") == older


def test_a_record_of_half_a_volume_is_never_taken(place: Place) -> None:
    """By a record from before a move to another volume key what was moved would be lost."""
    luks = LuksIdentity(uuid="u", cipher="aes-xts-plain64", key_bits=512, sector_size=512, data_offset=64 * 1024)
    backend = place.backend()
    made = backend.create(msgspec.structs.replace(RECORD, file_system=FileSystemState.RAW), MIB)
    backend.update(msgspec.structs.replace(made, conversion=Conversion(luks=luks)))
    with pytest.raises(FailedPrecondition, match=r"half of it would be lost"):
        backend.accept_record("pvc-1")


# --- storage beside a volume's own -----------------------------------------------------------------------------------


def test_what_is_beside_a_volume_is_in_use_too_and_is_the_volumes(place: Place) -> None:
    """While it is moved to another volume key half of it lies in next.img."""
    backend = place.backend()
    backend.create(RECORD, MIB)
    backend.make_next("pvc-1", 2 * MIB)
    with backend.attach_next("pvc-1") as device:
        assert backend.is_device_of("pvc-1", device.number)
        with pytest.raises(DeviceInUse, match=rf"still attached as {device.name}"):
            backend.delete("pvc-1")
    backend.delete("pvc-1")


def test_storage_beside_a_volume_counts_as_half_of_it_once_something_lies_behind_its_header(place: Place) -> None:
    backend = place.backend()
    backend.create(RECORD, MIB)
    assert not backend.has_next("pvc-1")
    backend.make_next("pvc-1", 32 * MIB)
    beside = place.disk().with_name("next.img")
    with beside.open("r+b") as file:
        file.write(b"header")
    assert backend.has_next("pvc-1")
    assert not backend.has_next("pvc-1", 16 * MIB)  # nothing was moved there yet
    with beside.open("r+b") as file:
        file.seek(20 * MIB)
        file.write(b"data")
    assert backend.has_next("pvc-1", 16 * MIB)


def test_a_file_of_the_same_inode_on_another_file_system_is_another_volumes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = place.backend()
    backend.create(RECORD, MIB)
    status = place.disk().stat()
    for device, is_it in ((status.st_dev, True), (status.st_dev + 1, False)):
        monkeypatch.setattr(place.loops, "file_of", lambda *_, device=device: (device, status.st_ino))
        assert backend.is_device_of("pvc-1", (7, 0)) is is_it


def test_the_guard_is_off_while_the_driver_writes_and_on_again_behind_it(place: Place) -> None:
    """Without it losetup binds the file of a volume in use a second time, and two mappings tear it."""
    backend = place.backend()
    backend.create(RECORD, MIB)
    disk, guarded = str(place.disk()), place.loops.guarded
    with backend.attach("pvc-1", lasting=False):
        backend.guard("pvc-1")
        assert disk in guarded
        with backend.storage("pvc-1"):
            assert disk not in guarded
        assert disk in guarded
        backend.grow("pvc-1", 2 * MIB)
        assert disk in guarded
        guarded.clear()  # a growth that was cut
        backend.grow("pvc-1", 2 * MIB)
        assert disk in guarded
    backend.detach("pvc-1")
    assert not guarded
    backend.guard("pvc-1")
    guarded.add(str(place.folder / "trash" / "pvc-1" / "disk.img"))  # a power cut leaves it on
    backend.delete("pvc-1")
    assert not guarded


def test_a_device_that_was_attached_before_its_file_grew_shows_all_of_it(place: Place) -> None:
    backend = place.backend()
    backend.create(RECORD, MIB)
    with backend.attach("pvc-1", lasting=False) as earlier:
        backend.grow("pvc-1", 2 * MIB)
        with backend.attach("pvc-1", lasting=False) as device:
            assert device.name == earlier.name
            found = place.loops.info(device.name)
            assert found is not None
            assert found.size_bytes == 2 * MIB
