"""Backends on real storage, each with what the suite must know of it: its tolerances, and how to put things in its way.

A further backend brings a class with the members of `Rig` and a line in RIGS.
"""

import contextlib
import gc
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, Self

from csi_driver.backends.base import Backend
from csi_driver.backends.loopfile import LoopfileBackend
from csi_driver.backends.lvm import LvmBackend
from csi_driver.backends.lvmrecords import NAME, OWNER, GroupRecords
from csi_driver.backends.lvmtool import VolumeGroup
from csi_driver.backends.rbd import RbdBackend
from csi_driver.backends.rbdaccess import CephAccess
from csi_driver.backends.rbdclients import CephClients, Credentials
from csi_driver.backends.rbddevices import MappedVolumes
from csi_driver.backends.rbdimages import Images
from csi_driver.backends.rbdnodes import Fence, NodeAttachments, fence_off
from csi_driver.backends.rbdplace import Cluster, Clusters, image_name
from csi_driver.backends.rbdpool import CephPool
from csi_driver.backends.rbdrecords import VolumeLogs
from csi_driver.backends.records import RecordCodec
from csi_driver.host.commands import Commands
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.files import Files
from csi_driver.host.krbd import MappedImages
from csi_driver.host.loop import LoopDevices
from csi_driver.host.mounts import Mounts
from csi_driver.host.workers import Workers
from csi_driver.model.settings import MIB, Limits
from csi_driver.model.volume import VolumeParameters
from tests.backends.ceph import CLUSTER, USER, Ceph, CephOutside
from tests.backends.ceph import POOL as CEPH_POOL
from tests.backends.csirig import CsiRig
from tests.backends.directrig import DirectRig
from tests.fake_host import Step, SteppedFiles, undisturbed

LIMITS = Limits(format_seconds=60, unlock_seconds=20, mount_seconds=60)
GROUP = "vg-test"
POOL = "thin-pool"
_CHANGING = {"append", "put", "rm", "setomapval", "rmomapkey", "create", "resize", "set", "overwriting"}
_CHANGING |= {"rename"}
_DIRTY_BYTES = 160 * MIB
_CONFIG = (
    "activation{udev_sync=0 udev_rules=0 monitoring=0 verify_udev_operations=0} backup{backup=0 archive=0} "
    'devices{use_devicesfile=0 obtain_device_list_from_udev=0 external_device_info_source="none"}'
)


class Rig(Protocol):
    """Storage that is there for the length of a test, and backends on it."""

    parameters: VolumeParameters
    """Of a class of volumes on it."""
    rounding: int
    """By less than so many bytes a device may be longer than asked for."""
    knows_newest: bool
    """Whether an older record is told from the newest one."""

    def backend(self, step: Step = undisturbed) -> Backend:
        """A backend, prepared, as of a server that has just been started; `step` may end it at each step."""

    def restart(self) -> None:
        """What a reboot of the node takes away is gone."""

    def clear(self) -> None:
        """All volumes and all that was put there are gone; what is free holds what others have left, if it can."""

    def put_foreign(self, volume_id: str) -> Callable[[], object]:
        """Put somebody else's storage where a new volume of that id would be; returns a look at it."""

    def id_of(self, name: str) -> str:
        """The id of a volume that is called so."""


