"""A Ceph of one machine, for the tests: a monitor, a manager and an OSD in memory, as plain processes.

It runs in the guest itself, or on the host for several guests. Nothing of it touches the machine's own configuration.
"""

import base64
import contextlib
import json
import os
import secrets
import signal
import struct
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

POOL = "rbd"
CLUSTER = "ceph-one"
USER = "csi"
TOLD = "ceph.json"
"""In the shared folder: where it is, and the key of the driver's user."""
WISH = "wish"
"""In the shared folder: what the host is to do; gone when it is done."""

_START_SECONDS = 120.0
_END_SECONDS = 20.0
_PAUSE = 0.1
_CONF = """
[global]
fsid = {fsid}
mon host = [v2:{address}:3300,v1:{address}:6789]
public addr = {address}
cluster addr = {address}
auth allow insecure global id reclaim = false
keyring = {folder}/keyring
run dir = {folder}/run
crash dir = {folder}/crash
log file = {folder}/log/$name.log
mon cluster log file = {folder}/log/cluster.log
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
mon allow pool delete = true
mon warn on pool no redundancy = false
mon data avail warn = 1
mon data avail crit = 1
mgr tick period = 2
ms async op threads = 1
osd op num shards = 1
osd op num threads per shard = 1
paxos propose interval = 0.02
paxos min wait = 0.005
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd class update on start = false
[mon]
mon data = {folder}/mon
admin socket = {folder}/run/$name.asok
[mgr]
mgr data = {folder}/mgr
mgr initial modules =
admin socket = {folder}/run/$name.asok
[osd]
osd data = {folder}/osd
osd objectstore = memstore
osd max object name len = 256
osd max object namespace len = 64
memstore device bytes = 2147483648
admin socket = {folder}/run/$name.asok
"""


def new_key() -> str:
    """A key as ceph-authtool makes it: a type, a time, and 16 random bytes behind their length."""
    head = struct.pack("<hiih", 1, int(time.time()), 0, 16)
    return base64.b64encode(head + secrets.token_bytes(16)).decode()


