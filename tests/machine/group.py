"""The volume group of tests that have all volumes in one where BACKEND says so, and what is said of those that cannot.

A volume's logical volume is looked at by its device, which is `shown` for that. The records are mounted once, and below
the state directory of each test.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from csi_driver.backends.lvmrecords import NAME
from csi_driver.backends.lvmtool import dm_name
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.mounts import Mounts
from csi_driver.host.workers import Workers
from csi_driver.model.errors import DriverError
from tests.backends.rigs import GROUP, POOL, LvmRig, lvm
from tests.machine.leaks import mounts, settled
from tests.machine.processes import run
from tests.machine.server import ServerProcess
from tests.machine.storage import DISK_BYTES, POOL_BYTES, VOLUMES, chosen

POOLS = dm_name(GROUP, POOL)
"""What device-mapper's names of the thin pool begin with: once used it stays."""

IN_GROUP = os.environ.get("BACKEND", "").startswith("lvm")

DEVICE = rf"/dev/mapper/{VOLUMES}\S+" if IN_GROUP else r"/dev/loop\d+"
"""How an error names the device of a volume."""

REASONS = {
    "files": "it is about what can be done to a file and not to a logical volume",
    "written": "only of a sparse file it is known what was ever written to it",
    "loop": "it is about loop devices",
    "own disk": "its disk is the test's own, whatever the backend is",
    "key": "the backend lvm moves no volume to another volume key, which test_danger_group.py shows",
    "thick": "a thick logical volume has all its space from the start",
    "plain thick": "a thick volume that is not encrypted is not enlarged while it is in use",
}
"""Why a test is not for volumes in a group: no other reason counts."""

_test_shows: set[str] = set()
_rigs: list[LvmRig] = []


def current() -> LvmRig | None:
    """The volume group, while there is one."""
    return _rigs[0] if _rigs else None


def only_of_files(why: str) -> pytest.MarkDecorator:
    """A test that makes no sense in a group, by one of REASONS."""
    return pytest.mark.skipif(IN_GROUP, reason=REASONS[why])


def skip_in_group(why: str) -> None:
    """As `only_of_files`, for a fixture."""
    if IN_GROUP:
        pytest.skip(REASONS[why])


def skip_plain_thick(parameters: Mapping[str, str]) -> None:
    """Some classes' volumes cannot be enlarged while they are in use (tests/backends has what is said then)."""
    if chosen() == "lvm-thick" and not parameters:
        pytest.skip(REASONS["plain thick"])


def in_pool(parameters: Mapping[str, str]) -> Mapping[str, str]:
    """A class's parameters, where that has a thin pool."""
    return {**parameters, "thinPool": POOL} if chosen() == "lvm-thin" else parameters


def server_on(folder: Path, *options: str) -> ServerProcess:
    """A server whose volumes are where those of the other tests are."""
    if (rig := current()) is None:
        return ServerProcess(folder, *options)
    show_records(rig, folder / "state")
    return ServerProcess(folder, "--backend", "lvm", "--volume-group", GROUP, *options)


@contextmanager
def group_of_tests(folder: Path, workers: Workers) -> Iterator[LvmRig | None]:
    """The volume group, whose free extents hold what others have left; None where volumes are files."""
    if not IN_GROUP:
        yield None
        return
    folder.mkdir()
    thin = chosen() == "lvm-thin"
    with LvmRig(folder, workers, thin=thin, disk_bytes=DISK_BYTES, pool_bytes=POOL_BYTES) as rig:
        if not thin:
            rig.make_dirty()
        _rigs.append(rig)
        try:
            yield rig
        finally:
            _rigs.clear()


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


def put_down() -> None:
    """What a test has shown of its volumes, apart from the driver, is shown no more, and no records but the group's."""
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
    _test_shows.clear()


def clear_away(rig: LvmRig) -> None:
    """The volumes of a test that has ended go."""
    records = rig.state / "lvm"
    try:
        (records / "volumes/written").touch()  # where they are not mounted there is no such folder
    except OSError:
        mend_records(rig)
    found = lvm("lvs", "--noheadings", "-o", "lv_name", GROUP).split()
    if volumes := [f"{GROUP}/{name}" for name in found if name.startswith("luks-")]:
        lvm("lvremove", *volumes)
    for folder in ("volumes", "new", "trash"):
        for path in (records / folder).iterdir():
            path.unlink() if path.is_file() else shutil.rmtree(path)


def shown(volume_id: str) -> Path:
    """The device of a volume's logical volume, until `put_down` or the driver ends it; nothing's where it is gone."""
    logical, mapper = f"luks-{volume_id}", DeviceMapper()
    name = dm_name(GROUP, logical)
    device = mapper.get(name)
    if device is not None and device.is_leaving and not device.open_count:
        settled(lambda: [name] if mapper.get(name) else [])
        device = None
    if device is None:
        with suppress(subprocess.CalledProcessError):
            lvm("lvchange", "-ay", "-K", f"{GROUP}/{logical}")
            _test_shows.add(name)
        device = mapper.get(name)
    return Path(f"/dev/dm-{device.minor}" if device is not None else f"/dev/{GROUP}/{logical}")


def hide(volume_id: str) -> None:
    """What a test alone has shown is shown no more: an active logical volume counts as one in use."""
    name = dm_name(GROUP, f"luks-{volume_id}")
    if name in _test_shows:
        with suppress(DriverError):
            DeviceMapper().remove(name)
        _test_shows.discard(name)


def is_left_shown(volume_id: str) -> bool:
    """Whether the driver has left the device of a volume."""
    name = dm_name(GROUP, f"luks-{volume_id}")
    left = settled(lambda: [name] if name not in _test_shows and DeviceMapper().get(name) else [])
    if DeviceMapper().get(name) is None:
        _test_shows.discard(name)
    return bool(left)
