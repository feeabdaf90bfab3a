"""Records and claims of the backend csi at a real API: kinds, roles, policies; and a controller that is a process."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from csi_driver.backends.csiclaims import name_for
from csi_driver.backends.csiheaders import HeaderCopies
from csi_driver.backends.csipins import Direct
from csi_driver.backends.csirecords import RecordObjects, Spec, Staged
from csi_driver.backends.records import RecordCodec
from csi_driver.host.files import Files
from csi_driver.kube.client import Kube
from csi_driver.kube.kinds import (
    CLAIM,
    CSI_DRIVER,
    HEADER_PIECE,
    NODE,
    POD,
    STORAGE_CLASS,
    VOLUME,
    VOLUME_RECORD,
    Json,
    name_of,
    uid_of,
)
from csi_driver.model.errors import DriverError, InvalidArgument, PermissionDenied
from csi_driver.rpc.client import CsiClient, RemoteError, RemoteVolume
from csi_driver.volumes.capability import AccessMode, Capability
from tests.operator.api import DEPLOY, Api

NAMESPACE, DRIVER, CLASS = "luks-csi-over", "over.luks.csi.internal", "below"
MOUNT = Capability(AccessMode.SINGLE_NODE_WRITER, block=False, fs_type="ext4")
MIB = 1 << 20
SECRET = {"CRYPTO_KEY_VALUE": "plain oak table, seven chairs"}
PARAMETERS = {"encrypted": "true", "backend": "csi", "backingStorageClass": CLASS, "pbkdf": "pbkdf2"}
_PATIENCE = 120.0
_LUKS_CSI = str(Path(sys.executable).with_name("luks-csi"))
Found = TypeVar("Found")


def wait(what: str, look: Callable[[], Found | None]) -> Found:
    deadline, said = time.monotonic() + _PATIENCE, ""
    while time.monotonic() < deadline:
        try:
            if found := look():
                return found
        except (AssertionError, DriverError) as error:
            said = str(error)
        time.sleep(0.1)
    raise AssertionError(f"no {what}: {said}")


@pytest.fixture(scope="module")
def cluster(api: Api) -> Iterator[Kube]:
    """Kinds, roles and policies as users install them, two nodes, a class below; an administrator's client."""
    folder = DEPLOY / "csi-backend"
    api.kubectl("apply", "-f", folder / "crds.yaml")
    api.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd", "--all")
    for file in ("namespace", "rbac", "policies"):  # not what runs: privileged pods are not allowed here
        api.kubectl("apply", "-n", NAMESPACE, "-f", folder / f"{file}.yaml")
    kube = Kube.of(api.admin)
    for name in ("one", "two"):
        kube.create(NODE, {"metadata": {"name": name}})
    kube.create(
        STORAGE_CLASS,
        {"metadata": {"name": CLASS}, "provisioner": "below.test", "allowVolumeExpansion": True},
    )
    holder: Json = {"metadata": {"name": "early", "labels": {"app.kubernetes.io/component": "holder"}},
                    "spec": {"containers": [{"name": "holder", "image": "none"}]}}  # fmt: skip

    def policies_are_at_work() -> bool:
        """The API takes a moment to know of one."""
        kube.get(POD, "early", NAMESPACE) or kube.create(POD, holder, NAMESPACE)
        try:
            kube.delete(POD, "early", NAMESPACE, grace_seconds=0)
        except InvalidArgument:
            return True
        return False

    wait("policy", policies_are_at_work)
    with contextlib.closing(Kube.of(kubeconfig(api, "luks-csi-controller"))) as controller:
        controller.delete(POD, "early", NAMESPACE, grace_seconds=0)
    yield kube
    kube.close()


Accounts = Callable[..., Kube]
"""A client as a service account of the driver; with the name of a node, as in its pod there."""


@pytest.fixture
def account(api: Api) -> Iterator[Accounts]:
    with contextlib.ExitStack() as stack:
        yield lambda name, node="": stack.enter_context(contextlib.closing(Kube.of(kubeconfig(api, name, node))))


def kubeconfig(api: Api, name: str, node: str = "") -> Path:
    """Its way to the API."""
    if not node:
        return api.account_kubeconfig(name, namespace=NAMESPACE)
    spec = {"nodeName": node, "serviceAccountName": name, "containers": [{"name": "driver", "image": "none"}]}
    with contextlib.closing(Kube.of(api.admin)) as admin:
        found = admin.get(POD, f"node-{node}", NAMESPACE)
        pod = found or admin.create(POD, {"metadata": {"name": f"node-{node}"}, "spec": spec}, NAMESPACE)
    return api.account_kubeconfig(name, pod, NAMESPACE)


