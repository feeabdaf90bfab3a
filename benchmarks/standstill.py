"""How long a write of a pod waits while its volume is moved to another volume key."""

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import seconds
from benchmarks.servers import Running, Volume
from benchmarks.table import Row, times
from csi_driver.volumes.conversion import CHUNK

_VOLUME_BYTES = 128 << 20
_BLOCK = 4096
_PAUSE = 0.005
_ROUNDS = 2
_LIMIT_SECONDS = 600


def rows(server: Running, folder: Path) -> Iterator[Row]:
    """The longest of a pod's writes, each durable, beside what a chunk takes in all, with the rest behind it."""
    volume = server.new_volume("moved", folder / "mounts", _VOLUME_BYTES)
    volume.stage()
    waited, chunk = [], []
    for _ in range(_ROUNDS):
        with _writing(volume.staging_path / "pod") as pod:
            taken = seconds(lambda: _reencrypt(server, volume))
        waited.append(pod.longest)
        chunk.append(taken / (_VOLUME_BYTES / CHUNK))
    volume.unstage()
    volume.delete()
    what = "the longest write of a pod while its volume key is changed, against what 16 MiB of that take"
    yield times(what, waited, chunk, 1.0)


def _reencrypt(server: Running, volume: Volume) -> None:
    program = str(Path(sys.executable).with_name("luks-csi"))
    state = server.endpoint.parent / "state"
    argv = [program, "volume", "reencrypt", volume.id, "--yes", "--passphrase-file", "-"]
    argv += ["--state-dir", str(state), "--endpoint", str(server.endpoint), "--free-space-floor", "64Mi"]
    subprocess.run(argv, input=volume.key.encode(), check=True, capture_output=True, timeout=_LIMIT_SECONDS)


@dataclass
class _Pod:
    """Writes blocks to a file, past the page cache and durably; `longest` is what one of them took, in seconds."""

    path: Path
    longest: float = 0.0
    ending: threading.Event = field(default_factory=threading.Event)

    def write(self) -> None:
        """Until the end."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_DSYNC)
        try:
            with mmap.mmap(-1, _BLOCK) as block:  # aligned, for direct I/O
                while not self.ending.is_set():
                    self.longest = max(self.longest, seconds(lambda: os.pwrite(descriptor, block, 0)))
                    time.sleep(_PAUSE)
        finally:
            os.close(descriptor)


@contextmanager
def _writing(path: Path) -> Iterator[_Pod]:
    pod = _Pod(path)
    thread = threading.Thread(target=pod.write)
    thread.start()
    try:
        yield pod
    finally:
        pod.ending.set()
        thread.join()
