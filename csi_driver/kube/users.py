"""Who asks, and what the API's authorizers let him do."""

from dataclasses import dataclass
from typing import Protocol, Self

from csi_driver.kube.kinds import ACCESS_REVIEW, Json, Kind


@dataclass(frozen=True)
class User:
    """Somebody as SubjectAccessReview wants him: user, groups, uid, extra."""

    name: str
    document: Json

    @classmethod
    def of(cls, info: Json) -> Self:
        """As TokenReview and AdmissionReview tell of him (UserInfo)."""
        name = info.get("username", "")
        return cls(name, {"user": name} | {key: info[key] for key in ("groups", "uid", "extra") if info.get(key)})


class Api(Protocol):
    """The call of `Kube` that is made here, with its errors."""

    def create(self, kind: Kind, thing: Json, namespace: str = "") -> Json: ...


def may(
    api: Api, user: User, verb: str, kind: Kind, name: str = "", namespace: str = "", *, subresource: str = ""
) -> bool:
    """Whether a role lets the user do that; with name and namespace "" to all of the kind."""
    attributes = {
        "verb": verb, "group": kind.group, "resource": kind.plural, "subresource": subresource, "name": name,
        "namespace": namespace,
    }  # fmt: skip
    status = api.create(ACCESS_REVIEW, {"spec": user.document | {"resourceAttributes": attributes}}).get("status") or {}
    return bool(status.get("allowed")) and not status.get("denied")
