"""A move to Ceph that is killed at each of its steps: the records of both sides, the pool and the node's mappings."""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from csi_driver.backends.base import Backend
from csi_driver.backends.loopfile import LoopfileBackend
from csi_driver.backends.rbd import RbdBackend
from csi_driver.backends.rbddevices import MappedVolumes
from csi_driver.backends.rbdimages import Images
from csi_driver.backends.rbdnodes import NodeAttachments
from csi_driver.backends.rbdplace import image_name
from csi_driver.backends.rbdpool import PoolRoom
from csi_driver.backends.rbdrecords import VolumeLogs
from csi_driver.backends.records import RecordCodec
from csi_driver.host import blockdev
from csi_driver.host.handle import Handle, open_handle
from csi_driver.host.holders import Holders
from csi_driver.host.krbd import ImageAddress, ImageIdentity, MappedImage, MappedImages
from csi_driver.host.locks import VolumeLocks
from csi_driver.model.errors import (
    Aborted,
    AlreadyExists,
    DeviceAbsent,
    DeviceInUse,
    FailedPrecondition,
    NotFound,
    VolumeBusy,
)
from csi_driver.model.settings import Limits
from csi_driver.model.volume import FileSystemState, Move, MovePhase, VolumeParameters, VolumeRecord
from csi_driver.volumes.move import MoveRequest, Moves
from csi_driver.volumes.move_copy import Onlooker, Place
from csi_driver.volumes.moved import Homes
from tests.backends.moving import Shown
from tests.ceph_fakes import PLACE, FakePool
from tests.fake_host import FakeLoops, SteppedFiles, no_kms
from tests.unit.test_volume_from_image import InlineWorkers

MIB = 1 << 20
SIZE = MIB + 16384
VOLUME = "pvc-1"
FAR = PLACE.id_for(VOLUME)
IMAGE = image_name(FAR)
CLASS = VolumeParameters(cluster_id="ceph-one", pool="rbd")


class Killed(BaseException):
    """kill -9: nothing of the process is done any more."""


class Countdown:
    """A step that kills when `left` were done, and at each one behind it; never as long as that is None."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.count = 0

    def __call__(self, _: str = "") -> None:
        self.count += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed


class Pool(FakePool):
    """Images with content, which nodes map: each mapping is a client of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.mapped: list[MappedImage] = []
        self._numbers = itertools.count()

    def file(self, image_id: str) -> Path:
        return self.folder / image_id

    def make(self, image: str, size: int, features: Sequence[str], data_pool: str | None) -> None:
        with self.file(f"id{self._made + 1}").open("wb") as file:
            file.truncate(size)
        super().make(image, size, features, data_pool)

    def is_unwritten(self, image: str, seconds: float) -> bool:
        return not self.file(self.images[image].id).read_bytes().strip(b"\0")

    def rooms(self) -> Sequence[PoolRoom]:
        return [msgspec.convert({"name": "rbd", "id": 7, "stats": {"max_avail": 1 << 40}}, PoolRoom)]

    def map(self, image: str) -> MappedImage:
        self.step("before map")
        number = next(self._numbers)
        client = f"192.0.2.7:0/{number}"
        identity = ImageIdentity("fsid-1", 7, "", self.images[image].id)
        mapped = MappedImage(number, identity, is_snapshot=False, major=250, minor=number, client=client)
        self.mapped.append(mapped)
        self.images[image].open_at.append(client)
        self.step("after map")
        return mapped


class Kernel(MappedImages):
    """The mappings of one node."""

    def __init__(self, pool: Pool) -> None:
        super().__init__("/")  # the module is loaded
        self._pool = pool

    def map(self, address: ImageAddress) -> MappedImage:
        return self._pool.map(address.image)

    def all(self) -> Iterator[MappedImage]:
        return iter(list(self._pool.mapped))

    def of_device(self, device: tuple[int, int]) -> MappedImage | None:
        return next((one for one in self._pool.mapped if (one.major, one.minor) == device), None)

    def open(self, mapped: MappedImage) -> Handle:
        return open_handle(str(self._pool.file(mapped.identity.image_id)), os.O_RDONLY)

    def unmap(self, mapped: MappedImage) -> None:
        self._pool.mapped.remove(mapped)
        for image in self._pool.images.values():
            with contextlib.suppress(ValueError):
                image.open_at.remove(mapped.client)


