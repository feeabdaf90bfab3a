"""Servers of key management systems, real ones, each a process of its own on a free port of this machine.

Vault and local-kms are built from their own modules (tests/keys/go); local-kms and moto stand for AWS, PyKMIP's server
for KMIP. A plug-in of Kubernetes' KMS v2 is a gRPC server in the test's own process: there is nothing else to one.
"""

import contextlib
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import grpc
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from kmip.core import enums
from kmip.pie.client import ProxyKmipClient

from csi_driver.keys import kmsv2_pb2 as kms
from csi_driver.keys.base import EntryReader
from csi_driver.keys.kmip import connected, proxy_on, server_of
from csi_driver.keys.kmsv2_pb2_grpc import KeyManagementServiceServicer, add_KeyManagementServiceServicer_to_server
from tests.cluster.pki import Authority

VAULT_BIN = "VAULT_BIN"
LOCAL_KMS_BIN = "LOCAL_KMS_BIN"
REGION = "eu-central-1"
AWS_CREDENTIALS = {"aws_access_key_id": "access", "aws_secret_access_key": "secret"}
_START_SECONDS = 60
_STOP_SECONDS = 10
HOST = "127.0.0.1"


def free_port() -> int:
    """A TCP port that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(argv: Sequence[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs as long as the block; its output goes to `log`."""
    with open(log, "ab") as output:
        running = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | environment
        )
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait(_STOP_SECONDS)


def wait_for_port(port: int, running: subprocess.Popen[bytes], log: Path, host: str = HOST) -> None:
    """Until somebody listens there."""
    deadline = time.monotonic() + _START_SECONDS
    while running.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError(f"no server on port {port}: {log.read_text(errors='replace')[-2000:]}")


def _said_of(host: str, log: Path, running: subprocess.Popen[bytes]) -> str:
    """The root token, in the whole line that begins with the address: it comes behind the port."""
    deadline = time.monotonic() + _START_SECONDS
    while running.poll() is None and time.monotonic() < deadline:
        for line in log.read_text().splitlines(keepends=True):
            if line.startswith(host) and line.endswith("\n"):
                return line.split()[1]
        time.sleep(0.05)
    raise AssertionError(f"Vault told no token: {log.read_text(errors='replace')[-2000:]}")


@dataclass
class Vault:
    """A Vault in memory, unsealed; `ask` asks as its root."""

    host: str
    port: int
    root: str
    ca: str | None = None

    @property
    def address(self) -> str:
        return f"http{'s' if self.ca else ''}://{self.host}:{self.port}"

    def ask(self, method: str, path: str, document: object = None) -> dict[str, Any]:
        """The answer; AssertionError unless it is a success."""
        if self.ca:
            context = ssl.create_default_context(cadata=self.ca)
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                self.host, self.port, timeout=20, context=context
            )
        else:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=20)
        with contextlib.closing(connection):
            body = None if document is None else json.dumps(document)
            connection.request(method, f"/v1/{path}", body, {"X-Vault-Token": self.root})
            response = connection.getresponse()
            content = response.read()
        assert response.status < 300, f"{method} {path}: {response.status} {content!r}"
        answer: dict[str, Any] = json.loads(content) if content else {}
        return answer

    def token(self, *rules: tuple[str, str], ttl: str = "1h") -> str:
        """A token that may do these: (path, capabilities between commas)."""
        policy = "\n".join(f'path "{path}" {{ capabilities = {json.dumps(may.split(","))} }}' for path, may in rules)
        name = f"p{abs(hash(policy))}"
        self.ask("PUT", f"sys/policies/acl/{name}", {"policy": policy})
        made = self.ask("POST", "auth/token/create", {"policies": [name], "ttl": ttl})
        return str(made["auth"]["client_token"])


@contextmanager
def vault(folder: Path, authority: Authority | None = None, host: str = HOST) -> Iterator[Vault]:
    """A Vault at an address of this machine, with TLS where an authority is given."""
    port = free_port()
    log = folder / f"vault-{port}.log"
    tls: list[str] = []
    if authority is not None:
        authority.issue("vault", "vault", names=[f"IP:{host}"])
        tls = [authority.file("vault.crt"), authority.file("vault.key")]
    with process([os.environ[VAULT_BIN], f"{host}:{port}", *tls], log) as running:
        wait_for_port(port, running, log, host)
        root = _said_of(host, log, running)
        yield Vault(host, port, root, Path(authority.certificate).read_text() if authority else None)


@contextmanager
def aws(folder: Path) -> Iterator[str]:
    """moto's server; its address."""
    port, log = free_port(), folder / "moto.log"
    with process([sys.executable, "-m", "moto.server", "-p", str(port)], log) as running:
        wait_for_port(port, running, log)
        yield f"http://{HOST}:{port}"


@contextmanager
def local_kms(folder: Path) -> Iterator[str]:
    """local-kms, which unlike moto refuses keys that are disabled or about to be deleted; its address."""
    port, log = free_port(), folder / "local-kms.log"
    argv = [os.environ[LOCAL_KMS_BIN], f"{HOST}:{port}", str(folder / "local-kms"), REGION]
    with process(argv, log) as running:
        wait_for_port(port, running, log)
        yield f"http://{HOST}:{port}"


