"""Harvester's rules for a VirtualMachineImage, in its own words where it has some."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from csi_driver.kube.kinds import IMAGE, STORAGE_CLASS, VIRTUAL_MACHINE_IMAGE, Json, uid_of
from csi_driver.model.errors import InvalidArgument
from csi_driver.operator.admission.lookups import Cluster
from csi_driver.operator.admission.needs import CLASS_NAME
from csi_driver.operator.admission.review import Request, Verdict
from csi_driver.operator.admission.secrets import look_at
from csi_driver.operator.class_parameters import ENCRYPTED, TAKEN_OVER, secret_of
from csi_driver.operator.cloning import circle
from csi_driver.operator.settings import Profile
from csi_driver.operator.users import is_template, parameters_of
from csi_driver.operator.virtual_machine_images import SOURCE, backing_name

_DEFAULTS: Final = {"numberOfReplicas": "3", "staleReplicaTimeout": "30", "migratable": "true"}


def mutate(request: Request, cluster: Cluster) -> Verdict:
    """Take over the parameters of the class that the annotation names; without one, what the image says of them. And
    note which image a clone is made of, as another one may have that name later.
    """
    machine = request.thing
    if machine is None or request.operation != "CREATE":
        return Verdict()
    spec = machine.get("spec")
    given = (spec.get("storageClassParameters") or {}) if isinstance(spec, dict) else None
    if not isinstance(given, dict):
        return Verdict()  # nobody has looked at the kind's schema yet; it is refused by that
    name = _class_name(machine)
    storage_class = cluster.get(STORAGE_CLASS, name) if name else None
    chosen = given if storage_class is None else parameters_of(storage_class)
    wanted = _DEFAULTS | {key: value for key, value in sorted(chosen.items()) if key in TAKEN_OVER}
    patch = [*_source_noted(machine, source_of(machine, cluster))]
    if wanted != given:
        patch.append({"op": "add", "path": "/spec/storageClassParameters", "value": wanted})
    return Verdict(patch=tuple(patch))


def _source_noted(machine: Json, source: Json | None) -> Iterator[Json]:
    notes, path = machine["metadata"].get("annotations"), f"/metadata/annotations/{SOURCE.replace('/', '~1')}"
    noted, uid = (notes or {}).get(SOURCE), None if source is None else uid_of(source)
    if noted == uid:
        return
    if uid is None:
        yield {"op": "remove", "path": path}
    elif notes:
        yield {"op": "add", "path": path, "value": uid}
    else:
        yield {"op": "add", "path": "/metadata/annotations", "value": {SOURCE: uid}}


def check_noted(machine: Json, source: Json | None) -> None:
    """Raise InvalidArgument where the source that rights are asked for is not the one that was noted."""
    noted = (machine["metadata"].get("annotations") or {}).get(SOURCE)
    if noted != (None if source is None else uid_of(source)):
        raise InvalidArgument("the source image was made or replaced in this very moment; try again")


def source_of(machine: Json, cluster: Cluster) -> Json | None:
    """The VirtualMachineImage that it is cloned from."""
    security = machine["spec"].get("securityParameters")
    if not isinstance(security, dict):
        return None
    name, namespace = security.get("sourceImageName"), security.get("sourceImageNamespace")
    if not isinstance(name, str) or not isinstance(namespace, str) or not name or not namespace:
        return None
    return cluster.get(VIRTUAL_MACHINE_IMAGE, name, namespace)


@dataclass(frozen=True)
class _Missing:
    """What is not there yet, in Harvester's words; what to do, where that is refused, and else what becomes of it."""

    said: str
    refused: str
    warned: str


def check(machine: Json, source: Json | None, cluster: Cluster, profile: Profile) -> list[str]:
    """What to warn of. Raises InvalidArgument; what is missing yet is refused with Harvester's rules only."""
    security = machine["spec"].get("securityParameters") or {}
    operation = security.get("cryptoOperation")
    missing: list[_Missing] = []
    if operation is not None:
        _check_circle(machine, cluster)
        missing += _check_source(security, source, cluster)
    name = _class_name(machine)
    storage_class = cluster.get(STORAGE_CLASS, name) if name else None
    if operation == "encrypt":
        _check_class(machine, name, storage_class)
        missing += _check_secret(machine["spec"].get("storageClassParameters") or {}, cluster)
    elif name and storage_class is None:
        missing.append(
            _Missing(
                f"there is no StorageClass {name}, which the annotation {CLASS_NAME} names",
                "make it first",
                "its parameters are not taken over later; delete this image and make it anew when the class is there",
            )
        )
    if missing and profile is Profile.HARVESTER:
        raise InvalidArgument(f"{missing[0].said}; {missing[0].refused}")
    return [f"{each.said}; {each.warned}" for each in missing]


