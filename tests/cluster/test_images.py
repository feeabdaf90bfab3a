"""Images as objects, in a cluster of two nodes: operator, agents and admission as users install them, and volumes that
start from an image wherever their pods run.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.api import Json
from tests.cluster.cluster import Cluster
from tests.cluster.documents import MANIFESTS
from tests.cluster.driver import (
    DEPLOY,
    KEY,
    NAME,
    NAMESPACE,
    PASSPHRASE,
    STATE,
    Driver,
    at_once,
    claim,
    pod,
    secret,
    storage_class,
)
from tests.cluster.leftovers import assert_clean
from tests.cluster.node import Node

pytestmark = pytest.mark.timeout(900)  # two guests on a busy machine

_MIB = 1 << 20
_SIZE = 48 * _MIB
_UPLOADER = "uploader"
_IMAGE_SECONDS = 240
_POD_SECONDS = 300
_LUKS_CSI = str(Path(sys.executable).with_name("luks-csi"))
_DISK, _ENCRYPTED = "disk", "disk-encrypted"


@pytest.fixture(scope="module")
def content() -> bytes:
    """A disk that is no text."""
    return os.urandom(_MIB) * (_SIZE // _MIB)


@pytest.fixture(scope="module", autouse=True)
def installed(cluster: Cluster) -> Iterator[Driver]:
    """The driver with the component, on two nodes, and an account that may upload."""
    cluster.node(2)
    default = cluster.get("CSIDriver", NAME) is not None
    if default:
        cluster.uninstall(DEPLOY)
    crds = DEPLOY / "images" / "crds.yaml"
    role: Json = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": _UPLOADER},
        "rules": [{"apiGroups": ["images.luks.csi.internal"], "resources": ["images/upload"], "verbs": ["update"]}],
    }
    binding: Json = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": _UPLOADER},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": _UPLOADER},
        "subjects": [{"kind": "ServiceAccount", "name": _UPLOADER, "namespace": NAMESPACE}],
    }
    account: Json = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": _UPLOADER}}
    try:
        cluster.apply(crds)
        cluster.install(MANIFESTS / "images")
        try:
            cluster.apply([role, binding])
            cluster.apply([account, secret()], NAMESPACE)
            yield Driver(cluster)
            cluster.delete([role, binding])
        finally:
            cluster.uninstall(MANIFESTS / "images")
        cluster.delete(crds)
    finally:
        if default:
            cluster.install(DEPLOY)


def _image(cluster: Cluster, name: str, source: Json, secret_name: str = "", **spec: object) -> None:
    references = {"secretRef": {"name": secret_name, "namespace": NAMESPACE}} if secret_name else {}
    cluster.apply([{
        "apiVersion": "images.luks.csi.internal/v1alpha1",
        "kind": "Image",
        "metadata": {"name": name},
        "spec": {"source": source, **references, **spec},
    }])  # fmt: skip


def _luks_csi(cluster: Cluster, *words: str, passphrase: str = "") -> None:
    """`luks-csi image` on this machine, which is no node."""
    done = subprocess.run(
        [_LUKS_CSI, "image", *words], env=os.environ | {"KUBECONFIG": str(cluster.control_plane.kubeconfig)},
        input=passphrase, capture_output=True, text=True, check=False, timeout=_IMAGE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def _status(cluster: Cluster, name: str) -> Json:
    status: Json = cluster.api.get("Image", name).get("status", {})
    return status


def _wait_ready(cluster: Cluster, name: str) -> Json:
    def ready() -> Json:
        status = _status(cluster, name)
        assert status.get("phase") == "Ready", status
        return status

    return cluster.wait(f"image {name}", ready, _IMAGE_SECONDS)


def _nodes(cluster: Cluster, name: str) -> set[str]:
    return {node["name"] for node in _status(cluster, name)["nodes"] if node["state"] == "Ready"}


def _delete(cluster: Cluster, *names: str) -> None:
    for name in names:
        cluster.kubectl("delete", "images.images.luks.csi.internal", name, timeout=120)

    def removed() -> bool:
        for node in cluster.nodes:
            for name in names:
                left = node.run(f"find {STATE}/images -name '{name}*' ! -path '*/locks/*'").text
                assert not left, left
        return True

    cluster.wait(f"end of the files of {', '.join(names)}", removed)


@contextmanager
def _classes(cluster: Cluster, *classes: Json) -> Iterator[None]:
    for each in classes:
        for name in ("pbkdf", "pbkdfIterations"):  # the image's header decides
            del each["parameters"][name]
    cluster.apply([*classes])
    try:
        yield
    finally:
        cluster.delete([*classes])


@pytest.fixture(scope="module")
def images(cluster: Cluster, content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A disk that was uploaded, and its encrypted clone; the node that has both."""
    path = tmp_path_factory.mktemp("images") / "disk.raw"
    path.write_bytes(content)
    _luks_csi(cluster, "upload", str(path), _DISK, f"--service-account={NAMESPACE}/{_UPLOADER}")
    _image(cluster, _ENCRYPTED, {"clone": {"image": _DISK, "encryption": "encrypt"}}, KEY)
    assert _wait_ready(cluster, _ENCRYPTED)["encrypted"] is True
    (node,) = _nodes(cluster, _ENCRYPTED)
    yield node
    _delete(cluster, _DISK, _ENCRYPTED)


