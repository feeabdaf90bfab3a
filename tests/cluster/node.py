"""A node: a guest with containerd and kubelet, on a tap of the bridge."""

import json
import marshal
import re
import shutil
import socket
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tests.cluster.api import Api, ApiError
from tests.cluster.commands import ClusterError, Output, run
from tests.cluster.node_agent import CONTAINERD_SOCKET, PORT
from tests.cluster.pki import Authority
from tests.cluster.settings import BRIDGE, HOST, LOGS, ROOT, SCRATCH, binaries, node_address, pod_subnet
from tests.machine.guest_init import OUT
from tests.machine.guest_uml import Guest, GuestConfig

MEMORY = 3 << 30  # taken as it is used
_BOOT_SECONDS = 60
_READY_SECONDS = 150
_POLL_SECONDS = 0.1
_CONNECT_SECONDS = 10
_OVERHEAD_SECONDS = 15  # what an answer of the agent may take beyond the script's time limit

_DAMAGE = re.compile(r"Out of memory: Killed|\bBUG:|\bOops|Kernel panic")

_CONTAINERD = f"""version = 2
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
  address = "{CONTAINERD_SOCKET}"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  disable_apparmor = true
  restrict_oom_score_adj = true

  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{OUT}/cni"

  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"

    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
"""


def _kubelet(address: str) -> dict[str, Any]:
    never = {"memory.available": "1Mi", "nodefs.available": "0%", "imagefs.available": "0%"}
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": address,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": "ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": "serving.crt",
        "tlsPrivateKeyFile": "serving.key",
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupsPerQOS": False,  # the guest's kernel has no cpuset
        "enforceNodeAllocatable": [],
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,
        "resolvConf": "",
        "clusterDNS": ["10.96.0.10"],  # nobody is there, but without one each pod gets a warning
        "evictionHard": {**never, "nodefs.inodesFree": "0%", "imagefs.inodesFree": "0%"},
        "imageGCHighThresholdPercent": 100,
        "serializeImagePulls": False,
        "maxPods": 200,
        "nodeStatusUpdateFrequency": "4s",
        "syncFrequency": "2s",
        "volumePluginDir": "/var/lib/kubelet/volumeplugins",
    }


def _cni(number: int) -> dict[str, Any]:
    ranges = [[{"subnet": pod_subnet(number)}]]
    ipam = {"type": "host-local", "dataDir": "/run/cni-ipam", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]}
    return {"cniVersion": "0.4.0", "name": "pods", "plugins": [{"type": "ptp", "ipam": ipam}]}


def _now() -> datetime:
    """The next full second. The API's times are cut to seconds, and nothing on a node is up a second after its start;
    so what is older is from before. The guest's clock is the host's.
    """
    return datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=1)


