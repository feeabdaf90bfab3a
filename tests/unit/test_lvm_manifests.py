"""deploy/kubernetes/lvm is the driver of deploy/kubernetes/driver with what the backend lvm takes."""

from pathlib import Path
from typing import Any

import yaml

from csi_driver.cli.serve import serve

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes/lvm"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
SPEC = yaml.safe_load((FOLDER / "node.yaml").read_text())["spec"]["template"]["spec"]
BASE = FOLDER.parent / "driver"


def driver() -> Any:
    (found,) = SPEC["containers"]
    assert found["name"] == "driver"
    return found


def patches(kind: str) -> list[Any]:
    """The operations on what is of that kind."""
    chosen = [each for each in KUSTOMIZATION["patches"] if each.get("target", {}).get("kind") == kind]
    return [operation for each in chosen for operation in yaml.safe_load(each["patch"])]


def test_the_settings_are_those_of_serve() -> None:
    known = {option.envvar for option in serve.params}
    settings = {each["name"]: each for each in driver()["env"]}
    assert set(settings) <= known
    assert settings["LUKS_CSI_BACKEND"]["value"] == "lvm"
    literals = dict(each.split("=", 1) for each in KUSTOMIZATION["configMapGenerator"][0]["literals"])
    assert settings["LUKS_CSI_VOLUME_GROUP"]["valueFrom"]["configMapKeyRef"]["key"] in literals
    assert literals["volume-group"]


def test_the_drivers_name_is_one_and_none_of_another_driver() -> None:
    (name,) = patches("CSIDriver")
    literals = KUSTOMIZATION["configMapGenerator"][0]["literals"]
    assert f"driver-name={name['value']}" in literals
    assert name["value"] != yaml.safe_load((BASE / "csidriver.yaml").read_text())["metadata"]["name"]
    classes = list(yaml.safe_load_all((FOLDER / "storageclasses.yaml").read_text()))
    assert {each["provisioner"] for each in classes} == {name["value"]}
    assert [each["parameters"].get("thinPool") for each in classes] == [None, "pool"]


def test_what_is_of_no_namespace_has_names_of_its_own() -> None:
    """Else the two drivers would share, and take away, each other's rights."""
    found = list(yaml.safe_load_all((BASE / "rbac.yaml").read_text()))
    shared = {each["metadata"]["name"] for each in found if each["kind"].startswith("ClusterRole")}
    renamed = {each["target"]["name"] for each in KUSTOMIZATION["patches"] if "Cluster" in str(each.get("target"))}
    assert renamed == shared
    assert {each["value"] for each in patches("ClusterRole(Binding)?")}.isdisjoint(shared)
    assert KUSTOMIZATION["namespace"] == "luks-csi-lvm"


def test_the_driver_has_the_nodes_locks_of_lvm_and_a_state_directory_of_its_own() -> None:
    volumes = {each["name"]: each["hostPath"]["path"] for each in SPEC["volumes"]}
    mounts = {each["mountPath"]: each for each in driver()["volumeMounts"]}
    assert volumes["lvm-locks"] == "/run/lock/lvm"
    assert mounts["/run/lock/lvm"]["name"] == "lvm-locks"
    (state,) = (each["value"] for each in driver()["env"] if each["name"] == "LUKS_CSI_STATE_DIR")
    assert volumes["state"] == state
    assert mounts[state]["name"] == "state"
    base = yaml.safe_load((BASE / "node.yaml").read_text())["spec"]["template"]["spec"]
    (before,) = (each["mountPath"] for each in base["containers"][0]["volumeMounts"] if each["name"] == "state")
    assert mounts[before] == {"$patch": "delete", "mountPath": before}


def test_the_provisioner_waits_while_a_thick_volume_is_cleared() -> None:
    tested, added = patches("DaemonSet")
    containers = yaml.safe_load((BASE / "node.yaml").read_text())["spec"]["template"]["spec"]["containers"]
    number = int(tested["path"].split("/")[-2])
    assert containers[number]["name"] == tested["value"] == "provisioner"
    assert added["path"].startswith(tested["path"].removesuffix("name"))
    assert added["value"].startswith("--timeout=")


def test_the_image_has_the_programs_of_lvm() -> None:
    assert {"lvm2", "thin-provisioning-tools"} <= set((FOLDER.parents[2] / "Dockerfile").read_text().split())
