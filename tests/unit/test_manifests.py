"""The manifests and what the documents say of them."""

import re
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml

from csi_driver.backends.csiclaims import Claims
from csi_driver.backends.csiholders import CONTROLLER, WAIT_SECONDS
from csi_driver.model.settings import Settings
from csi_driver.rpc.server import ALIVE_SECONDS, READY_SECONDS

ROOT = Path(__file__).parents[2]


def arguments_of(container: str) -> set[str]:
    """The arguments of a container of the node's pod."""
    manifest = (ROOT / "deploy/kubernetes/driver/node.yaml").read_text()
    (found,) = re.findall(
        rf"^        - name: {container}\n(.*?)(?=^        - name: |^      \w)", manifest, re.MULTILINE | re.DOTALL
    )
    return set(re.findall(r"^            - (--\S+)$", found, re.MULTILINE))


def test_the_provisioner_has_the_settings_that_are_explained() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    section = page.partition("## Volumes of many nodes")[2].partition("\n## ")[0]
    explained = set(re.findall(r"^\| `(--[^`]+)`", section, re.MULTILINE))
    assert explained > {"--enable-capacity", "--capacity-for-immediate-binding"}
    assert explained <= arguments_of("provisioner")


def containers(file: str) -> dict[str, Any]:
    """The containers of a manifest's pods, by their names."""
    found = yaml.safe_load_all((ROOT / "deploy/kubernetes" / file).read_text())
    pods = [each["spec"]["template"]["spec"] for each in found if each["kind"] in ("DaemonSet", "Deployment")]
    return {each["name"]: each for pod in pods for each in pod["containers"]}


def mounts(container: dict[str, Any]) -> set[str]:
    return {each["name"] for each in container.get("volumeMounts", ())}


SERVERS = [f"{folder}/{pod}.yaml" for folder in ("rbd", "csi-backend") for pod in ("node", "controller")]


@pytest.mark.parametrize("file", ["driver/node.yaml", *SERVERS])
def test_commands_in_a_servers_container_find_it_and_its_volumes(file: str) -> None:
    """What `kubectl exec` runs has the container's variables, and not the server's arguments."""
    (server,) = (each for each in containers(file).values() if each["args"][0] == "serve")
    given = {word.partition("=")[0] for word in server["args"]}
    assert not given & {"--endpoint", "--state-dir", "--kms-config", "--kms-programs", "--audit-file"}
    told = {each["name"]: each.get("value", "") for each in server["env"]}
    assert told["LUKS_CSI_ENDPOINT"].endswith("/csi.sock")
    paths = {each["mountPath"]: each["name"] for each in server["volumeMounts"]}
    assert paths[told.get("LUKS_CSI_STATE_DIR", str(Settings.state_dir))] == "state"


@pytest.mark.parametrize("file", ["driver/node.yaml", "driver/controller.yaml", *SERVERS])
def test_kubelet_waits_longer_for_a_page_than_the_page_for_the_server(file: str) -> None:
    """Else a node with much to do loses its driver, to a probe that was to find one that hangs."""
    probes = [each for each in containers(file).values() if "livenessProbe" in each]
    for each in probes:
        assert each["livenessProbe"]["timeoutSeconds"] > ALIVE_SECONDS
        assert each["livenessProbe"]["periodSeconds"] > each["livenessProbe"]["timeoutSeconds"]
        assert each["readinessProbe"]["timeoutSeconds"] > READY_SECONDS
    assert probes


@pytest.mark.parametrize(
    "file", ["driver/node.yaml", "driver/controller.yaml", "images/node.yaml", "images/operator.yaml", *SERVERS]
)
def test_a_container_that_ends_says_why_in_its_pods_status(file: str) -> None:
    """Kubelet by itself says `Error`, and that it backs off."""
    own = [each for each in containers(file).values() if each.get("image", "").startswith("localhost/luks-csi")]
    assert own
    assert all(each["terminationMessagePolicy"] == "FallbackToLogsOnError" for each in own)