def _other(cluster: Cluster, name: str) -> Node:
    return next(node for node in cluster.nodes if node.name != name)


@contextmanager
def _vm(cluster: Cluster, class_name: str, node: str) -> Iterator[str]:
    """A claim of a class and a pod with its device on a node; their namespace."""
    with cluster.namespace() as namespace:
        cluster.apply([secret(), claim("data", f"{_SIZE}", class_name, volumeMode="Block")], namespace)
        cluster.apply([pod("vm", block=True, node=node)], namespace)
        yield namespace
    for each in cluster.nodes:
        assert_clean(each)


def _reads(cluster: Cluster, namespace: str) -> str:
    cluster.pod_running("vm", namespace, _POD_SECONDS)
    script = f"head -c {_SIZE} /dev/data | sha256sum | cut -d' ' -f1"
    return cluster.pod_exec("vm", ["sh", "-c", script], namespace).decode().strip()


def test_pods_on_both_nodes_read_the_disk_and_the_one_without_a_copy_waits_for_it(
    cluster: Cluster, images: str, content: bytes
) -> None:
    wanted, other = hashlib.sha256(content).hexdigest(), _other(cluster, images).name
    with _classes(cluster, storage_class("of-image", {"backingImage": _ENCRYPTED})):
        with _vm(cluster, "of-image", images) as namespace:
            assert _reads(cluster, namespace) == wanted
        with _vm(cluster, "of-image", other) as namespace:
            cluster.wait_event("PersistentVolumeClaim", "data", namespace, "is being brought to this node")
            assert _reads(cluster, namespace) == wanted
    assert _nodes(cluster, _ENCRYPTED) == {images, other}


def test_a_class_that_binds_at_once_brings_the_image_too(cluster: Cluster, images: str, content: bytes) -> None:
    other = _other(cluster, images).name
    assert other not in _nodes(cluster, _DISK)
    of_disk = at_once("at-once", other)
    of_disk["parameters"] = of_disk["parameters"] | {"backingImage": _DISK, "encrypted": "false"}
    for name in [name for name in of_disk["parameters"] if "secret" in name]:
        del of_disk["parameters"][name]
    with _classes(cluster, of_disk), _vm(cluster, "at-once", other) as namespace:
        cluster.wait_event("PersistentVolumeClaim", "data", namespace, "is being brought to this node")
        assert _reads(cluster, namespace) == hashlib.sha256(content).hexdigest()


def test_what_is_in_use_is_kept_and_an_encrypted_claim_becomes_an_image(
    cluster: Cluster, images: str, content: bytes
) -> None:
    with _classes(cluster, storage_class("of-image", {"backingImage": _ENCRYPTED})):
        refused = cluster.kubectl("delete", "images.images.luks.csi.internal", _ENCRYPTED, check=False)
        assert "StorageClass of-image names it" in refused.said
        with _vm(cluster, "of-image", images) as namespace:
            assert _reads(cluster, namespace) == hashlib.sha256(content).hexdigest()
            script = "echo changed | dd of=/dev/data conv=fsync,notrunc 2>/dev/null"
            cluster.pod_exec("vm", ["sh", "-c", script], namespace)
            cluster.api.delete("Pod", "vm", namespace)
            _image(cluster, "exported", {"claim": {"name": "data", "namespace": namespace}}, KEY)
            assert _wait_ready(cluster, "exported")["encrypted"] is True
    of_export = storage_class("of-export", {"backingImage": "exported"})
    with _classes(cluster, of_export), _vm(cluster, "of-export", images) as namespace:
        changed = b"changed\n" + content[8:]
        assert _reads(cluster, namespace) == hashlib.sha256(changed).hexdigest()
    _delete(cluster, "exported")