class Node:
    """A node of the cluster, named `node-NUMBER`, with a disk of its own that outlives its boots.

    `name` and `address` are those of its Node object. `log` is the folder of its logs: `kernel.log`, `containerd.log`,
    `kubelet.log` and `pods/`, readable while it runs and after. What the API tells of its containers from before
    `booted_at` is no longer so.
    """

    def __init__(self, number: int, disk: Path, pki: Authority, api: Api) -> None:
        self.number = number
        self.name = f"node-{number}"
        self.address = node_address(number)
        self.log = LOGS / self.name
        self._api = api
        self._tap = f"tap{number}"
        self._folder = SCRATCH / self.name
        self._stack = ExitStack()
        self.booted_at = self._kubelet_at = _now()
        self._make_folder(pki)
        self._disk = SCRATCH / f"{self.name}.disk"
        run(["cp", "--sparse=always", str(disk), str(self._disk)], timeout=60)
        config = GuestConfig(
            memory=MEMORY,
            disk=self._disk,
            out=self._folder,
            cwd=ROOT,
            tap=self._tap,
            mac=f"02:00:0a:63:00:{10 + number:02x}",
            own=["/var/lib"],
            shown=[binaries()],
            kernel_log=self.log / "kernel.log",
        )
        self._guest = Guest(config)

    def _make_folder(self, pki: Authority) -> None:
        (self._folder / "cni").mkdir(parents=True)
        self.log.mkdir()
        user = f"system:node:{self.name}"
        pki.kubeconfig("kubelet", f"https://{HOST}", user, "system:nodes", folder=self._folder)
        names = (f"IP:{self.address}", f"DNS:{self.name}")
        pki.issue("serving", user, "system:nodes", names=names, folder=self._folder)
        (self._folder / "containerd.toml").write_text(_CONTAINERD)
        (self._folder / "kubelet.json").write_text(json.dumps(_kubelet(self.address)))
        (self._folder / "cni" / "10-pods.conflist").write_text(json.dumps(_cni(self.number)))

    def open(self) -> None:
        """Connect it to the bridge and boot it for the first time; `close` undoes that."""
        with ExitStack() as stack:
            self._ip(f"tuntap add dev {self._tap} mode tap")
            stack.callback(self._ip, f"link del {self._tap}")
            self._ip(f"link set {self._tap} master {BRIDGE} up")
            self._ip(f"route add {pod_subnet(self.number)} via {self.address}")
            stack.enter_context(self._guest)
            self.start_boot()
            self._stack = stack.pop_all()

    def close(self) -> None:
        """End it for good."""
        self._stack.close()

    @staticmethod
    def _ip(command: str) -> None:
        run(["ip", *command.split()], timeout=10)

    # The machine.

    def cut(self) -> None:
        """The power goes: the guest ends at once, what was not on its disk is lost. Nothing if it is off already."""
        self._guest.kill()

    def start_boot(self) -> None:
        """Switch it on, on its own disk, without waiting for anything."""
        self.booted_at = self._kubelet_at = _now()
        arguments = [self.name, self.address, HOST, str(self.log), str(binaries())]
        self._guest.start([sys.executable, "-E", "-S", "-m", "tests.cluster.node_agent", *arguments])

    def boot(self) -> None:
        """Switch it on, on its own disk, and wait until it is Ready."""
        self.start_boot()
        self.wait_ready()

    def wait_booted(self) -> None:
        """Until `run` works. ClusterError with what the guest has said if that takes too long."""
        deadline = time.monotonic() + _BOOT_SECONDS
        while True:
            try:
                with socket.create_connection((self.address, PORT), timeout=1) as connection:
                    connection.sendall(bytes(4))
                    return
            except OSError as error:
                if time.monotonic() > deadline:
                    said = self._guest.output("stderr").decode(errors="replace")
                    log = f"{said}\nThe kernel's log is {self.log / 'kernel.log'}."
                    raise ClusterError(f"{self.name} did not boot within {_BOOT_SECONDS} s ({error}).\n{log}") from None
            time.sleep(_POLL_SECONDS)

    def run(self, script: str, timeout: float = 30, *, check: bool = True, stdin: bytes = b"") -> Output:
        """Run a script of sh on the node, as root in the node's own namespaces.

        ClusterError if it still runs after `timeout` seconds, when it is ended with its process group; if its exit code
        is not 0, with `check`; if the node is off.
        """
        answer = self._ask({"run": script, "stdin": stdin, "timeout": timeout}, timeout + _OVERHEAD_SECONDS)
        what = f"on {self.name}: {script}"
        output = Output(answer["code"] or 0, answer["stdout"], answer["stderr"])
        if answer["code"] is None:
            raise ClusterError(f"{what}\nstill ran after {timeout:g} s:\n{output.said}")
        return output.checked(what) if check else output

    def _ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        data = marshal.dumps(request)
        try:
            with socket.create_connection((self.address, PORT), timeout=_CONNECT_SECONDS) as connection:
                connection.settimeout(timeout)
                connection.sendall(len(data).to_bytes(4) + data)
                with connection.makefile("rb") as file:
                    size = int.from_bytes(file.read(4))
                    answer: dict[str, Any] = marshal.loads(file.read(size))  # noqa: S302 - our own agent
                    return answer
        except (OSError, EOFError) as error:
            raise ClusterError(f"{self.name} does not answer: {error!r}") from None

    # kubelet.

    @property
    def ready(self) -> bool:
        """Whether kubelet has reported this boot, since its last start, as Ready."""
        node = self._api.find("Node", self.name)
        if not node:
            return False
        conditions = {one["type"]: one for one in node["status"].get("conditions", [])}
        condition = conditions.get("Ready", {})
        if condition.get("status") != "True":
            return False
        return datetime.fromisoformat(condition["lastHeartbeatTime"]) >= self._kubelet_at

    def wait_ready(self) -> None:
        """Until `ready`. ClusterError with what the Node says if that takes too long."""
        self.wait_booted()
        deadline = time.monotonic() + _READY_SECONDS
        seen: object = None
        while True:
            try:
                if self.ready:
                    return
                node = self._api.find("Node", self.name)
                seen = json.dumps(node["status"]["conditions"], indent=1) if node else "It did not register."
            except ApiError as error:  # the apiserver may be away
                seen = error
            if time.monotonic() > deadline:
                logs = f"What kubelet says is in {self.log / 'kubelet.log'}."
                raise ClusterError(f"{self.name} is not Ready after {_READY_SECONDS} s.\n{seen}\n{logs}")
            time.sleep(_POLL_SECONDS)

    def stop_kubelet(self) -> None:
        """End kubelet as an init system would; containers run on."""
        self._ask({"service": "kubelet", "up": False}, 60)

    def start_kubelet(self) -> None:
        """Start kubelet and wait until the node is Ready."""
        self._kubelet_at = _now()
        self._ask({"service": "kubelet", "up": True}, 60)
        self.wait_ready()

    def restart_kubelet(self) -> None:
        self.stop_kubelet()
        self.start_kubelet()

    @property
    def complaints(self) -> list[str]:
        """What the kernel has said, over all boots, that must not happen in any test: memory ran out, it has a bug."""
        lines = (self.log / "kernel.log").read_text(errors="replace").splitlines()
        return [f"{self.name}: {line}" for line in lines if _DAMAGE.search(line)]

    def save_pod_logs(self, folder: Path) -> None:
        """Copy what the containers have written so far, before kubelet deletes it with the pods."""
        if (pods := self.log / "pods").is_dir():
            shutil.copytree(pods, folder / self.name, symlinks=True, dirs_exist_ok=True)
