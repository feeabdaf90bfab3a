"""What a new image would be made with: the secrets, sources and claims that its user must be allowed to read himself,
so that nobody has the operator read for him what he may not.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from csi_driver.kube.kinds import (
    BACKING_IMAGE,
    CLAIM,
    CONFIG_MAP,
    IMAGE,
    POD,
    SECRET,
    STORAGE_CLASS,
    VIRTUAL_MACHINE_IMAGE,
    VOLUME,
    Json,
    Kind,
)
from csi_driver.operator.admission.lookups import Cluster
from csi_driver.operator.users import Place, is_template, parameters_of, secret_pairs, secrets_of_class

CLASS_NAME: Final = "harvesterhci.io/storageClassName"
"""Annotation of a VirtualMachineImage: the class whose parameters it takes over."""

_OWN_NAMESPACE: Final = "${pvc.namespace}"
"""Of a class's secret: where whoever may have pods may read secrets by them."""


@dataclass(frozen=True)
class Need:
    """An object that the user must be allowed to `get`; all of its kind where the name is "", in one namespace or in
    all. Or another verb.
    """

    kind: Kind
    namespace: str
    name: str
    verb: str = "get"

    def __str__(self) -> str:
        place = "/".join(filter(None, (self.namespace, self.name)))
        within = f" of namespace {self.namespace}" if self.namespace else ""
        all_of_them = f"every {self.kind}{within}" if self.verb == "get" else f"{self.kind}s{within}"
        return f"{self.verb} of {self.kind} {place}" if self.name else f"{self.verb} of {all_of_them}"


def of_image(spec: Json) -> list[Need]:
    """Of an Image."""
    source = spec.get("source") or {}
    download = source.get("download") or {}
    references = [spec.get("secretRef"), spec.get("newSecretRef"), download.get("credentialsRef")]
    needs = [*_secrets(map(_place, filter(None, references)))]
    if download.get("caConfigMapRef"):
        needs.append(Need(CONFIG_MAP, *_place(download["caConfigMapRef"])))
    if source.get("claim"):
        needs += _claim(*_place(source["claim"]))
    if source.get("clone"):
        needs.append(Need(IMAGE, "", source["clone"].get("image", "")))
    return needs


def of_backing_image(backing: Json, cluster: Cluster) -> list[Need]:
    """Of a BackingImage."""
    spec = backing["spec"]
    parameters: Mapping[str, str] = spec.get("sourceParameters") or {}
    named = [
        (parameters.get("secret-namespace", ""), parameters.get("secret", "")),
        (spec.get("secretNamespace", ""), spec.get("secret", "")),
    ]
    needs = [*_secrets(place for place in named if place[1])]
    if spec.get("sourceType") == "clone":
        namespace = backing["metadata"].get("namespace", "")
        needs.append(Need(BACKING_IMAGE, namespace, parameters.get("backing-image", "")))
    if spec.get("sourceType") == "export-from-volume":
        needs += _claim_of(parameters.get("volume-name", ""), cluster)
    return needs


def _claim_of(volume_name: str, cluster: Cluster) -> list[Need]:
    """The claim of a PersistentVolume; where it has none yet nobody knows whose it will be."""
    volume = cluster.get(VOLUME, volume_name) if volume_name else None
    claim = (volume or {"spec": {}})["spec"].get("claimRef")
    return _claim(*_place(claim)) if claim else _claim("", "")


def _claim(namespace: str, name: str) -> list[Need]:
    """Who may see a claim, as many may, does not see what is in it: who may have a pod beside it does."""
    return [Need(CLAIM, namespace, name), Need(POD, namespace, "", "create")]


def of_machine_image(machine: Json, source: Json | None, cluster: Cluster) -> list[Need]:
    """Of a VirtualMachineImage, `source` being the one that it is cloned from, if that is there."""
    spec = machine["spec"]
    needs = _secrets_of_class(spec.get("storageClassParameters") or {})
    class_name = (machine["metadata"].get("annotations") or {}).get(CLASS_NAME)
    storage_class = cluster.get(STORAGE_CLASS, class_name) if class_name else None
    if storage_class is not None:
        needs += _secrets_of_class(parameters_of(storage_class))
    if spec.get("sourceType") == "export-from-volume":
        needs += _claim(spec.get("pvcNamespace", ""), spec.get("pvcName", ""))
    security = spec.get("securityParameters")
    if security:
        place = security.get("sourceImageNamespace", ""), security.get("sourceImageName", "")
        needs.append(Need(VIRTUAL_MACHINE_IMAGE, *place))
        if security.get("cryptoOperation") == "decrypt":
            # It is decrypted with the source's secret. Which one that is nobody knows before there is a source.
            needs += (
                [Need(SECRET, "", "")]
                if source is None
                else _secrets(secrets_of_class(source["spec"].get("storageClassParameters") or {}))
            )
    return needs


def _secrets_of_class(parameters: Mapping[str, str]) -> list[Need]:
    """Those that a class names. It is made for whoever makes the image, and his claims' names and annotations would
    choose among the secrets of another namespace.
    """
    chosen = []
    for namespace, name in secret_pairs(parameters).values():
        if is_template(namespace) and namespace != _OWN_NAMESPACE:
            chosen.append("")
        elif namespace and is_template(name) and namespace != _OWN_NAMESPACE:
            chosen.append(namespace)
    return _secrets(secrets_of_class(parameters)) + [Need(SECRET, namespace, "") for namespace in dict.fromkeys(chosen)]


def _secrets(places: Iterable[Place]) -> list[Need]:
    return [Need(SECRET, *place) for place in dict.fromkeys(places)]


def _place(reference: Json) -> Place:
    return reference.get("namespace", ""), reference.get("name", "")
