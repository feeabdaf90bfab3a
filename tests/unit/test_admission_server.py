"""The server of reviews: what it answers to whom, and that nobody keeps it from answering others."""

import http.client
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from csi_driver.model.errors import CommandFailed, FailedPrecondition, InvalidArgument
from csi_driver.operator.admission.server import Limits, ReviewServer
from tests.cluster.pki import Authority
from tests.told_lines import told_lines

HOST = "127.0.0.1"
SECRET = "a passphrase that nobody may see"


class Certificates:
    """What the server shows; another one from `renew` on, none while `missing`."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder)
        self.missing = False
        self._name = ""
        self.renew("first")

    def renew(self, name: str) -> None:
        self.authority.issue(name, name, names=[f"IP:{HOST}"])
        self._name = name

    def __call__(self) -> ssl.SSLContext:
        if self.missing:
            raise FailedPrecondition("the operator has no certificate yet; it is being made")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.authority.file(f"{self._name}.crt"), self.authority.file(f"{self._name}.key"))
        return context

    @property
    def client(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.authority.certificate)


class Reviews:
    """What the paths do: /echo answers, /hang waits until `go`, /bad, /broken and /refused fail."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)

    def hang(self, body: bytes) -> bytes:
        self.begun.release()
        self.go.wait(60)
        return body

    def bad(self, _body: bytes) -> bytes:
        raise InvalidArgument("this is no AdmissionReview")

    def broken(self, body: bytes) -> bytes:
        raise RuntimeError(body.decode())

    def refused(self, _body: bytes) -> bytes:
        raise CommandFailed("the Kubernetes API refuses Secret key; look at the role of this service account")

    @property
    def paths(self) -> dict[str, object]:
        failing = {"/bad": self.bad, "/broken": self.broken, "/refused": self.refused}
        return {"/echo": lambda body: body, "/hang": self.hang, **failing}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("pki") / "pki")


@contextmanager
def serving(certificates: Certificates, reviews: Reviews, limits: Limits) -> Iterator[ReviewServer]:
    server = ReviewServer((HOST, 0), reviews.paths, certificates, limits)  # type: ignore[arg-type]
    server.start()
    try:
        yield server
    finally:
        reviews.go.set()
        server.stop()


@pytest.fixture
def reviews() -> Reviews:
    return Reviews()


@pytest.fixture
def server(certificates: Certificates, reviews: Reviews) -> Iterator[ReviewServer]:
    with serving(certificates, reviews, Limits()) as server:
        yield server


def connect(server: ReviewServer, certificates: Certificates) -> http.client.HTTPSConnection:
    return http.client.HTTPSConnection(HOST, server.port, timeout=30, context=certificates.client)


def ask(
    server: ReviewServer,
    certificates: Certificates,
    path: str = "/echo",
    body: bytes | Iterator[bytes] = b"{}",
    method: str = "POST",
    headers: dict[str, str] | None = None,
) -> tuple[int, bytes]:
    with closing(connect(server, certificates)) as connection:
        connection.request(method, path, body, headers or {}, encode_chunked=not isinstance(body, bytes))
        response = connection.getresponse()
        return response.status, response.read()


def raw(server: ReviewServer, certificates: Certificates) -> ssl.SSLSocket:
    plain = socket.create_connection((HOST, server.port), timeout=30)
    return certificates.client.wrap_socket(plain, server_hostname=HOST)


def test_one_connection_serves_many_reviews(server: ReviewServer, certificates: Certificates) -> None:
    with closing(connect(server, certificates)) as connection:
        for number in range(3):
            body = json.dumps({"number": number, "much": "x" * 100_000}).encode()
            connection.request("POST", "/echo?timeout=3s", body)
            response = connection.getresponse()
            assert (response.status, response.read()) == (200, body)
            assert response.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("path", "method", "headers", "status", "said"),
    [
        ("/nothing", "POST", {}, 404, b"there are /echo, /hang, /bad, /broken, /refused\n"),
        ("/echo", "GET", {}, 405, b"there is only POST\n"),
        ("/echo", "POST", {"Content-Length": "9999999999"}, 413, b"a review has at most 8388608 bytes\n"),
        ("/echo", "POST", {"Content-Length": "9" * 400}, 413, b"a review has at most 8388608 bytes\n"),
        ("/echo", "POST", {"Content-Length": "-1"}, 411, b"a request must tell its Content-Length\n"),
        ("/bad", "POST", {}, 400, b"this is no AdmissionReview\n"),
    ],
)
def test_what_is_no_review_gets_an_error_of_http(
    server: ReviewServer, certificates: Certificates, path: str, method: str, headers: dict[str, str], status: int,
    said: bytes,
) -> None:  # fmt: skip
    assert ask(server, certificates, path, method=method, headers=headers) == (status, said)


