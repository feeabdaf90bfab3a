"""etcd and the three servers of the control plane, as processes of the host's side."""

import http.client
import json
import ssl
import subprocess
import time
from collections.abc import Callable, Sequence

from tests.cluster.api import Api, Json
from tests.cluster.commands import ClusterError
from tests.cluster.pki import Authority
from tests.cluster.settings import HOST, LOGS, SCRATCH, SERVICE, binaries

_ETCD = "http://127.0.0.1:2379"
_START_SECONDS = 90  # for one component; the slowest takes 3 on an idle machine
_STOP_SECONDS = 10
_POLL_SECONDS = 0.05
_TAIL_LINES = 30

_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}


class Daemon:
    """A program that runs until it is stopped, and whose output goes to `LOGS/NAME.log`."""

    def __init__(self, name: str, argv: Sequence[str], ready: Callable[[], bool]) -> None:
        self.name = name
        self._argv = argv
        self._ready = ready
        self._log = LOGS / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; `wait` tells when it is ready."""
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait(self) -> None:
        """Until it is ready. ClusterError with the end of its log if it ends instead, or takes too long."""
        deadline = time.monotonic() + _START_SECONDS
        while not self._ready():
            code = self._process.poll() if self._process else None
            if code is not None or time.monotonic() > deadline:
                why = f"is not ready after {_START_SECONDS} s" if code is None else f"ended with exit code {code}"
                tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
                raise ClusterError(f"{self.name} {why}:\n{tail}")
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """End it at once, if it runs."""
        if self._process:
            self._process.kill()
            self._process.wait(_STOP_SECONDS)
            self._process = None


def _answers(port: int, path: str, *, tls: bool) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = (
        http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=context)
        if tls
        else http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    )
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class ControlPlane:
    """etcd, kube-apiserver, kube-controller-manager and kube-scheduler, with Node and RBAC authorization only: who
    calls has a client certificate or a service account's token.
    """

    def __init__(self) -> None:
        self.pki = Authority(SCRATCH / "pki")
        names = (
            f"IP:{HOST}",
            f"IP:{SERVICE}",
            "DNS:kubernetes",
            "DNS:kubernetes.default",
            "DNS:kubernetes.default.svc",
        )
        self.pki.issue("apiserver", "kube-apiserver", names=names)
        self.pki.issue("kubelet-client", "kube-apiserver-kubelet-client", "system:masters")
        self.pki.key_pair("service-accounts")
        server = f"https://{HOST}"
        self.kubeconfig = self.pki.kubeconfig("admin", server, "admin", "system:masters")
        for user in ("kube-controller-manager", "kube-scheduler"):
            self.pki.kubeconfig(user, server, f"system:{user}")
        context = ssl.create_default_context(cafile=self.pki.certificate)
        context.load_cert_chain(self.pki.file("admin.crt"), self.pki.file("admin.key"))
        self.api = Api(HOST, context)
        self._audit_log = LOGS / "audit.log"
        self._policy = SCRATCH / "audit-policy.json"
        self._policy.write_text(json.dumps(_POLICY))
        self.etcd = self._etcd()
        self.apiserver = self._apiserver()
        self.controller_manager = self._controller_manager()
        self.scheduler = self._scheduler()

    def _daemon(self, name: str, ready: Callable[[], bool], *flags: str) -> Daemon:
        return Daemon(name, [str(binaries() / name), *flags], ready)

    def _etcd(self) -> Daemon:
        peer = "http://127.0.0.1:2380"
        return self._daemon(
            "etcd",
            lambda: _answers(2379, "/health", tls=False),
            f"--data-dir={SCRATCH / 'etcd'}",
            "--unsafe-no-fsync",
            f"--listen-client-urls={_ETCD}",
            f"--advertise-client-urls={_ETCD}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
        )

    def _apiserver(self) -> Daemon:
        file = self.pki.file
        return self._daemon(
            "kube-apiserver",
            self._apiserver_ready,
            f"--etcd-servers={_ETCD}",
            "--bind-address=0.0.0.0",
            "--secure-port=443",
            f"--advertise-address={HOST}",
            f"--tls-cert-file={file('apiserver.crt')}",
            f"--tls-private-key-file={file('apiserver.key')}",
            f"--client-ca-file={self.pki.certificate}",
            f"--kubelet-certificate-authority={self.pki.certificate}",
            f"--kubelet-client-certificate={file('kubelet-client.crt')}",
            f"--kubelet-client-key={file('kubelet-client.key')}",
            "--kubelet-preferred-address-types=InternalIP",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={file('service-accounts.pub')}",
            f"--service-account-signing-key-file={file('service-accounts.key')}",
            "--service-cluster-ip-range=10.96.0.0/24",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            # There is no kube-proxy: webhooks are reached at their pods.
            "--enable-aggregator-routing=true",
            f"--audit-policy-file={self._policy}",
            f"--audit-log-path={self._audit_log}",
        )

    def _apiserver_ready(self) -> bool:
        try:
            return self.api.raw("GET", "/readyz") == b"ok"
        except ClusterError:
            return False

    def _controller_manager(self) -> Daemon:
        name = "kube-controller-manager"
        return self._daemon(
            name,
            lambda: _answers(10257, "/healthz", tls=True),
            f"--kubeconfig={self.pki.file(f'{name}.kubeconfig')}",
            "--leader-elect=false",
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={self.pki.file('service-accounts.key')}",
            f"--root-ca-file={self.pki.certificate}",
            "--bind-address=127.0.0.1",
            # Its forty controllers make their service accounts first: at the default rate that takes 4 s.
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
        )

    def _scheduler(self) -> Daemon:
        return self._daemon(
            "kube-scheduler",
            lambda: _answers(10259, "/healthz", tls=True),
            f"--kubeconfig={self.pki.file('kube-scheduler.kubeconfig')}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
        )

    @property
    def _all(self) -> tuple[Daemon, ...]:
        return self.scheduler, self.controller_manager, self.apiserver, self.etcd

    def kill(self) -> None:
        for daemon in self._all:
            daemon.kill()

    def restart_apiserver(self) -> None:
        """kill -9, start, wait until it is ready again."""
        self.apiserver.kill()
        self.apiserver.start()
        self.apiserver.wait()

    def audit(self) -> list[Json]:
        """Every request so far, as audit.k8s.io/v1 Events of level Metadata, in the order in which they ended."""
        with open(self._audit_log, "rb") as file:
            lines = file.read().split(b"\n")
        return [json.loads(line) for line in lines[:-1]]  # behind the last line end is a line in the making
