"""Encryption in front of other CSI drivers: with and without attaching and staging below, holder pods, and neither."""

import json
import os
import time
from collections.abc import Callable, Iterator

import pytest

from tests.cluster.api import Json
from tests.cluster.cluster import Cluster
from tests.cluster.commands import ClusterError
from tests.cluster.node import Node
from tests.cluster.over import (
    NAME,
    NAMESPACE,
    Over,
    check_untold,
    drivers_below,
    end_below,
    holder_process,
    holders,
    over,
    over_installed,
    start_below,
    wait_drivers,
)
from tests.cluster.settings import CSI_ADDONS_BIN

KINDS = ("attached", "plain", "direct")
_SECONDS = 240
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", autouse=True)
def installed(cluster: Cluster) -> Iterator[None]:
    if not os.environ.get(CSI_ADDONS_BIN):
        pytest.skip(f"${CSI_ADDONS_BIN} does not say where csi-attacher is: make cluster-test builds it")
    cluster.node(2)
    with drivers_below(cluster), over_installed(cluster):
        yield


@pytest.fixture(autouse=True)
def undisturbed() -> Iterator[None]:
    """Whatever happens, nobody takes a device away from under a mapping."""
    yield
    check_untold()


def node_of(cluster: Cluster, pod: Json) -> Node:
    return next(node for node in cluster.nodes if node.name == pod["spec"]["nodeName"])


def wait_event(used: Over, *words: str) -> str:
    return used.cluster.wait_event("PersistentVolumeClaim", "data", used.namespace, *words, timeout=_SECONDS)


@pytest.mark.parametrize(
    ("kind", "mode"), [*((kind, mode) for kind in ("attached", "plain") for mode in ("", "-at-once")), ("direct", "")]
)
def test_what_a_pod_writes_is_ciphertext_below_and_a_deletion_leaves_nothing(
    cluster: Cluster, tell: Callable[[str], None], kind: str, mode: str
) -> None:
    with over(cluster, f"over-{kind}{mode}") as used:
        used.create()
        begin = time.monotonic()
        used.pod()
        tell(f"csi over {kind}{mode}: pod running {time.monotonic() - begin:.1f} s after its claim")
        text = used.write()
        holding = [each["spec"]["nodeName"] for each in used.holders()]
        assert holding == ([] if kind == "direct" else [used.pod()["spec"]["nodeName"]])
        node_of(cluster, used.pod()).run("sync")
        content = used.file().read_bytes()
        assert content.startswith(b"LUKS\xba\xbe")
        assert text.encode() not in content
        used.scale(0)
        used.scale(1)
        assert used.reads() == text


@pytest.mark.parametrize("kind", ["attached", "direct"])
def test_drivers_that_start_anew_disturb_nobody(cluster: Cluster, kind: str) -> None:
    with over(cluster, f"over-{kind}") as used:
        used.create()
        used.check_restarts(NAMESPACE)


def test_a_holder_is_not_deleted_by_hand_and_one_that_was_killed_comes_back(cluster: Cluster) -> None:
    with over(cluster, "over-attached") as used:
        used.create()
        text = used.write()
        (holder,) = used.holders()
        name, node = holder["metadata"]["name"], node_of(cluster, holder)
        for more in ((), ("--force", "--grace-period=0")):
            with pytest.raises(ClusterError, match=r"holds the device of volume .* on node .* and goes by itself when"):
                cluster.kubectl("delete", "pod", name, "-n", NAMESPACE, *more)
        node.run(f"kill -9 {holder_process(node)}")
        assert used.write() == used.reads() != text

        def back() -> bool:
            found = cluster.api.get("Pod", name, NAMESPACE)
            (status,) = found["status"]["containerStatuses"]
            assert status["restartCount"] == 1
            assert status["ready"], status
            return True

        cluster.wait("holder that runs again", back, _SECONDS)
        again = used.write()
        used.scale(0)
        used.scale(1)
        assert used.reads() == again


