"""What the tests of backends have in common with those of the machine, and the storage that each of them gets."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.backends.lvmtool import dm_name
from csi_driver.host.workers import Workers
from tests.backends.rigs import GROUP, POOL, RIGS, LvmRig, Rig
from tests.machine.conftest import workers
from tests.machine.leaks import Facts, settled

__all__ = ["workers"]

CHOSEN = os.environ.get("BACKEND", "")
"""Only what begins with it."""


@pytest.fixture(scope="session", params=[name for name in RIGS if name.startswith(CHOSEN)])
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
    if leaked := settled(left):
        pytest.fail(f"left behind: {'; '.join(leaked)}")


@pytest.fixture
def lvm_rig(rig: Rig) -> LvmRig:
    """A backend of LVM, thick or thin."""
    if not isinstance(rig, LvmRig):
        pytest.skip("this backend has no volume group")
    return rig
