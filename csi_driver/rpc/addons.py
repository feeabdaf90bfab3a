"""The services of CSI-Addons: who the driver is there, and new keys for volumes. Imported only where they are served.

CSI-Addons is github.com/csi-addons/spec; its caller is the sidecar of github.com/csi-addons/kubernetes-csi-addons.
"""

from collections.abc import Callable

import grpc
from google.protobuf.wrappers_pb2 import BoolValue

from csi_driver import __version__
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.settings import Settings
from csi_driver.rpc import addons_identity_pb2 as identity
from csi_driver.rpc import addons_identity_pb2_grpc as identity_grpc
from csi_driver.rpc import addons_keyrotation_pb2 as keyrotation
from csi_driver.rpc import addons_keyrotation_pb2_grpc as keyrotation_grpc
from csi_driver.rpc.convert import rotation
from csi_driver.volumes.rotation import KeyRotation

_Capability = identity.Capability


class AddonsIdentityServicer(identity_grpc.IdentityServicer):
    """As `IdentityServicer`, in the words of CSI-Addons."""

    def __init__(self, settings: Settings, obstacle: Callable[[], str | None]) -> None:
        self._obstacle = obstacle
        self._info = identity.GetIdentityResponse(name=settings.driver_name, vendor_version=__version__)
        # No CONTROLLER_SERVICE: the sidecars of all nodes would elect one, and a key is changed where its volume is.
        self._capabilities = identity.GetCapabilitiesResponse(
            capabilities=[
                _Capability(service=_Capability.Service(type=_Capability.Service.NODE_SERVICE)),
                _Capability(
                    encryption_key_rotation=_Capability.EncryptionKeyRotation(
                        type=_Capability.EncryptionKeyRotation.ENCRYPTIONKEYROTATION
                    )
                ),
            ]
        )
        self._ready = identity.ProbeResponse(ready=BoolValue(value=True))

    def GetIdentity(
        self, request: identity.GetIdentityRequest, context: grpc.ServicerContext
    ) -> identity.GetIdentityResponse:
        return self._info

    def GetCapabilities(
        self, request: identity.GetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> identity.GetCapabilitiesResponse:
        return self._capabilities

    def Probe(self, request: identity.ProbeRequest, context: grpc.ServicerContext) -> identity.ProbeResponse:
        if (obstacle := self._obstacle()) is not None:
            raise FailedPrecondition(obstacle)
        return self._ready


class KeyRotationServicer(keyrotation_grpc.EncryptionKeyRotationControllerServicer):
    """A new key for a volume of this node."""

    def __init__(self, rotation: KeyRotation) -> None:
        self._rotation = rotation

    def EncryptionKeyRotate(
        self, request: keyrotation.EncryptionKeyRotateRequest, context: grpc.ServicerContext
    ) -> keyrotation.EncryptionKeyRotateResponse:
        self._rotation.rotate(*rotation(request))
        return keyrotation.EncryptionKeyRotateResponse()


def servicers(
    settings: Settings, obstacle: Callable[[], str | None], rotation: KeyRotation
) -> list[Callable[[grpc.Server], None]]:
    """What puts both services into a gRPC server."""
    own, keys = AddonsIdentityServicer(settings, obstacle), KeyRotationServicer(rotation)
    return [
        lambda server: identity_grpc.add_IdentityServicer_to_server(own, server),
        lambda server: keyrotation_grpc.add_EncryptionKeyRotationControllerServicer_to_server(keys, server),
    ]
