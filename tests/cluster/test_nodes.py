"""Two nodes: where volumes are made, where their pods run, and a node that is lost."""

import json
import os
import re
from contextlib import ExitStack
from typing import Any

import pytest

from tests.cluster.api import Json
from tests.cluster.commands import Output, run
from tests.cluster.documents import applied
from tests.cluster.driver import (
    CHEAP,
    NAMESPACE,
    STATE,
    TOPOLOGY,
    at_once,
    claim,
    folder_of,
    node_of,
    pod,
    storage_class,
    volume_id,
    volume_of,
)
from tests.cluster.node import Node
from tests.cluster.pods import Pods, filled
from tests.cluster.settings import ROOT, binaries

MIB, GIB = 1 << 20, 1 << 30
_TAKEN = GIB + 16 * MIB  # of a node's room: --free-space-floor, and a volume's LUKS2 header
_CLASSES = {CHEAP, "luks-csi", "luks-csi-per-claim"}
_POLL_SECONDS = 90  # a provisioner measures its room every minute
_GONE_SECONDS = 150  # pods of a node that is gone are looked for every 20 s, and disbelieved for 40 s
_PAGE = ROOT / "docs" / "kubernetes.md"


@pytest.fixture
def two(pods: Pods) -> Node:
    return pods.cluster.node(2)


def _start(pods: Pods, name: str, node: str = "", **more: Any) -> Json:
    """Start a pod with the claim of its name; the volume, on the pod's node."""
    pods.cluster.apply([pod(name, name, node=node, **more)], pods.namespace)
    running = pods.cluster.pod_running(name, pods.namespace, 120)
    volume = volume_of(pods.cluster, name, pods.namespace)
    assert node_of(volume) == running["spec"]["nodeName"]
    _assert_only_on(pods, volume)
    return volume


def _assert_only_on(pods: Pods, volume: Json) -> None:
    """A volume's file is on the node that the volume names, and on no other."""
    found = [node.name for node in pods.cluster.nodes if _folder_of(node, volume)]
    assert found == [node_of(volume)]


def _folder_of(node: Node, volume: Json) -> str:
    """What of a volume is on a node: its files with inode and size."""
    return node.run(f"find {folder_of(volume)} -type f -printf '%f %i %s\\n' 2>/dev/null | sort; true").text


def _affinity(node: str, kind: str) -> Json:
    term = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}
    if kind == "required":
        return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}
    wish = {"weight": 100, "preference": term}
    return {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [wish]}}


def _room(pods: Pods) -> dict[tuple[str, str], Json]:
    """The CSIStorageCapacity objects of the driver, by node and class."""
    found = {}
    for one in pods.cluster.items("CSIStorageCapacity", NAMESPACE):
        assert set(one["nodeTopology"]["matchLabels"]) == {TOPOLOGY}
        key = one["nodeTopology"]["matchLabels"][TOPOLOGY], one["storageClassName"]
        assert key not in found
        found[key] = one
    return found


