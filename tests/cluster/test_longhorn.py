"""Longhorn's test plan for encrypted volumes, with the manifests of its document as they stand there: a driver that
takes its name is held to it. The classes bind at once, and know one secret for all volumes or one per claim.
"""

import time
from collections.abc import Callable, Iterator

import pytest

from tests.cluster.api import Json
from tests.cluster.cluster import Cluster
from tests.cluster.documents import MANIFESTS, Workload, applied, read, workload
from tests.cluster.driver import DEPLOY, installed
from tests.cluster.leftovers import assert_closed

_NAMESPACE = "longhorn-system"
_SECRET = "longhorn-global-secret.yaml"
_CLASSES = {"longhorn-crypto-global": "longhorn-global.yaml", "longhorn-crypto-per-volume": "longhorn-per-volume.yaml"}
_REPEAT_SECONDS = 3  # in which what failed is tried again
_LATE_SECONDS = 120  # from the secret's arrival to a running pod: the provisioner looks every half minute at the latest
_RETRY_SECONDS = 150  # from the right key's return to a running pod: kubelet doubles its pauses


@pytest.fixture(scope="module", autouse=True)
def longhorn(cluster: Cluster) -> Iterator[None]:
    """The driver under Longhorn's name, its namespace and its classes."""
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": _NAMESPACE}}
    classes = [MANIFESTS / file for file in _CLASSES.values()]
    with installed(cluster, DEPLOY / "names/longhorn"), applied(cluster, namespace, *classes):
        yield


@pytest.fixture(params=_CLASSES)
def used(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Workload]:
    """A claim of the class and a pod, to be made."""
    with workload(cluster, request.param) as made:
        yield made


@pytest.fixture
def secret(cluster: Cluster, used: Workload) -> Json:
    """The secret that the class means for this claim, to be made: the document's, or its like with the claim's name."""
    secret = read(cluster, _SECRET)
    if used.storage_class == "longhorn-crypto-per-volume":
        secret["metadata"] = {"name": used.claim_name, "namespace": used.namespace}
    return secret


@pytest.fixture
def running(cluster: Cluster, used: Workload, secret: Json) -> Iterator[Workload]:
    """The same, up and healthy."""
    with applied(cluster, secret):
        used.create()
        used.wait_running()
        yield used


def test_a_claim_waits_for_its_secret_and_says_so(
    cluster: Cluster, used: Workload, secret: Json, tell: Callable[[str], None]
) -> None:
    used.create()
    used.wait_claim_event("error getting secret", f'secrets "{secret["metadata"]["name"]}" not found')
    time.sleep(_REPEAT_SECONDS)
    assert used.claim["status"]["phase"] == "Pending"
    (pod,) = used.pods
    assert pod["status"]["phase"] == "Pending"
    assert not pod["status"].get("containerStatuses")
    with applied(cluster, secret):
        begin = time.monotonic()
        used.wait_running(_LATE_SECONDS)
        tell(f"longhorn: {used.storage_class}: running {time.monotonic() - begin:.1f} s after its secret came")
        assert used.claim["status"]["phase"] == "Bound"


def test_a_pod_is_up_and_healthy_on_an_encrypted_volume(running: Workload) -> None:
    volume = running.volume()
    assert "Version:       \t2\n" in volume.header(volume.file)
    (loop,) = volume.loops()
    status = volume.node.run(f"cryptsetup status {volume.mapping}").text
    assert "type:    LUKS2" in status
    assert f"device:  {loop}" in status
    source, _, kind, *_ = running.run("grep ' /data ' /proc/mounts").split()
    assert (source, kind) == (volume.mapping, "ext4")


def test_what_the_pod_writes_is_not_on_the_device(running: Workload) -> None:
    pattern = running.write()
    volume = running.volume()
    (loop,) = volume.loops()
    found = {device: volume.lines_with(pattern, device) for device in (volume.mapping, loop, volume.file)}
    assert found == {volume.mapping: 1, loop: 0, volume.file: 0}


def test_a_wrong_key_keeps_the_pod_out_until_the_right_one_is_back(
    cluster: Cluster, running: Workload, secret: Json, tell: Callable[[str], None]
) -> None:
    text = running.write()
    volume = running.volume()
    running.scale(0)
    name, namespace = secret["metadata"]["name"], secret["metadata"]["namespace"]
    cluster.api.patch("Secret", name, namespace, {"stringData": {"CRYPTO_KEY_VALUE": "Another passphrase"}})
    running.scale(1)
    pod = running.wait_pod()["metadata"]["name"]
    sentence = f"the passphrase in the secret opens no key slot of volume {volume.id} on /dev/loop"
    said = cluster.wait_event("Pod", pod, running.namespace, sentence)
    assert "code = Unauthenticated" in said
    assert said.endswith("put the passphrase it was last given back into the secret")
    time.sleep(_REPEAT_SECONDS)
    assert_closed(volume.node, volume.id)
    (status,) = cluster.api.get("Pod", pod, running.namespace)["status"]["containerStatuses"]
    assert status["state"] == {"waiting": {"reason": "ContainerCreating"}}
    cluster.apply(secret)
    begin = time.monotonic()
    running.wait_running(_RETRY_SECONDS)
    tell(f"longhorn: {running.storage_class}: running {time.monotonic() - begin:.1f} s after the right key came back")
    assert running.reads() == text