def test_an_image_that_was_encrypted_elsewhere_is_uploaded_and_used_as_it_is(
    cluster: Cluster, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "disk.raw").write_bytes(content)
    here = f"--state-dir={tmp_path / 'state'}"
    _luks_csi(cluster, "import", str(tmp_path / "disk.raw"), "plain", here)
    clone = ("clone", "plain", "sealed", "--encryption=encrypt", "--passphrase-file=-", here)
    _luks_csi(cluster, *clone, passphrase=PASSPHRASE)
    _luks_csi(cluster, "export", "sealed", str(tmp_path / "disk.luks"), here)
    account = f"--service-account={NAMESPACE}/{_UPLOADER}"
    _luks_csi(cluster, "upload", str(tmp_path / "disk.luks"), "sealed", f"--secret={NAMESPACE}/{KEY}", account)
    status = _status(cluster, "sealed")
    assert (status["encrypted"], status["secret"], status["virtualSize"]) == (True, f"{NAMESPACE}/{KEY}", _SIZE)
    (node,) = _nodes(cluster, "sealed")
    of_sealed = storage_class("of-sealed", {"backingImage": "sealed"})
    with _classes(cluster, of_sealed), _vm(cluster, "of-sealed", node) as namespace:
        assert _reads(cluster, namespace) == hashlib.sha256(content).hexdigest()
    _delete(cluster, "sealed")


def _held(cluster: Cluster, node: Node) -> int:
    """The process that makes an image on a node, stopped before it could end; its id."""

    def stopped() -> int:
        found = node.run("pgrep -f '[c]si_driver.agent.child'", check=False).text.split()
        assert len(found) == 1, found
        node.run(f"kill -STOP {found[0]}")
        return int(found[0])

    return cluster.wait("process that makes the image", stopped, _IMAGE_SECONDS)


def _reencrypted(cluster: Cluster, name: str, node: Node) -> int:
    """A clone of the encrypted disk has begun on a node: the process that makes it, stopped."""
    key = {"name": KEY, "namespace": NAMESPACE}
    source = {"clone": {"image": _ENCRYPTED, "encryption": "reencrypt"}}
    _image(cluster, name, source, KEY, newSecretRef=key, nodeSelector={"kubernetes.io/hostname": node.name})
    found = _held(cluster, node)
    assert _status(cluster, name).get("phase") != "Ready"
    return found


def _restarts(installed: Driver, node: Node) -> int:
    statuses = installed.pod(node)["status"]["containerStatuses"]
    return next(int(each["restartCount"]) for each in statuses if each["name"] == "image-agent")


def test_an_agent_that_is_killed_in_the_middle_of_a_clone_goes_on(
    cluster: Cluster, images: str, installed: Driver
) -> None:
    node = next(each for each in cluster.nodes if each.name == images)
    child, before = _reencrypted(cluster, "again", node), _restarts(installed, node)
    agent = node.run(f"ps -o ppid= -p {child}").text.strip()
    assert "image-agent" in node.run(f"tr '\\0' ' ' < /proc/{agent}/cmdline").text
    node.run(f"kill -KILL {agent}")
    cluster.wait("end of its process too", lambda: node.run(f"test ! -e /proc/{child}", check=False).code == 0)
    cluster.wait("another agent", lambda: _restarts(installed, node) > before, _IMAGE_SECONDS)
    assert _wait_ready(cluster, "again")["encrypted"] is True
    _delete(cluster, "again")


def test_an_operator_that_is_away_hinders_nobody_nor_a_clone_that_is_being_made(cluster: Cluster, images: str) -> None:
    node = next(each for each in cluster.nodes if each.name == images)
    child = _reencrypted(cluster, "meanwhile", node)
    cluster.kubectl("scale", "-n", NAMESPACE, "deployment/luks-csi-operator", "--replicas=0")
    cluster.wait("end of the operator", lambda: not cluster.items(
        "Pod", NAMESPACE, labels="app.kubernetes.io/component=operator"
    ))  # fmt: skip
    unrelated = storage_class("unrelated")
    cluster.apply([unrelated, secret("unrelated")], "default")
    cluster.delete([unrelated, secret("unrelated")], "default")
    node.run(f"kill -CONT {child}")

    def made() -> bool:
        copies = [each for each in cluster.items("ImageCopy") if each["spec"]["image"] == "meanwhile"]
        return [each["status"].get("state") for each in copies] == ["Ready"]

    cluster.wait("end of the clone", made, _IMAGE_SECONDS)
    assert _status(cluster, "meanwhile").get("phase") != "Ready", "somebody has told of it"
    cluster.kubectl("scale", "-n", NAMESPACE, "deployment/luks-csi-operator", "--replicas=1")
    cluster.wait_rolled_out("Deployment", "luks-csi-operator", NAMESPACE)
    assert _wait_ready(cluster, "meanwhile")["encrypted"] is True
    _delete(cluster, "meanwhile")