def a_record(kube: Kube, name: str, node: str = "") -> RecordObjects:
    """A record that the controller has made, of a volume that is given to that node."""
    records = RecordObjects(kube, NAMESPACE, RecordCodec())
    known = records.make(name, Spec(state="Making", backing_storage_class=CLASS, size=MIB))
    records.write(known, state="Ready", record="{}", node=node, claim_uid="uid", volume_name="pv")
    return records


def test_a_node_writes_the_records_of_its_volumes_and_of_them_what_is_its_own(account: Accounts, cluster: Kube) -> None:
    made = a_record(cluster, "policy-1", "one")
    one = RecordObjects(account("luks-csi-node", "one"), NAMESPACE, RecordCodec())
    two = RecordObjects(account("luks-csi-node", "two"), NAMESPACE, RecordCodec())
    bare = RecordObjects(account("luks-csi-node"), NAMESPACE, RecordCodec())
    staged = Staged(node="one", boot_id="boot", ticket="t", device="/dev/loop0")
    one.change("policy-1", staged=staged, record='{"version": 1}')
    one.change("policy-1", staged=None)
    assert two.ready("policy-1").spec.record == '{"version": 1}'
    for records, sentence in (
        (two, "the driver of node two must leave alone the record of a volume that is not attached there"),
        (bare, r"the driver of no node \(its token names none\) must leave alone"),
    ):
        with pytest.raises(InvalidArgument, match=sentence):
            records.change("policy-1", record="stolen")
    for changes in (
        {"node": "two"}, {"node": ""}, {"state": "Deleting"}, {"claim_uid": "another"}, {"volume_name": "x"},
        {"size": 5}, {"places": ({"a": "b"},)}, {"backing_storage_class": "x"},
        {"direct": Direct(driver="other.test", handle="x")},
        {"staged": msgspec.structs.replace(staged, node="two")},
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=r"a node changes record, header and staged of a volume"):
            one.change("policy-1", **changes)
    made.change("policy-1", node="")
    with pytest.raises(InvalidArgument, match=r"must leave alone the record"):
        one.change("policy-1", record="late")
    made.remove(made.ready("policy-1"))


def test_a_node_may_do_nothing_else(account: Accounts, cluster: Kube) -> None:
    kube = account("luks-csi-node", "one")
    records = a_record(cluster, "policy-2", "one")
    with pytest.raises(PermissionDenied):
        kube.delete(VOLUME_RECORD, "policy-2", NAMESPACE)
    with pytest.raises(PermissionDenied):
        kube.list(VOLUME_RECORD, NAMESPACE)
    for kind in (POD, CLAIM, HEADER_PIECE):
        with pytest.raises(PermissionDenied):
            kube.list(kind, NAMESPACE)
    with pytest.raises(PermissionDenied):
        kube.get(POD, "x", NAMESPACE)
    with pytest.raises(InvalidArgument, match=r"finalizers|record, header and staged"):
        kube.patch(VOLUME_RECORD, "policy-2", {"metadata": {"finalizers": None}}, NAMESPACE)
    records.remove(records.ready("policy-2"))
    assert records.find("policy-2") is None


def test_a_header_copy_of_eight_slots_fits_and_a_piece_never_changes(
    account: Accounts, cluster: Kube, tmp_path: Path
) -> None:
    records = a_record(cluster, "header-1", "one")
    kube = account("luks-csi-node", "one")
    node = HeaderCopies(kube, NAMESPACE, RecordObjects(kube, NAMESPACE, RecordCodec()), tmp_path / "node", Files())
    content = os.urandom(8 * 258_048)

    def put(path: str) -> None:
        with open(path, "wb") as file:
            file.write(content)
            file.truncate(16 * MIB)

    node.keep("header-1", put)
    elsewhere = HeaderCopies(cluster, NAMESPACE, records, tmp_path / "other", Files())
    assert elsewhere.path("header-1").read_bytes() == content + bytes(16 * MIB - len(content))
    pieces, _ = cluster.list(HEADER_PIECE, NAMESPACE)
    assert len(pieces) > 3
    with pytest.raises(InvalidArgument, match=r"a piece of a header's copy never changes"):
        cluster.patch(HEADER_PIECE, name_of(pieces[0]), {"spec": {"content": "AAAA"}}, NAMESPACE)
    with pytest.raises(PermissionDenied):
        kube.delete(HEADER_PIECE, name_of(pieces[0]), NAMESPACE)
    elsewhere.drop("header-1")
    assert not cluster.list(HEADER_PIECE, NAMESPACE)[0]
    records.remove(records.ready("header-1"))


