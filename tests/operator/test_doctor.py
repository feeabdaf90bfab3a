"""`luks-csi doctor --cluster`: what an administrator is told of a cluster."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from csi_driver.kube.kinds import CSI_DRIVER, NAMESPACE
from tests.operator.lab import DRIVER, Lab

_LUKS_CSI = str(Path(sys.executable).with_name("luks-csi"))


def doctor(lab: Lab, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and the findings by name."""
    argv = [_LUKS_CSI, "doctor", *(options or ("--cluster",)), "--output=json"]
    done = subprocess.run(
        argv, env=os.environ | {"KUBECONFIG": str(lab.kubeconfig)}, capture_output=True, check=False, timeout=120
    )
    assert done.stdout, done.stderr
    return done.returncode, {finding["name"]: finding for finding in json.loads(done.stdout)}


@pytest.fixture
def driver(lab: Lab) -> Iterator[None]:
    """Our CSIDriver, and the namespace of BackingImages."""
    if lab.kube.get(NAMESPACE, "longhorn-system") is None:
        lab.kube.create(NAMESPACE, {"metadata": {"name": "longhorn-system"}})
    labels = {"app.kubernetes.io/name": "luks-csi"}
    lab.kube.create(CSI_DRIVER, {"metadata": {"name": DRIVER, "labels": labels}, "spec": {}})
    yield
    lab.kube.delete(CSI_DRIVER, DRIVER)


@pytest.mark.usefixtures("driver")
def test_what_is_well_is_told(lab: Lab) -> None:
    code, found = doctor(lab)
    assert (code, {name for name, finding in found.items() if not finding["ok"]}) == (0, set())
    assert found["agents"]["found"] == f"each of {len(lab.agents)} nodes has one"


@pytest.mark.usefixtures("driver")
def test_a_driver_name_of_somebody_else_is_refused(lab: Lab) -> None:
    lab.kube.patch(CSI_DRIVER, DRIVER, {"metadata": {"labels": None}})
    code, found = doctor(lab)
    assert (code, found["driver name"]["ok"]) == (1, False)
    assert "so it is another driver's" in found["driver name"]["found"]
    assert "under another name" in found["driver name"]["advice"]


@pytest.mark.usefixtures("driver")
def test_a_secret_that_an_image_needs_and_that_is_gone_is_told(lab: Lab) -> None:
    lab.image("waits", {"upload": {}}, secretRef={"name": "gone", "namespace": "vms"})
    code, found = doctor(lab)
    assert (code, found["secrets of images"]["ok"]) == (0, False)
    assert found["secrets of images"]["found"] == "there is no secret vms/gone of Image waits, which opens it"
    lab.delete_image("waits")


def test_what_is_missing_is_told_by_its_name(lab: Lab) -> None:
    code, found = doctor(lab, "--cluster=elsewhere", "--driver-name=other.example.org")
    assert code == 1
    assert found["driver name"]["found"] == "there is no CSIDriver other.example.org"
    assert found["agents"]["found"] == "no node has an image agent that is ready"