def _bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMGT]i)?", quantity).groups()  # type: ignore[union-attr]
    return int(number) << {None: 0, "Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40}[unit]


# Places.


def test_a_volume_is_made_on_the_node_that_its_pod_wants(pods: Pods, two: Node) -> None:
    for name in ("selected", "related", "here"):
        pods.claim(name)
    assert node_of(_start(pods, "selected", node=two.name)) == two.name
    assert node_of(_start(pods, "related", affinity=_affinity(two.name, "required"))) == two.name
    assert node_of(_start(pods, "here", node=pods.node.name)) == pods.node.name


def test_each_node_tells_its_room_for_each_class(pods: Pods, two: Node) -> None:
    def told() -> bool:
        room = _room(pods)
        assert set(room) == {(node.name, name) for node in nodes for name in (*_CLASSES, "at-once")}
        for (name, _), one in room.items():
            assert abs(_bytes(one["capacity"]) - free[name]) < 256 * MIB, one
            assert one["maximumVolumeSize"] == one["capacity"]
            (owner,) = one["metadata"]["ownerReferences"]
            assert owner["uid"] == drivers[name]["metadata"]["uid"]
        return True

    nodes = (pods.node, two)
    free = {node.name: int(node.run(f"echo $(($(stat -f -c '%a * %S' {STATE})))").text) - _TAKEN for node in nodes}
    drivers = {node.name: pods.driver.pod(node) for node in nodes}
    with applied(pods.cluster, storage_class("at-once", volumeBindingMode="Immediate")):
        pods.cluster.wait("room of both nodes", told, _POLL_SECONDS)


def test_a_claim_goes_where_there_is_room_and_waits_where_there_is_none(pods: Pods, two: Node) -> None:
    def waits() -> bool:
        events = pods.cluster.events("Pod", "second", pods.namespace)
        sentence = "2 node(s) did not have enough free storage"
        assert any(event.startswith("0/2 nodes are available: ") and sentence in event for event in events), events
        return True

    with ExitStack() as stack:
        # The room for a new class is measured at once.
        stack.enter_context(filled(pods.node, 4 * GIB))
        stack.enter_context(applied(pods.cluster, storage_class("first")))
        pods.claim("first", "6Gi", storage_class="first")
        assert node_of(_start(pods, "first")) == two.name
        with filled(two, 4 * GIB):
            stack.enter_context(applied(pods.cluster, storage_class("second")))
            pods.claim("second", "6Gi", storage_class="second")
            pods.cluster.apply([pod("second", "second", node="")], pods.namespace)
            pods.cluster.wait("sentence of the scheduler", waits)
            assert pods.status("second")["phase"] == "Pending"
        pods.cluster.pod_running("second", pods.namespace, _POLL_SECONDS + 30)
        assert node_of(volume_of(pods.cluster, "second", pods.namespace)) == two.name


@pytest.mark.usefixtures("two")
def test_a_claim_of_an_immediate_class_is_bound_without_a_pod_which_follows_it(pods: Pods) -> None:
    with applied(pods.cluster, storage_class("at-once", volumeBindingMode="Immediate")):
        for number in range(3):
            name = f"claim-{number}"
            pods.claim(name, storage_class="at-once")
            volume = volume_of(pods.cluster, name, pods.namespace)
            _assert_only_on(pods, volume)
            assert _start(pods, name)["metadata"]["name"] == volume["metadata"]["name"]


@pytest.mark.parametrize("mode", ["Immediate", "WaitForFirstConsumer"])
def test_a_class_may_be_kept_to_a_node(pods: Pods, two: Node, mode: str) -> None:
    with ExitStack() as stack:
        for node in (pods.node, two):
            kept = at_once(f"on-{node.name}", node.name) | {"volumeBindingMode": mode}
            stack.enter_context(applied(pods.cluster, kept))
            for name in (f"{node.name}-first", f"{node.name}-second"):
                pods.claim(name, storage_class=f"on-{node.name}")
                assert node_of(_start(pods, name)) == node.name


def test_a_volume_is_deleted_on_its_node_and_the_other_is_not_asked(pods: Pods, two: Node) -> None:
    def gone() -> bool:
        return not pods.cluster.get("PersistentVolume", going["metadata"]["name"])

    for name in ("stays", "goes"):
        pods.claim(name)
    staying, going = _start(pods, "stays", pods.node.name), _start(pods, "goes", two.name)
    before = _folder_of(pods.node, staying)
    for kind in ("Pod", "PersistentVolumeClaim"):
        pods.cluster.api.delete(kind, "goes", pods.namespace)
    pods.cluster.wait("end of the volume", gone)
    assert not _folder_of(two, going)
    assert _folder_of(pods.node, staying) == before
    pods.sh("stays", "touch /data/file")
    assert f'"DeleteVolume","volume_id":"{volume_id(going)}","code":"OK"' in pods.driver.logs(two)
    for container in ("driver", "provisioner"):
        assert volume_id(going) not in pods.driver.logs(pods.node, container)


# A node that is gone for ever, and comes back.


def _told(pods: Pods, heading: str) -> Output:
    """Run what docs/kubernetes.md tells to run below a heading, as the administrator."""
    found = re.search(rf"^#+ {heading}\n.*?^```sh\n(.*?)^```$", _PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"docs/kubernetes.md tells nothing to run below {heading}"
    environment = {
        "KUBECONFIG": str(pods.cluster.control_plane.kubeconfig),
        "PATH": f"{binaries()}:{os.environ['PATH']}",
    }
    return run(["sh", "-c", found[1]], timeout=120, env=environment)


def _store(name: str, node: str) -> Json:
    """A StatefulSet of one pod with a volume, that prefers a node."""
    labels = {"app": name}
    spec = pod(name, node="", affinity=_affinity(node, "preferred"))["spec"]
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name},
        "spec": {
            "serviceName": name,
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {**spec, "volumes": []}},
            "volumeClaimTemplates": [claim("data")],
        },
    }


