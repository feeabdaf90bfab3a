"""What the backend rbd alone promises, on a Ceph of this machine: nodes that are lost, many nodes, clusters that hang.

Two nodes are two backends with folders of their own: each image is mapped by a client of its own, and by that the
cluster tells them apart.
"""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from csi_driver.backends.rbd import RbdBackend
from csi_driver.backends.rbddevices import MappedVolumes, Pin
from csi_driver.backends.rbdplace import Cluster, image_name
from csi_driver.backends.rbdpool import CephPool
from csi_driver.host.handle import Handle
from csi_driver.host.krbd import MappedImage, MappedImages
from csi_driver.model.errors import Aborted, DeadlineExceeded, DeviceMismatch, FailedPrecondition
from csi_driver.model.volume import EncryptionState, FileSystemState
from tests.backends.ceph import POOL
from tests.backends.rigs import RbdRig
from tests.backends.test_conformance import SIZE, record_of, write

MIB = 1 << 20


def read(device: Handle, length: int, at: int = 0) -> bytes:
    """Past the page cache, which remembers what the cluster may have refused."""
    with open(device, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(file.fileno(), length, at)


def made(rig: RbdRig, *, settled: bool = False) -> str:
    record = record_of(rig)
    if settled:
        record = msgspec.structs.replace(record, encryption=EncryptionState.ENCRYPTED, file_system=FileSystemState.RAW)
    rig.backend().create(record, SIZE)
    return record.id


# --- nodes


def test_a_node_that_is_lost_is_fenced_off_before_another_one_writes(rbd_rig: RbdRig) -> None:
    volume_id, controller = made(rbd_rig), rbd_rig.backend(node_id="controller")
    lost, other = rbd_rig.backend(node_id="node-a"), rbd_rig.backend(node_id="node-b")
    blocked = len(rbd_rig.ceph.asked("ceph", "osd", "blocklist", "ls"))
    controller.publish(volume_id, "node-a", many_nodes=False)
    with lost.attach(volume_id, lasting=False) as device:
        write(device, b"of the lost node")
        with pytest.raises(FailedPrecondition, match=r"node node-a has it"):
            controller.publish(volume_id, "node-b", many_nodes=False)
        with pytest.raises(FailedPrecondition, match=r"cannot be attached to node node-b: it was given to node-a"):
            other.attach(volume_id, lasting=False)
        controller.unpublish(volume_id, "node-a")  # it did not let go: nobody hears of it any more
        with pytest.raises(OSError, match=r"Input/output error"):
            write(device, b"too late")
        controller.publish(volume_id, "node-b", many_nodes=False)
        with other.attach(volume_id, lasting=False) as own:
            assert read(own, 16) == b"of the lost node"
            write(own, b"of the next node")
            with pytest.raises(OSError, match=r"Input/output error"):
                write(device, b"much too late")
            assert read(own, 16) == b"of the next node"
    lost.detach(volume_id)
    other.detach(volume_id)
    assert controller.published(volume_id) == ["node-b"]
    controller.unpublish(volume_id, "")
    assert len(rbd_rig.ceph.asked("ceph", "osd", "blocklist", "ls")) == blocked + 1


def test_a_node_that_lets_go_is_put_on_no_list(rbd_rig: RbdRig) -> None:
    volume_id, controller = made(rbd_rig), rbd_rig.backend(node_id="controller")
    node = rbd_rig.backend(node_id="node-a")
    before = rbd_rig.ceph.asked("ceph", "osd", "blocklist", "ls")
    controller.publish(volume_id, "node-a", many_nodes=False)
    node.attach(volume_id, lasting=False).close()
    node.detach(volume_id)
    controller.unpublish(volume_id, "node-a")
    assert rbd_rig.ceph.asked("ceph", "osd", "blocklist", "ls") == before


def test_a_block_volume_is_on_two_nodes_once_nothing_is_formatted_any_more(rbd_rig: RbdRig) -> None:
    volume_id, controller = made(rbd_rig), rbd_rig.backend(node_id="controller")
    one, two = rbd_rig.backend(node_id="node-a"), rbd_rig.backend(node_id="node-b")
    for node in ("node-a", "node-b"):
        controller.publish(volume_id, node, many_nodes=True)
    with one.attach(volume_id, lasting=False) as device:
        with pytest.raises(Aborted, match=r"is open at .* too; call again"):
            two.attach(volume_id, lasting=False)
        assert two.device_of(volume_id) is None
        settled = msgspec.structs.replace(
            one.get(volume_id), encryption=EncryptionState.ENCRYPTED, file_system=FileSystemState.RAW
        )
        one.update(settled)
        with two.attach(volume_id, lasting=False) as other:
            assert not one.is_device_of(volume_id, (device.major, device.minor + 1))
            write(device, b"from one", 0)
            write(other, b"from two", MIB)
            assert (read(other, 8), read(device, 8, MIB)) == (b"from one", b"from two")
        two.detach(volume_id)
        write(device, b"one goes on", 2 * MIB)
    one.detach(volume_id)


def test_of_two_nodes_that_come_at_once_never_both_have_what_may_be_formatted(rbd_rig: RbdRig) -> None:
    volume_id, controller = made(rbd_rig), rbd_rig.backend(node_id="controller")
    backends = [rbd_rig.backend(node_id=name) for name in ("node-a", "node-b")]
    for node in ("node-a", "node-b"):
        controller.publish(volume_id, node, many_nodes=True)

    def attach(backend: RbdBackend) -> bool:
        try:
            backend.attach(volume_id, lasting=False).close()
        except Aborted:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(attach, backends)) < 2
    for backend in backends:
        backend.detach(volume_id)


