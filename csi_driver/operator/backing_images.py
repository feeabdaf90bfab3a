"""Longhorn's BackingImage: each stands for an Image of its name, which does the work, and tells of it in Longhorn's
words (longhorn.io/v1beta2). What has no meaning here is told in a condition.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from csi_driver.kube.controller import Controller
from csi_driver.kube.copies import State, is_of
from csi_driver.kube.kinds import (
    BACKING_IMAGE,
    GROUP,
    IMAGE,
    IMAGE_COPY,
    VOLUME,
    Json,
    Kind,
    has_finalizer,
    is_going,
    name_of,
    uid_of,
)
from csi_driver.model.errors import AlreadyExists, InvalidArgument
from csi_driver.model.times import recorded_now
from csi_driver.operator.plan import PENDING, READY
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
    changes,
    condition,
    keep,
    make,
    sooner,
)

RETRIES: Final = f"{GROUP}/retries"
"""Annotation of a BackingImage: how often a failure that may pass is tried again."""
TAG: Final = f"{GROUP}/tag-"
"""Label of a node: that it has a tag of `nodeSelector`."""

_STATES: Final[Mapping[str, str]] = {
    State.PENDING: "pending",
    State.AWAITING_UPLOAD: "starting",
    State.IN_PROGRESS: "in-progress",
    State.READY: "ready",
}
_FACTS: Final = {"size": "fileSize", "virtualSize": "virtualSize", "checksum": "checksum"}


class BackingImages:
    """The controller of BackingImages. `seen` has BackingImages of `namespace`, Images and ImageCopies, and each change
    of one is told to `changed`.
    """

    KINDS: Final = (BACKING_IMAGE, IMAGE, IMAGE_COPY)

    def __init__(
        self,
        api: Api,
        seen: Mapping[Kind, Seen],
        namespace: str,
        events: Tells,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._seen = seen
        self._namespace = namespace
        self._statuses = Statuses(api, BACKING_IMAGE, seen[BACKING_IMAGE], events, "Ready", clock)
        self.controller = Controller("backing images", self.reconcile)

    def changed(self, kind: Kind, thing: Json) -> None:
        """Look at what a changed object concerns."""
        self.controller.tell(thing["spec"]["image"] if kind == IMAGE_COPY else name_of(thing))

    def reconcile(self, name: str) -> float | None:
        """Bring the BackingImage of that name, or what was left of one, nearer to what it says."""
        backing = self._seen[BACKING_IMAGE].get(name, self._namespace)
        if backing is None:
            return self._remove_left(name)
        if is_going(backing):
            return self._end(backing)
        if not has_finalizer(backing):
            backing = keep(self._api, BACKING_IMAGE, self._seen[BACKING_IMAGE], backing, kept=True)
        image, problem = self._seen[IMAGE].get(name), None
        try:
            if image is None:
                image = self._make(backing)
            elif (problem := self._stranger(backing, image)) is None:
                image = self._agree(backing, image)
        except AlreadyExists:
            return SOON
        except InvalidArgument as error:
            problem = Problem(REFUSED, str(error))
        return sooner(self._tell(backing, image, problem), LATER if problem else None)

    def _make(self, backing: Json) -> Json:
        spec = image_of(backing, self._claim(backing))
        marks = Origin.named(BACKING_IMAGE, backing).marks()
        return make(self._api, IMAGE, {"metadata": {"name": name_of(backing), **marks}, "spec": spec})

    def _agree(self, backing: Json, image: Json) -> Json:
        """What may change of it, the number of copies and where they lie, as it is wanted now."""
        wanted, spec = _changeable(backing), image["spec"]
        there = {"copies": 1} | {name: spec[name] for name in ("copies", "nodeSelector", "retries") if name in spec}
        patch = changes(there, wanted)
        if not patch:
            return image
        image = self._api.patch(IMAGE, name_of(image), {"spec": patch})
        self._seen[IMAGE].saw(image)
        return image

    def _stranger(self, backing: Json, image: Json) -> Problem | None:
        """What to say of an Image of that name that was not made for this BackingImage."""
        origin, name = Origin.named(BACKING_IMAGE, backing), name_of(backing)
        found = Origin.of(image)
        if found == origin:
            return None
        if origin.is_place_of(found):
            self._delete(image)
            return Problem("Replaced", f"the image {name} of an earlier BackingImage of that name is removed first")
        return Problem(
            NAME_TAKEN,
            f"there is an Image {name} that was not made for this BackingImage, and it is left alone; delete one of "
            f"them, or give this one another name",
        )

    def _claim(self, backing: Json) -> Json | None:
        """The claim whose volume is exported, as its PersistentVolume names it."""
        if backing["spec"]["sourceType"] != "export-from-volume":
            return None
        name = _parameters(backing).get("volume-name", "")
        volume = self._api.get(VOLUME, name)
        if volume is None:
            raise InvalidArgument(
                f"there is no PersistentVolume {name}, which volume-name says; it is looked for again"
            )
        claim = volume["spec"].get("claimRef")
        if not claim:
            raise InvalidArgument(f"the PersistentVolume {name} belongs to no claim; it is exported when it does")
        return {"name": claim["name"], "namespace": claim["namespace"]}

    def _end(self, backing: Json) -> float | None:
        """The Image goes first; what an Image keeps for its users keeps the BackingImage."""
        name = name_of(backing)
        image = self._api.get(IMAGE, name)
        if image is not None and Origin.of(image) == Origin.named(BACKING_IMAGE, backing):
            self._delete(image)
            return sooner(self._tell(backing, image, None), LATER)
        if has_finalizer(backing):
            keep(self._api, BACKING_IMAGE, self._seen[BACKING_IMAGE], backing, kept=False)
        self._statuses.forget(uid_of(backing))
        return None

    def _remove_left(self, name: str) -> float | None:
        """An Image whose BackingImage was taken away in spite of its finalizer goes too."""
        place = Origin(BACKING_IMAGE.name, self._namespace, name, "")
        known = self._seen[IMAGE].get(name)
        if known is None or not place.is_place_of(Origin.of(known)):
            return None
        if self._seen[BACKING_IMAGE].error:
            return LATER  # nobody knows what there is
        image = self._api.get(IMAGE, name)
        if self._api.get(BACKING_IMAGE, name, self._namespace) is not None:
            return SOON
        if image is not None and place.is_place_of(Origin.of(image)):
            self._delete(image)
        return None

    def _delete(self, image: Json) -> None:
        if not is_going(image):
            self._api.delete(IMAGE, name_of(image), seen=image)

    def _tell(self, backing: Json, image: Json | None, problem: Problem | None) -> float | None:
        ours = image if image is not None and Origin.of(image) == Origin.named(BACKING_IMAGE, backing) else None
        copies = [each for each in self._seen[IMAGE_COPY].all() if ours is not None and is_of(each, ours)]
        return self._statuses.write(backing, status_of(backing, ours, copies, recorded_now(), problem))


def image_of(backing: Json, claim: Json | None = None) -> Json:
    """The spec of the Image that a BackingImage stands for; `claim` is the one whose volume is exported.

    Raises InvalidArgument for what the kind's own rules refuse, should it be there nevertheless.
    """
    spec, parameters = backing["spec"], _parameters(backing)
    kind, image = spec["sourceType"], _changeable(backing)
    if kind == "clone":
        return image | _clone_of(spec, parameters)
    if kind == "download":
        image["source"] = {"download": {"url": parameters.get("url", "")}}
    elif kind == "upload":
        image["source"] = {"upload": {}}
    elif kind == "export-from-volume" and claim is not None:
        image["source"] = {"claim": claim}
    else:
        raise InvalidArgument(f"a BackingImage of sourceType {kind} cannot be made here; use download or upload")
    if spec.get("checksum") and kind != "export-from-volume":
        image["checksum"] = spec["checksum"]
    if spec.get("secret"):
        image["secretRef"] = _result_secret(spec)
    return image


def _clone_of(spec: Json, parameters: Mapping[str, str]) -> Json:
    encryption = parameters.get("encryption") or "ignore"
    image: Json = {"source": {"clone": {"image": parameters.get("backing-image", ""), "encryption": encryption}}}
    if encryption != "ignore":
        image["secretRef"] = {
            "name": parameters.get("secret", ""),
            "namespace": parameters.get("secret-namespace", ""),
        }
    if encryption == "reencrypt":
        image["newSecretRef"] = _result_secret(spec)
    return image


def _result_secret(spec: Json) -> Json:
    return {"name": spec.get("secret", ""), "namespace": spec.get("secretNamespace", "")}


def _changeable(backing: Json) -> Json:
    spec = backing["spec"]
    image: Json = {"copies": max(1, spec.get("minNumberOfCopies", 1))}
    if spec.get("nodeSelector"):
        image["nodeSelector"] = {f"{TAG}{tag}": "" for tag in spec["nodeSelector"]}
    retries = str((backing["metadata"].get("annotations") or {}).get(RETRIES, ""))
    if retries.isascii() and retries.isdecimal():
        image["retries"] = int(retries)
    return image


def _parameters(backing: Json) -> Mapping[str, str]:
    return backing["spec"].get("sourceParameters") or {}


def ignored_of(backing: Json) -> list[str]:
    """What a BackingImage says that has no meaning here, each with the reason."""
    spec, parameters = backing["spec"], _parameters(backing)
    kind = spec["sourceType"]
    found = []
    if spec.get("diskSelector"):
        found.append("diskSelector (nodes have no disks by tag; use nodeSelector)")
    if spec.get("dataEngine") not in (None, "", "v1"):
        found.append(f"dataEngine {spec['dataEngine']} (there is one engine)")
    if spec.get("diskFileSpecMap"):
        found.append("diskFileSpecMap (Longhorn's own notes on its disks)")
    if spec.get("checksum") and kind not in ("download", "upload"):
        found.append("checksum (it is of what is downloaded or uploaded)")
    if parameters.get("export-type") not in (None, "", "raw"):
        found.append(f"export-type {parameters['export-type']} (a volume is exported as it is)")
    if spec.get("secret") and kind == "clone" and parameters.get("encryption") != "reencrypt":
        found.append("secret (a clone's is in sourceParameters; only reencrypt takes two)")
    return found


def status_of(
    backing: Json, image: Json | None, copies: Sequence[Json], now: str, problem: Problem | None = None
) -> Json:
    """A BackingImage's status, from those of its Image and the Image's copies; `problem` where it does not go on."""
    before, told = backing.get("status", {}), (image or {}).get("status", {})
    ready = told.get("phase") == READY
    status: Json = {name: told[fact] for name, fact in _FACTS.items() if fact in told}
    if image is not None:
        status["uuid"] = uid_of(image)
    if maker := next((copy for copy in copies if copy["spec"].get("make")), None):
        status["ownerID"] = maker["spec"]["node"]
    if copies:
        status["diskFileStatusMap"] = {copy["spec"]["node"]: _file_of(copy, ready=ready) for copy in copies}
    if problem is None:
        phase = told.get("phase", PENDING)
        problem = Problem(phase, told.get("message") or f"image {name_of(backing)} is {phase}")
    else:
        ready = False
    status["conditions"] = [
        condition(before, "Ready", "True" if ready else "False", problem.reason, problem.message, now)
    ]
    if ignored := ignored_of(backing):
        message = f"these have no meaning here: {', '.join(ignored)}"
        status["conditions"].append(condition(before, "FieldsIgnored", "True", "NoMeaning", message, now))
    return status


def _file_of(copy: Json, *, ready: bool) -> Json:
    """A node's file in Longhorn's words. One that has failed and is made again is failed-and-cleanup."""
    told = copy.get("status", {})
    state = str(told.get("state", State.PENDING))
    if state == State.FAILED:
        word = "failed" if told.get("permanent") else "failed-and-cleanup"
    elif state == State.READY and not ready:
        word = "ready-for-transfer"
    else:
        word = _STATES.get(state, "unknown")
    progress = 100 if state == State.READY else told.get("progress", 0)
    return {"state": word, "progress": progress, "message": told.get("message", "")}
