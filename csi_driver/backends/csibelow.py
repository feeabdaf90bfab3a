"""What must be so of a driver below, and of a volume of its, for nodes to call it themselves instead of a holder pod.

Kubelet gives a driver more than CSI says: what its CSIDriver object and its PersistentVolumes ask for. Nodes give what
stands in a VolumeRecord and nothing else, so whatever asks for more is refused before anything is made.
"""

from collections.abc import Mapping
from typing import Final

from csi_driver.backends.csipins import Direct
from csi_driver.kube.kinds import Json, name_of
from csi_driver.model.errors import FailedPrecondition

DIRECT: Final = "direct"
"""The value of the class parameter backingAttach."""
_CURE: Final = "leave backingAttach out of the class, and holder pods are used"
_WANTED: Final[Mapping[str, str]] = {
    "podInfoOnMount": "wants to know the pod that uses a volume",
    "tokenRequests": "wants tokens of the pod that uses a volume",
    "requiresRepublish": "wants its volumes to be published again and again",
}
_SECRETS: Final = ("nodeStageSecretRef", "nodePublishSecretRef", "nodeExpandSecretRef")
_RESIZING: Final = ("Resizing", "FileSystemResizePending", "ControllerResizeError", "NodeResizeError")
_PENDING: Final = "FileSystemResizePending"


def refuse_driver(volume_id: str, driver: str, found: Json | None) -> None:
    """Raise FailedPrecondition where nodes cannot call that driver, by its CSIDriver object, themselves."""
    spec = (found or {}).get("spec", {})
    why = [words for name, words in _WANTED.items() if spec.get(name)]
    if spec.get("attachRequired", True):
        why = [f"wants its volumes attached ({'attachRequired: true' if found else 'it has no CSIDriver object'})"]
    if why:
        raise FailedPrecondition(
            f"volume {volume_id} cannot have backingAttach: direct: the driver {driver} below {why[0]}, and that only "
            f"Kubernetes does; {_CURE}"
        )


def read_direct(volume_id: str, volume: Json) -> Direct:
    """What nodes tell the driver of a PersistentVolume. Raises FailedPrecondition where it asks for more."""
    source, name = volume["spec"].get("csi"), name_of(volume)
    refused = f"volume {volume_id} cannot have backingAttach: direct: the volume {name} below"
    if source is None:
        raise FailedPrecondition(f"{refused} is of no CSI driver; {_CURE}")
    if secrets := [each for each in _SECRETS if source.get(each)]:
        raise FailedPrecondition(
            f"{refused} needs a secret on its node ({secrets[0]}), and secrets of other drivers are not read; {_CURE}"
        )
    if source.get("readOnly"):
        raise FailedPrecondition(f"{refused} is read-only; name a backingStorageClass whose volumes can be written to")
    return Direct(
        driver=source["driver"], handle=source["volumeHandle"], context=dict(source.get("volumeAttributes") or {})
    )


def changed(volume_id: str, name: str, direct: Direct) -> FailedPrecondition:
    """That what nodes were to tell holds no more."""
    return FailedPrecondition(
        f"volume {volume_id} cannot be given to a node: its VolumeRecord says that {name} below is volume "
        f"{direct.handle} of {direct.driver}, and the PersistentVolume of that name is gone or says something else; "
        f"restore it from a backup"
    )


def is_waiting_for_node(claim: Json) -> bool:
    """Whether a claim's volume was enlarged and only a node, as far as its resizer knows, has something left to do."""
    status = claim.get("status", {})
    told = str(status.get("allocatedResourceStatuses", {}).get("storage", ""))
    return told.startswith("NodeResize") or any(each.get("type") == _PENDING for each in status.get("conditions", ()))


def refused_size(claim: Json) -> str | None:
    """The size, a quantity, of which a claim's resizer says that its driver will never make it; None without one."""
    status = claim.get("status", {})
    if status.get("allocatedResourceStatuses", {}).get("storage") != "ControllerResizeInfeasible":
        return None
    return str(status.get("allocatedResources", {}).get("storage"))


def settled(claim: Json, capacity: str) -> Json:
    """The change of a claim's status that ends that, as kubelet makes it."""
    kept = [each for each in claim.get("status", {}).get("conditions", ()) if each.get("type") not in _RESIZING]
    status = {
        "capacity": {"storage": capacity},
        "conditions": kept or None,
        "allocatedResourceStatuses": {"storage": None},
    }
    return {"metadata": {"resourceVersion": claim["metadata"]["resourceVersion"]}, "status": status}
