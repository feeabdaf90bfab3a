"""What the tests on real device-mapper have in common."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.workers import Workers
from csi_driver.volumes.driver import WARM
from tests.machine.leaks import Facts, clear, settled
from tests.machine.node import Node


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """One launcher for many drivers: starting it takes most of a second in the guest."""
    workers = Workers(WARM)
    workers.start()
    yield workers
    workers.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk, and the check that the test leaves nothing in the kernel."""
    state = os.environ.get("MACHINE_STATE")
    folder = Path(state, tmp_path.name) if state else tmp_path
    folder.mkdir(exist_ok=True)
    before = Facts.now(folder)
    yield folder
    mapper = DeviceMapper()
    for name in mapper.names():
        mapper.resume(name)  # else a look at what is mounted there waits for good
    # The files stay: they are the volumes.
    if leaked := settled(lambda: [one for one in Facts.now(folder).more_than(before) if not one.startswith("files")]):
        clear(before, folder)
        pytest.fail(f"left behind: {'; '.join(leaked)}")


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
def used(node: Node, volume_with_data: Path) -> Node:
    """A driver with a volume that was staged, written ("precious") and unstaged."""
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
