"""The client of the API: a user's name for an object leads to no other one, and a watch ends, whatever comes."""

import base64
import contextlib
import json
import queue
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from lightkube.generic_resource import create_global_resource

from csi_driver.kube import client
from csi_driver.kube.client import Kube
from csi_driver.kube.kinds import CLAIM, IMAGE, SECRET, Json, Kind
from csi_driver.kube.refusals import Conflict, Gone, NamespaceGoing
from csi_driver.model.errors import (
    DriverError,
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)

NAMES = ["", "a/b", "../secrets", "a?b", "a#b", "a%2fb", "..", ".", "a b", "a\n", "-a", "a" * 254, "*"]
GIVEN = json.dumps({"status": {"token": "SECRET\n"}})
PLUGIN = {"apiVersion": "client.authentication.k8s.io/v1beta1", "command": "echo", "args": [GIVEN]}
A, B = ({"metadata": {"name": name, "resourceVersion": "2"}} for name in "ab")


@pytest.fixture
def kube(tmp_path: Path) -> Iterator[Kube]:
    """A client of an API that nobody can reach: what it is asked for raises Unavailable."""
    kube = kube_of(tmp_path, 1)
    yield kube
    kube.close()


def kube_of(tmp_path: Path, port: int, cluster: Json | None = None, **user: object) -> Kube:
    """A client of the API there; by a token unless the kubeconfig's user has something else."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"} | (cluster or {})}],
        "users": [{"name": "u", "user": user or {"token": "t"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "c",
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    return Kube.of(tmp_path / "kubeconfig")


def event(what: str, thing: Json) -> bytes:
    """A line of a watch; what JSON need not escape is as it is."""
    return json.dumps({"type": what, "object": thing}, ensure_ascii=False).encode() + b"\n"


class WatchedApi(ThreadingHTTPServer):
    """Answers each request with `code` and `pieces`; one that is `silent` says nothing behind them until the end."""

    daemon_threads = True

    def __init__(self, pieces: Sequence[bytes], code: int = 200, *, silent: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.pieces, self.code, self.silent = pieces, code, silent
        self.asked: queue.Queue[str] = queue.Queue()
        self.headers: queue.Queue[Message] = queue.Queue()
        self.bodies: queue.Queue[Json] = queue.Queue()
        self.over = threading.Event()


class _Answers(BaseHTTPRequestHandler):
    server: WatchedApi

    def do_GET(self) -> None:
        self.server.asked.put(self.path)
        self.server.headers.put(self.headers)
        self.send_response(self.server.code)
        is_json = b"".join(self.server.pieces).startswith(b"{")
        self.send_header("Content-Type", "application/json" if is_json else "text/html")
        self.end_headers()
        for piece in self.server.pieces:
            self.wfile.write(piece)
            self.wfile.flush()
        if self.server.silent:
            self.server.over.wait()

    def do_POST(self) -> None:
        self.server.bodies.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.do_GET()

    def do_DELETE(self) -> None:
        self.do_POST()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Callable[..., tuple[Kube, WatchedApi]]]:
    """A client of such an API."""
    made: list[tuple[Kube, WatchedApi]] = []

    def make(*pieces: bytes, code: int = 200, silent: bool = False) -> tuple[Kube, WatchedApi]:
        api = WatchedApi(pieces, code, silent=silent)
        threading.Thread(target=api.serve_forever, kwargs={"poll_interval": 0.01}).start()
        made.append((kube_of(tmp_path, api.server_port), api))
        return made[-1]

    yield make
    for kube, api in made:
        api.over.set()
        kube.close()
        api.shutdown()
        api.server_close()


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_a_name_is_not_asked_for(kube: Kube, name: str) -> None:
    assert kube.get(IMAGE, name) is None
    assert kube.get(SECRET, "good", name or "/") is None
    calls: list[Callable[[], object]] = [lambda: kube.patch(IMAGE, name, {}), lambda: kube.delete(IMAGE, name)]
    for call in calls:
        with pytest.raises(InvalidArgument, match="no Image can have the name"):
            call()


@pytest.mark.parametrize("name", NAMES)
def test_no_token_is_asked_for_what_cannot_be_an_account(kube: Kube, name: str) -> None:
    with pytest.raises(InvalidArgument, match="can have the name"):
        kube.account_token("default", name, "audience")
    with pytest.raises(InvalidArgument, match="can have the name"):
        kube.account_token(name, "default", "audience")


def test_a_token_that_cannot_be_read_is_told_with_its_file(kube: Kube, tmp_path: Path) -> None:
    config = json.loads((tmp_path / "kubeconfig").read_text())
    config["users"][0]["user"] = {"tokenFile": str(tmp_path / "token")}
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    other = Kube.of(tmp_path / "kubeconfig")
    try:
        with pytest.raises(FailedPrecondition, match=r"cannot be read from .*/token \(ENOENT"):
            _ = other.own_token
        (tmp_path / "token").write_bytes(b"\xff")
        with pytest.raises(FailedPrecondition, match="it is no text"):
            _ = other.own_token
        (tmp_path / "token").write_text("t\n")
        assert other.own_token == "t"
    finally:
        other.close()
    assert kube.own_token == "t"


@pytest.mark.parametrize(
    ("user", "sent"),
    [
        ({"tokenFile": "token"}, "Bearer f"),
        ({"token": "t", "tokenFile": "token"}, "Bearer f"),
        ({"username": "me", "password": "hunter2"}, "Basic bWU6aHVudGVyMg=="),
        ({"exec": PLUGIN | {"args": [GIVEN.replace("\\n", "")]}}, "Bearer SECRET"),
        ({"token": " ", "username": "me", "password": "hunter2"}, "Basic bWU6aHVudGVyMg=="),
    ],
)
def test_each_kind_of_credentials_is_sent(
    watched: Callable[..., tuple[Kube, WatchedApi]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    user: Json,
    sent: str,
) -> None:
    _, api = watched(event("ADDED", A))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "token").write_text("f\n")
    with contextlib.closing(kube_of(tmp_path, api.server_port, **user)) as kube:
        assert kube.get(IMAGE, "a") is not None
        assert list(kube.watch(IMAGE, "7")) == [("ADDED", A)]
    assert [api.headers.get_nowait()["Authorization"] for _ in range(2)] == [sent, sent]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with key and self-signed certificate of 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-batch"),
            *("-subj", "/CN=me", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-days", "2", "-keyout", folder / "tls.key", "-out", folder / "tls.crt"),
        ],
        check=True,
        capture_output=True,
    )
    return folder


def as_data(folder: Path) -> tuple[Json, Json]:
    """Cluster and user of a kubeconfig that has all of TLS in it."""
    crt, key = (base64.b64encode((folder / name).read_bytes()).decode() for name in ("tls.crt", "tls.key"))
    return {"certificate-authority-data": crt}, {"client-certificate-data": crt, "client-key-data": key}


def as_files(folder: Path) -> tuple[Json, Json]:
    """The same, by files."""
    crt, key = (str(folder / name) for name in ("tls.crt", "tls.key"))
    return {"certificate-authority": crt}, {"client-certificate": crt, "client-key": key}


def as_relative_files(_: Path) -> tuple[Json, Json]:
    """The same, by files that lie beside the kubeconfig."""
    return {"certificate-authority": "tls.crt"}, {"client-certificate": "tls.crt", "client-key": "tls.key"}


def as_anybody(folder: Path) -> tuple[Json, Json]:
    """A user by data, and a server that anybody may be."""
    return {"insecure-skip-tls-verify": True}, as_data(folder)[1]


@pytest.fixture
def tls(certificate: Path) -> Iterator[WatchedApi]:
    """An API that wants a certificate of its users."""
    api = WatchedApi([event("ADDED", A)])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "tls.crt", certificate / "tls.key")
    context.load_verify_locations(certificate / "tls.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    api.socket = context.wrap_socket(api.socket, server_side=True)
    threading.Thread(target=api.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield api
    api.shutdown()
    api.server_close()


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary file is an error."""

    def made(*_: object, **__: object) -> None:
        raise AssertionError("a temporary file was made")

    for name in ("NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile", "mkstemp", "mkdtemp"):
        monkeypatch.setattr(tempfile, name, made)