class LoopfileRig:
    """Sparse files."""

    parameters = VolumeParameters()
    rounding = 1
    knows_newest = True

    def __init__(self, folder: Path, workers: Workers) -> None:
        self._folder = folder / "loopfile"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The files stay."""

    def backend(self, step: Step = undisturbed) -> Backend:
        made = LoopfileBackend(self._folder, 0, SteppedFiles(step), LoopDevices(), RecordCodec())
        made.prepare()
        return made

    def restart(self) -> None:
        """Files stay."""

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def id_of(self, name: str) -> str:
        return name

    def put_foreign(self, volume_id: str) -> Callable[[], object]:
        file = self._folder / "volumes" / volume_id / "disk.img"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"somebody's")
        return file.read_bytes


class SteppedClients(CephClients):
    """Tells `step` after each thing done in a cluster that changes something, and before those that change images.

    Between two changes of objects nothing happens: killed behind one is killed before the next.
    """

    step: Step

    def ask(
        self, cluster: Cluster, credentials: Credentials, what: str, function: Any, *args: Any, **limit: Any
    ) -> Any:
        program, *words = what.split()
        changing = _CHANGING.intersection(words) or ({program} & _CHANGING)
        if changing and program != "rados":
            self.step(f"before {program} {' '.join(changing)}")
        answer = super().ask(cluster, credentials, what, function, *args, **limit)
        if changing:
            self.step(f"after {program} {' '.join(changing)}")
        return answer


class SteppedMapping(Workers):
    """Tells `step` before and after an image is mapped, by the workers that it has."""

    def __init__(self, workers: Workers, step: Step) -> None:
        super().__init__(())
        self._real, self._step = workers, step

    def call(self, what: str, timeout: float, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not what.startswith("rbd-map"):
            return self._real.call(what, timeout, function, *args, **kwargs)
        self._step("before rbd map")
        found = self._real.call(what, timeout, function, *args, **kwargs)
        self._step("after rbd map")
        return found


class RiggedBackend(RbdBackend):
    """Shows the pool that a volume is in."""

    def pool_of(self, volume_id: str) -> CephPool:
        """As the user of the server."""
        return self._access.pool(volume_id)


class RbdRig:
    """A pool of a Ceph on this machine."""

    rounding = 512
    knows_newest = True
    parameters = VolumeParameters(cluster_id=CLUSTER, pool=CEPH_POOL)

    def __init__(self, folder: Path, workers: Workers) -> None:
        self._folder = folder
        self.workers = workers
        # In memory: a monitor waits for its disk at each change.
        self._memory = tempfile.TemporaryDirectory(dir="/dev/shm", prefix="ceph-")
        is_outside = "CEPH_OUTSIDE" in os.environ  # tests.backends.on_ceph
        self.ceph = CephOutside(Path(os.environ["MACHINE_OUT"])) if is_outside else Ceph(Path(self._memory.name))

    def __enter__(self) -> Self:
        subprocess.run(["modprobe", "-q", "rbd"], check=False)  # who attaches nothing does without
        self.config.parent.mkdir(exist_ok=True, parents=True)
        self.config.write_text(self.ceph.config())
        self.secret.mkdir(exist_ok=True)
        (self.secret / "userID").write_text(USER)
        (self.secret / "userKey").write_text(self.ceph.key)
        self.ceph.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.restart()
        finally:
            self.ceph.__exit__()
            self._memory.cleanup()

    @property
    def config(self) -> Path:
        """Of the clusters."""
        return self._folder / "config.json"

    @property
    def secret(self) -> Path:
        """The server's own."""
        return self._folder / "secret"

    def id_of(self, name: str) -> str:
        return Cluster(CLUSTER, ("one",)).place(CEPH_POOL).id_for(name)

    def folder_of(self, node_id: str) -> Path:
        """What a node keeps."""
        return self._folder / f"state-{node_id}"

    def backend(
        self,
        step: Step = undisturbed,
        node_id: str = "node-1",
        seconds: float = LIMITS.mount_seconds,
        make_devices: type[MappedVolumes] = MappedVolumes,
        fence: Fence = fence_off,
    ) -> "RiggedBackend":
        clients, folder = SteppedClients(self.workers, seconds), self.folder_of(node_id)
        clients.step = step
        logs, files = VolumeLogs(), Files()
        devices = make_devices(folder, files, SteppedMapping(self.workers, step), MappedImages(), seconds)
        made = RiggedBackend(
            folder,
            CephAccess(Clusters(self.config), clients, [self.secret]),
            logs,
            Images(logs, LIMITS.format_seconds),
            NodeAttachments(logs, node_id, devices.boot, fence),
            devices,
            RecordCodec(),
            files,
            is_central=True,
        )
        made.prepare()
        return made

    def restart(self) -> None:
        gc.collect()  # a test that failed keeps its devices open
        for mapped in list(MappedImages().all()):
            MappedImages().unmap(mapped)

    def clear(self) -> None:
        self.restart()
        for node in self._folder.glob("state-*"):
            shutil.rmtree(node)
        self.ceph.clear()

    def put_foreign(self, volume_id: str) -> Callable[[], object]:
        image = f"{CEPH_POOL}/{image_name(volume_id)}"
        self.ceph.admin("rbd", "create", "--size", "8M", image)
        return lambda: (self.ceph.asked("rbd", "info", image), self.ceph.admin("rados", "-p", CEPH_POOL, "ls"))


class SteppedGroup(VolumeGroup):
    """Tells `step` before and after each command of LVM."""

    step: Step

    def _run(self, what: str, name: str, command: str, *words: str, udev: int = 1) -> str:
        if command in ("vgs", "lvs"):
            return super()._run(what, name, command, *words, udev=udev)
        self.step(f"before {command}")
        said = super()._run(what, name, command, *words, udev=udev)
        self.step(f"after {command}")
        return said