def _check_circle(machine: Json, cluster: Cluster) -> None:
    why = circle(_place(machine), _source_place(machine), cluster.all(VIRTUAL_MACHINE_IMAGE), _place, _source_place)
    if why is not None:
        raise InvalidArgument(why)


def _place(machine: Json) -> str:
    return f"{machine['metadata'].get('namespace', '')}/{machine['metadata'].get('name', '')}"


def _source_place(machine: Json) -> str:
    security = machine["spec"].get("securityParameters")
    return f"{security['sourceImageNamespace']}/{security['sourceImageName']}" if security else ""


def _check_source(security: Json, source: Json | None, cluster: Cluster) -> list[_Missing]:
    operation, namespace = security["cryptoOperation"], security["sourceImageNamespace"]
    place = f"{namespace}/{security['sourceImageName']}"
    if source is None:
        wanted = f"its metadata.name is wanted (kubectl -n {namespace} get vmimages), not its displayName"
        return [_Missing(f"source image {place} not found", wanted, f"{wanted}; it is looked for again")]
    what = f"source image {place} ({source['spec'].get('displayName', '')})"
    image = cluster.get(IMAGE, backing_name(source))
    status = {} if image is None else image.get("status", {})
    if operation == "encrypt" and status.get("encrypted") is True:
        raise InvalidArgument(f"can not re-encrypt, {what} is already encrypted")
    if operation == "decrypt" and status.get("encrypted") is False:
        raise InvalidArgument(f"can not re-decrypt, {what} is not encrypted")
    if operation == "decrypt" and secret_of(source["spec"].get("storageClassParameters") or {}) is None:
        raise InvalidArgument(
            f"can not decrypt, the storageClassParameters of {what} name no secret (csi.storage.k8s.io/"
            f"node-publish-secret-name and -namespace) to decrypt it with; use a BackingImage, which names it itself"
        )
    if status.get("phase") == "Ready":
        return []
    when = f"kubectl -n {namespace} get vmimages shows it Imported"
    return [_Missing(f"{what} is not ready", f"make this one when {when}", "this one is made when it is")]


def _check_class(machine: Json, name: str, storage_class: Json | None) -> None:
    """The class of an image that is to be encrypted."""
    given: Mapping[str, str] = machine["spec"].get("storageClassParameters") or {}
    if not name and secret_of(given) is None:
        raise InvalidArgument(
            f"encrypt needs the annotation {CLASS_NAME}, the name of an encrypted StorageClass, whose secret it uses"
        )
    if name and storage_class is None:
        raise InvalidArgument(
            f"there is no StorageClass {name}, which the annotation {CLASS_NAME} names; make it first"
        )
    parameters = given if storage_class is None else parameters_of(storage_class)
    what = f"the StorageClass {name}" if name else "the image's storageClassParameters"
    if parameters.get(ENCRYPTED) != "true":
        raise InvalidArgument(f'{what} must say encrypted: "true" for an image that is to be encrypted')
    if parameters.get("backingImage"):
        raise InvalidArgument(
            f"{what} belongs to the image {parameters['backingImage']}; name one that is not of an image"
        )
    secret = secret_of(parameters)
    if secret is None or any(map(is_template, secret)):
        raise InvalidArgument(
            f"{what} must name one secret, without ${{…}}, by csi.storage.k8s.io/node-publish-secret-name and "
            f"-namespace for an image that is to be encrypted"
        )


def _check_secret(parameters: Mapping[str, str], cluster: Cluster) -> list[_Missing]:
    secret = secret_of(parameters)
    said = "" if secret is None else look_at(cluster, (secret[1], secret[0]))
    return [_Missing(said, "make it first", "the image waits until there is")] if said else []


def _class_name(machine: Json) -> str:
    return str((machine["metadata"].get("annotations") or {}).get(CLASS_NAME, ""))