@pytest.mark.usefixtures("no_files")
@pytest.mark.parametrize("shown", [as_data, as_files, as_relative_files, as_anybody])
def test_certificates_of_a_kubeconfig_are_used_and_come_to_no_file(
    tls: WatchedApi, tmp_path: Path, certificate: Path, shown: Callable[[Path], tuple[Json, Json]]
) -> None:
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).write_bytes((certificate / name).read_bytes())
    cluster, user = shown(certificate)
    there = {"server": f"https://127.0.0.1:{tls.server_port}"}
    with contextlib.closing(kube_of(tmp_path, 1, there | cluster, **user)) as kube:
        assert kube.get(IMAGE, "a") is not None
        assert list(kube.watch(IMAGE, "7")) == [("ADDED", A)]
    with (
        contextlib.closing(kube_of(tmp_path, 1, there, **user)) as kube,
        pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        kube.get(IMAGE, "a")


NO_PEM = base64.b64encode(b"SECRET").decode()


@pytest.mark.usefixtures("no_files")
@pytest.mark.parametrize(
    ("cluster", "user", "why"),
    [
        ({"certificate-authority-data": "SECRET"}, {}, "its certificate-authority-data is no base64"),
        ({"certificate-authority-data": NO_PEM}, {}, "the CA certificate of its cluster is no PEM"),
        ({"certificate-authority": "absent.crt"}, {}, "absent.crt cannot be read: ENOENT"),
        ({}, {"client-certificate-data": "SECRET"}, "its client-certificate-data is no base64"),
        ({}, {"client-key-data": "SECRET\xfc"}, "its client-key-data is no base64"),
        ({}, {"client-key-data": NO_PEM}, "client certificate and key of its user are no PEM, or do not belong"),
        ({}, {"client-key-data": ""}, "its user has a client certificate and no key"),
        ({}, {"client-key-data": "", "client-key": "absent.key"}, "absent.key cannot be read: ENOENT"),
    ],
)
def test_a_certificate_or_key_that_cannot_be_used_is_told_and_not_repeated(
    tmp_path: Path, certificate: Path, cluster: Json, user: Json, why: str
) -> None:
    with pytest.raises(FailedPrecondition, match=rf"no way to the Kubernetes API \({why}") as told:
        kube_of(tmp_path, 1, cluster, **(as_data(certificate)[1] | user))
    assert "SECRET" not in str(told.value)
    assert NO_PEM not in str(told.value)


@pytest.mark.parametrize("token", ["SECRET\n", "  SECRET", "SECRET\r\n"])
def test_white_space_around_a_token_is_none_of_it(
    watched: Callable[..., tuple[Kube, WatchedApi]], tmp_path: Path, token: str
) -> None:
    _, api = watched(json.dumps(A).encode())
    with contextlib.closing(kube_of(tmp_path, api.server_port, token=token)) as kube:
        assert kube.own_token == "SECRET"
        assert kube.get(IMAGE, "a") == A
    assert api.headers.get_nowait()["Authorization"] == "Bearer SECRET"


@pytest.mark.parametrize("token", ["SECRET of mine", "SECRET\nX-Remote-User: admin", "SECRET\xfc", "SECRET\u2192\0"])
def test_a_token_that_cannot_be_sent_is_told_and_not_repeated(tmp_path: Path, token: str) -> None:
    with pytest.raises(FailedPrecondition, match="the token of the kubeconfig's user cannot be sent") as told:
        kube_of(tmp_path, 1, token=token)
    assert "SECRET" not in str(told.value)
    (tmp_path / "token").write_text(token)
    with contextlib.closing(kube_of(tmp_path, 1, tokenFile=str(tmp_path / "token"))) as kube:
        with pytest.raises(FailedPrecondition, match="the token of the kubeconfig's user cannot be sent") as told:
            _ = kube.own_token
        assert "SECRET" not in str(told.value)


@pytest.mark.parametrize(("token", "user"), [(b"SECRET\0", {}), (b"SECRET\nX: y", {}), (b"", {"exec": PLUGIN})])
def test_a_header_that_cannot_be_sent_is_not_repeated(
    watched: Callable[..., tuple[Kube, WatchedApi]], tmp_path: Path, token: bytes, user: Json
) -> None:
    _, api = watched()
    (tmp_path / "token").write_bytes(token)
    user = user or {"tokenFile": str(tmp_path / "token")}
    with contextlib.closing(kube_of(tmp_path, api.server_port, **user)) as kube:
        calls: list[Callable[[], object]] = [lambda: kube.get(IMAGE, "a"), lambda: list(kube.watch(IMAGE, "7"))]
        for call in calls:
            with pytest.raises(FailedPrecondition, match=r"for Image.*has characters that no header can have") as told:
                call()
            assert "SECRET" not in str(told.value)


def test_a_token_file_that_is_no_text_is_told_and_not_repeated(
    watched: Callable[..., tuple[Kube, WatchedApi]], tmp_path: Path
) -> None:
    _, api = watched()
    (tmp_path / "token").write_bytes(b"SECRET\xff")
    with contextlib.closing(kube_of(tmp_path, api.server_port, tokenFile=str(tmp_path / "token"))) as kube:
        with pytest.raises(Unavailable, match=r"or the token file of the kubeconfig's user, as it is no UTF-8") as told:
            kube.get(IMAGE, "a")
        assert "SECRET" not in str(told.value)


def test_a_password_in_the_address_of_the_api_is_not_repeated(
    watched: Callable[..., tuple[Kube, WatchedApi]], tmp_path: Path
) -> None:
    _, api = watched(b"<html>", code=502)
    config = json.loads((tmp_path / "kubeconfig").read_text())
    for address in (f"127.0.0.1:{api.server_port}", "127.0.0.1:hunter2"):
        config["clusters"][0]["cluster"]["server"] = f"http://me:hunter2@{address}"
        (tmp_path / "kubeconfig").write_text(json.dumps(config))
        with pytest.raises((Unavailable, FailedPrecondition), match=r"HTTP 502|whose server is no URL") as told:
            Kube.of(tmp_path / "kubeconfig").get(IMAGE, "a")
        assert "hunter2" not in str(told.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("users:\n- name: u\n  user:\n    password: hunter2: x\n", "from line 4, column 22 on, as YAML"),
        ("users: {password: [hunter2\n", "from line 2, column 1 on, as YAML"),
        ("password: !hunter2 x\n", "from line 1, column 11 on, as YAML"),
        ("password: hunter2\0\n", r"cannot be read \(ReaderError\)"),
        ("password: !!int hunter2\n", r"cannot be read \(ValueError\)"),
        ("hunter2\n", r"cannot be read \(AttributeError\)"),
        ("", r"cannot be read \(AttributeError\)"),
        ("clusters: []\n", r"'contexts' is missing"),
        ("clusters: []\ncontexts: []\nusers: [{name: u, user: {password: [hunter2]}}]\n", r"Expected `str.*password"),
    ],
)
def test_what_is_no_kubeconfig_is_told_without_what_stands_in_it(tmp_path: Path, content: str, why: str) -> None:
    (tmp_path / "kubeconfig").write_text(content)
    with pytest.raises(FailedPrecondition, match=rf"no way to the Kubernetes API \(.*{why}") as told:
        Kube.of(tmp_path / "kubeconfig")
    assert "hunter2" not in str(told.value)


