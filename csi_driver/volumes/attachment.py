"""ControllerPublishVolume and ControllerUnpublishVolume: which node may have a volume that lies outside the nodes."""

from collections.abc import Mapping

from msgspec import Struct

from csi_driver.backends.base import Backend, SharedStorage, shared
from csi_driver.host.log import log
from csi_driver.model.errors import DeviceInUse, InvalidArgument
from csi_driver.volumes import capability as capabilities
from csi_driver.volumes.capability import Capability
from csi_driver.volumes.context import check_context
from csi_driver.volumes.moved import refuse_giving


class AttachRequest(Struct, frozen=True):
    """What ControllerPublishVolume brings."""

    volume_id: str
    node_id: str
    capability: Capability
    read_only: bool
    context: Mapping[str, str]


class Attachments:
    """Gives volumes to nodes and takes them away; callers hold the volume's lock. `storage` is `backend` itself."""

    def __init__(self, backend: Backend, storage: SharedStorage) -> None:
        self._backend = backend
        self._storage = storage

    def attach(self, request: AttachRequest) -> Mapping[str, str]:
        """Let the node have the volume; returns the publish context, which comes with the node's calls.

        Raises NotFound, InvalidArgument, FailedPrecondition naming the node that has it.
        """
        capabilities.check([request.capability], many_nodes=self._storage.takes_many_nodes)
        if request.read_only:
            # Nothing on the node would know: whoever mounts read-only says so in NodePublishVolume.
            raise InvalidArgument(
                f"volume {request.volume_id} cannot be given to a node for reading alone; mount it read-only there "
                f"instead"
            )
        record = self._backend.get(request.volume_id)
        check_context(record, request.context)
        refuse_giving(record)
        many_nodes = request.capability.many_nodes
        given = self._storage.publish(request.volume_id, request.node_id, many_nodes=many_nodes)
        log.info("volume attached", volume_id=request.volume_id, node=request.node_id)
        return given

    def detach(self, volume_id: str, node_id: str) -> None:
        """Take the volume from the node, from all where none is named; a volume that is gone is fine."""
        self._storage.unpublish(volume_id, node_id)
        log.info("volume detached", volume_id=volume_id, node=node_id or "all")


def refuse_many_nodes(backend: Backend, volume_id: str) -> None:
    """Raise DeviceInUse where several nodes have the volume: no look at this one tells what the others write."""
    outside = shared(backend)
    nodes = outside.published(volume_id) if outside is not None and outside.takes_many_nodes else ()
    if len(nodes) > 1:
        raise DeviceInUse(
            f"volume {volume_id} is left as it is: it was given to the nodes {' and '.join(nodes)}, and this is for a "
            f"volume that one node has; end what uses it on the others, then call again"
        )
