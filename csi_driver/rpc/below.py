"""A client of the node service of another CSI driver, found where kubelet finds it: in its folder plugins_registry."""

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

import grpc

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
from csi_driver.model.text import one_line
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc import csi_pb2_grpc
from csi_driver.rpc import pluginregistration_pb2 as registration
from csi_driver.rpc.endpoint import address_of
from csi_driver.rpc.pluginregistration_pb2_grpc import RegistrationStub

Request = TypeVar("Request")
Response = TypeVar("Response")

_LOOK_SECONDS: Final = 2.0
_MOST_QUOTED: Final = 300
_OPTIONS: Final = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)


class _NotThere(FailedPrecondition):
    """The driver below knows of no such volume."""


_Rpc = csi.NodeServiceCapability.RPC
_ERRORS: Final[dict[grpc.StatusCode, tuple[type[DriverError], str]]] = {
    grpc.StatusCode.ABORTED: (Aborted, "is still at work on an earlier call; this is tried again"),
    grpc.StatusCode.CANCELLED: (Unavailable, "broke off; look at its node pod, this is tried again"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (DeadlineExceeded, "does not answer; look at its node pod, this is tried again"),
    grpc.StatusCode.NOT_FOUND: (_NotThere, "has no such volume; look at its claim and PersistentVolume"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (ResourceExhausted, "has no room for it"),
    grpc.StatusCode.UNAVAILABLE: (Unavailable, "cannot be reached; look at its node pod, this is tried again"),
    grpc.StatusCode.INTERNAL: (CommandFailed, "failed; look at its node pod's log"),
    grpc.StatusCode.UNKNOWN: (CommandFailed, "failed; look at its node pod's log"),
}  # fmt: skip


@contextmanager
def calling(kubelet_dir: Path, volume_id: str, direct: Direct, seconds: float) -> Iterator["NodeClient"]:
    """A client of the driver below of that volume: it is registered with this kubelet, and answers by its name.

    Raises Unavailable where none does, FailedPrecondition where another one answers.
    """
    deadline = time.monotonic() + seconds
    socket = _endpoint(kubelet_dir / "plugins_registry", volume_id, direct.driver)
    with grpc.insecure_channel(address_of(socket), _OPTIONS) as channel:
        client = NodeClient(channel, socket, volume_id, direct, deadline)
        client.check_name()
        yield client


def _endpoint(folder: Path, volume_id: str, driver: str) -> Path:
    """The socket of a driver, as it has told kubelet."""
    usual = f"{driver}-reg.sock"
    for path in sorted(folder.rglob("*"), key=lambda each: (each.name != usual, each)):
        try:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                continue
            with grpc.insecure_channel(address_of(path), _OPTIONS) as channel:
                found = RegistrationStub(channel).GetInfo(registration.InfoRequest(), timeout=_LOOK_SECONDS)
        except (grpc.RpcError, OSError):
            continue  # one that is gone, or hangs, is not the one
        if (found.type, found.name) == ("CSIPlugin", driver):
            return Path("/" + found.endpoint.removeprefix("unix:").lstrip("/"))
    raise Unavailable(
        f"the driver {driver} below volume {volume_id} is not registered on this node: no socket in {folder} answers "
        f"for it; look at its node pod, this is tried again"
    )


class NodeClient:
    """`csi_driver.backends.csidirect.NodeBelow`, until `deadline` (time.monotonic)."""

    def __init__(self, channel: grpc.Channel, socket: Path, volume_id: str, direct: Direct, deadline: float) -> None:
        self._identity = csi_pb2_grpc.IdentityStub(channel)
        self._node = csi_pb2_grpc.NodeStub(channel)
        self._socket = socket
        self._volume_id = volume_id
        self._direct = direct
        self._deadline = deadline
        self._known: frozenset[int] | None = None

    def check_name(self) -> None:
        """Before anything else is sent. Raises FailedPrecondition."""
        found = self._call("GetPluginInfo", self._identity.GetPluginInfo, csi.GetPluginInfoRequest()).name
        if found != self._direct.driver:
            raise FailedPrecondition(
                f"volume {self._volume_id} is of the driver {self._direct.driver} and at {self._socket} answers "
                f"{one_line(found, _MOST_QUOTED)!r}; nothing was asked of it, look at whose node pod listens there"
            )

    def stage(self, staging: Path) -> bool:
        if not self._can(_Rpc.STAGE_UNSTAGE_VOLUME):
            return False
        request = csi.NodeStageVolumeRequest(
            volume_id=self._direct.handle,
            staging_target_path=str(staging),
            volume_capability=self._capability(),
            volume_context=self._direct.context,
        )
        self._call("NodeStageVolume", self._node.NodeStageVolume, request)
        return True

    def publish(self, staging: Path | None, target: Path) -> None:
        request = csi.NodePublishVolumeRequest(
            volume_id=self._direct.handle,
            staging_target_path=str(staging or ""),
            target_path=str(target),
            volume_capability=self._capability(),
            volume_context=self._direct.context,
        )
        self._call("NodePublishVolume", self._node.NodePublishVolume, request)

    def unpublish(self, target: Path) -> None:
        request = csi.NodeUnpublishVolumeRequest(volume_id=self._direct.handle, target_path=str(target))
        self._end("NodeUnpublishVolume", self._node.NodeUnpublishVolume, request)

    def unstage(self, staging: Path) -> None:
        if self._can(_Rpc.STAGE_UNSTAGE_VOLUME):
            request = csi.NodeUnstageVolumeRequest(volume_id=self._direct.handle, staging_target_path=str(staging))
            self._end("NodeUnstageVolume", self._node.NodeUnstageVolume, request)

    def expand(self, staging: Path, target: Path, size: int) -> None:
        if self._can(_Rpc.EXPAND_VOLUME):
            request = csi.NodeExpandVolumeRequest(
                volume_id=self._direct.handle,
                volume_path=str(target),
                staging_target_path=str(staging) if self._can(_Rpc.STAGE_UNSTAGE_VOLUME) else "",
                capacity_range=csi.CapacityRange(required_bytes=size),
                volume_capability=self._capability(),
            )
            self._call("NodeExpandVolume", self._node.NodeExpandVolume, request)

    def _capability(self) -> csi.VolumeCapability:
        """That of a claim with ReadWriteOnce, as kubelet says it."""
        modes = csi.VolumeCapability.AccessMode
        many = self._can(_Rpc.SINGLE_NODE_MULTI_WRITER)
        mode = modes(mode=modes.SINGLE_NODE_MULTI_WRITER if many else modes.SINGLE_NODE_WRITER)
        return csi.VolumeCapability(access_mode=mode, block=csi.VolumeCapability.BlockVolume())

    def _can(self, kind: int) -> bool:
        if self._known is None:
            method = self._node.NodeGetCapabilities
            answer = self._call("NodeGetCapabilities", method, csi.NodeGetCapabilitiesRequest())
            self._known = frozenset(each.rpc.type for each in answer.capabilities)
        return kind in self._known

    def _end(self, name: str, method: "grpc.UnaryUnaryMultiCallable[Request, Response]", request: Request) -> None:
        """A call that a volume which is not there has behind it."""
        with suppress(_NotThere):
            self._call(name, method, request)

    def _call(self, name: str, method: "grpc.UnaryUnaryMultiCallable[Request, Response]", request: Request) -> Response:
        left = self._deadline - time.monotonic()
        code, details = grpc.StatusCode.DEADLINE_EXCEEDED, "the calls before it took all the time"
        try:
            if left > 0:
                return method(request, timeout=left)
        except grpc.RpcError as error:
            # What stubs raise is a Call too (grpc.Call); the type says only RpcError.
            code, details = error.code(), error.details() or ""
        kind, words = _ERRORS.get(code, (FailedPrecondition, "refuses; look at its node pod's log"))
        said = f"{code.name}: {one_line(details, _MOST_QUOTED)}" if details else code.name
        raise kind(
            f"the driver {self._direct.driver} at {self._socket}, below volume {self._volume_id}, {words} ({name}: "
            f"{said})"
        )
