"""What the tests on real device-mapper have in common."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.workers import Workers
from csi_driver.volumes.driver import WARM
from tests.backends.rigs import LvmRig
from tests.machine.group import IN_GROUP, POOLS, clear_away, group_of_tests, put_down
from tests.machine.leaks import Facts, clear, settled
from tests.machine.node import Node


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is of volume groups alone is no test that was skipped."""
    if not IN_GROUP:
        items[:] = [item for item in items if item.path.name != "test_danger_group.py"]


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """One launcher for many drivers: starting it takes most of a second in the guest."""
    workers = Workers(WARM)
    workers.start()
    yield workers
    workers.stop()


@pytest.fixture(scope="session")
def group(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LvmRig | None]:
    """The volume group of all tests, where BACKEND names a kind of it."""
    parent = Path(os.environ.get("MACHINE_STATE") or tmp_path_factory.getbasetemp())
    with group_of_tests(parent / f"group-{os.getpid()}", workers) as rig:
        yield rig


@pytest.fixture
def folder(tmp_path: Path, group: LvmRig | None) -> Iterator[Path]:
    """A folder on a disk, and the check that the test leaves nothing in the kernel."""
    state = os.environ.get("MACHINE_STATE")
    folder = Path(state, tmp_path.name) if state else tmp_path
    folder.mkdir(exist_ok=True)
    before = Facts.now(folder)
    yield folder
    mapper = DeviceMapper()
    for name in mapper.names():
        if (device := mapper.get(name)) is not None and device.suspended:
            mapper.resume(name)  # else a look at what is mounted there waits for good
    if group is not None:
        put_down()

    def left() -> list[str]:
        # The files stay: they are the volumes. So does what all tests have of the group.
        kept, own = ("files", f"mappings: {POOLS}"), f" at {group.state / 'lvm'}" if group else "\0"
        found = Facts.now(folder).more_than(before)
        return [one for one in found if not one.startswith(kept) and not one.endswith(own)]

    try:
        if leaked := settled(left):
            clear(before, folder)
            pytest.fail(f"left behind: {'; '.join(leaked)}")
    finally:
        if group is not None:
            clear_away(group)


@pytest.fixture
def node(folder: Path, workers: Workers) -> Node:
    """A driver on a fresh state directory."""
    return Node(folder, workers)


@pytest.fixture(scope="session")
def volume_with_data(tmp_path_factory: pytest.TempPathFactory, workers: Workers) -> Path:
    """The folder of a volume that holds a file, made once."""
    state = os.environ.get("MACHINE_STATE")
    maker = Node(Path(state, "template") if state else tmp_path_factory.mktemp("template"), workers)
    maker.staged_once()
    return maker.disk().parent


@pytest.fixture
def used(node: Node, group: LvmRig | None, request: pytest.FixtureRequest) -> Node:
    """A driver with a volume that was staged, written ("precious") and unstaged."""
    if group is not None:
        node.staged_once()
        for folder in (node.staging_path(), node.staging_path().parent):  # kubelet's, which is not there yet
            folder.rmdir()
        return node
    volume_with_data = request.getfixturevalue("volume_with_data")
    subprocess.run(["cp", "-a", "--sparse=always", volume_with_data, node.disk().parent], check=True, timeout=30)
    return node


@pytest.fixture
def own_workers() -> Iterator[Callable[[], Workers]]:
    """Makes launchers of their own, for drivers that are restarted."""
    made: list[Workers] = []

    def make() -> Workers:
        made.append(Workers(WARM))
        return made[-1]

    yield make
    for workers in made:
        workers.stop()