@pytest.mark.parametrize("name", ["a", "vmi-1", "system:controller", "Upper_case.1", "a" * 253])
def test_what_can_be_one_is(kube: Kube, name: str) -> None:
    with pytest.raises(Unavailable):
        kube.get(IMAGE, name)


def test_a_deletion_is_of_what_was_seen(watched: Callable[..., tuple[Kube, WatchedApi]]) -> None:
    kube, api = watched(b"{}")
    options: Json = {"apiVersion": "v1", "kind": "DeleteOptions"}
    seen = {"uid": "u", "resourceVersion": "7"}
    kube.delete(IMAGE, "a", seen={"metadata": {"name": "a", **seen}})
    kube.delete(CLAIM, "b", "here", grace_seconds=0)
    asked = [(api.asked.get_nowait(), api.bodies.get_nowait()) for _ in range(2)]
    assert asked == [
        ("/apis/images.luks.csi.internal/v1alpha1/images/a", options | {"preconditions": seen}),
        ("/api/v1/namespaces/here/persistentvolumeclaims/b", options | {"gracePeriodSeconds": 0}),
    ]
    api.pieces, api.code = [json.dumps(status(404)).encode()], 404
    kube.delete(IMAGE, "a")
    api.pieces, api.code = [json.dumps(status(409, reason="Conflict")).encode()], 409
    with pytest.raises(Conflict, match="was changed meanwhile"):
        kube.delete(IMAGE, "a")


