"""Images of a real Ceph in the cluster: a volume goes where its pod goes, is fenced off, and shared by a migration."""

import os
import secrets
import time
from collections.abc import Callable, Iterator

import pytest

from tests.backends.ceph import POOL, Ceph, new_key
from tests.cluster.ceph import (
    CLASS,
    NAMESPACE,
    SECRET,
    SECRETS,
    ceph_class,
    ceph_installed,
    ceph_secret,
    ciphertext,
    nothing_left,
    on_ceph,
)
from tests.cluster.cluster import Cluster
from tests.cluster.deployed import SECONDS, Deployed
from tests.cluster.documents import applied
from tests.cluster.driver import PASSPHRASE, claim, pod, volume_id, volume_of
from tests.cluster.node import Node
from tests.cluster.settings import CLUSTER_CEPH, CSI_ADDONS_BIN

MIB = 1 << 20
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def ceph(cluster: Cluster) -> Iterator[Ceph]:
    """A Ceph and the driver for it, on two nodes."""
    if not (os.environ.get(CSI_ADDONS_BIN) and os.environ.get(CLUSTER_CEPH)):
        pytest.skip("make cluster-test has csi-attacher and an image with Ceph's programs")
    cluster.node(2)
    with ceph_installed(cluster) as made:
        yield made


def node_of(used: Deployed) -> Node:
    """Where the pod of the Deployment is."""
    name = used.pod()["spec"]["nodeName"]
    return next(node for node in used.cluster.nodes if node.name == name)


def fenced(ceph: Ceph) -> set[str]:
    """The addresses of the clients that may not write any more."""
    return {one["addr"] for one in ceph.asked("ceph", "osd", "blocklist", "ls")}


def test_what_a_pod_writes_is_ciphertext_in_ceph_and_a_deletion_leaves_nothing(
    cluster: Cluster, ceph: Ceph, tell: Callable[[str], None]
) -> None:
    with on_ceph(cluster, ceph) as used:
        begin = time.monotonic()
        used.create()
        used.pod()
        tell(f"rbd: pod running {time.monotonic() - begin:.1f} s after its claim")
        text = used.write()
        node_of(used).run("sync")
        content = ciphertext(ceph, used.id())
        assert content.startswith(b"LUKS\xba\xbe\x00\x02")
        assert text.encode() not in content
        used.scale(0)
        used.scale(1)
        assert used.reads() == text


def test_drivers_that_start_anew_disturb_nobody(cluster: Cluster, ceph: Ceph) -> None:
    with on_ceph(cluster, ceph) as used:
        used.create()
        used.check_restarts(NAMESPACE)


def test_a_volume_grows_while_it_is_used(cluster: Cluster, ceph: Ceph) -> None:
    with on_ceph(cluster, ceph) as used:
        used.create()
        text = used.write()
        used.grow("96Mi")
        blocks, size = used.sh("stat -f -c '%b %S' /data").split()
        assert int(blocks) * int(size) > 80 * MIB
        assert used.reads() == text


def test_a_volume_that_kubernetes_has_lost_comes_back_with_its_data(cluster: Cluster, ceph: Ceph) -> None:
    """As docs/operations.md says it, "A Kubernetes that is lost"."""
    with on_ceph(cluster, ceph) as used:
        used.create()
        text, handle = used.write(), used.id()
        (volume,) = (each["metadata"]["name"] for each in used.volumes())
        used.scale(0)
        keep, let_go = ({"spec": {"persistentVolumeReclaimPolicy": policy}} for policy in ("Retain", "Delete"))
        cluster.api.patch("PersistentVolume", volume, "", keep)
        cluster.api.delete("PersistentVolumeClaim", "data", used.namespace)
        cluster.api.delete("PersistentVolume", volume, "")
        cluster.wait("end of the PersistentVolume", lambda: not cluster.get("PersistentVolume", volume), SECONDS)
        pod = ("-n", NAMESPACE, "deployment/luks-csi-controller", "-c", "controller")
        words = ("--class", CLASS, "--secret", f"{SECRETS}/{SECRET}")
        said = cluster.kubectl("exec", *pod, "--", "luks-csi", "volume", "manifest", handle, *words)
        cluster.create(said.text)
        used.scale(1)
        assert used.reads() == text
        assert used.id() == handle
        used.grow("48Mi")
        cluster.api.patch("PersistentVolume", volume, "", let_go)


def test_a_drain_takes_the_volume_along(cluster: Cluster, ceph: Ceph) -> None:
    with on_ceph(cluster, ceph) as used:
        used.create()
        text, node, before = used.write(), node_of(used), fenced(ceph)
        try:
            words = ("--ignore-daemonsets", "--delete-emptydir-data", "--timeout=240s")
            cluster.kubectl("drain", node.name, *words, timeout=260)
            assert used.reads() == text
            assert node_of(used) is not node
        finally:
            cluster.kubectl("uncordon", node.name)
        cluster.wait_rolled_out("Deployment", "luks-csi-controller", NAMESPACE)
        assert fenced(ceph) == before


