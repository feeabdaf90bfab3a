"""What a pod asks of a volume, free of gRPC."""

from collections.abc import Sequence
from enum import IntEnum

from msgspec import Struct

from csi_driver.host.mountoptions import MountOptions, parse_options
from csi_driver.model.errors import InvalidArgument
from csi_driver.volumes.parameters import FILE_SYSTEMS


class AccessMode(IntEnum):
    """VolumeCapability.AccessMode.Mode of the CSI spec, by its wire numbers."""

    SINGLE_NODE_WRITER = 1
    SINGLE_NODE_READER_ONLY = 2
    MULTI_NODE_READER_ONLY = 3
    MULTI_NODE_SINGLE_WRITER = 4
    MULTI_NODE_MULTI_WRITER = 5
    SINGLE_NODE_SINGLE_WRITER = 6
    SINGLE_NODE_MULTI_WRITER = 7


_MULTI_NODE = frozenset(
    {AccessMode.MULTI_NODE_READER_ONLY, AccessMode.MULTI_NODE_SINGLE_WRITER, AccessMode.MULTI_NODE_MULTI_WRITER}
)
_KUBERNETES_NAMES = {
    AccessMode.MULTI_NODE_READER_ONLY: "ReadOnlyMany",
    AccessMode.MULTI_NODE_MULTI_WRITER: "ReadWriteMany",
}


class Capability(Struct, frozen=True):
    """Access mode and type. For a mount: file system (None: the volume's own) and mountOptions as given."""

    mode: AccessMode
    block: bool
    fs_type: str | None = None
    mount_flags: tuple[str, ...] = ()

    @property
    def many_nodes(self) -> bool:
        """Whether the mode lets several nodes have the volume at once."""
        return self.mode in _MULTI_NODE

    @property
    def reader_only(self) -> bool:
        """Whether the mode lets nobody write."""
        return self.mode is AccessMode.SINGLE_NODE_READER_ONLY

    def options(self, fs_type: str) -> MountOptions:
        """The mountOptions for mount(2). Raises InvalidArgument outside the allow-list."""
        return parse_options(self.mount_flags, fs_type)


def refusal(capability: Capability, *, many_nodes: bool = False) -> str | None:
    """Why a volume cannot have this capability, in one sentence; None when it can.

    With `many_nodes` a block volume may be written on several nodes at once.
    """
    if capability.many_nodes:
        name = _KUBERNETES_NAMES.get(capability.mode, capability.mode.name)
        if not many_nodes:
            return (
                f"the access mode {name} needs a volume on several nodes, and a volume of this backend lives on one "
                f"node"
            )
        if not (capability.block and capability.mode is AccessMode.MULTI_NODE_MULTI_WRITER):
            return (
                f"the access mode {name} is not offered on several nodes for such a volume: ReadWriteMany with "
                f"volumeMode Block is, as file systems here are for one node"
            )
    if not capability.block and capability.fs_type not in (None, *FILE_SYSTEMS):
        return f"the file system {capability.fs_type} is not offered; choose one of {', '.join(FILE_SYSTEMS)}"
    if not capability.block:
        try:
            parse_options(capability.mount_flags, capability.fs_type)
        except InvalidArgument as error:
            return str(error)
    return None


def check(capabilities: Sequence[Capability], *, many_nodes: bool = False) -> None:
    """Raise InvalidArgument for the first capability that cannot be had."""
    for capability in capabilities:
        if reason := refusal(capability, many_nodes=many_nodes):
            raise InvalidArgument(reason)
