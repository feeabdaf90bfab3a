"""What `luks-csi doctor --cluster` finds of agents and of the namespace that Longhorn's and Harvester's kinds need."""

import pytest

from csi_driver.kube.kinds import BACKING_IMAGE, CRD, MANAGED_BY, NAMESPACE, NODE, POD, Json, Kind
from csi_driver.operator.cluster_health import ClusterHealth
from csi_driver.operator.images import AGENT_LABELS
from csi_driver.volumes.finding import Finding
from tests.operator_fakes import NOW, FakeApi


class Api(FakeApi):
    """One in which nothing is made."""

    def create(self, kind: Kind, thing: Json, namespace: str = "", *, dry_run: bool = False) -> Json:
        raise AssertionError(f"a {kind} was made: {thing}, {namespace}, {dry_run}")


def found(api: Api, name: str = "their namespace") -> Finding:
    findings = ClusterHealth(api, "luks-csi", "luks.csi.internal").findings()
    (finding,) = (each for each in findings if each.name == name)
    return finding


def test_where_the_kinds_are_not_no_namespace_is_needed() -> None:
    assert (found(Api()).ok, found(Api()).found) == (True, "none is needed")


@pytest.mark.parametrize(
    ("namespace", "said"), [(None, "is not there"), ({"deletionTimestamp": NOW}, "is being deleted"), ({}, None)]
)
def test_a_namespace_that_is_missing_is_told(namespace: Json | None, said: str | None) -> None:
    api = Api()
    name = f"{BACKING_IMAGE.plural}.{BACKING_IMAGE.group}"
    api.put(CRD, {"metadata": {"name": name, "labels": {MANAGED_BY: "luks-csi"}}})
    if namespace is not None:
        api.put(NAMESPACE, {"metadata": {"name": "longhorn-system", **namespace}})
    finding = found(api)
    assert (finding.ok, finding.fatal) == (said is None, False)
    assert finding.found.endswith(said or "longhorn-system is there")
    assert said is None or finding.advice == "kubectl create namespace longhorn-system"


def test_a_node_that_tells_nothing_any_more_has_no_agent() -> None:
    api = Api()
    for node in ("one", "two"):
        status = {"conditions": [{"type": "Ready", "status": "Unknown" if node == "two" else "True"}]}
        api.put(NODE, {"metadata": {"name": node}, "status": status})
        up = {"containerStatuses": [{"name": "image-agent", "ready": True}]}
        metadata = {"name": f"node-{node}", "labels": AGENT_LABELS}
        api.put(POD, {"metadata": metadata, "spec": {"nodeName": node}, "status": up}, "luks-csi")
    finding = found(api, "agents")
    assert (finding.ok, finding.found) == (False, "1 of 2 nodes have an agent, not two")
