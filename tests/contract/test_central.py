"""`luks-csi controller`: the central server, as csi-resizer meets it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from csi_driver.model.settings import Settings
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc import csi_pb2_grpc
from csi_driver.rpc.client import CsiClient
from csi_driver.rpc.endpoint import address_of
from csi_driver.rpc.server import central_server
from tests.contract.serving import SECONDS

BLOCK = csi.VolumeCapability(block=csi.VolumeCapability.BlockVolume())


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[grpc.Channel]:
    server = central_server(Settings(endpoint=tmp_path / "csi.sock", driver_name="a.driver", state_dir=Path("/none")))
    server.start()
    try:
        with grpc.insecure_channel(address_of(tmp_path / "csi.sock")) as channel:
            yield channel
    finally:
        server.stop()


def expand(channel: grpc.Channel, **fields: object) -> csi.ControllerExpandVolumeResponse:
    request = csi.ControllerExpandVolumeRequest(**fields)  # type: ignore[arg-type]  # names as in the message
    return csi_pb2_grpc.ControllerStub(channel).ControllerExpandVolume(request, timeout=SECONDS)


def refusal(channel: grpc.Channel, **fields: object) -> str:
    with pytest.raises(grpc.RpcError) as raised:
        expand(channel, **fields)
    code: grpc.StatusCode = raised.value.code()
    return code.name


def test_it_offers_expansion_alone(channel: grpc.Channel) -> None:
    stub = csi_pb2_grpc.ControllerStub(channel)
    offered = stub.ControllerGetCapabilities(csi.ControllerGetCapabilitiesRequest(), timeout=SECONDS).capabilities
    assert [one.rpc.type for one in offered] == [csi.ControllerServiceCapability.RPC.EXPAND_VOLUME]
    with pytest.raises(grpc.RpcError) as raised:
        stub.DeleteVolume(csi.DeleteVolumeRequest(volume_id="v"), timeout=SECONDS)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(grpc.RpcError):
        csi_pb2_grpc.NodeStub(channel).NodeGetInfo(csi.NodeGetInfoRequest(), timeout=SECONDS)


def test_it_is_the_same_driver_and_always_ready(channel: grpc.Channel) -> None:
    stub = csi_pb2_grpc.IdentityStub(channel)
    assert stub.GetPluginInfo(csi.GetPluginInfoRequest(), timeout=SECONDS).name == "a.driver"
    assert stub.Probe(csi.ProbeRequest(), timeout=SECONDS).ready.value
    offered = stub.GetPluginCapabilities(csi.GetPluginCapabilitiesRequest(), timeout=SECONDS).capabilities
    assert csi.PluginCapability.Service.CONTROLLER_SERVICE in [one.service.type for one in offered]
    assert csi.PluginCapability.VolumeExpansion.ONLINE in [one.volume_expansion.type for one in offered]


@pytest.mark.parametrize("capability", [None, BLOCK])
def test_the_node_has_to_expand_what_is_asked_for(
    channel: grpc.Channel, capability: csi.VolumeCapability | None
) -> None:
    answer = expand(
        channel,
        volume_id="pvc-1",
        capacity_range=csi.CapacityRange(required_bytes=1000),
        volume_capability=capability,
        secrets={"CRYPTO_KEY_VALUE": "x"},
    )
    assert (answer.capacity_bytes, answer.node_expansion_required) == (1000, True)


def test_what_cannot_be_right_is_refused(channel: grpc.Channel) -> None:
    size = csi.CapacityRange(required_bytes=2, limit_bytes=1)
    assert refusal(channel, volume_id="pvc-1") == "INVALID_ARGUMENT"
    assert refusal(channel, volume_id="pvc-1", capacity_range=csi.CapacityRange()) == "INVALID_ARGUMENT"
    assert refusal(channel, capacity_range=csi.CapacityRange(required_bytes=1)) == "INVALID_ARGUMENT"
    assert refusal(channel, volume_id="pvc-1", capacity_range=size) == "OUT_OF_RANGE"


def test_the_command_needs_no_root_and_no_state_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    user = {"user": 65532, "group": 65532} if os.geteuid() == 0 else {}
    endpoint = tmp_path / "central.sock"
    command = [sys.executable, "-c", "from csi_driver.cli.main import main; main()", "controller"]
    readable = all(os.stat(folder).st_mode & 0o005 == 0o005 for folder in Path(sys.executable).resolve().parents)
    with subprocess.Popen(
        [*command, f"--endpoint={endpoint}"],
        stderr=subprocess.PIPE,
        **(user if readable else {}),  # type: ignore[call-overload]  # a dict of the two
    ) as process:
        try:
            with CsiClient(endpoint, timeout=SECONDS) as client:
                client.wait_until_ready(SECONDS)
                client.probe()
        finally:
            process.send_signal(signal.SIGTERM)
            said = process.stderr.read().decode() if process.stderr else ""
        assert process.wait(SECONDS) == 0, said
    assert os.listdir(tmp_path) == []
