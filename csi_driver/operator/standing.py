"""What the kinds have in common that stand for an Image or for another object: whose an object is, its finalizer, its
status.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

from csi_driver.kube.kinds import FINALIZER, MANAGED_BY, MANAGER, ORIGIN, Json, Kind, name_of, uid_of
from csi_driver.kube.refusals import NamespaceGoing
from csi_driver.model.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted

SOON: Final = 0.25
"""Seconds after which to look again where an own write is not seen yet."""
LATER: Final = 30.0
"""Seconds after which to look again for what nobody tells of."""
_WRITE_SECONDS: Final = 1.0
_PASSING: Final = frozenset({"progress", "message", "lastTransitionTime"})
"""Keys of a status that only tell how far something is."""


class Api(Protocol):
    """The calls of `Kube` that are made here, with its errors."""

    def get(self, kind: Kind, name: str, namespace: str = "") -> Json | None: ...

    def create(self, kind: Kind, thing: Json, namespace: str = "") -> Json: ...

    def patch(self, kind: Kind, name: str, patch: Json, namespace: str = "", *, status: bool = False) -> Json: ...

    def delete(self, kind: Kind, name: str, namespace: str = "", *, seen: Json | None = None) -> None: ...


class Seen(Protocol):
    """What there is of a kind, as an `Informer` knows it."""

    @property
    def error(self) -> str: ...

    def get(self, name: str, namespace: str = "") -> Json | None: ...

    def all(self) -> list[Json]: ...

    def saw(self, thing: Json) -> None: ...


class Tells(Protocol):
    """The call of `Events` that is made here."""

    def tell(self, kind: Kind, thing: Json, reason: str, message: str, *, warning: bool = False) -> None: ...


@dataclass(frozen=True)
class Problem:
    """Why something does not go on: a word for programs and a sentence for people."""

    reason: str
    message: str


REFUSED: Final = "Refused"
NAME_TAKEN: Final = "NameTaken"
FAILED: Final = "Failed"
_TOLD: Final = frozenset({REFUSED, NAME_TAKEN, FAILED})
"""Reasons of a condition that an event tells of, too."""


@dataclass(frozen=True)
class Origin:
    """The object that another one was made for."""

    kind: str
    namespace: str
    name: str
    uid: str

    @classmethod
    def named(cls, kind: Kind, thing: Json) -> "Origin":
        """That object itself."""
        return cls(kind.name, thing["metadata"].get("namespace", ""), name_of(thing), uid_of(thing))

    @classmethod
    def of(cls, thing: Json) -> "Origin | None":
        """What `thing` was made for; None where it was made for nothing, or by somebody else."""
        parts = str((thing["metadata"].get("annotations") or {}).get(ORIGIN, "")).split("/")
        return cls(*parts) if len(parts) == 4 else None

    def marks(self) -> Json:
        """Metadata of what is made for it."""
        return {"annotations": {ORIGIN: str(self)}, "labels": {MANAGED_BY: MANAGER}}

    def is_place_of(self, other: "Origin | None") -> bool:
        """Whether the other one has or had the same name: itself, or an earlier or later object."""
        return other is not None and (self.kind, self.namespace, self.name) == (other.kind, other.namespace, other.name)

    def __str__(self) -> str:
        return f"{self.kind}/{self.namespace}/{self.name}/{self.uid}"


def keep(api: Api, kind: Kind, seen: Seen, thing: Json, *, kept: bool) -> Json:
    """Put our finalizer on an object or take it off; the object then. Raises Conflict where it has changed."""
    metadata = thing["metadata"]
    others = [each for each in metadata.get("finalizers", ()) if each != FINALIZER]
    patch = {
        "finalizers": [*others, FINALIZER] if kept else others,
        "resourceVersion": metadata.get("resourceVersion"),
    }
    with suppress(NotFound):
        thing = api.patch(kind, name_of(thing), {"metadata": patch}, metadata.get("namespace", ""))
        seen.saw(thing)
    return thing


def make(api: Api, kind: Kind, thing: Json, namespace: str = "") -> Json:
    """Make an object. Raises InvalidArgument, a sentence for the status of what it is made for, where that cannot be
    before somebody does something; else what the API's failures raise.
    """
    try:
        return api.create(kind, thing, namespace)
    except (FailedPrecondition, NotFound, PermissionDenied, ResourceExhausted) as error:
        why, place = str(error), f"namespace {namespace}, in which its {kind} belongs"
        if namespace and isinstance(error, NotFound):
            why = f"there is no {place}; make it (kubectl create namespace {namespace})"
        elif namespace and isinstance(error, NamespaceGoing):
            why = f"the {place}, is being deleted; make it anew when it is gone (kubectl create namespace {namespace})"
        raise InvalidArgument(f"{why}; it is tried again") from None


def condition(before: Json, kind: str, status: str, reason: str, message: str, now: str) -> Json:
    """One of a status, which was `before`: True, False or Unknown, since `now` or since it was that."""
    known: Json = next((each for each in before.get("conditions", ()) if each["type"] == kind), {})
    since = known["lastTransitionTime"] if known.get("status") == status else now
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": since}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Json:
    """The merge patch (RFC 7386) that makes `after` of `before`; empty when nothing differs."""
    patch: Json = {name: None for name in before if name not in after}
    for name, value in after.items():
        known = before.get(name)
        if isinstance(value, Mapping) and isinstance(known, Mapping):
            if inner := changes(known, value):
                patch[name] = inner
        elif name not in before or known != value:
            patch[name] = value
    return patch


class Statuses:
    """Writes the status of objects of a kind: only where it differs, and what is mere progress once a second.

    What its condition `leading` says of success and failure is told as an event, too, where people look for it.
    """

    def __init__(
        self, api: Api, kind: Kind, seen: Seen, events: Tells, leading: str, clock: Callable[[], float]
    ) -> None:
        self._api = api
        self._kind = kind
        self._seen = seen
        self._events = events
        self._leading = leading
        self._clock = clock
        self._written: dict[str, float] = {}

    def write(self, thing: Json, status: Json) -> float | None:
        """Seconds after which to come again, None when it is written."""
        before = thing.get("status", {})
        patch = changes(before, status)
        if not patch:
            return None
        uid, now = uid_of(thing), self._clock()
        wait = self._written.get(uid, now - _WRITE_SECONDS) + _WRITE_SECONDS - now
        if wait > 0 and _settled(before) == _settled(status):
            return wait
        namespace = thing["metadata"].get("namespace", "")
        with suppress(NotFound):
            self._seen.saw(self._api.patch(self._kind, name_of(thing), {"status": patch}, namespace, status=True))
            self._tell_event(thing, self._led(before), self._led(status))
        self._written[uid] = now
        return None

    def _led(self, status: Json) -> Json:
        return next((each for each in status.get("conditions", ()) if each["type"] == self._leading), {})

    def _tell_event(self, thing: Json, before: Json, now: Json) -> None:
        said = now.get("reason"), now.get("message")
        if now.get("status") == "True" and before.get("status") != "True":
            self._events.tell(self._kind, thing, "Ready", f"image {name_of(thing)} is ready")
        elif now.get("reason") in _TOLD and (before.get("reason"), before.get("message")) != said:
            self._events.tell(self._kind, thing, now["reason"], now["message"], warning=True)

    def forget(self, uid: str) -> None:
        """The object is gone."""
        self._written.pop(uid, None)


def _settled(status: Any) -> Any:
    """A status without what only tells how far it is."""
    if isinstance(status, Mapping):
        return {name: _settled(value) for name, value in status.items() if name not in _PASSING}
    if isinstance(status, list):
        return [_settled(each) for each in status]
    return status


def sooner(*waits: float | None) -> float | None:
    """The first of moments at which to look again; None when none is needed."""
    return min((wait for wait in waits if wait is not None), default=None)