class Ceph:
    """The cluster, in `folder`, at `address`; `key` is that of the driver's user, which has the least rights."""

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self._folder = folder
        self.address = address
        self.fsid = str(uuid.uuid4())
        self.key = new_key()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def conf(self) -> str:
        """An administrator's configuration."""
        return f"{self._folder}/ceph.conf"

    @property
    def monitors(self) -> list[str]:
        """As a configuration of clusters has them: the second port is what the kernel speaks."""
        return [f"{self.address}:6789"]

    def config(self) -> str:
        """A `config.json` of Ceph-CSI."""
        return json.dumps([{"clusterID": CLUSTER, "monitors": self.monitors}])

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("osd.0", "mgr.x", "mon.a"):
            self.kill(name)

    def admin(self, program: str, *words: str, check: bool = True, seconds: float = 60) -> str:
        """One of Ceph's programs, as an administrator runs it."""
        argv = [program, "-c", f"{self._folder}/ceph.conf", "--keyring", f"{self._folder}/keyring", *words]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=seconds)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(argv)}: {done.stderr}")
        return done.stdout

    @contextlib.contextmanager
    def running(self, program: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """One that runs as long as the block, and is killed at its end."""
        argv = [program, "-c", f"{self._folder}/ceph.conf", "--keyring", f"{self._folder}/keyring", *words]
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                yield process
            finally:
                process.kill()

    def asked(self, program: str, *words: str) -> Any:
        """The same, its answer as JSON."""
        said = self.admin(program, *words, "--format", "json").lstrip()
        return json.JSONDecoder().raw_decode(said)[0]  # `osd blocklist ls` says something behind it

    def stop(self, name: str = "osd.0") -> None:
        """It answers nobody, and goes on with `go_on`."""
        os.kill(self._daemons[name].pid, signal.SIGSTOP)

    def go_on(self, name: str = "osd.0") -> None:
        """It answers again."""
        os.kill(self._daemons[name].pid, signal.SIGCONT)

    def kill(self, name: str) -> None:
        """End one of the daemons at once; what an OSD in memory had is lost."""
        daemon = self._daemons.pop(name, None)
        if daemon is not None:
            daemon.kill()
            daemon.wait(_END_SECONDS)

    def clear(self) -> None:
        """Remove all that is in the pool."""
        self.admin("rados", "purge", POOL, "--yes-i-really-really-mean-it")

    def _start(self) -> None:
        folder = self._folder
        for name in ("mon", "mgr", "osd", "run", "log", "crash"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "ceph.conf").write_text(_CONF.format(folder=folder, address=self.address, fsid=self.fsid))
        rights = {
            "mon.": {"mon": "allow *"},
            "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
            "mgr.x": {"mon": "allow profile mgr", "osd": "allow *"},
            "osd.0": {"mon": "allow profile osd", "mgr": "allow profile osd", "osd": "allow *"},
            f"client.{USER}": {"mon": "profile rbd", "osd": "profile rbd", "mgr": "profile rbd"},
        }
        keys = {name: new_key() for name in rights} | {f"client.{USER}": self.key}
        (folder / "keyring").write_text(
            "".join(
                f"[{name}]\nkey = {keys[name]}\n" + "".join(f'caps {kind} = "{what}"\n' for kind, what in caps.items())
                for name, caps in rights.items()
            )
        )
        monitors = f"[v2:{self.address}:3300,v1:{self.address}:6789]"
        self.admin("monmaptool", "--create", "--fsid", self.fsid, "--addv", "a", monitors, f"{folder}/monmap")
        self.admin("ceph-mon", "--mkfs", "-i", "a", "--monmap", f"{folder}/monmap", "--keyring", f"{folder}/keyring")
        self._run("mon.a", "ceph-mon", "-i", "a")
        self._until(lambda: self.admin("ceph", "auth", "import", "-i", f"{folder}/keyring", seconds=30))
        self._run("mgr.x", "ceph-mgr", "-i", "x")
        osd = str(uuid.uuid4())
        self.admin("ceph", "osd", "new", osd, "0")
        self.admin("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._run("osd.0", "ceph-osd", "-i", "0")
        self.admin("ceph", "osd", "pool", "create", POOL, "8")
        self._until(lambda: self.asked("ceph", "osd", "stat")["num_up_osds"] == 1)
        self.admin("rbd", "pool", "init", POOL)
        self._until(lambda: any(pool["name"] == POOL for pool in self.asked("ceph", "df")["pools"]))

    def _run(self, name: str, program: str, *words: str) -> None:
        with open(self._folder / "log" / f"{name}.out", "wb") as said:
            self._daemons[name] = subprocess.Popen(
                [program, "-f", "-c", f"{self._folder}/ceph.conf", *words], stdout=said, stderr=said
            )

    def _until(self, seen: Any) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired, KeyError):
                if seen() is not False:
                    return
            if time.monotonic() > deadline:
                raise AssertionError(f"Ceph does not start; its logs are in {self._folder}/log")
            time.sleep(_PAUSE)


class CephOutside(Ceph):
    """One that runs on the host of this guest, as `tests.backends.on_ceph` tells in the folder that they share."""

    def __init__(self, shared: Path) -> None:
        told = json.loads((shared / TOLD).read_text())
        super().__init__(shared, told["address"])
        self.key = told["key"]
        self._shared = shared

    def stop(self, name: str = "osd.0") -> None:
        self._ask(f"stop {name}")

    def go_on(self, name: str = "osd.0") -> None:
        self._ask(f"go_on {name}")

    def clear(self) -> None:
        self._ask("clear")

    def kill(self, name: str) -> None:
        """It is the host's."""

    def _start(self) -> None:
        """It runs."""

    def _ask(self, what: str) -> None:
        wish = self._shared / WISH
        wish.with_suffix(".new").write_text(what)
        wish.with_suffix(".new").rename(wish)
        deadline = time.monotonic() + _START_SECONDS
        while wish.exists():
            if time.monotonic() > deadline:
                raise AssertionError(f"the host does not {what}")
            time.sleep(_PAUSE)
