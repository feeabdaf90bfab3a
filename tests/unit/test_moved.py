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
from csi_driver.keys.ledger import KeyEntry, KeyLedger
from csi_driver.model.errors import DeviceAbsent, FailedPrecondition
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
from csi_driver.volumes.driver import build_driver
from csi_driver.volumes.keys import VolumeKeys
from csi_driver.volumes.moved import Homes, is_here
from csi_driver.volumes.provision import Provisioning
from csi_driver.volumes.sizing import grow_device
from tests.fake_host import FakeLoops, MemoryBackend, no_images

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
    assert keys.left([]) == []


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
