"""What an attach costs with the backend csi at a real Kubernetes API: requests and seconds of controller and node.

`python -m benchmarks.csi`, as root, needs no device-mapper; $KUBERNETES_BIN has the binaries. What binds claims and
starts holder pods is played, and its time left out: how long that takes the cluster's own driver and kubelet say. The
holder's loop is the program's own, over loop devices.
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final, Self

from benchmarks.measure import seconds
from benchmarks.table import Row, in_ms, table
from csi_driver.backends.csi import CsiBackend
from csi_driver.backends.csiclaims import Claims, name_for
from csi_driver.backends.csidirect import DirectDevices, nobody_calls
from csi_driver.backends.csiheaders import HeaderCopies
from csi_driver.backends.csiholders import HolderPods, volume_of
from csi_driver.backends.csinode import NodeDevices
from csi_driver.backends.csipins import Pins
from csi_driver.backends.csirecords import RecordObjects
from csi_driver.backends.records import RecordCodec
from csi_driver.host.files import Files
from csi_driver.kube.client import Kube
from csi_driver.kube.kinds import CLAIM, NODE, POD, STORAGE_CLASS, Json, name_of, uid_of
from csi_driver.model.errors import Aborted, Unavailable
from csi_driver.model.volume import VolumeParameters, VolumeRecord
from tests.backends.csirig import Holding
from tests.cluster.pki import Authority
from tests.keys.apiserver import api_server
from tests.operator.api import DEPLOY, Api
from tests.operator.test_csi_backend import CLASS, DRIVER, NAMESPACE, bind, kubeconfig

_MIB: Final = 1 << 20
_DEVICE_BYTES: Final = 32 * _MIB
_VOLUMES: Final = 10
_NODE: Final = "one"
_PAUSE: Final = 0.05
_ACCOUNTS: Final = ("luks-csi-controller", "luks-csi-node")
_PARAMETERS: Final = VolumeParameters(encrypted=True, backend="csi", backing_storage_class=CLASS)


class _Cluster:
    """A real API with kinds and roles as users install them; what is played in it is an administrator's."""

    def __init__(self, api: Api, audit: Path, folder: Path) -> None:
        self.kube = Kube.of(api.admin)
        self._audit = audit
        self._folder = folder
        source = DEPLOY / "csi-backend"
        api.kubectl("apply", "-f", source / "crds.yaml")
        api.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd", "--all")
        for file in ("namespace", "rbac"):
            api.kubectl("apply", "-n", NAMESPACE, "-f", source / f"{file}.yaml")
        self.kube.create(NODE, {"metadata": {"name": _NODE}})
        self.kube.create(STORAGE_CLASS, {"metadata": {"name": CLASS}, "provisioner": "below.test"})
        self.pins = Pins(folder / "holders", Files())
        self.pins.prepare()
        controller, node = (kubeconfig(api, name, at) for name, at in zip(_ACCOUNTS, ("", _NODE), strict=True))
        self.controller, self.node = self._backend(controller, is_node=False), self._backend(node, is_node=True)
        self._holding: dict[str, Holding] = {}
        self._ended = threading.Event()
        self._kubelet = threading.Thread(target=self._look)

    def _backend(self, config: Path, *, is_node: bool) -> CsiBackend:
        kube = Kube.of(config)
        records = RecordObjects(kube, NAMESPACE, RecordCodec())
        direct = DirectDevices(nobody_calls, self._folder, DRIVER)
        return CsiBackend(
            records,
            HeaderCopies(kube, NAMESPACE, records, self._folder, Files()),
            Claims(kube, NAMESPACE, DRIVER),
            HolderPods(kube, NAMESPACE, lambda: "image", self._folder / "holders"),
            NodeDevices(kube, records, self.pins, direct, _NODE, ""),
            is_node=is_node,
            node_topology=f"topology.{DRIVER}/node",
        )

    def __enter__(self) -> Self:
        self._kubelet.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Holders that a failure has left let go of their loop devices."""
        self._ended.set()
        self._kubelet.join()
        for pin in self.pins.all():
            self.pins.remove(pin.volume_id)
        for holding in self._holding.values():
            holding.end()

    def bind(self, volume_id: str) -> None:
        """The provisioner below has made it."""
        bind(self.kube, volume_id)

    def _look(self) -> None:
        """What kubelet does: start pods, and end those that are to go."""
        while not self._ended.wait(_PAUSE):
            for pod in self.kube.list(POD, NAMESPACE, {"app.kubernetes.io/component": "holder"})[0]:
                name, volume_id = name_of(pod), volume_of(pod)
                if pod["metadata"].get("deletionTimestamp"):
                    if (holding := self._holding.get(name)) is not None:
                        holding.end()
                        del self._holding[name]
                    self.kube.delete(POD, name, NAMESPACE, grace_seconds=0)
                elif name not in self._holding:
                    self._start(pod, volume_id)

    def _start(self, pod: Json, volume_id: str) -> None:
        file = self._folder / volume_id
        with file.open("wb") as content:
            content.truncate(_DEVICE_BYTES)
        self._holding[name_of(pod)] = Holding(volume_id, uid_of(pod), file, self.pins)
        state = {"name": "holder", "ready": True, "started": True, "restartCount": 0, "image": "image", "imageID": ""}
        self.kube.patch(POD, name_of(pod), {"status": {"containerStatuses": [state]}}, NAMESPACE, status=True)

    def release_claim(self, volume_id: str) -> None:
        """No pod uses the claim any more, and Kubernetes takes its own finalizer off."""
        self.kube.patch(CLAIM, name_for(volume_id), {"metadata": {"finalizers": None}}, NAMESPACE)

    def requests(self) -> int:
        """Those of controller and node so far."""
        accounts = {f"system:serviceaccount:{NAMESPACE}:{name}" for name in _ACCOUNTS}
        with self._audit.open() as lines:
            return sum(json.loads(line)["user"]["username"] in accounts for line in lines if line.endswith("\n"))


class _Told:
    """Seconds and requests of one kind of call, each time that it was made."""

    def __init__(self, cluster: _Cluster, what: str) -> None:
        self._cluster = cluster
        self._what = what
        self._times: list[float] = []
        self._requests: list[int] = []

    def call(self, call: Callable[[], object]) -> None:
        """Make the call."""
        before = self._cluster.requests()
        self._times.append(seconds(call))
        self._requests.append(self._cluster.requests() - before)

    def row(self) -> Row:
        """The median of the seconds, and the most requests."""
        most = max(self._requests)
        return Row(f"csi: {self._what}", in_ms(self._times), "", most, None, "{:.0f} requests".format)


def _rows(cluster: _Cluster) -> Iterator[Row]:
    """Each step of a volume's way to a node and back."""
    attached = _Told(cluster, "ControllerPublish, with a kubelet that starts the holder within 0.1 s")
    opened = _Told(cluster, "NodeStage: the record, the device and that it is attached")
    closed = _Told(cluster, "NodeUnstage: that it is attached no more")
    detached = _Told(cluster, "ControllerUnpublish, with one that ends it as soon")
    for number in range(_VOLUMES):
        volume_id = f"pvc-{number}"
        _make(cluster, volume_id)
        attached.call(partial(_publish, cluster, volume_id))
        opened.call(partial(_attach, cluster, volume_id))
        closed.call(partial(cluster.node.detach, volume_id))
        detached.call(partial(_until_done, cluster.controller.unpublish, volume_id, _NODE))
        _once(cluster.controller.delete, volume_id)
        cluster.release_claim(volume_id)
        _until_done(cluster.controller.delete, volume_id)
    for each in (attached, opened, closed, detached):
        yield each.row()


