"""What a server of keys may answer: each its sentence and its class, and nothing secret in any of them."""

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import certifi
import pytest
import stamina

from csi_driver.keys import vault as vault_module
from csi_driver.keys.aws import Account, AwsWrapper
from csi_driver.keys.base import EntryReader, KeyRequest, Wrapping
from csi_driver.keys.extras import load
from csi_driver.keys.http import HttpService, Tls
from csi_driver.keys.kubernetes import Kubernetes
from csi_driver.keys.vault import Login, Vault
from csi_driver.keys.vault_transit import VaultTransit
from csi_driver.model.errors import DriverError, FailedPrecondition, PermissionDenied, Unavailable
from csi_driver.model.volume import KeyTrail
from tests.keys.answers import Answer, status, truncated
from tests.keys.given import GivenSources

TOKEN = "s.a-token-that-nobody-may-see"
SECRET = "a DEK that nobody may see"


class Server:
    """Answers as told, in turn; the last answer stays."""

    def __init__(self, answers: list[Answer]) -> None:
        self.answers = answers
        self.asked = 0
        self.connected = 0
        self.address = ""

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        self.asked += 1
        self.answers[min(self.asked, len(self.answers)) - 1](handler)


@contextmanager
def serving(*answers: Answer) -> Iterator[tuple[Server, HttpService]]:
    told = Server(list(answers))

    class Handler(http.server.BaseHTTPRequestHandler):
        def setup(self) -> None:
            told.connected += 1
            super().setup()

        def do_POST(self) -> None:
            told.answer(self)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    told.address = f"http://127.0.0.1:{server.server_address[1]}"
    service = HttpService("KMS v (vault)", "vault", told.address, Tls(), seconds=0.5)
    try:
        yield told, service
    finally:
        service.close()
        server.shutdown()
        thread.join()
        server.server_close()


def slow(handler: http.server.BaseHTTPRequestHandler) -> None:
    time.sleep(1.5)
    handler.close_connection = True


def ask(service: HttpService, *, again: bool = True, quotes: bool = True) -> object:
    headers = {"X-Vault-Token": TOKEN}
    return service.ask("POST", "v1/x", {"plaintext": SECRET}, headers, again=again, quotes=quotes)


ECHO = json.dumps({"errors": [f"cannot wrap {SECRET} for {TOKEN}"]}).encode()


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (status(400, b'{"errors": ["no such key"]}'), FailedPrecondition, "does not take the request.*no such key"),
        (status(401), PermissionDenied, "refuses .HTTP 401"),
        (status(403, b'{"errors": ["permission denied"]}'), PermissionDenied, "permission denied"),
        (status(429), Unavailable, "too many requests"),
        (status(500, b'{"errors": ["internal error"]}'), Unavailable, "failed .HTTP 500: internal error"),
        (status(503, b"<html>"), Unavailable, "HTTP 503"),
        (status(307, Location="http://elsewhere/"), FailedPrecondition, "HTTP 307"),
        (status(200, b"<html>hello</html>"), Unavailable, "no JSON object or ends early"),
        (status(200, b"[1]"), Unavailable, "no JSON object"),
        (truncated, Unavailable, "broke off|ends early"),
        (status(200, b'"' + b"x" * (2 << 20) + b'"'), FailedPrecondition, "more than"),
        (slow, Unavailable, "did not answer within"),
    ],
)
def test_each_answer_has_its_sentence(answer: Answer, kind: type[DriverError], words: str) -> None:
    with serving(answer) as (_, service), pytest.raises(kind, match=words) as told:
        ask(service, again=False)
    assert "KMS v (vault)" in str(told.value)
    assert TOKEN not in str(told.value)
    assert SECRET not in str(told.value)


def test_what_the_server_says_is_not_quoted_where_something_secret_was_sent() -> None:
    with serving(status(400, ECHO)) as (_, service), pytest.raises(FailedPrecondition) as told:
        ask(service, quotes=False)
    assert SECRET not in str(told.value)


def test_what_passes_by_itself_is_asked_again() -> None:
    with serving(status(503), status(429), status(200, b'{"ok": 1}')) as (told, service):
        assert ask(service) == {"ok": 1}
    assert told.asked == 3


