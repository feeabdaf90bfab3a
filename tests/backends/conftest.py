"""What the tests of backends have in common with those of the machine, and the storage that each of them gets."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.backends.base import shared
from csi_driver.backends.lvmtool import dm_name
from csi_driver.host.workers import Workers
from tests.backends.directrig import DirectRig
from tests.backends.rigs import GROUP, ON_REQUEST, POOL, RIGS, LvmRig, RbdRig, Rig
from tests.machine.conftest import workers
from tests.machine.leaks import Facts, settled

__all__ = ["workers"]

CHOSEN = os.environ.get("BACKEND", "")
"""Only what begins with it."""

_OF = {"direct_rig": "csi-direct", "thick": "lvm-thick", "thin": "lvm-thin", "lvm_rig": "lvm", "rbd_rig": "rbd"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test runs on each backend, or on those that it is of."""
    if "storage" not in metafunc.fixturenames:
        return
    own = next((prefix for fixture, prefix in _OF.items() if fixture in metafunc.fixturenames), "")
    names = [name for name in RIGS if name.startswith(CHOSEN) and name.startswith(own)]
    names = [name for name in names if CHOSEN or not name.startswith(ON_REQUEST)]
    metafunc.parametrize("storage", names, indirect=True, scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is of another backend than the chosen one is no test that was skipped."""
    items[:] = [item for item in items if not item.name.endswith("[NOTSET]")]


@pytest.fixture(scope="session")
def storage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, workers: Workers
) -> Iterator[Rig]:
    """Each backend in turn; to make a volume group takes some seconds in the guest."""
    state, name = os.environ.get("MACHINE_STATE"), f"storage-{request.param}"
    place = Path(state, name) if state else tmp_path_factory.mktemp(name)
    place.mkdir(exist_ok=True)
    with RIGS[request.param](place, workers) as made:
        yield made


@pytest.fixture
def rig(storage: Rig) -> Iterator[Rig]:
    """A backend without volumes, and the check that the test leaves no device."""
    storage.clear()
    before = Facts.now(Path("/proc/self/fdinfo"))

    def left() -> list[str]:
        found = Facts.now(Path("/proc/self/fdinfo")).more_than(before)
        return [one for one in found if one.startswith(("mappings", "loops")) and dm_name(GROUP, POOL) not in one]

    yield storage
    if shared(storage.backend()) is not None:
        storage.restart()  # what it attached stays until then
    if leaked := settled(left):
        pytest.fail(f"left behind: {'; '.join(leaked)}")


@pytest.fixture
def lvm_rig(rig: Rig) -> LvmRig:
    """A backend of LVM, thick or thin."""
    assert isinstance(rig, LvmRig)
    return rig


@pytest.fixture
def direct_rig(rig: Rig) -> DirectRig:
    """The backend csi over a driver that is called."""
    assert isinstance(rig, DirectRig)
    return rig


@pytest.fixture
def rbd_rig(rig: Rig) -> RbdRig:
    """A backend of Ceph."""
    assert isinstance(rig, RbdRig)
    return rig


@pytest.fixture
def thick(lvm_rig: LvmRig) -> LvmRig:
    """A backend of LVM whose volumes have extents of their own."""
    return lvm_rig


@pytest.fixture
def thin(lvm_rig: LvmRig) -> LvmRig:
    """A backend of LVM whose volumes are in a thin pool."""
    return lvm_rig


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory, workers: Workers) -> Iterator[RbdRig]:
    """A Ceph on this machine, for tests that need no device."""
    with RbdRig(tmp_path_factory.mktemp("rig"), workers) as rig:
        yield rig


@pytest.fixture
def ceph(started: RbdRig) -> RbdRig:
    """That Ceph, without volumes."""
    started.clear()
    return started