def test_a_kind_that_the_api_does_not_have_is_told(watched: Callable[..., tuple[Kube, WatchedApi]]) -> None:
    """It answers in plain text then, and `tried again` would be all that anybody hears of it."""
    kube, api = watched(b"404 page not found\n")
    api.code = 404
    for call in (lambda: kube.get(IMAGE, "a"), lambda: kube.list(IMAGE), lambda: kube.create(IMAGE, A)):
        with pytest.raises(
            FailedPrecondition, match=r"no kind Image of images\.luks\.csi\.internal/v1alpha1.*crds\.yaml"
        ):
            call()


def test_a_watch_that_has_ended_is_not_begun_anew(watched: Callable[..., tuple[Kube, WatchedApi]]) -> None:
    kube, api = watched(event("ADDED", A), event("BOOKMARK", A), event("DELETED", B))
    told = list(kube.watch(CLAIM, "7", "here", labels={"x": "y", "z": ""}, fields={"metadata.name": "a"}))
    assert told == [("ADDED", A), ("DELETED", B)]
    asked = urlsplit(api.asked.get_nowait())
    assert asked.path == "/api/v1/namespaces/here/persistentvolumeclaims"
    query = parse_qs(asked.query)
    assert 300 <= int(query.pop("timeoutSeconds")[0]) <= 540
    assert query == {
        "watch": ["true"], "resourceVersion": ["7"], "allowWatchBookmarks": ["true"],
        "labelSelector": ["x=y,z="], "fieldSelector": ["metadata.name=a"],
    }  # fmt: skip
    assert list(kube.watch(IMAGE, "7")) == told
    assert urlsplit(api.asked.get_nowait()).path == "/apis/images.luks.csi.internal/v1alpha1/images"
    assert api.asked.empty()