@pytest.mark.parametrize(("by_proxy", "reached"), [(True, "proxy"), (False, "server")])
def test_a_proxy_of_the_environment_is_used_where_that_is_wanted(
    monkeypatch: pytest.MonkeyPatch, *, by_proxy: bool, reached: str
) -> None:
    with serving(status(200, b'{"at": "proxy"}')) as (proxy, _), serving(status(200, b'{"at": "server"}')) as (told, _):
        monkeypatch.setenv("http_proxy", proxy.address)
        monkeypatch.delenv("no_proxy", raising=False)
        service = HttpService("KMS v (vault)", "vault", told.address, Tls(), by_proxy=by_proxy)
        assert ask(service) == {"at": reached}
        service.close()


def test_the_api_of_the_own_cluster_is_asked_by_no_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "ca.crt").write_text(Path(certifi.where()).read_text())
    with serving(status(200)) as (proxy, _), serving(status(200)) as (told, _):
        monkeypatch.setenv("https_proxy", proxy.address)
        monkeypatch.delenv("no_proxy", raising=False)
        cluster = Kubernetes("127.0.0.1", told.address.rpartition(":")[2], tmp_path)
        with pytest.raises(DriverError):  # it talks no TLS
            cluster.check()
        cluster.close()
    assert proxy.connected == 0
    assert told.connected > 0


@pytest.mark.parametrize("code", [400, 403, 404])
def test_what_is_final_is_asked_once(code: int) -> None:
    with serving(status(code)) as (told, service):
        if code == 404:
            assert ask(service) is None
        else:
            with pytest.raises(DriverError):
                ask(service)
    assert told.asked == 1


def test_a_login_is_never_repeated() -> None:
    with serving(status(500)) as (told, service), pytest.raises(Unavailable):
        ask(service, again=False)
    assert told.asked == 1


def test_nobody_there_is_told() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        service = HttpService("KMS v", "vault", f"http://127.0.0.1:{closed.getsockname()[1]}", Tls(), seconds=1)
        with pytest.raises(Unavailable, match="cannot be reached"):
            ask(service, again=False)
        service.close()


@pytest.mark.parametrize("base", ["ftp://x", "vault:8200", "http://[::1"])
def test_what_is_no_address_is_told(base: str) -> None:
    service = HttpService("KMS v", "vault", base, Tls(), seconds=1)
    with pytest.raises(FailedPrecondition, match="no http or https URL"):
        ask(service, again=False)
    service.close()


def test_plain_http_behind_https_is_told() -> None:
    with serving(status(200, b"{}")) as (_, service):
        base = service._base.replace("http:", "https:")  # noqa: SLF001 - its address
        https = HttpService("KMS v", "vault", base, Tls(), seconds=1)
        with pytest.raises(FailedPrecondition, match="the TLS connection to KMS v failed"):
            ask(https, again=False)
        https.close()


@pytest.mark.parametrize(
    "pem", ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_ca_that_is_none_is_told(pem: str) -> None:
    if pem:
        with pytest.raises(FailedPrecondition, match="CA certificate for KMS v is none"):
            Tls(ca=pem).context("KMS v")


def test_a_client_certificate_without_its_key_is_told() -> None:
    with pytest.raises(FailedPrecondition, match="client certificate and key"):
        Tls(certificate="no certificate", key="no key").context("KMS v")


def test_an_answer_is_asked_for_as_it_is() -> None:
    """What a proxy would compress nobody here decompresses."""
    seen: list[str | None] = []

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers["Accept-Encoding"])
        status(200, b"{}")(handler)

    with serving(answer) as (_, service):
        assert ask(service) == {}
    assert seen == ["identity"]


def test_what_the_server_says_is_one_line() -> None:
    said = json.dumps({"errors": ["1 error occurred:\n\t* permission denied\x1b[0m\n\n"]}).encode()
    with serving(status(403, said)) as (_, service), pytest.raises(PermissionDenied) as caught:
        ask(service)
    assert r"1 error occurred: * permission denied\x1b[0m)" in str(caught.value)


def test_a_private_key_is_not_shown() -> None:
    assert SECRET not in repr(Tls(certificate="public", key=SECRET))


def vault_of(server: Server) -> Vault:
    login = Login(path="auth/kubernetes/login", document=lambda: {"role": "r", "jwt": TOKEN})
    return Vault(EntryReader("KMS v (vault)", {"vaultAddress": server.address}), Tls(), login)


def test_a_refused_login_to_vault_is_asked_once() -> None:
    with serving(status(403, b'{"errors": ["permission denied"]}')) as (server, _):
        vault = vault_of(server)
        with pytest.raises(PermissionDenied):
            vault.ask("POST", "secret/data/x", {})
        vault.close()
    assert server.asked == 1


