"""AdmissionReview (admission.k8s.io/v1) on the wire: what the API asks, and what it is answered."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from csi_driver.kube.kinds import Json
from csi_driver.kube.users import User
from csi_driver.model.errors import DriverError, InvalidArgument

_API_VERSION: Final = "admission.k8s.io/v1"
_MOST_WARNING: Final = 250
"""Characters of one: the API cuts what is longer than 256."""


@dataclass(frozen=True)
class Request:
    """What is asked. `thing` is the object that is to be, None for a deletion; `old` the one that is, None for a
    creation. `name` is "" where the API is yet to choose one.
    """

    uid: str
    operation: str
    resource: str
    name: str
    namespace: str
    user: User
    thing: Json | None = field(repr=False)
    old: Json | None = field(repr=False)

    @property
    def subject(self) -> Json:
        """The object that it is about: the one that is to be, else the one that is."""
        return self.thing or self.old or {}


@dataclass(frozen=True)
class Verdict:
    """Allowed: with sentences for the user, and a patch (RFC 6902) of the object."""

    warnings: Sequence[str] = ()
    patch: Sequence[Json] = ()


def read(body: bytes) -> Request:
    """Read what the API sends. Raises InvalidArgument for anything else."""
    try:
        document = msgspec.json.decode(body)
        request = document["request"]
        if document["apiVersion"] != _API_VERSION or document["kind"] != "AdmissionReview":
            raise InvalidArgument(f"this is no AdmissionReview of {_API_VERSION}")
        thing, old, user = request.get("object"), request.get("oldObject"), request.get("userInfo") or {}
        # Of a deletion of a collection the name is in the object only.
        metadata = (thing or old or {}).get("metadata") or {}
        found = Request(
            uid=request["uid"],
            operation=request["operation"],
            resource=f"{request['resource']['resource']}.{request['resource']['group']}".rstrip("."),
            name=request.get("name") or metadata.get("name") or "",
            namespace=request.get("namespace") or "",
            user=User.of(user),
            thing=thing,
            old=old,
        )
        texts = (found.uid, found.operation, found.resource, found.name, found.namespace, found.user.name)
        if not all(isinstance(each, str) for each in texts) or not isinstance(found.subject.get("metadata"), dict):
            raise InvalidArgument("the AdmissionReview tells of no object")
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError, RecursionError, ValueError):
        raise InvalidArgument(f"this is no AdmissionReview of {_API_VERSION}") from None
    return found


def allow(request: Request, verdict: Verdict) -> bytes:
    """The answer to what is allowed."""
    response: Json = {"uid": request.uid, "allowed": True}
    if verdict.warnings:
        response["warnings"] = [each[:_MOST_WARNING] for each in verdict.warnings]
    if verdict.patch:
        response["patchType"] = "JSONPatch"
        response["patch"] = base64.b64encode(msgspec.json.encode(verdict.patch)).decode()
    return _answer(response)


def refuse(request: Request, error: DriverError) -> bytes:
    """The answer to what is refused: by InvalidArgument 422, it cannot be so; else 403, it may not be."""
    code, reason = (422, "Invalid") if isinstance(error, InvalidArgument) else (403, "Forbidden")
    status = {"code": code, "reason": reason, "message": str(error)}
    return _answer({"uid": request.uid, "allowed": False, "status": status})


def _answer(response: Json) -> bytes:
    return msgspec.json.encode({"apiVersion": _API_VERSION, "kind": "AdmissionReview", "response": response})
