"""What a VirtualMachineImage's StorageClass may say: the parameters that are taken over from another class, and the
secrets among them.
"""

from collections.abc import Mapping
from typing import Final

ENCRYPTED: Final = "encrypted"
_SECRET_OPERATIONS: Final = ("provisioner", "node-stage", "node-publish")
"""Each needs the image's secret; a class may name it for node-expand too."""
_EXPAND: Final = "node-expand"


def secret_keys(operation: str) -> tuple[str, str]:
    """The parameters that name the secret of one operation of CSI: its name, its namespace."""
    return f"csi.storage.k8s.io/{operation}-secret-name", f"csi.storage.k8s.io/{operation}-secret-namespace"


SECRET_PARAMETERS: Final = frozenset(key for each in (*_SECRET_OPERATIONS, _EXPAND) for key in secret_keys(each))
TAKEN_OVER: Final = SECRET_PARAMETERS | {
    ENCRYPTED, "numberOfReplicas", "staleReplicaTimeout", "migratable", "diskSelector", "nodeSelector", "dataLocality",
}  # fmt: skip
"""The parameters of a class that a VirtualMachineImage takes over."""


def secret_of(parameters: Mapping[str, str], operation: str = "node-publish") -> tuple[str, str] | None:
    """Name and namespace of the secret that they name for an operation; None unless both are there."""
    name, namespace = (parameters.get(key, "") for key in secret_keys(operation))
    return (name, namespace) if name and namespace else None


def verified(parameters: Mapping[str, str], *, encrypted: bool, secret: str | None) -> dict[str, str]:
    """The parameters of a class for an image of which this was verified: whether it is encrypted, and the secret
    (NAMESPACE/NAME) that opens it, where that is known. What they said of it themselves does not count.
    """
    found = {key: value for key, value in parameters.items() if key in TAKEN_OVER - SECRET_PARAMETERS}
    found[ENCRYPTED] = "true" if encrypted else "false"
    if not encrypted:
        return found
    for operation in (*_SECRET_OPERATIONS, _EXPAND):
        pair = secret_of(parameters, operation)
        if secret and (pair or operation != _EXPAND):
            namespace, _, name = secret.partition("/")
            pair = (name, namespace)
        found |= dict(zip(secret_keys(operation), pair or (), strict=False))
    return found