def test_a_token_that_has_ended_is_asked_for_anew_once() -> None:
    token = status(200, b'{"auth": {"client_token": "t", "lease_duration": 600}}')
    with serving(token, status(403), token, status(200, b"{}")) as (server, _):
        vault = vault_of(server)
        assert vault.ask("POST", "secret/data/x", {}) == {}
        vault.close()
    assert server.asked == 4


def test_those_who_wait_for_a_login_share_its_error_and_later_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter((1.0, 2.0, 3.0, 2.5, 4.0, 5.0, 6.0))
    monkeypatch.setattr(vault_module, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    login = Login(path="auth/kubernetes/login", document=dict)
    asked = []

    def post(*_: object) -> dict[str, object]:
        asked.append(1)
        raise Unavailable("the KMS does not answer")

    for expected in (1, 1, 2):  # it came at 1 and failed at 3; one came at 2.5 and waited; one came at 4
        with pytest.raises(Unavailable, match="does not answer"):
            login.token(post)
        assert len(asked) == expected


def test_an_address_of_vault_with_a_password_is_refused_and_not_shown() -> None:
    reader = EntryReader("KMS v (vault)", {"vaultAddress": f"https://user:{TOKEN}@vault"})
    with pytest.raises(FailedPrecondition, match="without a user or a password") as caught:
        Vault(reader, Tls(), Login(TOKEN))
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("plaintext", ["", "!!!not base64", "QUJD\u00e4"])
def test_what_transit_gives_is_a_key_or_an_error(plaintext: str) -> None:
    answer = status(200, json.dumps({"data": {"plaintext": plaintext}}).encode())
    with serving(answer) as (server, _):
        vault = Vault(EntryReader("KMS v (vault)", {"vaultAddress": server.address}), Tls(), Login(TOKEN))
        transit = VaultTransit(vault, EntryReader("KMS v (vault)", {"vaultTransitKey": "k"}))
        given = GivenSources(v=Wrapping(transit))
        trail = KeyTrail(kms_id="v", type="given", name="pvc-1", wrapped="vault:v1:x")
        with pytest.raises(FailedPrecondition, match=r"no base64|empty key"):
            given.fetch(trail, KeyRequest("pvc-1"), "stage")
        vault.close()


@pytest.fixture
def once() -> Iterator[None]:
    """Nothing is tried again."""
    stamina.set_testing(True, attempts=1)
    yield
    stamina.set_testing(False)


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ({"ResponseMetadata": {}}, Unavailable, "without Plaintext"),
        (ValueError(SECRET), Unavailable, "cannot be read .ValueError"),
        (KeyError(SECRET), Unavailable, "cannot be read .KeyError"),
        (
            load("botocore.parsers", "a test", "aws").ResponseParserError(SECRET),
            Unavailable,
            "cannot be read .ResponseParserError",
        ),
        (PermissionDenied("no"), PermissionDenied, "no"),
    ],
)
def test_aws_answers_that_are_none_pass_by_themselves_and_are_not_quoted(
    answer: dict[str, object] | Exception, kind: type[DriverError], words: str
) -> None:
    class Client:
        def decrypt(self, **_: object) -> dict[str, object]:
            if isinstance(answer, Exception):
                raise answer
            return answer

    class Given(Account):
        def client(self, *_: object) -> Client:
            return Client()

    wrapper = AwsWrapper("KMS a (aws-metadata)", lambda: Given("eu-central-1", "arn", {}))
    with pytest.raises(kind, match=words) as caught:
        wrapper.unwrap(KeyTrail(kms_id="a", type="aws-metadata", wrapped="QUJD"))
    assert SECRET not in str(caught.value)


@pytest.mark.usefixtures("once")
def test_an_address_of_aws_that_is_none_is_told() -> None:
    account = Account("eu-central-1", "arn", {"aws_access_key_id": "a", "aws_secret_access_key": SECRET}, "foo")
    with pytest.raises(Unavailable, match="check its address"):
        AwsWrapper("KMS a (aws-metadata)", lambda: account).check()


@pytest.mark.parametrize("auth", ["text", 5, None, {"client_token": "t", "lease_duration": "soon"}])
def test_a_login_that_is_none_is_no_crash(auth: object) -> None:
    login = Login(path="auth/kubernetes/login", document=dict)
    assert login.token(lambda *_: {"auth": auth}) in ("", "t")
