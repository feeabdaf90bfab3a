"""Volumes that Ceph-CSI made, in a pool in memory: what is one, what is refused, and what a kill in between leaves."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import pytest

from csi_driver.backends.base import ForeignVolume
from csi_driver.backends.rbdaccess import CephAccess
from csi_driver.backends.rbddevices import MappedVolumes
from csi_driver.backends.rbdforeign import CsiHandle, CsiVolumes
from csi_driver.backends.rbdimages import Images
from csi_driver.backends.rbdplace import image_name
from csi_driver.backends.rbdrecords import VolumeLogs, VolumeState
from csi_driver.backends.records import RecordCodec
from csi_driver.model.errors import (
    Aborted,
    AlreadyExists,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from csi_driver.model.volume import EncryptionState, FileSystemState, VolumeRecord
from tests.ceph_fakes import PLACE, FakeImage, FakePool

UUID = "8a710f4c-9d2c-4f77-8a4e-2f2f1d9b9c01"
HANDLE = f"0001-0008-ceph-one-0000000000000007-{UUID}"
DASHED = f"0001-0003-a-b-00000000000000ff-{UUID}"
THEIRS, JOURNAL = f"csi-vol-{UUID}", f"csi.volume.{UUID}"
ID = PLACE.id_for("data")
OURS = image_name(ID)


class Killed(BaseException):
    """The process ends at this very step."""


@dataclass
class FakeAccess:
    """Whoever asks gets the pool."""

    made: FakePool

    def numbered(self, cluster_id: str, number: int) -> FakePool:
        assert (cluster_id, number) == ("ceph-one", 7)
        return self.made

    def pool(self, volume_id: str) -> FakePool:
        return self.made

    def uuid(self, pool: FakePool) -> str:
        return pool.cluster_uuid()


def pool_with(
    metadata: dict[str, str] | None = None, journal: dict[str, str] | None = None, open_at: tuple[str, ...] = ()
) -> FakePool:
    """A pool in which Ceph-CSI has made a volume, and two images of others."""
    pool = FakePool()
    told = {"rbd.csi.ceph.com/encrypted": "encrypted"} if metadata is None else metadata
    pool.images[THEIRS] = FakeImage("theirs", 64 << 20, written=True, metadata=told, open_at=list(open_at))
    pool.images["other"] = FakeImage("other", 1 << 20)
    pool.maps[JOURNAL] = {"csi.volname": "pvc-1", "csi.imagename": THEIRS} if journal is None else journal
    return pool


def volumes_in(pool: FakePool, logs: VolumeLogs | None = None) -> CsiVolumes:
    """What finds and takes; nothing here maps an image."""
    access, devices = cast("CephAccess", FakeAccess(pool)), cast("MappedVolumes", None)
    return CsiVolumes(access, logs or VolumeLogs(), devices, RecordCodec())


def found(pool: FakePool, name: str = "data") -> ForeignVolume:
    return volumes_in(pool).find(HANDLE, name)


def record_of(foreign: ForeignVolume) -> VolumeRecord:
    return VolumeRecord(
        id=foreign.volume_id,
        name="data",
        capacity_bytes=48 << 20,
        parameters=foreign.parameters,
        encryption=EncryptionState.ENCRYPTED,
        file_system=FileSystemState.RAW,
        created="2026-11-29T12:00:00+00:00",
    )


def take(pool: FakePool) -> None:
    foreign = found(pool)
    volumes_in(pool).take(foreign, record_of(foreign))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HANDLE, CsiHandle(HANDLE, "ceph-one", 7, UUID)),
        (
            f"0001-0003-a-b-00000000000000ff-{UUID}",
            CsiHandle(f"0001-0003-a-b-00000000000000ff-{UUID}", "a-b", 255, UUID),
        ),
    ],
)
def test_an_id_of_ceph_csi_tells_cluster_pool_and_uuid(text: str, expected: CsiHandle) -> None:
    assert CsiHandle.read(text) == expected


@pytest.mark.parametrize(
    "text", ["", "pvc-1", HANDLE[:-1], f"{HANDLE} ", HANDLE.replace("0008", "0007"), HANDLE.replace("0001", "0002", 1)]
)
def test_anything_else_is_no_id_of_ceph_csi(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"is no id of a volume of Ceph-CSI; name its volumeHandle"):
        CsiHandle.read(text)


def test_what_ceph_csi_keeps_of_a_volume_is_understood() -> None:
    journal = {
        "csi.imagename": THEIRS,
        "csi.imageid": "theirs",
        "csi.volume.encryptKMS": "vault",
        "csi.volume.owner": "a",
    }
    journal["csi.volume.encryptionType"] = "block"
    pool = pool_with({"rbd.csi.ceph.com/encrypted": "encrypted", "rbd.csi.ceph.com/dek": "wrapped"}, journal)
    pool.images[THEIRS].data_pool = "erasure-coded"
    foreign = found(pool)
    assert (foreign.volume_id, foreign.storage, foreign.storage_id, foreign.size) == (ID, THEIRS, "theirs", 64 << 20)
    assert (foreign.kms_id, foreign.wrapped, foreign.tenant, foreign.is_ours) == ("vault", "wrapped", "a", False)
    assert (foreign.parameters.cluster_id, foreign.parameters.pool) == ("ceph-one", "rbd")
    assert foreign.parameters.data_pool == "erasure-coded"


@pytest.mark.parametrize("kms", ["", "default"])
def test_the_image_of_an_old_version_whose_secret_opens_it_is_understood(kms: str) -> None:
    journal = {"csi.volname": "pvc-1"} | ({"csi.volume.encryptKMS": kms} if kms else {})
    foreign = found(pool_with({".rbd.csi.ceph.com/encrypted": " encrypted\n"}, journal))
    assert (foreign.storage, foreign.kms_id, foreign.wrapped) == (THEIRS, "", "")


@pytest.mark.parametrize(
    ("pool", "error", "said"),
    [
        (pool_with(journal={}), NotFound, r"the object csi.volume.\S+ is missing"),
        (pool_with({}), FailedPrecondition, r"is not encrypted, or was never used: .*encrypted=''"),
        (pool_with({"rbd.csi.ceph.com/encrypted": "encryptionPrepared"}), FailedPrecondition, r"was never used"),
        (pool_with(journal={"csi.imagename": "gone"}), FailedPrecondition, r"expected the id of any, found no image"),
        (pool_with(journal={"csi.imageid": "older"}), FailedPrecondition, r"expected the id older, found theirs"),
        (pool_with(journal={"csi.volume.encryptionType": "file"}), FailedPrecondition, r"encrypted files \(fscrypt\)"),
    ],
    ids=["no-journal", "plain", "prepared", "no-image", "another-image", "fscrypt"],
)
def test_what_is_no_used_volume_of_luks_is_refused(pool: FakePool, error: type[DriverError], said: str) -> None:
    before = (dict(pool.objects), dict(pool.maps), dict(pool.images))
    with pytest.raises(error, match=said):
        found(pool)
    assert (pool.objects, pool.maps, pool.images) == before


def test_a_name_that_is_taken_is_refused() -> None:
    pool = pool_with()
    VolumeLogs().change(pool, ID, lambda _: VolumeState(record="{}", image_id="another"))
    with pytest.raises(AlreadyExists, match=r"exists already; choose another name"):
        found(pool)
    VolumeLogs().change(pool, ID, lambda _: VolumeState(removing=True))
    with pytest.raises(Aborted, match=r"is being made or removed"):
        found(pool)
    pool.images[image_name(PLACE.id_for("mine"))] = FakeImage("foreign", 1)
    with pytest.raises(AlreadyExists, match=r"has an image \S+ already, which is none of volume"):
        found(pool, "mine")


def test_the_image_gets_our_name_and_nothing_else_of_it_changes() -> None:
    pool = pool_with()
    image, journal = pool.images[THEIRS], dict(pool.maps[JOURNAL])
    take(pool)
    assert pool.images[OURS] is image
    assert THEIRS not in pool.images
    assert (image.metadata, pool.maps[JOURNAL]) == ({"rbd.csi.ceph.com/encrypted": "encrypted"}, journal)
    state = VolumeLogs().state(pool, ID)
    assert state is not None
    assert (state.image_id, state.pool_number, state.cluster, state.adopted) == ("theirs", 7, "fsid-1", HANDLE)
    assert found(pool).is_ours
    with pytest.raises(AlreadyExists):
        volumes_in(pool).find(HANDLE[:-1] + "2", "data")


def test_an_image_that_was_opened_meanwhile_is_as_it_was() -> None:
    pool = pool_with(open_at=("10.0.0.1:0/1",))
    with pytest.raises(DeviceInUse, match=r"the image rbd/\S+ is open at 10.0.0.1:0/1"):
        take(pool)
    assert set(pool.images) == {THEIRS, "other"}
    assert VolumeLogs().state(pool, ID) is None


def test_one_whose_name_somebody_took_meanwhile_is_as_it_was() -> None:
    pool = pool_with()
    foreign = found(pool)
    pool.images[OURS] = FakeImage("foreign", 1)
    with pytest.raises(Aborted):
        volumes_in(pool).take(foreign, record_of(foreign))
    assert pool.images[THEIRS].id == "theirs"
    assert VolumeLogs().state(pool, ID) is None


def killed_everywhere(make: Callable[[], FakePool], act: Callable[[FakePool], object]) -> list[FakePool]:
    """The pools as a kill before and behind each change leaves them."""
    left = []
    for number in itertools.count():
        pool, countdown = make(), itertools.count()

        def step(_: str, at: int = number, count: "itertools.count[int]" = countdown) -> None:
            if next(count) == at:
                raise Killed

        pool.step = step
        try:
            act(pool)
        except Killed:
            pool.step = lambda _: None
            left.append(pool)
            continue
        except DeviceInUse:
            pass
        return left
    raise AssertionError("it has no end")


def test_killed_anywhere_the_next_call_ends_it() -> None:
    left = killed_everywhere(pool_with, take)
    assert len(left) >= 6
    for pool in left:
        if not found(pool).is_ours:
            take(pool)
        assert found(pool).is_ours
        assert pool.images[OURS].id == "theirs"
        assert len(pool.images) == 2


def test_killed_anywhere_and_deleted_before_it_was_whole_ceph_csis_image_stays() -> None:
    for pool in killed_everywhere(pool_with, take):
        logs = VolumeLogs()
        state = logs.state(pool, ID)
        if THEIRS in pool.images and state is not None and state.record is not None:
            images = Images(logs, 1)
            images.remove(pool, ID, images.mark_removed(pool, ID, 0))
            logs.forget(pool, ID)
            assert pool.images[THEIRS].id == "theirs"
            take(pool)
            assert pool.images[OURS].id == "theirs"


def test_killed_anywhere_while_it_is_given_back_it_is_one_or_the_other_with_the_next_call() -> None:
    def used() -> FakePool:
        return pool_with(open_at=("10.0.0.1:0/1",))

    left = killed_everywhere(used, take)
    assert len(left) >= 10
    for pool in left:
        (image,) = (each for each in pool.images.values() if each.id == "theirs")
        image.open_at.clear()
        if not found(pool).is_ours:
            take(pool)
        assert pool.images[OURS].id == "theirs"
