"""Each call over the real gRPC server, on use cases that only record what they are asked."""

from pathlib import Path

import grpc
import pytest

from csi_driver import __version__
from csi_driver.model.errors import CommandFailed, DeviceInUse, InvalidArgument, ResourceExhausted
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Service
from csi_driver.model.volume import volume_id_for
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc import csi_pb2_grpc
from csi_driver.rpc.client import CsiClient, RemoteError, RemoteVolume
from csi_driver.rpc.endpoint import address_of
from csi_driver.volumes.expand import ExpandRequest
from csi_driver.volumes.provision import CreateRequest
from csi_driver.volumes.publish import PublishRequest
from csi_driver.volumes.stage import StageRequest
from csi_driver.volumes.usage import Usage
from tests.contract.serving import BLOCK, MOUNT, SECONDS, SECRETS, VOLUME, Gate, Run, code_of, in_background
from tests.fakes import FakeUseCases

# Identity


def test_who_answers(client: CsiClient) -> None:
    info = client.plugin_info()
    assert (info.name, info.version) == ("luks.csi.internal", __version__)


def test_probe_tells_the_obstacle(cases: FakeUseCases, client: CsiClient) -> None:
    client.wait_until_ready(SECONDS)
    cases.health.blocked_by = "dm-crypt: absent; load the module"
    with pytest.raises(RemoteError, match="dm-crypt: absent") as raised:
        client.wait_until_ready(SECONDS)
    assert raised.value.code == "FAILED_PRECONDITION"


def test_probe_says_ready(channel: grpc.Channel) -> None:
    assert csi_pb2_grpc.IdentityStub(channel).Probe(csi.ProbeRequest()).ready.value is True


def plugin_capabilities(channel: grpc.Channel) -> list[object]:
    found = csi_pb2_grpc.IdentityStub(channel).GetPluginCapabilities(csi.GetPluginCapabilitiesRequest()).capabilities
    return [one.service.type or one.volume_expansion.type for one in found]


def test_plugin_capabilities(channel: grpc.Channel) -> None:
    service = csi.PluginCapability.Service
    assert plugin_capabilities(channel) == [
        service.CONTROLLER_SERVICE,
        service.VOLUME_ACCESSIBILITY_CONSTRAINTS,
        csi.PluginCapability.VolumeExpansion.ONLINE,
    ]


def test_only_the_chosen_services_are_served_and_offered(run: Run) -> None:
    cases = run(services=frozenset({Service.NODE}))
    endpoint = cases.driver.settings.endpoint
    with CsiClient(endpoint, timeout=SECONDS) as client, grpc.insecure_channel(address_of(endpoint)) as channel:
        assert client.node_id() == "node-1"
        for call in (client.capacity, lambda: list(client.volumes()), lambda: client.delete_volume("data")):
            with pytest.raises(RemoteError, match=rf"server at {endpoint} has no controller service; .*LUKS_CSI_END"):
                call()
        assert code_of(client.capacity) == "UNIMPLEMENTED"
        assert csi.PluginCapability.Service.CONTROLLER_SERVICE not in plugin_capabilities(channel)[:-1]


# Controller


def test_controller_capabilities(channel: grpc.Channel) -> None:
    found = csi_pb2_grpc.ControllerStub(channel).ControllerGetCapabilities(csi.ControllerGetCapabilitiesRequest())
    kind = csi.ControllerServiceCapability.RPC
    assert {one.rpc.type for one in found.capabilities} == {
        kind.CREATE_DELETE_VOLUME,
        kind.LIST_VOLUMES,
        kind.GET_CAPACITY,
        kind.EXPAND_VOLUME,
        kind.GET_VOLUME,
        kind.SINGLE_NODE_MULTI_WRITER,
    }


def test_create_find_list_and_delete(cases: FakeUseCases, client: CsiClient) -> None:
    made = client.create_volume(
        "pvc-1", [MOUNT, BLOCK], 5, limit_bytes=9, parameters={"encrypted": "true"}, secrets=SECRETS
    )
    assert made == RemoteVolume("pvc-1", 5, {"encrypted": "true"}, ({"place": "here"},))
    (asked,) = cases.calls.made
    assert isinstance(asked, CreateRequest)
    assert (asked.required_bytes, asked.limit_bytes, asked.capabilities) == (5, 9, (MOUNT, BLOCK))
    assert asked.parameters == {"encrypted": "true"}
    assert asked.key.passphrase == Passphrase(b"correct horse")
    assert client.volume("pvc-1") == made
    assert list(client.volumes()) == [made]
    client.delete_volume("pvc-1")
    assert list(client.volumes()) == []
    assert code_of(lambda: client.volume("pvc-1")) == "NOT_FOUND"


def test_list_comes_in_pages(client: CsiClient, channel: grpc.Channel) -> None:
    for number in range(5):
        client.create_volume(f"pvc-{number}", [BLOCK], 1)
    stub, sizes, token = csi_pb2_grpc.ControllerStub(channel), [], "0"
    while token:
        page = stub.ListVolumes(csi.ListVolumesRequest(max_entries=2, starting_token=token))
        sizes.append(len(page.entries))
        token = page.next_token
    assert sizes == [2, 2, 1]


