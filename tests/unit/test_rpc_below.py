"""How a driver below is found and called: real sockets, with what it is told and what its answers mean."""

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from csi_driver.backends.csipins import Direct
from csi_driver.model.errors import (
    Aborted,
    CommandFailed,
    DeadlineExceeded,
    DriverError,
    FailedPrecondition,
    ResourceExhausted,
    Unavailable,
)
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc import csi_pb2_grpc
from csi_driver.rpc.below import calling
from tests.backends.directrig import Registration, served

DIRECT = Direct(driver="below.test", handle="vol-1", context={"of": "the class"})
STAGING, TARGET = Path("/kubelet/staging"), Path("/kubelet/publish/device")
_Rpc = csi.NodeServiceCapability.RPC
_Modes = csi.VolumeCapability.AccessMode


class Driver(csi_pb2_grpc.IdentityServicer, csi_pb2_grpc.NodeServicer):
    """Keeps what it is told; `code` is its answer to what changes something, `can` what it says of itself."""

    def __init__(self, *can: int, name: str = "below.test") -> None:
        self.told: list[object] = []
        self.code: grpc.StatusCode | None = None
        self.can = can
        self.name = name

    def _tell(self, request: object, context: grpc.ServicerContext) -> None:
        self.told.append(request)
        if self.code is not None:
            context.abort(self.code, "because\nof that")

    def GetPluginInfo(
        self, request: csi.GetPluginInfoRequest, context: grpc.ServicerContext
    ) -> csi.GetPluginInfoResponse:
        return csi.GetPluginInfoResponse(name=self.name)

    def NodeGetCapabilities(
        self, request: csi.NodeGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi.NodeGetCapabilitiesResponse:
        made = [csi.NodeServiceCapability(rpc=_Rpc(type=_Rpc.Type.ValueType(each))) for each in self.can]
        return csi.NodeGetCapabilitiesResponse(capabilities=made)

    def NodeStageVolume(
        self, request: csi.NodeStageVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeStageVolumeResponse:
        self._tell(request, context)
        return csi.NodeStageVolumeResponse()

    def NodePublishVolume(
        self, request: csi.NodePublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodePublishVolumeResponse:
        self._tell(request, context)
        return csi.NodePublishVolumeResponse()

    def NodeUnpublishVolume(
        self, request: csi.NodeUnpublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeUnpublishVolumeResponse:
        self._tell(request, context)
        return csi.NodeUnpublishVolumeResponse()

    def NodeUnstageVolume(
        self, request: csi.NodeUnstageVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeUnstageVolumeResponse:
        self._tell(request, context)
        return csi.NodeUnstageVolumeResponse()

    def NodeExpandVolume(
        self, request: csi.NodeExpandVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeExpandVolumeResponse:
        self._tell(request, context)
        return csi.NodeExpandVolumeResponse()


@pytest.fixture
def kubelet() -> Iterator[Path]:
    """Its folder; a socket's name has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="kubelet-") as folder:
        (Path(folder) / "plugins_registry").mkdir()
        yield Path(folder)


def lived(kubelet: Path, driver: Driver) -> None:
    """All that is asked of a driver in a volume's life."""
    place = kubelet / "plugins" / "elsewhere" / "node.sock"
    with (
        served(place, driver),
        served(kubelet / "plugins_registry" / "below.test-reg.sock", Registration("below.test", place)),
        calling(kubelet, "pvc-1", DIRECT, 30.0) as below,
    ):
        staged = below.stage(STAGING)
        below.publish(STAGING if staged else None, TARGET)
        below.expand(STAGING, TARGET, 4096)
        below.unpublish(TARGET)
        below.unstage(STAGING)


def capability(mode: "_Modes.Mode.ValueType") -> csi.VolumeCapability:
    return csi.VolumeCapability(access_mode=_Modes(mode=mode), block=csi.VolumeCapability.BlockVolume())


def test_a_driver_that_can_all_is_told_what_kubelet_tells_it(kubelet: Path) -> None:
    driver = Driver(_Rpc.STAGE_UNSTAGE_VOLUME, _Rpc.EXPAND_VOLUME, _Rpc.SINGLE_NODE_MULTI_WRITER)
    lived(kubelet, driver)
    wanted = capability(_Modes.SINGLE_NODE_MULTI_WRITER)
    staging, target, context = str(STAGING), str(TARGET), {"of": "the class"}
    assert driver.told == [
        csi.NodeStageVolumeRequest(
            volume_id="vol-1", staging_target_path=staging, volume_capability=wanted, volume_context=context
        ),
        csi.NodePublishVolumeRequest(
            volume_id="vol-1", staging_target_path=staging, target_path=target, volume_capability=wanted,
            volume_context=context,
        ),
        csi.NodeExpandVolumeRequest(
            volume_id="vol-1", volume_path=target, staging_target_path=staging,
            capacity_range=csi.CapacityRange(required_bytes=4096), volume_capability=wanted,
        ),
        csi.NodeUnpublishVolumeRequest(volume_id="vol-1", target_path=target),
        csi.NodeUnstageVolumeRequest(volume_id="vol-1", staging_target_path=staging),
    ]  # fmt: skip


def test_a_driver_without_stages_and_growth_is_told_of_neither(kubelet: Path) -> None:
    driver = Driver()
    lived(kubelet, driver)
    assert driver.told == [
        csi.NodePublishVolumeRequest(
            volume_id="vol-1", target_path=str(TARGET), volume_capability=capability(_Modes.SINGLE_NODE_WRITER),
            volume_context={"of": "the class"},
        ),
        csi.NodeUnpublishVolumeRequest(volume_id="vol-1", target_path=str(TARGET)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (grpc.StatusCode.ABORTED, Aborted, "is still at work on an earlier call"),
        (grpc.StatusCode.CANCELLED, Unavailable, "broke off"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded, "does not answer"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhausted, "has no room"),
        (grpc.StatusCode.UNAVAILABLE, Unavailable, "cannot be reached"),
        (grpc.StatusCode.INTERNAL, CommandFailed, "failed; look at its node pod's log"),
        (grpc.StatusCode.UNKNOWN, CommandFailed, "failed; look at its node pod's log"),
        (grpc.StatusCode.NOT_FOUND, FailedPrecondition, "has no such volume"),
        (grpc.StatusCode.FAILED_PRECONDITION, FailedPrecondition, "refuses"),
        (grpc.StatusCode.INVALID_ARGUMENT, FailedPrecondition, "refuses"),
        (grpc.StatusCode.UNIMPLEMENTED, FailedPrecondition, "refuses"),
    ],
)
def test_what_it_answers_is_told_in_a_sentence_with_its_name_and_socket(
    kubelet: Path, code: grpc.StatusCode, kind: type[DriverError], words: str
) -> None:
    driver = Driver()
    driver.code = code
    with pytest.raises(DriverError) as caught:
        lived(kubelet, driver)
    assert type(caught.value).__mro__[:2].count(kind)
    said = str(caught.value)
    assert said.startswith(
        f"the driver below.test at {kubelet}/plugins/elsewhere/node.sock, below volume pvc-1, {words}"
    )
    assert said.endswith(f"(NodePublishVolume: {code.name}: because of that)")


def test_a_volume_that_is_not_there_is_put_down(kubelet: Path) -> None:
    driver, place = Driver(_Rpc.STAGE_UNSTAGE_VOLUME), kubelet / "node.sock"
    driver.code = grpc.StatusCode.NOT_FOUND
    with (
        served(place, driver),
        served(kubelet / "plugins_registry" / "x.sock", Registration("below.test", place)),
        calling(kubelet, "pvc-1", DIRECT, 30.0) as below,
    ):
        below.unpublish(TARGET)
        below.unstage(STAGING)
    assert len(driver.told) == 2


def test_a_driver_is_found_among_others_by_the_name_that_it_tells_kubelet(kubelet: Path) -> None:
    registry, driver = kubelet / "plugins_registry", Driver()
    (registry / "file").touch()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(registry / "below.test-reg.sock"))
    place, wrong = kubelet / "node.sock", kubelet / "wrong.sock"
    with (
        served(place, driver),
        served(registry / "a.sock", Registration("other.test", wrong)),
        served(registry / "b.sock", Registration("below.test", wrong, "DevicePlugin")),
    ):
        with (
            pytest.raises(Unavailable, match=r"below.test below volume pvc-1 is not registered on this node"),
            calling(kubelet, "pvc-1", DIRECT, 30.0),
        ):
            pytest.fail("it was called")
        registered = served(registry / "below" / "c.sock", Registration("below.test", Path(f"unix://{place}")))
        with registered, calling(kubelet, "pvc-1", DIRECT, 30.0) as below:
            below.publish(None, TARGET)
    assert len(driver.told) == 1


def test_another_driver_at_its_socket_is_asked_for_nothing(kubelet: Path) -> None:
    driver = Driver(name="another\n.test")
    with pytest.raises(
        FailedPrecondition, match=r"of the driver below.test and at \S+ answers 'another .test'; nothing"
    ):
        lived(kubelet, driver)
    assert not driver.told


def test_all_calls_together_have_so_long(kubelet: Path) -> None:
    driver, place = Driver(), kubelet / "node.sock"
    with (
        served(place, driver),
        served(kubelet / "plugins_registry" / "below.test-reg.sock", Registration("below.test", place)),
        pytest.raises(DeadlineExceeded, match=r"\(GetPluginInfo: DEADLINE_EXCEEDED"),
        calling(kubelet, "pvc-1", DIRECT, 0.0),
    ):
        pytest.fail("it was called")
