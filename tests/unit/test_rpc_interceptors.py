"""What happens around a call, without a server."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any, Never, cast

import grpc
import pytest

from csi_driver.host.holders import Holders
from csi_driver.host.locks import VolumeLocks
from csi_driver.model.access import Access
from csi_driver.model.errors import Aborted, DriverError, NotFound, VolumeBusy
from csi_driver.model.volume import volume_id_for
from csi_driver.rpc import addons_keyrotation_pb2 as keyrotation
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc.interceptors import (
    Behaviour,
    CallLog,
    Chain,
    Concern,
    Method,
    Statuses,
    StorageAccess,
    Timing,
    VolumeLocking,
)
from tests.told_lines import Told

SECRET = "correct horse battery staple"
Mode = csi.VolumeCapability.AccessMode
BLOCK = csi.VolumeCapability(block=csi.VolumeCapability.BlockVolume(), access_mode=Mode(mode=Mode.SINGLE_NODE_WRITER))
CREATE = csi.CreateVolumeRequest(name="A volume", volume_capabilities=[BLOCK])
STAGE = csi.NodeStageVolumeRequest(
    volume_id="v", staging_target_path="/s", volume_capability=BLOCK, secrets={"CRYPTO_KEY_VALUE": SECRET}
)
REQUESTS: dict[str, tuple[Any, str]] = {
    "Controller/CreateVolume": (CREATE, volume_id_for("A volume")),
    "Controller/DeleteVolume": (csi.DeleteVolumeRequest(volume_id="v"), "v"),
    "Controller/ControllerPublishVolume": (
        csi.ControllerPublishVolumeRequest(volume_id="v", node_id="n", volume_capability=BLOCK),
        "v",
    ),
    "Controller/ControllerUnpublishVolume": (csi.ControllerUnpublishVolumeRequest(volume_id="v"), "v"),
    "Controller/ControllerExpandVolume": (
        csi.ControllerExpandVolumeRequest(volume_id="v", capacity_range=csi.CapacityRange(required_bytes=1)),
        "v",
    ),
    "Node/NodeStageVolume": (STAGE, "v"),
    "Node/NodeUnstageVolume": (csi.NodeUnstageVolumeRequest(volume_id="v", staging_target_path="/s"), "v"),
    "Node/NodePublishVolume": (
        csi.NodePublishVolumeRequest(
            volume_id="v", staging_target_path="/s", target_path="/t", volume_capability=BLOCK
        ),
        "v",
    ),
    "Node/NodeUnpublishVolume": (csi.NodeUnpublishVolumeRequest(volume_id="v", target_path="/t"), "v"),
    "Node/NodeExpandVolume": (csi.NodeExpandVolumeRequest(volume_id="v", volume_path="/t"), "v"),
    "/encryptionkeyrotation.EncryptionKeyRotationController/EncryptionKeyRotate": (
        keyrotation.EncryptionKeyRotateRequest(volume_id="v"),
        "v",
    ),
}
READING = ("Identity/Probe", "Controller/ListVolumes", "Controller/ControllerGetVolume", "Node/NodeGetVolumeStats")


class AbortedCall(Exception):
    """What the context's abort raises here."""


class Context:
    """As much of a ServicerContext as the concerns use."""

    def abort(self, code: grpc.StatusCode, details: str) -> Never:
        raise AbortedCall(code, details)


CONTEXT = cast("grpc.ServicerContext", Context())