def test_deleting_a_foreign_id_succeeds_and_never_reaches_a_path(cases: FakeUseCases, client: CsiClient) -> None:
    client.delete_volume("../../etc")
    (asked,) = cases.calls.made
    assert isinstance(asked, tuple)
    assert "/" not in asked[1]
    assert code_of(lambda: client.delete_volume("")) == "INVALID_ARGUMENT"


def test_capacity(cases: FakeUseCases, channel: grpc.Channel) -> None:
    stub = csi_pb2_grpc.ControllerStub(channel)
    room = stub.GetCapacity(csi.GetCapacityRequest(parameters={"p": "1"}))
    assert (room.available_capacity, room.maximum_volume_size.value) == (1000, 900)
    stub.GetCapacity(csi.GetCapacityRequest(accessible_topology=csi.Topology(segments={"a": "b"})))
    assert cases.calls.made == [("capacity", {"p": "1"}, None, ()), ("capacity", {}, {"a": "b"}, ())]


def test_validate_confirms_or_says_why_not(cases: FakeUseCases, channel: grpc.Channel) -> None:
    mode = csi.VolumeCapability.AccessMode(mode=csi.VolumeCapability.AccessMode.SINGLE_NODE_WRITER)
    wanted = csi.VolumeCapability(block=csi.VolumeCapability.BlockVolume(), access_mode=mode)
    request = csi.ValidateVolumeCapabilitiesRequest(
        volume_id="v", volume_context={"c": "1"}, parameters={"p": "1"}, volume_capabilities=[wanted]
    )
    stub = csi_pb2_grpc.ControllerStub(channel)
    confirmed = stub.ValidateVolumeCapabilities(request)
    assert confirmed.message == ""
    assert confirmed.confirmed.volume_capabilities == [wanted]
    assert dict(confirmed.confirmed.volume_context) == {"c": "1"}
    assert dict(confirmed.confirmed.parameters) == {"p": "1"}
    cases.provisioning.refusing = "one node only"
    refused = stub.ValidateVolumeCapabilities(request)
    assert refused.message == "one node only"
    assert not refused.HasField("confirmed")


def test_controller_expand_leaves_the_rest_to_the_node(cases: FakeUseCases, channel: grpc.Channel) -> None:
    reply = csi_pb2_grpc.ControllerStub(channel).ControllerExpandVolume(
        csi.ControllerExpandVolumeRequest(
            volume_id="v", capacity_range=csi.CapacityRange(required_bytes=7, limit_bytes=8), secrets=SECRETS
        )
    )
    assert (reply.capacity_bytes, reply.node_expansion_required) == (7, True)
    assert cases.calls.made == [("expand", "v", 7, 8)]


# Node


def test_node_capabilities(channel: grpc.Channel) -> None:
    found = csi_pb2_grpc.NodeStub(channel).NodeGetCapabilities(csi.NodeGetCapabilitiesRequest())
    kind = csi.NodeServiceCapability.RPC
    assert {one.rpc.type for one in found.capabilities} == {
        kind.STAGE_UNSTAGE_VOLUME,
        kind.GET_VOLUME_STATS,
        kind.EXPAND_VOLUME,
        kind.SINGLE_NODE_MULTI_WRITER,
    }


def test_node_info_names_the_place(channel: grpc.Channel) -> None:
    info = csi_pb2_grpc.NodeStub(channel).NodeGetInfo(csi.NodeGetInfoRequest())
    assert (info.node_id, info.max_volumes_per_node) == ("node-1", 0)
    assert info.accessible_topology.segments == {"topology.luks.csi.internal/node": "node-1"}


def test_from_stage_to_unstage(cases: FakeUseCases, client: CsiClient) -> None:
    client.stage(VOLUME, Path("/stage"), MOUNT, SECRETS)
    client.publish(VOLUME, Path("/stage"), Path("/target"), MOUNT, read_only=True)
    assert client.usage("pvc-1", Path("/target")) == [Usage("bytes", 100, 60, 30), Usage("inodes", 10, 0, 0)]
    assert client.expand_on_node("pvc-1", Path("/target"), 8, SECRETS) == 8
    client.unpublish("pvc-1", Path("/target"))
    client.unstage("pvc-1", Path("/stage"))
    staged, published, usage, expanded, *undone = cases.calls.made
    assert isinstance(staged, StageRequest)
    assert (staged.staging_path, staged.capability, staged.context) == ("/stage", MOUNT, {"encrypted": "true"})
    assert staged.key.passphrase == Passphrase(b"correct horse")
    assert published == PublishRequest("pvc-1", "/stage", "/target", MOUNT, read_only=True, context=VOLUME.context)
    assert usage == ("usage", "pvc-1", "/target")
    assert isinstance(expanded, ExpandRequest)
    assert expanded.key.passphrase == Passphrase(b"correct horse")
    assert undone == [("unpublish", "pvc-1", "/target"), ("unstage", "pvc-1", "/stage")]


