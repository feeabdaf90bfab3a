"""A guest, and a Ceph for it on the host, where starting it and asking it costs a tenth: `python -m
tests.backends.on_ceph -- COMMAND…`.

COMMAND runs as by `tests.machine.guest`. On a host with device-mapper it just runs, and starts a Ceph itself.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.backends.ceph import TOLD, WISH, Ceph
from tests.machine.guest import Guest, GuestConfig, has_device_mapper

BRIDGE, ADDRESS, NODES = "lukscsi-ceph", "10.98.7.1", ("10.98.7.11", "10.98.7.12")
SECONDS = 21600
PASSED_ON = ("BACKEND", "CSI_SANITY", "SEED", "COUNT", "FROM", "PYTHONPATH")
_PAUSE = 0.05
_SET_UP = 'ip addr add {address}/24 dev vec0 && ip link set vec0 up && exec "$@"'


@contextlib.contextmanager
def network() -> Iterator[None]:
    """A bridge of the host with the address of Ceph, and a tap for each machine."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    with contextlib.ExitStack() as stack:
        ip("link", "add", BRIDGE, "type", "bridge")
        stack.callback(ip, "link", "del", BRIDGE)
        ip("addr", "add", f"{ADDRESS}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for number in range(len(NODES)):
            ip("tuntap", "add", f"lukscsi{number}", "mode", "tap")
            stack.callback(ip, "link", "del", f"lukscsi{number}")
            ip("link", "set", f"lukscsi{number}", "master", BRIDGE, "up")
        yield


def machine(number: int, shared: Path, memory: int = 1 << 30, **env: str) -> GuestConfig:
    """A guest on that network."""
    tap, mac = f"lukscsi{number}", f"02:98:00:00:07:1{number}"
    return GuestConfig(memory=memory, disk_size=8 << 30, sync=False, out=shared, tap=tap, mac=mac, env=env)


def main(command: Sequence[str]) -> int:
    """Run it; its exit code."""
    if has_device_mapper():
        os.execvp(command[0], list(command))  # noqa: S606 - an argv list
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit leaves no bridge and no daemon
    with contextlib.ExitStack() as stack:
        shared, data = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ceph-", dir=where)))
            for where in (None, "/dev/shm")
        )
        stack.enter_context(network())
        ceph = stack.enter_context(Ceph(data, ADDRESS))
        for name in ("ceph.conf", "keyring"):
            shutil.copy(data / name, shared / name)
        (shared / TOLD).write_text(json.dumps({"address": ADDRESS, "key": ceph.key}))
        stack.enter_context(_fulfilling(ceph, shared / WISH))
        env = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {"CEPH_OUTSIDE": "yes"}
        env |= {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "268435456"}
        guest = stack.enter_context(Guest(machine(0, shared, 2 << 30, **env), forward=True))
        guest.start(["sh", "-c", _SET_UP.format(address=NODES[0]), "sh", *command])
        return guest.wait(SECONDS)


@contextlib.contextmanager
def _fulfilling(ceph: Ceph, wish: Path) -> Iterator[None]:
    """Do what the guest wishes of the daemons, or of all that is in the pool."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_PAUSE):
            with contextlib.suppress(FileNotFoundError):
                what, _, name = wish.read_text().partition(" ")
                {"stop": ceph.stop, "go_on": ceph.go_on, "clear": lambda _: ceph.clear()}[what](name)
                wish.unlink()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:] if sys.argv[1:2] == ["--"] else sys.argv[1:]))