def test_a_holder_stays_where_nobody_keeps_it_from_being_deleted(cluster: Cluster) -> None:
    """As a policy may be off: the program itself looks at the kernel."""
    with over(cluster, "over-attached") as used:
        used.create()
        used.write()
        (holder,) = used.holders()
        name, node = holder["metadata"]["name"], node_of(cluster, holder)
        process = holder_process(node)
        binding = ("validatingadmissionpolicybinding", "luks-csi-over-holders")
        saved = cluster.kubectl("get", *binding, "-o", "yaml").stdout
        cluster.kubectl("delete", *binding)
        try:

            def asked() -> bool:
                # The API takes a moment to forget a policy.
                cluster.kubectl("delete", "pod", name, "-n", NAMESPACE, "--wait=false", check=False)
                return "deletionTimestamp" in cluster.api.get("Pod", name, NAMESPACE)["metadata"]

            cluster.wait("deletion of the holder", asked, 60)
        finally:
            cluster.apply(saved.decode())
        time.sleep(15)
        assert holder_process(node) == process
        text = used.write()
        assert "told to end and staying" in cluster.logs(name, "holder", NAMESPACE)
        used.scale(0)
        used.scale(1)
        assert used.reads() == text


def test_a_drain_moves_the_pod_before_its_holder(cluster: Cluster, tell: Callable[[str], None]) -> None:
    with over(cluster, "over-attached") as used:
        used.create()
        text = used.write()
        node = used.pod()["spec"]["nodeName"]
        begin = time.monotonic()
        try:
            cluster.kubectl(
                "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=240s", timeout=260
            )
            tell(f"csi: drain of a node with a holder {time.monotonic() - begin:.1f} s")
            assert not [each for each in holders(cluster) if each["spec"]["nodeName"] == node]
            assert used.reads() == text
            assert used.pod()["spec"]["nodeName"] != node
        finally:
            cluster.kubectl("uncordon", node)
        cluster.wait_rolled_out("Deployment", "luks-csi-controller", NAMESPACE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_that_loses_its_power_comes_back_with_its_volumes(cluster: Cluster, kind: str) -> None:
    node = cluster.node(2)
    with over(cluster, f"over-{kind}") as used:
        used.create(node=node.name)
        text = used.write()
        node.run("sync")
        node.cut()
        node.start_boot()
        node.wait_booted()
        start_below(node)
        node.wait_ready()
        wait_drivers(cluster, node, {NAME})
        assert used.reads() == text
        used.write()


@pytest.mark.parametrize(("kind", "device"), [("attached", "/dev/loop"), ("direct", "/var/lib/kubelet/plugins/kub")])
def test_a_volume_is_not_taken_from_a_node_that_may_write_and_is_from_one_that_is_off(
    cluster: Cluster, kind: str, device: str
) -> None:
    node = cluster.node(2)
    with over(cluster, f"over-{kind}") as used:
        cluster.kubectl("cordon", "node-1")  # no selector: it is to go there later
        try:
            used.create()
            text = used.write()
        finally:
            cluster.kubectl("uncordon", "node-1")
        (attachment,) = [
            each
            for each in cluster.items("VolumeAttachment")
            if each["spec"]["attacher"] == NAME
            and each["spec"]["source"]["persistentVolumeName"] == used.volumes()[0]["metadata"]["name"]
        ]
        name = attachment["metadata"]["name"]
        # As the controller does it that has waited six minutes for a node.
        cluster.kubectl("delete", "volumeattachment", name, "--wait=false")

        def refused() -> bool:
            status = cluster.api.get("VolumeAttachment", name)["status"]
            said = status.get("detachError", {}).get("message", "")
            assert f"cannot be taken from node {node.name}: it may be open there as {device}" in said, status
            return True

        cluster.wait("refusal to detach", refused, _SECONDS)
        assert used.reads() == text
        node.run("sync")
        node.cut()
        try:
            taint = ("taint", "node", node.name, "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute")
            cluster.wait("node that is not ready", lambda: not node.ready, _SECONDS)
            cluster.kubectl(*taint)
            cluster.wait("pod on another node", lambda: used.pod()["spec"]["nodeName"] == "node-1", _SECONDS)
            assert used.reads() == text
        finally:
            node.start_boot()
            node.wait_booted()
            start_below(node)
            node.wait_ready()
            cluster.kubectl("taint", "node", node.name, "node.kubernetes.io/out-of-service-", check=False)
        wait_drivers(cluster, node, {NAME})
        used.write()


@pytest.mark.parametrize("kind", KINDS)
def test_a_volume_grows_while_it_is_used(cluster: Cluster, kind: str) -> None:
    with over(cluster, f"over-{kind}") as used:
        used.create()
        text = used.write()
        used.grow("96Mi")
        blocks, size = used.sh("stat -f -c '%b %S' /data").split()
        assert int(blocks) * int(size) > 80 << 20
        assert used.reads() == text
        assert used.file().stat().st_size >= (96 + 16) << 20


def test_a_driver_below_that_is_away_is_named_and_waited_for(cluster: Cluster) -> None:
    """Both when its volume comes and when it goes."""
    node = cluster.node(2)
    with over(cluster, "over-direct") as used:
        used.create(node=node.name)
        text = used.write()
        end_below(node, "plain")
        try:
            patch = ("Deployment", "data", used.namespace)
            cluster.api.patch(*patch, {"spec": {"replicas": 0}})
            cluster.wait("end of the pod", lambda: not cluster.items("Pod", used.namespace), _SECONDS)
            time.sleep(10)
            assert used.record()["staged"]["node"] == node.name
            assert used.file().name in node.run("losetup -n -O BACK-FILE").text
            cluster.api.patch(*patch, {"spec": {"replicas": 1}})
            (pod,) = cluster.wait("new pod", lambda: cluster.items("Pod", used.namespace), _SECONDS)
            said = ("the driver plain.below.test", "below volume", "look at its node pod, this is tried again")
            cluster.wait_event("Pod", pod["metadata"]["name"], used.namespace, *said, timeout=_SECONDS)
        finally:
            start_below(node, "plain")
        wait_drivers(cluster, node, {"plain.below.test"})
        assert used.reads() == text


@pytest.mark.parametrize("kind", ["plain", "direct"])
def test_many_volumes_of_one_pod(cluster: Cluster, tell: Callable[[str], None], kind: str) -> None:
    names = [f"data-{number}" for number in range(20)]
    with over(cluster, f"over-{kind}") as used:
        used.create(*names, node="node-1")
        begin = time.monotonic()
        used.pod(600)
        tell(f"csi over {kind}: pod with {len(names)} volumes running after {time.monotonic() - begin:.1f} s")
        texts = {name: used.write(name) for name in names[::5]}
        used.scale(0)
        used.scale(1)
        for name, text in texts.items():
            assert used.reads(name) == text


def test_a_driver_without_block_volumes_is_refused_in_a_sentence(cluster: Cluster) -> None:
    with over(cluster, "over-files") as used:
        used.create(node="node-1")
        said = wait_event(used, "block volumes are not supported here", "its driver must have raw block volumes")
        assert "luks-csi-over/luks-pvc-" in said
    with over(cluster, "over-itself") as used:
        cluster.kubectl("get", "storageclass", "over-itself")
        used.create(node="node-1")
        wait_event(used, "'over-plain', a class of this driver itself")
    with over(cluster, "over-nix") as used:
        used.create(node="node-1")
        wait_event(used, "there is no StorageClass 'nix', which the parameter backingStorageClass names")


def test_a_driver_below_that_wants_attaching_is_not_called(cluster: Cluster) -> None:
    with over(cluster, "over-direct-attached") as used:
        used.create(node="node-1")
        wait_event(used, "the driver attached.below.test below wants its volumes attached", "leave backingAttach out")


def test_a_claim_below_that_was_deleted_by_hand_keeps_its_data_and_says_so(cluster: Cluster) -> None:
    with over(cluster, "over-attached-at-once") as used:
        used.create()
        used.write()
        used.scale(0)
        below, file = f"luks-{used.id()}", used.file()
        kept = file.read_bytes()
        cluster.kubectl("delete", "pvc", below, "-n", NAMESPACE, "--wait=false")
        cluster.kubectl("delete", "volumerecord", used.id(), "-n", NAMESPACE, "--wait=false")
        cluster.api.patch("Deployment", "data", used.namespace, {"spec": {"replicas": 1}})

        def told() -> bool:
            found = [
                each["status"].get("attachError", {}).get("message", "")
                for each in cluster.items("VolumeAttachment")
                if each["spec"]["attacher"] == NAME
            ]
            assert any("somebody has asked for the deletion of the claim" in each for each in found), found
            return True

        cluster.wait("sentence about the claim below", told, _SECONDS)
        assert file.read_bytes() == kept
        assert json.loads(used.record()["record"])["volume"]["encryption"] == "encrypted"