def keep_header(path: str) -> None:
    Path(path).write_bytes(b"header")


class World:
    """What a kill leaves: the node's files, the pool, the kernel's mappings. Drivers on it are made anew each time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "images").mkdir(parents=True)
        self.pool = Pool(folder / "images")
        self.step = Countdown()
        self.content = os.urandom(4096) + bytes(MIB) + os.urandom(12288)
        record = VolumeRecord(
            id=VOLUME, name=VOLUME, capacity_bytes=SIZE, parameters=VolumeParameters(),
            file_system=FileSystemState.RAW, created="now",
        )  # fmt: skip
        self.source.create(record, SIZE)
        self.source.keep_header_copy(VOLUME, keep_header)
        self.write(self.content)

    @property
    def disk(self) -> Path:
        return self.folder / "files/loopfile/volumes" / VOLUME / "disk.img"

    @property
    def source(self) -> LoopfileBackend:
        self.loops = FakeLoops(self.step)
        files = SteppedFiles(self.step)
        made = LoopfileBackend(self.folder / "files/loopfile", 0, files, self.loops, RecordCodec())
        made.prepare()
        return made

    def ceph(self, node: str = "node-1") -> RbdBackend:
        """The driver of Ceph on a node; "" is the controller's."""
        self.pool.step = self.step
        logs, files, workers = VolumeLogs(), SteppedFiles(self.step), InlineWorkers(self.step)
        access: Any = SimpleNamespace(
            pool=lambda *_: self.pool, place_of=lambda _: PLACE, uuid=lambda _: "fsid-1", knows=lambda _: True,
            use=lambda *_: None, forget=lambda _: None, every_pool=lambda: [self.pool], reached=str,
        )  # fmt: skip
        kernel = Kernel(self.pool) if node == "node-1" else Kernel(Pool(self.folder))
        folder = self.folder / f"ceph-{node}"
        made = RbdBackend(
            folder, access, logs, Images(logs, 1), NodeAttachments(logs, node, "boot"),
            MappedVolumes(folder, files, workers, kernel, 1), RecordCodec(), files, is_central=True,
        )  # fmt: skip
        made.prepare()
        return made

    def end(self) -> None:
        """What goes with a process that is killed: devices that nobody has open any more."""
        self.step.left = None
        self.loops.end_of_process()

    def move(self, *, undo: bool = False, keep: bool = False) -> VolumeRecord:
        """The command."""
        here, there = (
            self.place(backend, name) for backend, name in ((self.source, "files"), (self.ceph(), "ceph-node-1"))
        )
        moves = Moves(here, InlineWorkers(self.step), no_kms(), Limits(), MIB)
        if undo:
            return moves.undo(VOLUME, there, CLASS)
        return moves.move(MoveRequest(VOLUME, CLASS, keep=keep), there, Onlooker(Shown()))

    def place(self, backend: Backend, name: str) -> Place:
        nothing = SimpleNamespace(stage=None, mapping=None, mounts=(), nodes=())
        presences: Any = SimpleNamespace(of=lambda *_: nothing)
        locks = self.folder / "locks" / name
        locks.mkdir(parents=True, exist_ok=True)
        return Place(self.folder / name, backend, VolumeLocks(locks, Holders()), presences)

    def has_left(self, move: Move) -> bool:
        found = self.source.get(move.volume_id).move
        return found is not None and (found.phase, found.id) == (MovePhase.LEFT, move.id)

    def uses(self, backend: Backend, volume_id: str, *, sees_source: bool = True) -> bool:
        """Whether a stage there would go on; its record says then that the volume is there."""

        def gone(_: Move) -> bool:
            raise DeviceAbsent("another node's state directory")

        try:
            Homes(backend, self.has_left if sees_source else gone).here(backend.get(volume_id))
        except (NotFound, FailedPrecondition):
            return False
        return True

    def write(self, content: bytes) -> None:
        with self.disk.open("r+b") as file:
            file.write(content)

    @property
    def shown(self) -> bytes:
        """What is in the image."""
        return self.pool.file(self.pool.images[IMAGE].id).read_bytes()


