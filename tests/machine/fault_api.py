"""Where a call can be cut that asks Kubernetes: each request that changes an object is a step."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from csi_driver.backends.csi import CsiBackend
from csi_driver.backends.csirecords import Api
from csi_driver.kube.kinds import Json, Kind
from csi_driver.model.errors import AlreadyExists, Unavailable
from csi_driver.model.settings import Settings
from csi_driver.volumes.driver import Host
from tests.backends.played import FarCluster, far_backend
from tests.machine.fault_points import Injector
from tests.machine.storage import PLAYED

R = TypeVar("R")
_NONE: Mapping[str, str] = {}


class FaultyApi:
    """An API with an injector around every change."""

    def __init__(self, injector: Injector, api: Api) -> None:
        self._injector, self._api = injector, api

    def get(self, kind: Kind, name: str, namespace: str = "") -> Json | None:
        return self._api.get(kind, name, namespace)

    def list(
        self, kind: Kind, namespace: str = "", labels: Mapping[str, str] = _NONE, fields: Mapping[str, str] = _NONE
    ) -> tuple[list[Json], str]:
        return self._api.list(kind, namespace, labels, fields)

    def create(self, kind: Kind, thing: Json, namespace: str = "") -> Json:
        def create() -> Json | AlreadyExists:
            try:
                return self._api.create(kind, thing, namespace)
            except AlreadyExists as error:  # an answer like another: the step was done
                return error

        made = self._step(f"create {kind.plural}", create)
        if isinstance(made, AlreadyExists):
            raise made
        return made

    def patch(self, kind: Kind, name: str, patch: Json, namespace: str = "", *, status: bool = False) -> Json:
        what = f"patch {kind.plural} {'+'.join(patch.get('spec', patch))}"
        return self._step(what, lambda: self._api.patch(kind, name, patch, namespace, status=status))

    def delete(
        self, kind: Kind, name: str, namespace: str = "", *, grace_seconds: int | None = None, seen: Json | None = None
    ) -> None:
        gone = partial(self._api.delete, kind, name, namespace, grace_seconds=grace_seconds, seen=seen)
        self._step(f"delete {kind.plural}", gone)

    def _step(self, what: str, run: Callable[[], R]) -> R:
        what = f"api {what}"
        return self._injector.step(what, what, run, lambda: Unavailable("the Kubernetes API does not answer"))


def faulty_csi(settings: Settings, host: Host, injector: Injector) -> CsiBackend:
    """The backend csi on the played cluster beside the server's folder."""
    folder = settings.endpoint.parent / PLAYED
    api = FaultyApi(injector, FarCluster(folder))
    return far_backend(folder, settings.topology_key, api=api, files=host.files)
