"""New keys asked for by kubernetes-csi-addons, its own controller and sidecar, through our component's manifests."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.api import Json
from tests.cluster.cluster import Cluster
from tests.cluster.documents import MANIFESTS, Workload, applied, workload
from tests.cluster.driver import DEPLOY, KEY, NAME, NAMESPACE, Driver, secret, storage_class
from tests.cluster.settings import CSI_ADDONS_BIN

_ADDONS_NAMESPACE = "csi-addons-system"
_CONTROLLER = "csi-addons-controller-manager"
_PROGRAM = "/manager"  # in the image of the tests; the manifest starts it by another name
_SECONDS = 120
_PASSPHRASE = "passphrase"  # a class's name


@pytest.fixture(scope="module", autouse=True)
def addons(cluster: Cluster) -> Iterator[Driver]:
    """The driver with the component, csi-addons' controller, and a class of each kind."""
    folder = os.environ.get(CSI_ADDONS_BIN)
    if not folder:
        pytest.skip(
            f"${CSI_ADDONS_BIN} does not say where the binaries of CSI-Addons are: make cluster-test builds them"
        )
    generated = storage_class("generated")
    generated["parameters"] = {"encrypted": "true", "generateKey": "true", "keyRotationPeriod": "90d"}
    default = cluster.get("CSIDriver", NAME) is not None
    if default:
        cluster.uninstall(DEPLOY)
    crds, setup, rbac = (Path(folder, f"{name}.yaml") for name in ("crds", "setup-controller", "rbac"))
    try:
        with applied(cluster, crds, setup, rbac, generated, storage_class(_PASSPHRASE)):
            start: list[Json] = [
                {"op": "replace", "path": "/spec/template/spec/containers/0/command", "value": [_PROGRAM]}
            ]
            # The image is on the node, as no registry is here, and has no user of its own.
            start.append({"op": "add", "path": "/spec/template/spec/containers/0/imagePullPolicy", "value": "Never"})
            start.append({"op": "add", "path": "/spec/template/spec/securityContext/runAsUser", "value": 65532})
            patch = (
                "patch",
                "deployment",
                _CONTROLLER,
                "-n",
                _ADDONS_NAMESPACE,
                "--type=json",
                "-p",
                json.dumps(start),
            )
            cluster.kubectl(*patch)
            cluster.install(MANIFESTS / "csi-addons")
            try:
                cluster.wait_rolled_out("Deployment", _CONTROLLER, _ADDONS_NAMESPACE)
                yield Driver(cluster)
            finally:
                cluster.uninstall(MANIFESTS / "csi-addons")
    finally:
        if default:
            cluster.install(DEPLOY)


def _ask(cluster: Cluster, used: Workload, name: str, says: str = '"result": "Succeeded"') -> None:
    """Let a job ask for a new key, and wait until its status says so."""
    target = {"persistentVolumeClaim": used.claim_name}
    job: Json = {
        "apiVersion": "csiaddons.openshift.io/v1alpha1",
        "kind": "EncryptionKeyRotationJob",
        "metadata": {"name": name},
        # It begins before the sidecar of a node pod that has just come up has said where it listens.
        "spec": {"target": target, "retryDeadlineSeconds": 600, "backOffLimit": 60},
    }
    cluster.apply([job], used.namespace)

    def ended() -> bool:
        words = ("get", "encryptionkeyrotationjob", name, "-n", used.namespace, "-o", "json")
        status = json.loads(cluster.kubectl(*words).stdout).get("status", {})
        assert says in json.dumps(status), status
        return True

    cluster.wait(f"end of the job {name}", ended, _SECONDS)


def _status(driver: Driver, used: Workload) -> Json:
    volume = used.volume()
    (found,) = json.loads(driver.exec(volume.node, ["luks-csi", "keys", "status", volume.id, "-o", "json"]))
    one: Json = found
    return one


def _own_secret(cluster: Cluster, used: Workload) -> str:
    """The only secret that was made for the volume."""
    secrets = [one["metadata"]["name"] for one in cluster.items("Secret", NAMESPACE)]
    (own,) = [name for name in secrets if name.startswith(f"luks-csi-key-{used.volume().id}")]
    return str(own)


def test_a_job_changes_the_key_of_a_volume_in_use(cluster: Cluster, addons: Driver) -> None:
    with workload(cluster, "generated") as used:
        used.create()
        used.wait_running()
        text, before, old = used.write(), _status(addons, used), _own_secret(cluster, used)
        _ask(cluster, used, "first")
        after = _status(addons, used)
        assert (after["change"], after["by_request"]) == (None, False)
        assert after["since"] > before["since"]
        assert after["next"] > before["next"]
        assert _own_secret(cluster, used) != old
        assert used.reads() == text
        used.scale(0)
        used.scale(1)
        assert used.reads() == text


def test_a_passphrase_is_changed_by_its_secret_alone_and_the_job_says_so(cluster: Cluster, addons: Driver) -> None:
    with workload(cluster, _PASSPHRASE) as used:
        cluster.apply([secret()], used.namespace)
        used.create()
        used.wait_running()
        text, before = used.write(), _status(addons, used)
        _ask(cluster, used, "refused", "put the new passphrase into its entry CRYPTO_KEY_VALUE")
        assert _status(addons, used)["since"] == before["since"]
        previous = secret()["stringData"]["CRYPTO_KEY_VALUE"]
        cluster.apply([secret(KEY, "another passphrase", CRYPTO_KEY_VALUE_PREVIOUS=previous)], used.namespace)
        _ask(cluster, used, "taken")
        assert _status(addons, used)["since"] > before["since"]
        used.scale(0)
        used.scale(1)
        assert used.reads() == text