# --- identity


def swap(rig: RbdRig, volume_id: str) -> None:
    """Somebody puts another image in the place of the volume's."""
    image = f"{POOL}/{image_name(volume_id)}"
    rig.ceph.admin("rbd", "rename", image, f"{POOL}/saved")
    rig.ceph.admin("rbd", "create", "--size", f"{SIZE}B", "--image-feature", "layering", image)


def check_swapped(rig: RbdRig, backend: RbdBackend) -> None:
    volume_id = made(rig)
    swap(rig, volume_id)
    with pytest.raises(DeviceMismatch, match=r"is not that of volume pvc-1\S*: expected the image"):
        backend.attach(volume_id, lasting=False)
    assert not list(MappedImages().all())


def test_another_image_of_the_name_is_not_mapped_enlarged_or_removed(rbd_rig: RbdRig) -> None:
    backend = rbd_rig.backend()
    check_swapped(rbd_rig, backend)
    volume_id = rbd_rig.id_of("pvc-1")
    with pytest.raises(FailedPrecondition, match=r"has no image .* with the id"):
        backend.grow(volume_id, 2 * SIZE)
    backend.delete(volume_id)
    assert sorted(rbd_rig.ceph.asked("rbd", "ls", POOL)) == sorted(["saved", image_name(volume_id)])


class ByName(MappedVolumes):
    """Planted: takes whatever image has the name."""

    def map(self, volume_id: str, pool: CephPool, pin: Pin, options: Sequence[str]) -> MappedImage:
        return self._workers.call("rbd-map", 60, self._images.map, pool.address(pin.image, ("noshare", *options)))


def no_fence(_: CephPool, image: str, client: str) -> None:
    """Planted: nobody is kept from anything."""


def test_a_backend_that_maps_by_name_is_noticed(rbd_rig: RbdRig) -> None:
    planted, volume_id = rbd_rig.backend(make_devices=ByName), made(rbd_rig)
    swap(rbd_rig, volume_id)
    with planted.attach(volume_id, lasting=False) as device:  # what `check_swapped` forbids
        assert MappedImages().of_device(device.number) is not None


def test_a_backend_that_fences_nobody_off_is_noticed(rbd_rig: RbdRig) -> None:
    volume_id, controller = made(rbd_rig), rbd_rig.backend(node_id="controller", fence=no_fence)
    lost = rbd_rig.backend(node_id="node-a")
    controller.publish(volume_id, "node-a", many_nodes=False)
    with lost.attach(volume_id, lasting=False) as device:
        controller.unpublish(volume_id, "node-a")
        write(device, b"too late")  # what the test above forbids
    lost.detach(volume_id)


# --- clusters