# Errors and locks


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ResourceExhausted("no room"), "RESOURCE_EXHAUSTED", "^no room$"),
        (CommandFailed("mkfs failed"), "INTERNAL", "^mkfs failed$"),
        (OSError(28, "No space left on device", "/secret"), "RESOURCE_EXHAUSTED", "free space there$"),
        (KeyError("/secret"), "INTERNAL", "KeyError, which nobody foresaw"),
        (
            DeviceInUse("process 1 uses /caf\udce9\x1b[31m"),
            "FAILED_PRECONDITION",
            r"^process 1 uses /caf\\xe9\\x1b\[31m$",
        ),
        *(
            (
                InvalidArgument(f"'{letter * (1 << 20)}' is not allowed"),
                "INVALID_ARGUMENT",
                "left out .* is not allowed$",
            )
            for letter in ("a", "漢", "\x1b", "\udce9")
        ),
    ],
)
def test_errors_arrive_as_status_and_sentence(
    cases: FakeUseCases, client: CsiClient, error: Exception, code: str, text: str
) -> None:
    def fail(_: object) -> None:
        raise error

    cases.calls.then = fail
    with pytest.raises(RemoteError, match=text) as raised:
        client.unstage("v", Path("/s"))
    assert raised.value.code == code
    assert "/secret" not in str(raised.value)


def test_every_call_that_is_left_out_is_unimplemented(channel: grpc.Channel) -> None:
    offered = {
        *("GetPluginInfo", "GetPluginCapabilities", "Probe"),
        *("CreateVolume", "DeleteVolume", "ValidateVolumeCapabilities", "ListVolumes", "GetCapacity"),
        *("ControllerGetCapabilities", "ControllerExpandVolume", "ControllerGetVolume"),
        *("NodeStageVolume", "NodeUnstageVolume", "NodePublishVolume", "NodeUnpublishVolume", "NodeGetVolumeStats"),
        *("NodeExpandVolume", "NodeGetCapabilities", "NodeGetInfo"),
    }
    unimplemented = set()
    methods = [method for service in csi.DESCRIPTOR.services_by_name.values() for method in service.methods]
    for method in methods:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            f"/{method.containing_service.full_name}/{method.name}"
        )
        try:
            call(b"", timeout=SECONDS)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                unimplemented.add(method.name)
    assert unimplemented == {method.name for method in methods} - offered


def test_one_call_at_a_time_changes_a_volume(cases: FakeUseCases, client: CsiClient, gate: Gate) -> None:
    cases.calls.then = gate
    first = in_background(lambda: client.stage(VOLUME, Path("/s"), BLOCK))
    assert gate.entered.acquire(timeout=SECONDS)
    assert code_of(lambda: client.create_volume("pvc-1", [BLOCK], 1)) == "ABORTED"
    assert code_of(lambda: client.delete_volume("pvc-1")) == "ABORTED"
    assert code_of(lambda: client.expand_volume("pvc-1", 1)) == "ABORTED"
    assert code_of(lambda: client.stage(VOLUME, Path("/s"), BLOCK)) == "ABORTED"
    assert code_of(lambda: client.publish(VOLUME, Path("/s"), Path("/t"), BLOCK)) == "ABORTED"
    assert code_of(lambda: client.unpublish("pvc-1", Path("/t"))) == "ABORTED"
    assert code_of(lambda: client.unstage("pvc-1", Path("/s"))) == "ABORTED"
    assert code_of(lambda: client.expand_on_node("pvc-1", Path("/t"), 1)) == "ABORTED"
    assert code_of(lambda: client.stage(VOLUME, Path(), BLOCK)) == "INVALID_ARGUMENT"
    gate.opened.set()
    assert first() is None
    client.unstage("pvc-1", Path("/s"))


def test_volumes_do_not_wait_for_each_other(cases: FakeUseCases, client: CsiClient, gate: Gate) -> None:
    cases.calls.then = gate
    calls = [in_background(lambda n=number: client.delete_volume(f"pvc-{n}")) for number in range(8)]  # type: ignore[misc]
    for _ in calls:
        assert gate.entered.acquire(timeout=SECONDS)
    gate.opened.set()
    assert [result() for result in calls] == [None] * 8


def test_a_volume_is_locked_by_its_id_whatever_its_name(cases: FakeUseCases, client: CsiClient) -> None:
    with cases.driver.locks.hold(volume_id_for("A name / that is no id")):
        assert code_of(lambda: client.create_volume("A name / that is no id", [BLOCK], 1)) == "ABORTED"


def test_probe_answers_while_all_threads_are_at_work(run: Run, gate: Gate) -> None:
    cases = run(threads=2)
    cases.calls.then = gate
    with CsiClient(cases.driver.settings.endpoint, timeout=SECONDS) as client:
        calls = [in_background(lambda n=number: client.delete_volume(f"pvc-{n}")) for number in range(4)]  # type: ignore[misc]
        for _ in range(2):
            assert gate.entered.acquire(timeout=SECONDS)
        client.wait_until_ready(SECONDS)
        gate.opened.set()
        assert [result() for result in calls] == [None] * 4
