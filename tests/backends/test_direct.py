"""Volumes over a driver that nodes call: cut at each step, over a reboot, and below a driver that fails."""

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from csi_driver.backends.csi import CsiBackend
from csi_driver.backends.csidirect import DirectDevices
from csi_driver.host.handle import Handle
from csi_driver.kube.kinds import POD, VOLUME_RECORD
from csi_driver.model.errors import (
    DeadlineExceeded,
    DeviceAbsent,
    DeviceMismatch,
    DriverError,
    FailedPrecondition,
    Unavailable,
)
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc import csi_pb2_grpc
from tests.backends.csirig import DRIVER, NAMESPACE, NODE_ID
from tests.backends.directrig import KIND, NAME, DirectRig
from tests.backends.test_conformance import SIZE, Countdown, Killed, record_of, write
from tests.cluster.below import Devices, Identity
from tests.fake_host import Step, undisturbed

VOLUME = "pvc-1"
TOPOLOGY = f"topology.{DRIVER}/node"


@pytest.fixture
def made(direct_rig: DirectRig) -> DirectRig:
    """One with a volume that is given to the node."""
    backend = direct_rig.plain(TOPOLOGY)
    backend.create(record_of(direct_rig), SIZE)
    assert backend.publish(VOLUME, NODE_ID, many_nodes=False) == {"driver": NAME}
    assert not direct_rig.api.all(POD)
    return direct_rig


def node(rig: DirectRig, step: Step = undisturbed) -> CsiBackend:
    """Its driver, as of a server that has just been started."""
    found = rig.plain(TOPOLOGY, is_node=True, step=step)
    found.prepare()
    return found


@contextmanager
def no_lock(_: str) -> Iterator[None]:
    yield


def staged(rig: DirectRig) -> object:
    found = rig.api.get(VOLUME_RECORD, VOLUME, NAMESPACE)
    assert found is not None
    return found["spec"].get("staged")


def text_of(device: Handle) -> bytes:
    with open(device, "rb") as file:
        return file.read(4)


def check_put_down(rig: DirectRig) -> None:
    """Nobody has it, and so the controller takes it from the node."""
    rig.check_nothing()
    assert staged(rig) is None
    rig.plain(TOPOLOGY).unpublish(VOLUME, NODE_ID)


def at_each_step(rig: DirectRig, act: Callable[[CsiBackend], object], after: Callable[[str], None]) -> list[str]:
    """Kill `act` at each of its steps, of which there are the calls below; `after` says what must be so."""
    seen: list[str] = []
    act(node(rig, seen.append))
    after("undisturbed")
    for number, name in enumerate(seen):
        started = node(rig, step := Countdown())
        step.left = number
        with pytest.raises((Killed, DriverError)):
            act(started)
        after(name)
    return seen


def check_steps(steps: list[str], *calls: str) -> None:
    expected = [f"{when} {call}" for call in calls for when in ("before", "after")]
    assert [step for step in steps if "Node" in step] == expected


def test_killed_at_each_step_of_its_attachment_a_device_comes_with_the_next_call(made: DirectRig) -> None:
    def after(step: str) -> None:
        with node(made).attach(VOLUME, lasting=False) as device:
            write(device, b"text")
        if step != "undisturbed":
            with node(made).attach(VOLUME, lasting=False) as again:
                assert text_of(again) == b"text", step
        node(made).detach(VOLUME)
        made.check_nothing()
        assert staged(made) is None, step

    steps = at_each_step(made, lambda each: each.attach(VOLUME, lasting=False).close(), after)
    check_steps(steps, "NodeStageVolume", "NodePublishVolume")


def test_killed_at_each_step_of_its_attachment_a_device_is_put_down_by_who_unstages(made: DirectRig) -> None:
    def after(step: str) -> None:
        if made.places("publish") and made.places("publish")[0].joinpath("device").is_block_device():
            assert staged(made), f"{step}: the controller would take away what is there"
        node(made).detach(VOLUME)
        check_put_down(made)
        made.plain(TOPOLOGY).publish(VOLUME, NODE_ID, many_nodes=False)

    at_each_step(made, lambda each: each.attach(VOLUME, lasting=False).close(), after)


