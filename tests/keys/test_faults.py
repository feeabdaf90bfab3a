"""What each type of key source makes of a server that fails: its class, its gRPC code, one sentence, nothing secret.

Azure's, IBM's and Google's are in test_clouds, those of a PKCS#11 token in test_pkcs11.
"""

import contextlib
import functools
import http.server
import json
import socket
import ssl
import stat
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import grpc
import msgspec
import pytest
from kmip.core import enums
from kmip.services.kmip_client import KMIPProxy

from csi_driver.host.workers import Workers
from csi_driver.keys.aws import Account, AwsWrapper
from csi_driver.keys.base import EntryReader, KeySource, Wrapping
from csi_driver.keys.exec import ExecWrapper, run_program
from csi_driver.keys.generated import GeneratedKeys
from csi_driver.keys.http import HttpService, Tls
from csi_driver.keys.kmip import KmipWrapper, server_of
from csi_driver.keys.kubernetes import Kubernetes
from csi_driver.keys.metadata import MetadataWrapper, passphrase_of
from csi_driver.keys.plugin import PluginWrapper
from csi_driver.keys.vault import Login, Vault
from csi_driver.keys.vault_kv import VaultKv
from csi_driver.keys.vault_transit import VaultTransit
from csi_driver.model.errors import (
    DeadlineExceeded,
    DriverError,
    FailedPrecondition,
    KeyLost,
    PermissionDenied,
    Unavailable,
)
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail
from csi_driver.rpc.status import code_of
from tests.cluster.pki import Authority
from tests.keys import clouds, servers
from tests.keys.answers import Answer, status, truncated, until
from tests.keys.apiserver import ApiServer
from tests.keys.program import program
from tests.keys.test_types import NAME, kmip_key

__all__ = ["kmip_key"]  # a fixture

TOKEN = "s.a-token-that-nobody-may-see"
SECONDS = 0.4
TRAIL = KeyTrail(kms_id="kms", type="t", name=NAME)
pytestmark = pytest.mark.usefixtures("once")


def failed(call: Callable[[], object], kind: type[DriverError], code: str, *hidden: str) -> str:
    """The call fails with that very class and code; its sentence, which names its KMS and nothing that is hidden."""
    with pytest.raises(DriverError) as caught:
        call()
    assert (type(caught.value), code_of(caught.value).name) == (kind, code)
    said = str(caught.value)
    assert "\n" not in said
    assert "KMS kms" in said or "the Kubernetes API" in said
    for each in (TOKEN, *hidden):
        assert each not in "".join(traceback.format_exception(caught.value))
    return said


def operations(source: KeySource, trail: KeyTrail) -> dict[str, Callable[[], object]]:
    """What is asked of a KMS."""
    found: dict[str, Callable[[], object]] = {
        "create": lambda: source.create(NAME),
        "fetch": lambda: source.fetch(trail),
        "check": source.check,
    }
    if source.keeps:
        found["destroy"] = lambda: source.destroy(trail)
    else:
        found["rewrap"] = lambda: source.rewrap(trail)
    return found


# --- by HTTP ----------------------------------------------------------------------------------------------------------