def test_only_what_needs_the_api_has_a_token() -> None:
    base, images = containers("driver/node.yaml"), containers("images/node.yaml")
    assert {name for name, each in base.items() if "token" in mounts(each)} == {"provisioner"}
    assert set(images) == {"image-agent"}  # the patch gives nothing to the driver's own
    assert {"token", "agents"} <= mounts(images["image-agent"])


def test_the_image_agent_has_the_rights_that_are_told_and_no_more() -> None:
    context = containers("images/node.yaml")["image-agent"]["securityContext"]
    assert (context.get("privileged"), context["allowPrivilegeEscalation"]) == (None, False)
    assert context["readOnlyRootFilesystem"] is True
    assert context["capabilities"] == {"drop": ["ALL"], "add": ["SETGID", "SETPCAP", "SETUID", "SYS_ADMIN"]}
    assert "Root with three capabilities beside `SYS_ADMIN`" in (ROOT / "docs/kubernetes.md").read_text()
    assert not {"dev", "udev", "kubelet"} & mounts(containers("images/node.yaml")["image-agent"])


def test_the_operator_runs_as_anybody() -> None:
    found = yaml.safe_load_all((ROOT / "deploy/kubernetes/images/operator.yaml").read_text())
    (pod,) = (each["spec"]["template"]["spec"] for each in found if each["kind"] == "Deployment")
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert not [each for each in pod["volumes"] if "hostPath" in each]
    assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_no_kind_goes_with_the_component() -> None:
    """Whoever deletes a kind deletes all its objects: the images of a cluster."""
    component = yaml.safe_load((ROOT / "deploy/kubernetes/images/kustomization.yaml").read_text())
    assert "crds.yaml" not in component["resources"]
    for file in component["resources"]:
        found = yaml.safe_load_all((ROOT / "deploy/kubernetes/images" / file).read_text())
        assert "CustomResourceDefinition" not in {each["kind"] for each in found}


KINDS = ("images/crds.yaml", "compat/backingimages.yaml", "compat/virtualmachineimages.yaml")


def schemas() -> dict[str, dict[str, Any]]:
    """The schemas of our kinds and of those of others, by kind."""
    found = [each for file in KINDS for each in yaml.safe_load_all((ROOT / "deploy/kubernetes" / file).read_text())]
    return {each["spec"]["names"]["kind"]: each["spec"]["versions"][0]["schema"]["openAPIV3Schema"] for each in found}


