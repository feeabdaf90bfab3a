"""Volumes without a holder pod: what the controller lets be so, what a node does around the calls, and how it calls."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from csi_driver.backends.csibelow import read_direct
from csi_driver.backends.csiclaims import name_for
from csi_driver.backends.csidevice import HeldDevice
from csi_driver.backends.csidirect import DirectDevices, NodeBelow, nobody_calls
from csi_driver.backends.csinode import NodeDevices
from csi_driver.backends.csipins import Direct, Pin
from csi_driver.kube.kinds import CLAIM, CSI_DRIVER, POD, VOLUME, VOLUME_RECORD, Json
from csi_driver.model.errors import (
    Aborted,
    CommandFailed,
    DriverError,
    FailedPrecondition,
    Unavailable,
)
from csi_driver.model.volume import VolumeRecord
from tests.unit.test_csi_backend import DRIVER, NAMESPACE, SIZE, World, busy, full_disk, no_lock, record

VOLUME_ID = "pvc-1"
DIRECT = Direct(driver="below.test", handle="x", context={"of": "the class"})


def of_class() -> VolumeRecord:
    made = record()
    return msgspec.structs.replace(made, parameters=msgspec.structs.replace(made.parameters, backing_attach="direct"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.api.put(CSI_DRIVER, {"metadata": {"name": "below.test"}, "spec": {"attachRequired": False}})
    made.api.below = {"driver": "below.test", "volumeHandle": "x", "volumeAttributes": {"of": "the class"}}
    return made


# --- the controller --------------------------------------------------------------------------------------------------


def test_a_node_is_given_the_volume_without_a_holder(world: World) -> None:
    world.controller.create(of_class(), SIZE)
    assert world.spec()["direct"] == {"driver": "below.test", "handle": "x", "context": {"of": "the class"}}
    for _ in range(2):
        assert world.controller.publish(VOLUME_ID, "one", many_nodes=False) == {"driver": "below.test"}
    with pytest.raises(FailedPrecondition, match=r"node one has it"):
        world.controller.publish(VOLUME_ID, "two", many_nodes=False)
    world.controller.mend(no_lock, lambda: False)
    assert not world.api.all(POD)
    world.stage()
    with pytest.raises(FailedPrecondition, match=r"cannot be taken from node one: it may be open there"):
        world.controller.unpublish(VOLUME_ID, "one")
    world.records.change(VOLUME_ID, staged=None)
    world.controller.unpublish(VOLUME_ID, "one")
    world.controller.publish(VOLUME_ID, "two", many_nodes=False)
    world.controller.unpublish(VOLUME_ID, "")
    world.controller.delete(VOLUME_ID)
    assert not world.api.all(CLAIM)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({}, r"wants its volumes attached \(attachRequired: true\)"),
        ({"attachRequired": True}, r"wants its volumes attached \(attachRequired: true\)"),
        (None, r"wants its volumes attached \(it has no CSIDriver object\)"),
        ({"attachRequired": False, "podInfoOnMount": True}, r"wants to know the pod that uses a volume"),
        (
            {"attachRequired": False, "tokenRequests": [{"audience": "x"}]},
            r"wants tokens of the pod that uses a volume",
        ),
        ({"attachRequired": False, "requiresRepublish": True}, r"wants its volumes to be published again and again"),
    ],
)
def test_a_driver_that_asks_for_more_than_calls_is_refused_before_anything_is_made(
    world: World, spec: Json | None, why: str
) -> None:
    world.api.lose(CSI_DRIVER, "below.test")
    if spec is not None:
        world.api.put(CSI_DRIVER, {"metadata": {"name": "below.test"}, "spec": spec})
    with pytest.raises(FailedPrecondition, match=rf"{why}, and that only Kubernetes does; leave backingAttach out"):
        world.controller.create(of_class(), SIZE)
    assert not world.api.all(VOLUME_RECORD)
    world.controller.create(record(), SIZE)  # by a holder it works


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ({"nodeStageSecretRef": {"name": "a"}}, r"needs a secret on its node \(nodeStageSecretRef\), and secrets of"),
        ({"nodePublishSecretRef": {"name": "a"}}, r"needs a secret on its node \(nodePublishSecretRef\)"),
        ({"nodeExpandSecretRef": {"name": "a"}}, r"needs a secret on its node \(nodeExpandSecretRef\)"),
        ({"readOnly": True}, r"is read-only"),
    ],
)
def test_a_volume_that_asks_for_more_than_calls_is_refused_and_given_back(world: World, source: Json, why: str) -> None:
    world.api.below |= source
    with pytest.raises(FailedPrecondition, match=rf"direct: the volume pv-luks-pvc-1 below {why}"):
        world.controller.create(of_class(), SIZE)
    assert not world.api.all(VOLUME_RECORD)
    assert not world.api.all(CLAIM)
    with pytest.raises(FailedPrecondition, match=r"is of no CSI driver"):
        read_direct("pvc-1", {"metadata": {"name": "pv"}, "spec": {"local": {}}})


def test_what_is_below_is_compared_with_the_record_before_a_node_is_told(world: World) -> None:
    world.controller.create(of_class(), SIZE)
    world.api.change(VOLUME, "pv-luks-pvc-1", {"spec": {"csi": {"volumeHandle": "another"}}})
    sentence = r"says that pv-luks-pvc-1 below is volume x of below.test, and the PersistentVolume of that name is"
    with pytest.raises(FailedPrecondition, match=sentence):
        world.controller.publish(VOLUME_ID, "one", many_nodes=False)
    world.api.lose(VOLUME, "pv-luks-pvc-1")
    with pytest.raises(FailedPrecondition, match=sentence):
        world.controller.publish(VOLUME_ID, "one", many_nodes=False)
    assert not world.spec().get("node")


def test_a_growth_is_said_to_be_done_of_the_claim_below_as_kubelet_says_it(world: World) -> None:
    """Else its resizer waits for a kubelet for ever, and enlarges it no further."""
    world.controller.create(of_class(), SIZE)
    claim = name_for(VOLUME_ID)
    world.api.change(CLAIM, claim, {"status": {"capacity": {"storage": str(SIZE)}}}, NAMESPACE)
    with pytest.raises(Aborted, match=r"is being enlarged from"):
        world.controller.grow(VOLUME_ID, 2 * SIZE)
    world.api.change(VOLUME, "pv-luks-pvc-1", {"spec": {"capacity": {"storage": "32Mi"}}})
    with pytest.raises(Aborted, match=r"its own driver, which has not said yet that it is done"):
        world.controller.grow(VOLUME_ID, 2 * SIZE)
    other = {"type": "ModifyingVolume", "status": "True"}
    waiting = {
        "allocatedResourceStatuses": {"storage": "NodeResizePending"},
        "conditions": [other, {"type": "FileSystemResizePending", "status": "True"}],
    }
    world.api.change(CLAIM, claim, {"status": waiting}, NAMESPACE)
    world.controller.grow(VOLUME_ID, 2 * SIZE)
    status = world.claim()["status"]
    assert status["capacity"]["storage"] == "32Mi"
    assert not status["allocatedResourceStatuses"]
    assert status["conditions"] == [other]
    assert world.spec()["size"] == 2 * SIZE
    # One whose nodes have nothing to do its resizer ends itself.
    done = {"status": {"capacity": {"storage": "48Mi"}}}
    world.api.change(VOLUME, "pv-luks-pvc-1", {"spec": {"capacity": {"storage": "48Mi"}}})
    world.api.change(CLAIM, claim, done, NAMESPACE)
    world.api.written()
    world.controller.grow(VOLUME_ID, 3 * SIZE)
    assert [str(call.kind) for call in world.api.written()] == ["VolumeRecord"]


# --- a node ----------------------------------------------------------------------------------------------------------


class Below:
    """A driver below whose device is /dev/null; `fails` is raised by the call of that name."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: dict[str, DriverError] = {}
        self.size = SIZE
        self.stages = True

    def _called(self, name: str, path: Path | None) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise self.fails[name]
        assert path is None or path.parent.is_dir()

    def stage(self, staging: Path) -> bool:
        assert staging.is_dir()
        self._called("stage", staging)
        return self.stages

    def publish(self, staging: Path | None, target: Path) -> None:
        assert (staging is not None) == self.stages
        self._called("publish", target)
        target.touch()

    def unpublish(self, target: Path) -> None:
        self._called("unpublish", None)

    def unstage(self, staging: Path) -> None:
        self._called("unstage", None)

    def expand(self, staging: Path, target: Path, size: int) -> None:
        self._called("expand", target)
        self.size = size

    def asked(self) -> list[str]:
        calls, self.calls = self.calls, []
        return calls


