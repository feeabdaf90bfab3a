"""The controller of the backend csi: claims, holder pods and records, on an API in memory with a kubelet that obeys."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from csi_driver.backends.base import shared
from csi_driver.backends.csi import CsiBackend
from csi_driver.backends.csiclaims import Claims, name_for, places_of
from csi_driver.backends.csidirect import DirectDevices, nobody_calls
from csi_driver.backends.csiheaders import HeaderCopies
from csi_driver.backends.csiholders import HolderPods, image_of, pod_name
from csi_driver.backends.csinode import NodeDevices
from csi_driver.backends.csipins import Pin, Pins, digest
from csi_driver.backends.csiplace import Place, read_place
from csi_driver.backends.csirecords import KEEPS, Known, RecordObjects, Staged, looks
from csi_driver.backends.records import RecordCodec
from csi_driver.host.boot import boot_id
from csi_driver.host.files import Files
from csi_driver.host.handle import Handle
from csi_driver.kube.kinds import (
    CLAIM,
    CSI_DRIVER,
    CSI_NODE,
    EVENT,
    HEADER_PIECE,
    NODE,
    POD,
    STORAGE_CLASS,
    VOLUME,
    VOLUME_RECORD,
    Json,
    Kind,
    name_of,
    uid_of,
)
from csi_driver.model.access import Access
from csi_driver.model.errors import (
    Aborted,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    VolumeBusy,
)
from csi_driver.model.settings import Service, Settings
from csi_driver.model.volume import EncryptionState, FileSystemState, VolumeParameters, VolumeRecord
from csi_driver.volumes.driver import Host, build_driver, make_backend
from tests.operator_fakes import Call, FakeApi
from tests.told_lines import told_lines

NAMESPACE, DRIVER, TOPOLOGY, MIB = "luks", "luks.csi.internal", "topology.luks.csi.internal/node", 1 << 20
SIZE = 16 * MIB
SELECTED = "volume.kubernetes.io/selected-node"
PARAMETERS = VolumeParameters(encrypted=True, backing_storage_class="below")


class Killed(BaseException):
    """The process ends at this step."""


class Cluster(FakeApi):
    """Binds claims at once where `binds`, and has kubelets that start and end pods at once where `obeys`."""

    def __init__(self) -> None:
        super().__init__()
        self.binds = self.obeys = True
        self.affinity: Json = {}
        self.below: Json = {"driver": "below.test", "volumeHandle": "x"}
        self.mode = "Block"
        for name in ("one", "two"):
            self.put(NODE, {"metadata": {"name": name}, "spec": {}, "status": {"nodeInfo": {"bootID": boot_id()}}})
        binding = {"volumeBindingMode": "WaitForFirstConsumer", "allowVolumeExpansion": True}
        self.put(STORAGE_CLASS, {"metadata": {"name": "below"}, "provisioner": "below.test", **binding})

    def create(self, kind: Kind, thing: Json, namespace: str = "") -> Json:
        made = super().create(kind, thing, namespace)
        if kind == CLAIM and self.binds:
            self.bind(name_of(made))
        if kind == POD and self.obeys:
            self.start(name_of(made))
        return self._of(kind)[namespace, name_of(made)]

    def bind(self, name: str) -> None:
        size = self._of(CLAIM)[NAMESPACE, name]["spec"]["resources"]["requests"]["storage"]
        spec = {
            "volumeMode": self.mode,
            "capacity": {"storage": size},
            "csi": self.below,
            "nodeAffinity": self.affinity,
        }
        self.put(VOLUME, {"metadata": {"name": f"pv-{name}"}, "spec": spec})
        bound = {"spec": {"volumeName": f"pv-{name}"}, "status": {"phase": "Bound"}}
        self.change(CLAIM, name, bound, NAMESPACE)

    def start(self, name: str) -> None:
        status = {"phase": "Running", "containerStatuses": [{"ready": True, "started": True}]}
        self.change(POD, name, {"status": status}, NAMESPACE)

    def remove(self, kind: Kind, name: str, namespace: str = "") -> None:
        if kind == POD and not self.obeys:
            self.change(POD, name, {"metadata": {"finalizers": ["kubelet"]}}, namespace)
        super().remove(kind, name, namespace)

    def delete(
        self, kind: Kind, name: str, namespace: str = "", *, grace_seconds: int | None = None, seen: Json | None = None
    ) -> None:
        super().delete(kind, name, namespace, grace_seconds=grace_seconds, seen=seen)
        if grace_seconds == 0 and self.get(kind, name, namespace) is not None:
            self.lose(kind, name, namespace)

    def tell(self, thing: Json, message: str) -> None:
        """An event about an object."""
        about = {"uid": uid_of(thing)}
        event = {"metadata": {"name": f"event-{len(self.all(EVENT))}"}, "involvedObject": about, "message": message}
        self.put(EVENT, {**event, "type": "Warning", "reason": "ProvisioningFailed"}, NAMESPACE)


class Careless(CsiBackend):
    """A detach that does not look."""

    def _refuse_open(self, known: Known, node: str) -> None:
        """Nothing is looked at."""


class World:
    """The cluster, a controller on it, and the node `one`."""

    def __init__(
        self, folder: Path, make: type[CsiBackend] = CsiBackend, api: Cluster | None = None, seconds: float = 0.0
    ) -> None:
        self._seconds = seconds
        self.api = api or Cluster()
        self.records = RecordObjects(self.api, NAMESPACE, RecordCodec())
        self.headers = HeaderCopies(self.api, NAMESPACE, self.records, folder / "headers", Files())
        self.pins = Pins(folder / "holders", Files())
        self.pins.prepare()
        direct = DirectDevices(nobody_calls, folder / "kubelet", DRIVER)
        self.devices = NodeDevices(self.api, self.records, self.pins, direct, "one", "below.test", 0.0)
        self.controller = self._made(make, is_node=False)
        self.node = self._made(make, is_node=True)

    def _made(self, make: type[CsiBackend], *, is_node: bool) -> CsiBackend:
        return make(
            self.records,
            self.headers,
            Claims(self.api, NAMESPACE, DRIVER, 0.0),
            HolderPods(self.api, NAMESPACE, lambda: "image", Path("/holders"), self._seconds),
            self.devices,
            is_node=is_node,
            node_topology=TOPOLOGY,
        )

    def create(self, volume_id: str = "pvc-1") -> VolumeRecord:
        return self.controller.create(record(volume_id), SIZE)

    def claim(self, volume_id: str = "pvc-1") -> Json:
        found = self.api.get(CLAIM, name_for(volume_id), NAMESPACE)
        assert found is not None
        return found

    def spec(self, volume_id: str = "pvc-1") -> Json:
        found = self.api.get(VOLUME_RECORD, volume_id, NAMESPACE)
        assert found is not None
        spec: Json = found["spec"]
        return spec

    def stage(self, node: str = "one", boot: str = "") -> None:
        """As a node's plug-in says that it has the device attached."""
        staged = Staged(node=node, boot_id=boot or boot_id(), ticket="ticket", device="/dev/loop7")
        self.records.change("pvc-1", staged=staged)

    def holders(self) -> list[str]:
        return [each["spec"]["nodeName"] for each in self.api.all(POD)]


def record(volume_id: str = "pvc-1") -> VolumeRecord:
    return VolumeRecord(
        id=volume_id, name=volume_id, capacity_bytes=SIZE - MIB, parameters=PARAMETERS,
        encryption=EncryptionState.PREPARED, created="now",
    )  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def known(world: World) -> Known:
    found = world.records.find("pvc-1")
    assert found is not None
    return found


