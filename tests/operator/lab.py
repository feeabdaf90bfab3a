"""A Kubernetes API with operator and agents at work: processes of this machine, each agent with a folder of its own.

The API is real (etcd, kube-apiserver, RBAC); nodes and the node pods are objects without anything behind them but the
agent's process. The image engine needs no device-mapper.
"""

import base64
import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml

from csi_driver.kube.client import Kube
from csi_driver.kube.copies import AUDIENCE
from csi_driver.kube.kinds import (
    BACKING_IMAGE,
    CRD,
    IMAGE,
    IMAGE_COPY,
    NODE,
    POD,
    SECRET,
    VIRTUAL_MACHINE_IMAGE,
    Json,
    Kind,
    name_of,
)
from csi_driver.model.errors import AlreadyExists, DriverError
from csi_driver.operator.certificates import AGENT_SECRET
from tests.cluster.pki import Authority
from tests.keys.apiserver import ACCOUNT, NAMESPACE, ApiServer, api_server
from tests.keys.servers import HOST, free_port

DEPLOY: Final = Path(__file__).parents[2] / "deploy" / "kubernetes"
DRIVER: Final = "luks.csi.internal"
OPERATOR: Final = "luks-csi-operator"
_PATIENCE: Final = float(os.environ.get("PATIENCE", "120"))  # no verdict hangs on it, only how long a failure takes
_POLL_SECONDS: Final = 0.05

_OPERATOR_OPTIONS: Final = ("--log-level=debug", "--lost-seconds=1")
_LUKS_CSI: Final = str(Path(sys.executable).with_name("luks-csi"))
_USUAL: Final[Mapping[str, Sequence[str]]] = {}

Found = TypeVar("Found")


def documents(path: Path) -> Iterator[Json]:
    """The objects of a manifest."""
    yield from (each for each in yaml.safe_load_all(path.read_text()) if each)