@pytest.fixture(autouse=True)
def files_are_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockdev, "size_bytes", lambda descriptor: os.fstat(descriptor).st_size)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the machine stays up


def every_step(folder: Path, stride: int = 1) -> Iterator[tuple[str, World]]:
    """Worlds in which a move was killed, at each of its steps, or at each one of so many."""
    whole = World(folder / "whole")
    whole.step.count = 0
    whole.move()
    assert whole.step.count > 100
    for step in range(stride - 1, whole.step.count, stride):
        world = World(folder / f"step-{step}")
        world.step.left = step
        with pytest.raises(Killed):
            world.move()
        world.end()
        yield f"step {step}", world


def check_ended(world: World, step: str) -> None:
    """The volume is in Ceph, whole; any node can have it, and nothing is left here."""
    assert world.shown == world.content, step
    assert not world.source.has(VOLUME), step
    assert not world.source.orphans(), step
    ceph = world.ceph("")
    assert ceph.get(FAR).move is None, step
    assert not world.pool.mapped, step
    assert ceph.published(FAR) == [], step
    assert Path(world.ceph().header_copy(FAR)).read_bytes() == b"header", step
    ceph.publish(FAR, "node-2", many_nodes=False)
    assert world.uses(world.ceph("node-2"), FAR, sees_source=False), step


def check_one_home(world: World, step: str) -> bool:
    """In one place and in one only it can be used, and by another node only if by this one; whether that is Ceph."""
    elsewhere = world.uses(world.ceph("node-2"), FAR, sees_source=False)
    there, here = world.uses(world.ceph(), FAR), world.uses(world.source, VOLUME)
    assert there != here, step
    assert there or not elsewhere, step
    return there


def test_the_same_command_ends_it(tmp_path: Path) -> None:
    for step, world in every_step(tmp_path):
        with contextlib.suppress(NotFound):
            world.move()
        check_ended(world, step)


def test_it_can_be_used_in_one_place_and_the_same_command_ends_it_with_what_was_written(tmp_path: Path) -> None:
    places = set()
    for step, world in every_step(tmp_path):
        is_there = check_one_home(world, step)
        places.add(is_there)
        if is_there:
            assert world.shown == world.content, step
        else:
            assert world.disk.read_bytes() == world.content, step
            world.content = os.urandom(4096) + world.content[4096:]
            world.write(world.content)
        with contextlib.suppress(NotFound):
            world.move()
        check_ended(world, step)
    assert places == {True, False}


def test_it_is_given_up_or_is_there_already(tmp_path: Path) -> None:
    for step, world in every_step(tmp_path, 2):
        if not world.source.has(VOLUME):
            continue
        try:
            assert world.move(undo=True).move is None, step
        except FailedPrecondition:
            assert world.ceph().get(FAR).move is None, step
            continue
        assert world.disk.read_bytes() == world.content, step
        assert world.uses(world.source, VOLUME), step
        assert not world.pool.images, step
        assert not world.pool.mapped, step


@pytest.mark.parametrize("phase", [None, MovePhase.LEAVING, MovePhase.LEFT])
def test_a_move_is_not_given_up_when_the_volume_was_used_over_there_or_moved_on(
    tmp_path: Path, phase: MovePhase | None
) -> None:
    """The copy that was kept here would count again, and its deletion would destroy the key of the volume."""
    world = World(tmp_path)
    world.move(keep=True)
    onward = Move(phase=phase, id="onward", other="/elsewhere", volume_id=VOLUME) if phase else None
    world.ceph().update(msgspec.structs.replace(world.ceph().get(FAR), move=onward))
    with pytest.raises(FailedPrecondition, match="may have been used there since; move it back from there"):
        world.move(undo=True)
    assert not world.uses(world.source, VOLUME)