def _make(cluster: _Cluster, volume_id: str) -> None:
    record = VolumeRecord(id=volume_id, name=volume_id, capacity_bytes=16 * _MIB, parameters=_PARAMETERS, created="now")
    _once(cluster.controller.create, record, _DEVICE_BYTES)
    cluster.bind(volume_id)
    cluster.controller.create(record, _DEVICE_BYTES)


def _once(call: Callable[..., object], *words: object) -> None:
    """A call that is to be repeated."""
    try:
        call(*words)
    except Aborted:
        return
    raise RuntimeError(f"{call} came to its end at once")


def _until_done(call: Callable[..., object], *words: object) -> None:
    """As a sidecar asks, which waits longer."""
    while True:
        try:
            call(*words)
            return
        except (Aborted, Unavailable):
            time.sleep(_PAUSE)


def _publish(cluster: _Cluster, volume_id: str) -> None:
    cluster.controller.get(volume_id)
    _until_done(partial(cluster.controller.publish, many_nodes=False), volume_id, _NODE)


def _attach(cluster: _Cluster, volume_id: str) -> None:
    cluster.node.get(volume_id)
    cluster.node.attach(volume_id, lasting=True).close()


def main() -> int:
    """Measure; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="bench-csi-") as name:
        folder = Path(name)
        policy, audit = folder / "audit-policy.json", folder / "audit.log"
        rule = {"level": "Metadata", "omitStages": ["ResponseStarted", "ResponseComplete"]}
        policy.write_text(json.dumps({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [rule]}))
        options = (f"--audit-policy-file={policy}", f"--audit-log-path={audit}")
        authority = Authority(folder / "pki")
        with (
            api_server(folder, authority, *options) as server,
            _Cluster(Api(server, authority), audit, folder) as cluster,
        ):
            rows = list(_rows(cluster))
    for line in table(rows):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