class Process:
    """Operator or agent: started, killed, started again."""

    def __init__(self, argv: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self._argv = argv
        self.log = log
        self.environment = environment
        self._running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.log, "ab") as output:
            self._running = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | self.environment
            )

    def kill(self) -> None:
        """As a node's end would: at once."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    @property
    def pid(self) -> int:
        assert self._running is not None
        return self._running.pid

    @property
    def is_up(self) -> bool:
        return self._running is not None and self._running.poll() is None

    @property
    def code(self) -> int | None:
        """How it ended by itself, as subprocess tells it."""
        return self._running.poll() if self._running is not None else None

    def _end(self, number: int) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.send_signal(number)
            running.wait(60)


class Lab:
    """The API, an administrator's client of it, and what runs against it: by `programs` in the place of luks-csi, by
    the name of the command.
    """

    def __init__(
        self, api: ApiServer, authority: Authority, folder: Path, programs: Mapping[str, Sequence[str]] = _USUAL
    ) -> None:
        self._programs = programs
        self.api = api
        self.folder = folder
        self._authority = authority
        self.kubeconfig = authority.kubeconfig("lab-admin", api.address, "lab-admin", "system:masters")
        self.kube = Kube.of(self.kubeconfig)
        self.agents: dict[str, Process] = {}
        self.tls = folder / "tls"
        self._install()
        self.operator = self._operator()

    def _install(self) -> None:
        compat = (f"compat/{name}.yaml" for name in ("backingimages", "virtualmachineimages", "rbac"))
        for file in ("images/crds.yaml", "images/rbac.yaml", "images/policies.yaml", *compat):
            for document in documents(DEPLOY / file):
                self.apply(document)
        for kind in (IMAGE, IMAGE_COPY, BACKING_IMAGE, VIRTUAL_MACHINE_IMAGE):
            self.wait(f"kind {kind}", functools.partial(self._version_of, kind))
        self.tls.mkdir(exist_ok=True)

    def _version_of(self, kind: Kind) -> str:
        return self.kube.list(kind)[1]

    def mount_certificates(self) -> None:
        """What kubelet does with the secret of the agents."""
        found = self.wait("secret of the agents", lambda: self.kube.get(SECRET, AGENT_SECRET, NAMESPACE))
        for name, value in found["data"].items():
            (self.tls / name).write_bytes(base64.b64decode(value))

    def apply(self, document: Json) -> None:
        """Have an object of a manifest, in the driver's namespace where it names none."""
        group, _, version = document["apiVersion"].rpartition("/")
        name = document["kind"]
        plural = f"{name.lower()}{'es' if name.endswith('s') else 's'}"
        if plural.endswith("ys"):
            plural = f"{plural[:-2]}ies"
        namespaced = name in ("ServiceAccount", "Role", "RoleBinding", "Secret", "ConfigMap", "PersistentVolumeClaim")
        kind = CRD if name == CRD.name else Kind(group, version, name, plural, namespaced)
        namespace = document["metadata"].get("namespace", NAMESPACE) if namespaced else ""
        thing = {key: value for key, value in document.items() if key not in ("apiVersion", "kind")}
        with contextlib.suppress(AlreadyExists):
            self.kube.create(kind, thing, namespace)

    def wait(self, what: str, look: Callable[[], Found | None], seconds: float = _PATIENCE) -> Found:
        """Until `look` finds something; what it found. AssertionError with the logs' ends if it never does."""
        deadline = time.monotonic() + seconds
        said = "nothing"
        while time.monotonic() < deadline:
            try:
                if found := look():
                    return found
            except (AssertionError, DriverError) as error:
                said = str(error)
            time.sleep(_POLL_SECONDS)
        raise AssertionError(f"no {what} after {seconds:g} s ({said})\n{self._logs()}")

    def _logs(self) -> str:
        ends = []
        for process in (self.operator, *self.agents.values()):
            text = process.log.read_text(errors="replace")[-3000:] if process.log.exists() else ""
            ends.append(f"--- {process.log.name}\n{text}")
        images = [(name_of(each), each.get("status")) for each in self.kube.list(IMAGE)[0]]
        copies = [(name_of(each), each["metadata"].get("deletionTimestamp"), each.get("status"))
                  for each in self.kube.list(IMAGE_COPY)[0]]  # fmt: skip
        return "\n".join([*ends, json.dumps(images, indent=1), json.dumps(copies, indent=1)])

    def user(self, name: str) -> Kube:
        """A client as an ordinary user of that name."""
        return Kube.of(self._authority.kubeconfig(f"user-{name}", self.api.address, name))

    def secret(self, name: str, passphrase: str = "", namespace: str = NAMESPACE, **entries: str) -> None:
        """A secret as Longhorn has it."""
        values = {"CRYPTO_KEY_VALUE": passphrase or secrets.token_hex(8), "CRYPTO_PBKDF": "pbkdf2", **entries}
        data = {entry: base64.b64encode(value.encode()).decode() for entry, value in values.items()}
        self.kube.create(SECRET, {"metadata": {"name": name}, "data": data}, namespace)

    # Nodes.

    def node(self, name: str, *options: str, within: Sequence[str] = (), **labels: str) -> Process:
        """A node with an agent that runs, with these options; `within` is a command that runs its program."""
        self.kube.create(NODE, {"metadata": {"name": name, "labels": labels}})
        pod = {
            "metadata": {
                "name": f"node-{name}",
                "labels": {"app.kubernetes.io/name": "luks-csi", "app.kubernetes.io/component": "node"},
            },
            "spec": {
                "nodeName": name,
                "serviceAccountName": ACCOUNT,
                "containers": [{"name": "image-agent", "image": "none"}],
            },
        }
        self.kube.create(POD, pod, NAMESPACE)
        self.pod_up(name, up=True)
        agent = self.agents[name] = self._agent(name, options, within)
        agent.start()
        return agent

    def pod_up(self, name: str, *, up: bool) -> None:
        """What kubelet would say of the node's pod."""
        status = {
            "containerStatuses": [
                {"name": "image-agent", "ready": up, "restartCount": 0, "image": "none", "imageID": ""}
            ]
        }
        self.kube.patch(POD, f"node-{name}", {"status": status}, NAMESPACE, status=True)

    def forget_node(self, name: str) -> None:
        """The node is gone for good, and its agent and folder with it."""
        self.agents.pop(name).kill()
        self.api.ask("DELETE", f"/api/v1/namespaces/{NAMESPACE}/pods/node-{name}?gracePeriodSeconds=0")
        self.kube.delete(NODE, name)

    def images_of(self, node: str) -> Path:
        """The folder of a node's images."""
        return self.folder / node / "images"

    def _agent(self, node: str, options: Sequence[str], within: Sequence[str]) -> Process:
        folder = self.folder / node
        folder.mkdir(exist_ok=True)
        port = free_port()
        token = folder / "agents-token"
        pod = self.kube.get(POD, f"node-{node}", NAMESPACE)
        token.write_text(self.token(ACCOUNT, AUDIENCE, pod=pod))
        argv = [
            f"--node-id={node}", f"--state-dir={folder}", f"--listen={HOST}:{port}",
            f"--address={HOST}:{port}", f"--tls-dir={self.tls}", f"--token-file={token}", "--allow-local",
            "--log-level=debug", *options,
        ]  # fmt: skip
        environment = {"KUBECONFIG": str(self._kubeconfig_of(ACCOUNT, folder / "kubeconfig", pod))}
        return self._process("image-agent", argv, folder / "agent.log", environment, within)

    def _operator(self) -> Process:
        environment = {"KUBECONFIG": str(self._kubeconfig_of(OPERATOR, self.folder / "operator.kubeconfig"))}
        return self._process("operator", _OPERATOR_OPTIONS, self.folder / "operator.log", environment)

    def operator_with(self, *options: str) -> Process:
        """The operator with options beside the usual ones; not started."""
        return self.planted([*self._programs.get("operator", (_LUKS_CSI, "operator")), *options])

    def planted(self, program: Sequence[str]) -> Process:
        """The operator as another program; not started."""
        return Process([*program, *_OPERATOR_OPTIONS], self.operator.log, self.operator.environment)

    def _process(
        self, command: str, options: Sequence[str], log: Path, environment: dict[str, str], within: Sequence[str] = ()
    ) -> Process:
        program = self._programs.get(command, (_LUKS_CSI, command))
        return Process([*within, *program, *options], log, environment)

    def token(self, account: str, *audiences: str, pod: Json | None = None) -> str:
        """A token of a service account of the driver's namespace; with `pod`, as kubelet has one made for that pod."""
        path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{account}/token"
        spec: dict[str, Any] = {"expirationSeconds": 7200} | ({"audiences": [*audiences]} if audiences else {})
        if pod is not None:
            bound = {"apiVersion": "v1", "kind": "Pod", "name": name_of(pod), "uid": pod["metadata"]["uid"]}
            spec["boundObjectRef"] = bound
        return str(self.api.ask("POST", path, {"spec": spec})["status"]["token"])

    def _kubeconfig_of(self, account: str, path: Path, pod: Json | None = None) -> Path:
        cluster = {"server": self.api.address, "certificate-authority": self._authority.certificate}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": cluster}],
            "users": [{"name": account, "user": {"token": self.token(account, pod=pod)}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": account, "namespace": NAMESPACE}}],
            "current-context": "lab",
        }
        path.write_text(json.dumps(config))
        return path

    # Images.

    def image(self, name: str, source: Json, **spec: Any) -> Json:
        """An Image of that source."""
        return self.kube.create(IMAGE, {"metadata": {"name": name}, "spec": {"source": source, **spec}})

    def clone(self, name: str, of: str, encryption: str = "ignore", secret: str = "", **spec: Any) -> Json:
        """An Image that is a clone of another one."""
        references = {"secretRef": {"name": secret, "namespace": NAMESPACE}} if secret else {}
        return self.image(name, {"clone": {"image": of, "encryption": encryption}}, **references, **spec)

    def status(self, name: str) -> Json:
        """The status of an Image, {} before there is one."""
        found = self.kube.get(IMAGE, name)
        assert found is not None, f"there is no Image {name}"
        status: Json = found.get("status", {})
        return status

    def wait_phase(self, name: str, phase: str = "Ready", *words: str) -> Json:
        """Until an Image is in this phase and its message has these words; its status."""

        def look() -> Json | None:
            status = self.status(name)
            assert status.get("phase") == phase, f"{name}: {status.get('phase')}, {status.get('message')}"
            assert all(word in status["message"] for word in words), status["message"]
            return status

        return self.wait(f"{phase} of image {name}", look)

    def wait_copies(self, name: str, count: int) -> list[str]:
        """Until so many copies are ready; their nodes."""

        def look() -> list[str] | None:
            nodes = [each["name"] for each in self.status(name).get("nodes", ()) if each["state"] == "Ready"]
            assert len(nodes) == count, self.status(name).get("nodes")
            return nodes

        return self.wait(f"{count} copies of image {name}", look)

    def delete_image(self, name: str) -> None:
        """Until it is gone."""
        self.kube.delete(IMAGE, name)
        self.wait(f"end of image {name}", lambda: self.kube.get(IMAGE, name) is None)

    def file(self, node: str, image: str) -> Path:
        """The file of a node's copy."""
        return self.images_of(node) / "ready" / image / "image"

    def close(self) -> None:
        """Everything ends."""
        for process in (self.operator, *self.agents.values()):
            process.stop()
        self.kube.close()


@contextlib.contextmanager
def a_lab(
    folder: Path, nodes: Sequence[str], *options: str, programs: Mapping[str, Sequence[str]] = _USUAL
) -> Iterator[Lab]:
    """A lab with an operator and these nodes at work, as long as the block; `options` are for kube-apiserver."""
    authority = Authority(folder / "pki")
    with api_server(folder, authority, *options) as api:
        lab = Lab(api, authority, folder, programs)
        try:
            lab.operator.start()
            lab.mount_certificates()
            for node in nodes:
                lab.node(node)
            yield lab
        finally:
            lab.close()
