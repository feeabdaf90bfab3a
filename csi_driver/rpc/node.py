"""The Node service; calls that are not here answer UNIMPLEMENTED."""

from collections.abc import Callable

import grpc

from csi_driver.model.settings import Settings
from csi_driver.rpc import convert, csi_pb2_grpc
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.volumes.expand import Expansion
from csi_driver.volumes.publish import Publishing
from csi_driver.volumes.stage import Staging
from csi_driver.volumes.usage import Usages

_Capability = csi.NodeServiceCapability
# Not VOLUME_MOUNT_GROUP: kubelet would then leave out its own change of ownership, and fsGroup would not work.
_OFFERED = (
    _Capability.RPC.STAGE_UNSTAGE_VOLUME,
    _Capability.RPC.GET_VOLUME_STATS,
    _Capability.RPC.EXPAND_VOLUME,
    _Capability.RPC.SINGLE_NODE_MULTI_WRITER,
)


class NodeServicer(csi_pb2_grpc.NodeServicer):
    """Each call is one use case on this node; `most_volumes` tells how many it can have, 0 for no limit."""

    def __init__(
        self,
        settings: Settings,
        staging: Staging,
        publishing: Publishing,
        expansion: Expansion,
        usage: Usages,
        most_volumes: Callable[[], int] = lambda: 0,
    ) -> None:
        self._staging = staging
        self._publishing = publishing
        self._expansion = expansion
        self._usage = usage
        self._capabilities = csi.NodeGetCapabilitiesResponse(
            capabilities=[_Capability(rpc=_Capability.RPC(type=kind)) for kind in _OFFERED]
        )
        self._settings = settings
        self._most_volumes = most_volumes

    def NodeGetCapabilities(
        self, request: csi.NodeGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi.NodeGetCapabilitiesResponse:
        return self._capabilities

    def NodeGetInfo(self, request: csi.NodeGetInfoRequest, context: grpc.ServicerContext) -> csi.NodeGetInfoResponse:
        settings = self._settings
        return csi.NodeGetInfoResponse(
            node_id=settings.node_id,
            max_volumes_per_node=self._most_volumes(),
            accessible_topology=csi.Topology(segments={settings.topology_key: settings.node_id}),
        )

    def NodeStageVolume(
        self, request: csi.NodeStageVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeStageVolumeResponse:
        self._staging.stage(convert.stage_request(request))
        return csi.NodeStageVolumeResponse()

    def NodeUnstageVolume(
        self, request: csi.NodeUnstageVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeUnstageVolumeResponse:
        self._staging.unstage(*convert.unstaging(request))
        return csi.NodeUnstageVolumeResponse()

    def NodePublishVolume(
        self, request: csi.NodePublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodePublishVolumeResponse:
        self._publishing.publish(convert.publish_request(request))
        return csi.NodePublishVolumeResponse()

    def NodeUnpublishVolume(
        self, request: csi.NodeUnpublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeUnpublishVolumeResponse:
        self._publishing.unpublish(*convert.unpublishing(request))
        return csi.NodeUnpublishVolumeResponse()

    def NodeGetVolumeStats(
        self, request: csi.NodeGetVolumeStatsRequest, context: grpc.ServicerContext
    ) -> csi.NodeGetVolumeStatsResponse:
        counts = self._usage.of(*convert.usage_question(request))
        return csi.NodeGetVolumeStatsResponse(usage=map(convert.usage, counts))

    def NodeExpandVolume(
        self, request: csi.NodeExpandVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeExpandVolumeResponse:
        capacity = self._expansion.expand(convert.expand_request(request))
        return csi.NodeExpandVolumeResponse(capacity_bytes=capacity)
