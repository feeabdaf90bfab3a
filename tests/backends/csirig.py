"""The backend csi on a cluster that is played: what binds claims, starts holder pods and enlarges devices.

The API is the fake one, the devices are real (loop devices), and so are holders: each is the real program's loop in a
thread, with its socket.
"""

import os
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from csi_driver.backends.csi import CsiBackend
from csi_driver.backends.csiclaims import Claims, name_for
from csi_driver.backends.csidevice import HeldDevice
from csi_driver.backends.csidirect import DirectDevices, nobody_calls
from csi_driver.backends.csiheaders import HeaderCopies
from csi_driver.backends.csiholders import HolderPods, volume_of
from csi_driver.backends.csiholding import hold
from csi_driver.backends.csinode import NodeDevices
from csi_driver.backends.csipins import Pins
from csi_driver.backends.csirecords import Api, RecordObjects
from csi_driver.backends.records import RecordCodec
from csi_driver.host.files import Files
from csi_driver.host.handle import Handle
from csi_driver.host.loop import LoopDevices
from csi_driver.host.workers import Workers
from csi_driver.kube.kinds import (
    CLAIM,
    CSI_DRIVER,
    NODE,
    POD,
    STORAGE_CLASS,
    VOLUME,
    VOLUME_RECORD,
    Json,
    Kind,
    name_of,
)
from csi_driver.model.errors import NotFound
from csi_driver.model.sizes import read_size
from csi_driver.model.volume import VolumeParameters
from tests.fake_host import Step, SteppedFiles, undisturbed
from tests.operator_fakes import Call, FakeApi

NAMESPACE, NODE_ID, BELOW, DRIVER = "luks-csi", "node-1", "below", "luks.csi.internal"
_SECTOR = 512
_END_SECONDS = 30


class Holding:
    """A holder pod at work: the program's own loop, with the loop device of its claim."""

    def __init__(self, volume_id: str, uid: str, file: Path, pins: Pins) -> None:
        self.file = file
        made = subprocess.run(["losetup", "--find", "--show", str(file)], check=True, stdout=subprocess.PIPE, text=True)
        self.device = Path(made.stdout.strip())
        self._loop = LoopDevices().info(str(self.device))
        told, self._tell = os.pipe()
        self._thread = threading.Thread(target=self._run, args=(volume_id, uid, pins, told), daemon=True)
        self._thread.start()

    def _run(self, volume_id: str, uid: str, pins: Pins, told: int) -> None:
        try:
            hold(self.device, volume_id, uid, pins, told)
        finally:
            os.close(told)

    def tell(self) -> None:
        """SIGTERM."""
        if self._tell >= 0:
            os.close(self._tell)
            self._tell = -1

    def has_ended(self) -> bool:
        if self._thread.is_alive():
            return False
        LoopDevices().detach(str(self.device), self._loop)
        return True

    def enlarge(self) -> None:
        subprocess.run(["losetup", "--set-capacity", str(self.device)], check=True)

    def end(self) -> None:
        self.tell()
        self._thread.join(_END_SECONDS)
        assert self.has_ended(), f"the holder of {self.device} does not end"


