"""The manifests in another namespace than luks-csi, as docs/kubernetes.md says it."""

import re
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import kustomize
from tests.kustomize import built

told = partial(kustomize.told, "kubernetes.md")


def places(thing: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Where a namespace is named, and which; not that of Kubernetes' own accounts, which stays, nor any."""
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
        yield from ((path, found) for found in re.findall(r"system:serviceaccount:(?!kube-system:|\[)([^:]+):", thing))


@pytest.mark.parametrize("components", [[], ["images"], ["images", "csi-addons", "kms"]], ids=str)
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


@pytest.mark.parametrize("kms", [False, True])
@pytest.mark.parametrize("driver", ["csi-backend", "lvm", "rbd", "names/ceph", "names/ceph-rbd", "names/longhorn"])
def test_so_is_another_driver(tmp_path: Path, *, driver: str, kms: bool) -> None:
    wanted = told("transformers:")
    first = "kms" if driver in ("lvm", "names/ceph", "names/longhorn") else "kms/central"
    components = [first, "kms/generate", "kms/service-accounts"] if kms else []
    wanted["components"] = [f"luks-csi/deploy/kubernetes/{each}" for each in components]
    wanted["resources"] = [f"luks-csi/deploy/kubernetes/{driver}"]
    things = built(tmp_path, wanted)
    found = {place for thing in things for place in places(thing)}
    assert {name for _, name in found} == {wanted["namespace"]}, found
    policies = [each for each in things if each["kind"] == "ValidatingAdmissionPolicy"]
    selectors = [each["spec"]["matchConstraints"].get("namespaceSelector") for each in policies]
    label = {"matchLabels": {"kubernetes.io/metadata.name": wanted["namespace"]}}
    assert [each for each in selectors if each] == [label] * (2 * (driver == "csi-backend") + kms)


def over(driver: str, component: str) -> dict[str, Any]:
    wanted = told("transformers:")
    del wanted["namespace"], wanted["transformers"]
    wanted["resources"] = [f"luks-csi/deploy/kubernetes/{driver}"]
    wanted["components"] = [f"luks-csi/deploy/kubernetes/{component}"]
    return wanted


@pytest.mark.parametrize("component", ["csi-addons", "images"])
@pytest.mark.parametrize("driver", ["driver", "names/ceph"])
def test_a_component_comes_over_the_driver_that_it_is_for(tmp_path: Path, driver: str, component: str) -> None:
    found = {name for thing in built(tmp_path, over(driver, component)) for _, name in places(thing)}
    assert found <= {"luks-csi", "$(NAMESPACE)"}


@pytest.mark.parametrize("component", ["csi-addons", "images"])
@pytest.mark.parametrize("driver", ["csi-backend", "lvm", "rbd", "names/ceph-rbd"])
def test_a_component_over_another_driver_is_an_error(tmp_path: Path, driver: str, component: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        built(tmp_path, over(driver, component))
    assert "/metadata/namespace" in refused.value.stderr


def test_csi_addons_come_as_the_page_says(tmp_path: Path) -> None:
    things = built(tmp_path, told("kubernetes/csi-addons"))
    (driver,) = (each for each in things if each["kind"] == "CSIDriver")
    assert driver["spec"]["attachRequired"]


def test_other_projects_kinds_know_the_operator_there(tmp_path: Path) -> None:
    things = built(tmp_path, told("kubernetes/compat"))
    (binding,) = [each for each in things if each["kind"] == "ClusterRoleBinding"]
    assert binding["subjects"][0]["namespace"] == told("transformers:")["namespace"]
    assert sum(each["kind"] == "CustomResourceDefinition" for each in things) == 2


@pytest.mark.parametrize(
    ("driver", "components"),
    [
        ("driver", ["kms"]),
        ("rbd", ["kms/central"]),
        ("driver", ["kms", "kms/generate"]),
        ("driver", ["kms", "kms/tenants"]),
        ("driver", ["kms", "kms/service-accounts"]),
        ("driver", ["csi-addons"]),
        ("driver", ["images"]),
    ],
)
def test_what_a_component_leaves_when_it_is_taken_away_is_told(
    tmp_path: Path, driver: str, components: list[str]
) -> None:
    def names(folder: Path, components: list[str]) -> set[tuple[str, str]]:
        wanted = told("transformers:")
        del wanted["namespace"], wanted["transformers"]
        wanted["resources"] = [f"luks-csi/deploy/kubernetes/{driver}"]
        wanted["components"] = [f"luks-csi/deploy/kubernetes/{each}" for each in components]
        return {(each["kind"].lower(), each["metadata"]["name"]) for each in built(folder, wanted)}

    page = (Path(__file__).parents[2] / "docs/kubernetes.md").read_text()
    table = page.partition("### Taking a component away")[2].partition("## ")[0]
    (row,) = (line for line in table.splitlines() if f"`{components[-1]}`" in line.partition(" | ")[0])
    brought = names(tmp_path / "with", components) - names(tmp_path / "without", components[:-1])
    assert brought
    kinds = set(re.findall(r"[a-z]+", row))
    for kind, name in brought:
        assert kind in kinds
        assert f"`{name.replace('.luks-csi', '.NS')}`" in row
