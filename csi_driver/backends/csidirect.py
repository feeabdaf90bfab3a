"""A node's side of volumes without a holder pod: the node service of the driver below is called, as kubelet calls it.

The places that it is told lie where kubelet's own for raw block volumes do, as that is what every such driver's pod
sees of the node; no PersistentVolume can have a name like theirs.

<kubelet>/plugins/kubernetes.io/csi/volumeDevices/staging/<driver>_<digest>          for NodeStageVolume
<kubelet>/plugins/kubernetes.io/csi/volumeDevices/publish/<driver>_<digest>/device   for NodePublishVolume
"""

import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Final, Protocol

from csi_driver.backends.csidevice import HeldDevice, held
from csi_driver.backends.csipins import Direct, digest
from csi_driver.host.blockdev import kind
from csi_driver.host.handle import Handle
from csi_driver.host.log import log
from csi_driver.host.syscalls import error_name
from csi_driver.model.errors import CommandFailed, DeviceAbsent, DeviceMismatch, FailedPrecondition

_SECONDS: Final = 60.0
"""Of all calls for one attach together: kubelet waits two minutes for ours, and luksFormat comes behind."""


class NodeBelow(Protocol):
    """The node service of the driver below, for one volume; each call is as CSI has it, and may be repeated.

    Raises what its status means, in a sentence that names driver and socket: Aborted, DeadlineExceeded,
    ResourceExhausted, Unavailable (it goes on, or passes by itself), FailedPrecondition (it refuses), CommandFailed.
    """

    def stage(self, staging: Path) -> bool:
        """NodeStageVolume as a raw block volume; False where the driver has no such step."""

    def publish(self, staging: Path | None, target: Path) -> None:
        """NodePublishVolume as a raw block volume; `staging` where it was staged."""

    def unpublish(self, target: Path) -> None:
        """NodeUnpublishVolume."""

    def unstage(self, staging: Path) -> None:
        """NodeUnstageVolume, where the driver has such a step."""

    def expand(self, staging: Path, target: Path, size: int) -> None:
        """NodeExpandVolume to so many bytes, where the driver has such a step."""


Call = Callable[[str, Direct, float], AbstractContextManager[NodeBelow]]
"""The driver below of the volume that is named first, for so many seconds in all.

Raises Unavailable where no driver of that name is registered on this node or none answers, FailedPrecondition where
another one answers in its place.
"""


def nobody_calls(volume_id: str, direct: Direct, seconds: float) -> AbstractContextManager[NodeBelow]:  # noqa: ARG001
    """For what never works on a device. Raises FailedPrecondition."""
    raise FailedPrecondition(
        f"volume {volume_id} cannot be attached by this program: only the driver's server, and the commands that work "
        f"beside it, call the driver {direct.driver} below"
    )


class DirectDevices:
    """Devices got by `call` from drivers below; `kubelet_dir` and `driver_name`, our own, say where."""

    def __init__(self, call: Call, kubelet_dir: Path, driver_name: str, seconds: float = _SECONDS) -> None:
        self._call = call
        self._places = kubelet_dir / "plugins" / "kubernetes.io" / "csi" / "volumeDevices"
        self._driver_name = driver_name
        self._seconds = seconds

    def target(self, volume_id: str) -> Path:
        """Where the device is shown."""
        return self._folder("publish", volume_id) / "device"

    def is_shown(self, volume_id: str) -> bool:
        """Whether anything is there, by whomever and since whenever."""
        return os.path.lexists(self.target(volume_id))

    def take(self, volume_id: str, direct: Direct) -> HeldDevice:
        """Have it staged and published, and open it; repeating is fine.

        Raises what the calls do, DeviceMismatch and DeviceAbsent where no block device is shown.
        """
        staging, target = self._folder("staging", volume_id), self.target(volume_id)
        try:
            for folder in (staging, target.parent):
                folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        except OSError as error:
            raise FailedPrecondition(
                f"volume {volume_id} cannot be attached: {staging} cannot be made ({error_name(error)}); kubelet's "
                f"folder must be mounted in the driver's pod, and --kubelet-dir must name it"
            ) from None
        with self._call(volume_id, direct, self._seconds) as below:
            staged = below.stage(staging)
            below.publish(staging if staged else None, target)
        return self._opened(volume_id, direct, target)

    def give_back(self, volume_id: str, direct: Direct) -> None:
        """Have it unpublished and unstaged, and leave nothing; absent is fine. Nothing is open on it any more."""
        staging, target = self._folder("staging", volume_id), self.target(volume_id)
        with self._call(volume_id, direct, self._seconds) as below:
            below.unpublish(target)
            try:
                _remove(target)  # a driver may leave the file, as some do
            except OSError as error:
                raise CommandFailed(
                    f"the driver {direct.driver} below volume {volume_id} says that the volume is unpublished and "
                    f"{target} is still there ({error_name(error)}); look at its log and at that mount, this is tried "
                    f"again"
                ) from None
            below.unstage(staging)
        for folder in (target.parent, staging):
            with suppress(OSError):  # what others keep there is theirs
                folder.rmdir()
        log.info("device given back", volume_id=volume_id, driver=direct.driver)

    def enlarge(self, volume_id: str, direct: Direct, size: int) -> None:
        """Have the device show what the controller below has given the volume."""
        with self._call(volume_id, direct, self._seconds) as below:
            below.expand(self._folder("staging", volume_id), self.target(volume_id), size)

    def _folder(self, step: str, volume_id: str) -> Path:
        return self._places / step / f"{self._driver_name}_{digest(volume_id)}"

    @staticmethod
    def _opened(volume_id: str, direct: Direct, target: Path) -> HeldDevice:
        told = f"the driver {direct.driver} below volume {volume_id} says that it has published a block device"
        cure = "leave backingAttach out of the class, and holder pods are used"
        try:
            mode = target.stat().st_mode  # a directory of a file system that hangs must not be opened
            if not stat.S_ISBLK(mode):
                raise DeviceMismatch(
                    f"{told} and {target} is a {kind(mode)}: it has no raw block volumes, or its pod does not share "
                    f"kubelet's folder plugins/kubernetes.io/csi with the node; {cure}"
                )
            descriptor = os.open(target, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise DeviceAbsent(
                f"{told} and nothing is at {target}: its pod does not share kubelet's folder plugins/kubernetes.io/csi "
                f"with the node; {cure}"
            ) from None
        except OSError as error:
            raise DeviceAbsent(f"{told} and {target} cannot be opened for writing ({error_name(error)})") from None
        return held(Handle(descriptor, str(target)), volume_id)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
