"""CSI-Addons over a real gRPC server, on a socket of its own: the same concerns as around the calls of CSI."""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from csi_driver import __version__
from csi_driver.keys.secret import read_secret
from csi_driver.model.errors import DeviceInUse, FailedPrecondition, VolumeBusy
from csi_driver.model.settings import Service, Settings
from csi_driver.rpc import addons_identity_pb2 as identity
from csi_driver.rpc import addons_keyrotation_pb2 as keyrotation
from csi_driver.rpc import csi_pb2, csi_pb2_grpc
from csi_driver.rpc.addons_identity_pb2_grpc import IdentityStub
from csi_driver.rpc.addons_keyrotation_pb2_grpc import EncryptionKeyRotationControllerStub
from csi_driver.rpc.client import CsiClient
from csi_driver.rpc.endpoint import address_of
from csi_driver.rpc.server import driver_server
from tests.contract.serving import SECONDS, SECRETS, Gate, Run, in_background
from tests.contract.test_server_life import free_port, scrape
from tests.fakes import FakeUseCases
from tests.told_lines import told_lines

Capability = identity.Capability


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "addons.sock"


@pytest.fixture
def cases(run: Run, socket: Path) -> FakeUseCases:
    return run(addons_endpoint=socket)


@pytest.fixture
def channel(cases: FakeUseCases) -> Iterator[grpc.Channel]:
    assert cases.driver.settings.addons_endpoint is not None
    with grpc.insecure_channel(address_of(cases.driver.settings.addons_endpoint)) as channel:
        yield channel


def rotate(channel: grpc.Channel, volume_id: str = "v", **fields: Any) -> None:
    request = keyrotation.EncryptionKeyRotateRequest(volume_id=volume_id, **fields)
    EncryptionKeyRotationControllerStub(channel).EncryptionKeyRotate(request, timeout=SECONDS)


