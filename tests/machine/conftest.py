"""What the tests on real device-mapper have in common."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.workers import Workers
from csi_driver.volumes.driver import WARM
from tests.machine.ceph_place import ceph_of_tests
from tests.machine.csi_place import claims_of_tests
from tests.machine.group import POOLS, GroupPlace, group_of_tests
from tests.machine.leaks import Facts, clear, settled
from tests.machine.node import Node
from tests.machine.places import BACKEND, IN_GROUP, OF_FILES, Place, being


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is of volume groups alone, or of all that are no files, is no test that was skipped."""
    others = {"test_danger_group.py": IN_GROUP, "test_danger_elsewhere.py": not OF_FILES}
    items[:] = [item for item in items if others.get(item.path.name, True)]


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """One launcher for many drivers: starting it takes most of a second in the guest."""
    workers = Workers(WARM)
    workers.start()
    yield workers
    workers.stop()


@pytest.fixture(scope="session")
def volumes_at(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place | None]:
    """Where the volumes of all tests are, when BACKEND says that they are no files."""
    if OF_FILES:
        yield None
        return
    parent = Path(os.environ.get("MACHINE_STATE") or tmp_path_factory.getbasetemp())
    folder = parent / f"place-{os.getpid()}"
    places: dict[str, AbstractContextManager[Place]] = {
        "rbd": ceph_of_tests(folder, workers),
        "csi": claims_of_tests(folder),
    }
    with places.get(BACKEND) or group_of_tests(folder, workers, thin=BACKEND == "lvm-thin") as made, being(made):
        yield made


@pytest.fixture
def folder(tmp_path: Path, volumes_at: Place | None) -> Iterator[Path]:
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
    if volumes_at is not None:
        volumes_at.put_down()

    def left() -> list[str]:
        # The files stay: they are the volumes. So does what all tests have of a group.
        kept = ("files", f"mappings: {POOLS}")
        own = f" at {volumes_at.rig.state / 'lvm'}" if isinstance(volumes_at, GroupPlace) else "\0"
        found = Facts.now(folder).more_than(before)
        return [one for one in found if not one.startswith(kept) and not one.endswith(own)]

    try:
        if leaked := settled(left):
            clear(before, folder)
            pytest.fail(f"left behind: {'; '.join(leaked)}")
    finally:
        if volumes_at is not None:
            volumes_at.clear_away()


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
def used(node: Node, volumes_at: Place | None, request: pytest.FixtureRequest) -> Node:
    """A driver with a volume that was staged, written ("precious") and unstaged."""
    if volumes_at is not None:
        node.staged_once()
        for folder in (node.staging_path(), node.staging_path().parent):  # kubelet's, which is not there yet
            folder.rmdir()
        return node
    volume_with_data = request.getfixturevalue("volume_with_data")
    subprocess.run(["cp", "-a", "--sparse=always", volume_with_data, node.disk().parent], check=True, timeout=120)
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