def test_chunks_and_another_http_are_refused(server: ReviewServer, certificates: Certificates) -> None:
    assert ask(server, certificates, body=iter([b"{}"]), headers={"Transfer-Encoding": "chunked"})[0] == 411
    for text in (b"POST /echo HTTP/1.0\r\n\r\n", b"\x16\x03 nonsense\r\n\r\n"):
        with raw(server, certificates) as connection:
            connection.sendall(text)
            assert connection.recv(100).startswith(b"HTTP/1.1 505 ")


def test_what_fails_is_told_without_what_was_asked(server: ReviewServer, certificates: Certificates) -> None:
    with told_lines() as lines:
        status, said = ask(server, certificates, "/broken", SECRET.encode())
    assert (status, said) == (500, b"the review failed; the operator's log tells more\n")
    (line,) = lines
    assert (line.event, dict(line.fields)) == (
        "admission review failed",
        {"webhook": "broken", "error": "RuntimeError"},
    )


def test_what_the_operator_lacks_for_a_review_is_told(server: ReviewServer, certificates: Certificates) -> None:
    with told_lines() as lines:
        assert ask(server, certificates, "/refused")[0] == 500
    (line,) = lines
    assert "look at the role of this service account" in line.fields["error"]


def test_a_new_certificate_is_shown_at_once_and_none_is_no_connection(tmp_path: Path, reviews: Reviews) -> None:
    certificates = Certificates(tmp_path / "pki")
    with serving(certificates, reviews, Limits()) as server:

        def subject() -> object:
            with raw(server, certificates) as connection:
                return connection.getpeercert()["subject"]  # type: ignore[index]

        before = subject()
        certificates.renew("second")
        assert subject() != before
        certificates.missing = True
        with pytest.raises(ssl.SSLError), told_lines() as lines:
            raw(server, certificates)
        assert [(line.event, line.level) for line in lines] == [("no certificate for admission reviews", "warning")]
        certificates.missing = False
        assert ask(server, certificates)[0] == 200


def test_a_review_that_hangs_is_given_up_and_keeps_nobody_waiting(certificates: Certificates, reviews: Reviews) -> None:
    with serving(certificates, reviews, Limits(to_review=0.2)) as server:
        assert ask(server, certificates, "/hang") == (504, b"the review took too long\n")
        assert ask(server, certificates)[0] == 200


def test_of_very_many_reviews_at_once_some_are_sent_away(certificates: Certificates, reviews: Reviews) -> None:
    with serving(certificates, reviews, Limits(to_review=60)) as server:
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda: answers.append(ask(server, certificates, "/hang")[0])) for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert reviews.begun.acquire(timeout=30)
        assert ask(server, certificates) == (503, b"too many reviews at once\n")
        reviews.go.set()
        for thread in threads:
            thread.join()
        assert answers == [200] * 16
        assert ask(server, certificates)[0] == 200


@pytest.mark.parametrize("begun", [b"POST /ec", b"POST /echo HTTP/1.1\r\nContent-Length: 10\r\n\r\n{"])
def test_who_stops_in_a_request_is_dropped(certificates: Certificates, reviews: Reviews, begun: bytes) -> None:
    with serving(certificates, reviews, Limits(to_ask=0.3)) as server, raw(server, certificates) as connection:
        connection.sendall(begun)
        assert _rest(connection) == b""


def test_who_says_nothing_is_dropped_and_a_head_has_an_end(certificates: Certificates, reviews: Reviews) -> None:
    with serving(certificates, reviews, Limits(to_be_silent=0.3)) as server:
        with raw(server, certificates) as connection:
            assert _rest(connection) == b""
        with raw(server, certificates) as connection:
            with suppress(OSError):
                connection.sendall(b"POST /echo HTTP/1.1\r\nX: " + b"y" * (1 << 20))
            assert _rest(connection) == b""


def _rest(connection: ssl.SSLSocket) -> bytes:
    """What comes until the end, or until the other side resets."""
    try:
        return connection.recv(100)
    except (ConnectionError, ssl.SSLError):
        return b""


def test_the_oldest_connection_goes_for_a_new_one(server: ReviewServer, certificates: Certificates) -> None:
    held = [raw(server, certificates) for _ in range(65)]
    assert _rest(held[0]) == b""
    assert ask(server, certificates)[0] == 200
    for connection in held:
        connection.close()


def test_an_address_that_is_taken_is_told(server: ReviewServer, certificates: Certificates, reviews: Reviews) -> None:
    other = ReviewServer((HOST, server.port), reviews.paths, certificates, Limits())  # type: ignore[arg-type]
    with pytest.raises(FailedPrecondition, match="for admission reviews cannot be used"):
        other.start()