@contextmanager
def no_lock(_: str) -> Iterator[None]:
    yield


@contextmanager
def full_disk() -> Iterator[None]:
    """Nothing can be written, and things can be removed."""
    with pytest.MonkeyPatch.context() as patch:

        def fill(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(Files, "fill", fill)
        yield


@contextmanager
def busy(volume_id: str) -> Iterator[None]:
    if volume_id:
        raise VolumeBusy("busy")
    yield


# --- claims ----------------------------------------------------------------------------------------------------------


def test_the_claim_is_raw_block_of_the_class_below_for_the_chosen_node(world: World) -> None:
    world.controller.use("pvc-1", Access(topologies=({TOPOLOGY: "two"}, {TOPOLOGY: "one"})))
    world.create()
    claim = world.claim()
    assert claim["spec"]["volumeMode"] == "Block"
    assert claim["spec"]["storageClassName"] == "below"
    assert claim["spec"]["resources"]["requests"]["storage"] == str(SIZE)
    assert claim["metadata"]["annotations"][SELECTED] == "two"
    assert claim["metadata"]["finalizers"] == [KEEPS]
    assert world.spec()["claimUid"] == claim["metadata"]["uid"]


def test_a_class_below_that_binds_at_once_is_told_no_node(world: World) -> None:
    world.api.change(STORAGE_CLASS, "below", {"volumeBindingMode": "Immediate"})
    world.controller.use("pvc-1", Access(topologies=({TOPOLOGY: "two"},)))
    world.create()
    assert SELECTED not in world.claim()["metadata"]["annotations"]


def test_a_pod_that_was_given_another_node_takes_the_pending_claim_along(world: World) -> None:
    """The scheduler does so behind ten minutes; a provisioner that has no room takes the node off the claim."""
    world.api.binds = False

    def node_of_claim(wished: str) -> str:
        world.controller.use("pvc-1", Access(topologies=({TOPOLOGY: wished},)))
        with pytest.raises(Aborted, match=r"is not bound yet"):
            world.create()
        return str(world.claim()["metadata"]["annotations"][SELECTED])

    assert [node_of_claim("one"), node_of_claim("two"), node_of_claim("two")] == ["one", "two", "two"]
    world.api.change(CLAIM, name_for("pvc-1"), {"metadata": {"annotations": {SELECTED: None}}}, NAMESPACE)
    assert node_of_claim("two") == "two"
    world.api.bind(name_for("pvc-1"))
    world.api.written()
    world.controller.use("pvc-1", Access(topologies=({TOPOLOGY: "one"},)))
    world.create()
    assert ("patch", CLAIM) not in [(call.verb, call.kind) for call in world.api.written()]


@pytest.mark.parametrize("pends", [False, True])
def test_a_node_that_the_driver_below_is_not_on_gets_no_claim(world: World, *, pends: bool) -> None:
    """Its provisioner names no code then, and the pod would stay there for ever."""
    world.api.binds = False
    world.controller.use("pvc-1", Access(topologies=({TOPOLOGY: "one"},)))
    if pends:
        with pytest.raises(Aborted):
            world.create()
    world.api.put(CSI_DRIVER, {"metadata": {"name": "below.test"}, "spec": {}})
    world.api.put(CSI_NODE, {"metadata": {"name": "one"}, "spec": {"drivers": [{"name": DRIVER}]}})
    said = r"volume pvc-1 cannot be made for node one: the driver below.test of class below below it is not there"
    with pytest.raises(ResourceExhausted, match=said):
        world.create()
    assert not world.api.all(CLAIM)
    assert not world.api.all(VOLUME_RECORD)
    world.api.change(CSI_NODE, "one", {"spec": {"drivers": [{"name": DRIVER}, {"name": "below.test"}]}})
    with pytest.raises(Aborted):
        world.create()
    world.api.change(CSI_NODE, "one", {"spec": {"drivers": []}})  # it starts anew there, and the claim is bound
    world.api.bind(name_for("pvc-1"))
    world.create()


def test_where_a_volume_is_wished_is_kept_only_until_it_is_there(world: World) -> None:
    """Else a controller that is asked again and again for volumes that there are would grow for ever."""
    wish = Access(topologies=({TOPOLOGY: "two"},))
    world.controller.use("pvc-1", wish)
    world.create()
    world.controller.use("pvc-1", wish)
    world.controller.get("pvc-1")
    world.controller.use("pvc-2", wish)
    world.controller.delete("pvc-2")
    assert world.controller._wished == {}  # noqa: SLF001 - nobody else sees it


def test_a_claim_that_is_pending_is_waited_for_and_says_what_its_events_say(world: World) -> None:
    world.api.binds = False
    for _ in range(2):
        with pytest.raises(
            Aborted, match=r"claim luks/luks-pvc-1 below volume pvc-1, of class below, is not bound yet"
        ):
            world.create()
    world.api.tell(world.claim(), "rpc error: code = DeadlineExceeded desc = the cloud is slow")
    with pytest.raises(
        Aborted, match=r"is not bound yet \(rpc error: code = DeadlineExceeded desc = the cloud is slow"
    ):
        world.create()
    assert not world.controller.has("pvc-1")
    assert not world.controller.ids()
    assert world.controller.orphans() == ["VolumeRecord/pvc-1"]
    world.api.bind(name_for("pvc-1"))
    assert world.create() == world.controller.get("pvc-1")


@pytest.mark.parametrize(
    ("said", "kind", "sentence"),
    [
        ("rpc error: code = InvalidArgument desc = block is not supported", FailedPrecondition, "must have raw block"),
        ("rpc error: code = ResourceExhausted desc = no disks left", ResourceExhausted, "no disks left"),
    ],
)
def test_what_the_driver_below_refuses_is_told_and_leaves_nothing(
    world: World, said: str, kind: type[DriverError], sentence: str
) -> None:
    world.api.binds = False
    with pytest.raises(Aborted):
        world.create()
    world.api.tell(world.claim(), said)
    with pytest.raises(kind, match=sentence):
        world.create()
    assert not world.api.all(CLAIM)
    assert not world.api.all(VOLUME_RECORD)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidArgument("PersistentVolumeClaim is refused: a policy denied it"), FailedPrecondition),
        (FailedPrecondition("the cluster does not admit PersistentVolumeClaim: too small"), FailedPrecondition),
        (ResourceExhausted("a quota leaves no room for PersistentVolumeClaim"), ResourceExhausted),
    ],
)
def test_a_claim_that_the_cluster_does_not_admit_is_told_and_asked_for_again(
    world: World, error: DriverError, kind: type[DriverError]
) -> None:
    """InvalidArgument would keep external-provisioner away for minutes, though the policy has been changed."""

    def refuse(call: Call) -> None:
        if (call.verb, call.kind) == ("create", CLAIM):
            raise error

    world.api.before = refuse
    with pytest.raises(kind, match=rf"volume pvc-1 .* namespace {NAMESPACE} does not take the claim .*: {error}; this"):
        world.create()
    assert not world.api.all(VOLUME_RECORD)
    world.api.before = lambda _call: None
    world.create()


