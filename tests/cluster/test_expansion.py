"""A claim that asks for more."""

import pytest

from tests.cluster.driver import volume_of
from tests.cluster.pods import Pods, filled

MIB, GIB = 1 << 20, 1 << 30
_FLOOR = GIB  # of the driver, --free-space-floor


def _condition(pods: Pods, kind: str) -> str:
    """What a condition of the claim says; "" if it has none of that kind."""
    return next((str(one.get("message")) for one in pods.status().get("conditions", []) if one["type"] == kind), "")


@pytest.mark.parametrize("case", ["as-it-runs", "while-the-driver-restarts", "after-a-restart-of-the-driver"])
def test_a_mounted_volume_grows_without_a_secret(pods: Pods, case: str) -> None:
    pods.claim()
    before = pods.start("one")
    assert "nodeExpandSecretRef" not in volume_of(pods.cluster, "data", pods.namespace)["spec"]["csi"]
    room = pods.room("one")
    pods.sh("one", "echo kept > /data/file; sync /data/file")
    uid = "" if case == "as-it-runs" else pods.driver.delete_pod(pods.node)
    if case.startswith("after"):
        pods.driver.wait_other_pod(pods.node, uid)
    pods.resize("96Mi")
    pods.wait_resized("96Mi")
    assert pods.room("one") >= room + 56 * MIB
    assert pods.device_bytes() == 96 * MIB
    assert pods.sh("one", "dd if=/dev/urandom of=/data/more bs=1M count=70 conv=fsync; cat /data/file") == "kept"
    assert pods.get("one")["metadata"]["uid"] == before["metadata"]["uid"]
    assert pods.get("one")["status"]["containerStatuses"][0]["restartCount"] == 0
    pods.driver.wait_other_pod(pods.node, uid)


def test_a_block_volume_grows_while_it_is_used(pods: Pods) -> None:
    pods.claim(volumeMode="Block")
    pods.start("one", block=True)
    pods.sh("one", "echo kept | dd of=/dev/data conv=fsync")
    pods.resize("96Mi")
    pods.wait_resized("96Mi")
    assert int(pods.sh("one", "blockdev --getsize64 /dev/data")) == 96 * MIB
    assert pods.sh("one", "head -c 4 /dev/data") == "kept"
    pods.sh("one", "echo behind | dd of=/dev/data bs=1M seek=95 conv=fsync")


@pytest.mark.parametrize("block", [False, True], ids=["mount", "block"])
def test_a_volume_that_nobody_uses_grows_for_its_next_pod(pods: Pods, *, block: bool) -> None:
    pods.claim(volumeMode="Block" if block else "Filesystem")
    pods.start("first", block=block)
    room = 0 if block else pods.room("first")
    pods.end("first")
    pods.resize("96Mi")
    pods.cluster.wait("pending resize", lambda: _condition(pods, "FileSystemResizePending"))
    assert pods.status()["capacity"]["storage"] == "32Mi"
    pods.start("second", block=block)
    pods.wait_resized("96Mi")
    assert pods.device_bytes() == 96 * MIB
    assert block or pods.room("second") >= room + 56 * MIB


def test_an_enlargement_without_room_says_so_and_keeps_no_pod_from_starting(pods: Pods) -> None:
    def told() -> bool:
        sentence = _condition(pods, "NodeResizeError")
        assert f"no room for volume {pods.volume().id}" in sentence
        assert f"are free above the floor of {_FLOOR}; free space there, then start the pod anew" in sentence
        return True

    def sizes() -> tuple[int, int, str]:
        file = pods.node.run(f"stat -c %s {pods.volume().file}").text
        return pods.room("one"), pods.device_bytes(), file

    pods.claim()
    pods.start("one")
    pods.sh("one", "echo kept > /data/first; sync /data/first")
    before = sizes()
    with filled(pods.node, 2 * GIB):
        pods.resize("2Gi")
        pods.cluster.wait("sentence of the driver", told)
        pods.sh("one", "echo written > /data/file; sync /data/file")
        assert sizes() == before
        pods.end("one")
        pods.start("one")
        assert pods.sh("one", "cat /data/first /data/file").split() == ["kept", "written"]
        assert sizes() == before
        assert pods.status()["capacity"]["storage"] == "32Mi"
        pods.end("one")
    pods.start("one")
    pods.wait_resized("2Gi")
    assert pods.device_bytes() == 2 * GIB
    assert pods.sh("one", "cat /data/file") == "written"
