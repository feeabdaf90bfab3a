"""Volumes as the pods of a node use them."""

import re

import pytest

from tests.cluster.commands import ClusterError
from tests.cluster.documents import Volume, applied
from tests.cluster.driver import CHEAP, KEY, STATE, pod, storage_class
from tests.cluster.leftovers import luks_uuid
from tests.cluster.pods import Pods

MIB = 1 << 20
_PATTERN = "a-pattern-that-only-the-pod-may-see"
_COUNTING = "n=0; while n=$((n + 1)); do echo $n > /data/next && sync /data/next && mv /data/next /data/count; done"
_USER = {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2000, "fsGroupChangePolicy": "OnRootMismatch"}
_STATS_SECONDS = 180  # kubelet counts every minute or two


def _luks_uuid(volume: Volume) -> str:
    """The LUKS UUID of an open volume."""
    return luks_uuid(volume.node.run(f"dmsetup info --columns --noheadings -o uuid {volume.mapping}").text)


def test_a_block_volume_keeps_its_data_and_shows_ciphertext_to_its_node(pods: Pods) -> None:
    pods.claim(volumeMode="Block")
    pods.start("first", block=True)
    assert int(pods.sh("first", "test -b /dev/data; blockdev --getsize64 /dev/data")) == 32 * MIB
    data = f"{_PATTERN}\n".encode() * 30_000
    pods.sh("first", "cat > /dev/data; sync", data)
    volume = pods.volume()
    assert volume.lines_with(_PATTERN, volume.mapping) == 30_000
    pods.end("first")
    pods.start("second", block=True)
    assert pods.sh("second", f"head -c {len(data)} /dev/data | grep -c -x {_PATTERN}") == "30000"
    assert volume.lines_with(_PATTERN, volume.file) == 0
    assert int(volume.node.run(f"du --block-size=1 {volume.file} | cut -f1").text) > len(data)


def test_a_mounted_volume_keeps_its_data_and_shows_ciphertext_to_its_node(pods: Pods) -> None:
    pods.claim()
    pods.start("first")
    pods.sh("first", f"yes {_PATTERN} | head -n 30000 > /data/file; sync /data/file")
    volume = pods.volume()
    assert volume.lines_with(_PATTERN, volume.mapping) >= 30_000
    uuid = _luks_uuid(volume)
    pods.end("first")
    pods.start("second")
    assert pods.sh("second", f"grep -c -x {_PATTERN} /data/file") == "30000"
    assert _luks_uuid(volume) == uuid
    assert volume.lines_with(_PATTERN, volume.file) == 0
    assert uuid in volume.header(volume.file)


def test_a_second_pod_takes_a_new_volume_while_the_first_goes_on(pods: Pods) -> None:
    for name in ("one", "two"):
        pods.claim(name)
    pods.start("one", "one", container={"command": ["sh", "-c", _COUNTING]})
    before = int(pods.sh("one", "timeout 20 sh -c 'until test -e /data/count; do sleep 0.2; done'; cat /data/count"))
    pods.start("two", "two")
    pods.sh("two", "test ! -e /data/count")
    meanwhile = int(pods.sh("one", "cat /data/count"))
    assert meanwhile > before
    assert _luks_uuid(pods.volume("one")) != _luks_uuid(pods.volume("two"))
    pods.end("two", "two")
    assert int(pods.sh("one", "cat /data/count")) > meanwhile
    assert pods.get("one")["status"]["containerStatuses"][0]["restartCount"] == 0


def test_a_deleted_claim_takes_file_and_record_along(pods: Pods) -> None:
    def listed() -> bool:
        return volume.id in pods.driver.exec(pods.node, ["luks-csi", "volume", "list"])

    def gone() -> bool:
        return volume.id not in {one["metadata"]["name"] for one in pods.cluster.items("PersistentVolume")}

    pods.claim()
    pods.start("one")
    volume = pods.volume()
    assert pods.node.run(f"ls {STATE}/loopfile/volumes/{volume.id}").text.split() == [
        "disk.img",
        "header.luks2",
        "record.json",
    ]
    assert listed()
    pods.end("one")
    pods.cluster.api.delete("PersistentVolumeClaim", "data", pods.namespace)
    pods.cluster.wait("end of the volume", gone)
    assert not pods.node.run(f"find {STATE} -path '*{volume.id}*'").text
    assert not listed()