def test_a_class_that_cannot_be_below_is_refused_before_anything_is_made(world: World) -> None:
    for parameters, kind, sentence in (
        (VolumeParameters(), InvalidArgument, r"backingStorageClass must name"),
        (VolumeParameters(backing_storage_class="nix"), FailedPrecondition, r"there is no StorageClass 'nix'"),
        (VolumeParameters(backing_storage_class="ours"), InvalidArgument, r"'ours', a class of this driver itself"),
    ):
        world.api.put(STORAGE_CLASS, {"metadata": {"name": "ours"}, "provisioner": DRIVER})
        with pytest.raises(kind, match=sentence):
            world.controller.create(msgspec.structs.replace(record(), parameters=parameters), SIZE)
    assert not world.api.all(VOLUME_RECORD)
    with pytest.raises(InvalidArgument, match=r"backingStorageClass is missing"):
        world.controller.id_for("pvc-1", VolumeParameters())
    with pytest.raises(InvalidArgument, match=r"eraseOnDelete cannot be kept"):
        world.controller.id_for("pvc-1", VolumeParameters(backing_storage_class="below", erase_on_delete=True))


def test_a_volume_that_is_no_raw_block_or_our_own_is_refused_and_given_back(world: World) -> None:
    world.api.mode = "Filesystem"
    with pytest.raises(FailedPrecondition, match=r"was bound to pv-luks-pvc-1, which is no raw block volume"):
        world.create()
    world.api.mode, world.api.below = "Block", {"driver": DRIVER}
    with pytest.raises(InvalidArgument, match=r"a volume of this driver itself"):
        world.create()
    assert not world.api.all(CLAIM)
    assert not world.api.all(VOLUME_RECORD)


def test_where_the_volume_below_is_reached_from_ours_is(world: World) -> None:
    zone, host = "topology.kubernetes.io/zone", "kubernetes.io/hostname"
    terms = [
        {"matchExpressions": [{"key": zone, "operator": "In", "values": ["a", "b"]},
                              {"key": host, "operator": "In", "values": ["one"]}]},
        {"matchExpressions": [{"key": host, "operator": "In", "values": ["two"]}]},
    ]  # fmt: skip
    world.api.affinity = {"required": {"nodeSelectorTerms": terms}}
    made = world.create()
    expected = [{zone: "a", host: "one"}, {zone: "b", host: "one"}, {host: "two"}]
    assert list(world.controller.places(made)) == expected
    terms[1]["matchExpressions"][0]["operator"] = "NotIn"
    with pytest.raises(FailedPrecondition, match=r"says more than CSI can hand on"):
        places_of({"metadata": {"name": "x"}, "spec": {"nodeAffinity": world.api.affinity}})


def test_another_claim_of_the_name_is_left_alone(world: World) -> None:
    other = world.api.put(CLAIM, {"metadata": {"name": name_for("pvc-1")}, "spec": {}}, NAMESPACE)
    with pytest.raises(FailedPrecondition, match=r"the claim luks/luks-pvc-1 is there and was not made for it"):
        world.create()
    assert world.claim() == other
    assert not world.api.all(VOLUME_RECORD)


def test_a_claim_that_has_come_to_the_name_outlives_the_volume_and_is_told(world: World) -> None:
    world.create()
    world.api.remove(CLAIM, name_for("pvc-1"), NAMESPACE)
    world.api.lose(CLAIM, name_for("pvc-1"), NAMESPACE)
    other = world.api.put(CLAIM, {"metadata": {"name": name_for("pvc-1")}, "spec": {}}, NAMESPACE)
    with told_lines() as lines:
        world.controller.delete("pvc-1")
    assert world.claim() == other
    assert not world.api.all(VOLUME_RECORD)
    (line,) = (each for each in lines if each.event == "a claim was left alone: it is not the volume's")
    assert line.fields == {"volume_id": "pvc-1", "claim": "luks/luks-pvc-1"}


def test_a_claim_that_went_by_hand_is_told_and_the_record_stays(world: World) -> None:
    world.create()
    world.api.remove(CLAIM, name_for("pvc-1"), NAMESPACE)
    with pytest.raises(FailedPrecondition, match=r"somebody has asked for the deletion of the claim .* still there"):
        world.controller.publish("pvc-1", "one", many_nodes=False)
    world.api.lose(CLAIM, name_for("pvc-1"), NAMESPACE)
    with pytest.raises(FailedPrecondition, match=r"is gone or another one \(its PersistentVolume was pv-luks-pvc-1\)"):
        world.controller.publish("pvc-1", "one", many_nodes=False)
    world.api.remove(VOLUME_RECORD, "pvc-1", NAMESPACE)
    assert world.controller.get("pvc-1") == record()
    world.controller.delete("pvc-1")
    assert not world.api.all(VOLUME_RECORD)


def test_growth_is_the_claims_and_waits_for_its_driver(world: World) -> None:
    world.create()
    with pytest.raises(Aborted, match=r"is being enlarged from 16777216 to 33554432 bytes by its own driver"):
        world.controller.grow("pvc-1", 2 * SIZE)
    assert world.claim()["spec"]["resources"]["requests"]["storage"] == str(2 * SIZE)
    assert world.spec()["size"] == SIZE
    world.api.change(VOLUME, "pv-luks-pvc-1", {"spec": {"capacity": {"storage": "32Mi"}}})
    world.controller.grow("pvc-1", 2 * SIZE)
    assert world.spec()["size"] == 2 * SIZE
    world.api.change(STORAGE_CLASS, "below", {"allowVolumeExpansion": None})
    with pytest.raises(FailedPrecondition, match=r"its class below does not say allowVolumeExpansion: true"):
        world.controller.grow("pvc-1", 3 * SIZE)
    with pytest.raises(FailedPrecondition, match=r"enlarge its claim, as a node cannot"):
        world.node.grow("pvc-1", 3 * SIZE)


def test_a_growth_that_the_driver_below_refuses_for_good_gives_way_to_a_smaller_one(world: World) -> None:
    world.create()
    refused = {"allocatedResources": {"storage": str(100 * SIZE)}}
    refused["allocatedResourceStatuses"] = {"storage": "ControllerResizeInfeasible"}
    for expected in (Aborted, OutOfRange, OutOfRange):
        with pytest.raises(expected, match=r"from 16777216 to 1677721600 bytes"):
            world.controller.grow("pvc-1", 100 * SIZE)
        world.api.change(CLAIM, name_for("pvc-1"), {"status": refused}, NAMESPACE)
    with pytest.raises(Aborted, match=r"is being enlarged from 16777216 to 33554432 bytes"):
        world.controller.grow("pvc-1", 2 * SIZE)
    assert world.claim()["spec"]["resources"]["requests"]["storage"] == str(2 * SIZE)
    world.api.change(VOLUME, "pv-luks-pvc-1", {"spec": {"capacity": {"storage": "32Mi"}}})
    world.controller.grow("pvc-1", 2 * SIZE)
    assert world.spec()["size"] == 2 * SIZE


# --- holders ---------------------------------------------------------------------------------------------------------


def test_a_node_gets_a_volume_by_a_holder_and_gives_it_back(world: World) -> None:
    world.create()
    given = world.controller.publish("pvc-1", "one", many_nodes=False)
    assert given == {"holder": pod_name("pvc-1", "one")}
    (pod,) = world.api.all(POD)
    assert pod["spec"]["nodeName"] == "one"
    assert pod["spec"]["priorityClassName"] == "system-node-critical"
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == name_for("pvc-1")
    assert pod["metadata"]["ownerReferences"][0]["controller"] is True
    assert world.controller.published("pvc-1") == ["one"]
    with pytest.raises(FailedPrecondition, match=r"cannot be given to node two: node one has it"):
        world.controller.publish("pvc-1", "two", many_nodes=False)
    with pytest.raises(DeviceInUse, match=r"node one may use it"):
        world.controller.delete("pvc-1")
    for _ in range(2):
        world.controller.unpublish("pvc-1", "one")
    assert not world.holders()
    world.controller.publish("pvc-1", "two", many_nodes=False)
    world.controller.unpublish("pvc-1", "")
    assert not world.controller.published("pvc-1")
    with pytest.raises(NotFound, match=r"no node of that name"):
        world.controller.publish("pvc-1", "nix", many_nodes=False)
    world.controller.unpublish("nix", "one")


