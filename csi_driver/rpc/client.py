"""A client of the server's socket, for `luks-csi volume` and the demo; who uses it needs no gRPC."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc

from csi_driver.model.errors import DriverError
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc import csi_pb2_grpc
from csi_driver.rpc.endpoint import address_of
from csi_driver.volumes.capability import Capability
from csi_driver.volumes.usage import Usage

Request = TypeVar("Request")
Response = TypeVar("Response")

_UNITS = {csi.VolumeUsage.BYTES: "bytes", csi.VolumeUsage.INODES: "inodes"}
_PAGE = 500
_NOT_SERVED = "Method not found!"  # grpc's own words for a call of a service that was not registered
_NOTHING: Mapping[str, str] = {}


class RemoteError(DriverError):
    """A call that failed: `code` is the name of the gRPC status, the text is the server's."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class RemoteVolume:
    """A volume as the server tells of it; the capacity in bytes. Each of `topologies` can have it; all can without.

    `published` are the nodes that were given it, where a controller does that.
    """

    id: str
    capacity_bytes: int
    context: Mapping[str, str]
    topologies: Sequence[Mapping[str, str]] = ()
    published: Sequence[str] = ()


@dataclass(frozen=True)
class PluginInfo:
    """Name and version of the driver that answers."""

    name: str
    version: str


