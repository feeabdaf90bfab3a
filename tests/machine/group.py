"""A volume group as the place of all volumes of the tests.

A volume's logical volume is looked at by its device, which is `shown` for that. The records are mounted once, and below
the state directory of each test.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from csi_driver.backends.base import Backend
from csi_driver.backends.lvmrecords import NAME
from csi_driver.backends.lvmtool import dm_name
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.mounts import Mounts
from csi_driver.host.workers import Workers
from csi_driver.model.errors import DriverError
from csi_driver.model.settings import Settings
from csi_driver.volumes.driver import Host
from tests.backends.rigs import GROUP, POOL, LvmRig, lvm
from tests.machine.leaks import mounts, settled
from tests.machine.processes import run
from tests.machine.server import ServerProcess
from tests.machine.storage import DISK_BYTES, POOL_BYTES, VOLUMES, GroupStorage

POOLS = dm_name(GROUP, POOL)
"""What device-mapper's names of the thin pool begin with: once used it stays."""


def show_records(rig: LvmRig, state: Path) -> None:
    """Let a state directory be the one that has the group, until `put_down`; again is fine."""
    folder = state / "lvm"
    if os.path.ismount(folder):
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    run("mount", "--bind", rig.state / "lvm", folder)
    shutil.copy(rig.state / "lvm.json", state)
    (state / "identity").write_text(f'{{"version":1,"id":"{rig.owner}"}}')


def mend_records(rig: LvmRig) -> None:
    """What an administrator does with records whose file system has errors; they must be shown nowhere else."""
    rig.restart()
    lvm("lvchange", "-ay", "-K", f"{GROUP}/{NAME}")
    mended = subprocess.run(
        ["e2fsck", "-p", "-f", f"/dev/{GROUP}/{NAME}"], check=False, timeout=60, capture_output=True
    )
    assert mended.returncode in (0, 1), mended.stdout
    rig.restart()  # takes its name away too
    rig.backend()


class GroupPlace:
    """The volumes of a group, each looked at by its device. `rig` is the group."""

    def __init__(self, rig: LvmRig, *, thin: bool) -> None:
        self.rig = rig
        self.parameters: Mapping[str, str] = {"thinPool": POOL} if thin else {}
        self._test_shows: set[str] = set()
        self.rounding = rig.rounding

    def backend(self, state: Path, workers: Workers) -> Backend:
        show_records(self.rig, state)
        return self.rig.backend(workers=workers, state=state)

    def settings(self, settings: Settings) -> Settings:
        return GroupStorage(settings.state_dir, thin=False).settings(settings)

    def host(self, host: Host) -> Host:
        return host

    def server(self, folder: Path, *options: str) -> ServerProcess:
        show_records(self.rig, folder / "state")
        return ServerProcess(folder, "--backend", "lvm", "--volume-group", GROUP, *options)

    def before_call(self) -> None:
        """It takes over what the test has shown."""

    def give(self, backend: Backend, volume_id: str) -> None:
        """It is its node's."""

    def take(self, backend: Backend, volume_id: str) -> None:
        """It is its node's."""

    def shown(self, volume_id: str) -> Path:
        logical, mapper = f"luks-{volume_id}", DeviceMapper()
        name = dm_name(GROUP, logical)
        device = mapper.get(name)
        if device is not None and device.is_leaving and not device.open_count:
            settled(lambda: [name] if mapper.get(name) else [])
            device = None
        if device is None:
            with suppress(subprocess.CalledProcessError):
                lvm("lvchange", "-ay", "-K", f"{GROUP}/{logical}")
                self._test_shows.add(name)
            device = mapper.get(name)
        return Path(f"/dev/dm-{device.minor}" if device is not None else f"/dev/{GROUP}/{logical}")

    def hide(self, volume_id: str) -> None:
        """An active logical volume counts as one in use."""
        name = dm_name(GROUP, f"luks-{volume_id}")
        if name in self._test_shows:
            with suppress(DriverError):
                DeviceMapper().remove(name)
            self._test_shows.discard(name)

    def is_left_shown(self, volume_id: str) -> bool:
        name = dm_name(GROUP, f"luks-{volume_id}")
        left = settled(lambda: [name] if name not in self._test_shows and DeviceMapper().get(name) else [])
        if DeviceMapper().get(name) is None:
            self._test_shows.discard(name)
        return bool(left)

    def raw_record(self, volume_id: str) -> bytes:
        return self._record(volume_id).read_bytes()

    def put_record(self, volume_id: str, content: bytes) -> None:
        self._record(volume_id).write_bytes(content)

    def _record(self, volume_id: str) -> Path:
        return self.rig.state / "lvm/volumes" / volume_id / "record.json"

    def put_down(self) -> None:
        """No records are shown either, but the group's."""
        mapper = DeviceMapper()
        for point, _ in mounts():
            if point.endswith("/state/lvm"):
                with suppress(DriverError):  # in use: a leak, which is told
                    Mounts().unmount(point)
        for name in mapper.names():
            if name.startswith(VOLUMES):
                with suppress(DriverError):
                    mapper.remove(name)
        for node in Path("/dev/mapper").glob(f"{VOLUMES}*"):
            if mapper.get(node.name) is None:
                node.unlink()
        self._test_shows.clear()

    def clear_away(self) -> None:
        records = self.rig.state / "lvm"
        try:
            (records / "volumes/written").touch()  # where they are not mounted there is no such folder
        except OSError:
            mend_records(self.rig)
        found = lvm("lvs", "--noheadings", "-o", "lv_name", GROUP).split()
        if volumes := [f"{GROUP}/{name}" for name in found if name.startswith("luks-")]:
            lvm("lvremove", *volumes)
        for folder in ("volumes", "new", "trash"):
            for path in (records / folder).iterdir():
                path.unlink() if path.is_file() else shutil.rmtree(path)


@contextmanager
def group_of_tests(folder: Path, workers: Workers, *, thin: bool) -> Iterator[GroupPlace]:
    """A volume group, whose free extents hold what others have left."""
    folder.mkdir()
    with LvmRig(folder, workers, thin=thin, disk_bytes=DISK_BYTES, pool_bytes=POOL_BYTES) as rig:
        if not thin:
            rig.make_dirty()
        yield GroupPlace(rig, thin=thin)