def test_what_is_deleted_in_ceph_meanwhile_is_here_still(tmp_path: Path) -> None:
    """DeleteVolume by the controller, which waits for what a killed command has mapped."""
    deleted = set()
    for step, world in every_step(tmp_path, 2):
        try:
            world.ceph("").delete(FAR)
        except (Aborted, DeviceInUse):
            assert world.pool.mapped, step
            world.move(undo=True)
        deleted.add(world.source.has(VOLUME))
        if not world.source.has(VOLUME):
            continue  # it had come to its end: what was deleted is the volume
        assert not world.pool.images, step
        world.move(undo=True)
        assert world.uses(world.source, VOLUME), step
        assert world.disk.read_bytes() == world.content, step
        world.move()
        check_ended(world, step)
    assert True in deleted


def test_what_is_deleted_here_meanwhile_destroys_nothing_of_what_came_there(tmp_path: Path) -> None:
    for step, world in every_step(tmp_path, 2):
        if not world.source.has(VOLUME):
            continue
        phase = world.source.get(VOLUME).move
        world.source.delete(VOLUME)
        if phase is not None and phase.phase is MovePhase.LEFT:
            assert world.shown == world.content, step
        else:
            assert not world.uses(world.ceph(), FAR), step


def test_a_side_that_asks_nobody_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Homes, "here", lambda _, record: record)
    seen = 0
    for step, world in every_step(tmp_path, 4):
        try:
            check_one_home(world, step)
        except AssertionError:
            seen += 1
    assert seen > 10


@pytest.mark.parametrize(("side", "volume_id"), [("files", VOLUME), ("ceph-node-1", FAR)])
def test_a_call_for_the_volume_on_either_side_keeps_it_from_being_moved(
    tmp_path: Path, side: str, volume_id: str
) -> None:
    """A stage by the server here would be copied from underneath, a deletion over there would take what is copied."""
    world = World(tmp_path)
    locks = world.place(world.source, side).locks
    for undo in (False, True):
        with locks.hold(volume_id), pytest.raises(VolumeBusy):
            world.move(undo=undo)
        assert world.source.get(VOLUME).move is None
        assert not world.pool.images
    world.move()
    check_ended(world, side)


def test_what_was_changed_before_the_lock_was_had_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that ends between the look at the record and the lock: by the older record the move would write."""
    world = World(tmp_path)
    hold = VolumeLocks.hold

    def changed(locks: VolumeLocks, volume_id: str) -> contextlib.AbstractContextManager[None]:
        if volume_id == VOLUME:
            source = world.source
            source.update(msgspec.structs.replace(source.get(VOLUME), file_system=FileSystemState.NONE))
            source.update(msgspec.structs.replace(source.get(VOLUME), file_system=FileSystemState.RAW))
        return hold(locks, volume_id)

    monkeypatch.setattr(VolumeLocks, "hold", changed)
    world.move()
    check_ended(world, "changed")


def test_what_came_there_from_a_third_driver_is_left_alone(tmp_path: Path) -> None:
    """A volume of the same name: what it was copied from may have left already, and then this is all there is of it."""
    world = World(tmp_path)
    world.move(keep=True)
    source = world.source
    source.update(msgspec.structs.replace(source.get(VOLUME), move=None))
    third = Move(phase=MovePhase.ARRIVED, id="third", other="/third", volume_id=VOLUME)
    world.ceph().update(msgspec.structs.replace(world.ceph().get(FAR), move=third))
    with pytest.raises(AlreadyExists, match=r"has a volume .* already; it was left as it is"):
        world.move()
    world.move(undo=True)
    assert world.ceph().get(FAR).move == third
    assert world.shown == world.content