def test_a_holder_that_is_not_ready_is_waited_for_in_words(world: World) -> None:
    world.create()
    world.api.obeys = False
    with pytest.raises(Aborted, match=r"the holder pod luks/luks-holder-\S+ of volume pvc-1 on node one is not ready"):
        world.controller.publish("pvc-1", "one", many_nodes=False)
    world.api.tell(world.api.all(POD)[0], "AttachVolume.Attach failed: no more disks for this server")
    with pytest.raises(Aborted, match=r"not ready yet \(AttachVolume.Attach failed: no more disks for this server\)"):
        world.controller.publish("pvc-1", "one", many_nodes=False)
    world.api.start(pod_name("pvc-1", "one"))
    world.controller.publish("pvc-1", "one", many_nodes=False)


def test_an_image_that_cannot_be_pulled_is_named(world: World) -> None:
    """The last event of its pod is `Error: ImagePullBackOff`."""
    world.create()
    world.api.obeys = False
    with pytest.raises(Aborted):
        world.controller.publish("pvc-1", "one", many_nodes=False)
    world.api.tell(world.api.all(POD)[0], "Error: ImagePullBackOff")
    waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "localhost/luks-csi:0.1.0"'}
    status = {"phase": "Pending", "containerStatuses": [{"ready": False, "state": {"waiting": waiting}}]}
    world.api.change(POD, pod_name("pvc-1", "one"), {"status": status}, NAMESPACE)
    with pytest.raises(Aborted, match=r'not ready yet \(Back-off pulling image "localhost/luks-csi:0.1.0"\); this is'):
        world.controller.publish("pvc-1", "one", many_nodes=False)
    del waiting["message"]
    world.api.change(POD, pod_name("pvc-1", "one"), {"status": status}, NAMESPACE)
    with pytest.raises(Aborted, match=r"not ready yet \(Error: ImagePullBackOff\)"):
        world.controller.publish("pvc-1", "one", many_nodes=False)


def test_a_holder_that_ends_again_and_again_says_why_itself(world: World) -> None:
    """Kubelet says only that it backs off."""
    world.create()
    world.api.obeys = False
    with pytest.raises(Aborted):
        world.controller.publish("pvc-1", "one", many_nodes=False)
    (pod,) = world.api.all(POD)
    assert pod["spec"]["containers"][0]["terminationMessagePolicy"] == "FallbackToLogsOnError"
    ended = {"terminated": {"message": "holding\nthe device /dev/backing of volume pvc-1 cannot be opened (EACCES)\n"}}
    backing_off = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 2m40s restarting failed container"}}
    for states in ({"state": ended}, {"state": backing_off, "lastState": ended}):
        status = {"phase": "Running", "containerStatuses": [{"ready": False, **states}]}
        world.api.change(POD, name_of(pod), {"status": status}, NAMESPACE)
        with pytest.raises(Aborted, match=r"not ready yet \(the device /dev/backing of volume pvc-1 cannot be opened"):
            world.controller.publish("pvc-1", "one", many_nodes=False)


def own_pod(world: World, *containers: str) -> None:
    """The controller's, with containers of these names."""
    spec = {"containers": [{"name": name, "image": f"registry.example/{name}:1"} for name in containers]}
    world.api.put(POD, {"metadata": {"name": "own"}, "spec": spec}, NAMESPACE)


def test_holders_have_the_image_of_the_controllers_own_container(world: World) -> None:
    with pytest.raises(FailedPrecondition, match=r"controller's pod luks/own, which is not there; correct --pod-name"):
        image_of(world.api, NAMESPACE, "own")
    own_pod(world, "attacher", "controller")
    assert image_of(world.api, NAMESPACE, "own") == "registry.example/controller:1"
    own_pod(world, "renamed")
    assert image_of(world.api, NAMESPACE, "own") == "registry.example/renamed:1"
    own_pod(world, "attacher", "renamed")
    with pytest.raises(FailedPrecondition, match=r"has several containers, and none is called controller; correct"):
        image_of(world.api, NAMESPACE, "own")


@pytest.mark.parametrize("holder_image", ["", "registry.example/chosen:1"])
def test_the_api_is_asked_for_that_image_once_and_when_a_holder_is_made(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder_image: str
) -> None:
    """It may be away when the controller starts."""
    asked: list[Call] = []
    away = [True]

    def look(call: Call) -> None:
        if call == Call("get", POD, "own"):
            asked.append(call)
            if away[0]:
                raise Unavailable("the API is away")

    monkeypatch.setattr(world.api, "namespace", NAMESPACE, raising=False)
    monkeypatch.setattr("csi_driver.kube.client.Kube.of", lambda: world.api)
    own_pod(world, "controller")
    settings = Settings(
        node_id="c", backend="csi", driver_name=DRIVER, state_dir=tmp_path / "state", pod_name="own",
        holder_image=holder_image, services=frozenset({Service.IDENTITY, Service.CONTROLLER}),
    )  # fmt: skip
    world.api.before = look
    controller = shared(make_backend(settings, Host()))
    assert controller is not None
    assert not asked
    for volume_id in ("pvc-1", "pvc-2"):
        world.create(volume_id)
        if not holder_image and away[0]:
            with pytest.raises(Unavailable):
                controller.publish(volume_id, "one", many_nodes=False)
            away[0] = False
        controller.publish(volume_id, "one", many_nodes=False)
    images = {each["spec"]["containers"][0]["image"] for each in world.api.all(POD) if name_of(each) != "own"}
    assert images == {holder_image or "registry.example/controller:1"}
    assert len(asked) == (0 if holder_image else 2)


def check_looks(world: World) -> None:
    """A volume that a node may still write to is not taken away from it."""
    world.create()
    world.controller.publish("pvc-1", "one", many_nodes=False)
    world.stage()
    for node in ("one", ""):
        with pytest.raises(
            FailedPrecondition, match=r"cannot be taken from node one: it may be open there as /dev/loop7"
        ):
            world.controller.unpublish("pvc-1", node)
        assert world.holders() == ["one"], "the holder was taken away under an open volume"
    with pytest.raises(DeviceInUse, match=r"it is open on node one as /dev/loop7; unpublish and unstage it"):
        world.controller.delete("pvc-1")


def test_a_volume_that_is_open_is_not_taken_away(world: World) -> None:
    check_looks(world)
    world.records.change("pvc-1", staged=None)
    world.controller.unpublish("pvc-1", "one")


def test_a_detach_that_does_not_look_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_looks(World(tmp_path, Careless))


