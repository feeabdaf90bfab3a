"""Logical volumes of each node's volume group, thick and thin."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.api import Json
from tests.cluster.cluster import Cluster
from tests.cluster.documents import applied
from tests.cluster.driver import KEY, Driver, mapping_of, pod, secret, volume_id, volume_of
from tests.cluster.node import Node
from tests.cluster.pods import Pods
from tests.cluster.volumegroup import (
    GROUP,
    KINDS,
    MIB,
    NAMESPACE,
    POOL,
    POOL_MIB,
    attach_disk,
    logical_volume,
    lvm,
    lvm_class,
    lvm_installed,
    nothing_left,
    pool_mib,
    volume_groups,
    volumes_on,
)

_EXAMPLES = {"thick": "luks-csi-lvm", "thin": "luks-csi-lvm-thin"}
_SECONDS = 180
_TOPOLOGY = "topology.lvm.luks.csi.internal/node"
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module", autouse=True)
def installed(cluster: Cluster) -> Iterator[None]:
    with volume_groups(cluster.node(1), cluster.node(2)), lvm_installed(cluster):
        yield


@pytest.fixture
def driver(cluster: Cluster) -> Driver:
    return Driver(cluster, NAMESPACE)


@contextmanager
def used(cluster: Cluster, driver: Driver, node: Node) -> Iterator[Pods]:
    """Pods and claims of a test on a node; at the end nothing of them is left on any."""
    with cluster.namespace() as namespace:
        yield Pods(cluster, driver, namespace, node)
    cluster.wait("end of all volumes", lambda: nothing_left(cluster), _SECONDS)


@pytest.fixture
def one(cluster: Cluster, driver: Driver) -> Iterator[Pods]:
    with used(cluster, driver, cluster.node(1)) as pods:
        yield pods


@pytest.fixture
def two(cluster: Cluster, driver: Driver) -> Iterator[Pods]:
    with used(cluster, driver, cluster.node(2)) as pods:
        yield pods


def write(pods: Pods, name: str = "one") -> str:
    """Have a pod write something that nobody knows, fsynced; that text."""
    text = secrets.token_hex(32)
    pods.sh(name, f"echo {text} | dd of=/data/text conv=fsync 2>/dev/null")
    return text


def reads(pods: Pods, name: str = "one") -> str:
    return pods.sh(name, "cat /data/text")


def end(pods: Pods, name: str = "one", claim: str = "data") -> None:
    """Delete a pod, and wait until its volume is closed."""
    mapping = mapping_of(volume_of(pods.cluster, claim, pods.namespace)).rpartition("/")[2]
    pods.cluster.api.delete("Pod", name, pods.namespace)

    def ended() -> bool:
        assert not pods.cluster.get("Pod", name, pods.namespace)
        assert mapping not in pods.node.run("dmsetup ls").text
        return True

    pods.cluster.wait(f"end of pod {name}", ended, _SECONDS)


def id_of(pods: Pods, claim: str = "data") -> str:
    return volume_id(volume_of(pods.cluster, claim, pods.namespace))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_pod_writes_is_ciphertext_in_the_group_and_a_deletion_leaves_nothing(one: Pods, kind: str) -> None:
    """With the classes that users get."""
    one.cluster.apply([secret("luks-csi-key")], one.namespace)
    one.claim(storage_class=_EXAMPLES[kind])
    one.start("one")
    text = write(one)
    assert volumes_on(one.node) == [f"luks-{id_of(one)}:{POOL if kind == 'thin' else ''}"]
    assert not volumes_on(one.cluster.node(2))
    look = f"dd if={logical_volume(one.node, id_of(one))} bs=1M iflag=direct status=none"
    assert one.node.run(f"{look} | head -c 4").text == "LUKS"
    assert one.node.run(f"{look} | LC_ALL=C grep -a -c -F {text}; true").text.strip() == "0"
    one.driver.wait_other_pod(one.node, one.driver.delete_pod(one.node))
    assert reads(one) == text
    assert id_of(one) in one.driver.exec(one.node, ["luks-csi", "volume", "list"])
    text = write(one)
    end(one)
    one.start("two")
    assert reads(one, "two") == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_volume(one: Pods, kind: str) -> None:
    one.claim(storage_class=f"lvm-{kind}", volumeMode="Block")
    one.start("one", block=True)
    one.sh("one", "echo kept | dd of=/dev/data conv=fsync")
    one.resize("96Mi")
    one.wait_resized("96Mi")
    assert int(one.sh("one", "blockdev --getsize64 /dev/data")) == 96 * MIB
    assert one.sh("one", "head -c 4 /dev/data") == "kept"


@pytest.mark.parametrize("kind", KINDS)
def test_a_volume_grows_while_it_is_used(one: Pods, kind: str) -> None:
    one.claim(storage_class=f"lvm-{kind}")
    before = one.start("one")
    room, text = one.room("one"), write(one)
    one.resize("96Mi")
    one.wait_resized("96Mi")
    assert one.room("one") >= room + 56 * MIB
    assert one.device_bytes() == 96 * MIB
    one.sh("one", "dd if=/dev/urandom of=/data/more bs=1M count=70 conv=fsync")
    assert reads(one) == text
    assert one.get("one")["metadata"]["uid"] == before["metadata"]["uid"]


def capacities(cluster: Cluster) -> dict[tuple[str, str], Json]:
    """What is published for each node and class."""
    return {
        (each["nodeTopology"]["matchLabels"][_TOPOLOGY], each["storageClassName"]): each
        for each in cluster.items("CSIStorageCapacity", NAMESPACE)
    }


def mib_of(quantity: str) -> float:
    units = {"Ki": 1 / 1024, "Mi": 1, "Gi": 1024}
    return float(quantity[:-2]) * units[quantity[-2:]] if quantity[-2:] in units else int(quantity) / MIB


def test_each_node_tells_the_room_of_its_group_and_of_its_pool(cluster: Cluster) -> None:
    def told() -> bool:
        found = capacities(cluster)
        names = (*_EXAMPLES.values(), *(f"lvm-{kind}" for kind in KINDS))
        assert set(found) == {(node.name, name) for node in cluster.nodes for name in names}
        for (name, kind), each in found.items():
            # A volume's header is taken off, and of a pool a fifth is left; extents are 4 MiB.
            wanted = free[name] if "thin" not in kind else pools[name] * 0.8
            assert wanted - 24 <= mib_of(each["capacity"]) <= wanted, each
        return True

    words = "lvm vgs --noheadings --nosuffix --units m -o vg_free $group"
    free = {node.name: float(lvm(node, words)) for node in cluster.nodes}
    pools = {node.name: pool_mib(node) for node in cluster.nodes}
    cluster.wait("room of both groups", told, 90)


def test_a_group_that_is_extended_while_the_driver_runs_has_the_room(one: Pods) -> None:
    size = "2500Mi"  # more than the first disk has
    disk = attach_disk(one.node, "second")
    try:
        one.cluster.apply([pod("one", node=one.node.name)], one.namespace)
        one.claim(size=size, storage_class="lvm-thick")
        lvm(one.node, f"lvm vgextend $group {disk}")
        one.cluster.pod_running("one", one.namespace, _SECONDS)
        write(one)
    finally:
        for name in ("Pod", "PersistentVolumeClaim"):
            one.cluster.api.raw("DELETE", one.cluster.api.path(name, namespace=one.namespace))
        one.cluster.wait("end of the volume", lambda: not volumes_on(one.node), _SECONDS)
        lvm(one.node, f"lvm vgreduce $group {disk}; losetup --detach {disk}")


def test_a_pool_above_its_limit_is_told_in_an_event_and_an_extension_ends_it(one: Pods) -> None:
    filler = f"{GROUP}-filler"
    # The node is chosen while there is room and no secret yet.
    one.cluster.api.delete("Secret", KEY, one.namespace)
    one.claim(storage_class="lvm-thin")
    one.cluster.apply([pod("one", node=one.node.name)], one.namespace)
    one.cluster.wait_event("PersistentVolumeClaim", "data", one.namespace, f'secrets "{KEY}" not found')
    full = int(pool_mib(one.node) * 0.9)
    lvm(
        one.node,
        f"lvm lvcreate --type thin -V {full}M --thinpool $pool -n filler $group\n"
        f"dd if=/dev/zero of=/dev/$(dmsetup info -c --noheadings -o blkdevname {filler}) bs=1M count={full} "
        f"oflag=direct status=none",
        120,
    )
    try:
        one.cluster.apply([secret()], one.namespace)
        words = ("code = ResourceExhausted", f"the thin pool {GROUP}/{POOL}", "extend it (lvextend)")
        one.cluster.wait_event("PersistentVolumeClaim", "data", one.namespace, *words, timeout=_SECONDS)
        assert not volumes_on(one.node)[1:]
        lvm(one.node, f"lvm lvextend --size +{POOL_MIB}M $group/$pool")
        one.cluster.pod_running("one", one.namespace, _SECONDS)
        write(one)
    finally:
        lvm(one.node, "lvm lvremove $group/filler")


def test_a_node_that_loses_its_power_comes_back_with_its_volumes_once_its_disk_is_there(two: Pods) -> None:
    texts = {}
    for kind in KINDS:
        two.claim(kind, storage_class=f"lvm-{kind}")
        two.start(kind, kind)
        texts[kind] = write(two, kind)
    two.node.run("sync")  # kubelet does not fsync what it notes of its mounts
    two.node.cut()
    two.node.boot()
    refused(two, f"there is no volume group {GROUP} on this node")
    attach_disk(two.node)
    two.cluster.wait_rolled_out("DaemonSet", "luks-csi-node", NAMESPACE)
    for kind in KINDS:
        two.cluster.pod_running(kind, two.namespace, _SECONDS)
        assert reads(two, kind) == texts[kind]
        write(two, kind)


def refused(pods: Pods, *words: str) -> None:
    """Until the driver's pod on the node says at its end why it does not start."""
    labels = "app.kubernetes.io/component=node"

    def said() -> bool:
        found = pods.cluster.items("Pod", NAMESPACE, labels=labels, fields=f"spec.nodeName={pods.node.name}")
        states = [
            state
            for each in found
            for status in each["status"].get("containerStatuses", [])
            if status["name"] == "driver"
            for state in (status["state"], status.get("lastState", {}))
        ]
        told = [state["terminated"].get("message", "") for state in states if "terminated" in state]
        assert any(all(word in text for word in words) for text in told), found
        return True

    pods.cluster.wait(f"end of the driver with {words}", said, _SECONDS)


def test_a_group_that_is_not_there_is_told_where_the_driver_ended(two: Pods) -> None:
    lvm(two.node, "lvm vgrename $group other")
    try:
        uid = two.driver.delete_pod(two.node)
        refused(two, f"there is no volume group {GROUP} on this node", "--volume-group")
    finally:
        lvm(two.node, "lvm vgrename other $group")
    two.driver.wait_other_pod(two.node, uid)
    two.claim(storage_class="lvm-thick")
    two.start("one")
    write(two)


def test_a_pool_that_is_not_there_is_told_in_the_drivers_log_and_has_no_room(two: Pods) -> None:
    with applied(two.cluster, lvm_class("thin", "lvm-nix", "nix")):
        two.claim(storage_class="lvm-nix")
        two.cluster.apply([pod("one", node=two.node.name)], two.namespace)
        two.cluster.wait_event("Pod", "one", two.namespace, "did not have enough free storage", timeout=_SECONDS)

        def told() -> bool:
            assert f"{GROUP}/nix is no thin pool that can be used" in two.driver.logs(two.node)
            return True

        two.cluster.wait("sentence about the pool", told, _SECONDS)
        assert (two.node.name, "lvm-nix") not in capacities(two.cluster)
