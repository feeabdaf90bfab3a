"""The rights that the manifests give: none is missing, none is spare, and one that is taken away is noticed."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from http import HTTPStatus

import pytest

from tests.cluster.api import Json
from tests.cluster.cluster import Cluster
from tests.cluster.documents import applied
from tests.cluster.driver import CHEAP, NAMESPACE, pod
from tests.cluster.pods import Pods

_NOTICED_SECONDS = 90
_USED_SECONDS = 150  # capacity is published once a minute
# Besides "list", which is asked for where an apiserver cannot stream lists.
_SELDOM = {
    ("luks-csi-node", "", "events", "patch"): "the same event once more",
    ("luks-csi-controller", "", "events", "patch"): "the same event once more",
    ("luks-csi-controller", "", "secrets", "get"): "classes that name a controller-expand-secret",
    ("luks-csi-controller", "coordination.k8s.io", "leases", "create"): "once in a cluster's life",
}
_COMPONENTS = {"luks-csi-node": "provisioner", "luks-csi-controller": "resizer"}


def _objects(cluster: Cluster) -> list[Json]:
    """The objects of the manifest, in the driver's namespace."""
    found = [
        *cluster.items("ClusterRole"),
        *cluster.items("Role", NAMESPACE),
        *cluster.items("ClusterRoleBinding"),
        *cluster.items("RoleBinding", NAMESPACE),
    ]
    return [one for one in found if one["metadata"]["name"].startswith("luks-csi-")]


def _account_of(cluster: Cluster, role: Json) -> str:
    """The service account that a role is bound to."""
    kind, name = role["kind"], role["metadata"]["name"]
    (account,) = {
        subject["name"]
        for one in _objects(cluster)
        if one["kind"] == f"{kind}Binding" and one["roleRef"]["name"] == name
        for subject in one["subjects"]
    }
    return str(account)


def _roles(cluster: Cluster) -> list[Json]:
    return [one for one in _objects(cluster) if one["kind"] in {"ClusterRole", "Role"}]


