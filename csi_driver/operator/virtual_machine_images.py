"""Harvester's VirtualMachineImage: each has a BackingImage vmi-UID made and, when that is ready, a StorageClass whose
volumes start from it (harvesterhci.io/v1beta1). What it is, encrypted or not, is what was verified of the Image.
"""

import time
from collections.abc import Callable, Mapping
from typing import Final

from csi_driver.kube.claims import volume_of
from csi_driver.kube.controller import Controller
from csi_driver.kube.copies import is_of
from csi_driver.kube.kinds import (
    BACKING_IMAGE,
    GROUP,
    IMAGE,
    IMAGE_COPY,
    MANAGED_BY,
    MANAGER,
    STORAGE_CLASS,
    VIRTUAL_MACHINE_IMAGE,
    Json,
    Kind,
    has_finalizer,
    is_going,
    name_of,
    uid_of,
)
from csi_driver.model.errors import AlreadyExists, InvalidArgument
from csi_driver.model.times import recorded_now
from csi_driver.operator.backing_images import RETRIES
from csi_driver.operator.class_parameters import secret_of, verified
from csi_driver.operator.machine_image_status import Standing, is_ready, status_of
from csi_driver.operator.standing import (
    LATER,
    NAME_TAKEN,
    REFUSED,
    SOON,
    Api,
    Origin,
    Problem,
    Seen,
    Statuses,
    Tells,
    keep,
    make,
    sooner,
)

SOURCE: Final = f"{GROUP}/source-image"
"""Annotation of a clone: the uid of the VirtualMachineImage that its maker was asked for his rights to."""

_LONGEST: Final = 253