class Details:
    """Which method is called."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.invocation_metadata: tuple[tuple[str, str | bytes], ...] = ()


class RecordingLocks(VolumeLocks):
    """Notes what is held; `busy` cannot be."""

    def __init__(self, busy: str = "") -> None:
        self.held: list[str] = []
        self.busy = busy

    @contextmanager
    def hold(self, volume_id: str) -> Iterator[None]:
        if volume_id == self.busy:
            raise VolumeBusy(f"volume {volume_id} is busy")
        self.held.append(volume_id)
        yield
        self.held.append(f"end of {volume_id}")


def chain(behaviour: Behaviour, method: str, *concerns: Concern) -> Behaviour:
    """`behaviour` as the server would call it, with its own context variables for each call."""
    plain: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(behaviour)
    path = method if method.startswith("/") else f"/csi.v1.{method}"
    handler = Chain(*concerns).intercept_service(lambda _: plain, Details(path))
    assert handler is not None
    wrapped = handler.unary_unary
    assert wrapped is not None
    return lambda request, context: copy_context().run(wrapped, request, context)


def raising(error: Exception) -> Behaviour:
    def behaviour(_request: object, _context: object) -> Never:
        raise error

    return behaviour


def served(_request: object, _context: object) -> str:
    return "answer"


def locking(locks: VolumeLocks) -> VolumeLocking:
    return VolumeLocking(locks, lambda name, _: volume_id_for(name), attaching=True)


class Naming:
    """Notes its name around a call."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self._name = name
        self._seen = seen

    def around(self, method: Method, behaviour: Behaviour) -> Behaviour:
        self._seen.append(f"{self._name} around {method.service}.{method.name}")

        def named(request: object, context: grpc.ServicerContext) -> object:
            self._seen.append(self._name)
            return behaviour(request, context)

        return named


def test_concerns_stand_in_order_and_are_put_there_once() -> None:
    seen: list[str] = []
    one = Chain(Naming("outer", seen), Naming("inner", seen))
    plain = grpc.unary_unary_rpc_method_handler(served, str, str.encode)
    found = {one.intercept_service(lambda _: plain, Details("/csi.v1.Identity/Probe")) for _ in range(3)}
    handler = found.pop()
    assert not found
    assert handler is not None
    assert handler.unary_unary is not None
    assert handler.unary_unary("", CONTEXT) == "answer"
    assert seen == ["inner around Identity.Probe", "outer around Identity.Probe", "outer", "inner"]
    assert (handler.request_deserializer, handler.response_serializer) == (str, str.encode)


def test_a_method_that_is_not_served_is_left_to_grpc() -> None:
    assert Chain(Statuses()).intercept_service(lambda _: None, Details("/x/Y")) is None


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (NotFound("volume v does not exist"), grpc.StatusCode.NOT_FOUND, "volume v does not exist"),
        (ValueError(SECRET), grpc.StatusCode.INTERNAL, r"NodeStageVolume failed: ValueError.*look for request \S+-1$"),
    ],
)
def test_errors_become_statuses(error: Exception, code: grpc.StatusCode, text: str) -> None:
    call = chain(raising(error), "Node/NodeStageVolume", Statuses(), CallLog(Told().log(logging.ERROR)))
    with pytest.raises(AbortedCall) as raised:
        call(STAGE, CONTEXT)
    found_code, found_text = raised.value.args
    assert found_code is code
    assert re.search(text, found_text)
    assert SECRET not in found_text


def test_a_call_is_one_line_and_its_id_is_on_every_line_of_it() -> None:
    told = Told()
    log = told.log(logging.INFO)

    def behaviour(_request: object, _context: object) -> None:
        log.info("inside")

    call = chain(behaviour, "Node/NodeStageVolume", CallLog(log))
    call(STAGE, CONTEXT)
    call(STAGE, CONTEXT)
    assert [line.event for line in told] == ["inside", "call", "inside", "call"]
    ids = [line.fields["request_id"] for line in told]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert told[1].level == "info"
    line = told[1].fields
    assert (line["method"], line["volume_id"], line["code"]) == ("NodeStageVolume", "v", "OK")
    assert line["seconds"] >= 0