def test_nobody_deletes_a_holder_but_the_controller(account: Accounts, cluster: Kube) -> None:
    labels = {"app.kubernetes.io/component": "holder"}
    annotations = {"volumes.luks.csi.internal/volume-id": "pvc-7"}
    container = {"name": "holder", "image": "none"}
    for name, about in (("holder", {"labels": labels, "annotations": annotations}), ("other", {})):
        cluster.create(
            POD,
            {"metadata": {"name": name, **about}, "spec": {"nodeName": "one", "containers": [container]}},
            NAMESPACE,
        )
    with pytest.raises(InvalidArgument, match=r"the pod holder holds the device of volume pvc-7 on node one"):
        cluster.delete(POD, "holder", NAMESPACE)
    cluster.delete(POD, "other", NAMESPACE, grace_seconds=0)
    for phase in ("Failed", "Succeeded"):
        ended = {
            "metadata": {"name": "ended", "labels": labels},
            "spec": {"nodeName": "one", "containers": [container]},
        }
        cluster.create(POD, ended, NAMESPACE)
        with pytest.raises(InvalidArgument, match=r"the pod ended holds the device"):
            cluster.delete(POD, "ended", NAMESPACE, grace_seconds=0)
        cluster.patch(POD, "ended", {"status": {"phase": phase}}, NAMESPACE, status=True)
        cluster.delete(POD, "ended", NAMESPACE, grace_seconds=0)
        assert cluster.get(POD, "ended", NAMESPACE) is None
    controller = account("luks-csi-controller")
    controller.delete(POD, "holder", NAMESPACE, grace_seconds=0)
    assert controller.get(POD, "holder", NAMESPACE) is None