@pytest.mark.timeout(600)
def test_a_node_that_is_gone_for_ever_is_cleared_and_may_come_back(pods: Pods, two: Node) -> None:
    def released() -> bool:
        return bool(pods.cluster.api.get("PersistentVolume", volume_id(moved))["status"]["phase"] == "Released")

    def cleared() -> bool:
        lost = [one["metadata"]["name"] for one in pods.cluster.items("PersistentVolume") if node_of(one) == two.name]
        assert not lost
        assert not pods.cluster.items("Pod", fields=f"spec.nodeName={two.name}")
        assert not pods.cluster.get("PersistentVolumeClaim", "plain", pods.namespace)
        assert two.name not in {node for node, _ in _room(pods)}
        return True

    # On node 2: a bare pod's volume, a StatefulSet's, and one without a pod.
    for name in ("plain", "moved"):
        pods.claim(name)
    plain, moved = _start(pods, "plain", two.name), _start(pods, "moved", two.name)
    pods.cluster.apply([_store("store", two.name)], pods.namespace)
    pods.cluster.pod_running("store-0", pods.namespace, 120)
    stored = volume_of(pods.cluster, "data-store-0", pods.namespace)
    assert node_of(stored) == two.name
    pods.sh("store-0", "echo lost > /data/file")
    pods.cluster.delete([pod("moved")], pods.namespace)
    on_two = {volume_id(volume) for volume in (plain, moved, stored)}

    with ExitStack() as stack:
        # Else kubelet finds its own notes on the mounts empty and leaves the pods' folders: it does not fsync them.
        two.run("sync")
        two.cut()
        stack.callback(two.boot)
        # Meanwhile somebody makes a claim anew, on node 1: that one is not to be touched.
        pods.cluster.delete([claim("moved")], pods.namespace)
        pods.cluster.wait("released volume", released)
        pods.claim("moved")
        pods.start("moved", "moved")

        _told(pods, "A node that is gone for ever")
        pods.cluster.wait("end of what node 2 had", cleared, _GONE_SECONDS)
        pods.cluster.pod_running("store-0", pods.namespace, 120)
        renewed = volume_of(pods.cluster, "data-store-0", pods.namespace)
        assert node_of(renewed) == pods.node.name
        assert volume_id(renewed) not in on_two
        pods.sh("store-0", "test ! -e /data/file")
        pods.sh("moved", "touch /data/file")
        stack.close()

    pods.cluster.wait("driver on node 2", lambda: pods.driver.pod(two), 120)
    pods.claim("new")
    new = _start(pods, "new", two.name)
    listed = json.loads(pods.driver.exec(two, ["luks-csi", "volume", "list", "-o", "json"]))
    assert {one["volume_id"] for one in listed} == on_two | {volume_id(new)}
    for volume in on_two:
        pods.driver.exec(two, ["luks-csi", "volume", "delete", volume, "--yes"])
    assert not any(_folder_of(two, volume) for volume in (plain, moved, stored))
    pods.sh("new", "touch /data/file")