@dataclass
class Failing:
    """A server that gives everybody one answer, at `address`."""

    answer: Answer = field(default=status(200))
    address: str = ""
    connections: int = 0

    def handle(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        self.answer(handler)


@pytest.fixture
def failing(authority: Authority) -> Iterator[Failing]:
    with clouds.serving(Failing(), authority) as server:
        yield server


@dataclass
class Place:
    """Where a server is, by which authority it is trusted, and a folder for credentials."""

    address: str
    ca: str
    folder: Path
    stack: ExitStack


def _vault(place: Place, kind: str) -> Vault:
    reader = EntryReader(f"KMS kms ({kind})", {"vaultAddress": place.address})
    return Vault(reader, Tls(ca=Path(place.ca).read_text()), Login(TOKEN))


def _kv(place: Place, backend: str = "kv-v2") -> KeySource:
    reader = EntryReader("KMS kms (vault)", {"vaultBackend": backend})
    return VaultKv(_vault(place, "vault"), reader, "secret", "csi")


def _transit(place: Place) -> KeySource:
    reader = EntryReader("KMS kms (vaulttransit)", {"vaultTransitKey": "csi"})
    return Wrapping(VaultTransit(_vault(place, "vaulttransit"), reader))


def _aws(place: Place) -> KeySource:
    place.stack.enter_context(pytest.MonkeyPatch.context()).setenv("AWS_CA_BUNDLE", place.ca)
    credentials = {"aws_access_key_id": "a", "aws_secret_access_key": TOKEN}
    account = Account(servers.REGION, "arn", credentials, place.address)
    return Wrapping(AwsWrapper("KMS kms (aws-metadata)", lambda: account))


def _api(place: Place) -> Kubernetes:
    (place.folder / "token").write_text(TOKEN)
    (place.folder / "ca.crt").write_text(Path(place.ca).read_text())
    (place.folder / "namespace").write_text("luks-csi")
    host, _, port = place.address.removeprefix("https://").partition(":")
    made = Kubernetes(host, port, place.folder)
    place.stack.callback(made.close)
    return made


def _metadata(place: Place) -> KeySource:
    api = _api(place)
    where = "KMS kms (metadata)"
    return Wrapping(MetadataWrapper(where, lambda: passphrase_of(api.secret("luks-csi", "kms"), "the secret kms")))


def _generated(place: Place) -> KeySource:
    return GeneratedKeys(_api(place))


SEALED = json.dumps({"dek": "AAAA", "nonce": "AAAAAAAAAAAAAAAA"})
BY_HTTP: dict[str, tuple[Callable[[Place], KeySource], KeyTrail]] = {
    "vault": (_kv, TRAIL),
    "vault, version 1": (functools.partial(_kv, backend="kv"), TRAIL),
    "vaulttransit": (_transit, msgspec.structs.replace(TRAIL, wrapped="vault:v1:AAAA")),
    "aws-metadata": (_aws, msgspec.structs.replace(TRAIL, wrapped="AAAA")),
    "metadata": (_metadata, msgspec.structs.replace(TRAIL, wrapped=SEALED)),
    "kubernetes-secret": (_generated, msgspec.structs.replace(TRAIL, key_id="luks-csi")),
}
ANSWERS: dict[str, tuple[Answer, type[DriverError], str]] = {
    "401": (status(401), PermissionDenied, "PERMISSION_DENIED"),
    "403": (status(403), PermissionDenied, "PERMISSION_DENIED"),
    "429": (status(429), Unavailable, "UNAVAILABLE"),
    "500": (status(500), Unavailable, "UNAVAILABLE"),
    "503": (status(503, b"<html>"), Unavailable, "UNAVAILABLE"),
    "truncated": (truncated, Unavailable, "UNAVAILABLE"),
    "a page": (status(200, b"<html>hello</html>"), Unavailable, "UNAVAILABLE"),
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server is waited for as long as usual."""
    for module in ("vault", "kubernetes"):
        monkeypatch.setattr(f"csi_driver.keys.{module}.HttpService", functools.partial(HttpService, seconds=SECONDS))
    monkeypatch.setattr("csi_driver.keys.aws.SECONDS", SECONDS)


Asked = dict[str, Callable[[], object]]


@pytest.fixture
def asked(tmp_path: Path, authority: Authority) -> Iterator[Callable[..., Asked]]:
    """What is asked of a type, whose server is at that address."""
    with ExitStack() as stack:

        def ask(kind: str, address: str, ca: str = authority.certificate) -> Asked:
            make, trail = BY_HTTP[kind]
            source = make(Place(address, ca, tmp_path, stack))
            stack.callback(source.close)
            return operations(source, trail)

        yield ask


@pytest.mark.parametrize("what", ANSWERS)
@pytest.mark.parametrize("kind", BY_HTTP)
def test_a_server_that_answers_so(kind: str, what: str, failing: Failing, asked: Callable[..., Asked]) -> None:
    failing.answer, error, code = ANSWERS[what]
    for call in asked(kind, failing.address).values():
        failed(call, error, code)


@pytest.mark.parametrize(
    ("code", "advice"),
    [(403, "a component of deploy/kubernetes/kms gives such a right"), (401, "check the credentials")],
)
def test_a_right_that_kubernetes_refuses_comes_with_what_gives_it(
    code: int, advice: str, failing: Failing, asked: Callable[..., Asked]
) -> None:
    failing.answer = status(code)
    assert advice in failed(asked("metadata", failing.address)["fetch"], PermissionDenied, "PERMISSION_DENIED")


OTHER_SHAPES = {
    "lists": {each: [1] for each in ("data", "version", "gitVersion", "KeyMetadata", "CiphertextBlob", "Plaintext")},
    "numbers": dict.fromkeys(("data", "version", "gitVersion", "KeyMetadata", "CiphertextBlob", "Plaintext"), 1),
    "nulls inside": {"data": {"data": [1], "type": None, "ciphertext": None, "plaintext": None}, "KeyMetadata": None},
}


@pytest.mark.parametrize("what", OTHER_SHAPES)
@pytest.mark.parametrize("kind", BY_HTTP)
def test_a_server_whose_json_is_of_another_shape(
    kind: str, what: str, failing: Failing, asked: Callable[..., Asked]
) -> None:
    failing.answer = status(200, json.dumps(OTHER_SHAPES[what]).encode(), **{"Content-Type": "application/json"})
    for name, call in asked(kind, failing.address).items():
        if (kind, name) == ("kubernetes-secret", "destroy"):
            continue  # of whose answer nothing is read
        if (kind, name, what) == ("kubernetes-secret", "check", "nulls inside"):
            continue  # which says no version, and that is none to do without
        if (kind, name, what) == ("vault, version 1", "fetch", "nulls inside"):
            failed(call, KeyLost, "FAILED_PRECONDITION")  # so it may have been written there
            continue
        failed(call, Unavailable, "UNAVAILABLE")


def test_an_answer_that_is_no_utf_8(failing: Failing, asked: Callable[..., Asked]) -> None:
    failing.answer = status(200, b'{"data": "\xff"}')
    for call in asked("vault", failing.address).values():
        failed(call, Unavailable, "UNAVAILABLE")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", BY_HTTP)
def test_a_server_that_does_not_answer(
    kind: str, failing: Failing, asked: Callable[..., Asked], request: pytest.FixtureRequest
) -> None:
    released = threading.Event()
    failing.answer = until(released)
    request.addfinalizer(released.set)
    said = failed(asked(kind, failing.address)["fetch"], Unavailable, "UNAVAILABLE")
    assert "did not answer" in said or "ReadTimeoutError" in said


@pytest.mark.parametrize("kind", BY_HTTP)
def test_a_server_that_is_not_there(kind: str, asked: Callable[..., Asked]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for call in asked(kind, f"https://127.0.0.1:{closed.getsockname()[1]}").values():
            assert "cannot be reached" in failed(call, Unavailable, "UNAVAILABLE")


@pytest.mark.parametrize("kind", ["vault", "vault, version 1", "kubernetes-secret"])
def test_what_was_never_asked_of_a_server_is_not_announced(
    kind: str, failing: Failing, tmp_path: Path, authority: Authority
) -> None:
    told: list[str] = []
    failing.answer = status(503)
    with ExitStack() as stack:
        source = BY_HTTP[kind][0](Place(failing.address, authority.certificate, tmp_path, stack))
        stack.callback(source.close)
        with pytest.raises(Unavailable):
            source.create(NAME, lambda: told.append("announced"))
    assert told == []


@pytest.mark.parametrize("kind", BY_HTTP)
def test_a_server_whose_certificate_is_anothers(
    kind: str, failing: Failing, asked: Callable[..., Asked], tmp_path: Path
) -> None:
    for call in asked(kind, failing.address, Authority(tmp_path / "other").certificate).values():
        assert "certificate" in failed(call, FailedPrecondition, "FAILED_PRECONDITION")


def test_a_ca_of_the_api_that_was_renewed_counts_at_once(api: ApiServer, tmp_path: Path) -> None:
    folder = tmp_path / "serviceaccount"
    kubernetes = api.as_driver(folder)
    other = Path(Authority(tmp_path / "other").certificate).read_text()
    for authority, trusted in ((other, False), (api.ca, True), (other, False), (api.ca, True)):
        (folder / "ca.crt").write_text(authority)
        if trusted:
            assert kubernetes.find_secret("luks-csi", "nothing") is None
            continue
        said = failed(lambda: kubernetes.find_secret("luks-csi", "nothing"), FailedPrecondition, "FAILED_PRECONDITION")
        assert f"{folder}/ca.crt is not its CA: kubelet takes it from the ConfigMap kube-root-ca.crt" in said
        assert "KMS configuration" not in said
    kubernetes.close()


# --- Vault ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def transit(vault: servers.Vault, tmp_path: Path) -> Iterator[tuple[KeySource, str]]:
    """A source by a key of its own at the real server, and that key's name."""
    key = f"key-{abs(hash(str(tmp_path)))}"
    vault.ask("POST", f"transit/keys/{key}", {"derived": True})
    reader = EntryReader("KMS kms (vaulttransit)", {"vaultAddress": vault.address, "vaultTransitKey": key})
    source = Wrapping(VaultTransit(Vault(reader, Tls(ca=vault.ca), Login(vault.root)), reader))
    yield source, key
    source.close()


def test_a_transit_key_whose_old_version_is_closed_or_that_is_gone_is_lost(
    transit: tuple[KeySource, str], vault: servers.Vault
) -> None:
    source, key = transit
    trail = source.create(NAME)
    key_before = source.fetch(trail)
    vault.ask("POST", f"transit/keys/{key}/rotate", {})
    fresh = source.rewrap(trail)
    vault.ask("POST", f"transit/keys/{key}/config", {"min_decryption_version": 2, "deletion_allowed": True})
    for call in (lambda: source.fetch(trail), lambda: source.rewrap(trail)):
        said = failed(call, KeyLost, "FAILED_PRECONDITION")
        assert f"its key {key} does not unwrap that of {NAME}; restore the key or its version" in said
    assert source.fetch(fresh) == key_before
    damaged = msgspec.structs.replace(fresh, wrapped=fresh.wrapped[:-8])
    failed(lambda: source.fetch(damaged), KeyLost, "FAILED_PRECONDITION")
    failed(lambda: source.fetch(msgspec.structs.replace(fresh, name="pvc-2")), KeyLost, "FAILED_PRECONDITION")
    vault.ask("DELETE", f"transit/keys/{key}")
    failed(lambda: source.fetch(fresh), KeyLost, "FAILED_PRECONDITION")


def test_a_version_that_vault_forgot_is_lost_and_a_newer_one_does_not_take_its_place(vault: servers.Vault) -> None:
    reader = EntryReader("KMS kms (vault)", {"vaultAddress": vault.address, "vaultBackend": "kv-v2"})
    source = VaultKv(Vault(reader, Tls(ca=vault.ca), Login(vault.root)), reader, "secret", "faults")
    trail = source.create(NAME)
    key = source.fetch(trail)
    vault.ask("POST", f"secret/data/faults/{NAME}", {"data": {"data": {"passphrase": "somebody else's"}}})
    assert source.fetch(trail) == key
    vault.ask("PUT", f"secret/destroy/faults/{NAME}", {"versions": [1]})
    assert "in version 1" in failed(lambda: source.fetch(trail), KeyLost, "FAILED_PRECONDITION")
    source.close()


# --- KMIP -------------------------------------------------------------------------------------------------------------

Speak = Callable[[ssl.SSLSocket], object]


@pytest.fixture
def kmip_entries(kmip: servers.KmipServer, kmip_key: str) -> dict[str, str]:
    return kmip.entries | {"UNIQUE_IDENTIFIER": kmip_key}


def kmip_source(endpoint: str, entries: dict[str, str]) -> KeySource:
    reader = EntryReader("KMS kms (kmip)", {"KMIP_ENDPOINT": endpoint, "READ_TIMEOUT": "5"})
    return Wrapping(KmipWrapper(reader.where, lambda: server_of(reader, entries, "secret")))


def speaking(authority: Authority, speak: Speak, request: pytest.FixtureRequest) -> str:
    """A TLS server that says `speak` to everybody; its endpoint."""
    authority.issue("speaker", "speaker", names=["IP:127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.file("speaker.crt"), authority.file("speaker.key"))
    listener = socket.create_server(("127.0.0.1", 0))
    ending = threading.Event()

    def serve() -> None:
        while not ending.is_set():
            connection, _ = listener.accept()
            try:
                with connection, context.wrap_socket(connection, server_side=True) as shown:
                    speak(shown)
            except OSError:
                pass  # a client that did not trust us, or the end

    def end() -> None:
        ending.set()
        socket.create_connection(listener.getsockname()).close()
        thread.join()
        listener.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    request.addfinalizer(end)
    return f"127.0.0.1:{listener.getsockname()[1]}"


def _asked(connection: ssl.SSLSocket) -> None:
    connection.recv(4096)


def _truncated(connection: ssl.SSLSocket) -> None:
    connection.recv(4096)
    connection.sendall(b"\x42\x00\x7b\x01\x00\x00\x00\xff\x42\x00")


def _page(connection: ssl.SSLSocket) -> None:
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n" * 4)


@pytest.mark.parametrize("speak", [_asked, _truncated, _page])
def test_a_kmip_server_that_breaks_off_or_speaks_something_else(
    speak: Speak, authority: Authority, kmip: servers.KmipServer, kmip_entries: dict[str, str],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    real = kmip_source(kmip.endpoint, kmip_entries)
    trail = real.create(NAME)
    key = real.fetch(trail).reveal().decode()
    source = kmip_source(speaking(authority, speak, request), kmip_entries)
    for call in operations(source, trail).values():
        failed(call, Unavailable, "UNAVAILABLE", key)


def test_a_kmip_server_that_is_slow_gone_or_not_trusted(
    authority: Authority, kmip: servers.KmipServer, kmip_entries: dict[str, str], tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    trail = kmip_source(kmip.endpoint, kmip_entries).create(NAME)
    released = threading.Event()
    endpoint = speaking(authority, lambda _: released.wait(60), request)
    request.addfinalizer(released.set)
    reader = EntryReader("KMS kms (kmip)", {"KMIP_ENDPOINT": endpoint, "READ_TIMEOUT": str(SECONDS)})
    slow = Wrapping(KmipWrapper(reader.where, lambda: server_of(reader, kmip_entries, "secret")))
    assert f"did not answer within {SECONDS:g} s" in failed(lambda: slow.fetch(trail), Unavailable, "UNAVAILABLE")
    released.set()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = kmip_source(f"127.0.0.1:{closed.getsockname()[1]}", kmip_entries)
        for call in operations(gone, trail).values():
            assert "cannot be reached" in failed(call, Unavailable, "UNAVAILABLE")
    other = Path(Authority(tmp_path / "other").certificate).read_text()
    distrusting = kmip_source(kmip.endpoint, kmip_entries | {"CA_CERT": other})
    for call in operations(distrusting, trail).values():
        said = failed(call, FailedPrecondition, "FAILED_PRECONDITION")
        assert "shows a certificate that is not trusted" in said


def test_a_kmip_key_that_is_gone_revoked_or_another_one_is_lost(
    kmip: servers.KmipServer, kmip_entries: dict[str, str]
) -> None:
    source = kmip_source(kmip.endpoint, kmip_entries)
    trail = source.create(NAME)
    before = source.fetch(trail)
    uses = [enums.CryptographicUsageMask.ENCRYPT, enums.CryptographicUsageMask.DECRYPT]
    with servers.kmip_client(kmip) as client:
        other = str(client.create(enums.CryptographicAlgorithm.AES, 256, cryptographic_usage_mask=uses))
    of_other = msgspec.structs.replace(trail, key_id=other)
    later = kmip_source(kmip.endpoint, kmip_entries | {"UNIQUE_IDENTIFIER": other})
    inactive = PermissionDenied, "PERMISSION_DENIED"  # so says PyKMIP's server
    assert "and that the key is active" in failed(lambda: later.create(NAME), *inactive)
    failed(later.check, KeyLost, "FAILED_PRECONDITION")
    with servers.kmip_client(kmip) as client:
        client.activate(other)
    with pytest.raises((KeyLost, Unavailable)):  # a wrong padding is a general failure to PyKMIP's server
        source.fetch(of_other)
    with servers.kmip_client(kmip) as client:
        client.revoke(enums.RevocationReasonCode.CESSATION_OF_OPERATION, other)
    failed(later.check, KeyLost, "FAILED_PRECONDITION")
    failed(lambda: later.create(NAME), *inactive)
    with servers.kmip_client(kmip) as client:
        client.destroy(other)
    failed(lambda: source.fetch(of_other), KeyLost, "FAILED_PRECONDITION")
    failed(lambda: source.fetch(msgspec.structs.replace(trail, name="pvc-2")), KeyLost, "FAILED_PRECONDITION")
    assert source.fetch(trail) == before


@pytest.mark.parametrize(
    ("reason", "kind", "code"),
    [
        (enums.ResultReason.PERMISSION_DENIED, PermissionDenied, "PERMISSION_DENIED"),
        (enums.ResultReason.AUTHENTICATION_NOT_SUCCESSFUL, PermissionDenied, "PERMISSION_DENIED"),
        (enums.ResultReason.GENERAL_FAILURE, Unavailable, "UNAVAILABLE"),
        (enums.ResultReason.ITEM_NOT_FOUND, KeyLost, "FAILED_PRECONDITION"),
        (enums.ResultReason.CRYPTOGRAPHIC_FAILURE, KeyLost, "FAILED_PRECONDITION"),
    ],
)
def test_what_a_kmip_server_refuses_by(
    reason: enums.ResultReason, kind: type[DriverError], code: str, kmip: servers.KmipServer,
    kmip_entries: dict[str, str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = kmip_source(kmip.endpoint, kmip_entries)
    trail = source.create(NAME)
    key = source.fetch(trail).reveal().decode()
    fields = {"result_status": enums.ResultStatus.OPERATION_FAILED, "result_reason": reason, "result_message": "no"}
    for name in ("encrypt", "decrypt"):
        monkeypatch.setattr(KMIPProxy, name, lambda *_: fields)
    attributes = SimpleNamespace(
        **{each: SimpleNamespace(value=value) for each, value in fields.items()}, attributes=[]
    )
    monkeypatch.setattr(KMIPProxy, "get_attributes", lambda *_: attributes)
    for call in operations(source, trail).values():
        assert reason.name in failed(call, kind, code, key)


# --- a plug-in, a program ---------------------------------------------------------------------------------------------

OF_PLUGINS = {
    grpc.StatusCode.UNAVAILABLE: (Unavailable, "UNAVAILABLE"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (Unavailable, "UNAVAILABLE"),
    grpc.StatusCode.INTERNAL: (Unavailable, "UNAVAILABLE"),
    grpc.StatusCode.PERMISSION_DENIED: (PermissionDenied, "PERMISSION_DENIED"),
    grpc.StatusCode.UNAUTHENTICATED: (PermissionDenied, "PERMISSION_DENIED"),
    grpc.StatusCode.NOT_FOUND: (KeyLost, "FAILED_PRECONDITION"),
    grpc.StatusCode.UNKNOWN: (FailedPrecondition, "FAILED_PRECONDITION"),
    grpc.StatusCode.UNIMPLEMENTED: (FailedPrecondition, "FAILED_PRECONDITION"),
}


def plugin_source(endpoint: str, **fields: object) -> KeySource:
    return Wrapping(PluginWrapper(EntryReader("KMS kms (kms-plugin)", {"endpoint": endpoint, **fields})))


@pytest.mark.parametrize("refusal", OF_PLUGINS, ids=lambda each: each.name)
def test_a_plug_in_that_refuses_by(refusal: grpc.StatusCode, plugin: tuple[servers.Plugin, str]) -> None:
    servicer, endpoint = plugin
    source = plugin_source(endpoint)
    trail = source.create(NAME)
    key = source.fetch(trail).reveal().decode()
    servicer.fail = refusal
    for call in operations(source, trail).values():
        assert refusal.name in failed(call, *OF_PLUGINS[refusal], key)
    source.close()


def test_a_plug_in_that_is_slow_gone_sick_or_has_another_key(
    plugin: tuple[servers.Plugin, str], tmp_path: Path
) -> None:
    servicer, endpoint = plugin
    source = plugin_source(endpoint)
    trail = source.create(NAME)
    servicer.wait = 3 * SECONDS
    slow = plugin_source(endpoint, timeoutSeconds=str(SECONDS))
    assert "did not answer in time" in failed(lambda: slow.fetch(trail), Unavailable, "UNAVAILABLE")
    servicer.wait = 0.0
    servicer.healthz = "the KMS is away"
    assert "the KMS is away" in failed(source.check, FailedPrecondition, "FAILED_PRECONDITION")
    failed(lambda: source.fetch(msgspec.structs.replace(trail, name="pvc-2")), KeyLost, "FAILED_PRECONDITION")
    failed(lambda: source.fetch(msgspec.structs.replace(trail, wrapped="{}")), KeyLost, "FAILED_PRECONDITION")
    del servicer.keys["key-1"]
    failed(lambda: source.fetch(trail), KeyLost, "FAILED_PRECONDITION")
    gone = plugin_source(f"unix://{tmp_path}/nowhere.sock", timeoutSeconds=str(SECONDS))
    for call in operations(gone, trail).values():
        failed(call, Unavailable, "UNAVAILABLE")
    for each in (source, slow, gone):
        each.close()


PROGRAMS: dict[str, tuple[str, type[DriverError], str, str]] = {
    "code 1": ("echo broken >&2; exit 1", FailedPrecondition, "FAILED_PRECONDITION", "ended with code 1: broken"),
    "code 3": ("echo gone >&2; exit 3", KeyLost, "FAILED_PRECONDITION", "ended with code 3: gone"),
    "code 4": ("exit 4", PermissionDenied, "PERMISSION_DENIED", "ended with code 4"),
    "code 5": ("exit 5", Unavailable, "UNAVAILABLE", "ended with code 5"),
    "killed": ("kill -9 $$", FailedPrecondition, "FAILED_PRECONDITION", "ended with code -9"),
    "truncated": ('printf \'{"wrapped": "abc\'', FailedPrecondition, "FAILED_PRECONDITION", "wrote no JSON object"),
    "silent": ("exit 0", FailedPrecondition, "FAILED_PRECONDITION", "wrote no JSON object"),
    "slow": ("exec sleep 60", DeadlineExceeded, "DEADLINE_EXCEEDED", "did not end within"),
    "endless": ("exec cat /dev/zero", FailedPrecondition, "FAILED_PRECONDITION", "wrote more than 65536 bytes"),
    "no utf-8": ("printf '\"\\377\"'", FailedPrecondition, "FAILED_PRECONDITION", "wrote no JSON object"),
    "no program": ("", FailedPrecondition, "FAILED_PRECONDITION", "cannot be started"),
}


@pytest.mark.parametrize("what", PROGRAMS)
def test_a_program_that_fails(what: str, tmp_path: Path, workers: Workers) -> None:
    script, kind, code, words = PROGRAMS[what]
    path = program(tmp_path)

    def source(seconds: float) -> KeySource:
        fields = {"program": path.name, "timeoutSeconds": str(seconds)}
        return Wrapping(ExecWrapper(EntryReader("KMS kms (exec)", fields), workers, tmp_path))

    trail = source(20).create(NAME)
    path.write_text(f"#!/bin/sh\n{script}\n")
    if not script:
        path.chmod(stat.S_IRUSR)
    for call in operations(source(SECONDS if what == "slow" else 20), trail).values():
        with pytest.raises(DriverError, match=words) as caught:
            call()
        assert (type(caught.value), code_of(caught.value).name) == (kind, code)


CHILD = "sh -c 'echo $$ >{0}; exec sleep 300'"


@pytest.mark.parametrize("waits", [False, True], ids=["ends", "waits"])
def test_what_a_program_has_started_ends_with_it(tmp_path: Path, workers: Workers, *, waits: bool) -> None:
    """Also where it holds the program's output open, and then it is not waited for."""
    path, pid = program(tmp_path), tmp_path / "pid"
    child = CHILD.format(pid)
    script = f"{child} & while [ ! -s {pid} ]; do sleep 0.01; done; echo '{{}}'"
    path.write_text(f"#!/bin/sh\n{script}\n" + "exec sleep 300\n" * waits)
    fields = {"program": path.name, "timeoutSeconds": "5" if waits else "100"}
    source = Wrapping(ExecWrapper(EntryReader("KMS kms (exec)", fields), workers, tmp_path))
    if waits:
        with pytest.raises(DeadlineExceeded, match="did not end within 5 s"):
            source.check()
    else:
        assert "answers" in source.check()
    started = Path(f"/proc/{pid.read_text().strip()}/stat")
    deadline = time.monotonic() + 60
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it is gone, not even a zombie
        while ") Z " not in started.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_all_of_a_long_answer_and_the_last_of_a_long_complaint_are_read(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_text(
        "#!/bin/sh\nhead -c 65536 /dev/zero | tr '\\0' x\nhead -c 3000000 /dev/zero >&2; echo >&2; echo last >&2\n"
    )
    path.chmod(0o700)
    code, output, said = run_program([str(path)], Passphrase(b"{}"), 100)
    assert (code, len(output.reveal()), said) == (0, 65536, "last")