def _granted(cluster: Cluster) -> set[tuple[str, str, str, str]]:
    """Account, API group, resource and verb of everything that is granted."""
    return {
        (_account_of(cluster, role), group, resource, verb)
        for role in _roles(cluster)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def _requests(cluster: Cluster, since: float) -> Iterator[tuple[tuple[str, str, str, str], int, Json]]:
    """What our service accounts asked of the apiserver, as `_granted` has it, and the HTTP status that they got."""
    for event in cluster.control_plane.audit():
        # The token of an account that has just been deleted is nobody's.
        found = re.fullmatch(rf"system:serviceaccount:{NAMESPACE}:(.*)", event["user"].get("username", ""))
        if not found or "objectRef" not in event or _time(event) < since:
            continue
        about = event["objectRef"]
        resource = "/".join(filter(None, (about["resource"], about.get("subresource"))))
        status = event.get("responseStatus", {}).get("code", 0)
        yield (found[1], about.get("apiGroup", ""), resource, event["verb"]), status, event


def _time(event: Json) -> float:
    return datetime.fromisoformat(event["requestReceivedTimestamp"]).timestamp()


def _restart(cluster: Cluster, account: str) -> None:
    """Replace the pods of an account: what they knew they ask for anew."""
    kind = {"luks-csi-node": "DaemonSet", "luks-csi-controller": "Deployment"}[account]
    cluster.kubectl("-n", NAMESPACE, "rollout", "restart", f"{kind}/{account}")
    cluster.wait_rolled_out(kind, account, NAMESPACE)


@contextmanager
def _without(cluster: Cluster, kind: str, name: str, resource: str, *verbs: str) -> Iterator[Callable[[], bool]]:
    """Take verbs on a resource out of a role for a while; all other rules stay. What tells whether one was missed: the
    apiserver has refused it, and the sidecar's log says so.
    """
    since = time.time()
    (role,) = (one for one in _roles(cluster) if (one["kind"], one["metadata"]["name"]) == (kind, name))
    rules = []
    for rule in role["rules"]:
        others = [one for one in rule["resources"] if one != resource]
        rest = [verb for verb in rule["verbs"] if verb not in verbs]
        rules += [{**rule, "resources": others}] if others else []
        rules += [{**rule, "resources": [resource], "verbs": rest}] if resource in rule["resources"] and rest else []
    namespace = role["metadata"].get("namespace", "")
    cluster.api.patch(kind, name, namespace, {"rules": rules})
    account = _account_of(cluster, role)

    def missed() -> bool:
        refused = {request for request, status, _ in _requests(cluster, since) if status == HTTPStatus.FORBIDDEN}
        assert any((one[0], one[2]) == (account, resource) and one[-1] in verbs for one in refused), refused
        names = [one["metadata"]["name"] for one in cluster.items("Pod", NAMESPACE)]
        ours = [name for name in names if name.startswith(f"{account}-")]
        logs = "".join(cluster.logs(name, _COMPONENTS[account], NAMESPACE) for name in ours)
        plain = resource.partition("/")[0]
        return any("forbidden" in line.lower() and plain in line for line in logs.splitlines())

    try:
        yield missed
    finally:
        cluster.api.patch(kind, name, namespace, {"rules": role["rules"]})


@pytest.mark.timeout(900)
def test_every_right_is_used_and_none_is_missing(pods: Pods) -> None:
    """Over a small life of volumes and classes, by the apiserver's audit log."""
    since = time.time() - 2
    # Only with Immediate does a node write its name into the claim; else the scheduler does.
    immediate, passing = (
        _class(pods.cluster, CHEAP, f"{CHEAP}-{mode.lower()}", mode) for mode in ("Immediate", "WaitForFirstConsumer")
    )
    with applied(pods.cluster, immediate):
        with applied(pods.cluster, passing):
            for account in _COMPONENTS:
                _restart(pods.cluster, account)
            pods.claim()
            pods.start("one")
            pods.claim("now", storage_class=immediate["metadata"]["name"])
            pods.volume("now")
            pods.resize("48Mi")
            pods.wait_resized("48Mi")
            pods.cluster.wait("capacity of a class", lambda: _told(pods.cluster, passing), _USED_SECONDS)
        pods.cluster.wait("end of the class's capacity", lambda: not _told(pods.cluster, passing), _USED_SECONDS)
        pods.end("one")
        for name in ("data", "now"):
            pods.cluster.api.delete("PersistentVolumeClaim", name, pods.namespace)
        pods.cluster.wait("end of the volumes", lambda: not pods.cluster.items("PersistentVolume"))
    used = {request for request, status, _ in _requests(pods.cluster, 0) if status != HTTPStatus.FORBIDDEN}
    assert not {one for one in _granted(pods.cluster) - used if one[-1] != "list" and one not in _SELDOM}
    refused = [
        (request, event["requestURI"])
        for request, status, event in _requests(pods.cluster, since)
        if status == HTTPStatus.FORBIDDEN
    ]
    assert not refused


def _told(cluster: Cluster, storage_class: Json) -> bool:
    name = storage_class["metadata"]["name"]
    return any(one["storageClassName"] == name for one in _capacities(cluster))


def _class(cluster: Cluster, name: str, copy: str, mode: str) -> Json:
    """A copy of a class with another binding mode."""
    found = cluster.api.get("StorageClass", name)
    return {**found, "metadata": {"name": copy}, "volumeBindingMode": mode}


def test_a_provisioner_that_may_not_write_volumes_is_noticed(pods: Pods) -> None:
    with _without(pods.cluster, "ClusterRole", "luks-csi-provisioner", "persistentvolumes", "create") as missed:
        pods.claim()
        pods.cluster.apply([pod("one")], pods.namespace)
        pods.cluster.wait("refusal", missed, _NOTICED_SECONDS)
        assert pods.status()["phase"] == "Pending"
    pods.cluster.pod_running("one", pods.namespace, _NOTICED_SECONDS)


def test_a_provisioner_that_may_not_read_secrets_is_noticed_in_the_claim(pods: Pods) -> None:
    with _without(pods.cluster, "ClusterRole", "luks-csi-provisioner", "secrets", "get"):
        pods.claim()
        pods.cluster.apply([pod("one")], pods.namespace)
        pods.cluster.wait_event("PersistentVolumeClaim", "data", pods.namespace, 'secrets "key" is forbidden')
        assert pods.status()["phase"] == "Pending"
    pods.cluster.pod_running("one", pods.namespace, _NOTICED_SECONDS)


def test_a_provisioner_that_may_not_delete_volumes_is_noticed(pods: Pods) -> None:
    pods.claim()
    pods.start("one")
    name = pods.volume().id
    pods.end("one")
    with _without(pods.cluster, "ClusterRole", "luks-csi-provisioner", "persistentvolumes", "delete") as missed:
        pods.cluster.api.delete("PersistentVolumeClaim", "data", pods.namespace)
        pods.cluster.wait("refusal", missed, _NOTICED_SECONDS)
        assert pods.cluster.get("PersistentVolume", name)
    pods.cluster.wait("end of the volume", lambda: not pods.cluster.get("PersistentVolume", name), _NOTICED_SECONDS)


@pytest.mark.timeout(900)
def test_a_provisioner_that_may_not_tell_capacity_is_noticed(pods: Pods) -> None:
    with _without(pods.cluster, "Role", "luks-csi-provisioner", "csistoragecapacities", "create") as missed:
        _restart(pods.cluster, "luks-csi-node")
        pods.cluster.wait("refusal", missed, _NOTICED_SECONDS)
        # Those of the pod that was replaced have gone with it.
        pods.cluster.wait("end of the capacity objects", lambda: not _capacities(pods.cluster), _NOTICED_SECONDS)
        pods.claim()
        pods.cluster.apply([pod("one")], pods.namespace)
        pods.cluster.wait_event("Pod", "one", pods.namespace, "did not have enough free storage")
    pods.cluster.pod_running("one", pods.namespace, 2 * _NOTICED_SECONDS)


def test_a_resizer_that_may_not_write_claims_is_noticed(pods: Pods) -> None:
    pods.claim()
    pods.start("one")
    with _without(pods.cluster, "ClusterRole", "luks-csi-resizer", "persistentvolumeclaims/status", "patch") as missed:
        pods.resize("48Mi")
        pods.cluster.wait("refusal", missed, _NOTICED_SECONDS)
        assert pods.status()["capacity"]["storage"] == "32Mi"
    pods.wait_resized("48Mi")


def test_a_resizer_that_may_not_write_leases_is_noticed(pods: Pods) -> None:
    with _without(pods.cluster, "Role", "luks-csi-resizer", "leases", "get", "create", "update") as missed:
        _restart(pods.cluster, "luks-csi-controller")
        pods.cluster.wait("refusal", missed, _NOTICED_SECONDS)
        pods.claim()
        pods.start("one")
        pods.resize("48Mi")
        time.sleep(5)  # as long as it takes else
        assert pods.status()["capacity"]["storage"] == "32Mi"
    pods.wait_resized("48Mi")


def test_the_driver_has_no_token(pods: Pods) -> None:
    for container in ("driver", "register"):
        script = "import os; print(os.path.exists('/var/run/secrets/kubernetes.io'))"
        assert pods.driver.exec(pods.node, ["python3", "-c", script], container=container).strip() == "False"
    assert pods.cluster.get("ServiceAccount", "default", NAMESPACE)
    roles = [one for one in pods.cluster.items("RoleBinding", NAMESPACE) if _binds_default(one)]
    assert not roles


def _binds_default(binding: Json) -> bool:
    return any(subject.get("name") == "default" for subject in binding.get("subjects") or [])


def _capacities(cluster: Cluster) -> list[Json]:
    return cluster.items("CSIStorageCapacity", NAMESPACE)


@pytest.fixture(autouse=True)
def _as_it_was(pods: Pods) -> Iterator[None]:
    """The rights after each test are those before it."""
    before = _granted(pods.cluster)
    yield
    assert _granted(pods.cluster) == before