def test_a_node_that_loses_its_power_comes_back_with_its_volumes(cluster: Cluster, ceph: Ceph) -> None:
    node = cluster.node(2)
    with on_ceph(cluster, ceph) as used:
        used.create(node=node.name)
        text = used.write()
        node.run("sync")
        node.cut()
        node.boot()
        assert used.reads() == text
        used.write()


def test_a_lost_node_is_fenced_off_and_its_pod_goes_on_elsewhere(cluster: Cluster, ceph: Ceph) -> None:
    node = cluster.node(2)
    with on_ceph(cluster, ceph) as used:
        cluster.kubectl("cordon", "node-1")  # no selector: it is to go there later
        try:
            used.create()
            text = used.write()
        finally:
            cluster.kubectl("uncordon", "node-1")
        node.run("sync")
        node.cut()
        before = fenced(ceph)
        try:
            cluster.wait("node that is not ready", lambda: not is_ready(cluster, node), SECONDS)
            cluster.kubectl("taint", "node", node.name, "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute")
            cluster.wait("pod on another node", lambda: used.pod()["spec"]["nodeName"] == "node-1", SECONDS)
            assert used.reads() == text
            again = used.write()
            assert [one.partition(":")[0] for one in fenced(ceph) - before] == [node.address]
        finally:
            node.boot()
            cluster.kubectl("taint", "node", node.name, "node.kubernetes.io/out-of-service-", check=False)
        assert used.reads() == again


def is_ready(cluster: Cluster, node: Node) -> bool:
    """As Kubernetes has it, which takes a while to notice."""
    conditions = cluster.api.get("Node", node.name)["status"]["conditions"]
    return any((one["type"], one["status"]) == ("Ready", "True") for one in conditions)


def test_two_nodes_have_a_shared_block_volume_at_once(cluster: Cluster, ceph: Ceph) -> None:
    """As the live migration of a VM does it."""
    with cluster.namespace() as namespace:
        cluster.apply([claim("data", "32Mi", CLASS, volumeMode="Block", accessModes=["ReadWriteMany"])], namespace)
        names = ("node-1", "node-2")
        for name in names:
            cluster.apply([pod(name, block=True, node=name)], namespace)
            cluster.pod_running(name, namespace, SECONDS)
        text = secrets.token_hex(32)

        def sh(name: str, script: str) -> str:
            return cluster.pod_exec(name, ["sh", "-ec", script], namespace).decode().strip()

        sh("node-1", f"echo {text} | dd of=/dev/data bs=4096 conv=sync,fsync 2>/dev/null")
        read = "dd if=/dev/data bs=4096 count=1 iflag=direct 2>/dev/null | head -n1"
        assert sh("node-2", read) == text
        cluster.api.delete("Pod", "node-1", namespace)
        cluster.wait("end of the first pod", lambda: not cluster.get("Pod", "node-1", namespace), SECONDS)
        sh("node-2", f"echo {text[::-1]} | dd of=/dev/data bs=4096 conv=sync,fsync 2>/dev/null")
        assert sh("node-2", read) == text[::-1]
        assert text.encode() not in ciphertext(ceph, volume_id(volume_of(cluster, "data", namespace)))
    cluster.wait("end of all volumes", lambda: nothing_left(cluster, ceph), SECONDS)


def wait_event(used: Deployed, kind: str, name: str, *words: str) -> str:
    return used.cluster.wait_event(kind, name, used.namespace, *words, timeout=SECONDS)


def test_a_user_whom_ceph_does_not_know_is_told_in_the_claims_events(cluster: Cluster, ceph: Ceph) -> None:
    wrong = ceph_secret("wrong", SECRETS, new_key(), encryptionPassphrase=PASSPHRASE)
    with applied(cluster, wrong, ceph_class("wrong", "wrong")), on_ceph(cluster, ceph, "wrong") as used:
        used.create()
        said = wait_event(used, "PersistentVolumeClaim", "data", "client.csi", "FailedPrecondition")
        assert wrong["stringData"]["userKey"] not in said


def test_a_cluster_that_does_not_answer_is_named_and_waited_for(cluster: Cluster, ceph: Ceph) -> None:
    with on_ceph(cluster, ceph) as used:
        used.create()
        text = used.write()
        used.scale(0)
        ceph.stop("mon.a")
        try:
            said = wait_event(used, "Pod", used.ask_for_pod(), "did not answer", "ceph-one")
            assert "look at 'ceph status'" in said
        finally:
            ceph.go_on("mon.a")
        assert used.reads() == text


def test_an_image_that_was_put_in_the_place_of_the_volumes_is_not_used(cluster: Cluster, ceph: Ceph) -> None:
    with on_ceph(cluster, ceph) as used:
        used.create()
        text = used.write()
        used.scale(0)
        image = f"{POOL}/csi-vol-{used.id()}"
        ceph.admin("rbd", "rename", image, f"{POOL}/kept")
        try:
            ceph.admin("rbd", "create", "--size", "48M", image)
            said = (f"the image csi-vol-{used.id()}", "is not that of volume", "put the volume's own back")
            wait_event(used, "Pod", used.ask_for_pod(), *said)
        finally:
            ceph.admin("rbd", "rm", "--no-progress", image)
            ceph.admin("rbd", "rename", f"{POOL}/kept", image)
        assert used.reads() == text
