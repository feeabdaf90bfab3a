"""What `luks-csi doctor --cluster` finds of the namespace that Longhorn's and Harvester's kinds need."""

import pytest

from csi_driver.kube.kinds import BACKING_IMAGE, CRD, MANAGED_BY, NAMESPACE, Json, Kind
from csi_driver.operator.cluster_health import ClusterHealth
from csi_driver.volumes.finding import Finding
from tests.operator_fakes import NOW, FakeApi


class Api(FakeApi):
    """One in which nothing is made."""

    def create(self, kind: Kind, thing: Json, namespace: str = "", *, dry_run: bool = False) -> Json:
        raise AssertionError(f"a {kind} was made: {thing}, {namespace}, {dry_run}")


def found(api: Api) -> Finding:
    findings = ClusterHealth(api, "luks-csi", "luks.csi.internal").findings()
    (finding,) = (each for each in findings if each.name == "their namespace")
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