def test_a_created_volume_is_told_by_its_id() -> None:
    told = Told()
    chain(served, "Controller/CreateVolume", CallLog(told.log(logging.INFO)))(CREATE, CONTEXT)
    assert told[0].fields["volume_id"] == volume_id_for("A volume")


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Identity/Probe", csi.ProbeRequest()),
        ("Identity/GetPluginInfo", csi.GetPluginInfoRequest()),
        ("Node/NodeGetCapabilities", csi.NodeGetCapabilitiesRequest()),
        ("Node/NodeGetInfo", csi.NodeGetInfoRequest()),
    ],
)
def test_what_is_asked_all_day_is_told_at_level_debug(method: str, request_: object) -> None:
    told = Told()
    chain(served, method, CallLog(told.log(logging.INFO)))(request_, CONTEXT)
    assert told == []
    chain(served, method, CallLog(told.log(logging.DEBUG)))(request_, CONTEXT)
    assert [one.level for one in told] == ["debug", "debug"]


@pytest.mark.parametrize(
    ("error", "level", "code"),
    [
        (NotFound("gone"), "warning", "NOT_FOUND"),
        (VolumeBusy("busy"), "info", "ABORTED"),
        (Aborted("w"), "info", "ABORTED"),
    ],
)
def test_failures_are_warnings_unless_they_pass_by_themselves(error: DriverError, level: str, code: str) -> None:
    told = Told()
    with pytest.raises(DriverError):
        chain(raising(error), "Identity/Probe", CallLog(told.log(logging.INFO)))(csi.ProbeRequest(), CONTEXT)
    (line,) = told
    assert line.level == level
    assert (line.fields["code"], line.fields["error"]) == (code, str(error))
    assert "where" not in line.fields


def test_of_an_unforeseen_error_kind_and_place_are_told_and_not_its_text() -> None:
    told = Told()
    with pytest.raises(KeyError):
        chain(raising(KeyError(SECRET)), "Node/NodeStageVolume", CallLog(told.log(logging.DEBUG)))(STAGE, CONTEXT)
    line = told[-1].fields
    assert (line["code"], line["kind"]) == ("INTERNAL", "KeyError")
    assert any("test_rpc_interceptors" in place for place in line["where"])
    assert SECRET not in repr(told)


def test_requests_are_told_at_level_debug_without_secrets() -> None:
    told = Told()
    chain(served, "Node/NodeStageVolume", CallLog(told.log(logging.DEBUG)))(STAGE, CONTEXT)
    assert told[0].fields["fields"]["staging_target_path"] == "/s"
    assert SECRET not in repr(told)
    told.clear()
    chain(served, "Node/NodeStageVolume", CallLog(told.log(logging.INFO)))(STAGE, CONTEXT)
    assert [one.event for one in told] == ["call"]


def test_each_call_is_timed_with_its_code() -> None:
    seen: list[tuple[str, str, float]] = []

    def observe(method: str, code: str, seconds: float) -> None:
        seen.append((method, code, seconds))

    chain(served, "Identity/Probe", Timing(observe))(csi.ProbeRequest(), CONTEXT)
    with pytest.raises(ZeroDivisionError):
        chain(raising(ZeroDivisionError()), "Identity/Probe", Timing(observe))(csi.ProbeRequest(), CONTEXT)
    assert [line[:2] for line in seen] == [("Probe", "OK"), ("Probe", "INTERNAL")]
    assert all(0 <= line[2] < 5 for line in seen)


@pytest.mark.parametrize("method", REQUESTS)
def test_a_call_that_changes_a_volume_holds_its_lock(method: str) -> None:
    request, volume_id = REQUESTS[method]
    locks = RecordingLocks()

    def behaviour(_request: object, _context: object) -> str:
        assert locks.held == [volume_id]
        return "answer"

    assert chain(behaviour, method, locking(locks))(request, CONTEXT) == "answer"
    assert locks.held == [volume_id, f"end of {volume_id}"]


@pytest.mark.parametrize("method", REQUESTS)
def test_a_volume_that_is_busy_is_not_touched(method: str) -> None:
    request, volume_id = REQUESTS[method]
    call = chain(raising(AssertionError()), method, locking(RecordingLocks(busy=volume_id)))
    with pytest.raises(VolumeBusy):
        call(request, CONTEXT)


