"""Encryption in front of another CSI driver, in the cluster: the drivers below, ours over them, a volume of ours."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.api import Json
from tests.cluster.below import KINDS
from tests.cluster.cluster import Cluster
from tests.cluster.commands import ClusterError
from tests.cluster.control_plane import Daemon
from tests.cluster.deployed import SECONDS, Deployed
from tests.cluster.documents import applied
from tests.cluster.driver import DEPLOY, storage_class, volume_id
from tests.cluster.node import Node
from tests.cluster.settings import CSI_ADDONS_BIN, ROOT, SCRATCH, binaries

NAMESPACE = "luks-csi-over"
NAME = "over.luks.csi.internal"
FOLDER = DEPLOY / "csi-backend"
_HOLDERS = f"/var/lib/kubelet/plugins/{NAME}/holders"
BELOW = SCRATCH / "below"
"""The storage below, on the host; a node sees it at the same place."""
_SIDECARS = {"csi-provisioner": (), "csi-resizer": ("--handle-volume-inuse-error=false",), "csi-attacher": ()}
_USELESS = {"files": "below-files", "itself": "over-plain", "nix": "nix"}
_DIRECT = {"direct": "below-plain", "direct-attached": "below-attached"}
"""Classes of volumes without a holder; the driver below of the second wants its volumes attached."""
_KUBELET = "/var/lib/kubelet"
_PLACES = f"{_KUBELET}/plugins/kubernetes.io/csi/volumeDevices/*/{NAME}_*"


def _python(*words: str) -> list[str]:
    return [sys.executable, "-m", "tests.cluster.below", *words]


def start_below(node: Node, *kinds: str) -> None:
    """Have the drivers below on a node, or those of some kinds, from its boot on."""
    lines = [f"mkdir -p {BELOW}", f"mountpoint -q {BELOW} || mount -t hostfs none {BELOW} -o {BELOW}", f"cd {ROOT}"]
    for kind in kinds or KINDS:
        folder = f"{_KUBELET}/plugins/{KINDS[kind]}"
        serve = " ".join(_python("node", f"{folder}/csi.sock", str(BELOW), kind, node.name))
        register = f"{Path(sys.executable).with_name('luks-csi')} register --endpoint {folder}/csi.sock"
        lines += [f"mkdir -p {folder}", f"setsid {serve} >>/var/log/below-{kind}.log 2>&1 </dev/null &"]
        lines += [f"setsid {register} >>/var/log/below-{kind}.register.log 2>&1 </dev/null &"]
    node.run("\n".join(lines))


@contextlib.contextmanager
def drivers_below(cluster: Cluster) -> Iterator[None]:
    """Both drivers below on every node that there is, with their controllers on the host, and a class of each."""
    BELOW.mkdir(exist_ok=True)
    kubeconfig = cluster.control_plane.kubeconfig
    objects, daemons = [], []
    for kind, name in KINDS.items():
        objects.append(
            {
                "apiVersion": "storage.k8s.io/v1",
                "kind": "CSIDriver",
                "metadata": {"name": name},
                "spec": {"attachRequired": kind == "attached", "podInfoOnMount": False},
            }
        )
        objects += [
            below_class(f"below-{kind}", name),
            below_class(f"below-{kind}-at-once", name, volumeBindingMode="Immediate"),
        ]
        socket = SCRATCH / f"below-{kind}.sock"
        daemons.append(Daemon(f"below-{kind}", _python("controller", str(socket), str(BELOW), kind), socket.exists))
        for program, more in _SIDECARS.items():
            if program == "csi-attacher" and kind == "plain":
                continue
            folder = Path(os.environ[CSI_ADDONS_BIN]) if program == "csi-attacher" else binaries()
            words = [str(folder / program), f"--csi-address={socket}", f"--kubeconfig={kubeconfig}", *more]
            daemons.append(Daemon(f"below-{kind}-{program}", words, lambda: True))
    objects.append(below_class("below-files", KINDS["plain"], parameters={"only": "files"}))
    try:
        for daemon in daemons:
            daemon.start()
            daemon.wait()
        for node in cluster.nodes:
            start_below(node)
        with applied(cluster, *objects):
            for node in cluster.nodes:
                wait_drivers(cluster, node, set(KINDS.values()))
            yield
    finally:
        for daemon in daemons:
            daemon.kill()


def below_class(name: str, driver: str, **fields: object) -> Json:
    """A class of a driver below."""
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name},
        "provisioner": driver,
        "allowVolumeExpansion": True,
        "volumeBindingMode": "WaitForFirstConsumer",
        **fields,
    }


def wait_drivers(cluster: Cluster, node: Node, names: set[str]) -> None:
    """Until kubelet of that node has told of these drivers."""

    def told() -> bool:
        drivers = cluster.api.get("CSINode", node.name)["spec"].get("drivers") or []
        assert {each["name"] for each in drivers} >= names, drivers
        return True

    cluster.wait(f"drivers {names} on {node.name}", told, SECONDS)


def over_class(name: str, below: str, **more: str) -> Json:
    """A class of ours over a class below."""
    more |= {"backend": "csi", "backingStorageClass": below}
    return storage_class(name, more, provisioner=NAME)


@contextlib.contextmanager
def over_installed(cluster: Cluster) -> Iterator[None]:
    """Our driver over those, as users install it: kinds first; and a class over each class below."""
    names = [f"{kind}{mode}" for kind in KINDS for mode in ("", "-at-once")]
    classes = [over_class(f"over-{name}", f"below-{name}") for name in names]
    classes += [over_class(f"over-{name}", below, backingAttach="direct") for name, below in _DIRECT.items()]
    useless = [over_class(f"over-{name}", below) for name, below in _USELESS.items()]
    with applied(cluster, FOLDER / "crds.yaml"):
        cluster.install(FOLDER, 300)
        try:
            with applied(cluster, *classes, *useless):
                yield
        finally:
            cluster.uninstall(FOLDER)


class Over(Deployed):
    """One over another driver."""

    def scale(self, replicas: int) -> None:
        """To 0: until pod and holder are gone."""
        super().scale(replicas)
        if not replicas:
            self.wait_no_holder()

    def record(self, claim: str = "data") -> Json:
        """The spec of its VolumeRecord."""
        words = ("get", "volumerecord", self.id(claim), "-n", NAMESPACE, "-o", "json")
        found: Json = json.loads(self.cluster.kubectl(*words).stdout)["spec"]
        return found

    def file(self, claim: str = "data") -> Path:
        """The ciphertext, in the storage below."""
        below = self.cluster.api.get("PersistentVolume", self.record(claim)["volumeName"])
        return BELOW / str(below["spec"]["csi"]["volumeHandle"])

    def holders(self) -> list[Json]:
        """The holder pods of its volumes."""
        ids = {volume_id(each) for each in self.volumes()}
        key = "volumes.luks.csi.internal/volume-id"
        return [each for each in holders(self.cluster) if each["metadata"]["annotations"][key] in ids]

    def wait_no_holder(self) -> None:
        """Until no node has any of them."""
        self.cluster.wait("end of the holders", lambda: not self.holders(), SECONDS)


def holders(cluster: Cluster) -> list[Json]:
    """Every holder pod."""
    return cluster.items("Pod", NAMESPACE, labels="app.kubernetes.io/component=holder")


@contextlib.contextmanager
def over(cluster: Cluster, storage_class: str) -> Iterator[Over]:
    """One in a namespace of its own; at the end nothing of it is left, on any node or in the storage below."""
    with cluster.namespace() as namespace:
        made = Over(cluster, namespace, storage_class)
        try:
            yield made
        finally:
            for kind in ("Deployment", "PersistentVolumeClaim"):
                cluster.api.raw("DELETE", cluster.api.path(kind, namespace=namespace))
            cluster.wait("end of its volumes", lambda: not made.volumes(), SECONDS)
    cluster.wait("end of all that was below", lambda: nothing_left(cluster), SECONDS)


def nothing_left(cluster: Cluster) -> bool:
    """Raises AssertionError naming what is left of volumes, anywhere."""
    assert not holders(cluster)
    for kind in ("volumerecords", "headerpieces", "persistentvolumeclaims"):
        found = cluster.kubectl("get", kind, "-n", NAMESPACE, "-o", "name").text
        assert not found.strip(), found
    left = [path.name for path in BELOW.iterdir() if path.name != "told"]
    assert not left, left
    for node in cluster.nodes:
        with contextlib.suppress(ClusterError):
            looks = ["dmsetup ls | grep luks-", f"losetup -n -O BACK-FILE | grep {BELOW}"]
            looks += [f"ls {_HOLDERS}", f"ls -d {_PLACES} 2>/dev/null", "true"]
            found = node.run("; ".join(looks)).text.strip()
            assert not found, found
    return True


def check_untold() -> None:
    """No driver below had to take a device away while a mapping was on it."""
    told = BELOW / "told"
    assert not told.exists(), told.read_text()


def end_below(node: Node, kind: str) -> None:
    """Kill the driver below on a node, and what registers it."""
    for word in ("[t]ests.cluster.below node", "[l]uks-csi register --endpoint"):  # not the script itself
        node.run(f"pkill -9 -f '{word} {_KUBELET}/plugins/{KINDS[kind]}/' || true")


def holder_process(node: Node) -> str:
    """The process of the one holder on a node."""
    return node.run("pgrep -f 'luks-csi holder --device'").text.split()[0]
