"""Claims of a driver below, in a played cluster, as the place of all volumes of the tests.

What lies below is a file, which is looked at by its name.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.backends.base import Backend
from csi_driver.backends.csiclaims import name_for
from csi_driver.host.loop import LoopDevices, LoopInfo
from csi_driver.host.workers import Workers
from csi_driver.kube.kinds import POD, VOLUME_RECORD
from csi_driver.model.settings import Settings
from tests.backends.csirig import BELOW, NAMESPACE, CsiRig
from tests.machine.leaks import settled
from tests.machine.places import REASONS
from tests.machine.server import ServerProcess


class CsiPlace:
    """The claims of one namespace. `rig` is the cluster."""

    parameters: Mapping[str, str] = {"backingStorageClass": BELOW}
    rounding = CsiRig.rounding

    def __init__(self, rig: CsiRig) -> None:
        self.rig = rig

    def backend(self, state: Path, workers: Workers) -> Backend:
        return self.rig.backend()

    def settings(self, settings: Settings) -> Settings:
        pytest.skip(REASONS["played"])

    def server(self, folder: Path, *options: str) -> ServerProcess:
        pytest.skip(REASONS["played"])

    def before_call(self) -> None:
        """It does not see who reads its file."""

    def give(self, backend: Backend, volume_id: str) -> None:
        """The rig does, before it is attached."""

    def take(self, backend: Backend, volume_id: str) -> None:
        """The rig does, when it is let go of."""

    def shown(self, volume_id: str) -> Path:
        return self.rig.api.file(name_for(volume_id))

    def hide(self, volume_id: str) -> None:
        """Nothing is shown."""

    def is_left_shown(self, volume_id: str) -> bool:
        return bool(settled(lambda: [loop.path for loop in self._loops(volume_id)]))

    def raw_record(self, volume_id: str) -> bytes:
        found = self.rig.api.get(VOLUME_RECORD, volume_id, NAMESPACE)
        assert found is not None, f"volume {volume_id} has no VolumeRecord"
        return str(found["spec"]["record"]).encode()

    def put_record(self, volume_id: str, content: bytes) -> None:
        self.rig.api.change(VOLUME_RECORD, volume_id, {"spec": {"record": content.decode()}}, NAMESPACE)

    def put_down(self) -> None:
        settled(self._ending)

    def clear_away(self) -> None:
        self.rig.clear()

    def _loops(self, volume_id: str) -> Iterator[LoopInfo]:
        self._ending()
        yield from LoopDevices().find(str(self.shown(volume_id)))

    def _ending(self) -> list[str]:
        """The holders that were told to end and have not; those that have are gone, as kubelet says it."""
        found = []
        for name in list(self.rig.api.running):
            pod = self.rig.api.get(POD, name, NAMESPACE)
            if pod is not None and pod["metadata"].get("deletionTimestamp"):
                found.append(name)
        return found


@contextmanager
def claims_of_tests(folder: Path, workers: Workers) -> Iterator[CsiPlace]:
    """A played cluster."""
    folder.mkdir()
    with CsiRig(folder, workers) as rig:
        yield CsiPlace(rig)
