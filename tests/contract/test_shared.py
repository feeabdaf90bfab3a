"""The driver of volumes that lie outside the nodes: a central controller gives them to nodes."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from csi_driver.model.settings import Service, Settings
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc import csi_pb2_grpc
from csi_driver.rpc.client import CsiClient, RemoteError
from csi_driver.rpc.endpoint import address_of
from csi_driver.rpc.server import driver_server
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.driver import Host, build_driver
from tests.contract.serving import SECONDS
from tests.fake_host import SharedMemoryBackend

MIB = 1 << 20
MOUNT = Capability(AccessMode.SINGLE_NODE_WRITER, block=False)
MANY = Capability(AccessMode.MULTI_NODE_MULTI_WRITER, block=True)
BLOCK = csi.VolumeCapability(
    block=csi.VolumeCapability.BlockVolume(),
    access_mode=csi.VolumeCapability.AccessMode(mode=csi.VolumeCapability.AccessMode.SINGLE_NODE_WRITER),
)
CEPH = {"userID": "csi", "userKey": "AQ-secret"}

Start = Callable[[Service], Path]


@pytest.fixture
def storage() -> SharedMemoryBackend:
    return SharedMemoryBackend()


@pytest.fixture
def start(tmp_path: Path, storage: SharedMemoryBackend) -> Iterator[Start]:
    """Start a server of one service; each has a state directory of its own, as on another machine."""
    with contextlib.ExitStack() as running:

        def serve(service: Service) -> Path:
            settings = Settings(
                endpoint=tmp_path / f"{service}.sock",
                node_id="node-1",
                state_dir=tmp_path / service,
                services=frozenset({Service.IDENTITY, service}),
                backend="memory",
            )
            driver = build_driver(settings, Host(backend=storage))
            running.callback(driver.stop)
            driver.start()
            server = driver_server(driver)
            server.start()
            running.callback(server.stop)
            return settings.endpoint

        yield serve


@pytest.fixture
def controller(start: Start) -> Iterator[CsiClient]:
    with CsiClient(start(Service.CONTROLLER), timeout=SECONDS) as client:
        yield client


def refusal(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(RemoteError) as raised:
        call()
    return raised.value.code, str(raised.value)


def test_a_volume_is_given_to_a_node_shown_there_and_taken_away(start: Start, storage: SharedMemoryBackend) -> None:
    endpoint = start(Service.CONTROLLER)
    with CsiClient(endpoint, timeout=SECONDS) as client, grpc.insecure_channel(address_of(endpoint)) as channel:
        stub, kind = csi_pb2_grpc.ControllerStub(channel), csi.ControllerServiceCapability.RPC
        offered = stub.ControllerGetCapabilities(csi.ControllerGetCapabilitiesRequest(), timeout=SECONDS).capabilities
        assert {kind.PUBLISH_UNPUBLISH_VOLUME, kind.LIST_VOLUMES_PUBLISHED_NODES} <= {one.rpc.type for one in offered}
        volume = client.create_volume("data", [MOUNT], 64 * MIB, secrets=CEPH)
        assert (volume.id, volume.topologies) == ("data.pool", ())
        assert client.attach(volume, "node-1", MOUNT, CEPH) == {"given": "node-1"}
        assert client.attach(volume, "node-1", MOUNT, CEPH) == {"given": "node-1"}

        def published() -> list[str]:
            (entry,) = stub.ListVolumes(csi.ListVolumesRequest(), timeout=SECONDS).entries
            found = stub.ControllerGetVolume(csi.ControllerGetVolumeRequest(volume_id=volume.id), timeout=SECONDS)
            assert entry.status.published_node_ids == found.status.published_node_ids
            return list(entry.status.published_node_ids)

        assert published() == ["node-1"]
        code, text = refusal(lambda: client.attach(volume, "node-2", MOUNT, CEPH))
        assert (code, "node-1" in text) == ("FAILED_PRECONDITION", True)
        client.detach(volume.id, "node-2")
        assert published() == ["node-1"]
        client.detach(volume.id, "")
        client.detach(volume.id, "node-1")
        assert published() == []
        client.delete_volume(volume.id, CEPH)
        client.detach("was-never-there", "node-1")
        assert not list(client.volumes())
    assert {volume_id for volume_id, _ in storage.used} == {"data.pool", "was-never-there"}
    assert storage.used[0][1].secrets == CEPH


def test_a_block_volume_may_be_on_several_nodes_and_a_file_system_not(
    controller: CsiClient, storage: SharedMemoryBackend
) -> None:
    volume = controller.create_volume("vm", [MANY], 64 * MIB)
    for node in ("node-1", "node-2"):
        controller.attach(volume, node, MANY)
    assert storage.published(volume.id) == ["node-1", "node-2"]
    shared_files = Capability(AccessMode.MULTI_NODE_MULTI_WRITER, block=False)
    code, text = refusal(lambda: controller.create_volume("files", [shared_files], 64 * MIB))
    assert (code, "volumeMode Block" in text) == ("INVALID_ARGUMENT", True)
    storage.takes_many_nodes = False
    code, text = refusal(lambda: controller.create_volume("other", [MANY], 64 * MIB))
    assert (code, "lives on one node" in text) == ("INVALID_ARGUMENT", True)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (csi.ControllerPublishVolumeRequest(node_id="n"), "INVALID_ARGUMENT"),
        (csi.ControllerPublishVolumeRequest(volume_id="v"), "INVALID_ARGUMENT"),
        (csi.ControllerPublishVolumeRequest(volume_id="v", node_id="n"), "INVALID_ARGUMENT"),
        (csi.ControllerPublishVolumeRequest(volume_id="v", node_id="n", volume_capability=BLOCK), "NOT_FOUND"),
        (
            csi.ControllerPublishVolumeRequest(volume_id="v", node_id="n", volume_capability=BLOCK, readonly=True),
            "INVALID_ARGUMENT",
        ),
        (csi.ControllerUnpublishVolumeRequest(node_id="n"), "INVALID_ARGUMENT"),
    ],
    ids=str,
)
def test_what_cannot_be_right_attaches_nothing(
    start: Start, storage: SharedMemoryBackend, request_: object, code: str
) -> None:
    with grpc.insecure_channel(address_of(start(Service.CONTROLLER))) as channel:
        name = type(request_).__name__.removesuffix("Request")
        with pytest.raises(grpc.RpcError) as raised:
            getattr(csi_pb2_grpc.ControllerStub(channel), name)(request_, timeout=SECONDS)
    found: grpc.StatusCode = raised.value.code()
    assert (found.name, storage.nodes) == (code, {})


def test_a_controller_without_a_node_looks_for_no_device(controller: CsiClient, storage: SharedMemoryBackend) -> None:
    controller.probe()  # on a host without device-mapper too
    volume = controller.create_volume("data", [MOUNT], 64 * MIB)
    controller.delete_volume(volume.id)
    assert not storage.records
    code, said = refusal(controller.node_id)
    assert (code, "has no node service" in said) == ("UNIMPLEMENTED", True)


def test_a_node_tells_how_many_volumes_it_can_have(start: Start) -> None:
    with grpc.insecure_channel(address_of(start(Service.NODE))) as channel:
        info = csi_pb2_grpc.NodeStub(channel).NodeGetInfo(csi.NodeGetInfoRequest(), timeout=SECONDS)
    assert (info.node_id, info.max_volumes_per_node) == ("node-1", 7)


def test_volumes_of_a_node_are_attached_by_nobody(tmp_path: Path) -> None:
    settings = Settings(endpoint=tmp_path / "csi.sock", node_id="n", state_dir=tmp_path / "state")
    driver = build_driver(settings)
    server = driver_server(driver)
    server.start()
    try:
        with CsiClient(settings.endpoint, timeout=SECONDS) as client:
            assert refusal(lambda: client.detach("v", "n"))[0] == "UNIMPLEMENTED"
    finally:
        server.stop()
        driver.stop()