class CsiClient:
    """Calls the server at `endpoint`. Each call raises RemoteError; `timeout` in seconds bounds it, None does not."""

    def __init__(self, endpoint: Path, timeout: float | None = 330.0) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._channel = grpc.insecure_channel(
            address_of(endpoint),
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 500),
            ],
        )
        self._identity = csi_pb2_grpc.IdentityStub(self._channel)
        self._controller = csi_pb2_grpc.ControllerStub(self._channel)
        self._node = csi_pb2_grpc.NodeStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def wait_until_ready(self, seconds: float) -> None:
        """Wait for a server at the endpoint whose Probe succeeds; seconds at most."""
        with _remote_errors():
            self._identity.Probe(csi.ProbeRequest(), timeout=seconds, wait_for_ready=True)

    def plugin_info(self) -> PluginInfo:
        """Who answers."""
        info = self._call(self._identity.GetPluginInfo, csi.GetPluginInfoRequest())
        return PluginInfo(info.name, info.vendor_version)

    def probe(self) -> None:
        """Ask whether the server works; the error tells why not."""
        self._call(self._identity.Probe, csi.ProbeRequest())

    def node_id(self) -> str:
        """The node of the server."""
        return self._call(self._node.NodeGetInfo, csi.NodeGetInfoRequest()).node_id

    def create_volume(
        self,
        name: str,
        capabilities: Sequence[Capability],
        required_bytes: int,
        *,
        limit_bytes: int = 0,
        parameters: Mapping[str, str] = _NOTHING,
        secrets: Mapping[str, str] = _NOTHING,
    ) -> RemoteVolume:
        """CreateVolume; sizes in bytes, 0 means not said."""
        request = csi.CreateVolumeRequest(
            name=name,
            capacity_range=csi.CapacityRange(required_bytes=required_bytes, limit_bytes=limit_bytes),
            volume_capabilities=map(_capability, capabilities),
            parameters=parameters,
            secrets=secrets,
        )
        return _volume(self._call(self._controller.CreateVolume, request).volume)

    def delete_volume(self, volume_id: str, secrets: Mapping[str, str] = _NOTHING) -> None:
        """DeleteVolume."""
        self._call(self._controller.DeleteVolume, csi.DeleteVolumeRequest(volume_id=volume_id, secrets=secrets))

    def volume(self, volume_id: str) -> RemoteVolume:
        """ControllerGetVolume."""
        request = csi.ControllerGetVolumeRequest(volume_id=volume_id)
        found = self._call(self._controller.ControllerGetVolume, request)
        return _volume(found.volume, found.status.published_node_ids)

    def volumes(self) -> Iterator[RemoteVolume]:
        """ListVolumes, page by page."""
        token = ""
        while True:
            request = csi.ListVolumesRequest(max_entries=_PAGE, starting_token=token)
            page = self._call(self._controller.ListVolumes, request)
            yield from (_volume(entry.volume, entry.status.published_node_ids) for entry in page.entries)
            if not (token := page.next_token):
                return

    def capacity(self, parameters: Mapping[str, str] = _NOTHING) -> int:
        """GetCapacity: bytes that new volumes of these parameters may take."""
        request = csi.GetCapacityRequest(parameters=parameters)
        return self._call(self._controller.GetCapacity, request).available_capacity

    def expand_volume(self, volume_id: str, required_bytes: int, secrets: Mapping[str, str] = _NOTHING) -> int:
        """ControllerExpandVolume; returns the capacity in bytes. `expand_on_node` does the rest."""
        request = csi.ControllerExpandVolumeRequest(
            volume_id=volume_id, capacity_range=csi.CapacityRange(required_bytes=required_bytes), secrets=secrets
        )
        return self._call(self._controller.ControllerExpandVolume, request).capacity_bytes

    def attach(
        self,
        volume: RemoteVolume,
        node_id: str,
        capability: Capability,
        secrets: Mapping[str, str] = _NOTHING,
    ) -> Mapping[str, str]:
        """ControllerPublishVolume, of a driver whose volumes lie outside the nodes; returns the publish context."""
        request = csi.ControllerPublishVolumeRequest(
            volume_id=volume.id,
            node_id=node_id,
            volume_capability=_capability(capability),
            secrets=secrets,
            volume_context=volume.context,
        )
        return dict(self._call(self._controller.ControllerPublishVolume, request).publish_context)

    def detach(self, volume_id: str, node_id: str, secrets: Mapping[str, str] = _NOTHING) -> None:
        """ControllerUnpublishVolume."""
        request = csi.ControllerUnpublishVolumeRequest(volume_id=volume_id, node_id=node_id, secrets=secrets)
        self._call(self._controller.ControllerUnpublishVolume, request)

    def stage(
        self,
        volume: RemoteVolume,
        staging_path: Path,
        capability: Capability,
        secrets: Mapping[str, str] = _NOTHING,
        publish_context: Mapping[str, str] = _NOTHING,
    ) -> None:
        """NodeStageVolume."""
        request = csi.NodeStageVolumeRequest(
            volume_id=volume.id,
            staging_target_path=str(staging_path),
            volume_capability=_capability(capability),
            secrets=secrets,
            volume_context=volume.context,
            publish_context=publish_context,
        )
        self._call(self._node.NodeStageVolume, request)

    def unstage(self, volume_id: str, staging_path: Path) -> None:
        """NodeUnstageVolume."""
        request = csi.NodeUnstageVolumeRequest(volume_id=volume_id, staging_target_path=str(staging_path))
        self._call(self._node.NodeUnstageVolume, request)

    def publish(
        self,
        volume: RemoteVolume,
        staging_path: Path,
        target_path: Path,
        capability: Capability,
        *,
        read_only: bool = False,
    ) -> None:
        """NodePublishVolume."""
        request = csi.NodePublishVolumeRequest(
            volume_id=volume.id,
            staging_target_path=str(staging_path),
            target_path=str(target_path),
            volume_capability=_capability(capability),
            readonly=read_only,
            volume_context=volume.context,
        )
        self._call(self._node.NodePublishVolume, request)

    def unpublish(self, volume_id: str, target_path: Path) -> None:
        """NodeUnpublishVolume."""
        request = csi.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=str(target_path))
        self._call(self._node.NodeUnpublishVolume, request)

    def expand_on_node(
        self, volume_id: str, path: Path, required_bytes: int, secrets: Mapping[str, str] = _NOTHING
    ) -> int:
        """NodeExpandVolume; returns the capacity in bytes."""
        request = csi.NodeExpandVolumeRequest(
            volume_id=volume_id,
            volume_path=str(path),
            capacity_range=csi.CapacityRange(required_bytes=required_bytes),
            secrets=secrets,
        )
        return self._call(self._node.NodeExpandVolume, request).capacity_bytes

    def usage(self, volume_id: str, path: Path) -> list[Usage]:
        """NodeGetVolumeStats."""
        request = csi.NodeGetVolumeStatsRequest(volume_id=volume_id, volume_path=str(path))
        counts = self._call(self._node.NodeGetVolumeStats, request).usage
        return [Usage(_UNITS[count.unit], count.total, count.used, count.available) for count in counts]

    def _call(self, method: "grpc.UnaryUnaryMultiCallable[Request, Response]", request: Request) -> Response:
        try:
            with _remote_errors():
                return method(request, timeout=self._timeout)
        except RemoteError as error:
            if str(error) != _NOT_SERVED:
                raise
            service = "controller" if method in vars(self._controller).values() else "node"
            raise RemoteError(
                error.code,
                f"the server at {self._endpoint} has no {service} service; call one that has, where the driver's "
                f"{service} plug-in runs, or name its socket by LUKS_CSI_ENDPOINT",
            ) from None


@contextmanager
def _remote_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        # What stubs raise is a Call too (grpc.Call); the type says only RpcError.
        code, details = error.code(), error.details()
        raise RemoteError(code.name, details or "the server gave no reason") from None


def _capability(wanted: Capability) -> csi.VolumeCapability:
    mode = csi.VolumeCapability.AccessMode(mode=csi.VolumeCapability.AccessMode.Mode.ValueType(wanted.mode))
    if wanted.block:
        return csi.VolumeCapability(access_mode=mode, block=csi.VolumeCapability.BlockVolume())
    mount = csi.VolumeCapability.MountVolume(fs_type=wanted.fs_type or "", mount_flags=wanted.mount_flags)
    return csi.VolumeCapability(access_mode=mode, mount=mount)


def _volume(message: csi.Volume, published: Iterable[str] = ()) -> RemoteVolume:
    topologies = tuple(dict(each.segments) for each in message.accessible_topology)
    context = dict(message.volume_context)
    return RemoteVolume(message.volume_id, message.capacity_bytes, context, topologies, tuple(published))
