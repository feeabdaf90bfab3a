"""Who uses an image or a secret, in words for people: what keeps it from being deleted."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from csi_driver.kube.copies import is_of
from csi_driver.kube.kinds import Json, is_going, name_of
from csi_driver.operator.standing import FAILED

_MOST_NAMED: Final = 5
_PREFIX: Final = "csi.storage.k8s.io/"
_NAME, _NAMESPACE = "-secret-name", "-secret-namespace"
_REFERENCES: Final = (
    "controllerPublishSecretRef", "nodeStageSecretRef", "nodePublishSecretRef", "controllerExpandSecretRef",
    "nodeExpandSecretRef",
)  # fmt: skip
_DELETION: Final = "volume.kubernetes.io/provisioner-deletion-secret"
"""Annotations of a PersistentVolume by external-provisioner: the secret that its deletion needs."""

Place = tuple[str, str]
"""Namespace and name."""


def parameters_of(storage_class: Json) -> Mapping[str, str]:
    """A class's parameters."""
    return storage_class.get("parameters") or {}


def secret_pairs(parameters: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    """By operation (node-stage, say) namespace and name of the secrets that they name; None for what is missing."""
    keys = [key.removeprefix(_PREFIX) for key in parameters if key.startswith(_PREFIX)]
    stems = {key.removesuffix(_NAME).removesuffix(_NAMESPACE) for key in keys if key.endswith((_NAME, _NAMESPACE))}
    return {
        stem: (parameters.get(f"{_PREFIX}{stem}{_NAMESPACE}"), parameters.get(f"{_PREFIX}{stem}{_NAME}"))
        for stem in sorted(stems)
    }


def is_template(text: str | None) -> bool:
    """Whether it holds ${…}, which external-provisioner fills in for each claim."""
    return text is not None and "${" in text


def secrets_of_class(parameters: Mapping[str, str]) -> list[Place]:
    """The secrets that they name without ${…}, each once."""
    return [*dict.fromkeys(
        (namespace, name)
        for namespace, name in secret_pairs(parameters).values()
        if namespace and name and not is_template(namespace) and not is_template(name)
    )]  # fmt: skip


def secrets_of_image(image: Json) -> list[Place]:
    """The secrets that an Image needs: once it was made the one that was verified to open it, whatever became of its
    copies; before that all it names, unless it has failed, so that a secret may be put right.
    """
    status, spec = image.get("status", {}), image["spec"]
    if "virtualSize" in status:
        namespace, _, name = str(status.get("secret") or "").partition("/")
        return [(namespace, name)] if status.get("encrypted") and name else []
    if status.get("phase") == FAILED:
        return []
    return [_place(spec[key]) for key in ("secretRef", "newSecretRef") if spec.get(key)]


def users_of_secret(
    place: Place, driver_name: str, classes: Iterable[Json], images: Iterable[Json], volumes: Iterable[Json]
) -> list[str]:
    """Who needs the secret to open something, in words."""
    found = [
        f"StorageClass {name_of(each)}"
        for each in _ours(classes, driver_name)
        if parameters_of(each).get("encrypted") == "true" and place in secrets_of_class(parameters_of(each))
    ]
    found += [f"Image {name_of(each)}" for each in images if not is_going(each) and place in secrets_of_image(each)]
    found += [f"PersistentVolume {name_of(each)}" for each in volumes if place in _secrets_of_volume(each, driver_name)]
    return found


def users_of_image(
    name: str, driver_name: str, classes: Iterable[Json], images: Sequence[Json], copies: Sequence[Json]
) -> list[str]:
    """Who needs an image, in words."""
    users = [f"StorageClass {name_of(each)} names it" for each in classes_of_image(name, driver_name, classes)]
    for other in images:
        clone = other["spec"]["source"].get("clone", {})
        if clone.get("image") == name and not is_going(other) and _is_being_made(other, copies):
            users.append(f"image {name_of(other)} is being cloned from it")
    return users


def _is_being_made(image: Json, copies: Sequence[Json]) -> bool:
    """Whether a node has begun to make it and may go on, or another one after it; it was not ready yet."""
    told = image.get("status", {})
    if "virtualSize" in told:
        return False
    makers = [copy for copy in copies if is_of(copy, image) and copy["spec"].get("make")]
    return any(not copy.get("status", {}).get("permanent") for copy in makers) or bool(
        told.get("tried") and told.get("phase") != FAILED
    )


def classes_of_image(name: str, driver_name: str, classes: Iterable[Json]) -> list[Json]:
    """The classes of this driver whose volumes start from an image."""
    return [each for each in _ours(classes, driver_name) if parameters_of(each).get("backingImage") == name]


def waiting_claims(classes: Iterable[Json], claims: Iterable[Json]) -> list[str]:
    """The claims that wait for a volume of one of these classes, in words."""
    names = set(map(name_of, classes))
    return [
        f"claim {each['metadata']['namespace']}/{name_of(each)} waits for a volume of it"
        for each in claims
        if each["spec"].get("storageClassName") in names and not each["spec"].get("volumeName") and not is_going(each)
    ]


def claim_kept(claim: Json) -> Json:
    """What `waiting_claims` needs of one: a cluster may have very many."""
    spec = claim["spec"]
    return _kept(claim, {key: spec[key] for key in ("storageClassName", "volumeName") if key in spec})


def secrets_kept(volume: Json) -> Json:
    """What `users_of_secret` needs of a PersistentVolume."""
    csi = volume["spec"].get("csi") or {}
    return _kept(volume, {"csi": {key: csi[key] for key in ("driver", *_REFERENCES) if key in csi}})


def _kept(thing: Json, spec: Json) -> Json:
    metadata = thing["metadata"]
    notes = {key: value for key, value in (metadata.get("annotations") or {}).items() if key.startswith(_DELETION)}
    named = ("name", "namespace", "resourceVersion", "deletionTimestamp")
    return {
        "metadata": {**{key: metadata[key] for key in named if key in metadata}, "annotations": notes},
        "spec": spec,
    }


def named(users: Sequence[str]) -> str:
    """All of them in one line; of very many the first ones and how many more."""
    more = len(users) - _MOST_NAMED
    return ", ".join(users[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _ours(classes: Iterable[Json], driver_name: str) -> list[Json]:
    return [each for each in classes if each.get("provisioner") == driver_name]


def _secrets_of_volume(volume: Json, driver_name: str) -> list[Place]:
    csi = volume["spec"].get("csi") or {}
    if csi.get("driver") != driver_name:
        return []
    found = [_place(csi[key]) for key in _REFERENCES if csi.get(key)]
    notes = volume["metadata"].get("annotations") or {}
    if notes.get(f"{_DELETION}-name"):
        found.append((notes.get(f"{_DELETION}-namespace", ""), notes[f"{_DELETION}-name"]))
    return found


def _place(reference: Json) -> Place:
    return reference.get("namespace", ""), reference.get("name", "")