def test_a_watch_that_says_nothing_any_more_ends(
    watched: Callable[..., tuple[Kube, WatchedApi]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kube, api = watched(event("ADDED", A), silent=True)
    monkeypatch.setattr(client, "_SILENT_SECONDS", 0.05)
    assert list(kube.watch(IMAGE, "7")) in ([("ADDED", A)], [])  # none where that came late
    assert api.asked.get(timeout=60)
    assert api.asked.empty()


def test_an_event_is_a_line_whatever_is_in_it(watched: Callable[..., tuple[Kube, WatchedApi]]) -> None:
    thing = {"metadata": {"name": "a", "annotations": {"note": "next\x85line\u2028of\u2029these\x1e"}}}
    line = event("ADDED", thing)
    kube, _ = watched(line[:40], line[40:-1], b"\n" + event("MODIFIED", thing))
    assert list(kube.watch(IMAGE, "7")) == [("ADDED", thing), ("MODIFIED", thing)]


NO_RIGHT = (
    'images.images.luks.csi.internal is forbidden: User "system:serviceaccount:luks:luks" cannot list resource '
    '"images" in API group "images.luks.csi.internal" at the cluster scope'
)


def status(code: int, message: str = "so it is", reason: str = "") -> Json:
    """What the API says of an error."""
    return {"kind": "Status", "status": "Failure", "message": message, "code": code, "reason": reason}


@pytest.mark.parametrize(
    ("code", "message", "kind", "said"),
    [
        (401, "Unauthorized", PermissionDenied, "look at the role"),
        (403, NO_RIGHT, PermissionDenied, "look at the role"),
        (403, NO_RIGHT.replace("luks:luks", f"{'a' * 253}:{'b' * 253}"), PermissionDenied, "look at the role"),
        (
            403, 'persistentvolumeclaims "a" is forbidden: exceeded quota: few, requested: requests.storage=1Gi',
            ResourceExhausted, r"a quota leaves no room for .*exceeded quota: few, .*; raise that quota",
        ),
        (
            403, 'pods "a" is forbidden: insufficient quota to match these scopes: [{PriorityClass In [critical]}]',
            ResourceExhausted, r"a quota leaves no room for .*insufficient quota",
        ),
        (
            403, 'pods "a" is forbidden: violates PodSecurity "restricted:latest": privileged',
            FailedPrecondition, r"the cluster does not admit .*violates PodSecurity .*; change what it admits",
        ),
        (
            403, 'persistentvolumeclaims "a" is forbidden: minimum storage usage per PersistentVolumeClaim is 1Gi',
            FailedPrecondition, r"the cluster does not admit .*minimum storage usage",
        ),
        (
            403, "unable to create new content in namespace here because it is being terminated",
            NamespaceGoing, "the namespace of .* is being deleted",
        ),
        (403, 'admission webhook "x" denied the request: exceeded quota', InvalidArgument, "is refused: admission"),
        (403, f'admission webhook "x" denied the request: {NO_RIGHT}', InvalidArgument, "is refused: admission"),
        (
            403, "images \"a\" is forbidden: ValidatingAdmissionPolicy 'x' with binding 'y' denied request: no",
            InvalidArgument, "is refused: images",
        ),
        (422, 'Image "a" is invalid: spec: Required value', InvalidArgument, "is refused: Image"),
    ],
)  # fmt: skip
def test_what_the_api_refuses_is_told_by_who_refuses_it(
    watched: Callable[..., tuple[Kube, WatchedApi]], code: int, message: str, kind: type[DriverError], said: str
) -> None:
    kube, _ = watched(json.dumps(status(code, message)).encode(), code=code)
    asks: list[Callable[[], object]] = [
        lambda: kube.get(IMAGE, "a"),
        lambda: kube.create(CLAIM, {"metadata": {"name": "a"}}, "here"),
    ]
    for ask in asks:
        with pytest.raises(kind, match=said) as told:
            ask()
        assert type(told.value) is kind


def test_an_error_of_a_watch_is_told_as_it_was_meant(watched: Callable[..., tuple[Kube, WatchedApi]]) -> None:
    kube, api = watched(event("ADDED", A), event("ERROR", status(410)))
    with pytest.raises(Gone, match="so it is"):
        list(kube.watch(IMAGE, "7"))
    api.pieces, api.code = [json.dumps(status(403, NO_RIGHT)).encode()], 403
    with pytest.raises(PermissionDenied, match="is forbidden"):
        list(kube.watch(IMAGE, "7"))
    api.pieces, api.code = [b"<html>"], 502
    with pytest.raises(Unavailable, match="502"):
        list(kube.watch(IMAGE, "7"))
    for odd in (b"<html>\n", b'{"type": "ADDED", "object": {"kind": "\xff"}}\n'):
        api.pieces, api.code = [odd], 200
        with pytest.raises(Unavailable, match=r"has sent for Image .*cannot be read"):
            list(kube.watch(IMAGE, "7"))


def test_two_threads_may_be_the_first_to_ask_for_a_kind(kube: Kube, monkeypatch: pytest.MonkeyPatch) -> None:
    """lightkube lets one make a kind's class, and raises for the other."""
    real, both, at_once = create_global_resource, threading.Barrier(2), [0]

    def make(*words: str) -> object:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)
            at_once[0] += 1
        return real(*words)

    def ask() -> None:
        with pytest.raises(Unavailable):
            kube.get(Kind("test.example", "v1", "Thing", "things"), "a")

    monkeypatch.setattr(client, "create_global_resource", make)
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert at_once == [0]