@pytest.mark.parametrize("method", REQUESTS)
def test_nothing_is_locked_for_a_request_that_cannot_be_right(method: str) -> None:
    request, _ = REQUESTS[method]
    locks = RecordingLocks()
    call = chain(raising(AssertionError()), method, locking(locks))
    with pytest.raises(DriverError):
        call(type(request)(), CONTEXT)
    assert locks.held == []


@pytest.mark.parametrize("method", READING)
def test_calls_that_read_take_no_lock(method: str) -> None:
    locks = RecordingLocks()
    assert chain(served, method, locking(locks))(None, CONTEXT) == "answer"
    assert locks.held == []


def test_foreign_ids_never_name_a_lock_file() -> None:
    locks = RecordingLocks()
    call = chain(served, "Controller/DeleteVolume", locking(locks))
    call(csi.DeleteVolumeRequest(volume_id="../../etc/passwd"), CONTEXT)
    assert "/" not in "".join(locks.held)


def test_the_real_lock_answers_who_comes_second(tmp_path: Path) -> None:
    locks = VolumeLocks(tmp_path, Holders())
    call = chain(served, "Controller/DeleteVolume", Statuses(), locking(locks))
    with locks.hold("v"), pytest.raises(AbortedCall) as raised:
        call(csi.DeleteVolumeRequest(volume_id="v"), CONTEXT)
    assert raised.value.args[0] is grpc.StatusCode.ABORTED
    assert call(csi.DeleteVolumeRequest(volume_id="v"), CONTEXT) == "answer"


def test_what_a_call_brings_reaches_the_storage_before_the_call_and_shows_no_secret() -> None:
    seen: list[tuple[str, Access]] = []

    def behaviour(_request: object, _context: object) -> str:
        assert len(seen) == 1
        return "answer"

    request = csi.NodeStageVolumeRequest()
    request.CopyFrom(STAGE)
    request.secrets["userKey"] = "AQ-secret"
    request.volume_context["pool"] = "rbd"
    request.publish_context["node"] = "n"
    around = StorageAccess(lambda volume_id, access: seen.append((volume_id, access)), lambda name, _: name)
    assert chain(behaviour, "Node/NodeStageVolume", around)(request, CONTEXT) == "answer"
    ((volume_id, access),) = seen
    assert (volume_id, access.secrets["userKey"]) == ("v", "AQ-secret")
    assert (access.volume_context, access.publish_context) == ({"pool": "rbd"}, {"node": "n"})
    assert "AQ-secret" not in repr(access)


def test_a_new_volume_is_known_by_the_id_that_its_storage_gives_it() -> None:
    request = csi.CreateVolumeRequest()
    request.CopyFrom(CREATE)
    request.parameters["pool"] = "rbd"
    request.accessibility_requirements.preferred.add().segments["zone"] = "a"
    request.accessibility_requirements.requisite.add().segments["zone"] = "b"

    def new_id(name: str, parameters: Mapping[str, str]) -> str:
        return f"{volume_id_for(name)}.{parameters['pool']}"

    locks, seen = RecordingLocks(), list[tuple[str, Access]]()
    concerns = VolumeLocking(locks, new_id, attaching=True), StorageAccess(lambda *each: seen.append(each), new_id)
    assert chain(served, "Controller/CreateVolume", *concerns)(request, CONTEXT) == "answer"
    expected = f"{volume_id_for('A volume')}.rbd"
    assert locks.held == [expected, f"end of {expected}"]
    ((volume_id, access),) = seen
    assert (volume_id, access.topologies) == (expected, ({"zone": "a"}, {"zone": "b"}))


@pytest.mark.parametrize("method", ["Node/NodeUnstageVolume", "Node/NodeUnpublishVolume", *READING])
def test_a_call_that_brings_nothing_needs_no_storage(method: str) -> None:
    request, _ = REQUESTS.get(method, (None, ""))

    def use(*brought: object) -> None:
        raise AssertionError(brought)

    assert chain(served, method, StorageAccess(use, lambda name, _: name))(request, CONTEXT) == "answer"
