"""The cluster's certificates, by openssl: made anew for each run, kept in memory only."""

import json
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.commands import run

_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
_SECONDS = 30  # for one openssl, which takes a hundredth of one


class Authority:
    """A certificate authority and the folder in which its certificates lie: `NAME.crt`, `NAME.key`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True)
        self._config = folder / "openssl.cnf"
        self._config.write_text("[req]\ndistinguished_name = dn\n[dn]\n")
        self.certificate = self.file("ca.crt")
        constraints = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign")
        self._request(folder, "ca", "/CN=cluster", constraints)

    def file(self, name: str) -> str:
        return str(self.folder / name)

    def _request(self, folder: Path, name: str, subject: str, extensions: Sequence[str], *signed_by: str) -> None:
        additions = [word for extension in extensions for word in ("-addext", extension)]
        files = ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.crt")]
        command = ["openssl", "req", "-x509", "-config", str(self._config), *_CURVE, "-days", "30", "-subj", subject]
        run([*command, *files, *additions, *signed_by], timeout=_SECONDS)

    def issue(
        self, name: str, user: str, group: str = "", *, names: Sequence[str] = (), folder: Path | None = None
    ) -> None:
        """A certificate for a client that is `user` of `group`, or, with `names`, for a server that is reached by them
        (`IP:10.99.0.1`, `DNS:node-1`).
        """
        subject = f"/O={group}/CN={user}" if group else f"/CN={user}"
        extensions = ["basicConstraints=critical,CA:FALSE", "keyUsage=critical,digitalSignature"]
        extensions.append(f"extendedKeyUsage={'serverAuth' if names else 'clientAuth'}")
        if names:
            extensions.append(f"subjectAltName={','.join(names)}")
        signed_by = ("-CA", self.certificate, "-CAkey", self.file("ca.key"))
        self._request(folder or self.folder, name, subject, extensions, *signed_by)

    def key_pair(self, name: str) -> None:
        """A key pair without a certificate: `NAME.key` and `NAME.pub`."""
        key, public = self.file(f"{name}.key"), self.file(f"{name}.pub")
        kind = ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
        run(["openssl", "genpkey", *kind, "-out", key], timeout=_SECONDS)
        run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], timeout=_SECONDS)

    def kubeconfig(self, name: str, server: str, user: str, group: str = "", *, folder: Path | None = None) -> Path:
        """A certificate for `user` and the file `NAME.kubeconfig` beside it, which refers to its neighbours by name."""
        folder = folder or self.folder
        self.issue(name, user, group, folder=folder)
        if folder != self.folder:
            (folder / "ca.crt").write_bytes(Path(self.certificate).read_bytes())
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": server, "certificate-authority": "ca.crt"}}],
            "users": [{"name": name, "user": {"client-certificate": f"{name}.crt", "client-key": f"{name}.key"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
            "current-context": "test",
        }
        path = folder / f"{name}.kubeconfig"
        path.write_text(json.dumps(config))  # JSON is YAML
        return path
