"""Images of each kind: who may have one made of what, and what keeps one from being deleted."""

from collections.abc import Sequence
from typing import Final

from csi_driver.kube.kinds import (
    BACKING_IMAGE,
    CLAIM,
    IMAGE,
    IMAGE_COPY,
    STORAGE_CLASS,
    VIRTUAL_MACHINE_IMAGE,
    Json,
    Kind,
    is_going,
    name_of,
)
from csi_driver.kube.users import User
from csi_driver.model.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from csi_driver.operator.admission import machine_images, needs
from csi_driver.operator.admission.lookups import Cluster, is_ending, is_there
from csi_driver.operator.admission.needs import Need
from csi_driver.operator.admission.review import Request, Verdict
from csi_driver.operator.admission.secrets import look_at, unguarded
from csi_driver.operator.cloning import circle, not_its_to_clone, refusal
from csi_driver.operator.settings import OperatorSettings
from csi_driver.operator.standing import Origin
from csi_driver.operator.users import Place, classes_of_image, named, users_of_image, waiting_claims
from csi_driver.operator.virtual_machine_images import backing_name

_KINDS: Final = {f"{kind.plural}.{kind.group}": kind for kind in (IMAGE, BACKING_IMAGE, VIRTUAL_MACHINE_IMAGE)}


