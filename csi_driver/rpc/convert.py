"""Messages of CSI and CSI-Addons to and from the use cases' own types.

Reading a message checks what can be checked without looking anything up. Raises InvalidArgument for what is missing or
cannot be right, FailedPrecondition for a secret that cannot, NotFound for a volume id that cannot be one of this
driver's.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from csi_driver.keys.secret import SecretKey, read_secret
from csi_driver.model.access import Access
from csi_driver.model.errors import FailedPrecondition, InvalidArgument, NotFound
from csi_driver.model.volume import is_volume_id, volume_id_for
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.volumes.attachment import AttachRequest
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.expand import ExpandRequest
from csi_driver.volumes.provision import CreateRequest, VolumeView
from csi_driver.volumes.publish import PublishRequest
from csi_driver.volumes.stage import StageRequest
from csi_driver.volumes.usage import Usage

if TYPE_CHECKING:
    from csi_driver.rpc import addons_keyrotation_pb2 as keyrotation

_MODES = frozenset(map(int, AccessMode))
_CLEAN_PATH = re.compile(r"(?:/[^/.\0][^/\0]*)+")
_UNITS = {"bytes": csi.VolumeUsage.BYTES, "inodes": csi.VolumeUsage.INODES}


def known_volume_id(text: str) -> str:
    """The id of a volume that has to exist."""
    if not text:
        raise InvalidArgument("the request has no volume_id")
    if not is_volume_id(text):
        raise NotFound(f"volume {text!r} does not exist: it is no id of this driver")
    return text


def any_volume_id(text: str) -> str:
    """The id for calls that undo, which succeed for volumes that never were.

    A foreign id becomes one that no volume has, so that what was asked to be cleaned is cleaned and nothing foreign
    reaches a path.
    """
    if not text:
        raise InvalidArgument("the request has no volume_id")
    return text if is_volume_id(text) else volume_id_for(f"\0{text}")


def path(field: str, text: str) -> str:
    """An absolute path as mountinfo would show it: no empty parts, no dots."""
    if _CLEAN_PATH.fullmatch(text):
        return text
    if not text:
        raise InvalidArgument(f"the request has no {field}")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if text[0] != "/" or not parts or ".." in parts or "\0" in text:
        raise InvalidArgument(f"the request's {field} is {text!r}; it must be an absolute path below /, without ..")
    return "/" + "/".join(parts)


def volume_path(text: str) -> str:
    """The path of a volume that is there already."""
    if text and text[0] != "/":
        raise NotFound(f"no volume is at {text!r}: it is no absolute path")
    return path("volume_path", text)


def capability(message: csi.VolumeCapability) -> Capability:
    """How a volume is to be used; an access mode that this driver cannot serve is left to the use case to refuse."""
    access = message.WhichOneof("access_type")
    if access is None:
        raise InvalidArgument("the volume capability has no access type; it must say block or mount")
    mode = message.access_mode.mode
    if mode not in _MODES:
        raise InvalidArgument(f"the volume capability has no access mode that CSI knows (it says {mode})")
    if access == "block":
        return Capability(mode=AccessMode(mode), block=True)
    mount = message.mount
    if mount.volume_mount_group:
        raise InvalidArgument(
            "the volume capability has a volume_mount_group; this driver leaves ownership to kubelet (fsGroup)"
        )
    return Capability(
        mode=AccessMode(mode), block=False, fs_type=mount.fs_type or None, mount_flags=tuple(mount.mount_flags)
    )


def capabilities(messages: Iterable[csi.VolumeCapability]) -> tuple[Capability, ...]:
    """All of them, and at least one."""
    found = tuple(capability(message) for message in messages)
    if not found:
        raise InvalidArgument("the request has no volume_capabilities")
    return found


def create_request(request: csi.CreateVolumeRequest) -> CreateRequest:
    """CreateVolume, as far as this version offers it."""
    if not request.name:
        raise InvalidArgument("the request has no name")
    if request.HasField("volume_content_source"):
        raise InvalidArgument(
            f"volume {request.name} is to start from a snapshot or another volume, which this version does not offer"
        )
    _refuse_mutable(request.mutable_parameters)
    wish = request.accessibility_requirements
    return CreateRequest(
        name=request.name,
        required_bytes=request.capacity_range.required_bytes,
        limit_bytes=request.capacity_range.limit_bytes,
        capabilities=capabilities(request.volume_capabilities),
        parameters=dict(request.parameters),
        key=read_secret(request.secrets),
        topologies=tuple(dict(topology.segments) for topology in wish.requisite or wish.preferred),
    )


def access(request: Any) -> Access:
    """What a request brings to reach the volume's storage: whichever of the fields its message has."""
    wish = getattr(request, "accessibility_requirements", None)
    return Access(
        secrets=dict(request.secrets),
        volume_context=dict(getattr(request, "volume_context", {})),
        publish_context=dict(getattr(request, "publish_context", {})),
        topologies=tuple(dict(one.segments) for one in (*wish.preferred, *wish.requisite)) if wish else (),
    )


def attach_request(request: csi.ControllerPublishVolumeRequest) -> AttachRequest:
    """ControllerPublishVolume."""
    _require(request.volume_id, "volume_id")
    _require(request.node_id, "node_id")
    wanted = _one_capability(request)
    return AttachRequest(
        volume_id=known_volume_id(request.volume_id),
        node_id=request.node_id,
        capability=wanted,
        read_only=request.readonly,
        context=dict(request.volume_context),
    )


def detaching(request: csi.ControllerUnpublishVolumeRequest) -> tuple[str, str]:
    """ControllerUnpublishVolume: the volume's id and the node's, "" for all."""
    return any_volume_id(request.volume_id), request.node_id


