"""Claims of a driver below, in a played cluster, as the place of all volumes of the tests.

What lies below is a file, which is looked at by its name. The cluster is a process of its own: servers come and go.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

from csi_driver.backends.base import Backend
from csi_driver.host.loop import LoopDevices
from csi_driver.host.workers import Workers
from csi_driver.kube.kinds import VOLUME_RECORD
from csi_driver.model.settings import Settings
from csi_driver.volumes.driver import Host
from tests.backends.csirig import BELOW, NAMESPACE, CsiRig
from tests.backends.played import FarCluster, played_cluster, whole_far_backend
from tests.machine.leaks import settled
from tests.machine.server import ServerProcess


class CsiPlace:
    """The claims of one namespace; `folder` has the cluster."""

    parameters: Mapping[str, str] = {"backingStorageClass": BELOW}
    rounding = CsiRig.rounding

    def __init__(self, folder: Path, cluster: FarCluster) -> None:
        self._folder, self._cluster = folder, cluster

    def backend(self, state: Path, workers: Workers) -> Backend:
        return whole_far_backend(self._folder)

    def settings(self, settings: Settings) -> Settings:
        return replace(settings, backend="csi")

    def host(self, host: Host) -> Host:
        return replace(host, backend=whole_far_backend(self._folder))

    def server(self, folder: Path, *options: str) -> ServerProcess:
        program = (sys.executable, "-m", "tests.backends.csi_server", "played", str(self._folder))
        return ServerProcess(folder, *options, program=program)

    def before_call(self) -> None:
        """It does not see who reads its file."""

    def give(self, backend: Backend, volume_id: str) -> None:
        """It is given before it is attached."""

    def take(self, backend: Backend, volume_id: str) -> None:
        """It is taken when it is let go of."""

    def shown(self, volume_id: str) -> Path:
        return cast("Path", self._cluster.ask("file", volume_id))

    def hide(self, volume_id: str) -> None:
        """Nothing is shown."""

    def is_left_shown(self, volume_id: str) -> bool:
        file = str(self.shown(volume_id))
        return bool(settled(lambda: [loop.path for loop in LoopDevices().find(file)]))

    def raw_record(self, volume_id: str) -> bytes:
        found = self._cluster.get(VOLUME_RECORD, volume_id, NAMESPACE)
        assert found is not None, f"volume {volume_id} has no VolumeRecord"
        return str(found["spec"]["record"]).encode()

    def put_record(self, volume_id: str, content: bytes) -> None:
        self._cluster.patch(VOLUME_RECORD, volume_id, {"spec": {"record": content.decode()}}, NAMESPACE)

    def put_down(self) -> None:
        """Nothing is shown, and holders that were told to end do so."""

    def clear_away(self) -> None:
        self._cluster.ask("clear")


@contextmanager
def claims_of_tests(folder: Path) -> Iterator[CsiPlace]:
    """A played cluster."""
    with played_cluster(folder) as cluster:
        yield CsiPlace(folder, cluster)
