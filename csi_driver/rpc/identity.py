"""The Identity service: who the driver is, and whether it works."""

from collections.abc import Callable

import grpc
from google.protobuf.wrappers_pb2 import BoolValue

from csi_driver import __version__
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.settings import Service, Settings
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc import csi_pb2_grpc

_Service = csi.PluginCapability.Service
_Expansion = csi.PluginCapability.VolumeExpansion


class IdentityServicer(csi_pb2_grpc.IdentityServicer):
    """Answers for the driver as a whole; `obstacle` tells why it cannot work, None when it can."""

    def __init__(self, settings: Settings, obstacle: Callable[[], str | None]) -> None:
        self._obstacle = obstacle
        self._info = csi.GetPluginInfoResponse(name=settings.driver_name, vendor_version=__version__)
        offered = [_Service.CONTROLLER_SERVICE] if Service.CONTROLLER in settings.services else []
        self._capabilities = csi.GetPluginCapabilitiesResponse(
            capabilities=[
                *(
                    csi.PluginCapability(service=_Service(type=kind))
                    for kind in (*offered, _Service.VOLUME_ACCESSIBILITY_CONSTRAINTS)
                ),
                csi.PluginCapability(volume_expansion=_Expansion(type=_Expansion.ONLINE)),
            ]
        )
        self._ready = csi.ProbeResponse(ready=BoolValue(value=True))

    def GetPluginInfo(
        self, request: csi.GetPluginInfoRequest, context: grpc.ServicerContext
    ) -> csi.GetPluginInfoResponse:
        return self._info

    def GetPluginCapabilities(
        self, request: csi.GetPluginCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi.GetPluginCapabilitiesResponse:
        return self._capabilities

    def Probe(self, request: csi.ProbeRequest, context: grpc.ServicerContext) -> csi.ProbeResponse:
        if (obstacle := self._obstacle()) is not None:
            raise FailedPrecondition(obstacle)
        return self._ready