def growth(request: csi.ControllerExpandVolumeRequest) -> tuple[str, int, int]:
    """ControllerExpandVolume: the volume's id, the bytes required and, 0 for none, the limit in bytes."""
    volume_id = known_volume_id(request.volume_id)
    if not request.HasField("capacity_range"):
        raise InvalidArgument(f"the request has no capacity_range, so volume {volume_id} has no new size")
    return volume_id, request.capacity_range.required_bytes, request.capacity_range.limit_bytes


def validation(
    request: csi.ValidateVolumeCapabilitiesRequest,
) -> tuple[str, dict[str, str], dict[str, str], tuple[Capability, ...]]:
    """ValidateVolumeCapabilities: the volume's id, context, parameters and capabilities."""
    if not request.volume_id:
        raise InvalidArgument("the request has no volume_id")
    wanted = capabilities(request.volume_capabilities)
    _refuse_mutable(request.mutable_parameters)
    return known_volume_id(request.volume_id), dict(request.volume_context), dict(request.parameters), wanted


def stage_request(request: csi.NodeStageVolumeRequest) -> StageRequest:
    """NodeStageVolume."""
    _require(request.volume_id, "volume_id")
    staging_path = path("staging_target_path", request.staging_target_path)
    wanted = _one_capability(request)
    return StageRequest(
        volume_id=known_volume_id(request.volume_id),
        staging_path=staging_path,
        capability=wanted,
        key=read_secret(request.secrets),
        context=dict(request.volume_context),
    )


def unstaging(request: csi.NodeUnstageVolumeRequest) -> tuple[str, str]:
    """NodeUnstageVolume: the volume's id and the staging path."""
    return any_volume_id(request.volume_id), path("staging_target_path", request.staging_target_path)


def publish_request(request: csi.NodePublishVolumeRequest) -> PublishRequest:
    """NodePublishVolume. Raises FailedPrecondition without a staging path, as the CSI spec wants."""
    _require(request.volume_id, "volume_id")
    target_path = path("target_path", request.target_path)
    wanted = _one_capability(request)
    if not request.staging_target_path:
        raise FailedPrecondition("the request has no staging_target_path; this driver stages volumes first")
    return PublishRequest(
        volume_id=known_volume_id(request.volume_id),
        staging_path=path("staging_target_path", request.staging_target_path),
        target_path=target_path,
        capability=wanted,
        read_only=request.readonly,
        context=dict(request.volume_context),
    )


def unpublishing(request: csi.NodeUnpublishVolumeRequest) -> tuple[str, str]:
    """NodeUnpublishVolume: the volume's id and the target path."""
    return any_volume_id(request.volume_id), path("target_path", request.target_path)


def expand_request(request: csi.NodeExpandVolumeRequest) -> ExpandRequest:
    """NodeExpandVolume, where all but id and path may be missing."""
    _require(request.volume_id, "volume_id")
    _require(request.volume_path, "volume_path")
    staging = request.staging_target_path
    return ExpandRequest(
        volume_id=known_volume_id(request.volume_id),
        volume_path=volume_path(request.volume_path),
        required_bytes=request.capacity_range.required_bytes,
        limit_bytes=request.capacity_range.limit_bytes,
        key=read_secret(request.secrets),
        staging_path=path("staging_target_path", staging) if staging else "",
        capability=capability(request.volume_capability) if request.HasField("volume_capability") else None,
    )


def usage_question(request: csi.NodeGetVolumeStatsRequest) -> tuple[str, str]:
    """NodeGetVolumeStats: the volume's id and where it is."""
    _require(request.volume_id, "volume_id")
    _require(request.volume_path, "volume_path")
    return known_volume_id(request.volume_id), volume_path(request.volume_path)


def rotation(request: "keyrotation.EncryptionKeyRotateRequest") -> tuple[str, SecretKey]:
    """EncryptionKeyRotate of CSI-Addons: the volume's id and its secret. Path, context and capability decide nothing.

    Raises InvalidArgument for a key that the caller has chosen: it would be kept nowhere.
    """
    volume_id = known_volume_id(request.volume_id)
    if request.encryption_key:
        raise InvalidArgument(
            f"the request for volume {volume_id} has an encryption_key; leave it out, the KMS makes the new key, or "
            f"the secret holds the new passphrase"
        )
    return volume_id, read_secret(request.secrets)


def volume(view: VolumeView) -> csi.Volume:
    """A volume as the controller shows it."""
    return csi.Volume(
        volume_id=view.record.id,
        capacity_bytes=view.record.capacity_bytes,
        volume_context=view.context,
        accessible_topology=[csi.Topology(segments=segments) for segments in view.places],
    )


def usage(count: Usage) -> csi.VolumeUsage:
    """One count of a volume; what is not known stays 0."""
    return csi.VolumeUsage(
        unit=_UNITS[count.unit], total=count.total, used=count.used or 0, available=count.available or 0
    )


def _one_capability(
    request: csi.ControllerPublishVolumeRequest | csi.NodeStageVolumeRequest | csi.NodePublishVolumeRequest,
) -> Capability:
    if not request.HasField("volume_capability"):
        raise InvalidArgument("the request has no volume_capability")
    return capability(request.volume_capability)


def _require(value: str, field: str) -> None:
    if not value:
        raise InvalidArgument(f"the request has no {field}")


def _refuse_mutable(parameters: object) -> None:
    if parameters:
        raise InvalidArgument("the request has mutable_parameters; this version offers no VolumeAttributesClass")