def failed(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    # What stubs raise is a Call too (grpc.Call); the type says only RpcError.
    return raised.value.code().name, raised.value.details() or ""


# Identity


def test_who_answers_and_what_is_offered(channel: grpc.Channel) -> None:
    stub = IdentityStub(channel)
    info = stub.GetIdentity(identity.GetIdentityRequest())
    assert (info.name, info.vendor_version) == ("luks.csi.internal", __version__)
    service, rotation = stub.GetCapabilities(identity.GetCapabilitiesRequest()).capabilities
    assert service.service.type == Capability.Service.NODE_SERVICE
    assert rotation.encryption_key_rotation.type == Capability.EncryptionKeyRotation.ENCRYPTIONKEYROTATION


def test_probe_tells_the_obstacle(cases: FakeUseCases, channel: grpc.Channel) -> None:
    stub = IdentityStub(channel)
    assert stub.Probe(identity.ProbeRequest()).ready.value is True
    cases.health.blocked_by = "dm-crypt: absent; load the module"
    code, said = failed(lambda: stub.Probe(identity.ProbeRequest()))
    assert (code, said) == ("FAILED_PRECONDITION", "dm-crypt: absent; load the module")


# The sockets


def test_each_socket_serves_its_own_and_nothing_else(cases: FakeUseCases, channel: grpc.Channel, socket: Path) -> None:
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    probe = csi_pb2.ProbeRequest()
    assert failed(lambda: csi_pb2_grpc.IdentityStub(channel).Probe(probe))[0] == "UNIMPLEMENTED"
    with grpc.insecure_channel(address_of(cases.driver.settings.endpoint)) as csi:
        assert csi_pb2_grpc.IdentityStub(csi).Probe(probe).ready.value is True
        assert failed(lambda: rotate(csi))[0] == "UNIMPLEMENTED"
    assert cases.calls.made == []


def test_without_the_setting_it_is_not_served(run: Run, socket: Path) -> None:
    cases = run()
    assert not socket.exists()
    with grpc.insecure_channel(address_of(cases.driver.settings.endpoint)) as csi:
        assert failed(lambda: rotate(csi))[0] == "UNIMPLEMENTED"


def test_a_socket_that_another_server_has_leaves_none_behind(cases: FakeUseCases, run: Run, tmp_path: Path) -> None:
    socket = cases.driver.settings.addons_endpoint
    assert socket is not None
    with pytest.raises(DeviceInUse, match=f"another server answers on the endpoint {socket}"):
        run(endpoint=tmp_path / "second.sock", addons_endpoint=socket)
    assert not (tmp_path / "second.sock").exists()
    assert socket.exists()


def test_both_sockets_go_with_the_server(tmp_path: Path, cases: FakeUseCases) -> None:
    folder = tmp_path / "run"
    settings = Settings(endpoint=folder / "csi.sock", addons_endpoint=folder / "x.sock", node_id="n")
    server = driver_server(replace(cases.driver, settings=settings))
    server.start()
    assert sorted(os.listdir(folder)) == ["csi.sock", "x.sock"]
    assert server.stop() is True
    assert os.listdir(folder) == []


# EncryptionKeyRotate


def test_a_rotation_is_one_use_case_under_the_volumes_lock(cases: FakeUseCases, channel: grpc.Channel) -> None:
    seen: list[object] = []

    def locked(call: object) -> None:
        with pytest.raises(VolumeBusy), cases.driver.locks.hold("v"):
            pass
        seen.append(call)

    cases.calls.then = locked
    context = {"encrypted": "true"}
    access = csi_pb2.VolumeCapability.AccessMode(mode=csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER)
    # As the sidecar of csi-addons asks: the capability has an access mode and no access type.
    rotate(channel, parameters=context, secrets=SECRETS, volume_capability={"access_mode": access})
    assert seen == [("rotate", "v", read_secret(SECRETS))]


def test_another_call_on_the_volume_makes_it_busy(cases: FakeUseCases, channel: grpc.Channel, gate: Gate) -> None:
    cases.calls.then = gate
    with CsiClient(cases.driver.settings.endpoint, timeout=SECONDS) as client:
        unstage = in_background(lambda: client.unstage("v", Path("/s")))
        assert gate.entered.acquire(timeout=SECONDS)
        assert failed(lambda: rotate(channel))[0] == "ABORTED"
        gate.opened.set()
        assert unstage() is None
    rotate(channel)


@pytest.mark.parametrize(
    ("request_fields", "code", "words"),
    [
        ({"volume_id": ""}, "INVALID_ARGUMENT", "the request has no volume_id"),
        ({"volume_id": "../v"}, "NOT_FOUND", "no id of this driver"),
        ({"encryption_key": "chosen by the caller"}, "INVALID_ARGUMENT", "has an encryption_key; leave it out"),
        ({"secrets": {"CRYPTO_KEY_VALUE": ""}}, "FAILED_PRECONDITION", "CRYPTO_KEY_VALUE is empty"),
    ],
)
def test_a_request_that_cannot_be_right_reaches_no_use_case(
    cases: FakeUseCases, channel: grpc.Channel, request_fields: dict[str, Any], code: str, words: str
) -> None:
    found, said = failed(lambda: rotate(channel, **request_fields))
    assert (found, words in said) == (code, True), said
    assert "chosen by the caller" not in said
    assert cases.calls.made == []


def test_errors_become_statuses(cases: FakeUseCases, channel: grpc.Channel) -> None:
    def fail(_: object) -> None:
        raise FailedPrecondition("volume v was never staged, so it has no key slot yet; stage it first")

    cases.calls.then = fail
    assert failed(lambda: rotate(channel)) == (
        "FAILED_PRECONDITION",
        "volume v was never staged, so it has no key slot yet; stage it first",
    )


def test_a_call_is_told_and_neither_secret_nor_key_is(run: Run, socket: Path) -> None:
    with told_lines() as told:
        run(addons_endpoint=socket)
        with grpc.insecure_channel(address_of(socket)) as channel:
            rotate(channel, parameters={"copies": "2"}, secrets={"CRYPTO_KEY_VALUE": "correct horse"})
            failed(lambda: rotate(channel, encryption_key="battery staple"))
            IdentityStub(channel).GetCapabilities(identity.GetCapabilitiesRequest())
    calls = [(one.level, one.fields["method"], one.fields["code"]) for one in told if one.event == "call"]
    assert calls == [
        ("info", "EncryptionKeyRotate", "OK"),
        ("warning", "EncryptionKeyRotate", "INVALID_ARGUMENT"),
        ("debug", "GetCapabilities", "OK"),
    ]
    requests = [one.fields["fields"] for one in told if one.event == "request"]
    assert requests == [{"volume_id": "v", "parameters": {"copies": "2"}}, {"volume_id": "v"}, {}]
    assert "correct horse" not in str(told)
    assert "battery staple" not in str(told)
    served = [one.fields["services"] for one in told if one.event == "serving"]
    assert served == [["controller", "identity", "node"], ["csi-addons"]]


def test_calls_and_overdue_rotations_are_measured(run: Run, socket: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    run(addons_endpoint=socket, http_address=address)
    with grpc.insecure_channel(address_of(socket)) as channel:
        rotate(channel)
    text = scrape(address)
    assert 'luks_csi_rpc_duration_seconds_count{code="OK",method="EncryptionKeyRotate"} 1.0' in text
    assert "luks_csi_overdue_key_rotations 5.0" in text
    assert "luks_csi_failed_key_rotations_total 1.0" in text


# The schedule's thread lives as long as the server


def test_the_looks_begin_and_end_with_the_server(cases: FakeUseCases) -> None:
    assert cases.job.life == ["started"]
    server = driver_server(cases.driver)
    server.stop()  # one that did not start, too
    assert cases.job.life == ["started", "asked to end", "ended"]


def test_a_server_without_the_node_service_does_not_look(run: Run) -> None:
    assert run(services=frozenset({Service.CONTROLLER})).job.life == []


def test_a_stop_waits_for_a_rotation_as_for_a_call(tmp_path: Path, cases: FakeUseCases, gate: Gate) -> None:
    settings = Settings(endpoint=tmp_path / "csi2.sock", node_id="n", grace_seconds=SECONDS)
    server = driver_server(replace(cases.driver, settings=settings))
    server.start()
    cases.job.at_work = lambda: gate(None)
    stop = in_background(server.stop)
    assert gate.entered.acquire(timeout=SECONDS)
    assert cases.job.life[-1] == "asked to end"
    gate.opened.set()
    assert stop() is True


def test_a_rotation_that_outlives_the_grace_time_is_cut_off(tmp_path: Path, cases: FakeUseCases, gate: Gate) -> None:
    settings = Settings(endpoint=tmp_path / "csi2.sock", node_id="n", grace_seconds=0.1)
    server = driver_server(replace(cases.driver, settings=settings))
    server.start()
    cases.job.at_work = lambda: gate(None)
    assert server.stop() is False
    gate.opened.set()
    cases.job.at_work = list
