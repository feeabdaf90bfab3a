"""What may be done with a volume that is moved to another backend, or was."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from csi_driver.backends.loopfile import LoopfileBackend
from csi_driver.backends.records import RecordCodec
from csi_driver.host.files import Files
from csi_driver.host.locks import VolumeLocks
from csi_driver.keys.ledger import KeyEntry, KeyLedger
from csi_driver.model.errors import DeviceAbsent, DeviceInUse, FailedPrecondition, InvalidArgument
from csi_driver.model.settings import Settings
from csi_driver.model.volume import (
    EncryptionState,
    FileSystemState,
    KeyTrail,
    Move,
    MovePhase,
    VolumeParameters,
    VolumeRecord,
)
from csi_driver.volumes.attachment import Attachments, AttachRequest
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.driver import build_driver
from csi_driver.volumes.keys import VolumeKeys
from csi_driver.volumes.move_copy import Place
from csi_driver.volumes.move_place import begun_place, id_there, placed
from csi_driver.volumes.moved import Homes, arrived, is_here, take
from csi_driver.volumes.provision import Provisioning
from csi_driver.volumes.sizing import grow_device
from tests.fake_host import FakeLoops, MemoryBackend, SharedMemoryBackend, no_images

MIB = 1 << 20
TRAIL = KeyTrail(kms_id="vault", type="vault", name="pvc-1.a1")


def record(phase: MovePhase | None = None, other: str = "/var/lib/other") -> VolumeRecord:
    move = Move(phase=phase, id="m", other=other, volume_id="pvc-1") if phase else None
    return VolumeRecord(
        id="pvc-1", name="pvc-1", capacity_bytes=MIB, parameters=VolumeParameters(encrypted=True), move=move,
        encryption=EncryptionState.ENCRYPTED, file_system=FileSystemState.RAW, key=TRAIL, created="now",
    )  # fmt: skip


def kept(phase: MovePhase | None = None) -> MemoryBackend:
    backend = MemoryBackend()
    backend.create(record(phase), MIB)
    return backend


def never(_: Move) -> bool:
    raise DeviceAbsent("the other state directory is not there")


@pytest.mark.parametrize(
    ("phase", "has_left", "here"),
    [
        (None, never, True),
        (MovePhase.LEAVING, never, True),
        (MovePhase.LEFT, lambda _: True, False),
        (MovePhase.ARRIVING, lambda _: True, False),
        (MovePhase.ARRIVED, lambda _: False, False),
        (MovePhase.ARRIVED, never, False),
        (MovePhase.ARRIVED, lambda _: True, True),
    ],
)
def test_it_is_used_where_it_is_and_the_record_says_so_first(
    phase: MovePhase | None, has_left: Callable[[Move], bool], *, here: bool
) -> None:
    backend = kept(phase)
    homes = Homes(backend, has_left)
    if not here:
        with pytest.raises(FailedPrecondition, match=r"^volume pvc-1 (was moved to|was copied here|is being copied)"):
            homes.here(backend.get("pvc-1"))
        assert backend.get("pvc-1") == record(phase)
        return
    assert homes.here(backend.get("pvc-1")).move is None
    assert backend.get("pvc-1").move is None


@pytest.mark.parametrize("phase", [MovePhase.LEFT, MovePhase.ARRIVING, MovePhase.ARRIVED])
def test_what_is_not_here_does_not_grow(phase: MovePhase) -> None:
    backend = kept(phase)
    with pytest.raises(FailedPrecondition):
        grow_device(backend, backend.get("pvc-1"), 2 * MIB, 0)
    assert backend.sizes["pvc-1"] == MIB


@pytest.mark.parametrize("phase", [None, *MovePhase])
def test_only_where_it_is_it_is_put_down_and_its_key_destroyed(tmp_path: Path, phase: MovePhase | None) -> None:
    """A killed call has left the entry of a key that a record names, which would count as left behind without that."""
    done: list[str] = []
    ledger = KeyLedger(tmp_path, Files())
    ledger.note(KeyEntry(volume="pvc-1", key=TRAIL, leaving=False))
    sources: Any = SimpleNamespace(destroy=lambda trail, *_: done.append(f"destroyed {trail.name}"))
    keys = VolumeKeys(sources, ledger)
    backend = kept(phase)
    settings = Settings(node_id="node-1")
    provisioning = Provisioning(
        settings, backend, no_images(), lambda: None, lambda volume_id: done.append(f"released {volume_id}"), keys
    )
    provisioning.delete("pvc-1")
    assert not backend.has("pvc-1")
    assert done == (["released pvc-1", f"destroyed {TRAIL.name}"] if is_here(record(phase)) else [])
    assert keys.unnamed(backend).left == []


@pytest.mark.parametrize("phase", MovePhase)
def test_no_older_record_of_a_move_is_taken(tmp_path: Path, phase: MovePhase) -> None:
    backend = LoopfileBackend(tmp_path, 0, Files(), FakeLoops(), RecordCodec())
    backend.prepare()
    backend.create(record(phase), MIB)
    with pytest.raises(FailedPrecondition, match=rf"by it the volume is {phase}, moved between this driver and that"):
        backend.accept_record("pvc-1")


def test_the_other_driver_is_asked_by_its_state_directory(tmp_path: Path) -> None:
    here, there = (build_driver(Settings(node_id="n", state_dir=tmp_path / name)) for name in ("here", "there"))
    for driver in (here, there):
        driver.backend.prepare()
    there.backend.create(record(MovePhase.ARRIVED, str(tmp_path / "here")), MIB)
    leaving = here.backend.create(record(MovePhase.LEAVING), MIB)
    with pytest.raises(FailedPrecondition, match=r"nobody knows whether it may still be used there"):
        there.staging._homes.here(there.backend.get("pvc-1"))  # noqa: SLF001
    here.backend.update(msgspec.structs.replace(leaving, move=record(MovePhase.LEFT).move))
    assert there.staging._homes.here(there.backend.get("pvc-1")).move is None  # noqa: SLF001


# --- storage that other nodes see too

CEPH = VolumeParameters(cluster_id="one", pool="rbd", map_options=("crc",))


class Pools(SharedMemoryBackend):
    """The pool is in the id, and has to be said."""

    def id_for(self, name: str, parameters: VolumeParameters) -> str:
        if parameters.pool is None:
            raise InvalidArgument("the parameter pool is missing")
        return f"{name}.{parameters.pool}"


def place_of(backend: MemoryBackend, folder: Path) -> Place:
    unused: Any = None
    return Place(folder, backend, VolumeLocks(folder, unused), unused)


@pytest.mark.parametrize("phase", [None, *MovePhase])
def test_no_node_is_given_what_its_record_says_is_elsewhere(phase: MovePhase | None) -> None:
    backend = SharedMemoryBackend()
    backend.create(record(phase), MIB)
    attachments = Attachments(backend, backend)
    mode = Capability(AccessMode.SINGLE_NODE_WRITER, block=True)
    request = AttachRequest("pvc-1", "node-2", mode, read_only=False, context={})
    if phase in (MovePhase.LEFT, MovePhase.ARRIVING):
        with pytest.raises(FailedPrecondition, match=r"^volume pvc-1 (was moved to|is being copied here)"):
            attachments.attach(request)
        assert backend.published("pvc-1") == []
    else:
        attachments.attach(request)


def test_other_nodes_are_told_on_which_one_the_move_is_ended() -> None:
    move = Move(phase=MovePhase.ARRIVED, id="m", other="/var/lib/luks-csi", volume_id="pvc-1", node="node-1")
    backend = MemoryBackend()
    backend.create(msgspec.structs.replace(record(), move=move), MIB)
    with pytest.raises(FailedPrecondition) as refused:
        Homes(backend, never).here(backend.get("pvc-1"))
    assert "was copied here from /var/lib/luks-csi of node node-1, and nobody knows" in str(refused.value)
    assert "run the same command once more on that node" in str(refused.value)


@pytest.mark.parametrize("phase", [None, *MovePhase])
def test_only_what_arrived_is_taken_where_nobody_says_that_it_has_left(phase: MovePhase | None) -> None:
    backend = kept(phase)
    found = arrived(backend, "pvc-1")
    assert (found is not None) is (phase is MovePhase.ARRIVED)
    if found is not None:
        assert take(backend, found).move is None
        assert Homes(backend, never).here(backend.get("pvc-1")).id == "pvc-1"


def test_where_it_goes_is_said_once_and_not_elsewhere_the_next_time(tmp_path: Path) -> None:
    there = place_of(Pools(), tmp_path)
    with pytest.raises(InvalidArgument, match=r"the parameter pool is missing"):
        id_there(record(), there, None)
    assert id_there(record(), there, CEPH) == "pvc-1.rbd"
    move = Move(phase=MovePhase.LEAVING, id="m", other=str(tmp_path), volume_id="pvc-1.rbd")
    begun = msgspec.structs.replace(record(), move=move)
    assert id_there(begun, there, None) == id_there(begun, there, CEPH) == "pvc-1.rbd"
    with pytest.raises(FailedPrecondition, match=r"as its volume pvc-1\.rbd, and .* it would be pvc-1\.fast; go on as"):
        id_there(begun, there, msgspec.structs.replace(CEPH, pool="fast"))
    elsewhere = msgspec.structs.replace(record(), move=msgspec.structs.replace(move, other="/another"))
    assert id_there(elsewhere, there, msgspec.structs.replace(CEPH, pool="fast")) == "pvc-1.fast"
    assert id_there(begun, place_of(MemoryBackend(), tmp_path), None) == "pvc-1"


def test_its_class_goes_along_but_for_where_it_lies(tmp_path: Path) -> None:
    there = place_of(Pools(), tmp_path)
    source = msgspec.structs.replace(
        record(), parameters=VolumeParameters(encrypted=True, backend="lvm", thin_pool="pool", mkfs_options=("-m0",))
    )
    target = placed(source, there, CEPH)
    assert target == msgspec.structs.replace(CEPH, encrypted=True, backend=there.backend.name, mkfs_options=("-m0",))
    coming = msgspec.structs.replace(source, parameters=target)
    assert placed(source, there, begun_place(coming, there)) == target
    assert begun_place(coming, place_of(MemoryBackend(), tmp_path)) == VolumeParameters()
    assert begun_place(None, there) == VolumeParameters()


def test_what_only_a_controller_makes_is_no_target(tmp_path: Path) -> None:
    with pytest.raises(
        FailedPrecondition, match=r"only the controller of the backend .* makes volumes; make a new one"
    ):
        id_there(record(), place_of(Pools(own_node=""), tmp_path), CEPH)


class Deletion:
    """What a deletion does, in order; `fails` is the step that raises."""

    def __init__(self, folder: Path) -> None:
        self.done: list[str] = []
        self.fails = ""
        self.backend = kept()
        self.ledger = KeyLedger(folder, Files())
        sources: Any = SimpleNamespace(destroy=lambda *_: self.step("destroyed"))
        delete, get = self.backend.delete, self.backend.get
        wrapped: Any = self.backend

        def deleted(volume_id: str) -> None:
            self.step("deleted")
            delete(volume_id)

        def read(volume_id: str) -> VolumeRecord:
            if self.fails == "read":
                raise FailedPrecondition("the record cannot be read")
            return get(volume_id)

        wrapped.delete, wrapped.get = deleted, read
        self.provisioning = Provisioning(
            Settings(node_id="node-1"), self.backend, no_images(), lambda: None, lambda _: self.step("released"),
            VolumeKeys(sources, self.ledger),
        )  # fmt: skip

    def step(self, name: str) -> None:
        if name == self.fails:
            raise DeviceInUse(f"not {name}")
        noted = any(entry.leaving for entry in self.ledger.entries("pvc-1"))
        self.done.append(f"{name}, noted" if noted else name)


def test_a_key_is_noted_before_its_volume_goes_and_destroyed_behind_it(tmp_path: Path) -> None:
    deletion = Deletion(tmp_path)
    deletion.provisioning.delete("pvc-1")
    assert deletion.done == ["released", "deleted, noted", "destroyed, noted"]
    assert deletion.ledger.entries() == []


@pytest.mark.parametrize(("fails", "done"), [("released", []), ("deleted", ["released"])])
def test_a_deletion_that_is_refused_leaves_the_key(tmp_path: Path, fails: str, done: list[str]) -> None:
    """A volume in use is there still, and nothing else opens it."""
    deletion = Deletion(tmp_path)
    deletion.fails = fails
    with pytest.raises(DeviceInUse):
        deletion.provisioning.delete("pvc-1")
    assert deletion.done == done
    assert deletion.backend.has("pvc-1")


def test_by_a_record_that_cannot_be_read_no_key_is_destroyed(tmp_path: Path) -> None:
    """What a killed call has noted may be the very key that the record, restored from a backup, names."""
    deletion = Deletion(tmp_path)
    deletion.ledger.note(KeyEntry(volume="pvc-1", key=TRAIL, leaving=False))
    deletion.fails = "read"
    deletion.provisioning.delete("pvc-1")
    assert [each.partition(",")[0] for each in deletion.done] == ["released", "deleted"]
    assert [entry.key for entry in deletion.ledger.entries()] == [TRAIL]
