"""The backend csi over a driver below that nodes call: the tests' own one, registered with a kubelet that is played."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent import futures
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Self

import grpc
import msgspec

from csi_driver.backends.csidirect import Call, DirectDevices, NodeBelow
from csi_driver.backends.csipins import Direct, Pins
from csi_driver.host.files import Files
from csi_driver.host.workers import Workers
from csi_driver.kube.kinds import VOLUME_RECORD, name_of
from csi_driver.model.volume import VolumeParameters
from csi_driver.rpc import csi_pb2_grpc, pluginregistration_pb2_grpc
from csi_driver.rpc import pluginregistration_pb2 as registration
from csi_driver.rpc.below import calling
from tests.backends.csirig import BELOW, DRIVER, NAMESPACE, CsiRig
from tests.cluster.below import Devices, Identity
from tests.fake_host import Step

KIND, NAME = "staged", "staged.below.test"


class Registration(pluginregistration_pb2_grpc.RegistrationServicer):
    """Tells kubelet, and whoever asks as it does, of a driver."""

    def __init__(self, name: str, endpoint: Path, kind: str = "CSIPlugin") -> None:
        self._info = registration.PluginInfo(type=kind, name=name, endpoint=str(endpoint))

    def GetInfo(self, request: registration.InfoRequest, context: grpc.ServicerContext) -> registration.PluginInfo:
        return self._info


@contextlib.contextmanager
def served(socket: Path, *servicers: object) -> Iterator[None]:
    """Such services on a socket."""
    adders = (
        csi_pb2_grpc.add_IdentityServicer_to_server,
        csi_pb2_grpc.add_NodeServicer_to_server,
        pluginregistration_pb2_grpc.add_RegistrationServicer_to_server,
    )
    kinds = (
        csi_pb2_grpc.IdentityServicer,
        csi_pb2_grpc.NodeServicer,
        pluginregistration_pb2_grpc.RegistrationServicer,
    )
    socket.parent.mkdir(parents=True, exist_ok=True)
    server = grpc.server(futures.ThreadPoolExecutor(8))
    for servicer in servicers:
        for kind, add in zip(kinds, adders, strict=True):
            if isinstance(servicer, kind):
                add(servicer, server)  # type: ignore[operator]
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()
        socket.unlink(missing_ok=True)


class Stepped:
    """A driver below; `step` is told before and after each call that changes something."""

    def __init__(self, below: NodeBelow, step: Step) -> None:
        self._below = below
        self._step = step

    @contextlib.contextmanager
    def _stepped(self, name: str) -> Iterator[None]:
        self._step(f"before {name}")
        yield
        self._step(f"after {name}")

    def stage(self, staging: Path) -> bool:
        with self._stepped("NodeStageVolume"):
            return self._below.stage(staging)

    def publish(self, staging: Path | None, target: Path) -> None:
        with self._stepped("NodePublishVolume"):
            self._below.publish(staging, target)

    def unpublish(self, target: Path) -> None:
        with self._stepped("NodeUnpublishVolume"):
            self._below.unpublish(target)

    def unstage(self, staging: Path) -> None:
        with self._stepped("NodeUnstageVolume"):
            self._below.unstage(staging)

    def expand(self, staging: Path, target: Path, size: int) -> None:
        with self._stepped("NodeExpandVolume"):
            self._below.expand(staging, target, size)


class DirectRig(CsiRig):
    """A played cluster with one node, on which the driver below really is."""

    parameters = VolumeParameters(backing_storage_class=BELOW, backing_attach="direct")
    driver = NAME

    def __init__(self, folder: Path, workers: Workers) -> None:
        super().__init__(folder, workers)
        # A socket's name has 107 bytes at most.
        self._kubelet = tempfile.TemporaryDirectory(prefix="kubelet-")
        self._serving = ExitStack()

    @property
    def kubelet(self) -> Path:
        """Its folder."""
        return Path(self._kubelet.name)

    @property
    def socket(self) -> Path:
        """Of the driver below."""
        return self.kubelet / "plugins" / NAME / "csi.sock"

    def __enter__(self) -> Self:
        super().__enter__()
        usual = self.kubelet / "plugins_registry" / f"{NAME}-reg.sock"
        self._serving.enter_context(served(usual, Registration(NAME, self.socket)))
        self._serving.enter_context(self.below())
        return self

    def __exit__(self, *error: object) -> None:
        self._serving.close()
        super().__exit__(*error)
        self._kubelet.cleanup()

    def below(self) -> AbstractContextManager[None]:
        """The driver below, while it runs."""
        return served(self.socket, Identity(KIND), Devices(self.disks, KIND, "node-1"))

    @contextlib.contextmanager
    def in_place_of_it(self, *servicers: object) -> Iterator[None]:
        """Something else at its socket, or nothing."""
        aside = self.socket.with_name("aside")
        self.socket.rename(aside)
        try:
            with served(self.socket, *servicers) if servicers else contextlib.nullcontext():
                yield
        finally:
            aside.rename(self.socket)

    def call(self, step: Step) -> Call:
        """As the server calls it."""

        @contextlib.contextmanager
        def stepped(volume_id: str, direct: Direct, seconds: float) -> Iterator[NodeBelow]:
            with calling(self.kubelet, volume_id, direct, seconds) as below:
                yield Stepped(below, step)

        return stepped

    def direct(self, step: Step) -> DirectDevices:
        return DirectDevices(self.call(step), self.kubelet, DRIVER)

    def restart(self) -> None:
        """Devices and mounts are gone; what was written in folders of kubelet is not."""
        self.api.before = lambda _: None
        self.let_go()
        pins = Pins(self._holders, Files())
        for pin in pins.all():
            pins.put(msgspec.structs.replace(pin, boot_id="an earlier one"))
        for known in self.api.all(VOLUME_RECORD):
            self.api.change(VOLUME_RECORD, name_of(known), {"spec": {"staged": None}}, NAMESPACE)

    def let_go(self) -> None:
        """As the kernel does that has lost its power."""
        mounts = Path("/proc/self/mountinfo").read_text()
        for target in self.places("publish"):
            if f" {target}/device " in mounts:
                subprocess.run(["umount", f"{target}/device"], check=True)
        for disk in self.disks.iterdir():
            for loop in loops(disk):
                subprocess.run(["losetup", "--detach", loop], check=True)

    def clear(self) -> None:
        super().clear()
        shutil.rmtree(self.kubelet / "plugins" / "kubernetes.io", ignore_errors=True)

    def places(self, step: str) -> list[Path]:
        """What was made for the driver below of that step."""
        return sorted(self.kubelet.glob(f"plugins/kubernetes.io/csi/volumeDevices/{step}/*"))

    def check_nothing(self) -> None:
        """Nothing is left of volumes on the node."""
        left = [*self.places("publish"), *self.places("staging"), *self._holders.glob("*.json")]
        left += [Path(loop) for disk in self.disks.iterdir() for loop in loops(disk)]
        assert not left, left


def loops(disk: Path) -> list[str]:
    """The loop devices that show a file."""
    words = ["losetup", "--noheadings", "-O", "NAME", "-j", os.fspath(disk)]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
