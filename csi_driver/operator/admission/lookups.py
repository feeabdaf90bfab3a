"""What admission has to look up: objects, who uses them, and what a user may read."""

from collections.abc import Callable, Mapping
from typing import Final, Protocol

from csi_driver.kube import users
from csi_driver.kube.kinds import NAMESPACE, Json, Kind, is_going, uid_of
from csi_driver.kube.users import User
from csi_driver.model.errors import CommandFailed, FailedPrecondition, InvalidArgument, PermissionDenied


class Cluster(Protocol):
    """What there is. Raises only what is no answer to the user: the API fails, or refuses us."""

    def get(self, kind: Kind, name: str, namespace: str = "") -> Json | None:
        """An object as it is now; None where there is none."""

    def all(self, kind: Kind) -> list[Json]:
        """All of a kind, as they were last seen; nothing of a kind that is not watched."""

    def may_do(self, user: User, verb: str, kind: Kind, name: str, namespace: str = "") -> bool:
        """Whether a role lets the user do that to an object; with name and namespace "" to all of the kind."""


class _Api(Protocol):
    """The calls of `Kube` that are made here, with its errors."""

    def get(self, kind: Kind, name: str, namespace: str = "") -> Json | None: ...

    def create(self, kind: Kind, thing: Json, namespace: str = "") -> Json: ...


class ApiCluster:
    """The cluster by its API. `seen` lists what is watched: an `Informer`'s `all`, by kind."""

    def __init__(self, api: _Api, seen: Mapping[Kind, Callable[[], list[Json]]]) -> None:
        self._api = api
        self._seen: Final = seen

    def get(self, kind: Kind, name: str, namespace: str = "") -> Json | None:
        try:
            return self._api.get(kind, name, namespace)
        except (FailedPrecondition, PermissionDenied) as error:
            raise CommandFailed(str(error)) from None  # it is ours, and says nothing of the user

    def all(self, kind: Kind) -> list[Json]:
        listed = self._seen.get(kind)
        return [] if listed is None else listed()

    def may_do(self, user: User, verb: str, kind: Kind, name: str, namespace: str = "") -> bool:
        try:
            return users.may(self._api, user, verb, kind, name, namespace)
        except (FailedPrecondition, InvalidArgument, PermissionDenied) as error:
            raise CommandFailed(str(error)) from None


def is_there(cluster: Cluster, kind: Kind, uid: str) -> bool:
    """Whether what another object was made for is still there, as it was seen: a kind that was taken away has none."""
    return any(uid_of(each) == uid and not is_going(each) for each in cluster.all(kind))


def is_ending(cluster: Cluster, namespace: str) -> bool:
    """Whether a namespace is being deleted, and all that is in it."""
    found = cluster.get(NAMESPACE, namespace) if namespace else None
    return found is not None and is_going(found)