class Controller:
    """`luks-csi serve --services controller`, as the Deployment runs it."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        self._kubeconfig = kubeconfig
        self._folder = folder
        self.endpoint = folder / "csi.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        argv = [
            _LUKS_CSI, "serve", "--services=controller", "--backend=csi", f"--endpoint={self.endpoint}",
            f"--driver-name={DRIVER}", f"--state-dir={self._folder / 'state'}", "--holder-image=image",
            "--node-id=controller",
        ]  # fmt: skip
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | {"KUBECONFIG": str(self._kubeconfig)},
            )  # fmt: skip
        wait("controller", self._answers)

    def _answers(self) -> bool:
        try:
            with CsiClient(self.endpoint) as client:
                return bool(client.plugin_info().name)
        except RemoteError:
            return False

    def end(self, number: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(_PATIENCE)


@pytest.fixture
def controller(api: Api, cluster: Kube, tmp_path: Path) -> Iterator[Controller]:
    assert cluster.get(STORAGE_CLASS, CLASS)
    made = Controller(kubeconfig(api, "luks-csi-controller"), tmp_path)
    made.start()
    yield made
    made.end()


def bind(kube: Kube, volume_id: str) -> None:
    """As the provisioner below and the volume controller do."""
    claim = wait("claim", lambda: kube.get(CLAIM, name_for(volume_id), NAMESPACE))
    size = claim["spec"]["resources"]["requests"]["storage"]
    spec: Json = {
        "volumeMode": "Block",
        "capacity": {"storage": size},
        "accessModes": ["ReadWriteOnce"],
        "csi": {"driver": "below.test", "volumeHandle": volume_id},
        "claimRef": {"namespace": NAMESPACE, "name": name_of(claim), "uid": uid_of(claim)},
    }
    kube.create(VOLUME, {"metadata": {"name": f"pv-{volume_id}"}, "spec": spec})
    kube.patch(CLAIM, name_of(claim), {"spec": {"volumeName": f"pv-{volume_id}"}}, NAMESPACE)
    kube.patch(CLAIM, name_of(claim), {"status": {"phase": "Bound"}}, NAMESPACE, status=True)


def start_holder(kube: Kube) -> None:
    """As kubelet does."""
    (pod,) = wait("holder", lambda: kube.list(POD, NAMESPACE, {"app.kubernetes.io/component": "holder"})[0])
    state = {"name": "holder", "ready": True, "started": True, "restartCount": 0, "image": "image", "imageID": ""}
    kube.patch(POD, name_of(pod), {"status": {"containerStatuses": [state]}}, NAMESPACE, status=True)


def again(call: Callable[[], Found]) -> Found:
    """As sidecars do."""

    def ask() -> tuple[Found] | None:
        try:
            return (call(),)
        except RemoteError as error:
            if error.code not in ("ABORTED", "UNAVAILABLE"):  # the latter for a while of kinds that are new
                pytest.fail(str(error))
            return None

    return wait("answer other than ABORTED", ask)[0]


def test_a_volume_is_made_given_to_a_node_and_deleted_by_a_controller_that_is_killed_at_times(
    cluster: Kube, controller: Controller
) -> None:
    with CsiClient(controller.endpoint) as client:
        make = {"parameters": PARAMETERS, "secrets": SECRET}
        with pytest.raises(RemoteError, match=r"is not bound yet"):
            client.create_volume("pvc-made", [MOUNT], 32 * MIB, **make)  # type: ignore[arg-type]
    controller.end(signal.SIGKILL)
    controller.start()
    bind(cluster, "pvc-made")
    with CsiClient(controller.endpoint) as client:
        volume = again(lambda: client.create_volume("pvc-made", [MOUNT], 32 * MIB, **make))  # type: ignore[arg-type]
        assert volume.context["backend"] == "csi"
        with pytest.raises(RemoteError, match=r"the holder pod luks-csi-over/luks-holder-.* is not ready yet"):
            client.attach(volume, "one", MOUNT)
    controller.end(signal.SIGKILL)
    controller.start()
    start_holder(cluster)
    with CsiClient(controller.endpoint) as client:
        assert again(lambda: client.attach(volume, "one", MOUNT)).keys() == {"holder"}
        with pytest.raises(RemoteError, match=r"node one has it"):
            client.attach(volume, "two", MOUNT)
        records = RecordObjects(cluster, NAMESPACE, RecordCodec())
        records.change("pvc-made", staged=Staged(node="one", boot_id="b", ticket="t", device="/dev/sdx"))
        with pytest.raises(RemoteError, match=r"cannot be taken from node one: it may be open there as /dev/sdx"):
            client.detach(volume.id, "one")
        cluster.patch(NODE, "one", {"spec": {"taints": [
            {"key": "node.kubernetes.io/out-of-service", "value": "x", "effect": "NoExecute"}]}})  # fmt: skip
        again(lambda: client.detach(volume.id, "one"))
        assert not cluster.list(POD, NAMESPACE, {"app.kubernetes.io/component": "holder"})[0]
        with pytest.raises(RemoteError, match=r"is being deleted and still there \(kubernetes.io/pvc-protection\)"):
            client.delete_volume(volume.id)
        assert cluster.get(VOLUME_RECORD, "pvc-made", NAMESPACE) is not None
        # As the controller does that sees to it that no pod uses it.
        cluster.patch(CLAIM, name_for("pvc-made"), {"metadata": {"finalizers": None}}, NAMESPACE)
        client.delete_volume(volume.id)
        assert cluster.get(VOLUME_RECORD, "pvc-made", NAMESPACE) is None
        assert cluster.get(CLAIM, name_for("pvc-made"), NAMESPACE) is None


def test_a_volume_that_nodes_call_for_is_given_without_a_holder_and_grows_though_no_pod_uses_its_claim(
    cluster: Kube, controller: Controller
) -> None:
    parameters = PARAMETERS | {"backingAttach": "direct"}
    with CsiClient(controller.endpoint) as client:

        def make() -> RemoteVolume:
            return client.create_volume("pvc-direct", [MOUNT], 32 * MIB, parameters=parameters, secrets=SECRET)

        with pytest.raises(RemoteError, match=r"wants its volumes attached \(it has no CSIDriver object\)"):
            make()
        cluster.create(CSI_DRIVER, {"metadata": {"name": "below.test"}, "spec": {"attachRequired": False}})
        with pytest.raises(RemoteError, match=r"is not bound yet"):
            make()
        bind(cluster, "pvc-direct")
        volume = again(make)
        assert again(lambda: client.attach(volume, "one", MOUNT)) == {"driver": "below.test"}
        assert not cluster.list(POD, NAMESPACE, {"app.kubernetes.io/component": "holder"})[0]
        with pytest.raises(RemoteError, match=r"is being enlarged from"):
            client.expand_volume(volume.id, 64 * MIB)
        # As its resizer does.
        claim = name_for("pvc-direct")
        size = cluster.get(CLAIM, claim, NAMESPACE)["spec"]["resources"]["requests"]["storage"]  # type: ignore[index]
        cluster.patch(VOLUME, "pv-pvc-direct", {"spec": {"capacity": {"storage": size}}})
        pending = {"type": "FileSystemResizePending", "status": "True"}
        resizing: Json = {
            "allocatedResources": {"storage": size},
            "allocatedResourceStatuses": {"storage": "NodeResizePending"},
            "conditions": [pending],
        }
        cluster.patch(CLAIM, claim, {"status": resizing}, NAMESPACE, status=True)
        assert again(lambda: client.expand_volume(volume.id, 64 * MIB)) == 64 * MIB
        status = (cluster.get(CLAIM, claim, NAMESPACE) or {})["status"]
        assert status["capacity"]["storage"] == size
        assert not status.get("conditions")
        assert not status.get("allocatedResourceStatuses")
        again(lambda: client.detach(volume.id, "one"))
        cluster.patch(CLAIM, claim, {"metadata": {"finalizers": None}}, NAMESPACE)
        again(lambda: client.delete_volume(volume.id))
    cluster.delete(CSI_DRIVER, "below.test")