def test_a_volume_that_kubernetes_has_lost_comes_back_with_its_data(pods: Pods) -> None:
    """As docs/operations.md says it, "A Kubernetes that is lost"."""
    pods.claim()
    pods.start("first")
    pods.sh("first", f"echo {_PATTERN} > /data/file; sync /data/file")
    volume, cluster = pods.volume(), pods.cluster
    pods.end("first")
    keep, let_go = ({"spec": {"persistentVolumeReclaimPolicy": policy}} for policy in ("Retain", "Delete"))
    cluster.api.patch("PersistentVolume", volume.id, "", keep)
    cluster.api.delete("PersistentVolumeClaim", "data", pods.namespace)
    cluster.api.delete("PersistentVolume", volume.id, "")
    cluster.wait("end of the PersistentVolume", lambda: not cluster.get("PersistentVolume", volume.id))
    words = ("--class", CHEAP, "--secret", f"{pods.namespace}/{KEY}")
    cluster.create(pods.driver.exec(pods.node, ["luks-csi", "volume", "manifest", volume.id, *words]))
    pods.start("second")
    assert pods.sh("second", "cat /data/file") == _PATTERN
    assert pods.volume().id == volume.id
    pods.resize("48Mi")
    pods.wait_resized("48Mi")
    # Now it goes with its claim, as ever: the fixture finds nothing of it.
    cluster.api.patch("PersistentVolume", volume.id, "", let_go)


def test_a_group_gets_the_volume_once(pods: Pods) -> None:
    pods.claim()
    pods.start("first", securityContext=_USER)
    assert pods.sh("first", "id -u; stat -c '%g %A' /data").split() == ["1000", "2000", "drwxrwsr-x"]
    pods.sh("first", "touch /data/mine; mkdir /data/folder; touch /data/folder/file")
    assert pods.sh("first", "stat -c '%u %g' /data/mine /data/folder/file").splitlines() == ["1000 2000"] * 2
    mounted = pods.node.run(f"findmnt --first-only --noheadings --output TARGET {pods.volume().mapping}").text
    pods.node.run(f"chgrp 3000 {mounted}/mine")
    pods.end("first")
    pods.start("second", securityContext=_USER)
    assert pods.sh("second", "touch /data/new; stat -c %g /data /data/mine /data/new").split() == [
        "2000",
        "3000",
        "2000",
    ]
    pods.end("second")
    pods.start("third", securityContext={**_USER, "fsGroup": 4000})
    assert pods.sh("third", "stat -c %g /data /data/mine /data/folder/file").split() == ["4000"] * 3


def test_sub_paths_are_folders_of_the_one_volume(pods: Pods) -> None:
    places = [{"name": "data", "mountPath": f"/{name}", "subPath": f"kept/{name}"} for name in ("one", "two")]
    pods.claim()
    pods.start("first", container={"volumeMounts": places})
    pods.sh("first", "echo one > /one/file; test ! -e /two/file; echo two > /two/file")
    pods.end("first")
    pods.start("second")
    assert pods.sh("second", "cat /data/kept/one/file /data/kept/two/file").split() == ["one", "two"]


def test_a_read_only_mount_or_claim_cannot_be_written(pods: Pods) -> None:
    def refused(name: str) -> None:
        assert pods.sh(name, "cat /data/file") == "written"
        with pytest.raises(ClusterError, match="Read-only file system"):
            pods.sh(name, "touch /data/new")

    pods.claim()
    pods.start("writer")
    pods.sh("writer", "echo written > /data/file")
    # Beside a writer, then alone.
    place = {"name": "data", "mountPath": "/data", "readOnly": True}
    pods.start("mount", container={"volumeMounts": [place]})
    refused("mount")
    pods.start("claim", source={"readOnly": True})
    refused("claim")
    pods.sh("writer", "echo again > /data/more")
    for name in ("mount", "writer"):
        pods.cluster.delete([pod(name)], pods.namespace)
    pods.end("claim")
    pods.start("alone", source={"readOnly": True})
    refused("alone")


