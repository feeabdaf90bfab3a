"""The components of deploy/kubernetes/kms over each driver: who may do what, asked of a real API."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.keys.apiserver import ApiServer
from tests.kustomize import built, told

NODE, CONTROLLER = "luks-csi-node", "luks-csi-controller"
PARTS = "luks-csi/deploy/kubernetes/kms"
KEYS = {("secrets", verb) for verb in ("create", "patch", "delete")}
READ = {("secrets", "get"), ("configmaps", "get")}
TOKENS = {("serviceaccounts/token", "create")}
_RBAC = "/apis/rbac.authorization.k8s.io/v1"
_ADMISSION = "/apis/admissionregistration.k8s.io/v1"
_SECONDS = 60  # until a policy counts; no verdict hangs on it


def over(folder: Path, driver: str, *parts: str, namespace: str = "") -> list[Any]:
    """What the kustomization of the page makes over another driver, with these components; in another namespace."""
    wanted = told("kms.md", f"components: [{PARTS}]")
    wanted["resources"] = [f"luks-csi/deploy/kubernetes/{driver}"]
    wanted["components"] = [f"{PARTS}/{each}".rstrip("/") for each in parts]
    if namespace:
        wanted |= {"namespace": namespace, "transformers": ["luks-csi/deploy/kubernetes/namespace"]}
    return built(folder, wanted)


def reaches_keys(things: list[Any], kind: str, container: str) -> set[str]:
    """What of the two that a KMS takes are mounted in a container, and there."""
    (pod,) = (each["spec"]["template"]["spec"] for each in things if each["kind"] == kind)
    (driver,) = (each for each in pod["containers"] if each["name"] == container)
    there = {each["name"] for each in pod["volumes"]}
    return {each["name"] for each in driver["volumeMounts"]} & there & {"token", "kms-config"}


@contextmanager
def granted(api: ApiServer, things: list[Any]) -> Iterator[str]:
    """Have the roles, bindings and policies of these in the API; the driver's namespace."""
    (own,) = (each["metadata"]["name"] for each in things if each["kind"] == "Namespace")
    places = {
        "Role": f"{_RBAC}/namespaces/{own}/roles",
        "RoleBinding": f"{_RBAC}/namespaces/{own}/rolebindings",
        "ClusterRole": f"{_RBAC}/clusterroles",
        "ClusterRoleBinding": f"{_RBAC}/clusterrolebindings",
        "ValidatingAdmissionPolicy": f"{_ADMISSION}/validatingadmissionpolicies",
        "ValidatingAdmissionPolicyBinding": f"{_ADMISSION}/validatingadmissionpolicybindings",
    }
    there = {each["metadata"]["name"] for each in api.ask("GET", "/api/v1/namespaces")["items"]}
    with ExitStack() as stack:
        if own not in there:
            api.namespace(own)  # to stay: nothing here would end it
        for each in things:
            if (place := places.get(each["kind"])) is not None:
                assert each["metadata"].get("namespace", own) == own
                api.ask("POST", place, each)
                stack.callback(api.ask, "DELETE", f"{place}/{each['metadata']['name']}")
        yield str(own)


def rights(api: ApiServer, own: str, account: str, namespace: str) -> set[tuple[str, str]]:
    """What of all that a component grants an account may do in a namespace."""

    def may(resource: str, verb: str) -> bool:
        what, _, part = resource.partition("/")
        asked = {"namespace": namespace, "verb": verb, "resource": what, "subresource": part, "name": "some"}
        review = {"spec": {"user": f"system:serviceaccount:{own}:{account}", "resourceAttributes": asked}}
        path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
        return bool(api.ask("POST", path, review)["status"]["allowed"])

    return {each for each in READ | KEYS | TOKENS if may(*each)}


ALL = ("generate", "service-accounts")


