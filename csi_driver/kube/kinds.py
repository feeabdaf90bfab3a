"""The kinds of Kubernetes objects that are used here, and what operator and agents write into their metadata."""

from dataclasses import dataclass
from typing import Any, Final

Json = dict[str, Any]
"""An object of the API, or a part of one, as it is on the wire."""

GROUP: Final = "images.luks.csi.internal"
VERSION: Final = "v1alpha1"


@dataclass(frozen=True)
class Kind:
    """A kind of object; `group` is "" for the core ones."""

    group: str
    version: str
    name: str
    plural: str
    namespaced: bool = False

    @property
    def api_version(self) -> str:
        """As `apiVersion` has it."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def __str__(self) -> str:
        return self.name


IMAGE: Final = Kind(GROUP, VERSION, "Image", "images")
IMAGE_COPY: Final = Kind(GROUP, VERSION, "ImageCopy", "imagecopies")
BACKING_IMAGE: Final = Kind("longhorn.io", "v1beta2", "BackingImage", "backingimages", namespaced=True)
VIRTUAL_MACHINE_IMAGE: Final = Kind(
    "harvesterhci.io", "v1beta1", "VirtualMachineImage", "virtualmachineimages", namespaced=True
)
CRD: Final = Kind("apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions")
NODE: Final = Kind("", "v1", "Node", "nodes")
POD: Final = Kind("", "v1", "Pod", "pods", namespaced=True)
SECRET: Final = Kind("", "v1", "Secret", "secrets", namespaced=True)
CONFIG_MAP: Final = Kind("", "v1", "ConfigMap", "configmaps", namespaced=True)
CLAIM: Final = Kind("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims", namespaced=True)
VOLUME: Final = Kind("", "v1", "PersistentVolume", "persistentvolumes")
EVENT: Final = Kind("", "v1", "Event", "events", namespaced=True)
NAMESPACE: Final = Kind("", "v1", "Namespace", "namespaces")
STORAGE_CLASS: Final = Kind("storage.k8s.io", "v1", "StorageClass", "storageclasses")
VOLUME_RECORD: Final = Kind("volumes.luks.csi.internal", VERSION, "VolumeRecord", "volumerecords", namespaced=True)
HEADER_PIECE: Final = Kind("volumes.luks.csi.internal", VERSION, "HeaderPiece", "headerpieces", namespaced=True)
CSI_NODE: Final = Kind("storage.k8s.io", "v1", "CSINode", "csinodes")
CSI_DRIVER: Final = Kind("storage.k8s.io", "v1", "CSIDriver", "csidrivers")
ACCESS_REVIEW: Final = Kind("authorization.k8s.io", "v1", "SubjectAccessReview", "subjectaccessreviews")
TOKEN_REVIEW: Final = Kind("authentication.k8s.io", "v1", "TokenReview", "tokenreviews")
MUTATING: Final = Kind(
    "admissionregistration.k8s.io", "v1", "MutatingWebhookConfiguration", "mutatingwebhookconfigurations"
)
VALIDATING: Final = Kind(
    "admissionregistration.k8s.io", "v1", "ValidatingWebhookConfiguration", "validatingwebhookconfigurations"
)

FINALIZER: Final = f"{GROUP}/files"
"""Keeps an Image, or a copy of one, until the files on the nodes are gone."""
ORIGIN: Final = f"{GROUP}/origin"
"""Annotation of an Image that another object stands for: KIND/NAMESPACE/NAME/UID."""
MANAGED_BY: Final = "app.kubernetes.io/managed-by"
MANAGER: Final = "luks-csi"
IMAGE_LABEL: Final = f"{GROUP}/image"
"""Label of a copy: the name of its Image."""


def name_of(thing: Json) -> str:
    """An object's name."""
    return str(thing["metadata"]["name"])


def uid_of(thing: Json) -> str:
    """An object's uid: another one of the same name has another."""
    return str(thing["metadata"].get("uid", ""))


def is_going(thing: Json) -> bool:
    """Whether its deletion was asked for."""
    return bool(thing["metadata"].get("deletionTimestamp"))


def has_finalizer(thing: Json, finalizer: str = FINALIZER) -> bool:
    """Whether the finalizer is there."""
    return finalizer in thing["metadata"].get("finalizers", ())
