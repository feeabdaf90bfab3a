"""The played cluster of `csirig` in a process of its own, which outlives whoever asks it: an API is not its client's.

`python -m tests.backends.played FOLDER`. Its holders are there as long as it is, and end as kubelet ends them.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, cast

from csi_driver.backends.csi import CsiBackend
from csi_driver.backends.csiclaims import name_for
from csi_driver.backends.csidirect import DirectDevices, nobody_calls
from csi_driver.backends.csirecords import Api
from csi_driver.host.files import Files
from csi_driver.host.workers import Workers
from csi_driver.kube.kinds import POD, VOLUME_RECORD, Json, Kind
from tests.backends.csirig import DRIVER, NAMESPACE, CsiRig, WholeBackend, backend_on
from tests.machine.processes import wait_for

_PAUSE = 0.02


def socket_in(folder: Path) -> Path:
    """Where it listens."""
    return folder / "api.sock"


class Asked:
    """What can be asked: the API, and what lies below it."""

    def __init__(self, rig: CsiRig) -> None:
        self._rig = rig

    def call(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        """One call of the API."""
        return getattr(self._rig.api, verb)(*args, **kwargs)

    def device(self, volume_id: str) -> Path:
        """The loop device of a volume's holder, else the file of its claim."""
        for name, running in self._rig.api.running.items():
            pod = self._rig.api.get(POD, name, NAMESPACE)
            if pod is not None and running.file == self._rig.api.file(name_for(volume_id)):
                return running.device
        return self._rig.api.file(name_for(volume_id))

    def file(self, volume_id: str) -> Path:
        """The file of a volume's claim."""
        return self._rig.api.file(name_for(volume_id))

    def left_of(self, volume_id: str) -> list[str]:
        """What is there of a volume, if anything is."""
        file = self._rig.api.file(name_for(volume_id))
        found = [str(file)] if file.exists() else []
        if self._rig.api.get(VOLUME_RECORD, volume_id, NAMESPACE) is not None:
            found.append(f"VolumeRecord {volume_id}")
        return found

    def clear(self) -> None:
        """All volumes are gone."""
        self._rig.clear()

    def end_holders(self) -> None:
        """As kubelet does, with those that were told to."""
        for name in list(self._rig.api.running):
            self._rig.api.get(POD, name, NAMESPACE)


class FarCluster:
    """A client; safe for many threads. It has the members of `Api`."""

    def __init__(self, folder: Path) -> None:
        self._connection = Client(str(socket_in(folder)), "AF_UNIX")
        self._lock = threading.Lock()

    def ask(self, what: str, *args: Any, **kwargs: Any) -> Any:
        """A member of `Asked`. Raises what it raised."""
        with self._lock:
            self._connection.send((what, args, kwargs))
            succeeded, answer = self._connection.recv()
        if not succeeded:
            raise answer
        return answer

    def get(self, kind: Kind, name: str, namespace: str = "") -> Json | None:
        return cast("Json | None", self.ask("call", "get", kind, name, namespace))

    def list(
        self, kind: Kind, namespace: str = "", labels: Mapping[str, str] = {}, fields: Mapping[str, str] = {}
    ) -> tuple[list[Json], str]:
        return cast("tuple[list[Json], str]", self.ask("call", "list", kind, namespace, labels, fields))

    def create(self, kind: Kind, thing: Json, namespace: str = "") -> Json:
        return cast("Json", self.ask("call", "create", kind, thing, namespace))

    def patch(self, kind: Kind, name: str, patch: Json, namespace: str = "", *, status: bool = False) -> Json:
        return cast("Json", self.ask("call", "patch", kind, name, patch, namespace, status=status))

    def delete(
        self, kind: Kind, name: str, namespace: str = "", *, grace_seconds: int | None = None, seen: Json | None = None
    ) -> None:
        self.ask("call", "delete", kind, name, namespace, grace_seconds=grace_seconds, seen=seen)


@contextlib.contextmanager
def played_cluster(folder: Path) -> Iterator[FarCluster]:
    """Such a process, as long as the block; nothing of it is left."""
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-m", "tests.backends.played", str(folder)]) as process:
        try:
            wait_for(lambda: _listens(socket_in(folder)), "the played cluster", 60)
            made = FarCluster(folder)
            try:
                yield made
            finally:
                made.ask("clear")
        finally:
            process.kill()


def far_backend(
    folder: Path,
    topology: str = "",
    *,
    api: Api | None = None,
    files: Files | None = None,
    make: type[CsiBackend] = CsiBackend,
) -> CsiBackend:
    """The backend of another process on it."""
    direct = DirectDevices(nobody_calls, folder, DRIVER)
    return backend_on(api or FarCluster(folder), folder / "csi", files or Files(), direct, topology, make=make)


def whole_far_backend(folder: Path, topology: str = "") -> WholeBackend:
    """The same, with Kubernetes' attaching ahead of each attach and behind each detach."""
    made = far_backend(folder, topology, make=WholeBackend)
    assert isinstance(made, WholeBackend)
    made.users = Counter()
    return made


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as caller, contextlib.suppress(OSError):
        caller.connect(str(path))
        return True
    return False


def _serve(connection: Connection, asked: Asked, lock: threading.Lock) -> None:
    with contextlib.suppress(EOFError, OSError):  # its client is gone
        while True:
            what, args, kwargs = connection.recv()
            answer: tuple[bool, object]
            try:
                with lock:
                    answer = True, getattr(asked, what)(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - whatever it is, the client is told
                answer = False, error
            connection.send(answer)


def main(words: Sequence[str]) -> None:
    """Serve until it is killed."""
    folder, lock = Path(words[0]), threading.Lock()
    with CsiRig(folder, Workers(())) as rig, Listener(str(socket_in(folder)), "AF_UNIX") as listener:
        asked = Asked(rig)

        def kubelet() -> None:
            try:
                while True:
                    time.sleep(_PAUSE)
                    with lock:
                        asked.end_holders()
            finally:
                os._exit(1)  # nothing would come to its end any more

        threading.Thread(target=kubelet, daemon=True).start()
        while True:
            connection = listener.accept()
            threading.Thread(target=_serve, args=(connection, asked, lock), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1:])
