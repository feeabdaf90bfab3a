"""A real Kubernetes API: etcd and kube-apiserver on free ports, without the rest of a cluster."""

import http.client
import json
import os
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csi_driver.keys.kubernetes import Kubernetes
from tests.cluster.pki import Authority
from tests.cluster.settings import KUBERNETES_BIN
from tests.keys.servers import HOST, free_port, process, wait_for_port

NAMESPACE = "luks-csi"
ACCOUNT = "luks-csi-node"
_READY_SECONDS = 60
_ALL = ("get", "list", "create", "patch", "delete")


@dataclass
class ApiServer:
    """The API; `ask` asks as an administrator, who may speak for another user."""

    port: int
    context: ssl.SSLContext
    ca: str
    folder: Path

    @property
    def address(self) -> str:
        return f"https://{HOST}:{self.port}"

    def ask(self, method: str, path: str, document: object = None, as_user: str = "") -> dict[str, Any]:
        """The answer; AssertionError unless it is a success."""
        with closing(http.client.HTTPSConnection(HOST, self.port, timeout=20, context=self.context)) as connection:
            body = None if document is None else json.dumps(document)
            headers = {"Content-Type": "application/json"} | ({"Impersonate-User": as_user} if as_user else {})
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read()
        assert response.status < 300, f"{method} {path}: {response.status} {content!r}"
        answer: dict[str, Any] = json.loads(content)
        return answer

    def namespace(self, name: str) -> None:
        """A namespace of that name."""
        self.ask("POST", "/api/v1/namespaces", {"metadata": {"name": name}})

    def secret(self, namespace: str, name: str, **entries: str) -> None:
        """A secret with these entries."""
        document = {"metadata": {"name": name}, "stringData": entries}
        self.ask("POST", f"/api/v1/namespaces/{namespace}/secrets", document)

    def config_map(self, namespace: str, name: str, **entries: str) -> None:
        """A ConfigMap with these entries."""
        self.ask("POST", f"/api/v1/namespaces/{namespace}/configmaps", {"metadata": {"name": name}, "data": entries})

    def account(self, namespace: str, name: str) -> str:
        """A service account; a token of it."""
        self.ask("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": name}})
        return self.token(namespace, name)

    def token(self, namespace: str, name: str) -> str:
        """A token of a service account."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        return str(self.ask("POST", path, {"spec": {"expirationSeconds": 3600}})["status"]["token"])

    def bind(self, namespace: str, account: str, *rules: tuple[str, tuple[str, ...]]) -> None:
        """Let a service account do these in the whole cluster: (resource, verbs)."""
        name = f"{namespace}-{account}"
        group = "rbac.authorization.k8s.io"
        role = {
            "metadata": {"name": name},
            "rules": [{"apiGroups": [""], "resources": [what], "verbs": list(verbs)} for what, verbs in rules],
        }
        binding = {
            "metadata": {"name": name},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": name},
            "subjects": [{"kind": "ServiceAccount", "namespace": namespace, "name": account}],
        }
        self.ask("POST", f"/apis/{group}/v1/clusterroles", role)
        self.ask("POST", f"/apis/{group}/v1/clusterrolebindings", binding)

    def review_tokens(self, namespace: str, account: str) -> None:
        """Let a service account review tokens, as Vault does."""
        group = "rbac.authorization.k8s.io"
        binding = {
            "metadata": {"name": f"{namespace}-{account}-reviews"},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "system:auth-delegator"},
            "subjects": [{"kind": "ServiceAccount", "namespace": namespace, "name": account}],
        }
        self.ask("POST", f"/apis/{group}/v1/clusterrolebindings", binding)

    def as_driver(self, folder: Path) -> Kubernetes:
        """The API as the driver's pod sees it, with the credentials that kubelet would mount in `folder`."""
        folder.mkdir(exist_ok=True)
        (folder / "token").write_text(self.token(NAMESPACE, ACCOUNT))
        (folder / "ca.crt").write_text(self.ca)
        (folder / "namespace").write_text(NAMESPACE)
        return Kubernetes(HOST, str(self.port), folder)


@contextmanager
def api_server(folder: Path, authority: Authority, *options: str) -> Iterator[ApiServer]:
    """The API, with the driver's namespace and service account in it; `options` are for kube-apiserver."""
    binaries = Path(os.environ[KUBERNETES_BIN])
    client, peer, port = free_port(), free_port(), free_port()
    authority.issue("apiserver", "kube-apiserver", names=[f"IP:{HOST}"])
    authority.issue("api-admin", "admin", "system:masters")
    authority.key_pair("service-accounts")
    file, etcd = authority.file, f"http://{HOST}:{client}"
    with ExitStack() as stack:
        log = folder / "etcd.log"
        running = stack.enter_context(
            process(
                [
                    str(binaries / "etcd"), f"--data-dir={folder / 'etcd'}", "--unsafe-no-fsync",
                    f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}",
                    f"--listen-peer-urls=http://{HOST}:{peer}",
                    f"--initial-advertise-peer-urls=http://{HOST}:{peer}",
                    f"--initial-cluster=default=http://{HOST}:{peer}",
                ],
                log,
            )
        )  # fmt: skip
        wait_for_port(client, running, log)
        log = folder / "kube-apiserver.log"
        running = stack.enter_context(
            process(
                [
                    str(binaries / "kube-apiserver"), f"--etcd-servers={etcd}", f"--bind-address={HOST}",
                    f"--secure-port={port}", f"--advertise-address={HOST}", "--endpoint-reconciler-type=none",
                    f"--tls-cert-file={file('apiserver.crt')}", f"--tls-private-key-file={file('apiserver.key')}",
                    f"--client-ca-file={authority.certificate}",
                    "--service-account-issuer=https://kubernetes.default.svc",
                    f"--service-account-key-file={file('service-accounts.pub')}",
                    f"--service-account-signing-key-file={file('service-accounts.key')}",
                    "--service-cluster-ip-range=10.96.0.0/24", "--authorization-mode=Node,RBAC",
                    # Nobody runs the controller that makes each namespace its account.
                    "--disable-admission-plugins=ServiceAccount", *options,
                ],
                log,
            )
        )  # fmt: skip
        wait_for_port(port, running, log)
        context = ssl.create_default_context(cafile=authority.certificate)
        context.load_cert_chain(file("api-admin.crt"), file("api-admin.key"))
        api = ApiServer(port, context, Path(authority.certificate).read_text(), folder)
        _wait_until_ready(api)
        api.namespace(NAMESPACE)
        api.account(NAMESPACE, ACCOUNT)
        api.bind(
            NAMESPACE, ACCOUNT, ("secrets", _ALL), ("configmaps", ("get",)), ("serviceaccounts/token", ("create",))
        )
        yield api


def _wait_until_ready(api: ApiServer) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        with suppress(AssertionError, OSError, http.client.HTTPException):
            # The roles that come with it are made last.
            api.ask("GET", "/apis/rbac.authorization.k8s.io/v1/clusterroles/system:auth-delegator")
            return
        time.sleep(0.2)
    raise AssertionError("kube-apiserver does not become ready")