def fields(schema: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Each field of an object and of those in it, with what `kubectl explain` says of it."""
    for name, field in schema.get("properties", {}).items():
        yield f"{path}.{name}", field.get("description", "")
        yield from fields(field, f"{path}.{name}")


def test_kubectl_explain_tells_what_each_kind_is_and_each_field_that_people_write() -> None:
    kinds = schemas()
    assert set(kinds) == {"Image", "ImageCopy", "BackingImage", "VirtualMachineImage"}
    for kind, schema in kinds.items():
        parts = schema["properties"]
        explained = {kind: schema.get("description", ""), **dict(fields({"properties": {"spec": parts["spec"]}}, kind))}
        explained[f"{kind}.status"] = parts["status"].get("description", "")
        assert [path for path, words in explained.items() if not words] == []
    image = dict(fields(kinds["Image"], "Image"))
    assert image["Image.spec.secretRef"] != image["Image.spec.newSecretRef"]


def texts(thing: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Each text in a document, with the name of the field that it is in."""
    if isinstance(thing, dict):
        for name, value in thing.items():
            yield from texts(value, name)
    elif isinstance(thing, list):
        for value in thing:
            yield from texts(value, key)
    elif isinstance(thing, str):
        yield key, thing


def test_images_are_named_where_kustomize_finds_them() -> None:
    """What `images:` of a kustomization does not reach is pulled from localhost."""
    files = sorted((ROOT / "deploy").rglob("*.yaml"))
    found = [(file, *each) for file in files for each in texts([*yaml.safe_load_all(file.read_text())])]
    names = {text.rpartition(":")[0] for _, key, text in found if key == "image"}
    assert "localhost/luks-csi" in names
    told = [(file.name, key, text) for file, key, text in found for name in names if name in text and key != "image"]
    assert told == []


def test_the_controller_over_another_driver_knows_its_own_pod() -> None:
    """Its image is the holders'."""
    controller = containers("csi-backend/controller.yaml")[CONTROLLER]
    (own,) = (each for each in controller["env"] if each["name"] == "LUKS_CSI_POD_NAME")
    assert own["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    found = yaml.safe_load_all((ROOT / "deploy/kubernetes/csi-backend/rbac.yaml").read_text())
    (role,) = (each for each in found if (each["kind"], each["metadata"]["name"]) == ("Role", "luks-csi-controller"))
    assert any({"pods"} <= {*each["resources"]} and "get" in each["verbs"] for each in role["rules"])


def test_who_calls_the_controller_over_another_driver_waits_longer_than_it_and_for_no_thread() -> None:
    found = containers("csi-backend/controller.yaml")
    server, *sidecars = (found[name]["args"] for name in (CONTROLLER, "resizer", "provisioner", "attacher"))
    (grows,) = (each for each in signature(Claims).parameters.values() if each.name == "wait_seconds")
    assert number(sidecars[0], "--timeout") > 3 * grows.default  # `bound`, `grow` and `settle`
    assert number(sidecars[1], "--timeout") > 30 + grows.default  # a KMS, then `bound`
    assert number(sidecars[2], "--timeout") > WAIT_SECONDS
    ten = 10  # csi-resizer's workers, by default
    # Of csi-provisioner so many make volumes, and as many delete some.
    workers = ten + 2 * number(sidecars[1], "--worker-threads") + number(sidecars[2], "--worker-threads")
    assert number(server, "--threads") > workers
    (deployment,) = yaml.safe_load_all((ROOT / "deploy/kubernetes/csi-backend/controller.yaml").read_text())
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}


def number(words: list[str], option: str) -> int:
    (found,) = (word.partition("=")[2] for word in words if word.startswith(f"{option}="))
    return int(found.removesuffix("s"))


def test_a_holder_that_has_ended_is_anybodys_to_delete() -> None:
    found = yaml.safe_load_all((ROOT / "deploy/kubernetes/csi-backend/policies.yaml").read_text())
    (policy,) = (
        each for each in found if each["metadata"]["name"] == "luks-csi-over-holders" and "Binding" not in each["kind"]
    )
    conditions = {each["name"]: each["expression"] for each in policy["spec"]["matchConditions"]}
    assert conditions["not-ended"] == "!(oldObject.?status.?phase.orValue('') in ['Failed', 'Succeeded'])"


def test_replacements_name_what_they_change_in_full() -> None:
    """Before kustomize 5.8 a pattern there finds nothing, and what is not found stays as it is without a word."""
    deploy = ROOT / "deploy/kubernetes"
    things = [each for file in deploy.rglob("*.yaml") for each in yaml.safe_load_all(file.read_text()) if each]
    lists = [one for each in things for one in each.get("replacements", ())]
    selected = {(each["select"]["kind"], each["select"]["name"]) for one in lists for each in one["targets"]}
    assert not {each for each in selected if not re.fullmatch(r"[A-Za-z0-9.-]+", "".join(each))}
    (transformer,) = (each for each in things if each["kind"] == "ReplacementTransformer")
    named = {
        each["select"]["name"]
        for each in transformer["replacements"][0]["targets"]
        if each["select"]["kind"] == "ClusterRoleBinding"
    }
    there = {each["metadata"]["name"] for each in things if each["kind"] == "ClusterRoleBinding"}
    there |= {f"luks-csi-lvm-{each}" for each in ("provisioner", "resizer")}
    own = {each["namespace"] for each in things if "namespace" in each}
    policies = {each["select"]["name"] for each in transformer["replacements"][0]["targets"]}
    assert policies >= {f"luks-csi-kms-namespace.{each}" for each in own}
    there.remove("luks-csi-kms-tenants.NAMESPACE")
    there |= {f"luks-csi-kms-tenants.{each}" for each in own}
    assert named == there