@contextmanager
def aws_client(address: str) -> Iterator[Any]:
    """A client of boto3 for what stands for AWS KMS there."""
    client = boto3.client("kms", region_name=REGION, endpoint_url=address, **AWS_CREDENTIALS)
    with contextlib.closing(client):
        yield client


def aws_key(address: str) -> str:
    """The ARN of a new key there."""
    with aws_client(address) as client:
        return str(client.create_key()["KeyMetadata"]["Arn"])


def disable(client: Any, key: str) -> None:
    client.disable_key(KeyId=key)


def enable(client: Any, key: str) -> None:
    client.enable_key(KeyId=key)


def begin_deletion(client: Any, key: str) -> None:
    client.schedule_key_deletion(KeyId=key, PendingWindowInDays=7)


def cancel_deletion(client: Any, key: str) -> None:
    """Which leaves it disabled."""
    client.cancel_key_deletion(KeyId=key)
    client.enable_key(KeyId=key)


@dataclass(frozen=True)
class KmipServer:
    """PyKMIP's server, and the entries of a secret for it but the key's identifier."""

    endpoint: str
    entries: dict[str, str]


@contextmanager
def kmip(folder: Path, authority: Authority) -> Iterator[KmipServer]:
    """PyKMIP's server with a certificate of the authority, which wants one of its clients."""
    port, log = free_port(), folder / "kmip.log"
    authority.issue("kmip", "kmip", names=[f"IP:{HOST}"])
    authority.issue("kmip-client", "luks-csi")
    arguments = [str(folder), str(port), authority.file("kmip.crt"), authority.file("kmip.key"), authority.certificate]
    with process([sys.executable, "-m", "tests.keys.kmip_server", *arguments], log) as running:
        wait_for_port(port, running, log)
        files = {"CA_CERT": authority.certificate, "CLIENT_CERT": authority.file("kmip-client.crt")}
        files["CLIENT_KEY"] = authority.file("kmip-client.key")
        yield KmipServer(f"{HOST}:{port}", {entry: Path(path).read_text() for entry, path in files.items()})


@contextmanager
def kmip_client(kmip: KmipServer) -> Iterator[ProxyKmipClient]:
    """PyKMIP's client over our connection: the driver's own has no way to make keys."""
    reader = EntryReader("KMS kmip", {"KMIP_ENDPOINT": kmip.endpoint})
    server = server_of(reader, kmip.entries | {"UNIQUE_IDENTIFIER": "1"}, "secret")
    version = enums.KMIPVersion.KMIP_1_4
    client = ProxyKmipClient(hostname=HOST, port=1, config_file=os.devnull, kmip_version=version)
    with connected(reader.where, server) as connection:
        client.proxy = proxy_on(reader.where, server, connection, enums)
        vars(client)["_is_open"] = True
        yield client
        client.proxy.socket = None


@dataclass
class Plugin(KeyManagementServiceServicer):
    """A plug-in of Kubernetes' KMS v2 as they are written: AES-GCM under keys by id; `fail` makes it refuse."""

    keys: dict[str, bytes] = field(default_factory=lambda: {"key-1": os.urandom(32)})
    newest: str = "key-1"
    healthz: str = "ok"
    fail: grpc.StatusCode | None = None
    wait: float = 0.0

    def Status(self, request: kms.StatusRequest, context: grpc.ServicerContext) -> kms.StatusResponse:
        self._refuse(context)
        return kms.StatusResponse(version="v2", healthz=self.healthz, key_id=self.newest)

    def Encrypt(self, request: kms.EncryptRequest, context: grpc.ServicerContext) -> kms.EncryptResponse:
        self._refuse(context)
        nonce = os.urandom(12)
        sealed = AESGCM(self.keys[self.newest]).encrypt(nonce, request.plaintext, None)
        return kms.EncryptResponse(ciphertext=sealed, key_id=self.newest, annotations={"nonce.test.local": nonce})

    def Decrypt(self, request: kms.DecryptRequest, context: grpc.ServicerContext) -> kms.DecryptResponse:
        self._refuse(context)
        if request.key_id not in self.keys:
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no key {request.key_id}")
        nonce = request.annotations["nonce.test.local"]
        plaintext = AESGCM(self.keys[request.key_id]).decrypt(nonce, request.ciphertext, None)
        return kms.DecryptResponse(plaintext=plaintext)

    def _refuse(self, context: grpc.ServicerContext) -> None:
        time.sleep(self.wait)
        if self.fail is not None:
            context.abort(self.fail, "as the test wants it")


@contextmanager
def plugin(folder: Path) -> Iterator[tuple[Plugin, str]]:
    """A plug-in and its endpoint."""
    servicer, path = Plugin(), folder / "plugin.sock"
    server = grpc.server(ThreadPoolExecutor(4))
    add_KeyManagementServiceServicer_to_server(servicer, server)
    server.add_insecure_port(f"unix:{path}")
    server.start()
    try:
        yield servicer, f"unix://{path}"
    finally:
        server.stop(0).wait(_STOP_SECONDS)
