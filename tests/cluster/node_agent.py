"""What runs in the guest of a node, below its process 1: it makes a node of the machine, starts containerd and kubelet,
and runs scripts for the tests.

    python -m tests.cluster.node_agent NAME ADDRESS GATEWAY LOGS BINARIES

LOGS is a folder of the host, the node's own folder is /mnt/out. A request comes over TCP, marshalled, behind its length
in four bytes; so does the answer. {"run": SCRIPT, "stdin": BYTES, "timeout": SECONDS} is answered with {"code": exit
code or None after the time limit, "stdout": BYTES, "stderr": BYTES}, {"service": NAME, "up": BOOL} with nothing.

As in guest_init.py, imports cost more than what they do: only the cheap ones.
"""

import marshal
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import Any

from tests.machine.guest_init import OUT, STATE, modprobe, mount

PORT = 2222
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"

_DISK = (
    "kubelet",
    "containerd",
    "luks-csi",
    "luks-csi-lvm",
    "luks-csi-over",
    "luks-csi-rbd",
)  # folders of /var/lib that outlive a boot
_MODULES = ("overlay", "veth", "bridge", "xfs", "btrfs", "rbd")
_LOGS = "/var/log"
_CPU = "cpu MHz\t\t: 2000.000\nphysical id\t: 0\ncore id\t\t: 0\ncpu cores\t: 1\n"
_START_SECONDS = 60
_STOP_SECONDS = 10
_POLL_SECONDS = 0.05
_MS_BIND, _MS_PRIVATE = 1 << 12, 1 << 18
_CGROUPS = "/sys/fs/cgroup"
# Where cgroups are made for each QoS class, all pods together weigh about what the system does. Here each pod stands
# beside it, with the 4 of a driver's request or the 1 of a pod that asks for nothing.
_SYSTEM_WEIGHT = 4


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _make_node(name: str, logs: str) -> None:
    modprobe(["-a", *_MODULES])
    mount("none", STATE, "", _MS_PRIVATE)  # else what is mounted in its binds shows here too
    for folder in _DISK:
        os.makedirs(f"{STATE}/{folder}", exist_ok=True)
        mount(f"{STATE}/{folder}", f"/var/lib/{folder}", "", _MS_BIND)
    mount("none", _LOGS, "hostfs", data=logs)
    with open(f"{_CGROUPS}/cgroup.controllers") as controllers:
        _write(f"{_CGROUPS}/cgroup.subtree_control", " ".join(f"+{one}" for one in controllers.read().split()))
    os.mkdir(f"{_CGROUPS}/system")
    _write(f"{_CGROUPS}/system/cpu.weight", f"{_SYSTEM_WEIGHT}")
    _write(f"{_CGROUPS}/system/cgroup.procs", f"{os.getpid()}")  # with all that it starts
    # kubelet wants to know a clock rate, and this kernel tells none.
    with open("/proc/cpuinfo") as file:
        _write("/run/cpuinfo", f"{file.read().strip()}\n{_CPU}\n")
    mount("/run/cpuinfo", "/proc/cpuinfo", "", _MS_BIND)
    _write("/proc/sys/kernel/hostname", name)
    _write("/proc/sys/net/ipv4/ip_forward", "1")


def _spawn(argv: list[str], stdin: int, stdout: int, stderr: int) -> int:
    actions = [(os.POSIX_SPAWN_DUP2, ours, theirs) for ours, theirs in ((stdin, 0), (stdout, 1), (stderr, 2))]
    ignored = [signal.SIGPIPE, signal.SIGXFSZ]  # by Python, not by what it starts
    return os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions, setsid=True, setsigdef=ignored)


def _ended(pid: int, seconds: float, connection: socket.socket | None = None) -> bool:
    """Whether a child ends within the time, and before who asked for it hangs up."""
    pidfd = os.pidfd_open(pid)
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    if connection:
        poller.register(connection, select.POLLIN)
    try:
        return pidfd in (ready for ready, _ in poller.poll(seconds * 1000))
    finally:
        os.close(pidfd)


class _Service:
    """A program that runs beside the agent; its output goes to a file of /var/log."""

    def __init__(self, name: str, argv: list[str]) -> None:
        self._argv = argv
        self._log = f"{_LOGS}/{name}.log"
        self._pid = 0

    def start(self) -> None:
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        self._pid = _spawn(self._argv, nothing, log, log)
        os.close(log)
        os.close(nothing)

    def stop(self) -> None:
        """As an init system does it: SIGTERM, then SIGKILL for it alone; what it started runs on."""
        if not self._pid:
            return
        os.kill(self._pid, signal.SIGTERM)
        if not _ended(self._pid, _STOP_SECONDS):
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._pid = 0


class _Agent:
    def __init__(self, name: str, address: str, gateway: str, binaries: str) -> None:
        self._address = address
        self._gateway = gateway
        kubelet = [f"{binaries}/kubelet", f"--config={OUT}/kubelet.json", f"--kubeconfig={OUT}/kubelet.kubeconfig"]
        self._services = {
            "containerd": _Service("containerd", ["containerd", "--config", f"{OUT}/containerd.toml"]),
            "kubelet": _Service("kubelet", [*kubelet, f"--hostname-override={name}", f"--node-ip={address}", "--v=2"]),
        }

    def start(self) -> None:
        self._services["containerd"].start()
        _write(
            "/run/ip",
            f"addr add {self._address}/24 dev vec0\nlink set vec0 up\nroute add default via {self._gateway}\n",
        )
        os.waitpid(_spawn(["ip", "-batch", "/run/ip"], 0, 1, 2), 0)

    def start_kubelet(self) -> None:
        """As soon as containerd answers: without it kubelet ends."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            with socket.socket(socket.AF_UNIX) as client:
                if not client.connect_ex(CONTAINERD_SOCKET):
                    break
            time.sleep(_POLL_SECONDS)
        self._services["kubelet"].start()

    def serve(self) -> None:
        with socket.create_server((self._address, PORT)) as server:
            threading.Thread(target=self.start_kubelet).start()
            while True:
                connection, _ = server.accept()
                threading.Thread(target=self._answer, args=(connection,)).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as file:
            size = int.from_bytes(file.read(4))
            if not size:  # a look whether somebody is there
                return
            request: dict[str, Any] = marshal.loads(file.read(size))  # noqa: S302 - from the process that booted us
            answer = marshal.dumps(self._run(request, connection) if "run" in request else self._switch(request))
            connection.sendall(len(answer).to_bytes(4) + answer)

    def _run(self, request: dict[str, Any], connection: socket.socket) -> dict[str, Any]:
        files = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
        try:
            with open(files[0], "wb", closefd=False) as stdin:
                stdin.write(request["stdin"])
            os.lseek(files[0], 0, os.SEEK_SET)
            pid = _spawn(["sh", "-c", request["run"]], *files)
            ended = _ended(pid, request["timeout"], connection)
            if not ended:
                os.killpg(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            outputs = [os.pread(file, os.fstat(file).st_size, 0) for file in files[1:]]
        finally:
            for file in files:
                os.close(file)
        return {"code": code if ended else None, "stdout": outputs[0], "stderr": outputs[1]}

    def _switch(self, request: dict[str, Any]) -> dict[str, Any]:
        service = self._services[request["service"]]
        if request["up"]:
            service.start()
        else:
            service.stop()
        return {}


def main(name: str, address: str, gateway: str, logs: str, binaries: str) -> None:
    """Make the node, then serve until the guest ends."""
    _make_node(name, logs)
    agent = _Agent(name, address, gateway, binaries)
    agent.start()
    agent.serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
