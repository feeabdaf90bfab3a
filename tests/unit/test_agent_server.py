"""The agent's server: who asks without a right, or asks nothing at all, keeps nobody else from it."""

import base64
import contextlib
import hashlib
import http.client
import io
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from csi_driver.agent.access import Access
from csi_driver.agent.digests import digest_of, read_digest
from csi_driver.agent.rate import Rate
from csi_driver.agent.sending import Sender
from csi_driver.agent.server import CopyServer, _Body
from csi_driver.agent.uploads import Uploads
from csi_driver.images.base import MIB
from csi_driver.images.checksum import Algorithm, Checksum
from csi_driver.images.library import ImageLibrary
from csi_driver.kube.copies import AGENTS, State
from csi_driver.kube.kinds import SECRET, Json
from csi_driver.model.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    VolumeBusy,
)
from csi_driver.operator.certificates import AGENT_SECRET, Certificates
from tests.image_clones import nothing, sha256
from tests.operator_fakes import FakeApi
from tests.told_lines import told_lines

_HOST = "127.0.0.1"
_WAITING: Json = {
    "metadata": {},
    "spec": {"image": "disk", "imageUID": "uid"},
    "status": {"state": State.AWAITING_UPLOAD},
}
_IMAGE: Json = {"spec": {"limit": "64Mi"}}


class TokenAccess:
    """Lets the token `good` upload, and nobody have a copy."""

    def check_agent(self, _token: str) -> None:
        raise PermissionDenied("somebody is no agent")

    def check_upload(self, token: str, _image: str) -> None:
        if token != "good":
            raise Unauthenticated("the token is not valid")


def mount(folder: Path) -> None:
    """The certificate, as kubelet mounts it."""
    api = FakeApi()
    Certificates(api, "luks-csi").reconcile("all")
    secret = api.get(SECRET, AGENT_SECRET, "luks-csi")
    assert secret is not None
    for name, value in secret["data"].items():
        (folder / name).write_bytes(base64.b64decode(value))


@contextlib.contextmanager
def serving(folder: Path, host: str = _HOST, obstacle: Callable[[], str] = lambda: "") -> Iterator[CopyServer]:
    made = CopyServer(
        (host, 0), folder, ImageLibrary(folder / "images"), Uploads(folder / "uploads"),
        cast("Access", TokenAccess()), lambda: [_WAITING], lambda _name: _IMAGE, Rate(0), obstacle,
    )  # fmt: skip
    made.start()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[CopyServer]:
    mount(tmp_path)
    with serving(tmp_path) as made:
        yield made


def ask(
    server: CopyServer, folder: Path, method: str, path: str, headers: dict[str, str], body: bytes = b""
) -> tuple[int, str]:
    """Status, and what was said or, of an upload, how much is there."""
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    with (
        socket.create_connection((_HOST, server.port), timeout=30) as plain,
        contextlib.closing(http.client.HTTPConnection(AGENTS)) as connection,
    ):
        connection.sock = context.wrap_socket(plain, server_hostname=AGENTS)
        connection.putrequest(method, path)
        for name, value in headers.items():
            connection.putheader(name, value.encode("latin-1"))
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, response.headers.get("Upload-Offset") or response.read().decode()