class ImageRules:
    """Reviews creation and deletion of Images, BackingImages and VirtualMachineImages. `account` is the operator's user
    name: what it makes and removes itself was reviewed where it was asked for.
    """

    def __init__(self, cluster: Cluster, settings: OperatorSettings, account: str) -> None:
        self._cluster = cluster
        self._settings = settings
        self._account = account

    def review(self, request: Request) -> Verdict:
        """Raises PermissionDenied for what the user may not read himself, InvalidArgument for what cannot be made,
        FailedPrecondition for a deletion of what is in use.
        """
        kind = _KINDS.get(request.resource)
        if kind is None or request.user.name == self._account:
            return Verdict()
        if request.operation == "DELETE":
            self._keep(kind, request)
            return Verdict()
        if request.operation != "CREATE" or request.thing is None:
            return Verdict()
        # What he may not read is refused before anything is told of it.
        if kind == IMAGE:
            self._check_needs(request, needs.of_image(request.thing["spec"]))
            return Verdict(self._check_image(request.name, request.thing["spec"]))
        if kind == BACKING_IMAGE:
            if request.namespace != (place := self._settings.backing_image_namespace):
                raise InvalidArgument(
                    f"BackingImages of namespace {request.namespace} are looked after by nobody; make it in {place}, "
                    f"where they are (--backing-image-namespace of the operator)"
                )
            self._check_needs(request, needs.of_backing_image(request.thing, self._cluster))
            return Verdict(self._check_backing(request.name, request.thing["spec"], request.namespace))
        source = machine_images.source_of(request.thing, self._cluster)
        machine_images.check_noted(request.thing, source)
        self._check_needs(request, needs.of_machine_image(request.thing, source, self._cluster))
        return Verdict(machine_images.check(request.thing, source, self._cluster, self._settings.profile))

    # Making one.

    def _check_needs(self, request: Request, found: Sequence[Need]) -> None:
        missing = [need for need in dict.fromkeys(found) if not self._may(request.user, need)]
        if missing:
            what = ", ".join(map(str, missing))
            raise PermissionDenied(
                f"{request.user.name} may not have an image made of what he may not read himself; a role must allow "
                f"{what}"
            )

    def _may(self, user: User, need: Need) -> bool:
        return self._cluster.may_do(user, need.verb, need.kind, need.name, need.namespace)

    def _check_image(self, name: str, spec: Json) -> list[str]:
        """What to warn of."""
        clone, warnings = _cloned(spec), list[str]()
        if clone:
            warnings = self._check_clone(name, clone.get("image", ""), clone.get("encryption", "ignore"), None)
        places = [(spec[key]["namespace"], spec[key]["name"]) for key in ("secretRef", "newSecretRef") if key in spec]
        return warnings + self._check_secrets(places)

    def _check_backing(self, name: str, spec: Json, namespace: str) -> list[str]:
        parameters, warnings = spec.get("sourceParameters") or {}, []
        places = []
        if spec.get("sourceType") == "clone":
            encryption = parameters.get("encryption") or "ignore"
            origin = Origin(BACKING_IMAGE.name, namespace, "", "")
            warnings = self._check_clone(name, parameters.get("backing-image", ""), encryption, origin)
            if encryption != "ignore":
                places.append((parameters.get("secret-namespace", ""), parameters.get("secret", "")))
        if spec.get("secret"):
            places.append((spec.get("secretNamespace", ""), spec["secret"]))
        return warnings + self._check_secrets(places)

    def _check_clone(self, place: str, name: str, encryption: str, origin: Origin | None) -> list[str]:
        source = self._cluster.get(IMAGE, name)
        if source is not None and (why := not_its_to_clone(origin, source)) is not None:
            raise InvalidArgument(why)  # before anything is told of what it is
        why = circle(place, name, self._cluster.all(IMAGE), name_of, _source_of)
        if why is not None:
            raise InvalidArgument(why)
        if source is None:
            return [f"there is no image {name} yet; it is cloned when there is"]
        encrypted = source.get("status", {}).get("encrypted")
        why = None if encrypted is None else refusal(name, encryption, encrypted=encrypted)
        if why is not None:
            raise InvalidArgument(why)
        return []

    def _check_secrets(self, places: Sequence[Place]) -> list[str]:
        found = [look_at(self._cluster, place) for place in dict.fromkeys(places)]
        waits = [f"{said} yet; the image waits until there is" for said in found if said]
        return [*waits, *unguarded(places, self._settings.namespace)]

    # Deleting one.

    def _keep(self, kind: Kind, request: Request) -> None:
        old = request.old or {"metadata": {"name": request.name}}
        if is_going(old):
            return
        users = self._users(kind, old)
        if not users or is_ending(self._cluster, request.namespace):
            return
        place = "/".join(filter(None, (request.namespace, request.name)))
        raise FailedPrecondition(f"the {kind} {place} is in use: {named(users)}; it can be deleted when it is not")

    def _users(self, kind: Kind, thing: Json) -> list[str]:
        name = backing_name(thing) if kind == VIRTUAL_MACHINE_IMAGE else name_of(thing)
        classes, driver = self._cluster.all(STORAGE_CLASS), self._settings.driver_name
        waiting = waiting_claims(classes_of_image(name, driver, classes), self._cluster.all(CLAIM))
        if kind == VIRTUAL_MACHINE_IMAGE:  # its own class goes with it
            own = Origin.named(kind, thing)
            classes = [each for each in classes if Origin.of(each) != own]
        users = users_of_image(name, driver, classes, self._cluster.all(IMAGE), self._cluster.all(IMAGE_COPY))
        return [*self._owners(thing), *users, *waiting]

    def _owners(self, thing: Json) -> list[str]:
        """What it was made for, if that is still there."""
        origin = Origin.of(thing)
        kind = next((each for each in _KINDS.values() if origin is not None and each.name == origin.kind), None)
        if origin is None or kind is None:
            return []
        if not is_there(self._cluster, kind, origin.uid):
            return []
        return [f"{kind} {origin.namespace}/{origin.name} stands for it, delete that one"]


def _source_of(image: Json) -> str:
    """The name of the Image that it is cloned from; "" where it is no clone."""
    return str(_cloned(image.get("spec", {})).get("image", ""))


def _cloned(spec: Json) -> Json:
    """What the spec of an Image says of the one that it is cloned from; {} where it is no clone."""
    found: Json = (spec.get("source") or {}).get("clone") or {}
    return found