@pytest.mark.parametrize("how", ["taint", "gone", "booted anew"])
def test_a_node_that_is_past_it_gives_the_volume_up(world: World, how: str) -> None:
    world.create()
    world.controller.publish("pvc-1", "one", many_nodes=False)
    world.stage()
    world.api.obeys = how == "booted anew"
    if how == "taint":
        taint = {"key": "node.kubernetes.io/out-of-service", "value": "x", "effect": "NoExecute"}
        world.api.change(NODE, "one", {"spec": {"taints": [taint]}})
    elif how == "gone":
        world.api.lose(NODE, "one")
    else:
        world.api.change(NODE, "one", {"status": {"nodeInfo": {"bootID": "another"}}})
    world.controller.unpublish("pvc-1", "one")
    assert not world.holders()
    assert world.spec().get("staged") is None
    world.api.obeys = True
    world.controller.publish("pvc-1", "two", many_nodes=False)


def test_a_holder_that_stays_is_waited_for_before_another_node_gets_the_volume(world: World) -> None:
    world.create()
    world.controller.publish("pvc-1", "one", many_nodes=False)
    world.api.obeys = False
    with pytest.raises(Aborted, match=r"has not ended on node one yet; it stays while"):
        world.controller.unpublish("pvc-1", "one")
    world.api.change(NODE, "one", {"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}})
    with pytest.raises(Aborted, match=r"has not ended on node one yet; the node is not ready, .* by the taint"):
        world.controller.publish("pvc-1", "two", many_nodes=False)
    world.api.change(NODE, "one", {"status": {"conditions": [{"type": "Ready", "status": "True"}]}})
    waits = {"ready": False, "state": {"waiting": {"message": "no such image"}}}
    world.api.change(POD, pod_name("pvc-1", "one"), {"status": {"containerStatuses": [waits]}}, NAMESPACE)
    with pytest.raises(Aborted, match=r"has not ended on node one yet; it does not run \(no such image\); this is"):
        world.controller.publish("pvc-1", "two", many_nodes=False)
    world.api.change(POD, pod_name("pvc-1", "one"), {"metadata": {"finalizers": None}}, NAMESPACE)
    world.api.obeys = True
    world.controller.unpublish("pvc-1", "one")
    world.controller.publish("pvc-1", "two", many_nodes=False)
    world.api.obeys = False
    with pytest.raises(Aborted, match=r"has not ended on node two yet"):
        world.controller.unpublish("pvc-1", "two")
    with pytest.raises(Aborted, match=r"has not ended on node two yet"):
        world.controller.delete("pvc-1")
    assert world.claim()


def test_a_node_attaches_nothing_that_the_controller_has_taken_away(world: World) -> None:
    world.create()
    for node in ("", "two"):
        world.records.change("pvc-1", node=node)
        with pytest.raises(FailedPrecondition, match=r"volume pvc-1 is not attached to node one: "):
            world.node.attach("pvc-1", lasting=False)
    assert not world.node.ids()


# --- what is mended --------------------------------------------------------------------------------------------------


def test_holders_and_records_are_made_to_agree(world: World) -> None:
    world.create()
    world.create("pvc-2")
    world.controller.publish("pvc-1", "one", many_nodes=False)
    world.controller.publish("pvc-2", "one", many_nodes=False)
    world.api.lose(POD, pod_name("pvc-1", "one"), NAMESPACE)  # somebody's hand
    world.records.change("pvc-2", node="")  # a controller that was killed
    world.controller.mend(busy, lambda: False)
    world.controller.mend(no_lock, lambda: True)
    assert [name_of(each) for each in world.api.all(POD)] == [pod_name("pvc-2", "one")]
    world.controller.mend(no_lock, lambda: False)
    assert [name_of(each) for each in world.api.all(POD)] == [pod_name("pvc-1", "one")]
    written = world.api.written()
    world.controller.mend(no_lock, lambda: False)
    assert written
    assert not world.api.written()


def end(world: World, volume_id: str, phase: str = "Failed") -> str:
    """A node's shutdown, as kubelet tells it of a holder; its uid."""
    said = "Pod was terminated in response to imminent node shutdown."
    status = {"phase": phase, "message": said, "containerStatuses": [{"ready": False, "started": False}]}
    return uid_of(world.api.change(POD, pod_name(volume_id, "one"), {"status": status}, NAMESPACE))


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_a_holder_that_has_ended_is_made_anew(world: World, phase: str) -> None:
    """No workload replaces it, and the controller is asked for the volume no more."""
    world.create()
    world.controller.publish("pvc-1", "one", many_nodes=False)
    uid = end(world, "pvc-1", phase)
    with told_lines() as told:
        world.controller.mend(no_lock, lambda: False)
        (pod,) = world.api.all(POD)
        assert (uid_of(pod) != uid, pod["status"]["phase"]) == (True, "Running")
        world.api.written()
        world.controller.mend(no_lock, lambda: False)
        assert not world.api.written()
    assert [each.event for each in told] == ["a holder had ended"]
    assert told[0].fields["error"].endswith(" on node one: Pod was terminated in response to imminent node shutdown.")


def test_a_node_that_takes_no_holder_is_told_of_once(world: World) -> None:
    world.create()
    world.controller.publish("pvc-1", "one", many_nodes=False)
    with told_lines() as told:
        for _ in range(3):
            end(world, "pvc-1")
            world.controller.mend(no_lock, lambda: False)
        world.controller.mend(no_lock, lambda: False)
        end(world, "pvc-1")
        world.controller.mend(no_lock, lambda: False)
    assert [each.event for each in told] == ["a holder had ended"] * 2


def test_no_holder_is_made_for_a_node_that_is_off(world: World) -> None:
    """Nobody would end it there: the volume could be given to no other node."""
    world.create()
    world.controller.publish("pvc-1", "one", many_nodes=False)
    end(world, "pvc-1")
    off = {"status": {"conditions": [{"type": "Ready", "status": "False"}]}}
    world.api.change(NODE, "one", off)
    world.api.written()
    world.controller.mend(no_lock, lambda: False)
    assert not world.api.written()
    world.controller.unpublish("pvc-1", "one")
    world.controller.publish("pvc-1", "two", many_nodes=False)


def test_another_controller_that_stood_still_ends_no_holder_that_runs(world: World) -> None:
    world.create()
    world.controller.publish("pvc-1", "one", many_nodes=False)
    end(world, "pvc-1")

    def stands_still(call: Call) -> None:
        if (call.verb, call.kind) == ("delete", POD):
            world.api.before = lambda _: None
            world.controller.mend(no_lock, lambda: False)

    world.api.before = stands_still
    world.controller.mend(no_lock, lambda: False)
    assert [each["status"]["phase"] for each in world.api.all(POD)] == ["Running"]


def _made(world: World) -> None:
    world.api.bind(name_for("pvc-1"))
    world.create()


def _used(world: World) -> None:
    world.controller.publish("pvc-1", "one", many_nodes=False)
    world.stage()


def _made_anew(world: World) -> None:
    world.controller.delete("pvc-1")
    world.create()
    _used(world)


def _made_and_used_while_no_claim_is_admitted(world: World) -> None:
    world.create()
    _used(world)
    raise ResourceExhausted("exceeded quota")


@pytest.mark.parametrize(
    ("state", "does", "verbs", "meanwhile"),
    [
        ("", "creates", ["create"], _made_and_used_while_no_claim_is_admitted),
        ("Ready", "deletes", ["get", "patch"], _used),
        ("Making", "removes orphans", ["get", "patch"], _made),
        ("Deleting", "mends", ["get", "patch"], _made_anew),
    ],
)
def test_another_controller_that_stood_still_removes_no_volume_that_came_to_be_meanwhile(
    world: World, state: str, does: str, verbs: list[str], meanwhile: Callable[[World], None]
) -> None:
    """It stood still behind its first look at the record, or before it made the claim."""
    world.api.binds = state != "Making"
    if state:
        with suppress(Aborted):
            world.create()
        world.records.write(known(world), state=state)
    world.api.binds = True
    of, left = (VOLUME_RECORD, 1) if state else (CLAIM, 0)

    def stands_still(call: Call) -> None:
        nonlocal left
        if call.kind == of and call.verb in verbs:
            left -= 1
        if left < 0:
            world.api.before = lambda _: None
            meanwhile(world)

    world.api.before = stands_still
    calls: dict[str, Callable[[], object]] = {
        "creates": world.create,
        "deletes": lambda: world.controller.delete("pvc-1"),
        "removes orphans": lambda: world.controller.remove_orphans("pvc-1"),
        "mends": lambda: world.controller.mend(no_lock, lambda: False),
    }
    with suppress(DriverError):
        calls[does]()
    assert world.spec()["state"] == "Ready"
    assert world.claim()["metadata"].get("deletionTimestamp") is None
    assert world.holders() == (["one"] if meanwhile is not _made else [])


def test_another_record_of_the_name_is_not_removed_by_an_old_deletion(world: World) -> None:
    world.create()
    earlier = known(world)
    world.controller.delete("pvc-1")
    world.create()
    world.records.remove(earlier)
    assert world.spec()["state"] == "Ready"


@pytest.mark.parametrize("deleting", [False, True])
def test_the_look_waits_for_no_holder_that_stays(tmp_path: Path, *, deleting: bool) -> None:
    """Many of them on one node would keep the volumes of another one from their holders."""
    world = World(tmp_path, seconds=1e6)
    for name in ("pvc-1", "pvc-2"):
        world.create(name)
        world.controller.publish(name, "one", many_nodes=False)
    world.api.obeys = False
    world.records.change("pvc-1", node="", state="Deleting" if deleting else "Ready")
    uid = end(world, "pvc-2")
    world.controller.mend(no_lock, lambda: False)
    uids = {name_of(each): uid_of(each) for each in world.api.all(POD)}
    assert pod_name("pvc-1", "one") in uids
    assert uids[pod_name("pvc-2", "one")] != uid


def test_a_holder_that_has_ended_and_is_going_is_waited_for(world: World) -> None:
    world.create()
    world.controller.publish("pvc-1", "one", many_nodes=False)
    uid = end(world, "pvc-1")
    world.api.obeys = False
    world.api.remove(POD, pod_name("pvc-1", "one"), NAMESPACE)
    world.api.written()
    world.controller.mend(no_lock, lambda: False)
    assert not world.api.written()
    world.api.lose(POD, pod_name("pvc-1", "one"), NAMESPACE)
    world.controller.mend(no_lock, lambda: False)
    assert [uid_of(each) != uid for each in world.api.all(POD)] == [True]


def test_a_holder_that_has_ended_and_that_nobody_wants_only_goes(world: World) -> None:
    world.create()
    world.controller.publish("pvc-1", "one", many_nodes=False)
    end(world, "pvc-1")
    world.records.change("pvc-1", node="")
    world.controller.mend(no_lock, lambda: False)
    assert not world.api.all(POD)


def header_copy(world: World, volume_id: str) -> None:
    """A copy of its header, of long ago."""

    def put(path: str) -> None:
        Path(path).write_bytes(volume_id.encode())

    world.node.keep_header_copy(volume_id, put)
    old = {"metadata": {"creationTimestamp": "2020-01-01T00:00:00Z"}}
    for each in world.api.all(HEADER_PIECE):
        world.api.change(HEADER_PIECE, name_of(each), old, NAMESPACE)


def test_a_volume_that_cannot_be_mended_keeps_no_other_from_it(world: World) -> None:
    """Else one holder that a quota forbids would leave all volumes sorted behind it without theirs."""
    holders = [pod_name(volume_id, "one") for volume_id in ("pvc-1", "pvc-2")]
    for volume_id in ("pvc-1", "pvc-2"):
        world.create(volume_id)
        world.controller.publish(volume_id, "one", many_nodes=False)
        world.api.lose(POD, pod_name(volume_id, "one"), NAMESPACE)
    header_copy(world, "pvc-2")
    world.records.change("pvc-2", header=None)
    said = ["no room"]

    def refuse(call: Call) -> None:
        if call == Call("create", POD, holders[0]):
            raise PermissionDenied(said[-1])

    world.api.before = refuse
    with told_lines() as told:
        for reason in ("no room", "no room", "another reason"):
            said.append(reason)
            world.controller.mend(no_lock, lambda: False)
            world.controller.mend(busy, lambda: False)
            assert [name_of(each) for each in world.api.all(POD)] == holders[1:]
        assert not world.api.all(HEADER_PIECE), "it went no further"
        world.api.before = lambda _: None
        world.controller.mend(no_lock, lambda: False)
        assert sorted(name_of(each) for each in world.api.all(POD)) == sorted(holders)
        world.api.lose(POD, holders[0], NAMESPACE)
        world.api.before = refuse
        world.controller.mend(no_lock, lambda: False)
    assert {(each.level, each.event, each.fields["volume_id"]) for each in told} == {
        ("warning", "a volume cannot be mended", "pvc-1")
    }
    assert [each.fields["error"] for each in told] == ["no room", "another reason", "another reason"]


@pytest.mark.parametrize("kind", ["kept meanwhile", "mended meanwhile"])
def test_a_header_copy_that_a_record_points_to_by_now_stays(world: World, kind: str) -> None:
    """A look may take an hour: holders that do not end take a minute each."""
    for volume_id in ("pvc-1", "pvc-2"):
        world.create(volume_id)
        world.controller.publish(volume_id, "one", many_nodes=False)
    world.api.lose(POD, pod_name("pvc-1", "one"), NAMESPACE)
    if kind == "mended meanwhile":
        header_copy(world, "pvc-2")
        world.api.change(VOLUME_RECORD, "pvc-2", {"spec": {"state": "Newer"}}, NAMESPACE)

    def meanwhile(call: Call) -> None:
        if (call.verb, call.kind) == ("create", POD):
            world.api.before = lambda _: None
            if kind == "kept meanwhile":
                header_copy(world, "pvc-2")
            else:
                world.api.change(VOLUME_RECORD, "pvc-2", {"spec": {"state": "Ready"}}, NAMESPACE)

    world.api.before = meanwhile
    world.controller.mend(no_lock, lambda: False)
    assert world.node.header_copy("pvc-2").read_bytes() == b"pvc-2"


def test_a_fetched_header_copy_goes_with_the_next_one_and_with_the_volume(world: World) -> None:
    """A key slot that was taken away since may be in it."""
    world.create()
    header_copy(world, "pvc-1")
    fetched = world.node.header_copy("pvc-1")
    assert fetched.exists()
    header_copy(world, "pvc-1")
    assert not fetched.exists()
    fetched = world.controller.header_copy("pvc-1")
    world.controller.delete("pvc-1")
    assert not fetched.exists()


def test_a_record_that_cannot_be_read_keeps_its_header_copy_and_keeps_nobody_from_being_mended(world: World) -> None:
    """It may be a newer driver's, and points to that copy."""
    for volume_id in ("pvc-1", "pvc-2"):
        world.create(volume_id)
        world.controller.publish(volume_id, "one", many_nodes=False)
        header_copy(world, volume_id)
    world.api.lose(POD, pod_name("pvc-2", "one"), NAMESPACE)
    world.api.change(VOLUME_RECORD, "pvc-1", {"spec": {"state": "Newer"}}, NAMESPACE)
    with told_lines() as told:
        for _ in range(2):
            world.controller.mend(no_lock, lambda: False)
    assert len(world.holders()) == 2
    assert [each.event for each in told] == ["a volume cannot be mended"]
    assert "the VolumeRecord luks/pvc-1 cannot be read" in told[0].fields["error"]
    world.api.change(VOLUME_RECORD, "pvc-1", {"spec": {"state": "Ready"}}, NAMESPACE)
    assert world.node.header_copy("pvc-1").read_bytes() == b"pvc-1"
    world.api.lose(VOLUME_RECORD, "pvc-2", NAMESPACE)
    world.controller.mend(no_lock, lambda: False)
    assert [name_of(each).partition(".")[0] for each in world.api.all(HEADER_PIECE)] == ["pvc-1"]


def test_what_could_not_be_made_goes_though_nobody_asks_again(world: World) -> None:
    world.api.binds = False
    with pytest.raises(Aborted):
        world.create()
    world.api.change(
        CLAIM, name_for("pvc-1"), {"metadata": {"finalizers": ["kubernetes.io/pvc-protection"]}}, NAMESPACE
    )
    world.api.tell(world.claim(), "rpc error: code = InvalidArgument desc = block is not supported")
    with pytest.raises(FailedPrecondition, match=r"must have raw block"):
        world.create()
    world.controller.mend(no_lock, lambda: False)
    assert world.spec()["state"] == "Deleting"
    world.api.change(CLAIM, name_for("pvc-1"), {"metadata": {"finalizers": []}}, NAMESPACE)
    world.controller.mend(busy, lambda: False)
    assert world.spec()["state"] == "Deleting"
    world.controller.mend(no_lock, lambda: False)
    assert not world.api.all(VOLUME_RECORD)
    assert not world.api.all(CLAIM)


def test_what_an_earlier_boot_left_goes_when_a_node_starts(world: World) -> None:
    def pin(volume_id: str, boot: str) -> Pin:
        return Pin(volume_id=volume_id, boot_id=boot, major=7, minor=7, disk=1, holder="uid", ticket="ticket")

    for each in (pin("pvc-1", boot_id()), pin("pvc-2", "an earlier one")):
        world.pins.put(each)
    folder = world.pins.socket("pvc-1").parent
    (folder / "newer.json").write_text('{"of": "a newer driver"}')
    world.pins.socket("pvc-2").touch()
    before = set(folder.iterdir())
    world.node.prepare()
    assert {path.stem for path in before - set(folder.iterdir())} == {digest("pvc-2")}
    assert len(list(folder.iterdir())) == 2


def test_a_record_hears_of_a_device_that_was_let_go_of_while_the_api_was_away(world: World) -> None:
    world.create()
    world.controller.publish("pvc-1", "one", many_nodes=False)
    world.stage()
    pin = Pin(volume_id="pvc-1", boot_id=boot_id(), major=7, minor=7, disk=1, holder="uid", ticket="ticket")
    world.pins.put(pin)
    assert world.node.ids() == ["pvc-1"]

    def away(_: Call) -> None:
        raise Unavailable("the API is away")

    world.api.before = away
    world.node.detach("pvc-1")
    assert not world.node.ids()
    assert world.node.has("pvc-1")
    world.api.before = lambda _: None
    with pytest.raises(FailedPrecondition, match=r"it may be open there"):
        world.controller.unpublish("pvc-1", "one")
    world.node.mend(busy, lambda: False)
    world.node.mend(no_lock, lambda: False)
    assert not world.node.has("pvc-1")
    world.controller.unpublish("pvc-1", "one")


def test_on_a_full_disk_a_device_is_let_go_of_once_its_record_can_be_told(world: World) -> None:
    """A full disk is why kubelet ends pods: their volumes must be free for other nodes."""
    world.create()
    world.controller.publish("pvc-1", "one", many_nodes=False)
    world.stage()
    world.pins.put(Pin(volume_id="pvc-1", boot_id=boot_id(), major=7, minor=7, disk=1, holder="uid", ticket="ticket"))

    def away(_: Call) -> None:
        raise Unavailable("the API is away")

    with full_disk():
        world.api.before = away
        for _ in range(2):
            with pytest.raises(Unavailable, match="the API is away"):
                world.node.detach("pvc-1")
        world.api.before = lambda _: None
        world.node.detach("pvc-1")
    assert not world.node.has("pvc-1")
    world.controller.unpublish("pvc-1", "one")


def test_a_device_that_something_is_on_is_not_said_to_be_let_go_of(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a stage that failed beside a mapping of an earlier one: the controller would take the device away."""
    world.create()
    world.controller.publish("pvc-1", "one", many_nodes=False)
    world.stage()
    world.pins.put(Pin(volume_id="pvc-1", boot_id=boot_id(), major=7, minor=7, disk=1, holder="uid", ticket="ticket"))
    used = [True]
    device = partial(os.open, "/dev/null", os.O_RDONLY)
    monkeypatch.setattr(world.devices, "device_of", lambda _: Handle(device(), "/dev/loop7"))
    monkeypatch.setattr("csi_driver.host.blockdev.is_claimed", lambda _: used[0])
    with pytest.raises(DeviceInUse, match=r"volume pvc-1 cannot be let go of: a mapping or mount is on its device"):
        world.node.detach("pvc-1")
    assert world.node.ids() == ["pvc-1"]
    with pytest.raises(FailedPrecondition, match=r"it may be open there"):
        world.controller.unpublish("pvc-1", "one")
    used[0] = False
    world.node.detach("pvc-1")
    world.controller.unpublish("pvc-1", "one")


def test_a_later_attachment_is_not_taken_for_the_one_that_was_let_go_of(world: World) -> None:
    world.create()
    world.controller.publish("pvc-1", "one", many_nodes=False)
    world.pins.put(
        Pin(volume_id="pvc-1", boot_id=boot_id(), major=7, minor=7, disk=1, holder="uid", ticket="an earlier one")
    )
    world.stage()
    world.node.detach("pvc-1")
    assert world.spec()["staged"]["ticket"] == "ticket"


def each_step(world: World, act: Callable[[], object], after: Callable[[], None]) -> int:
    """Kill `act` before each of its writes, until it is done without; `after` says what must be so then."""
    for number in range(50):
        left = [number]

        def before(call: Call, left: list[int] = left) -> None:
            if call.verb == "get":
                return
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        world.api.before = before
        with suppress(Killed):
            act()
            world.api.before = lambda _: None
            return number
        world.api.before = lambda _: None
        after()
    raise AssertionError("it never ends")


def test_killed_at_each_step_a_volume_comes_to_a_node_and_goes_again(world: World) -> None:
    def checked() -> None:
        for pod in world.api.all(POD):
            assert world.spec()["node"] == pod["spec"]["nodeName"] or not world.spec().get("staged")

    world.create()
    for _ in range(2):
        assert each_step(world, lambda: world.controller.publish("pvc-1", "one", many_nodes=False), checked) == 2
        assert world.holders() == ["one"]
        assert each_step(world, lambda: world.controller.unpublish("pvc-1", "one"), checked) == 2
        assert not world.holders()
    steps = each_step(world, lambda: world.controller.delete("pvc-1"), lambda: None)
    assert steps >= 3
    assert not world.api.all(VOLUME_RECORD)
    assert not world.api.all(CLAIM)


# --- what many volumes cost ------------------------------------------------------------------------------------------


def test_all_volumes_are_listed_by_one_question(world: World, tmp_path: Path) -> None:
    """csi-attacher lists them once a minute."""
    for number in range(5):
        world.create(f"pvc-{number}")
    world.controller.publish("pvc-3", "one", many_nodes=False)
    world.api.change(VOLUME_RECORD, "pvc-4", {"spec": {"record": "{"}}, NAMESPACE)
    settings = Settings(node_id="c", backend="csi", driver_name=DRIVER, state_dir=tmp_path / "state")
    provisioning = build_driver(settings, Host(backend=world.controller)).provisioning
    asked: list[Call] = []
    world.api.before = asked.append
    views, token = provisioning.list(0, "")
    assert not asked, "each volume was asked for"
    assert not token
    assert [view.record.id for view in views] == ["pvc-0", "pvc-1", "pvc-2", "pvc-3"]
    assert [list(view.published) for view in views] == [[], [], [], ["one"]]
    page, token = provisioning.list(2, "")
    assert [view.record.id for view in page] == ["pvc-0", "pvc-1"]
    assert [view.record.id for view in provisioning.list(0, token)[0]] == ["pvc-2", "pvc-3"]


def test_who_waits_looks_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty calls that wait for holder pods at once must leave the API, and the node, something to do it with."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("csi_driver.backends.csirecords.time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    assert list(looks(0.0)) == [True]
    seen = list(looks(60.0))
    assert seen == [*([False] * (len(seen) - 1)), True]
    assert 30 < len(seen) < 40
    assert 60 <= now[0] < 63


# --- records and headers ---------------------------------------------------------------------------------------------


def test_an_update_is_seen_to_be_of_the_newest_record_whatever_else_was_written(world: World) -> None:
    first = world.create()
    world.controller.publish("pvc-1", "one", many_nodes=False)
    second = world.node.update(msgspec.structs.replace(first, file_system=FileSystemState.RAW))
    assert world.controller.get("pvc-1") == second
    with pytest.raises(Aborted, match=r"changed by another writer"):
        world.node.update(first)
    assert world.spec()["node"] == "one"


@pytest.mark.parametrize("damage", [{"spec": {"state": "Odd"}}, {"spec": {"record": "{"}}, {"spec": {"record": "{}"}}])
def test_a_record_that_cannot_be_read_is_refused_and_left(world: World, damage: Json) -> None:
    world.create()
    world.create("pvc-2")
    world.api.change(VOLUME_RECORD, "pvc-1", damage, NAMESPACE)
    with pytest.raises(FailedPrecondition, match=r"VolumeRecord luks/pvc-1 cannot be read"):
        world.controller.get("pvc-1")
    assert world.controller.get("pvc-2").id == "pvc-2"
    assert "pvc-2" in world.controller.ids()
    other = world.spec("pvc-2")["record"]
    world.api.change(VOLUME_RECORD, "pvc-1", {"spec": {"record": other, "state": "Ready"}}, NAMESPACE)
    with pytest.raises(FailedPrecondition, match=r"is that of volume pvc-2"):
        world.controller.get("pvc-1")


def test_header_copies_of_any_size_come_in_pieces_and_damage_is_told(world: World) -> None:
    import os

    world.create()
    small, large = os.urandom(300_000), os.urandom(2_200_000)

    def put(content: bytes) -> Callable[[str], None]:
        def write(path: str) -> None:
            Path(path).write_bytes(content)

        return write

    for content in (small, large, small):
        world.node.keep_header_copy("pvc-1", put(content))
        assert world.node.header_copy("pvc-1").read_bytes() == content
    assert world.node.has_header_copy("pvc-1")
    pieces = world.api.all(HEADER_PIECE)
    assert len(pieces) > 4
    assert all(len(str(each)) < 1_000_000 for each in pieces)
    with pytest.raises(ResourceExhausted, match=r"take key slots away that nobody needs"):
        world.node.keep_header_copy("pvc-1", put(os.urandom(6_000_000)))
    old = {"metadata": {"creationTimestamp": "2020-01-01T00:00:00Z"}}
    for each in world.api.all(HEADER_PIECE):
        world.api.change(HEADER_PIECE, name_of(each), old, NAMESPACE)
    world.controller.mend(no_lock, lambda: False)
    assert len(world.api.all(HEADER_PIECE)) == world.spec()["header"]["pieces"]
    assert world.node.header_copy("pvc-1").read_bytes() == small
    world.api.change(HEADER_PIECE, name_of(world.api.all(HEADER_PIECE)[0]), {"spec": {"content": "AAAA"}}, NAMESPACE)
    with pytest.raises(FailedPrecondition, match=r"the copy of the header of volume pvc-1 is damaged"):
        world.node.header_copy("pvc-1")
    world.controller.delete("pvc-1")
    assert not world.api.all(HEADER_PIECE)


def test_names_that_no_object_can_have_become_other_ids(world: World) -> None:
    made = [world.controller.id_for(name, PARAMETERS) for name in ("pvc-1", "a..b", "a-.b", "a.", "A", "x" * 200)]
    assert made[0] == "pvc-1"
    assert all(each.startswith("x-") for each in made[1:])
    assert len(set(made)) == len(made)


def test_where_it_is_is_kept_for_commands(tmp_path: Path) -> None:
    kept = Place.of(Settings(node_id="one", driver_name=DRIVER), NAMESPACE)
    kept.write(tmp_path / "csi.json", Files())
    assert read_place(tmp_path / "csi.json") == kept
    for content in (b"", b"{}", b"[]"):
        (tmp_path / "csi.json").write_bytes(content)
        with pytest.raises(FailedPrecondition, match=r"csi.json cannot be read; start the server with --backend csi"):
            read_place(tmp_path / "csi.json")


@pytest.mark.parametrize("services", [(Service.CONTROLLER,), (Service.NODE,)], ids=str)
def test_a_command_beside_a_server_is_what_that_is(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, services: tuple[Service, ...]
) -> None:
    """`luks-csi volume manifest`, beside the controller, reads what only a controller knows."""
    world.create()
    monkeypatch.setattr(world.api, "namespace", NAMESPACE, raising=False)
    monkeypatch.setattr("csi_driver.kube.client.Kube.of", lambda: world.api)
    settings = Settings(
        node_id="one", backend="csi", driver_name=DRIVER, namespace=NAMESPACE, services=frozenset(services),
        state_dir=tmp_path / "state",
    )  # fmt: skip
    (tmp_path / "state").mkdir()
    make_backend(settings, Host()).prepare()
    beside = make_backend(Settings(state_dir=settings.state_dir), Host())
    assert beside.name == "csi"
    assert beside.get("pvc-1") == record()
    assert list(beside.ids()) == (["pvc-1"] if Service.CONTROLLER in services else [])


def test_the_limit_of_the_driver_below_is_ours(world: World) -> None:
    assert world.node.most_volumes() == 0
    drivers: list[Json] = [
        {"name": "other", "allocatable": {"count": 3}},
        {"name": "below.test", "allocatable": {"count": 7}},
    ]
    world.api.put(CSI_NODE, {"metadata": {"name": "one"}, "spec": {"drivers": drivers}})
    assert world.node.most_volumes() == 7
    del drivers[1]["allocatable"]
    world.api.change(CSI_NODE, "one", {"spec": {"drivers": drivers}})
    assert world.node.most_volumes() == 0
