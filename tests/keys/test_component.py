"""The components of deploy/kubernetes/kms over each driver: who may do what, asked of a real API."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.keys.apiserver import ApiServer
from tests.kustomize import built, told

NODE, CONTROLLER = "luks-csi-node", "luks-csi-controller"
OWN_SECRETS = {("secrets", verb) for verb in ("get", "create", "patch", "delete")}
EVERYWHERE = {("secrets", "get"), ("configmaps", "get"), ("serviceaccounts/token", "create")}
ASKED = OWN_SECRETS | EVERYWHERE
_RBAC = "/apis/rbac.authorization.k8s.io/v1"
_PARTS = "luks-csi/deploy/kubernetes/kms"


def over(folder: Path, driver: str, *more: str, namespace: str = "") -> list[Any]:
    """What the kustomization of the page makes, over another driver and with more components; in another namespace."""
    wanted = told("kms.md", "components: [luks-csi/deploy/kubernetes/kms]")
    wanted["resources"] = [f"luks-csi/deploy/kubernetes/{driver}"]
    wanted["components"] += [f"{_PARTS}/{each}" for each in more]
    if namespace:
        wanted |= {"namespace": namespace, "transformers": ["luks-csi/deploy/kubernetes/namespace"]}
    return built(folder, wanted)


def pods(things: list[Any]) -> dict[str, Any]:
    """What pods of each kind have: `node` and `controller`."""
    found = [each for each in things if each["kind"] in ("DaemonSet", "Deployment")]
    return {each["metadata"]["name"].removeprefix("luks-csi-"): each["spec"]["template"]["spec"] for each in found}


def reaches_keys(pod: Any, container: str) -> set[str]:
    """What of the two that a KMS takes are mounted, and there."""
    (driver,) = (each for each in pod["containers"] if each["name"] == container)
    there = {each["name"] for each in pod["volumes"]}
    return {each["name"] for each in driver["volumeMounts"]} & there & {"token", "kms-config"}


def namespace_of(things: list[Any]) -> str:
    (name,) = (each["metadata"]["name"] for each in things if each["kind"] == "Namespace")
    return str(name)


@contextmanager
def granted(api: ApiServer, things: list[Any]) -> Iterator[str]:
    """Have the roles and bindings of these in the API; the driver's namespace."""
    own = namespace_of(things)
    kinds = {
        "Role": f"namespaces/{own}/roles",
        "RoleBinding": f"namespaces/{own}/rolebindings",
        "ClusterRole": "clusterroles",
        "ClusterRoleBinding": "clusterrolebindings",
    }
    there = {each["metadata"]["name"] for each in api.ask("GET", "/api/v1/namespaces")["items"]}
    with ExitStack() as stack:
        if own not in there:
            api.namespace(own)  # to stay: nothing here would end it
        for each in things:
            if each["kind"] in kinds:
                assert each["metadata"].get("namespace", own) == own
                path = f"{_RBAC}/{kinds[each['kind']]}"
                api.ask("POST", path, each)
                stack.callback(api.ask, "DELETE", f"{path}/{each['metadata']['name']}")
        yield own


def rights(api: ApiServer, own: str, account: str, namespace: str) -> set[tuple[str, str]]:
    """What of ASKED an account may do in a namespace."""

    def may(resource: str, verb: str) -> bool:
        what, _, part = resource.partition("/")
        asked = {"namespace": namespace, "verb": verb, "resource": what, "subresource": part, "name": "some"}
        review = {"spec": {"user": f"system:serviceaccount:{own}:{account}", "resourceAttributes": asked}}
        path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
        return bool(api.ask("POST", path, review)["status"]["allowed"])

    return {each for each in ASKED if may(*each)}


@pytest.mark.parametrize("driver", ["driver", "lvm", "names/ceph", "names/longhorn"])
def test_a_node_that_makes_its_volumes_reaches_a_kms_and_its_controller_does_not(
    tmp_path: Path, api: ApiServer, driver: str
) -> None:
    # In the namespace luks-csi of this API the account has more rights.
    things = over(tmp_path / "own", driver, namespace="storage")
    found = pods(things)
    assert reaches_keys(found["node"], "driver") == {"token", "kms-config"}
    assert reaches_keys(found["controller"], "controller") == set()
    with granted(api, things) as own:
        assert rights(api, own, NODE, own) == OWN_SECRETS | {("configmaps", "get")}
        assert rights(api, own, NODE, "default") == {("secrets", "get")}  # the provisioner's, which is of the account
        assert rights(api, own, CONTROLLER, own) == {("secrets", "get")}  # the resizer's
    with granted(api, over(tmp_path / "all", driver, "tenants", namespace="storage")) as own:
        assert rights(api, own, NODE, "default") == EVERYWHERE
        assert rights(api, own, CONTROLLER, "default") == {("secrets", "get")}


@pytest.mark.parametrize("driver", ["rbd", "csi-backend", "names/ceph-rbd"])
def test_where_the_controller_makes_volumes_both_reach_a_kms(tmp_path: Path, api: ApiServer, driver: str) -> None:
    things = over(tmp_path / "own", driver, "controller")
    found = pods(things)
    assert reaches_keys(found["node"], "driver") == {"token", "kms-config"}
    assert reaches_keys(found["controller"], "controller") == {"token", "kms-config"}
    with granted(api, things) as own:
        for account in (NODE, CONTROLLER):
            assert rights(api, own, account, own) == OWN_SECRETS | {("configmaps", "get")}
        assert rights(api, own, NODE, "default") == set()
        assert rights(api, own, CONTROLLER, "default") == {("secrets", "get")}  # the sidecars'
    with granted(api, over(tmp_path / "all", driver, "tenants", "controller")) as own:
        for account in (NODE, CONTROLLER):
            assert rights(api, own, account, "default") == EVERYWHERE


def test_a_controller_without_volumes_gets_no_right_on_keys(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        over(tmp_path, "driver", "controller")
    assert "testing value /spec/template/spec/containers/0/args/0" in refused.value.stderr


def test_two_drivers_share_no_right_of_the_whole_cluster(tmp_path: Path) -> None:
    names = [
        {each["metadata"]["name"] for each in over(tmp_path / str(number), driver, *more) if "Cluster" in each["kind"]}
        for number, (driver, *more) in enumerate(
            [("driver", "tenants"), ("lvm", "tenants"), ("rbd", "tenants", "controller"), ("csi-backend", "tenants")]
        )
    ]
    assert len(set.union(*names)) == sum(len(each) for each in names)
