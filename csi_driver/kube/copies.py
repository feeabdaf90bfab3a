"""ImageCopy objects: one node's file of an Image."""

import hashlib
from enum import StrEnum
from typing import Final

from csi_driver.kube.kinds import FINALIZER, IMAGE, IMAGE_LABEL, MANAGED_BY, MANAGER, Json, name_of, uid_of

AUDIENCE: Final = "images.luks.csi.internal"
"""Of the tokens by which agents know each other."""
AGENTS: Final = "agents.images.luks.csi.internal"
"""The name in the certificate of each agent: they are found by address, and trusted by this name."""
AUTHORITY: Final = "luks-csi-image-ca"
"""The ConfigMap of the driver's namespace with the certificate (ca.crt) that agents' certificates are signed by."""
FACTS: Final = ("format", "fileSize", "virtualSize", "encrypted", "luksUUID", "cipher", "secret", "checksum")
"""What a copy that is ready tells of the image, and its Image with it."""


class State(StrEnum):
    """How far a copy is."""

    PENDING = "Pending"
    AWAITING_UPLOAD = "AwaitingUpload"
    IN_PROGRESS = "InProgress"
    READY = "Ready"
    FAILED = "Failed"


def copy_of(
    image: Json, node: str, *, make: bool = False, volume: str | None = None, secret: Json | None = None
) -> Json:
    """The object for an image's copy on a node: made there from the image's source, or pulled from another node.

    `volume` is the one whose content it is made of, `secret` (name, namespace) what opens that.
    """
    name, uid = name_of(image), uid_of(image)
    digest = hashlib.sha256(f"{uid}/{node}/{make}".encode()).hexdigest()[:10]
    return {
        "metadata": {
            "name": f"{name}.{digest}",
            "labels": {IMAGE_LABEL: name, MANAGED_BY: MANAGER},
            "finalizers": [FINALIZER],
            "ownerReferences": [
                {"apiVersion": IMAGE.api_version, "kind": IMAGE.name, "name": name, "uid": uid, "controller": True}
            ],
        },
        "spec": {"image": name, "imageUID": uid, "node": node, "make": make}
        | ({"volume": volume} if volume else {})
        | ({"secretRef": secret} if secret else {}),
    }


def state_of(copy: Json) -> State:
    """Its state; Pending while its agent has not looked at it."""
    return State(copy.get("status", {}).get("state", State.PENDING))


def is_of(copy: Json, image: Json) -> bool:
    """Whether it is a copy of this very Image, not of an earlier one of its name."""
    return bool(copy["spec"]["image"] == name_of(image) and copy["spec"]["imageUID"] == uid_of(image))
