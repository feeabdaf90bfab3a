"""What users read when the node's disk is full, and that all goes on by itself when it no longer is."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tests.cluster.cluster import Cluster
from tests.cluster.documents import applied
from tests.cluster.driver import KEY, STATE, Driver, at_once, pod
from tests.cluster.leftovers import assert_closed
from tests.cluster.node import Node
from tests.cluster.pods import Pods, filled
from tests.cluster.sentences import MENDED_SECONDS, SAID_SECONDS, made, restore_secret, said

_MIB, _GIB = 1 << 20, 1 << 30
_CHOICE_SECONDS = 6  # in which a provisioner takes a claim of an Immediate class, if ever
_MEMORY = "/var/lib/kubelet/plugins/luks.csi.internal/csi.sock.identity"
_DISK_BYTES = 1200 * _MIB  # the driver leaves a GiB free


def test_a_claim_and_its_pod_tell_that_the_node_is_full(pods: Pods) -> None:
    # The node is chosen while it has room and there is no secret yet; then it is full.
    pods.cluster.api.delete("Secret", KEY, pods.namespace)
    pods.claim()
    pods.cluster.apply([pod("one")], pods.namespace)
    said(pods, "PersistentVolumeClaim", "data", "error getting secret", f'secrets "{KEY}" not found')
    with filled(pods.node, _GIB + 16 * _MIB):
        restore_secret(pods)
        words = ("code = ResourceExhausted", "no room for volume", "free space or choose another node")
        said(pods, "PersistentVolumeClaim", "data", *words)
        said(pods, "Pod", "one", "did not have enough free storage")
        assert not made(pods)
    pods.cluster.pod_running("one", pods.namespace, MENDED_SECONDS)


def test_a_claim_that_binds_at_once_waits_for_room_and_is_looked_at_again_when_it_changes(pods: Pods) -> None:
    with applied(pods.cluster, at_once("immediate", pods.node.name)):
        with filled(pods.node, _GIB + 16 * _MIB):
            pods.claim(storage_class="immediate")
            said(pods, "PersistentVolumeClaim", "data", "Waiting for a volume to be created")
            time.sleep(_CHOICE_SECONDS)
            assert pods.status()["phase"] == "Pending"
            assert not made(pods)
        change = {"metadata": {"annotations": {"look": "again"}}}
        pods.cluster.api.patch("PersistentVolumeClaim", "data", pods.namespace, change)
        pods.cluster.wait("bound claim", lambda: pods.status()["phase"] == "Bound", SAID_SECONDS)


@contextmanager
def _own_disk(driver: Driver, node: Node) -> Iterator[None]:
    """Have the driver keep its volumes on a small disk of its own, so that this one can be full and the node's not."""
    file = "/var/lib/kubelet/own-disk.img"

    def restart() -> None:
        node.run(f"rm -f {_MEMORY}")  # another state directory, and it is meant
        driver.wait_other_pod(node, driver.delete_pod(node))

    node.run(f"truncate --size={_DISK_BYTES} {file} && mkfs.ext4 -q -m0 {file} && mount -o loop {file} {STATE}")
    try:
        restart()
        yield
    finally:
        node.run(f"umount {STATE}")  # the driver keeps it until its end
        restart()
        node.run(f"rm {file}")


def test_a_pod_tells_that_the_disk_is_full_at_its_first_stage(cluster: Cluster, driver: Driver, pods: Pods) -> None:
    # MiB that are free: no room for the record, for the LUKS2 header, for the file system.
    room = {"none": (0, "no space for volume"), "some": (4, "libcryptsetup"), "more": (18, "mkfs.ext4")}
    with ExitStack() as stack:
        stack.enter_context(_own_disk(driver, pods.node))
        stack.enter_context(applied(cluster, at_once("immediate", pods.node.name)))
        stack.callback(cluster.delete_namespace, pods.namespace)  # while its disk is there
        for name in room:
            pods.claim(name, storage_class="immediate")
        volumes = {name: pods.volume(name) for name in room}
        for name, (mib, who) in room.items():
            fill = f"cd {STATE}; dd if=/dev/zero of=filler bs=1M; truncate --size=-{mib}M filler; sync filler"
            pods.node.run(fill, 120, check=False)
            pods.cluster.apply([pod(name, name)], pods.namespace)
            said(pods, "Pod", name, "code = ResourceExhausted", who, "free space")
            assert_closed(pods.node, volumes[name].id)
            pods.node.run(f"rm {STATE}/filler")
            pods.cluster.pod_running(name, pods.namespace, MENDED_SECONDS)
            pods.sh(name, "echo kept > /data/text && sync /data/text")
            pods.end(name, name)
