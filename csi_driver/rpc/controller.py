"""The Controller service; calls that are not here answer UNIMPLEMENTED."""

import grpc
from google.protobuf.wrappers_pb2 import Int64Value

from csi_driver.rpc import convert, csi_pb2_grpc
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.volumes.attachment import Attachments
from csi_driver.volumes.provision import Provisioning

_Capability = csi.ControllerServiceCapability
_OFFERED = (
    _Capability.RPC.CREATE_DELETE_VOLUME,
    _Capability.RPC.LIST_VOLUMES,
    _Capability.RPC.GET_CAPACITY,
    _Capability.RPC.EXPAND_VOLUME,
    _Capability.RPC.GET_VOLUME,
    _Capability.RPC.SINGLE_NODE_MULTI_WRITER,
)


class ControllerServicer(csi_pb2_grpc.ControllerServicer):
    """Each call is one use case of provisioning."""

    offered: tuple[_Capability.RPC.Type.ValueType, ...] = _OFFERED

    def __init__(self, provisioning: Provisioning) -> None:
        self._provisioning = provisioning
        self._capabilities = csi.ControllerGetCapabilitiesResponse(
            capabilities=[_Capability(rpc=_Capability.RPC(type=kind)) for kind in self.offered]
        )

    def ControllerGetCapabilities(
        self, request: csi.ControllerGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi.ControllerGetCapabilitiesResponse:
        return self._capabilities

    def CreateVolume(self, request: csi.CreateVolumeRequest, context: grpc.ServicerContext) -> csi.CreateVolumeResponse:
        made = self._provisioning.create(convert.create_request(request))
        return csi.CreateVolumeResponse(volume=convert.volume(made))

    def DeleteVolume(self, request: csi.DeleteVolumeRequest, context: grpc.ServicerContext) -> csi.DeleteVolumeResponse:
        self._provisioning.delete(convert.any_volume_id(request.volume_id))
        return csi.DeleteVolumeResponse()

    def ValidateVolumeCapabilities(
        self, request: csi.ValidateVolumeCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi.ValidateVolumeCapabilitiesResponse:
        if (reason := self._provisioning.refusal(*convert.validation(request))) is not None:
            return csi.ValidateVolumeCapabilitiesResponse(message=reason)
        return csi.ValidateVolumeCapabilitiesResponse(
            confirmed=csi.ValidateVolumeCapabilitiesResponse.Confirmed(
                volume_context=request.volume_context,
                volume_capabilities=request.volume_capabilities,
                parameters=request.parameters,
            )
        )

    def ListVolumes(self, request: csi.ListVolumesRequest, context: grpc.ServicerContext) -> csi.ListVolumesResponse:
        views, next_token = self._provisioning.list(request.max_entries, request.starting_token)
        entries = [
            csi.ListVolumesResponse.Entry(
                volume=convert.volume(view),
                status=csi.ListVolumesResponse.VolumeStatus(published_node_ids=view.published),
            )
            for view in views
        ]
        return csi.ListVolumesResponse(entries=entries, next_token=next_token)

    def ControllerGetVolume(
        self, request: csi.ControllerGetVolumeRequest, context: grpc.ServicerContext
    ) -> csi.ControllerGetVolumeResponse:
        found = self._provisioning.get(convert.known_volume_id(request.volume_id))
        return csi.ControllerGetVolumeResponse(
            volume=convert.volume(found),
            status=csi.ControllerGetVolumeResponse.VolumeStatus(published_node_ids=found.published),
        )

    def GetCapacity(self, request: csi.GetCapacityRequest, context: grpc.ServicerContext) -> csi.GetCapacityResponse:
        place = dict(request.accessible_topology.segments) if request.HasField("accessible_topology") else None
        wanted = tuple(map(convert.capability, request.volume_capabilities))
        room = self._provisioning.capacity(dict(request.parameters), place, wanted)
        return csi.GetCapacityResponse(
            available_capacity=room.available, maximum_volume_size=Int64Value(value=room.maximum)
        )

    def ControllerExpandVolume(
        self, request: csi.ControllerExpandVolumeRequest, context: grpc.ServicerContext
    ) -> csi.ControllerExpandVolumeResponse:
        capacity = self._provisioning.expand(*convert.growth(request))
        return csi.ControllerExpandVolumeResponse(capacity_bytes=capacity, node_expansion_required=True)


class AttachingControllerServicer(ControllerServicer):
    """The same for volumes outside the nodes, which a node has to be given first."""

    offered = (
        *_OFFERED,
        _Capability.RPC.PUBLISH_UNPUBLISH_VOLUME,
        _Capability.RPC.LIST_VOLUMES_PUBLISHED_NODES,
    )

    def __init__(self, provisioning: Provisioning, attachments: Attachments) -> None:
        super().__init__(provisioning)
        self._attachments = attachments

    def ControllerPublishVolume(
        self, request: csi.ControllerPublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.ControllerPublishVolumeResponse:
        given = self._attachments.attach(convert.attach_request(request))
        return csi.ControllerPublishVolumeResponse(publish_context=given)

    def ControllerUnpublishVolume(
        self, request: csi.ControllerUnpublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.ControllerUnpublishVolumeResponse:
        self._attachments.detach(*convert.detaching(request))
        return csi.ControllerUnpublishVolumeResponse()