class Devices(DirectDevices):
    """Shows /dev/null: this host has no block device that a test may use."""

    @staticmethod
    def _opened(volume_id: str, direct: Direct, target: Path) -> HeldDevice:  # noqa: ARG004 - not called
        assert target.exists()
        return HeldDevice(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), "/dev/null", volume_id)


class Node:
    """The node `one` with a volume that is given to it, and a clock."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.below, self.now = world, Below(), 0.0
        world.controller.create(of_class(), SIZE)
        world.controller.publish(VOLUME_ID, "one", many_nodes=False)

        @contextmanager
        def call(volume_id: str, direct: Direct, seconds: float) -> Iterator[NodeBelow]:
            assert (volume_id, direct, seconds) == (VOLUME_ID, DIRECT, 60.0)
            yield self.below

        self.folder = folder / "plugins" / "kubernetes.io" / "csi" / "volumeDevices"
        self.direct = Devices(call, folder, DRIVER)
        self.devices = NodeDevices(
            world.api, world.records, world.pins, self.direct, "one", "", 0.0, clock=lambda: self.now
        )

    def places(self) -> list[Path]:
        return [*self.folder.glob("*/*")]


@pytest.fixture
def node(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    made = Node(world, tmp_path / "kubelet")
    monkeypatch.setattr("csi_driver.host.blockdev.size_bytes", lambda _: made.below.size)
    return made


def test_calls_come_in_their_order_and_what_they_were_told_is_gone_behind_them(node: Node) -> None:
    for stages in (True, False):
        node.below.stages = stages
        with node.devices.attach(VOLUME_ID) as device:
            assert isinstance(device, HeldDevice)
        assert node.below.asked() == ["stage", "publish"]
        (staging,) = node.folder.glob("staging/*")
        assert staging.name.startswith(f"{DRIVER}_")
        assert node.devices.ids() == [VOLUME_ID]
        assert node.world.spec()["staged"]["device"] == str(node.direct.target(VOLUME_ID))
        node.devices.detach(VOLUME_ID)
        assert node.below.asked() == ["unpublish", "unstage"]
        assert not node.places()
        assert not node.devices.is_known(VOLUME_ID)
        assert node.world.spec().get("staged") is None


def test_a_node_is_told_of_a_growth_and_enlarges_the_device(node: Node) -> None:
    node.world.records.change(VOLUME_ID, size=2 * SIZE)
    with node.devices.attach(VOLUME_ID):
        assert node.below.asked() == ["stage", "publish", "expand"]
    node.world.records.change(VOLUME_ID, size=3 * SIZE)
    with HeldDevice(os.open("/dev/null", os.O_RDWR), "/dev/null", VOLUME_ID) as device:
        node.devices.check_size(device)
        assert node.below.size == 3 * SIZE
        node.below.fails["expand"] = CommandFailed("no")
        node.world.records.change(VOLUME_ID, size=4 * SIZE)
        with pytest.raises(CommandFailed):
            node.devices.check_size(device)


def test_after_an_error_that_ends_it_everything_is_put_down_and_after_others_nothing(node: Node) -> None:
    node.below.fails["publish"] = Unavailable("away")
    with pytest.raises(Unavailable):
        node.devices.attach(VOLUME_ID)
    assert node.below.asked() == ["stage", "publish"]
    assert node.world.spec()["staged"]
    assert not node.devices.ids()
    node.below.fails["publish"] = FailedPrecondition("never")
    with pytest.raises(FailedPrecondition, match="never"):
        node.devices.attach(VOLUME_ID)
    assert node.below.asked() == ["stage", "publish", "unpublish", "unstage"]
    assert node.world.spec().get("staged") is None
    assert not node.places()


def test_what_could_not_be_put_down_is_put_down_later_whoever_asks(node: Node) -> None:
    node.below.fails |= {"publish": FailedPrecondition("never"), "unstage": Unavailable("away")}
    with pytest.raises(FailedPrecondition, match="never"):
        node.devices.attach(VOLUME_ID)
    assert node.world.spec()["staged"], "nobody knows whether it is free"
    node.devices.mend(busy, lambda: False)
    node.devices.mend(no_lock, lambda: True)
    node.devices.mend(no_lock, lambda: False)
    assert node.world.spec()["staged"]
    del node.below.fails["unstage"]
    node.devices.mend(no_lock, lambda: False)
    assert node.world.spec().get("staged") is None
    assert not node.places()
    assert not node.devices.is_known(VOLUME_ID)


def test_on_a_full_disk_a_volume_is_put_down_below_all_the_same(node: Node) -> None:
    with node.devices.attach(VOLUME_ID):
        pass
    with full_disk():
        node.devices.detach(VOLUME_ID)
    assert node.world.spec().get("staged") is None
    assert not node.devices.is_known(VOLUME_ID)
    assert not node.places()


def test_a_stage_that_kubelet_has_forgotten_is_put_down_and_one_that_it_repeats_is_not(node: Node) -> None:
    node.below.fails["stage"] = Unavailable("still at work")
    for _ in range(3):
        with pytest.raises(Unavailable):
            node.devices.attach(VOLUME_ID)
        node.now += 500
        node.devices.mend(no_lock, lambda: False)
    assert node.below.asked() == ["stage"] * 3
    node.now += 101
    node.devices.mend(no_lock, lambda: False)
    assert node.below.asked() == ["unpublish", "unstage"]
    assert node.world.spec().get("staged") is None


def test_nothing_is_remembered_of_a_volume_that_is_gone(node: Node) -> None:
    node.devices.attach(VOLUME_ID).close()
    node.below.fails["unpublish"] = Unavailable("away")
    with pytest.raises(Unavailable):
        node.devices.detach(VOLUME_ID)
    node.devices.mend(no_lock, lambda: False)
    remembered = {name: kept for name, kept in vars(node.devices).items() if isinstance(kept, dict) and kept}
    assert remembered.keys() == {"_asked", "_said"}
    node.below.fails.clear()
    node.devices.detach(VOLUME_ID)
    assert {name: kept for name, kept in vars(node.devices).items() if isinstance(kept, dict) and kept} == {}


def test_what_is_still_shown_behind_its_end_is_an_error(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.devices.attach(VOLUME_ID).close()

    def busy_mount(_: Path) -> None:
        raise OSError(16, "busy")

    monkeypatch.setattr("csi_driver.backends.csidirect._remove", busy_mount)
    with pytest.raises(
        CommandFailed, match=r"says that the volume is unpublished and \S+/device is still there \(EBUSY"
    ):
        node.devices.detach(VOLUME_ID)
    assert node.world.spec()["staged"]


def test_a_pin_of_an_earlier_boot_is_kept_only_where_a_driver_was_called(world: World) -> None:
    old = Pin(volume_id="pvc-1", boot_id="an earlier one", ticket="t", direct=DIRECT)
    world.pins.put(old)
    world.pins.put(msgspec.structs.replace(old, volume_id="pvc-2", direct=None))
    world.pins.prepare()
    assert world.pins.all_left() == [old]
    assert world.pins.get("pvc-1") is None
    assert not world.pins.all()
    assert not world.devices.is_known("pvc-1")


def test_who_is_not_to_call_a_driver_says_so(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"cannot be attached by this program: only the driver's server"):
        DirectDevices(nobody_calls, tmp_path, DRIVER).take("pvc-1", DIRECT)
    (tmp_path / "file").touch()
    with pytest.raises(FailedPrecondition, match=r"cannot be made \(ENOTDIR.*--kubelet-dir must name it"):
        DirectDevices(nobody_calls, tmp_path / "file", DRIVER).take("pvc-1", DIRECT)