class LvmRig:
    """A volume group on a loop device whose free extents hold what others have left."""

    rounding = 4 * MIB
    knows_newest = True

    def __init__(
        self, folder: Path, workers: Workers, *, thin: bool, disk_bytes: int = 1600 * MIB, pool_bytes: int = 256 * MIB
    ) -> None:
        self._disk_bytes = disk_bytes
        self._pool_bytes = pool_bytes
        self.state = folder / "lvm-state"
        self._disk = folder / "disk"
        self.workers = workers
        self._thin = thin
        self.parameters = VolumeParameters(thin_pool=POOL if thin else None)
        self.make_group: type[SteppedGroup] = SteppedGroup
        self._is_prepared = False
        self.zero_seconds = 20.0
        self.pool_limit = 0.8
        self.owner = "rig"

    def __enter__(self) -> Self:
        DeviceMapper().target_version("thin-pool")
        self.state.mkdir(exist_ok=True)
        with self._disk.open("wb") as file:
            file.truncate(self._disk_bytes)
        loop = subprocess.run(
            ["losetup", "--find", "--show", str(self._disk)], check=True, stdout=subprocess.PIPE, text=True
        )
        self.loop = loop.stdout.strip()
        lvm("vgcreate", GROUP, self.loop)
        try:
            self.backend()
            if self._thin:
                lvm("lvcreate", "-L", f"{self._pool_bytes}b", "--type", "thin-pool", "-n", POOL, GROUP)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.restart()
        lvm("vgremove", "-f", GROUP)
        subprocess.run(["losetup", "--detach", self.loop], check=True)
        with contextlib.suppress(OSError):
            os.rmdir(f"/dev/{GROUP}")

    def clear(self) -> None:
        found = lvm("lvs", "--noheadings", "-o", "lv_name", GROUP).split()
        for name in found:
            if name.startswith("luks-"):
                lvm("lvremove", f"{GROUP}/{name}")
        for name in ("volumes", "new", "trash"):
            shutil.rmtree(self.state / "lvm" / name, ignore_errors=True)
        self._is_prepared = False
        self.backend()
        if not self._thin:
            self.make_dirty()

    def disown(self) -> None:
        """As an administrator does when the state directory that had the group is gone."""
        tags = lvm("lvs", "--noheadings", "-o", "lv_tags", f"{GROUP}/{NAME}").strip().split(",")
        for tag in tags:
            if tag.startswith(OWNER):
                lvm("lvchange", "--deltag", tag, f"{GROUP}/{NAME}")

    def take_back(self) -> None:
        """From a server, or from another owner."""
        self.owner = "rig"
        self.restart()
        self.disown()
        self.backend()

    def make_dirty(self) -> None:
        """Let free extents hold what others have left."""
        lvm("lvcreate", "-Zn", "-Wn", "-L", f"{_DIRTY_BYTES}b", "-n", "dirt", GROUP)
        with open(f"/dev/{GROUP}/dirt", "wb", buffering=0) as dirt:
            for at in range(0, _DIRTY_BYTES, MIB):
                os.pwrite(dirt.fileno(), b"another's plaintext ", at)
            os.fsync(dirt.fileno())
        lvm("lvremove", f"{GROUP}/dirt")

    def backend(
        self, step: Step = undisturbed, *, workers: Workers | None = None, state: Path | None = None
    ) -> LvmBackend:
        """As Rig says; `state` is another state directory, below which the records are mounted too."""
        workers = workers or self.workers
        commands, files, mapper = Commands(workers), SteppedFiles(step), DeviceMapper()
        group = self.make_group(GROUP, commands, LIMITS.mount_seconds)
        group.step = step
        folder, memory = (state or self.state) / "lvm", (state or self.state) / "lvm.json"
        records = GroupRecords(
            group, folder, memory, Files(), workers, commands, mapper, Mounts(), LIMITS, lambda: self.owner
        )
        made = LvmBackend(
            group, records, RecordCodec(), files, workers, mapper, LIMITS, self.pool_limit, self.zero_seconds
        )
        if not self._is_prepared:
            made.prepare()
            self._is_prepared = True
        return made

    def restart(self) -> None:
        self._is_prepared = False
        Mounts().unmount(str(self.state / "lvm"))
        lvm("vgchange", "-an", GROUP)

    def id_of(self, name: str) -> str:
        return name

    def put_foreign(self, volume_id: str) -> Callable[[], object]:
        lvm("lvcreate", "-an", "-Zn", "-Wn", "-L", "8M", "-n", f"luks-{volume_id}", GROUP)
        return lambda: lvm("lvs", "--noheadings", "-o", "lv_uuid,lv_size,lv_tags", f"{GROUP}/luks-{volume_id}")


def lvm(command: str, *words: str) -> str:
    """LVM's own program, as an administrator runs it."""
    done = subprocess.run(
        ["lvm", command, "-qq", "-y", "--config", _CONFIG, *words], check=True, capture_output=True, text=True
    )
    return done.stdout


RIGS: Mapping[str, Callable[[Path, Workers], AbstractContextManager[Rig]]] = {
    "csi": CsiRig,
    "csi-direct": DirectRig,
    "loopfile": LoopfileRig,
    "lvm-thick": lambda folder, workers: LvmRig(folder, workers, thin=False),
    "lvm-thin": lambda folder, workers: LvmRig(folder, workers, thin=True),
    "rbd": RbdRig,
}
"""What the suite runs on, by name."""

ON_REQUEST = ("rbd",)
"""Those that need more than a machine has for the other tests: they run where BACKEND names them."""