@pytest.mark.parametrize("options", [(), ("ms_mode=crc",), ("ms_mode=secure", "queue_depth=32")])
def test_an_image_in_a_namespace_is_mapped_by_either_messenger(rbd_rig: RbdRig, options: tuple[str, ...]) -> None:
    cluster = Cluster("tenant", tuple(rbd_rig.ceph.monitors), "tenant")
    before, record = rbd_rig.config.read_text(), record_of(rbd_rig)
    rbd_rig.ceph.admin("rbd", "namespace", "create", f"{POOL}/tenant")
    told = {"clusterID": "tenant", "monitors": rbd_rig.ceph.monitors, "rbd": {"radosNamespace": "tenant"}}
    rbd_rig.config.write_text(json.dumps([*json.loads(before), told]))
    parameters = msgspec.structs.replace(record.parameters, cluster_id="tenant", map_options=options)
    record = msgspec.structs.replace(record, id=cluster.place(POOL).id_for("pvc-1"), parameters=parameters)
    backend = rbd_rig.backend()
    try:
        backend.create(record, SIZE)
        with backend.attach(record.id, lasting=False) as device:
            write(device, b"of a tenant")
        backend.detach(record.id)
        with backend.attach(record.id, lasting=False) as device:
            assert read(device, 11) == b"of a tenant"
        backend.detach(record.id)
        backend.delete(record.id)
        assert rbd_rig.ceph.asked("rbd", "ls", f"{POOL}/tenant") == []
    finally:
        rbd_rig.config.write_text(before)
    rbd_rig.ceph.admin("rbd", "namespace", "remove", f"{POOL}/tenant")


def test_a_cluster_that_does_not_answer_while_an_image_is_mapped_leaves_no_device(rbd_rig: RbdRig) -> None:
    class Stopped(MappedVolumes):
        def map(self, volume_id: str, pool: CephPool, pin: Pin, options: Sequence[str]) -> MappedImage:
            rbd_rig.ceph.stop("osd.0")
            try:
                return super().map(volume_id, pool, pin, options)
            finally:
                rbd_rig.ceph.go_on("osd.0")

    volume_id = made(rbd_rig)
    with pytest.raises(
        DeadlineExceeded, match=r"did not answer rbd-map of volume pvc-1\S* within 3 s \(it was killed\)"
    ):
        rbd_rig.backend(seconds=3, make_devices=Stopped).attach(volume_id, lasting=False)
    backend = rbd_rig.backend()
    assert not list(MappedImages().all())
    while backend.pool_of(volume_id).watchers(image_name(volume_id)):
        time.sleep(0.1)
    with backend.attach(volume_id, lasting=False) as device:
        write(device, b"x")
    backend.detach(volume_id)


def test_an_option_that_the_kernel_refuses_is_named(rbd_rig: RbdRig) -> None:
    backend, record = rbd_rig.backend(), record_of(rbd_rig)
    parameters = msgspec.structs.replace(record.parameters, map_options=("alloc_size=3000",))
    backend.create(msgspec.structs.replace(record, parameters=parameters), SIZE)
    with pytest.raises(FailedPrecondition, match=r"Invalid argument.*dmesg.*alloc_size=3000"):
        backend.attach(record.id, lasting=False)
    assert not list(MappedImages().all())
    backend.delete(record.id)


def test_a_cluster_that_does_not_answer_at_unstage_is_named_and_the_next_call_goes_on(rbd_rig: RbdRig) -> None:
    volume_id = made(rbd_rig)
    node = rbd_rig.backend(seconds=3)
    node.attach(volume_id, lasting=False).close()
    rbd_rig.ceph.stop("osd.0")
    try:
        with pytest.raises(DeadlineExceeded, match=r"/dev/rbd\d+ of volume pvc-1\S* .* does not answer the client \S+"):
            node.detach(volume_id)
        with pytest.raises(DeadlineExceeded, match=r"the Ceph cluster ceph-one \(\S+:6789\) did not answer"):
            node.get(volume_id)
    finally:
        rbd_rig.ceph.go_on("osd.0")
    rbd_rig.backend().detach(volume_id)
    assert not list(MappedImages().all())
    while rbd_rig.backend().pool_of(volume_id).watchers(image_name(volume_id)):
        time.sleep(0.1)  # the kernel shows no device any more, and says so to the cluster behind that
    rbd_rig.backend().delete(volume_id)


def test_a_class_of_the_document_makes_an_image_with_the_features_that_it_names(rbd_rig: RbdRig) -> None:
    backend = rbd_rig.backend()
    record = record_of(rbd_rig)
    parameters = msgspec.structs.replace(
        record.parameters, image_features=("layering",), map_options=("lock_timeout=5",)
    )
    backend.create(msgspec.structs.replace(record, parameters=parameters), SIZE)
    assert rbd_rig.ceph.asked("rbd", "info", f"{POOL}/{image_name(record.id)}")["features"] == ["layering"]
    with backend.attach(record.id, lasting=False) as device:
        write(device, b"x")
    backend.detach(record.id)
    backend.delete(record.id)