@pytest.mark.parametrize("most", [256, 20], ids=["fewer than there may be", "more"])
def test_who_is_silent_keeps_nobody_out(
    server: CopyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr("csi_driver.agent.connections._MOST_UNKNOWN", most)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection((_HOST, server.port), timeout=30))
        assert ask(server, tmp_path, "GET", "/v1/uploads/disk", {"Authorization": "Bearer good"}) == (204, "0")


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01"])
def test_a_handshake_has_its_time_however_little_comes_of_it(
    server: CopyServer, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr("csi_driver.agent.connections._ASK_SECONDS", 0.2)
    with socket.create_connection((_HOST, server.port), timeout=20) as plain:  # less than a read may take there
        plain.sendall(sent)
        assert plain.recv(1) == b""


def test_who_is_not_known_yet_is_counted_until_he_is(
    server: CopyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each makes the API look at a token."""
    monkeypatch.setattr("csi_driver.agent.connections._MOST_UNKNOWN", 3)
    reviews, answer, sending = threading.Semaphore(0), threading.Event(), threading.Event()

    def check(token: str, _image: str) -> None:
        if token != "good":
            reviews.release()
            assert answer.wait(60)
            raise Unauthenticated("the token is not valid")

    monkeypatch.setattr(server.access, "check_upload", check)
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))

    def send(stack: contextlib.ExitStack, token: str, method: str = "GET", more: str = "") -> ssl.SSLSocket:
        plain = stack.enter_context(socket.create_connection((_HOST, server.port), timeout=60))
        secured = stack.enter_context(context.wrap_socket(plain, server_hostname=AGENTS))
        head = f"{method} /v1/uploads/disk HTTP/1.1\r\nAuthorization: Bearer {token}\r\n{more}\r\n"
        secured.sendall(head.encode())
        return secured

    def receive(*_: object, **__: object) -> int:
        sending.set()
        assert answer.wait(60)
        return 4

    monkeypatch.setattr(server.uploads, "receive", receive)
    with contextlib.ExitStack() as stack:
        body = "Content-Range: bytes 0-3/4\r\nContent-Length: 4\r\n"
        known = send(stack, "good", "PUT", body)
        assert sending.wait(60)  # he is known, and takes nobody's place
        asking = []
        for _ in range(3):
            asking.append(send(stack, "bad"))
            assert reviews.acquire(timeout=60)
        with pytest.raises(OSError):  # noqa: PT011 - whatever TLS makes of the end
            send(stack, "bad").recv(1)
        answer.set()
        assert [each.recv(100).split(b"\r\n")[0] for each in (known, *asking)] == [
            b"HTTP/1.1 204 No Content", *3 * [b"HTTP/1.1 401 Unauthorized"],
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "said"),
    [
        ("GET", "/v1/uploads/disk", {}, 401, "a bearer token of Kubernetes is wanted"),
        ("GET", "/v1/uploads/disk", {"Authorization": "Bearer bad"}, 401, "the token is not valid"),
        ("GET", "/v1/uploads/other", {"Authorization": "Bearer good"}, 404, "no upload of image other is awaited"),
        ("GET", "/v1/copies/disk/file", {"Authorization": "Bearer good"}, 403, "somebody is no agent"),
        ("GET", "/v1/copies/../file", {"Authorization": "Bearer good"}, 404, "there is nothing of that name"),
        ("PUT", "/v1/uploads/disk", {"Authorization": "Bearer good"}, 400, "says by Content-Range"),
        (
            "PUT", "/v1/uploads/disk",
            {"Authorization": "Bearer good", "Content-Range": "bytes 0-1/2", "Content-Length": "\xb2"}, 400,
            "says by Content-Range",
        ),
        (
            "PUT", "/v1/uploads/disk",
            {"Authorization": "Bearer good", "Content-Range": "bytes 0-1/67108865", "Content-Length": "2"}, 400,
            "image disk may have 67108864 bytes and 67108865 were to come; raise spec.limit of the Image",
        ),
        (
            "PUT", "/v1/uploads/disk",
            {
                "Authorization": "Bearer good", "Content-Range": "bytes 0-1/2", "Content-Length": "2",
                "Repr-Digest": "sha-256=:eA==:",
            }, 400,
            "Repr-Digest is to be sha-256=:BASE64: or sha-512=:BASE64:",
        ),
    ],
)  # fmt: skip
def test_what_is_not_right_has_a_sentence(
    server: CopyServer, tmp_path: Path, method: str, path: str, headers: dict[str, str], status: int, said: str
) -> None:
    code, text = ask(server, tmp_path, method, path, headers)
    assert (code, said in text) == (status, True), text


def test_an_upload_comes_in(server: CopyServer, tmp_path: Path) -> None:
    headers = {"Authorization": "Bearer good", "Content-Range": "bytes 0-3/8", "Content-Length": "4"}
    assert ask(server, tmp_path, "PUT", "/v1/uploads/disk", headers, b"half") == (204, "4")
    assert ask(server, tmp_path, "GET", "/v1/uploads/disk", {"Authorization": "Bearer good"}) == (204, "4")


def test_an_agent_is_ready_when_it_has_a_certificate_and_says_once_that_it_has_none(tmp_path: Path) -> None:
    obstacles = [""]
    with told_lines() as told, serving(tmp_path, obstacle=lambda: obstacles[-1]) as server:
        for _ in range(3):
            plain = socket.create_connection((_HOST, server.port), timeout=30)
            with plain, pytest.raises(OSError):  # noqa: PT011 - whatever TLS makes of the end
                ssl.create_default_context().wrap_socket(plain, server_hostname=AGENTS)
        assert [line.event for line in told] == ["no certificate for copies and uploads"]
        mount(tmp_path)
        assert ask(server, tmp_path, "GET", "/readyz", {}) == (200, "ok\n")
        obstacles.append("Image: the Kubernetes API refuses Image")
        assert ask(server, tmp_path, "GET", "/readyz", {}) == (503, "Image: the Kubernetes API refuses Image\n")
        assert ask(server, tmp_path, "PUT", "/readyz", {})[0] == 404


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_who_has_an_address_of_ipv6_only_is_served(tmp_path: Path) -> None:
    mount(tmp_path)
    with serving(tmp_path, host="") as server:
        for host in ("::1", _HOST):
            socket.create_connection((host, server.port), timeout=30).close()


def test_who_is_refused_in_the_middle_of_an_upload_hears_why(
    server: CopyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_name: str, _uid: str, _start: int, _total: int, _length: int, stream: BinaryIO, **_: object) -> int:
        stream.read(MIB)
        raise ResourceExhausted("no space is left for image disk")

    monkeypatch.setattr(server.uploads, "receive", full)
    file = tmp_path / "disk.raw"
    file.write_bytes(bytes(24 * MIB))  # more than the buffers on the way hold
    with pytest.raises(ResourceExhausted, match="image disk cannot be uploaded: no space is left"):
        to(server, tmp_path).send(file, sha256(b""), nothing)


def to(server: CopyServer, folder: Path) -> Sender:
    return Sender(f"{_HOST}:{server.port}", (folder / "ca.crt").read_text(), "good", "disk")


def put(path: Path, content: bytes) -> tuple[Path, Checksum]:
    path.write_bytes(content)
    return path, sha256(content)


def test_another_file_does_not_go_on_with_what_was_cut(server: CopyServer, tmp_path: Path) -> None:
    first, second = put(tmp_path / "a.raw", b"a" * 8), put(tmp_path / "b.raw", b"b" * 8)
    shorter = put(tmp_path / "c.raw", b"a" * 2)
    with pytest.raises(Aborted):
        server.uploads.receive("disk", "uid", 0, 8, 8, io.BytesIO(b"aaa"), announced=first[1])
    for other in (second, shorter):
        with pytest.raises(FailedPrecondition, match="3 of 8 bytes of another file are there already; go on with the"):
            to(server, tmp_path).send(*other, nothing)
    to(server, tmp_path).send(*first, nothing)
    with pytest.raises(FailedPrecondition, match="8 of 8 bytes of another file are there already"):
        to(server, tmp_path).send(*second, nothing)
    to(server, tmp_path).send(*first, nothing)
    whole = server.uploads.whole("disk", "uid")
    assert whole is not None
    assert whole.read_bytes() == b"a" * 8


def test_a_whole_of_which_nothing_tells_is_nobodys(server: CopyServer, tmp_path: Path) -> None:
    server.uploads.receive("disk", "uid", 0, 8, 8, io.BytesIO(b"a" * 8))
    with pytest.raises(FailedPrecondition, match="it is there already, and nothing tells of which file"):
        to(server, tmp_path).send(*put(tmp_path / "b.raw", b"b" * 8), nothing)


def test_who_uploads_at_the_same_time_waits(
    server: CopyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csi_driver.agent.sending._PAUSE_SECONDS", 0.0)
    busy = [VolumeBusy("image disk is being uploaded already"), VolumeBusy("image disk is being uploaded already")]
    receive = server.uploads.receive

    def often(*arguments: Any, **more: Any) -> int:
        if busy:
            raise busy.pop()
        return receive(*arguments, **more)

    monkeypatch.setattr(server.uploads, "receive", often)
    to(server, tmp_path).send(*put(tmp_path / "a.raw", b"a" * 8), nothing)
    assert server.uploads.received("disk", "uid") == 8


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Authorization": "Bearer bad"}, [b"HTTP/1.1 401 Unauthorized"]),
        ({"Authorization": "Bearer good", "Content-Range": "bytes 1-4/8"}, [b"HTTP/1.1 416 Requested Range"]),
        (
            {"Authorization": "Bearer good", "Content-Range": "bytes 0-3/8"},
            [b"HTTP/1.1 100 Continue", b"HTTP/1.1 204 No Content"],
        ),
    ],
)
def test_who_waits_for_a_word_is_told_to_send_once_and_only_what_is_taken(
    server: CopyServer, tmp_path: Path, headers: dict[str, str], expected: list[bytes]
) -> None:
    lines = {"Host": AGENTS, "Content-Length": "4", "Expect": "100-continue", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    with (
        socket.create_connection((_HOST, server.port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname=AGENTS) as secured,
    ):
        secured.sendall(f"PUT /v1/uploads/disk HTTP/1.1\r\n{head}\r\n".encode())
        said = secured.recv(4096)
        if len(expected) > 1:
            secured.sendall(b"half")
        while piece := secured.recv(4096):
            said += piece
    begins = [line for line in said.split(b"\r\n") if line.startswith(b"HTTP/")]
    assert [found.startswith(wanted) for found, wanted in zip(begins, expected, strict=True)] == [True] * len(begins)


def test_a_digest_is_written_as_rfc_9530_has_it() -> None:
    content = b'{"hello": "world"}\n'  # its appendix B.1
    assert digest_of(sha256(content)) == "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:"
    for algorithm in Algorithm:
        checksum = Checksum(algorithm, hashlib.new(algorithm, content).hexdigest())
        assert read_digest(digest_of(checksum)) == checksum
    for wrong in ("", "sha-256=:x:", "md5=:AAAA:", "sha-512=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:"):
        with pytest.raises(InvalidArgument, match="Repr-Digest is to be"):
            read_digest(wrong)


def test_a_body_is_read_as_it_comes() -> None:
    """Who sends it byte by byte holds nobody up who wants to know between two of them whether it is wanted still."""
    reads: list[int] = []

    class Drip(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            reads.append(len(buffer))
            buffer[0] = 1
            return 1

    body = _Body(io.BufferedReader(Drip()), lambda: None)
    assert body.read(10) == b"\x01"
    assert len(reads) == 1