def test_killed_at_each_step_of_its_end_a_device_is_put_down_before_its_record_says_so(made: DirectRig) -> None:
    def act(each: CsiBackend) -> None:
        node(made).attach(VOLUME, lasting=False).close()
        each.detach(VOLUME)

    def after(step: str) -> None:
        if staged(made) is None:
            assert not made.places("publish"), step
        node(made).mend(no_lock, lambda: False)
        if step.startswith("undisturbed"):
            made.check_nothing()
        node(made).detach(VOLUME)
        made.check_nothing()
        assert staged(made) is None, step

    check_steps(at_each_step(made, act, after), "NodeUnpublishVolume", "NodeUnstageVolume")


def stale(rig: DirectRig) -> None:
    """A reboot behind which a node of the device is still at its place, and another disk has the number."""
    backend = node(rig)
    with backend.attach(VOLUME, lasting=False) as device:
        write(device, b"text")
    rig.restart()
    other = rig.disks / "other"
    with other.open("wb") as file:
        file.truncate(SIZE)
    loop = subprocess.run(
        ["losetup", "--find", "--show", str(other)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    (place,) = rig.places("publish")
    (place / "device").unlink()
    os.mknod(place / "device", 0o60600, os.stat(loop).st_rdev)


class Forgetful(DirectDevices):
    """Takes what is at its place for its own."""

    def is_shown(self, volume_id: str) -> bool:
        return False

    def give_back(self, volume_id: str, direct: object) -> None:
        """Nothing is done."""


def check_replayed(rig: DirectRig) -> None:
    stale(rig)
    try:
        backend = node(rig)
        assert backend.device_of(VOLUME) is None
        with backend.attach(VOLUME, lasting=False) as device:
            assert text_of(device) == b"text", "another disk was taken for the volume's"
    finally:
        node(rig).detach(VOLUME)
        rig.let_go()
        (rig.disks / "other").unlink()


def test_a_reboot_is_followed_by_the_same_calls_and_no_old_node_is_believed(made: DirectRig) -> None:
    check_replayed(made)
    check_put_down(made)


def test_an_old_node_that_is_believed_is_noticed(made: DirectRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "direct", lambda step: Forgetful(made.call(step), made.kubelet, DRIVER))
    with pytest.raises(AssertionError, match="another disk was taken for the volume's"):
        check_replayed(made)
    monkeypatch.undo()
    for place in made.places("publish"):
        (place / "device").unlink(missing_ok=True)


def test_what_an_earlier_boot_asked_for_is_put_down_when_nobody_wants_it_any_more(made: DirectRig) -> None:
    node(made).attach(VOLUME, lasting=False).close()
    made.restart()
    controller = made.plain(TOPOLOGY)
    controller.unpublish(VOLUME, NODE_ID)
    controller.delete(VOLUME)
    assert made.places("publish")
    backend = node(made)
    backend.mend(no_lock, lambda: False)
    made.check_nothing()


def test_a_driver_that_is_away_is_named_and_waited_for(made: DirectRig) -> None:
    where = rf"the driver {NAME} at {made.socket}, below volume pvc-1, cannot be reached; look at its node pod"
    backend = node(made)
    with made.in_place_of_it(), pytest.raises(Unavailable, match=where):
        backend.attach(VOLUME, lasting=False)
    registered = made.kubelet / "plugins_registry"
    registered.rename(registered.with_name("away"))
    registered.mkdir()
    with pytest.raises(Unavailable, match=rf"the driver {NAME} below volume pvc-1 is not registered on this node"):
        backend.attach(VOLUME, lasting=False)
    registered.rmdir()
    registered.with_name("away").rename(registered)
    backend.attach(VOLUME, lasting=False).close()
    with made.in_place_of_it():
        for _ in range(2):
            with pytest.raises(Unavailable, match=where):
                backend.detach(VOLUME)
        with pytest.raises(FailedPrecondition, match=r"may be open there as \S+volumeDevices/publish/\S+/device"):
            made.plain(TOPOLOGY).unpublish(VOLUME, NODE_ID)
        backend.mend(no_lock, lambda: False)
        assert backend.device_of(VOLUME) is None
    backend.mend(no_lock, lambda: False)
    check_put_down(made)


class Strange(Devices):
    """Does at NodePublishVolume what a test says."""

    def __init__(self, rig: DirectRig, publish: Callable[[Path], None]) -> None:
        super().__init__(rig.disks, KIND, "node-1")
        self._publish = publish

    def NodePublishVolume(
        self, request: csi.NodePublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodePublishVolumeResponse:
        self._publish(Path(request.target_path))
        return csi.NodePublishVolumeResponse()

    def NodeUnpublishVolume(
        self, request: csi.NodeUnpublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi.NodeUnpublishVolumeResponse:
        if Path(request.target_path).is_dir():
            return csi.NodeUnpublishVolumeResponse()  # as a driver does that leaves what is no mount
        return super().NodeUnpublishVolume(request, context)


def test_a_driver_that_hangs_is_waited_for_so_long_and_no_longer(
    made: DirectRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "direct", lambda step: DirectDevices(made.call(step), made.kubelet, DRIVER, seconds=3.0))
    go_on = threading.Event()

    def hang(_: Path) -> None:
        go_on.wait()

    with made.in_place_of_it(Identity(KIND), Strange(made, hang)):
        sentence = r"below volume pvc-1, does not answer; look at its node pod, .* \(NodePublishVolume: DEADLINE"
        with pytest.raises(DeadlineExceeded, match=sentence):
            node(made).attach(VOLUME, lasting=False)
        assert staged(made), "the driver below may be at work on it still"
        go_on.set()
    monkeypatch.undo()
    node(made).attach(VOLUME, lasting=False).close()
    node(made).detach(VOLUME)
    check_put_down(made)


@pytest.mark.parametrize(
    ("publish", "kind", "sentence"),
    [
        (lambda target: target.mkdir(), DeviceMismatch, r"/device is a directory: it has no raw block volumes, or"),
        (lambda target: target.touch(), DeviceMismatch, r"/device is a regular file: .* leave backingAttach out"),
        (lambda _: None, DeviceAbsent, r"nothing is at \S+/device: its pod does not share kubelet's folder"),
    ],
)
def test_what_is_no_block_device_is_refused_and_given_back(
    made: DirectRig, publish: Callable[[Path], None], kind: type[DriverError], sentence: str
) -> None:
    with made.in_place_of_it(Identity(KIND), Strange(made, publish)), pytest.raises(kind, match=sentence):
        node(made).attach(VOLUME, lasting=False)
    check_put_down(made)


class Other(csi_pb2_grpc.IdentityServicer):
    """A driver that has taken the place of one that was there."""

    def GetPluginInfo(
        self, request: csi.GetPluginInfoRequest, context: grpc.ServicerContext
    ) -> csi.GetPluginInfoResponse:
        return csi.GetPluginInfoResponse(name="another.test")


def test_a_driver_of_another_name_is_asked_for_nothing(made: DirectRig) -> None:
    asked: list[str] = []

    class Asked(Devices):
        def NodeGetCapabilities(
            self, request: csi.NodeGetCapabilitiesRequest, context: grpc.ServicerContext
        ) -> csi.NodeGetCapabilitiesResponse:
            asked.append("capabilities")
            return super().NodeGetCapabilities(request, context)

    sentence = rf"is of the driver {NAME} and at \S+ answers 'another.test'"
    with (
        made.in_place_of_it(Other(), Asked(made.disks, KIND, "node-1")),
        pytest.raises(FailedPrecondition, match=sentence),
    ):
        node(made).attach(VOLUME, lasting=False)
    assert not asked
    node(made).mend(no_lock, lambda: False)
    check_put_down(made)


def test_a_volume_that_grew_while_it_was_nowhere_has_its_size_on_the_node(made: DirectRig) -> None:
    made.plain(TOPOLOGY).grow(VOLUME, 2 * SIZE)
    with node(made).attach(VOLUME, lasting=False) as device, open(device, "rb") as file:
        assert file.seek(0, os.SEEK_END) == 2 * SIZE
    with suppress(DriverError):
        node(made).detach(VOLUME)
    check_put_down(made)
