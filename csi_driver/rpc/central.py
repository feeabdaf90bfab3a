"""The Controller service of `luks-csi controller`, which is central: it reaches no node and looks nothing up."""

import grpc

from csi_driver.model.errors import InvalidArgument, OutOfRange
from csi_driver.rpc import convert, csi_pb2_grpc
from csi_driver.rpc import csi_pb2 as csi

_Capability = csi.ControllerServiceCapability


class CentralControllerServicer(csi_pb2_grpc.ControllerServicer):
    """ControllerExpandVolume alone: the volume's node does the work in NodeExpandVolume, and checks the space."""

    def ControllerGetCapabilities(
        self, request: csi.ControllerGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi.ControllerGetCapabilitiesResponse:
        return csi.ControllerGetCapabilitiesResponse(
            capabilities=[_Capability(rpc=_Capability.RPC(type=_Capability.RPC.EXPAND_VOLUME))]
        )

    def ControllerExpandVolume(
        self, request: csi.ControllerExpandVolumeRequest, context: grpc.ServicerContext
    ) -> csi.ControllerExpandVolumeResponse:
        volume_id, required, limit = convert.growth(request)
        if required <= 0:
            raise InvalidArgument(f"volume {volume_id} cannot have {required} bytes; ask for a size above 0")
        if limit and required > limit:
            raise OutOfRange(f"volume {volume_id} cannot have {required} bytes and at most {limit}; raise the limit")
        return csi.ControllerExpandVolumeResponse(capacity_bytes=required, node_expansion_required=True)
