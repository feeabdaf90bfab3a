"""The other end of an upload: sends a file to the agent that waits for it, and goes on where it was cut."""

import contextlib
import http.client
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from csi_driver.agent.digests import DIGEST, digest_of
from csi_driver.images.base import MIB, Progress
from csi_driver.images.checksum import Checksum
from csi_driver.kube.copies import AGENTS
from csi_driver.model.errors import (
    CommandFailed,
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from csi_driver.model.text import one_line

_SECONDS: Final = 60.0
_TRIES: Final = 5
_PAUSE_SECONDS: Final = 2.0
_REFUSED: Final = {400: InvalidArgument, 409: FailedPrecondition, 507: ResourceExhausted}


class Sender:
    """Sends to the agent at `address` (HOST:PORT), whose certificate `ca` (PEM) signed, by a token of Kubernetes."""

    def __init__(self, address: str, ca: str, token: str, image: str) -> None:
        host, _, port = address.rpartition(":")
        self._to = (host.strip("[]"), int(port))
        self._address = address
        try:
            self._tls = ssl.create_default_context(cadata=ca)
        except (ssl.SSLError, ValueError):
            raise FailedPrecondition("the certificate of the agents' authority is none; expected PEM") from None
        self._headers = {"Authorization": f"Bearer {token}"}
        self._path = f"/v1/uploads/{image}"
        self._image = image

    def send(self, path: Path, checksum: Checksum, progress: Progress) -> None:
        """All of the file, which has this checksum. Raises PermissionDenied, FailedPrecondition (also where another
        file was begun there), ResourceExhausted (that node has no room), and Unavailable: the same call goes on.
        """
        total = path.stat().st_size
        if not total:
            raise FailedPrecondition(f"{path} is empty; name an image with something in it")
        headers = {DIGEST: digest_of(checksum)}
        there, failures = self._received(total, headers), 0
        with path.open("rb") as file:
            while there < total:
                progress(there)
                before = there
                try:
                    self._put(file, there, total, headers, progress)
                    there = total
                except Unavailable:
                    time.sleep(_PAUSE_SECONDS)
                    there = self._received(total, headers)
                    failures = 0 if there > before else failures + 1
                    if failures >= _TRIES:
                        raise
        progress(total)

    def _received(self, total: int, headers: dict[str, str]) -> int:
        """How much of this very file is there."""
        said = self._ask("GET", {}, None)
        offset = said.get("Upload-Offset", "")
        there = int(offset) if offset.isdigit() else 0
        begun, digest = said.get("Upload-Length", str(total)), said.get(DIGEST)
        why = ""
        if there and (begun != str(total) or digest not in (None, headers[DIGEST])):
            why = f"{there} of {begun} bytes of another file are there already"
        elif there >= total and digest is None:  # of half a file the agent finds out when the rest is there
            why = "it is there already, and nothing tells of which file"
        if why:
            raise FailedPrecondition(
                f"image {self._image} cannot be uploaded: {why}; go on with the file that was begun, or delete the "
                f"Image and make it anew"
            )
        return there

    def _put(self, file: BinaryIO, start: int, total: int, announced: dict[str, str], progress: Progress) -> None:
        file.seek(start)

        def pieces() -> Iterator[bytes]:
            at = start
            while piece := file.read(MIB):
                yield piece
                at += len(piece)
                progress(at)

        headers = {"Content-Range": f"bytes {start}-{total - 1}/{total}", "Content-Length": str(total - start)}
        self._ask("PUT", announced | headers, pieces)

    def _ask(
        self, method: str, headers: dict[str, str], body: Callable[[], Iterator[bytes]] | None
    ) -> http.client.HTTPMessage:
        """The headers of the answer."""
        try:
            with contextlib.closing(self._connection()) as connection:
                # Who refuses in the middle of a body has said why, and that is what counts.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
                    connection.request(method, self._path, body() if body else None, {**self._headers, **headers})
                response = connection.getresponse()
                said = response.read(4096)
        except ssl.SSLCertVerificationError as error:
            raise FailedPrecondition(
                f"what answers at {self._address} is no agent of this cluster ({error.verify_message}); check --address"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(
                f"the agent at {self._address} cannot be reached or broke off ({one_line(str(error), 200)}); the same "
                f"command goes on; --address HOST:PORT names another way to it, such as a forwarded port"
            ) from None
        if response.status < 300:
            return response.headers
        text = one_line(said.decode(errors="replace"), 400) or f"status {response.status}"
        if response.status in (401, 403):
            raise PermissionDenied(f"image {self._image} cannot be uploaded: {text}")
        if response.status in (404, 416, 503):
            raise Unavailable(f"image {self._image} is not taken at this moment: {text}")
        kind = _REFUSED.get(response.status, CommandFailed)
        raise kind(f"image {self._image} cannot be uploaded: {text}")

    def _connection(self) -> http.client.HTTPConnection:
        plain = socket.create_connection(self._to, timeout=_SECONDS)
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            secured = self._tls.wrap_socket(plain, server_hostname=AGENTS)
        except BaseException:
            plain.close()
            raise
        connection = http.client.HTTPConnection(AGENTS, timeout=_SECONDS)
        connection.sock = secured
        return connection
