"""What a list of the volumes of a pool asks the cluster."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from csi_driver.backends.rbd import RbdBackend
from csi_driver.backends.rbdnodes import NodeAttachments
from csi_driver.backends.rbdrecords import VolumeLogs
from csi_driver.backends.records import RecordCodec
from csi_driver.host.files import Files
from csi_driver.model.errors import NotFound
from csi_driver.model.volume import VolumeParameters, VolumeRecord
from tests.ceph_fakes import PLACE, FakePool


class Pool(FakePool):
    """One that counts how often an object's map is listed."""

    listings = 0

    def keys(self, name: str) -> Any:
        self.listings += 1
        return super().keys(name)


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def backend(tmp_path: Path, pool: Pool) -> RbdBackend:
    logs = VolumeLogs()
    access: Any = SimpleNamespace(
        pool=lambda *_: pool, place_of=lambda _: PLACE, uuid=lambda _: "fsid-1", every_pool=lambda: [pool], reached=str,
    )  # fmt: skip
    devices: Any = None
    images: Any = SimpleNamespace(
        check_room=lambda *_: 7,
        make=lambda pool, volume_id, _state, _parameters, _size, made: logs.change(pool, volume_id, lambda _: made),
        describe=lambda *_: None,
    )
    return RbdBackend(
        tmp_path, access, logs, images, NodeAttachments(logs, "", "boot"), devices, RecordCodec(), Files(),
        is_central=True,
    )  # fmt: skip


def test_each_volume_of_a_list_is_asked_for_once_and_the_others_not_at_all(backend: RbdBackend, pool: Pool) -> None:
    ids = [PLACE.id_for(f"pvc-{number}") for number in range(5)]
    for volume_id in ids:
        backend.create(
            VolumeRecord(id=volume_id, name=volume_id, capacity_bytes=1, parameters=VolumeParameters(), created="now"),
            1,
        )
    backend.publish(ids[1], "node-1", many_nodes=False)
    pool.reads = pool.listings = 0
    found = backend.listed()
    assert ([*found], pool.reads, pool.listings) == (sorted(ids), 0, 1)
    told = found[ids[1]]()
    assert (told.record.id, told.published, told.places) == (ids[1], ["node-1"], ())
    assert (pool.reads, pool.listings) == (1, 1)


def test_one_that_is_being_made_is_no_volume_yet(backend: RbdBackend, pool: Pool) -> None:
    volume_id = PLACE.id_for("pvc-1")
    pool.set_value("luks-csi.volumes", volume_id, "life")
    with pytest.raises(NotFound):
        backend.listed()[volume_id]()
