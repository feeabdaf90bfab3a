"""A real Kubernetes API for the operator's tests, asked as it is in the field: by kubectl and the operator's client."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csi_driver.kube.client import Kube
from csi_driver.kube.kinds import Json, name_of, uid_of
from tests.cluster.commands import Output, run
from tests.cluster.pki import Authority
from tests.cluster.settings import KUBERNETES_BIN
from tests.keys.apiserver import NAMESPACE, ApiServer, api_server

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy/kubernetes"
MANIFESTS = Path(__file__).parent / "manifests"
_SECONDS = 60  # for one kubectl


class Api:
    """The API; who is not named is an administrator."""

    def __init__(self, server: ApiServer, authority: Authority) -> None:
        self.server = server
        self._authority = authority
        self.admin = self.kubeconfig("admin", "system:masters")

    def kubeconfig(self, user: str, group: str = "") -> Path:
        """The way to the API for a user, by a certificate of his own."""
        return self._authority.kubeconfig(f"user-{user}", self.server.address, user, group)

    @contextmanager
    def client(self, user: str = "admin", group: str = "system:masters") -> Iterator[Kube]:
        """The operator's client, as that user."""
        kube = Kube.of(self.kubeconfig(user, group))
        try:
            yield kube
        finally:
            kube.close()

    def account(self, name: str, pod: Json | None = None) -> Kube:
        """The operator's client, as a service account of the driver's namespace; with `pod`, as in that pod."""
        return Kube.of(self.account_kubeconfig(name, pod))

    def account_kubeconfig(self, name: str, pod: Json | None = None, namespace: str = NAMESPACE) -> Path:
        """The way to the API for a service account."""
        spec: Json = {"expirationSeconds": 3600}
        if pod is not None:
            spec["boundObjectRef"] = {"kind": "Pod", "apiVersion": "v1", "name": name_of(pod), "uid": uid_of(pod)}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        token = self.server.ask("POST", path, {"spec": spec})["status"]["token"]
        cluster = {"server": self.server.address, "certificate-authority": self._authority.certificate}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": name, "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name, "namespace": namespace}}],
            "current-context": "test",
        }
        path_of_it = self._authority.folder / f"account-{name}-{name_of(pod) if pod else 'none'}.kubeconfig"
        path_of_it.write_text(json.dumps(config))
        return path_of_it

    def kubectl(self, *words: str | Path, stdin: str = "", check: bool = True, user: str = "") -> Output:
        """What kubectl says to a user, an administrator unless told; ClusterError with `check` if it fails."""
        program = Path(os.environ[KUBERNETES_BIN]) / "kubectl"
        argv = [str(program), f"--kubeconfig={self.kubeconfig(user) if user else self.admin}", *map(str, words)]
        return run(argv, timeout=_SECONDS, stdin=stdin.encode(), check=check)

    def install(self, folder: Path) -> None:
        """Apply a kustomization or, without one, all manifests of a folder; until its kinds are served."""
        how = "-k" if (folder / "kustomization.yaml").exists() else "-f"
        self.kubectl("apply", how, folder)
        self.kubectl("wait", "--for=condition=Established", f"--timeout={_SECONDS}s", "crd", "--all")


@contextmanager
def running(folder: Path) -> Iterator[Api]:
    """An API as long as the block; its files lie in `folder`."""
    authority = Authority(folder / "pki")
    with api_server(folder, authority) as server:
        yield Api(server, authority)