@pytest.mark.parametrize("driver", ["driver", "lvm", "names/ceph", "names/longhorn"])
def test_a_node_that_makes_its_volumes_reaches_a_kms_and_its_controller_does_not(
    tmp_path: Path, api: ApiServer, driver: str
) -> None:
    # In the namespace luks-csi of this API the account has more rights.
    things = over(tmp_path / "own", driver, "", namespace="storage")
    assert reaches_keys(things, "DaemonSet", "driver") == {"token", "kms-config"}
    assert reaches_keys(things, "Deployment", "controller") == set()
    sidecar = {("secrets", "get")}
    with granted(api, things) as own:
        assert rights(api, own, NODE, own) == READ
        assert rights(api, own, NODE, "default") == sidecar  # the provisioner's, which is of the account
        assert rights(api, own, CONTROLLER, own) == sidecar  # the resizer's
    with granted(api, over(tmp_path / "tenants", driver, "", "tenants", namespace="storage")) as own:
        assert rights(api, own, NODE, "default") == READ
    with granted(api, over(tmp_path / "all", driver, "", *ALL, namespace="storage")) as own:
        assert rights(api, own, NODE, own) == READ | KEYS | TOKENS
        assert rights(api, own, NODE, "default") == READ | TOKENS
        assert rights(api, own, CONTROLLER, own) == sidecar


@pytest.mark.parametrize("driver", ["rbd", "csi-backend", "names/ceph-rbd"])
def test_where_the_controller_makes_volumes_both_reach_a_kms(tmp_path: Path, api: ApiServer, driver: str) -> None:
    things = over(tmp_path / "own", driver, "central")
    assert reaches_keys(things, "DaemonSet", "driver") == {"token", "kms-config"}
    assert reaches_keys(things, "Deployment", "controller") == {"token", "kms-config"}
    with granted(api, things) as own:
        for account in (NODE, CONTROLLER):
            assert rights(api, own, account, own) == READ
        assert rights(api, own, NODE, "default") == set()
        assert rights(api, own, CONTROLLER, "default") == {("secrets", "get")}  # the sidecars'
    with granted(api, over(tmp_path / "all", driver, "central", *ALL)) as own:
        for account in (NODE, CONTROLLER):
            assert rights(api, own, account, own) == READ | KEYS | TOKENS
            assert rights(api, own, account, "default") == READ | TOKENS


@pytest.mark.parametrize("driver", ["lvm", "csi-backend"])
def test_the_namespace_of_keys_and_records_is_not_deleted_by_the_way(
    tmp_path: Path, api: ApiServer, driver: str
) -> None:
    """`kubectl delete -k .` has it, and reaches it first."""
    api.namespace(bystander := f"beside-{driver}")
    first = {"lvm": "", "csi-backend": "central"}[driver]
    parts = {"lvm": ["luks-csi-kms-namespace"], "csi-backend": ["luks-csi-kms-namespace", "luks-csi-over-namespace"]}
    things = over(tmp_path, driver, first, "generate", namespace=f"keys-of-{driver}")
    with granted(api, things) as own:

        def refusals(namespace: str) -> str:
            try:
                api.ask("DELETE", f"/api/v1/namespaces/{namespace}?dryRun=All")
            except AssertionError as refused:
                return str(refused)
            return ""

        until = time.monotonic() + _SECONDS
        while not any(each in refusals(own) for each in parts[driver]):
            assert time.monotonic() < until, "the policy does not count"
            time.sleep(0.2)
        assert f"the namespace {own} has" in refusals(own)
        assert refusals(bystander) == ""
        selectors = {
            each["metadata"]["name"].partition(".")[0]: each["spec"]["matchConstraints"]["namespaceSelector"]
            for each in things
            if each["kind"] == "ValidatingAdmissionPolicy" and "-namespace" in each["metadata"]["name"]
        }
        assert selectors == {each: {"matchLabels": {"kubernetes.io/metadata.name": own}} for each in parts[driver]}


