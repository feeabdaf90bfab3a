"""Events: what happened to an object, where people look for it (kubectl describe)."""

from typing import Final

from csi_driver.host.log import log
from csi_driver.kube.client import Kube
from csi_driver.kube.kinds import EVENT, Json, Kind, name_of, uid_of
from csi_driver.model.errors import DriverError
from csi_driver.model.times import recorded_now

_MOST_BYTES: Final = 1024
"""Of a message; the API takes no longer one."""


class Events:
    """Writes events; one that cannot be written is left out, and that is logged."""

    def __init__(self, kube: Kube, component: str) -> None:
        self._kube = kube
        self._component = component

    def tell(self, kind: Kind, thing: Json, reason: str, message: str, *, warning: bool = False) -> None:
        """Write one about `thing`; a cluster-scoped one's lies in the namespace `default`, as kubectl expects."""
        namespace = thing["metadata"].get("namespace") or "default"
        now = recorded_now()
        event = {
            "metadata": {"generateName": f"{name_of(thing)}."},
            "involvedObject": {
                "apiVersion": kind.api_version, "kind": kind.name, "name": name_of(thing), "uid": uid_of(thing),
                **({"namespace": namespace} if kind.namespaced else {}),
            },
            "type": "Warning" if warning else "Normal",
            "reason": reason,
            "message": message.encode()[:_MOST_BYTES].decode(errors="ignore"),
            "source": {"component": self._component},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }  # fmt: skip
        try:
            self._kube.create(EVENT, event, namespace)
        except DriverError as error:
            log.warning("event not written", reason=reason, error=str(error))
