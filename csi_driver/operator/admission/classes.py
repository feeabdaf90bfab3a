"""StorageClasses of this driver: what an encrypted one has to name, and what keeps the class of an image."""

import re
from collections.abc import Mapping
from typing import Final

from csi_driver.kube.kinds import IMAGE, VIRTUAL_MACHINE_IMAGE, Json, name_of
from csi_driver.model.errors import FailedPrecondition, InvalidArgument
from csi_driver.operator.admission.lookups import Cluster, is_there
from csi_driver.operator.admission.review import Request, Verdict
from csi_driver.operator.admission.secrets import look_at, unguarded
from csi_driver.operator.settings import OperatorSettings, Profile
from csi_driver.operator.standing import FAILED, Origin
from csi_driver.operator.users import Place, is_template, parameters_of, secret_pairs, secrets_of_class

_HARVESTERS: Final = ("provisioner", "node-stage", "node-publish")
# What external-provisioner fills in (kubernetes-csi.github.io, "StorageClass Secrets").
_IN_NAMESPACE: Final = re.compile(r"\$\{(pv\.name|pvc\.namespace)\}")
_IN_NAME: Final = re.compile(r"\$\{(pv\.name|pvc\.namespace|pvc\.name|pvc\.annotations\['[^']+'\])\}")


class ClassRules:
    """Reviews creation and deletion of StorageClasses."""

    def __init__(self, cluster: Cluster, settings: OperatorSettings) -> None:
        self._cluster = cluster
        self._driver_name = settings.driver_name
        self._profile = settings.profile
        self._namespace = settings.namespace

    def review(self, request: Request) -> Verdict:
        """Raises InvalidArgument for a class that cannot work, FailedPrecondition for one that an image needs."""
        subject = request.subject
        if subject.get("provisioner") != self._driver_name:
            return Verdict()
        if request.operation == "DELETE":
            self._keep(subject, request.name)
            return Verdict()
        return Verdict(self._check(request.name, parameters_of(subject)))

    def _keep(self, storage_class: Json, name: str) -> None:
        origin = Origin.of(storage_class)
        if origin is None or origin.kind != VIRTUAL_MACHINE_IMAGE.name:
            return
        if is_there(self._cluster, VIRTUAL_MACHINE_IMAGE, origin.uid):
            raise FailedPrecondition(
                f"the StorageClass {name} is used by VirtualMachineImage {origin.namespace}/{origin.name}, which makes "
                f"it; delete the image, and the class goes with it"
            )

    def _check(self, name: str, parameters: Mapping[str, str]) -> list[str]:
        """What to warn of."""
        encrypted = parameters.get("encrypted", "false")
        if encrypted not in ("true", "false"):
            raise InvalidArgument(
                f'the StorageClass {name} says encrypted: {encrypted!r}; it must be "true" or "false"'
            )
        warnings = self._look_at_image(name, parameters, encrypted)
        if encrypted == "false" or "encryptionKMSID" in parameters or parameters.get("generateKey") == "true":
            return warnings
        pairs = secret_pairs(parameters)
        self._check_pairs(name, pairs)
        places = [(namespace, secret) for namespace, secret in pairs.values() if namespace and secret]
        if len(set(places)) > 1:
            raise InvalidArgument(
                f"the secrets of StorageClass {name} differ: {', '.join(sorted(map('/'.join, set(places))))}; all of "
                f"its operations have to name the same one"
            )
        if "node-stage" not in pairs:
            warnings += [f"the StorageClass {name} names no secret for node-stage, which opens its volumes"]
        if places:
            warnings += [*self._look_at(name, places[0]), *unguarded(places, self._namespace)]
        return warnings

    def _look_at_image(self, name: str, parameters: Mapping[str, str], encrypted: str) -> list[str]:
        """What to warn of where its volumes start from an Image."""
        wanted = parameters.get("backingImage")
        if not wanted:
            return []
        image = next((each for each in self._cluster.all(IMAGE) if name_of(each) == wanted), None)
        if image is None:
            said = f"there is no Image {wanted}, which StorageClass {name} names"
            return [f"{said}; its volumes wait until there is, or until their node has an image of that name"]
        told = image.get("status", {})
        verified, opens = told.get("encrypted"), told.get("secret")
        if verified is None and told.get("phase") == FAILED:
            return [f"the Image {wanted}, which StorageClass {name} names, has failed: {told.get('message', '')}"]
        places = {f"{namespace}/{secret}" for namespace, secret in secrets_of_class(parameters)}
        if verified and opens and places and opens not in places:
            said = f"the Image {wanted} was verified to open with the secret {opens} and StorageClass {name} names"
            return [f"{said} {', '.join(sorted(places))}: no volume can start from it unless they hold the same key"]
        if verified is None or ("true" if verified else "false") == encrypted:
            return []
        what, other = ("is", "true") if verified else ("is not", "false")
        said = f'the Image {wanted} {what} encrypted and StorageClass {name} says encrypted "{encrypted}"'
        return [f'{said}: no volume can start from it; make the class anew with "{other}", or name a clone of it']

    def _check_pairs(self, name: str, pairs: Mapping[str, tuple[str | None, str | None]]) -> None:
        for operation, pair in pairs.items():
            if not all(pair):
                raise InvalidArgument(
                    f"the StorageClass {name} names the secret for {operation} by half; it needs {_keys(operation)}"
                )
        if self._profile is Profile.HARVESTER:
            missing = [operation for operation in _HARVESTERS if operation not in pairs]
            if missing:
                raise InvalidArgument(
                    f"the encrypted StorageClass {name} lacks {', '.join(map(_keys, missing))}; it must name "
                    f"the same secret for {', '.join(_HARVESTERS)}"
                )

    def _look_at(self, name: str, place: Place) -> list[str]:
        """What to warn of; the same is refused with Harvester's rules."""
        if any(map(is_template, place)):
            self._check_template(name, place)
            said = f"the secret {'/'.join(place)} of StorageClass {name} is another one for each claim"
            warnings = []
        elif said := look_at(self._cluster, place):
            said = f"{said}, which StorageClass {name} names"
            warnings = [f"{said}; its volumes wait until there is"]
        else:
            return []
        if self._profile is Profile.HARVESTER:
            raise InvalidArgument(
                f"{said}; an encrypted StorageClass must name one that exists (the operator's admission profile is "
                f"{self._profile})"
            )
        return warnings

    def _check_template(self, name: str, place: Place) -> None:
        for text, known, names in (
            (place[0], _IN_NAMESPACE, "${pv.name} and ${pvc.namespace}"),
            (place[1], _IN_NAME, "${pv.name}, ${pvc.namespace}, ${pvc.name} and ${pvc.annotations['…']}"),
        ):
            if "$" in (left := known.sub("", text)) or "{" in left or "}" in left:
                raise InvalidArgument(
                    f"the StorageClass {name} names the secret {text!r}; there only {names} are filled in"
                )


def _keys(operation: str) -> str:
    return f"csi.storage.k8s.io/{operation}-secret-name and -namespace"