class VirtualMachineImages:
    """The controller of VirtualMachineImages; a name is NAMESPACE/NAME. `seen` has them, BackingImages of `namespace`,
    Images, ImageCopies and StorageClasses, and each change of one is told to `changed`.
    """

    KINDS: Final = (VIRTUAL_MACHINE_IMAGE, BACKING_IMAGE, IMAGE, IMAGE_COPY, STORAGE_CLASS)

    def __init__(
        self,
        api: Api,
        seen: Mapping[Kind, Seen],
        namespace: str,
        driver_name: str,
        events: Tells,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._seen = seen
        self._namespace = namespace
        self._driver_name = driver_name
        self._machines = seen[VIRTUAL_MACHINE_IMAGE]
        self._statuses = Statuses(api, VIRTUAL_MACHINE_IMAGE, self._machines, events, "Imported", clock)
        self.controller = Controller("virtual machine images", self.reconcile)

    def changed(self, kind: Kind, thing: Json) -> None:
        """Look at what a changed object concerns."""
        if kind == VIRTUAL_MACHINE_IMAGE:
            self.controller.tell(_key(thing))
            place = thing["metadata"]["namespace"], name_of(thing)
            for other in self._machines.all():
                if _source_of(other) == place:
                    self.controller.tell(_key(other))
            return
        if kind == STORAGE_CLASS:  # one that says no more what it was made for is one that somebody misses
            for machine in self._machines.all():
                if name_of(thing) in class_names(machine):
                    self.controller.tell(_key(machine))
        made: Json | None = thing
        if kind in (IMAGE, IMAGE_COPY):
            name = thing["spec"]["image"] if kind == IMAGE_COPY else name_of(thing)
            made = self._seen[BACKING_IMAGE].get(name, self._namespace)
        origin = None if made is None else Origin.of(made)
        if origin is not None and origin.kind == VIRTUAL_MACHINE_IMAGE.name:
            self.controller.tell(f"{origin.namespace}/{origin.name}")

    def reconcile(self, key: str) -> float | None:
        """Bring the VirtualMachineImage of that name, or what was left of one, nearer to what it says."""
        namespace, _, name = key.partition("/")
        machine = self._machines.get(name, namespace)
        if (wait := self._remove_left(namespace, name, machine)) is not None or machine is None:
            return wait
        if is_going(machine):
            return self._end(machine)
        if not has_finalizer(machine):
            machine = keep(self._api, VIRTUAL_MACHINE_IMAGE, self._machines, machine, kept=True)
        missing = self._backing(machine) is None
        try:
            backing, storage_class, problem = self._stand_for(machine)
        except AlreadyExists:
            return SOON
        except InvalidArgument as error:
            backing, storage_class, problem = self._backing(machine), None, Problem(REFUSED, str(error))
        wait = self._tell(machine, backing, storage_class, problem, missing=missing)
        return sooner(wait, LATER if problem else None)

    def _stand_for(self, machine: Json) -> tuple[Json | None, Json | None, Problem | None]:
        """Its BackingImage and StorageClass, made where they are missing; or why they are not as wanted."""
        backing = self._backing(machine)
        if backing is None:
            backing = self._make(machine)
        elif Origin.of(backing) != Origin.named(VIRTUAL_MACHINE_IMAGE, machine):
            return None, None, _taken(f"BackingImage {self._namespace}/{name_of(backing)}")
        else:
            backing = self._agree(machine, backing)
        found = self._class(machine, backing)
        return (backing, None, found) if isinstance(found, Problem) else (backing, found, None)

    def _backing(self, machine: Json) -> Json | None:
        return self._seen[BACKING_IMAGE].get(backing_name(machine), self._namespace)

    def _image(self, backing: Json | None) -> Json | None:
        """The Image of a BackingImage; None unless it was made for that."""
        image = None if backing is None else self._seen[IMAGE].get(name_of(backing))
        if image is None or backing is None or Origin.of(image) != Origin.named(BACKING_IMAGE, backing):
            return None
        return image

    def _make(self, machine: Json) -> Json:
        source = None
        if (place := _source_of(machine)) is not None:
            source = self._machines.get(place[1], place[0])
        marks = Origin.named(VIRTUAL_MACHINE_IMAGE, machine).marks()
        marks["annotations"][RETRIES] = _retries(machine)
        backing = {
            "metadata": {"name": backing_name(machine), "namespace": self._namespace, **marks},
            "spec": backing_of(machine, source, self._volume(machine)),
        }
        return make(self._api, BACKING_IMAGE, backing, self._namespace)

    def _agree(self, machine: Json, backing: Json) -> Json:
        if backing["metadata"]["annotations"].get(RETRIES) == _retries(machine):
            return backing
        patch = {"metadata": {"annotations": {RETRIES: _retries(machine)}}}
        backing = self._api.patch(BACKING_IMAGE, name_of(backing), patch, self._namespace)
        self._seen[BACKING_IMAGE].saw(backing)
        return backing

    def _volume(self, machine: Json) -> str | None:
        """The PersistentVolume of the claim that is exported."""
        spec = machine["spec"]
        if spec["sourceType"] != "export-from-volume":
            return None
        volume = volume_of(self._api, spec.get("pvcNamespace", ""), spec.get("pvcName", ""))
        if isinstance(volume, str):
            raise InvalidArgument(f"{volume}; it is looked at again, else make the image anew of another claim")
        return name_of(volume)

    def _class(self, machine: Json, backing: Json) -> Json | Problem | None:
        """The StorageClass of an image; made when that is ready. None before that."""
        origin, classes = Origin.named(VIRTUAL_MACHINE_IMAGE, machine), self._seen[STORAGE_CLASS]
        names = class_names(machine)
        there = {name: classes.get(name) for name in names}
        found = next((each for each in there.values() if each is not None and self._made_for(each) == origin), None)
        image = self._image(backing)
        if image is None or not is_ready(image):
            return found
        name = name_of(found) if found is not None else next((name for name in names if there[name] is None), None)
        if name is None:
            return _taken(f"StorageClass {names[-1]}")
        wanted = class_of(machine, image, name, self._driver_name)
        if found is not None and all(found.get(key) == wanted[key] for key in ("provisioner", "parameters")):
            return found
        if found is not None:  # its parameters cannot be changed
            self._api.delete(STORAGE_CLASS, name)
        return make(self._api, STORAGE_CLASS, wanted)

    def _end(self, machine: Json) -> float | None:
        """The class goes first, then the BackingImage, which may be kept for its users."""
        origin, name = Origin.named(VIRTUAL_MACHINE_IMAGE, machine), backing_name(machine)
        self._delete_classes(origin)
        backing = self._api.get(BACKING_IMAGE, name, self._namespace)
        if backing is not None and Origin.of(backing) == origin:
            self._delete_backing(backing)
            message = self._image_said(backing) or f"BackingImage {self._namespace}/{name} is being deleted"
            problem = Problem("Deleting", message)
            return sooner(self._tell(machine, backing, None, problem, missing=False), LATER)
        if has_finalizer(machine):
            keep(self._api, VIRTUAL_MACHINE_IMAGE, self._machines, machine, kept=False)
        self._statuses.forget(uid_of(machine))
        return None

    def _image_said(self, backing: Json) -> str:
        image = self._image(backing)
        return "" if image is None or not is_going(image) else str(image.get("status", {}).get("message", ""))

    def _remove_left(self, namespace: str, name: str, machine: Json | None) -> float | None:
        """What was made for one that is gone in spite of its finalizer goes too; a time where nobody can tell."""
        uid = "" if machine is None else uid_of(machine)
        place = Origin(VIRTUAL_MACHINE_IMAGE.name, namespace, name, uid)

        def is_left(thing: Json) -> bool:
            origin = Origin.of(thing)
            return origin is not None and place.is_place_of(origin) and origin.uid != uid

        backings = [each for each in self._seen[BACKING_IMAGE].all() if is_left(each)]
        classes = [each for each in self._seen[STORAGE_CLASS].all() if self._made_for(each) and is_left(each)]
        origins = {Origin.of(each) for each in (*backings, *classes)}
        if not origins:
            return None
        if self._machines.error:
            return LATER
        there = self._api.get(VIRTUAL_MACHINE_IMAGE, name, namespace)
        if ("" if there is None else uid_of(there)) != uid:
            return SOON
        for origin in origins:
            if origin is not None:
                self._delete_classes(origin)
        for backing in backings:
            self._delete_backing(backing)
        return None

    def _delete_classes(self, origin: Origin) -> None:
        for each in self._seen[STORAGE_CLASS].all():
            if self._made_for(each) == origin:
                self._api.delete(STORAGE_CLASS, name_of(each), seen=each)

    def _made_for(self, storage_class: Json) -> Origin | None:
        """What a class was made for here. None of another one, whatever its annotation says: whoever may annotate
        classes could have any class deleted else.
        """
        is_ours = (storage_class["metadata"].get("labels") or {}).get(MANAGED_BY) == MANAGER
        return Origin.of(storage_class) if is_ours and storage_class["provisioner"] == self._driver_name else None

    def _delete_backing(self, backing: Json) -> None:
        if not is_going(backing):
            self._api.delete(BACKING_IMAGE, name_of(backing), self._namespace, seen=backing)

    def _tell(
        self, machine: Json, backing: Json | None, storage_class: Json | None, problem: Problem | None, *, missing: bool
    ) -> float | None:
        image = self._image(backing)
        copies = [each for each in self._seen[IMAGE_COPY].all() if image is not None and is_of(each, image)]
        there = Standing(
            backing=backing,
            image=image,
            maker=next((copy for copy in copies if copy["spec"].get("make")), None),
            class_name=None if storage_class is None else name_of(storage_class),
            problem=problem,
            missing=missing,
        )
        return self._statuses.write(machine, status_of(machine, there, recorded_now()))


def backing_name(machine: Json) -> str:
    """The name of its BackingImage."""
    return f"vmi-{uid_of(machine)}"


def class_names(machine: Json) -> list[str]:
    """The names that its StorageClass may have, the better one first."""
    return [name for name in (f"longhorn-{name_of(machine)}", f"lh-{uid_of(machine)}") if len(name) <= _LONGEST]


def backing_of(machine: Json, source: Json | None = None, volume: str | None = None) -> Json:
    """The spec of its BackingImage. `source` is the VirtualMachineImage that is cloned, `volume` the PersistentVolume
    that is exported. Raises InvalidArgument for what is not there, or is not enough, in a sentence.
    """
    spec = machine["spec"]
    kind, parameters = spec["sourceType"], spec.get("storageClassParameters") or {}
    made: Json = {"sourceType": kind, "sourceParameters": {}}
    replicas = str(parameters.get("numberOfReplicas", ""))
    if replicas.isascii() and replicas.isdecimal() and int(replicas):
        made["minNumberOfCopies"] = int(replicas)
    if spec.get("checksum"):
        made["checksum"] = spec["checksum"]
    if kind == "download":
        made["sourceParameters"] = {"url": spec.get("url", "")}
    elif kind == "export-from-volume":
        made["sourceParameters"] = {"volume-name": volume or "", "export-type": "raw"}
    elif kind == "clone":
        made["sourceParameters"] = _clone_of(machine, source)
    return made


def _clone_of(machine: Json, source: Json | None) -> Json:
    security = machine["spec"]["securityParameters"]
    operation, place = security["cryptoOperation"], "/".join(_source_of(machine) or ())
    if source is None:
        raise InvalidArgument(
            f"there is no VirtualMachineImage {place} to {operation} (its name is wanted, not its displayName); it is "
            f"looked for again"
        )
    asked_for = (machine["metadata"].get("annotations") or {}).get(SOURCE)
    if asked_for not in (None, uid_of(source)):
        raise InvalidArgument(
            f"the VirtualMachineImage {place} is another one than when this image was made, with another secret maybe; "
            f"delete this image and make it anew"
        )
    owner, whose = (machine, "") if operation == "encrypt" else (source, f"of the source {place} ")
    secret = secret_of(owner["spec"].get("storageClassParameters") or {})
    if secret is None:
        raise InvalidArgument(
            f"the storageClassParameters {whose}name no secret to {operation} it with (csi.storage.k8s.io/"
            f"node-publish-secret-name and -namespace); make the image anew with the annotation "
            f"harvesterhci.io/storageClassName of an encrypted class"
        )
    return {
        "backing-image": backing_name(source),
        "encryption": operation,
        "secret": secret[0],
        "secret-namespace": secret[1],
    }


def class_of(machine: Json, image: Json, name: str, driver_name: str) -> Json:
    """The StorageClass whose volumes start from its image, which is ready."""
    spec, told = machine["spec"], image["status"]
    origin = Origin.named(VIRTUAL_MACHINE_IMAGE, machine)
    parameters = verified(
        spec.get("storageClassParameters") or {}, encrypted=told["encrypted"], secret=told.get("secret")
    )
    return {
        "metadata": {"name": name, **origin.marks()},
        "provisioner": driver_name,
        "parameters": {
            "backingImage": name_of(image),
            "backingImageDataSourceType": spec["sourceType"],
            **parameters,
        },
        "reclaimPolicy": "Delete",
        "volumeBindingMode": "Immediate",
        "allowVolumeExpansion": True,
    }


def _taken(what: str) -> Problem:
    return Problem(NAME_TAKEN, f"there is a {what} that was not made for this image, and it is left alone; delete it")


def _retries(machine: Json) -> str:
    return str(machine["spec"].get("retry", 3))


def _key(machine: Json) -> str:
    return f"{machine['metadata']['namespace']}/{name_of(machine)}"


def _source_of(machine: Json) -> tuple[str, str] | None:
    """Namespace and name of the VirtualMachineImage that it is cloned from."""
    security = machine["spec"].get("securityParameters")
    return (security["sourceImageNamespace"], security["sourceImageName"]) if security else None