class Played(FakeApi):
    """The API with what acts on it: provisioner and resizer of the driver below, kubelet with its holder pods."""

    def __init__(self, folder: Path, pins: Pins, driver: str) -> None:
        super().__init__()
        self._folder = folder
        self._driver = driver
        self._pins = pins
        self.running: dict[str, Holding] = {}
        self.put(NODE, {"metadata": {"name": NODE_ID}, "spec": {}, "status": {}})
        self.put(
            STORAGE_CLASS,
            {
                "metadata": {"name": BELOW},
                "provisioner": driver,
                "allowVolumeExpansion": True,
                "volumeBindingMode": "Immediate",
            },
        )
        self.put(CSI_DRIVER, {"metadata": {"name": driver}, "spec": {"attachRequired": False}})

    def file(self, claim: str) -> Path:
        """The ciphertext of a claim."""
        return self._folder / claim

    def create(self, kind: Kind, thing: Json, namespace: str = "") -> Json:
        made = super().create(kind, thing, namespace)
        if kind == CLAIM:
            self._bind(made)
        if kind == POD:
            uid = made["metadata"]["uid"]
            claim = made["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
            self.running[name_of(made)] = Holding(volume_of(made), uid, self.file(claim), self._pins)
            ready = {"phase": "Running", "containerStatuses": [{"ready": True, "started": True}]}
            self.change(POD, name_of(made), {"status": ready}, namespace)
            deadline = time.monotonic() + _END_SECONDS
            while not self._pins.socket(volume_of(made)).exists():
                assert time.monotonic() < deadline, "the holder does not come up"
                time.sleep(0.01)
        return made

    def patch(self, kind: Kind, name: str, patch: Json, namespace: str = "", *, status: bool = False) -> Json:
        changed = super().patch(kind, name, patch, namespace, status=status)
        if kind == CLAIM:
            if super().get(CLAIM, name, namespace) is None:
                self._forget(name)
            elif "spec" in patch:
                self._enlarge(name, read_size(patch["spec"]["resources"]["requests"]["storage"]))
        return changed

    def get(self, kind: Kind, name: str, namespace: str = "") -> Json | None:
        if kind == POD and (running := self.running.get(name)) is not None:
            found = super().get(kind, name, namespace)
            if found is not None and found["metadata"].get("deletionTimestamp") and running.has_ended():
                del self.running[name]
                self.finish(POD, name, namespace)
        return super().get(kind, name, namespace)

    def finish(self, kind: Kind, name: str, namespace: str = "") -> None:
        self.change(kind, name, {"metadata": {"finalizers": None}}, namespace)

    def remove(self, kind: Kind, name: str, namespace: str = "") -> None:
        if kind == POD and (running := self.running.get(name)) is not None:
            # It is there until its node says that it has ended.
            self.change(POD, name, {"metadata": {"finalizers": ["kubelet"]}}, namespace)
            running.tell()
        super().remove(kind, name, namespace)

    def reboot(self) -> None:
        """What a reboot ends: holders, which kubelet starts anew by themselves only for pods that stay."""
        for name, running in list(self.running.items()):
            running.end()
            del self.running[name]
            self.lose(POD, name, NAMESPACE)

    def _bind(self, claim: Json) -> None:
        name = name_of(claim)
        size = -(-read_size(claim["spec"]["resources"]["requests"]["storage"]) // _SECTOR) * _SECTOR
        with self.file(name).open("wb") as file:
            file.truncate(size)
        csi = {"driver": self._driver, "volumeHandle": name, "volumeAttributes": {"of": "the class"}}
        volume: Json = {
            "metadata": {"name": f"pv-{name}"},
            "spec": {"volumeMode": "Block", "capacity": {"storage": str(size)}, "csi": csi},
        }
        self.put(VOLUME, volume)
        bound = {"spec": {"volumeName": f"pv-{name}"}, "status": {"phase": "Bound"}}
        self.change(CLAIM, name, bound, NAMESPACE)

    def _enlarge(self, name: str, size: int) -> None:
        os.truncate(self.file(name), size)
        pending = {"capacity": {"storage": "1"}, "allocatedResourceStatuses": {"storage": "NodeResizePending"}}
        self.change(CLAIM, name, {"status": pending}, NAMESPACE)
        self.change(VOLUME, f"pv-{name}", {"spec": {"capacity": {"storage": str(size)}}})
        for each in self.all(POD):
            if each["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == name:
                self.running[name_of(each)].enlarge()

    def _forget(self, name: str) -> None:
        self.file(name).unlink(missing_ok=True)
        with suppress(KeyError):
            self.lose(VOLUME, f"pv-{name}")


class CountedDevice(HeldDevice):
    """A device that is counted while it is open."""

    def __init__(self, device: Handle, volume_id: str, users: Counter[str]) -> None:
        fd, device.fd = device.fd, -1
        super().__init__(fd, device.name, volume_id)
        self._users = users
        users[volume_id] += 1

    def close(self) -> None:
        if self.fd >= 0:
            self._users[self.volume_id] -= 1
        super().close()


class WholeBackend(CsiBackend):
    """Controller and node in one, with Kubernetes' attaching ahead of each attach and behind each detach.

    As the driver does before a deletion, it detaches what nobody uses any more: what is not open by `users`.
    """

    users: Counter[str]

    def attach(self, volume_id: str, *, lasting: bool) -> Handle:
        with suppress(NotFound):
            self.publish(volume_id, NODE_ID, many_nodes=False)
        return CountedDevice(super().attach(volume_id, lasting=lasting), volume_id, self.users)

    def detach(self, volume_id: str) -> None:
        super().detach(volume_id)
        self.unpublish(volume_id, NODE_ID)

    def delete(self, volume_id: str) -> None:
        if not self.users[volume_id]:
            self.detach(volume_id)
        super().delete(volume_id)


def backend_on(
    api: Api,
    folder: Path,
    files: Files,
    direct: DirectDevices,
    node_topology: str,
    *,
    is_node: bool = False,
    make: type[CsiBackend] = CsiBackend,
) -> CsiBackend:
    """The backend of a cluster with that API, whose played part is in `folder`."""
    records = RecordObjects(api, NAMESPACE, RecordCodec())
    pins = Pins(folder / "holders", files)
    pins.prepare()
    return make(
        records,
        HeaderCopies(api, NAMESPACE, records, folder / "state", files),
        Claims(api, NAMESPACE, DRIVER),
        HolderPods(api, NAMESPACE, lambda: "image", folder / "holders"),
        NodeDevices(api, records, pins, direct, NODE_ID, ""),
        is_node=is_node,
        node_topology=node_topology,
    )


class CsiRig:
    """A played cluster with one node."""

    rounding = 512
    knows_newest = False
    parameters = VolumeParameters(backing_storage_class=BELOW)
    driver = "below.test"

    def __init__(self, folder: Path, workers: Workers) -> None:
        self._folder = folder / "csi"
        self._holders = self._folder / "holders"
        self._users: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._folder.parent.mkdir(exist_ok=True)
        self.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self.api.before = lambda _: None
        self.api.reboot()

    def id_of(self, name: str) -> str:
        return name

    @property
    def disks(self) -> Path:
        """What is below."""
        return self._folder / "disks"

    def plain(self, node_topology: str, *, is_node: bool = False, step: Step = undisturbed) -> CsiBackend:
        """Controller and node in one, or a node, without anything that is done ahead of a call."""
        return backend_on(self.api, self._folder, Files(), self.direct(step), node_topology, is_node=is_node)

    def direct(self, step: Step) -> DirectDevices:
        """How devices come without a holder."""
        return DirectDevices(nobody_calls, self._folder, DRIVER)

    def backend(self, step: Step = undisturbed) -> WholeBackend:
        def before(call: Call) -> None:
            if call.verb != "get":
                step(f"{call.verb} {call.kind} {call.name}")

        self.api.before = before
        topology = f"topology.{DRIVER}/node"
        made = backend_on(self.api, self._folder, SteppedFiles(step), self.direct(step), topology, make=WholeBackend)
        assert isinstance(made, WholeBackend)
        made.users = self._users
        return made

    def restart(self) -> None:
        self.api.before = lambda _: None
        for pin in Pins(self._holders, Files()).all():
            Pins(self._holders, Files()).remove(pin.volume_id)
        for known in self.api.all(VOLUME_RECORD):
            self.api.change(VOLUME_RECORD, name_of(known), {"spec": {"staged": None}}, NAMESPACE)
        self.api.reboot()

    def clear(self) -> None:
        if hasattr(self, "api"):
            self.restart()
        shutil.rmtree(self._folder, ignore_errors=True)
        self.disks.mkdir(parents=True)
        self.api = Played(self.disks, Pins(self._holders, Files()), self.driver)

    def put_foreign(self, volume_id: str) -> Callable[[], object]:
        claim: Json = {"metadata": {"name": name_for(volume_id)}, "spec": {"volumeName": "pv-other"}}
        self.api.put(CLAIM, claim, NAMESPACE)
        return lambda: self.api.get(CLAIM, name_for(volume_id), NAMESPACE)
