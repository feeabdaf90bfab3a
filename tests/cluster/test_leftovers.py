"""That the look for leftovers finds each kind on a node, where it must find nothing before and after."""

import hashlib
import shlex
import sys

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.driver import STATE
from tests.cluster.leftovers import assert_clean, left_on

_ID = "pvc-planted"
_UUID = "01234567-89ab-cdef-0123-456789abcdef"
_DM_UUID = f"CRYPT-LUKS2-{_UUID.replace('-', '')}-luks-{_ID}"
_KEY = f"cryptsetup:{_UUID}-d0"
_KUBELET = "/var/lib/kubelet"
_STAGED = f"{_KUBELET}/plugins/kubernetes.io/csi/planted/staged/globalmount"
_PODS = f"{_KUBELET}/pods/planted/volumes/kubernetes.io~csi/{_ID}"


def _python(code: str, *arguments: str) -> str:
    return shlex.join([sys.executable, "-c", code, *arguments])


def _in_background(command: str) -> str:
    return f"setsid {command} </dev/null >/dev/null 2>&1 & echo $! > /run/planted; sleep 1"


_END = "kill $(cat /run/planted) && rm /run/planted"
_ADD_KEY = "import csi_driver.host.syscalls as s; s.syscall('add_key', b'{}', {!r}, {}, {}, -4)"
_FIND_KEY = (
    "import csi_driver.host.syscalls as s; s.syscall('keyctl', 9, s.syscall('keyctl', 10, -4, b'{}', {!r}, 0), -4)"
)

# What is found, what plants it, what takes it away.
_PLANTS = {
    f"mapping luks-{_ID} with UUID {_DM_UUID}": (
        f"dmsetup create luks-{_ID} --uuid {_DM_UUID} --table '0 8 error'",
        f"dmsetup remove luks-{_ID}",
    ),
    f"node /dev/mapper/luks-{_ID} without its mapping": (
        f"mknod /dev/mapper/luks-{_ID} b 252 99",
        f"rm /dev/mapper/luks-{_ID}",
    ),
    f"on {STATE}/planted": (
        f"truncate --size=1M {STATE}/planted && losetup --find {STATE}/planted",
        f"losetup --detach $(losetup --noheadings --output NAME --associated {STATE}/planted) && rm {STATE}/planted",
    ),
    f"mount of tmpfs at {_STAGED}": (
        f"mkdir -p {_STAGED} && mount -t tmpfs tmpfs {_STAGED}",
        f"umount {_STAGED} && rm -r {_KUBELET}/plugins/kubernetes.io/csi/planted",
    ),
    f"file {_PODS}": (
        # Kubelet takes it away as often as it sees it.
        _in_background(f"sh -c 'while mkdir -p {_PODS}; do sleep 0.01; done'"),
        f"{_END}; rm -rf {_KUBELET}/pods/planted",
    ),
    f"key {_KEY}": (
        _python(_ADD_KEY.format("logon", _KEY.encode(), "b'x'", 1)),
        _python(_FIND_KEY.format("logon", _KEY.encode())),
    ),
    f"key luks-csi:{_KEY}": (
        _python(_ADD_KEY.format("keyring", f"luks-csi:{_KEY}".encode(), None, 0)),
        _python(_FIND_KEY.format("keyring", f"luks-csi:{_KEY}".encode())),
    ),
    f"file {STATE}/stages/{_ID}": (
        f"mkdir -p {STATE}/stages && touch {STATE}/stages/{_ID}",
        f"rm {STATE}/stages/{_ID}",
    ),
    f"file {STATE}/loopfile/trash/{_ID}": (
        f"mkdir -p {STATE}/loopfile/trash/{_ID}",
        f"rmdir {STATE}/loopfile/trash/{_ID}",
    ),
    f"held lock {_ID} of process": (
        f"mkdir -p {STATE}/locks && " + _in_background(f"flock {STATE}/locks/{_ID} sleep 1000"),
        f"pkill -P $(cat /run/planted); rm /run/planted {STATE}/locks/{_ID}",
    ),
    "(mkfs.planted, state S": (
        "cp $(command -v sleep) /run/mkfs.planted && " + _in_background("/run/mkfs.planted 1000"),
        f"{_END} /run/mkfs.planted",
    ),
    "csi_driver.host.launcher": (
        _in_background(_python("import time; time.sleep(1000)", "csi_driver.host.launcher")),
        _END,
    ),
}


@pytest.mark.parametrize("found", _PLANTS)
def test_each_kind_of_leftover_is_found(cluster: Cluster, found: str) -> None:
    node = cluster.node(1)
    plant, uproot = _PLANTS[found]
    assert_clean(node)
    node.run(plant)
    try:
        left = left_on(node)
        assert any(found in line for line in left), left
        with pytest.raises(AssertionError, match=r"node-1 has, after 0 s:"):
            assert_clean(node, timeout=0)
    finally:
        node.run(uproot)
    assert_clean(node)


def test_a_volume_that_is_still_there_is_no_leftover(cluster: Cluster) -> None:
    node = cluster.node(1)
    staged = f"{_KUBELET}/plugins/kubernetes.io/csi/planted"
    places = [f"{STATE}/loopfile/volumes/{_ID}", f"{staged}/{hashlib.sha256(_ID.encode()).hexdigest()}"]
    planted = (f"mapping luks-{_ID} with UUID {_DM_UUID}", f"key {_KEY}")
    node.run(f"mkdir -p {' '.join(places)}; {'; '.join(_PLANTS[one][0] for one in planted)}")
    try:
        assert len(left_on(node)) == 4
        assert left_on(node, {_ID}) == []
        assert len(left_on(node, {"pvc-another"})) == 4
    finally:
        node.run(f"rm -r {places[0]} {staged}; {'; '.join(_PLANTS[one][1] for one in planted)}")
    assert_clean(node)
