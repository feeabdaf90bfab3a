"""The agent's server: who asks without a right, or asks nothing at all, keeps nobody else from it."""

import base64
import contextlib
import http.client
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from csi_driver.agent.access import Access
from csi_driver.agent.server import CopyServer, Rate
from csi_driver.agent.uploads import Uploads
from csi_driver.images.library import ImageLibrary
from csi_driver.kube.copies import AGENTS, State
from csi_driver.kube.kinds import SECRET, Json
from csi_driver.model.errors import PermissionDenied, Unauthenticated
from csi_driver.operator.certificates import AGENT_SECRET, Certificates
from tests.operator_fakes import FakeApi

_HOST = "127.0.0.1"
_WAITING: Json = {"spec": {"image": "disk", "imageUID": "uid"}, "status": {"state": State.AWAITING_UPLOAD}}


class TokenAccess:
    """Lets the token `good` upload, and nobody have a copy."""

    def check_agent(self, _token: str) -> None:
        raise PermissionDenied("somebody is no agent")

    def check_upload(self, token: str, _image: str) -> None:
        if token != "good":
            raise Unauthenticated("the token is not valid")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[CopyServer]:
    api = FakeApi()
    Certificates(api, "luks-csi").reconcile("all")
    secret = api.get(SECRET, AGENT_SECRET, "luks-csi")
    assert secret is not None
    for name, value in secret["data"].items():
        (tmp_path / name).write_bytes(base64.b64decode(value))
    made = CopyServer(
        (_HOST, 0), tmp_path, ImageLibrary(tmp_path / "images"), Uploads(tmp_path / "uploads"),
        cast("Access", TokenAccess()), lambda: [_WAITING], Rate(0),
    )  # fmt: skip
    made.start()
    yield made
    made.stop()


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


def test_who_is_silent_keeps_nobody_out(server: CopyServer, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection((_HOST, server.port), timeout=30))
        assert ask(server, tmp_path, "GET", "/v1/uploads/disk", {"Authorization": "Bearer good"}) == (204, "0")


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