def test_a_read_only_block_volume_cannot_be_written(pods: Pods) -> None:
    pods.claim(volumeMode="Block")
    pods.start("writer", block=True)
    pods.sh("writer", "echo written | dd of=/dev/data conv=fsync")
    pods.end("writer")
    pods.start("reader", block=True, source={"readOnly": True})
    assert pods.sh("reader", "head -c 7 /dev/data") == "written"
    with pytest.raises(ClusterError, match=r"not permitted|Read-only"):
        pods.sh("reader", "echo again | dd of=/dev/data conv=fsync")


def test_mount_options_of_the_class_are_those_of_the_pod(pods: Pods) -> None:
    options = ["noatime", "nosuid", "nodev", "noexec", "commit=30"]
    with applied(pods.cluster, storage_class("with-options", mountOptions=options)):
        pods.claim(storage_class="with-options")
        pods.start("one")
        (line,) = pods.sh("one", "grep ' /data ' /proc/mounts").splitlines()
        assert set(options) <= set(line.split()[3].split(","))
        pods.sh("one", "cp /bin/busybox /data/true")
        with pytest.raises(ClusterError, match="Permission denied"):
            pods.sh("one", "/data/true")
        pods.end("one")


def test_only_one_pod_gets_a_volume_that_is_for_one_pod(pods: Pods) -> None:
    def waits() -> bool:
        assert any("ReadWriteOncePod" in said for said in pods.cluster.events("Pod", "second", pods.namespace))
        assert pods.get("second")["status"]["phase"] == "Pending"
        return True

    pods.claim(accessModes=["ReadWriteOncePod"])
    pods.start("first")
    pods.cluster.apply([pod("second")], pods.namespace)
    pods.cluster.wait("sentence of the scheduler", waits)
    pods.sh("first", "echo written > /data/file")
    pods.cluster.api.delete("Pod", "first", pods.namespace)
    pods.cluster.pod_running("second", pods.namespace, 120)
    assert pods.sh("second", "cat /data/file") == "written"


@pytest.mark.parametrize(("fs_type", "mib"), [("xfs", 300), ("btrfs", 256)])
def test_other_file_systems_keep_their_data_and_grow(pods: Pods, fs_type: str, mib: int) -> None:
    with applied(pods.cluster, storage_class(fs_type, {"csi.storage.k8s.io/fstype": fs_type})):
        pods.claim(size=f"{mib}Mi", storage_class=fs_type)
        pods.start("first")
        pods.sh("first", "echo kept > /data/file")
        pods.end("first")
        pods.start("second")
        assert pods.sh("second", "grep ' /data ' /proc/mounts").split()[2] == fs_type
        pods.resize(f"{mib + 100}Mi")
        pods.wait_resized(f"{mib + 100}Mi")
        assert pods.room("second") > mib * MIB
        assert pods.sh("second", "cat /data/file") == "kept"
        pods.end("second")


def _metrics(pods: Pods, name: str) -> dict[str, float]:
    """A metric of kubelet for each claim of the test."""
    text = pods.cluster.api.raw("GET", f"/api/v1/nodes/{pods.node.name}/proxy/metrics").decode()
    found = re.findall(
        rf'^{name}{{namespace="{pods.namespace}",persistentvolumeclaim="(.+)"}} (.+)$', text, re.MULTILINE
    )
    return {claim: float(value) for claim, value in found}


def test_kubelet_tells_how_full_a_volume_is(pods: Pods) -> None:
    def counted() -> bool:
        assert _metrics(pods, "kubelet_volume_stats_capacity_bytes") == {"data": room, "disk": 32 * MIB}
        assert 20 * MIB <= _metrics(pods, "kubelet_volume_stats_used_bytes")["data"] < room
        assert _metrics(pods, "kubelet_volume_stats_inodes_free")["data"] > 0
        return True

    pods.claim()
    pods.claim("disk", volumeMode="Block")
    pods.start("one")
    pods.start("two", "disk", block=True)
    room = pods.room("one")
    pods.sh("one", "dd if=/dev/zero of=/data/file bs=1M count=20 conv=fsync")
    pods.cluster.wait("metrics of the volumes", counted, _STATS_SECONDS)
