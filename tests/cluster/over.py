"""Encryption in front of another CSI driver, in the cluster: the drivers below, ours over them, a volume of ours."""

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.api import Json
from tests.cluster.below import KINDS
from tests.cluster.cluster import Cluster
from tests.cluster.commands import ClusterError
from tests.cluster.control_plane import Daemon
from tests.cluster.documents import applied
from tests.cluster.driver import BUSYBOX, DEPLOY, claim, secret, storage_class, volume_id, volume_of
from tests.cluster.node import Node
from tests.cluster.settings import CSI_ADDONS_BIN, ROOT, SCRATCH, binaries

NAMESPACE = "luks-csi-over"
NAME = "over.luks.csi.internal"
FOLDER = DEPLOY / "csi-backend"
_HOLDERS = f"/var/lib/kubelet/plugins/{NAME}/holders"
BELOW = SCRATCH / "below"
"""The storage below, on the host; a node sees it at the same place."""
_SECONDS = 300
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

    cluster.wait(f"drivers {names} on {node.name}", told, _SECONDS)


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


class Over:
    """A claim of ours and a Deployment of one pod that uses it, in a namespace of its own."""

    def __init__(self, cluster: Cluster, namespace: str, storage_class: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self._class = storage_class
        cluster.apply([secret()], namespace)

    def create(self, *claims: str, node: str = "", size: str = "32Mi") -> None:
        """Claims and a Deployment whose pod has each of them at /CLAIM; without waiting."""
        names = claims or ("data",)
        template: Json = {
            "terminationGracePeriodSeconds": 0,
            "nodeSelector": {"kubernetes.io/hostname": node} if node else {},
            "containers": [
                {
                    "name": "main",
                    "image": BUSYBOX,
                    "command": ["sleep", "infinity"],
                    "volumeMounts": [{"name": name, "mountPath": f"/{name}"} for name in names],
                }
            ],
            "volumes": [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in names],
        }
        labels = {"app": "data"}
        deployment = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "data"},
            "spec": {
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": template},
            },
        }
        self.cluster.apply([*(claim(name, size, self._class) for name in names), deployment], self.namespace)

    def pod(self, timeout: float = _SECONDS) -> Json:
        """The one pod that is not going, up."""

        def there() -> Json:
            pods = self.cluster.items("Pod", self.namespace)
            found = [one for one in pods if "deletionTimestamp" not in one["metadata"]]
            assert len(found) == 1, [one["metadata"]["name"] for one in found]
            return self.cluster.check_running(found[0])

        return self.cluster.wait("running pod of the Deployment", there, timeout)

    def sh(self, script: str) -> str:
        """What a script says in the pod."""
        name = self.pod()["metadata"]["name"]
        return self.cluster.pod_exec(name, ["sh", "-ec", script], self.namespace).decode().strip()

    def write(self, claim: str = "data") -> str:
        """Have the pod write something that nobody knows, fsynced; that text."""
        text = secrets.token_hex(32)
        self.sh(f"echo {text} | dd of=/{claim}/text conv=fsync 2>/dev/null")
        return text

    def reads(self, claim: str = "data") -> str:
        """What the pod reads of it."""
        return self.sh(f"cat /{claim}/text")

    def scale(self, replicas: int) -> None:
        """To 0: until pod and holder are gone."""
        self.cluster.api.patch("Deployment", "data", self.namespace, {"spec": {"replicas": replicas}})
        if not replicas:
            self.cluster.wait("end of the pod", lambda: not self.cluster.items("Pod", self.namespace), _SECONDS)
            self.wait_no_holder()

    def id(self, claim: str = "data") -> str:
        """The id of its volume."""
        return volume_id(volume_of(self.cluster, claim, self.namespace, _SECONDS))

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

    def volumes(self) -> list[Json]:
        """The PersistentVolumes of its claims."""
        found = self.cluster.items("PersistentVolume")
        return [each for each in found if each["spec"].get("claimRef", {}).get("namespace") == self.namespace]

    def wait_no_holder(self) -> None:
        """Until no node has any of them."""
        self.cluster.wait("end of the holders", lambda: not self.holders(), _SECONDS)


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
            cluster.wait("end of its volumes", lambda: not made.volumes(), _SECONDS)
    cluster.wait("end of all that was below", lambda: nothing_left(cluster), _SECONDS)


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
