"""The operator's role for Longhorn's and Harvester's kinds: what its controllers call, and nothing more."""

from pathlib import Path

import yaml

from csi_driver.kube.kinds import CLAIM, IMAGE, STORAGE_CLASS, VIRTUAL_MACHINE_IMAGE, VOLUME
from csi_driver.operator.backing_images import BackingImages
from csi_driver.operator.compat import check_crds
from csi_driver.operator.virtual_machine_images import VirtualMachineImages
from tests.operator_fakes import Call
from tests.unit.test_operator_machine_images import Rig, machine

DEPLOY = Path(__file__).parents[2] / "deploy/kubernetes"
Right = tuple[str, str, str]


def rights(file: str, role: str) -> set[Right]:
    """Group, resource and verb of all that a ClusterRole allows."""
    (found,) = [
        each
        for each in yaml.safe_load_all((DEPLOY / file).read_text())
        if each and (each["kind"], each["metadata"]["name"]) == ("ClusterRole", role)
    ]
    return {
        (group, resource, verb)
        for rule in found["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def needed() -> set[Right]:
    """What the controllers ask for in the lives of two images, one of which loses its finalizer."""
    rig, calls = Rig(), set[Call]()
    rig.api.before = calls.add
    check_crds(rig.api)
    rig.api.put(CLAIM, {"metadata": {"name": "data", "uid": "c-1"}, "spec": {"volumeName": "pvc-1"}}, "team")
    claim = {"name": "data", "namespace": "team", "uid": "c-1"}
    rig.api.put(VOLUME, {"metadata": {"name": "pvc-1"}, "spec": {"claimRef": claim}})
    for name in ("alpine", "lost"):
        rig.put(machine("export-from-volume", name=name, pvcName="data", pvcNamespace="team"))
        rig.ready(name)
    rig.api.change(VIRTUAL_MACHINE_IMAGE, "alpine", {"spec": {"retry": 1}}, "default")
    rig.look()
    rig.api.remove(VIRTUAL_MACHINE_IMAGE, "alpine", "default")
    rig.api.lose(VIRTUAL_MACHINE_IMAGE, "lost", "default")
    for name in ("alpine", "lost"):
        rig.look(name)
        rig.api.finish(IMAGE, f"vmi-m-{name}")
        rig.look(name)
        rig.look(name)
    assert rig.api.all(IMAGE) == rig.api.all(STORAGE_CLASS) == []
    watched = {*VirtualMachineImages.KINDS, *BackingImages.KINDS}
    return {
        (call.kind.group, call.kind.plural + "/status" * call.verb.endswith(" status"), call.verb.split()[0])
        for call in calls
    } | {(kind.group, kind.plural, verb) for kind in watched for verb in ("list", "watch")}


def test_the_operator_may_do_what_these_kinds_need_and_each_right_is_used() -> None:
    base, compat = (
        rights("images/rbac.yaml", "luks-csi-operator"),
        rights("compat/rbac.yaml", "luks-csi-operator-compat"),
    )
    used = needed()
    assert used - base - compat == set()
    assert compat - used == set()
    assert compat & base == set(), "each right stands in one place"
