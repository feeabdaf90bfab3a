"""The manifests in another namespace than luks-csi, as docs/kubernetes.md says it."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.operator.lab import DEPLOY

_KUBECTL = Path(os.environ.get("KUBERNETES_BIN", "")) / "kubectl"
_PAGE = (DEPLOY.parents[1] / "docs" / "kubernetes.md").read_text()


def told(words: str) -> dict[str, Any]:
    """The kustomization of the page that has these words."""
    (text,) = [text for text in re.findall(r"```yaml\n(.*?)```", _PAGE, re.DOTALL) if words in text]
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def built(folder: Path, kustomization: dict[str, Any]) -> list[Any]:
    """What `kubectl kustomize` makes of it, from a folder beside the project."""
    place = os.path.relpath(DEPLOY.parents[1], folder)
    for key in ("resources", "components", "transformers"):
        if key in kustomization:
            kustomization[key] = [each.replace("luks-csi/deploy", f"{place}/deploy", 1) for each in kustomization[key]]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    done = subprocess.run([_KUBECTL, "kustomize", folder], capture_output=True, text=True, check=True)
    return [*yaml.safe_load_all(done.stdout)]


def places(thing: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Where a namespace is named, and which; not that of Kubernetes' own accounts, which stays."""
    if isinstance(thing, dict):
        for key, value in thing.items():
            here = f"{path}.{key}"
            if key == "namespace" and isinstance(value, str):
                yield here, value
            yield from places(value, here)
    elif isinstance(thing, list):
        for value in thing:
            yield from places(value, path)
    elif isinstance(thing, str):
        yield from ((path, found) for found in re.findall(r"system:serviceaccount:(?!kube-system:)([^:]+):", thing))


@pytest.mark.parametrize("components", [[], ["images"], ["images", "csi-addons"]], ids=str)
def test_everything_is_in_the_namespace_that_is_wanted(tmp_path: Path, components: list[str]) -> None:
    wanted = told("transformers:")
    assert wanted["components"] == ["luks-csi/deploy/kubernetes/images"]
    wanted["components"] = [f"luks-csi/deploy/kubernetes/{each}" for each in components]
    things = built(tmp_path, wanted)
    found = {place for thing in things for place in places(thing)}
    assert {name for _, name in found} <= {wanted["namespace"], "$(NAMESPACE)"}, found
    assert [each["metadata"]["name"] for each in things if each["kind"] == "Namespace"] == [wanted["namespace"]]
    if components:
        secrets = next(
            webhook for thing in things if thing["kind"] == "ValidatingWebhookConfiguration"
            for webhook in thing["webhooks"] if webhook["name"].startswith("secrets.")
        )  # fmt: skip
        values = secrets["namespaceSelector"]["matchExpressions"][0]["values"]
        assert values == ["kube-system", wanted["namespace"]]
        said = [path for path, _ in found if "xpression" in path]
        assert len(said) == 2, found  # policies and webhooks


@pytest.mark.parametrize("driver", ["csi-backend", "lvm", "rbd", "names/ceph", "names/ceph-rbd", "names/longhorn"])
def test_so_is_another_driver(tmp_path: Path, driver: str) -> None:
    wanted = told("transformers:")
    del wanted["components"]
    wanted["resources"] = [f"luks-csi/deploy/kubernetes/{driver}"]
    things = built(tmp_path, wanted)
    found = {place for thing in things for place in places(thing)}
    assert {name for _, name in found} == {wanted["namespace"]}, found
    policies = [each for each in things if each["kind"] == "ValidatingAdmissionPolicy"]
    assert len(policies) == (2 if driver == "csi-backend" else 0)
    selectors = [each["spec"]["matchConstraints"].get("namespaceSelector") for each in policies]
    label = {"matchLabels": {"kubernetes.io/metadata.name": wanted["namespace"]}}
    assert [each for each in selectors if each] == [label][: len(policies)]


def csi_addons_over(driver: str) -> dict[str, Any]:
    return told("deploy/kubernetes/csi-addons") | {"resources": [f"luks-csi/deploy/kubernetes/{driver}"]}


@pytest.mark.parametrize("driver", ["kms", "names/ceph"])
def test_csi_addons_come_over_the_driver_that_they_are_for(tmp_path: Path, driver: str) -> None:
    found = {name for thing in built(tmp_path, csi_addons_over(driver)) for _, name in places(thing)}
    assert found <= {"luks-csi", "$(NAMESPACE)"}


@pytest.mark.parametrize("driver", ["csi-backend", "lvm", "rbd", "names/ceph-rbd"])
def test_csi_addons_over_another_driver_are_an_error(tmp_path: Path, driver: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        built(tmp_path, csi_addons_over(driver))
    assert "/metadata/namespace" in refused.value.stderr


def test_other_projects_kinds_know_the_operator_there(tmp_path: Path) -> None:
    things = built(tmp_path, told("kubernetes/compat"))
    (binding,) = [each for each in things if each["kind"] == "ClusterRoleBinding"]
    assert binding["subjects"][0]["namespace"] == told("transformers:")["namespace"]
    assert sum(each["kind"] == "CustomResourceDefinition" for each in things) == 2
