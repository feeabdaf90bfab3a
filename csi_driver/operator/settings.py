"""What an administrator can set of `luks-csi operator`; `csi_driver.cli.operator` gives each an option."""

from dataclasses import dataclass
from enum import StrEnum


class Profile(StrEnum):
    """Whose rules hold at admission, where the documents of Longhorn and Harvester contradict each other."""

    LONGHORN = "longhorn"
    HARVESTER = "harvester"


@dataclass(frozen=True)
class OperatorSettings:
    """Times in seconds. `backing_image_namespace` is where BackingImages lie, those of VirtualMachineImages too.

    A copy counts no more when its node has had no agent for `lost_seconds`. One more than wanted is removed when no
    volume was made of it for `unused_seconds`, with 0 never.
    """

    namespace: str = "luks-csi"
    driver_name: str = "luks.csi.internal"
    backing_image_namespace: str = "longhorn-system"
    profile: Profile = Profile.LONGHORN
    lost_seconds: float = 300.0
    unused_seconds: float = 3600.0