def test_who_makes_keys_makes_no_other_secret(tmp_path: Path, api: ApiServer) -> None:
    """Whoever may make any secret has a token of any service account of the namespace."""
    with granted(api, over(tmp_path, "rbd", "central", "generate")) as own:
        place = f"/api/v1/namespaces/{own}/secrets"
        account = f"system:serviceaccount:{own}:{NODE}"

        def made(name: str, kind: str, account: str = account) -> str:
            """What the API says to an account's wish."""
            document = {
                "metadata": {"name": name, "annotations": {"kubernetes.io/service-account.name": CONTROLLER}},
                "type": kind,
            }
            try:
                api.ask("POST", f"{place}?dryRun=All", document, account)
            except AssertionError as refused:
                return str(refused)
            return "made"

        until = time.monotonic() + _SECONDS
        while (said := made("luks-csi-stolen", "Opaque")) == "made":
            assert time.monotonic() < until, "the policy does not count"
            time.sleep(0.2)
        assert f"and not {own}/luks-csi-stolen" in said
        assert "with keys of volumes alone" in made("luks-csi-key-stolen", "kubernetes.io/service-account-token")
        assert made("luks-csi-key-one", "Opaque") == "made"
        # The driver that a volume was moved to, which may change its key here.
        binding = {
            "metadata": {"name": "moved"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "luks-csi-kms-generate"},
            "subjects": [{"kind": "ServiceAccount", "namespace": "another", "name": NODE}],
        }
        api.ask("POST", f"{_RBAC}/namespaces/{own}/rolebindings", binding)
        assert "alone" in made("stolen", "Opaque", f"system:serviceaccount:another:{NODE}")
        api.ask("DELETE", f"{_RBAC}/namespaces/{own}/rolebindings/moved")
        api.secret(own, "csi-rbd-secret", userKey="some")
        with pytest.raises(AssertionError, match="with keys of volumes alone"):
            api.ask("DELETE", f"{place}/csi-rbd-secret", as_user=account)
        api.ask("DELETE", f"{place}/csi-rbd-secret")
        api.secret(own, "luks-csi-key-one", key="some")
        api.ask("DELETE", f"{place}/luks-csi-key-one", as_user=account)


GRANTED = {
    "luks-csi-kms": [(["secrets", "configmaps"], ["get"])],
    "luks-csi-kms-generate": [(["secrets"], ["create", "patch", "delete"])],
    "luks-csi-kms-tenants.luks-csi-rbd": [
        (["secrets", "configmaps"], ["get"]),
        (["serviceaccounts/token"], ["create"]),
    ],
}


def test_the_rules_are_these(tmp_path: Path) -> None:
    found = {
        each["metadata"]["name"]: [(rule["resources"], rule["verbs"]) for rule in each["rules"]]
        for each in over(tmp_path, "rbd", "central", *ALL)
        if each["kind"].endswith("Role") and "kms" in each["metadata"]["name"]
    }
    assert found == GRANTED


@pytest.mark.parametrize(
    ("driver", "parts", "said"),
    [
        ("rbd", [""], "so its component is kms~1central failed"),
        ("csi-backend", [""], "so its component is kms~1central failed"),
        ("driver", ["central"], "so its component is kms failed"),
        ("driver", ["", "tenants", "service-accounts"], "tenants"),
        ("driver", ["tenants"], "nothing selected by RoleBinding"),
        ("driver", ["generate", ""], "nothing selected by RoleBinding"),
        ("rbd", ["service-accounts", "central"], "nothing selected by RoleBinding"),
        ("rbd", ["central", ""], "nodes"),
    ],
    ids=str,
)
def test_a_component_that_is_not_the_drivers_or_not_in_its_turn_ends_the_build(
    tmp_path: Path, driver: str, parts: list[str], said: str
) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        over(tmp_path, driver, *parts)
    assert said in refused.value.stderr


def test_two_drivers_share_nothing_of_the_whole_cluster(tmp_path: Path) -> None:
    cases = [("driver", ""), ("lvm", ""), ("rbd", "central"), ("csi-backend", "central")]
    found = [
        {
            (each["kind"], each["metadata"]["name"])
            for each in over(tmp_path / str(number), driver, part, *ALL)
            if each["kind"].startswith(("Cluster", "Validating"))
        }
        for number, (driver, part) in enumerate(cases)
    ]
    assert len(set.union(*found)) == sum(map(len, found))
