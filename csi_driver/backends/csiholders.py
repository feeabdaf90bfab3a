"""Holder pods: one for each node that may have a volume, with the claim below it, so that its driver attaches it there.

Kubernetes keeps a volume on a node for as long as a pod there has it. Whoever deletes a holder takes the device away:
nobody does but `HolderPods`, when the node has nothing open on it any more.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from csi_driver.backends.csiclaims import last_event, name_for
from csi_driver.backends.csiheaders import LABEL
from csi_driver.backends.csipins import digest
from csi_driver.backends.csirecords import GROUP, Api, Known, Staged, looks
from csi_driver.kube.kinds import MANAGED_BY, MANAGER, NODE, POD, VOLUME_RECORD, Json, is_going, name_of, uid_of
from csi_driver.kube.refusals import Conflict
from csi_driver.model.errors import Aborted, AlreadyExists, FailedPrecondition, NotFound
from csi_driver.model.text import one_line

COMPONENT: Final = "holder"
CONTROLLER: Final = "controller"
DEVICE: Final = "/dev/backing"
FOLDER: Final = "/holders"
_COMPONENT: Final = "app.kubernetes.io/component"
_VOLUME: Final = f"{GROUP}/volume-id"
_LASTING_SECONDS: Final = 10 * 365 * 24 * 3600  # kubelet kills a container that is slower than its pod's grace
_OUT_OF_SERVICE: Final = "node.kubernetes.io/out-of-service"
_MOST_QUOTED: Final = 300
WAIT_SECONDS: Final = 60.0


class HolderPods:
    """The holder pods in `namespace`; `folder` of each node is shared with the driver.

    `image` tells their container image, when one is made. `wait_seconds` is how long one call waits for a pod to come
    or go. Long, as Kubernetes asks later and later after each answer that is an error; csi-attacher has to wait longer
    still (--timeout).
    """

    def __init__(
        self, api: Api, namespace: str, image: Callable[[], str], folder: Path, wait_seconds: float = WAIT_SECONDS
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._image = image
        self._folder = folder
        self._wait_seconds = wait_seconds

    def check_node(self, volume_id: str, node: str) -> None:
        """Raises NotFound where the cluster has no such node."""
        if self._api.get(NODE, node) is None:
            raise NotFound(f"volume {volume_id} cannot be given to node {node}: the cluster has no node of that name")

    def staged(self, known: Known) -> Staged | None:
        """Where it may be open, by its record; None where that node is past it."""
        staged = known.spec.staged
        return None if staged is None or self.is_past(staged.node, staged.boot_id) else staged

    def is_past(self, node: str, boot_id: str) -> bool:
        """Whether nothing of that boot of the node can be at work any more: the node is gone, was booted anew, or an
        administrator has said that it is off (the taint node.kubernetes.io/out-of-service).
        """
        found = self._api.get(NODE, node)
        if found is None or found.get("status", {}).get("nodeInfo", {}).get("bootID") not in (None, "", boot_id):
            return True
        return _is_off(found)

    def is_down(self, node: str) -> bool:
        """Whether no kubelet is there to end a pod."""
        found = self._api.get(NODE, node)
        return found is None or _is_off(found)

    def is_ready(self, node: str) -> bool:
        """Whether its kubelet starts and ends pods, as far as the cluster knows."""
        found = self._api.get(NODE, node)
        if found is None or _is_off(found):
            return False
        conditions = found.get("status", {}).get("conditions", ())
        return all(each.get("status") == "True" for each in conditions if each.get("type") == "Ready")

    def all(self) -> Sequence[Json]:
        """Every holder pod."""
        return self._api.list(POD, self._namespace, labels={_COMPONENT: COMPONENT, MANAGED_BY: MANAGER})[0]

    def of(self, volume_id: str) -> Sequence[Json]:
        """Those of a volume."""
        return self._api.list(POD, self._namespace, labels={_COMPONENT: COMPONENT, LABEL: digest(volume_id)})[0]

    def begin(self, known: Known, node: str) -> str:
        """Have the volume's holder be made on that node, in place of one that has ended, without waiting for it.

        Returns what one that had ended tells of it, "" where none had. Raises Conflict (Aborted) where another
        controller did the same meanwhile, and what `image` does.
        """
        name, said = pod_name(known.volume_id, node), ""
        found = self._api.get(POD, name, self._namespace)
        if found is not None and _has_ended(found) and not is_going(found):
            status = found["status"]
            why = one_line(status.get("message") or status.get("reason") or status["phase"], _MOST_QUOTED)
            said = f"{self._namespace}/{name} on node {node}: {why}"
            self._remove_ended(found)
            found = self._api.get(POD, name, self._namespace)
        if found is None:
            self._make(known, node, name)
        return said

    def ensure(self, known: Known, node: str) -> Json:
        """Have the volume's holder on that node, and wait for it.

        Raises Aborted, saying why it is not ready yet, and what `image` does.
        """
        name = pod_name(known.volume_id, node)
        said = ""
        for is_last in looks(self._wait_seconds):
            found = self._api.get(POD, name, self._namespace)
            if found is None:
                found = self._make(known, node, name)
            if is_going(found) or _has_ended(found):
                if not is_going(found):
                    with suppress(Conflict):  # it is looked at again
                        self._remove_ended(found)
                said = found.get("status", {}).get("message") or "an earlier one is ending"
            elif _is_ready(found):
                return found
            elif is_last:
                said = _waiting(found) or last_event(self._api, self._namespace, found)
                said = said or str(found.get("status", {}).get("phase"))
        raise Aborted(
            f"the holder pod {self._namespace}/{name} of volume {known.volume_id} on node {node} is not ready yet "
            f"({said}); this is tried again"
        )

    def drop(self, volume_id: str, pod: Json, *, wait: bool = True) -> None:
        """Have a holder end, and `wait` until its node says so; at once where there is no kubelet that could.

        Raises Aborted while it is there: it stays on its own while something is on its device.
        """
        name, uid, node = name_of(pod), uid_of(pod), node_of(pod)
        at_once = self.is_down(node)
        if at_once or not is_going(pod):
            self._api.delete(POD, name, self._namespace, grace_seconds=0 if at_once else None)
        for _ in looks(self._wait_seconds if wait else 0.0):
            found = self._api.get(POD, name, self._namespace)
            if found is None or uid_of(found) != uid:
                return
            pod = found
        raise Aborted(
            f"the holder pod {self._namespace}/{name} of volume {volume_id} has not ended on node {node} yet; "
            f"{self._why_it_stays(pod, node)}; this is tried again"
        )

    def _why_it_stays(self, pod: Json, node: str) -> str:
        if not self.is_ready(node):
            return (
                f"the node is not ready, and nothing there ends it before it is; if the node is off for good, say so "
                f"by the taint {_OUT_OF_SERVICE}, or delete its Node object"
            )
        if not _is_ready(pod) and (said := _waiting(pod) or last_event(self._api, self._namespace, pod)):
            return f"it does not run ({said})"
        return "it stays while the volume's device is in use there, see its log"

    def _remove_ended(self, pod: Json) -> None:
        """Only that very one: another controller may have made one of its name meanwhile, and that may be in use."""
        self._api.delete(POD, name_of(pod), self._namespace, grace_seconds=0, seen=pod)

    def _make(self, known: Known, node: str, name: str) -> Json:
        try:
            return self._api.create(POD, self._pod(known, node, name), self._namespace)
        except AlreadyExists:
            return self._api.get(POD, name, self._namespace) or {"metadata": {"name": name}, "status": {}}

    def _pod(self, known: Known, node: str, name: str) -> Json:
        owner = {
            "apiVersion": VOLUME_RECORD.api_version,
            "kind": VOLUME_RECORD.name,
            "name": known.volume_id,
            "uid": known.uid,
            "controller": True,  # a drain passes by no pod without one
        }
        container = {
            "name": COMPONENT,
            "image": self._image(),
            "terminationMessagePolicy": "FallbackToLogsOnError",  # kubelet's own word tells nothing of why it ended
            "args": ["holder", f"--device={DEVICE}", f"--folder={FOLDER}", f"--volume-id={known.volume_id}",
                     "--holder-id=$(POD_UID)"],
            "env": [{"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}],
            "securityContext": {
                "runAsUser": 0,
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            # No probe: the node waits for its socket. A program that is run in many pods each second keeps them, and
            # all else on the node, from starting.
            "resources": {"requests": {"cpu": "1m", "memory": "24Mi"}},
            "volumeDevices": [{"name": "backing", "devicePath": DEVICE}],
            "volumeMounts": [{"name": "holders", "mountPath": FOLDER}],
        }  # fmt: skip
        return {
            "metadata": {
                "name": name,
                "labels": {
                    "app.kubernetes.io/name": MANAGER,
                    _COMPONENT: COMPONENT,
                    MANAGED_BY: MANAGER,
                    LABEL: digest(known.volume_id),
                },
                "annotations": {_VOLUME: known.volume_id},
                "ownerReferences": [owner],
            },
            "spec": {
                "nodeName": node,
                "priorityClassName": "system-node-critical",
                "restartPolicy": "Always",
                "terminationGracePeriodSeconds": _LASTING_SECONDS,
                "hostNetwork": True,  # it has no use for an address, and one less thing can fail
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "tolerations": [{"operator": "Exists"}],
                "securityContext": {"seLinuxOptions": {"type": "spc_t"}},
                "containers": [container],
                "volumes": [
                    {"name": "backing", "persistentVolumeClaim": {"claimName": name_for(known.volume_id)}},
                    {"name": "holders", "hostPath": {"path": str(self._folder), "type": "DirectoryOrCreate"}},
                ],
            },
        }


def image_of(api: Api, namespace: str, pod: str) -> str:
    """The container image of the controller, as its own pod names it: that is what whoever installed it has set.

    Nothing tells a container which one of its pod it is: it is the one called `controller`, as in the manifests, else
    the only one. Raises FailedPrecondition.
    """
    found = api.get(POD, pod, namespace)
    containers = found["spec"]["containers"] if found is not None else []
    own = [each for each in containers if each["name"] == CONTROLLER] or containers
    if len(own) != 1:
        why = f"has several containers, and none is called {CONTROLLER}" if own else "is not there"
        raise FailedPrecondition(
            f"holder pods cannot be made: their image is that of the controller's pod {namespace}/{pod}, which {why}; "
            f"correct --pod-name, or name an image by --holder-image"
        )
    return str(own[0]["image"])


def pod_name(volume_id: str, node: str) -> str:
    """The name of the holder of a volume on a node."""
    return f"luks-holder-{hashlib.sha256(f'{volume_id}/{node}'.encode()).hexdigest()[:32]}"


def wants_holder(known: Known) -> bool:
    """Whether a volume is to have one: nodes that call the driver below themselves need none."""
    return bool(known.spec.node) and known.spec.direct is None


def astray_of(known: Iterable[Known], pods: Iterable[Json]) -> set[str]:
    """The volumes whose holder is missing or has ended, or that have one which no record wants."""
    there = list(pods)
    found = {name_of(pod): volume_of(pod) for pod in there}
    ended = {name_of(pod) for pod in there if _has_ended(pod)}
    wanted = {pod_name(each.volume_id, each.spec.node): each.volume_id for each in known if wants_holder(each)}
    return {(wanted | found)[name] for name in (wanted.keys() ^ found.keys()) | (wanted.keys() & ended)}


def volume_of(pod: Json) -> str:
    """The volume whose holder it is."""
    return str(pod["metadata"].get("annotations", {}).get(_VOLUME, ""))


def refuse_open(volume_id: str, node: str, device: str) -> FailedPrecondition:
    """That a node may still write."""
    return FailedPrecondition(
        f"volume {volume_id} cannot be taken from node {node}: it may be open there as {device}, and to take its "
        f"device away would break what is written; let its pods end and the driver on that node unstage it. If the "
        f"node is off for good, say so by the taint {_OUT_OF_SERVICE}, or delete its Node object"
    )


def node_of(pod: Json) -> str:
    """The node that a holder is bound to."""
    return str(pod["spec"].get("nodeName"))


def _is_off(node: Json) -> bool:
    return any(taint.get("key") == _OUT_OF_SERVICE for taint in node["spec"].get("taints", ()))


def _has_ended(pod: Json) -> bool:
    """Whether nothing of it runs, nor ever will: a node's graceful shutdown does that to all its pods."""
    return pod.get("status", {}).get("phase") in ("Failed", "Succeeded")


def _is_ready(pod: Json) -> bool:
    statuses = pod.get("status", {}).get("containerStatuses", ())
    return bool(statuses) and all(each.get("ready") and each.get("started") for each in statuses)


def _waiting(pod: Json) -> str:
    """Why its container does not run: by kubelet, which names the image that it cannot pull, or, where it has ended, by
    its own last line; "" where nobody says anything.
    """
    return one_line(
        " ".join(filter(None, map(_said, pod.get("status", {}).get("containerStatuses", ())))), _MOST_QUOTED
    )


def _said(container: Json) -> str:
    state = container.get("state", {})
    waiting = state.get("waiting", {})
    ended = state.get("terminated") or (
        container.get("lastState", {}).get("terminated") if waiting.get("reason") == "CrashLoopBackOff" else None
    )
    lines = str((ended or {}).get("message", "")).strip().splitlines()
    return lines[-1] if lines else str(waiting.get("message", ""))
