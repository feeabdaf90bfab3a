"""The status of a VirtualMachineImage, from what there is of it, in Harvester's words."""

from dataclasses import dataclass

from csi_driver.kube.copies import State, state_of
from csi_driver.kube.kinds import Json, is_going
from csi_driver.operator.class_parameters import ENCRYPTED
from csi_driver.operator.plan import PENDING, READY
from csi_driver.operator.standing import FAILED, Problem, condition

_NEARLY = 99
"""The most percent before it is ready."""


@dataclass(frozen=True)
class Standing:
    """What there is of a VirtualMachineImage: its BackingImage, that one's Image, the copy that is made of the source,
    the name of its StorageClass; or why it does not go on. `missing`: somebody has taken its BackingImage away.
    """

    backing: Json | None = None
    image: Json | None = None
    maker: Json | None = None
    class_name: str | None = None
    problem: Problem | None = None
    missing: bool = False


def is_ready(image: Json) -> bool:
    """Whether volumes can be made from it; what it is has been verified then."""
    told = image.get("status", {})
    return told.get("phase") == READY and "encrypted" in told and not is_going(image)


def status_of(machine: Json, there: Standing, now: str) -> Json:
    """Its status; what was counted before goes on."""
    before, spec = machine.get("status", {}), machine["spec"]
    told = {} if there.image is None else there.image.get("status", {})
    ready = there.problem is None and there.image is not None and is_ready(there.image) and there.class_name is not None
    failed, at = _failures(before, there, now)
    status: Json = {
        "progress": 100 if ready else min(_NEARLY, told.get("progress", 0)),
        "failed": failed,
        "conditions": _conditions(
            before, there, spec, now, ready=ready, exceeded=_is_given_up(there) and failed > _retry(spec)
        ),
    }
    if at:
        status["lastFailedTime"] = at
    if spec["sourceType"] == "download" and there.backing is not None:
        status["appliedUrl"] = spec.get("url", "")
    for ours, fact in (("size", "fileSize"), ("virtualSize", "virtualSize")):
        if fact in told:
            status[ours] = told[fact]
    if there.class_name is not None:
        status |= {"storageClassName": there.class_name, "targetStorageClassName": there.class_name}
    return status


def _conditions(before: Json, there: Standing, spec: Json, now: str, *, ready: bool, exceeded: bool) -> list[Json]:
    told = {} if there.image is None else there.image.get("status", {})
    message = str(told.get("message", ""))
    problem = there.problem
    imported, reason = ("True", "Imported") if ready else ("Unknown", told.get("phase", PENDING))
    if ready:
        message = _unlike(spec, there.class_name, encrypted=told["encrypted"])
    if problem is not None:
        imported, reason, message = "False", problem.reason, problem.message
    elif there.image is None and there.backing is not None:
        imported, reason, message = _said_of(there.backing)
    elif told.get("phase") == FAILED and not _is_tried_again(there):
        imported = "False"
    missing = not ready and ((there.missing and _held(before, "Initialized")) or _held(before, "BackingImageMissing"))
    known = "virtualSize" in told
    initialized = there.backing is not None

    def one(kind: str, holds: bool, reason: str, message: str = "") -> Json:  # noqa: FBT001
        return condition(before, kind, "True" if holds else "False", reason, message, now)

    why = problem or Problem("Initialized" if initialized else PENDING, "")
    return [
        one("Initialized", initialized, why.reason, why.message),
        condition(before, "Imported", imported, reason, message, now),
        one("RetryLimitExceeded", exceeded, "GivenUp" if exceeded else "TriesLeft", message if exceeded else ""),
        one("BackingImageMissing", missing, "Missing" if missing else "There", _MISSING if missing else ""),
        one("MetadataReady", known, "SizeKnown" if known else "SizeUnknown"),
    ]


def _unlike(spec: Json, class_name: str | None, *, encrypted: bool) -> str:
    """What to say of what was brought and is encrypted where its class was not to be, or the reverse."""
    wished = (spec.get("storageClassParameters") or {}).get(ENCRYPTED)
    verified, is_, way = ("true", "is", "decrypt") if encrypted else ("false", "is not", "encrypt")
    if wished in (None, verified) or spec["sourceType"] == "clone":
        return ""
    return (
        f'what was imported {is_} encrypted, and so its StorageClass {class_name} says encrypted "{verified}" and not '
        f'"{wished}"; a clone of it with {way} is as wished'
    )


def _said_of(backing: Json) -> tuple[str, str, str]:
    """What a BackingImage without an Image says of itself, as status, reason and message of a condition."""
    for each in backing.get("status", {}).get("conditions", ()):
        if each["type"] == "Ready" and each["reason"] != PENDING:
            return "False", each["reason"], each["message"]
    return "Unknown", PENDING, ""


_MISSING = "somebody deleted the BackingImage of this image; it is made anew from its source"


def _failures(before: Json, there: Standing, now: str) -> tuple[int, str]:
    """How often it has failed, and when the last time was."""
    counted, at = int(before.get("failed", 0)), str(before.get("lastFailedTime", ""))
    attempts = 0 if there.maker is None else int(there.maker.get("status", {}).get("attempts") or 0)
    return (attempts, now) if attempts > counted else (counted, at)


def _is_tried_again(there: Standing) -> bool:
    maker = there.maker
    return maker is not None and state_of(maker) is State.FAILED and not maker["status"].get("permanent")


def _is_given_up(there: Standing) -> bool:
    maker = there.maker
    return maker is not None and state_of(maker) is State.FAILED and bool(maker["status"].get("permanent"))


def _retry(spec: Json) -> int:
    return int(spec.get("retry", 3))


def _held(before: Json, kind: str) -> bool:
    return any(each["type"] == kind and each["status"] == "True" for each in before.get("conditions", ()))
