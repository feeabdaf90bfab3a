"""Logical volumes in the cluster: a volume group on each node, the driver for it, and what there is of a volume."""

import contextlib
from collections.abc import Iterator

from tests.cluster.cluster import Cluster
from tests.cluster.documents import applied
from tests.cluster.driver import DEPLOY, storage_class
from tests.cluster.leftovers import left_on
from tests.cluster.node import Node

NAMESPACE = "luks-csi-lvm"
NAME = "lvm.luks.csi.internal"
FOLDER = DEPLOY / "lvm"
STATE = "/var/lib/luks-csi-lvm"
GROUP, POOL = "data", "pool"
POOL_MIB = 400
KINDS = ("thick", "thin")
MIB = 1 << 20

_DISKS = "/var/lib/kubelet"  # outlives a boot
_DISK_MIB = 2048
_MEMORY = f"/var/lib/kubelet/plugins/{NAME}"
# As an administrator's, on a system without udev and with a read-only /etc.
_CONFIG = (
    "activation{udev_sync=0 udev_rules=0 monitoring=0 verify_udev_operations=0} backup{backup=0 archive=0} "
    'devices{use_devicesfile=0 obtain_device_list_from_udev=0 external_device_info_source="none"}'
)
_LVM = f"""set -e
lvm() {{ command=$1; shift; command lvm $command -qq -y --config '{_CONFIG}' "$@"; }}
group={GROUP} pool={POOL}
"""


def lvm(node: Node, script: str, timeout: float = 60) -> str:
    """What a script says in which `lvm COMMAND` is LVM's own, as an administrator runs it on the node."""
    return node.run(f"{_LVM}{script}", timeout).text.strip()


def attach_disk(node: Node, name: str = "first") -> str:
    """Have a disk on the node, until its power goes: a loop device over a file that stays; its path."""
    file = f"{_DISKS}/{name}.lvm-disk"
    return node.run(
        f"[ -e {file} ] || truncate --size={_DISK_MIB}M {file}; losetup --find --show {file}", 30
    ).text.strip()


@contextlib.contextmanager
def volume_groups(*nodes: Node) -> Iterator[None]:
    """A volume group with a thin pool on each node, as docs/kubernetes.md says; at the end nothing of it is there."""
    try:
        for node in nodes:
            disk = attach_disk(node)
            lvm(
                node,
                f"modprobe dm_thin_pool; lvm vgcreate $group {disk}\n"
                f"lvm lvcreate --type thin-pool --size {POOL_MIB}M --zero y --name $pool $group\n"
                f"lvm lvchange --errorwhenfull y $group/$pool",
            )
        yield
    finally:
        for node in nodes:
            script = (
                f"lvm vgremove -f $group || true\nlosetup --noheadings --output NAME,BACK-FILE | grep lvm-disk | "
                f"while read -r loop file; do losetup --detach $loop; done\n"
                f"rm -rf {_DISKS}/*.lvm-disk {STATE}/* {_MEMORY}; rmdir /dev/$group 2>/dev/null || true"
            )
            lvm(node, script)


@contextlib.contextmanager
def lvm_installed(cluster: Cluster) -> Iterator[None]:
    """The driver as users install it, its example classes, and a cheap one of each kind: `lvm-thick`, `lvm-thin`."""
    cluster.install(FOLDER)
    try:
        with applied(cluster, FOLDER / "storageclasses.yaml", *(lvm_class(kind) for kind in KINDS)):
            yield
    finally:
        cluster.uninstall(FOLDER)


def lvm_class(kind: str, name: str = "", pool: str = POOL, **fields: object) -> dict[str, object]:
    """A class with a key derivation that costs nothing."""
    more = {"thinPool": pool, "discard": "true"} if kind == "thin" else {}
    return storage_class(name or f"lvm-{kind}", {"backend": "lvm", **more}, provisioner=NAME, **fields)


def logical_volume(node: Node, volume_id: str) -> str:
    """The device of a volume's active logical volume; of the kernel, as no udev makes names."""
    name = f"{GROUP}-luks--{volume_id.replace('-', '--')}"
    return f"/dev/{node.run(f'dmsetup info -c --noheadings -o blkdevname {name}').text.strip()}"


def pool_mib(node: Node) -> float:
    """The size of a node's thin pool."""
    return float(lvm(node, "lvm lvs --noheadings --nosuffix --units m -o lv_size $group/$pool"))


def volumes_on(node: Node) -> list[str]:
    """The logical volumes of volumes on a node, with their pools."""
    found = lvm(node, "lvm lvs --noheadings --separator : -o lv_name,pool_lv -S lv_name=~^luks- $group")
    return sorted(line.strip() for line in found.splitlines())


def nothing_left(cluster: Cluster) -> bool:
    """Raises AssertionError naming what is left of volumes on any node."""
    for node in cluster.nodes:
        assert not volumes_on(node)
        # The records and the pool stay, on their disk.
        own = (f"mapping {GROUP}-luks_csi_records", f"mapping {GROUP}-{POOL}", "lvm-disk", f" at {STATE}/lvm")
        left = [line for line in left_on(node) if not any(word in line for word in own)]
        assert not left, left
        told = node.run(f"ls {STATE}/stages").text.split()
        assert not told, told
    return True
