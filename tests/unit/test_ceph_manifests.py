"""deploy/kubernetes/rbd says what the driver takes, and what Ceph and the kernel need."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from csi_driver.cli.serve import serve

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes/rbd"


def pod(name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["spec"]["template"]["spec"]
    return found


def driver(name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = pod(name)["containers"][0]
    return found


def options(words: Sequence[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


@pytest.mark.parametrize("name", ["controller", "node"])
def test_the_drivers_container_says_what_serve_takes(name: str) -> None:
    container = driver(name)
    assert container["args"][0] == serve.name
    known = {option for parameter in serve.params for option in parameter.opts}
    assert options(container["args"]) <= known
    assert {f"--services={name}", "--ceph-secret=/etc/ceph-secret"} <= set(container["args"])
    told = {each["name"]: each.get("value") for each in container["env"]}
    assert "--backend=rbd" in container["args"] or told["LUKS_CSI_BACKEND"] == "rbd"


@pytest.mark.parametrize("name", ["controller", "node"])
def test_what_is_mounted_is_there(name: str) -> None:
    spec = pod(name)
    there = {volume["name"] for volume in spec["volumes"]}
    mounted = {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]}
    assert mounted == there
    assert {"ceph-config", "ceph-secret"} <= {mount["name"] for mount in driver(name)["volumeMounts"]}


def number(words: Sequence[str], option: str) -> int:
    (found,) = (word.partition("=")[2] for word in words if word.startswith(f"{option}="))
    return int(found.removesuffix("s"))


def test_who_calls_waits_longer_than_a_program_of_ceph_may_take_and_no_call_for_a_thread() -> None:
    controller, *sidecars = pod("controller")["containers"]
    limit = number(controller["args"], "--mount-seconds")
    assert {one["name"] for one in sidecars} == {"resizer", "provisioner", "attacher"}
    for sidecar in sidecars:
        assert number(sidecar["args"], "--timeout") > limit
    ten_each = 30  # csi-resizer and csi-attacher have ten workers by default, csi-provisioner a hundred
    assert number(sidecars[1]["args"], "--worker-threads") == 10
    assert number(controller["args"], "--threads") > ten_each
    assert number(driver("node")["args"], "--mount-seconds") < 120  # kubelet's own, pkg/volume/csi/csi_plugin.go


def test_the_controller_has_no_privileges_and_the_node_the_hosts_network() -> None:
    assert pod("controller")["securityContext"]["runAsNonRoot"] is True
    assert driver("controller")["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod("node")["hostNetwork"] is True
    assert {mount["mountPath"] for mount in driver("node")["volumeMounts"]} >= {"/dev", "/sys", "/lib/modules"}


def test_the_drivers_name_is_one_and_it_attaches() -> None:
    told = yaml.safe_load((FOLDER / "csidriver.yaml").read_text())
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    assert kustomization["configMapGenerator"][0]["literals"] == [f"driver-name={told['metadata']['name']}"]
    assert told["spec"]["attachRequired"] is True
    assert all((FOLDER / file).exists() for file in kustomization["resources"])


@pytest.mark.parametrize(("overlay", "below"), [("ceph", "driver"), ("ceph-rbd", "rbd")])
def test_under_the_name_of_ceph_csi_the_name_is_one_too(overlay: str, below: str) -> None:
    told = yaml.safe_load((FOLDER.parent / "names" / overlay / "kustomization.yaml").read_text())
    assert told["resources"] == [f"../../{below}"]
    base = yaml.safe_load((FOLDER.parent / below / "kustomization.yaml").read_text())
    assert told["namespace"] == base["namespace"]
    (config,), (patch,) = told["configMapGenerator"], told["patches"]
    assert (config["name"], config["behavior"]) == (base["configMapGenerator"][0]["name"], "merge")
    (name,) = yaml.safe_load(patch["patch"])
    assert patch["target"] == {"kind": "CSIDriver"}
    assert config["literals"] == [f"driver-name={name['value']}"] == ["driver-name=rbd.csi.ceph.com"]
