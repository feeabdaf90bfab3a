"""The cluster that the tests see."""

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from tests.cluster.api import ApiError, Json
from tests.cluster.commands import ClusterError, Output, run
from tests.cluster.control_plane import ControlPlane
from tests.cluster.node import Node
from tests.cluster.settings import DISK, LOGS, SCRATCH, binaries

T = TypeVar("T")
Manifest = str | Json | list[Json] | Path

_POLL_SECONDS = 0.15
_INSTALL_SECONDS = 300  # an image agent is ready when kubelet has mounted the certificate that the operator makes
_CLEAN_SECONDS = 120
_EVENTS_SHOWN = 25
_OWNERS = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job")  # of pods, which they would make anew


def _names(objects: list[Json], kind: str) -> set[str]:
    return {one["metadata"]["name"] for one in objects if one["kind"] == kind}


class Cluster:
    """A control plane and its nodes, up while it is open.

    `api` reads as the administrator; `control_plane` has the servers. One node is there from the start, further ones
    come with `node(2)`.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._nodes: dict[int, Node] = {}
        self._joined: set[int] = set()
        self._namespaces: list[str] = []
        self._installed: dict[Path, list[Json]] = {}
        self._serial = 0
        self.phases: list[tuple[str, float]] = []
        self._begin = time.monotonic()

    def _phase(self, name: str) -> None:
        self.phases.append((name, time.monotonic() - self._begin))

    def start(self) -> None:
        """Bring it up: control plane, first node Ready. `phases` tells seconds since the start."""
        LOGS.mkdir(parents=True)
        self.control_plane = control_plane = ControlPlane()
        self.api = control_plane.api
        self._stack.callback(control_plane.kill)
        self._phase("certificates")
        control_plane.etcd.start()
        control_plane.apiserver.start()
        node = self._open_node(1)
        self._phase("guest started")
        control_plane.apiserver.wait()
        self._phase("apiserver")
        control_plane.controller_manager.start()
        control_plane.scheduler.start()
        control_plane.controller_manager.wait()
        control_plane.scheduler.wait()
        self._phase("controller-manager, scheduler")
        node.wait_ready()
        self._joined.add(node.number)
        self._phase("node ready")
        self.wait("the default service account", lambda: self.api.find("ServiceAccount", "default", "default"), 60)
        self._phase("service account")

    def close(self) -> None:
        """Take it down; logs stay in `LOGS`."""
        self._stack.close()

    def _open_node(self, number: int) -> Node:
        node = Node(number, Path(os.environ[DISK]), self.control_plane.pki, self.control_plane.api)
        node.open()
        self._stack.callback(node.close)
        self._nodes[number] = node
        return node

    def node(self, number: int = 1) -> Node:
        """A node; the first call for one boots it, waits until it is Ready and has every installed driver. It stays."""
        node = self._nodes.get(number) or self._open_node(number)
        if number not in self._joined:
            node.wait_ready()
            self._wait_installed()
            self._joined.add(number)
        return node

    @property
    def nodes(self) -> list[Node]:
        """Those that were booted."""
        return list(self._nodes.values())

    # Objects.

    def kubectl(self, *args: str, stdin: str | bytes = b"", timeout: float = 60, check: bool = True) -> Output:
        """Run kubectl as the administrator; ClusterError if it takes longer or, with `check`, fails."""
        env = {"KUBECONFIG": str(self.control_plane.kubeconfig), "KUBECACHEDIR": str(SCRATCH / "kubectl")}
        data = stdin.encode() if isinstance(stdin, str) else stdin
        return run([str(binaries() / "kubectl"), *args], timeout=timeout, stdin=data, env=env, check=check)

    def apply(self, manifest: Manifest, namespace: str = "") -> list[Json]:
        """`kubectl apply`: YAML text, objects, a file, or a folder with a kustomization. The objects as the apiserver
        has them; ClusterError if it refuses one.
        """
        options = ["-o", "json", *(["-n", namespace] if namespace else [])]
        output = self._with(manifest, "apply", *options)
        answer = json.loads(output.stdout)
        objects: list[Json] = answer["items"] if answer["kind"] == "List" else [answer]
        return objects

    def create(self, manifest: Manifest) -> None:
        """`kubectl create` of what `apply` takes; ClusterError if something of it is there."""
        self._with(manifest, "create")

    def delete(self, manifest: Manifest, namespace: str = "", *, wait: bool = True, timeout: float = 120) -> None:
        """`kubectl delete` of what `apply` takes; absent is fine."""
        scope = ["-n", namespace] if namespace else []
        options = ["--ignore-not-found", f"--wait={str(wait).lower()}", f"--timeout={timeout:g}s"]
        self._with(manifest, "delete", *scope, *options, timeout=timeout + 10)

    def _with(self, manifest: Manifest, verb: str, *options: str, timeout: float = 60) -> Output:
        if isinstance(manifest, Path):
            return self.kubectl(verb, "-k" if manifest.is_dir() else "-f", str(manifest), *options, timeout=timeout)
        if isinstance(manifest, list):
            manifest = {"apiVersion": "v1", "kind": "List", "items": manifest}
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        return self.kubectl(verb, "-f", "-", *options, stdin=text, timeout=timeout)

    def get(self, kind: str, name: str, namespace: str = "") -> Json | None:
        """An object, None if there is none. Kinds go by any name that kubectl knows."""
        return self.api.find(kind, name, namespace)

    def items(self, kind: str, namespace: str = "", *, labels: str = "", fields: str = "") -> list[Json]:
        """The objects of a kind, of one namespace or of all."""
        return self.api.items(kind, namespace, labels=labels, fields=fields)

    def wait(self, what: str, condition: Callable[[], T | None], timeout: float = 60) -> T:
        """Ask again and again until the answer is true, and return it. An AssertionError or ApiError of `condition`
        counts as not yet.

        ClusterError after `timeout` seconds: `what` is what was waited for; the last answer and the latest events of
        the tests' namespaces follow.
        """
        deadline = time.monotonic() + timeout
        while True:
            last: object
            try:
                if answer := condition():
                    return answer
                last = answer
            except (AssertionError, ApiError) as error:
                last = error
            if time.monotonic() > deadline:
                raise ClusterError(f"No {what} after {timeout:g} s. Last seen: {last!r}\n{self._recent()}")
            time.sleep(_POLL_SECONDS)

    def _recent(self) -> str:
        lines = []
        with contextlib.suppress(ApiError):
            for namespace in self._namespaces:
                for event in self._events(namespace)[-_EVENTS_SHOWN:]:
                    involved = event["involvedObject"]
                    lines.append(f"{involved['kind']} {involved['name']}: {event['reason']}: {event.get('message')}")
        return "\n".join(lines) or "There are no events."

    def _events(self, namespace: str, fields: str = "") -> list[Json]:
        return sorted(
            self.items("Event", namespace, fields=fields),
            key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "",
        )

    def events(self, kind: str, name: str, namespace: str) -> list[str]:
        """The messages of an object's events, the oldest first."""
        fields = f"involvedObject.kind={kind},involvedObject.name={name}"
        return [event.get("message", "") for event in self._events(namespace, fields)]

    def wait_event(self, kind: str, name: str, namespace: str, *words: str, timeout: float = 90) -> str:
        """Until an event of an object says all these, and that event's message."""

        def said() -> str | None:
            told = self.events(kind, name, namespace)
            return next((text for text in told if all(word in text for word in words)), None)

        return self.wait(f"event of {kind} {name} with {words}", said, timeout)

    # Pods.

    def pod_running(self, name: str, namespace: str, timeout: float = 90) -> Json:
        """Wait until a pod is Ready, since the last boot of its node, and return it."""

        def running() -> Json:
            pod = self.get("Pod", name, namespace)
            assert pod, "the pod is not there"
            return self.check_running(pod)

        return self.wait(f"ready pod {name}", running, timeout)

    def check_running(self, pod: Json) -> Json:
        """The pod. Raises AssertionError unless it is Ready, since the last boot of its node."""
        status = pod["status"]
        ready = {"type": "Ready", "status": "True"}
        assert any(ready.items() <= condition.items() for condition in status.get("conditions", [])), status
        node = next(node for node in self.nodes if node.name == pod["spec"]["nodeName"])
        for container in status["containerStatuses"]:
            started = container["state"].get("running", {}).get("startedAt")
            assert started, status
            assert datetime.fromisoformat(started) >= node.booted_at, "what is seen is from before the boot"
        return pod

    def pod_finished(self, name: str, namespace: str, timeout: float = 90) -> Json:
        """Wait until a pod has Succeeded, and return it."""

        def finished() -> Json | None:
            pod = self.get("Pod", name, namespace)
            assert pod, "the pod is not there"
            assert pod["status"]["phase"] == "Succeeded", pod["status"]
            return pod

        return self.wait(f"finished pod {name}", finished, timeout)

    def logs(self, pod: str, container: str, namespace: str) -> str:
        """What a container has written."""
        path = f"{self.api.path('Pod', pod, namespace)}/log?container={container}"
        return self.api.raw("GET", path).decode(errors="replace")

    def pod_exec(
        self,
        pod: str,
        argv: Sequence[str],
        namespace: str,
        *,
        container: str = "",
        stdin: bytes = b"",
        timeout: float = 60,
    ) -> bytes:
        """Run a command in a container and return its standard output; ClusterError if it fails."""
        options = ["-n", namespace, *(["-c", container] if container else []), *(["-i"] if stdin else [])]
        return self.kubectl("exec", *options, pod, "--", *argv, stdin=stdin, timeout=timeout).stdout

    # Namespaces.

    @contextlib.contextmanager
    def namespace(self, labels: Mapping[str, str] | None = None) -> Iterator[str]:
        """A fresh namespace. At the end it is deleted, and with it everything in it: ClusterError if a pod, a claim or
        a volume of one stays.
        """
        self._serial += 1
        name = f"test-{self._serial}-{secrets.token_hex(2)}"
        self.api.create(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": dict(labels or {})}}
        )
        self._namespaces.append(name)
        try:
            # A pod is refused as long as there is none.
            self.wait("service account", lambda: self.get("ServiceAccount", "default", name), 30)
            yield name
        finally:
            self.delete_namespace(name)
            self._namespaces.remove(name)

    def delete_namespace(self, name: str) -> None:
        """Delete a namespace, and wait until its pods, its claims and their volumes are gone."""
        self.api.delete("Namespace", name)

        def left() -> bool:
            # The namespace controller begins after five seconds. Nothing new can be made in there as of now.
            for kind in (*_OWNERS, "Pod", "PersistentVolumeClaim"):
                self.api.raw("DELETE", self.api.path(kind, namespace=name), {"gracePeriodSeconds": 1})
            there = [one for kind in ("Pod", "PersistentVolumeClaim") for one in self.items(kind, name)]
            there += [
                volume
                for volume in self.items("PersistentVolume")
                if volume["spec"].get("claimRef", {}).get("namespace") == name
            ]
            assert not there, [f"{one['kind']} {one['metadata']['name']}" for one in there]
            return True

        self.wait(f"end of what was in namespace {name}", left, _CLEAN_SECONDS)

    # The driver.

    def install(self, kustomization: Path, timeout: float = _INSTALL_SECONDS) -> list[Json]:
        """Apply a kustomization and wait until its DaemonSets and Deployments are available and each node has its CSI
        drivers. The objects as the apiserver has them.
        """
        objects = self._installed[kustomization] = self.apply(kustomization)
        self._wait_installed(timeout)
        return objects

    def uninstall(self, kustomization: Path, timeout: float = _CLEAN_SECONDS) -> None:
        """Delete what `install` applied and wait until it is gone and no node has its CSI drivers."""
        installed = self._installed.pop(kustomization)
        gone = _names(installed, "CSIDriver")
        self._let_go_of_namespace(installed)
        self.delete(kustomization, timeout=timeout)

        def unregistered() -> bool:
            for node in self.nodes:
                left = gone & self._drivers_on(node)
                assert not left, f"{node.name} still has {left}"
            return True

        self.wait(f"end of driver {', '.join(gone)}", unregistered, timeout)

    def _let_go_of_namespace(self, installed: list[Json]) -> None:
        """As docs/kubernetes.md has it: what keeps a namespace with keys or records goes before it."""
        keeping = [name for name in _names(installed, "ValidatingAdmissionPolicyBinding") if "-namespace" in name]
        if keeping:
            self.kubectl("delete", "validatingadmissionpolicybinding", *keeping)
            namespaces = _names(installed, "Namespace")
            look = partial(self.kubectl, "delete", "namespace", *namespaces, "--dry-run=server", check=False)
            self.wait("end of what keeps the namespace", lambda: look().code == 0)

    def _wait_installed(self, timeout: float = _INSTALL_SECONDS) -> None:
        for objects in self._installed.values():
            for one in objects:
                if one["kind"] in {"DaemonSet", "Deployment"}:
                    self.wait_rolled_out(one["kind"], one["metadata"]["name"], one["metadata"]["namespace"], timeout)
            wanted = _names(objects, "CSIDriver")
            for node in self.nodes:
                self.wait(f"driver {wanted} on {node.name}", partial(self._has_drivers, node, wanted), timeout)

    def _has_drivers(self, node: Node, wanted: set[str]) -> bool:
        found = self._drivers_on(node)
        assert found >= wanted, found
        return True

    def _drivers_on(self, node: Node) -> set[str]:
        csi_node = self.api.get("CSINode", node.name)
        return {driver["name"] for driver in csi_node["spec"]["drivers"] or []}

    def wait_rolled_out(self, kind: str, name: str, namespace: str, timeout: float = _INSTALL_SECONDS) -> None:
        """Until every pod of a DaemonSet, Deployment or StatefulSet is available and of its latest template."""

        def rolled_out() -> bool:
            one = self.api.get(kind, name, namespace)
            status = one["status"]
            assert status.get("observedGeneration") == one["metadata"]["generation"], status
            if kind == "DaemonSet":
                wanted, updated = status["desiredNumberScheduled"], status.get("updatedNumberScheduled", 0)
                available = status.get("numberAvailable", 0)
                assert wanted == len(self._nodes), status
            else:
                wanted, updated = one["spec"]["replicas"], status.get("updatedReplicas", 0)
                available = status.get("availableReplicas", 0)
                assert status.get("replicas", 0) == wanted, status
            assert wanted == updated == available, status
            return True

        self.wait(f"{kind} {name} rolled out", rolled_out, timeout)

    # When a test has failed.

    def save_state(self, folder: Path) -> None:
        """Write what can be told about the cluster now: objects, events, what containers wrote."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        kinds = "pods,pvc,pv,daemonsets,deployments,statefulsets,csinodes,csidrivers,csistoragecapacities,events,nodes"
        for name, arguments in {
            "objects.yaml": ("get", kinds, "-A", "-o", "yaml"),
            "events.txt": ("get", "events", "-A", "--sort-by=.lastTimestamp"),
            "pods.txt": ("get", "pods", "-A", "-o", "wide"),
        }.items():
            try:
                said = self.kubectl(*arguments, timeout=30, check=False).said
            except ClusterError as error:
                said = str(error)
            (folder / name).write_text(said)
        for node in self.nodes:
            with contextlib.suppress(OSError, shutil.Error):  # kubelet deletes logs meanwhile
                node.save_pod_logs(folder / "pods")
