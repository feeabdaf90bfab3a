"""HTTPS for copies and uploads: who asks brings a token of Kubernetes, and trusts the certificate by its one name.

GET  /v1/copies/NAME/record     what the copy is: its record and SHA-256 (agents)
GET  /v1/copies/NAME/file       its bytes; Range goes on behind a cut (agents)
GET  /v1/uploads/NAME           how much of an upload is here: Upload-Offset; of what: Upload-Length, Repr-Digest
PUT  /v1/uploads/NAME           bytes of it, Content-Range says which; Repr-Digest (RFC 9530) of what
GET  /readyz                    whether the agent can be used, and why not (anybody: kubelet)
"""

import contextlib
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import BinaryIO, ClassVar, Final, cast

import msgspec

from csi_driver.agent.access import Access
from csi_driver.agent.certificate import Certificate
from csi_driver.agent.connections import IDLE_SECONDS, Server
from csi_driver.agent.digests import DIGEST, digest_of, read_digest
from csi_driver.agent.pulling import Offer
from csi_driver.agent.rate import Rate
from csi_driver.agent.uploads import Uploads, limit_of
from csi_driver.host.log import log
from csi_driver.images.library import ImageLibrary
from csi_driver.kube.copies import State, state_of
from csi_driver.kube.kinds import Json, is_going
from csi_driver.model.errors import (
    Aborted,
    DriverError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
)

_PIECE: Final = 1 << 20
_MOST_AT_ONCE: Final = 32  # transfers of those who may
_LENGTH: Final = re.compile(r"[0-9]{1,18}")
_PATH: Final = re.compile(r"/v1/(copies|uploads)/([a-z0-9][a-z0-9.-]{0,62})(/record|/file|)")
_RANGE: Final = re.compile(r"bytes=([0-9]{1,18})-")
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_STATUS: Final = (
    (Unauthenticated, HTTPStatus.UNAUTHORIZED),
    (PermissionDenied, HTTPStatus.FORBIDDEN),
    (NotFound, HTTPStatus.NOT_FOUND),
    (OutOfRange, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE),
    (InvalidArgument, HTTPStatus.BAD_REQUEST),
    (ResourceExhausted, HTTPStatus.INSUFFICIENT_STORAGE),
    (FailedPrecondition, HTTPStatus.CONFLICT),
    (Aborted, HTTPStatus.SERVICE_UNAVAILABLE),
)


class CopyServer:
    """Serves at `listen` (host, port) from `start` to `stop`. `copies` tells the objects of this node, `images` an
    Image by its name, `obstacle` why its agent is not ready, "" when it is: one without a certificate can tell nobody.
    """

    def __init__(
        self,
        listen: tuple[str, int],
        tls_dir: Path,
        library: ImageLibrary,
        uploads: Uploads,
        access: Access,
        copies: Callable[[], list[Json]],
        images: Callable[[str], Json | None],
        rate: Rate,
        obstacle: Callable[[], str] = lambda: "",
    ) -> None:
        self._listen = listen
        self._tls = Certificate(tls_dir)
        self._thread: threading.Thread | None = None
        self._server: Server | None = None
        self._room = threading.BoundedSemaphore(_MOST_AT_ONCE)
        outer = self

        class Handler(_Handler):
            server_side = outer

        self._handler = Handler
        self.library = library
        self.uploads = uploads
        self.access = access
        self.copies = copies
        self.images = images
        self.rate = rate
        self.obstacle = obstacle

    def start(self) -> None:
        """Listen. Raises FailedPrecondition when the address cannot be used."""
        try:
            self._server = Server(self._listen, self._handler, self._tls)
        except OSError as error:
            raise FailedPrecondition(
                f"the address {self._listen[0]}:{self._listen[1]} for copies of images cannot be used "
                f"({error.strerror}); choose another"
            ) from None
        self._thread = threading.Thread(target=self._server.serve_forever, name="copies", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens; 0 before `start`."""
        return int(self._server.server_address[1]) if self._server else 0

    def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    @contextlib.contextmanager
    def transfer(self) -> Iterator[None]:
        """One of those that may be under way at once, for the length of the block. Raises Aborted."""
        if not self._room.acquire(blocking=False):
            raise Aborted(f"{_MOST_AT_ONCE} transfers are under way on this node; try again in a moment")
        try:
            yield
        finally:
            self._room.release()

    def copy(self, name: str) -> Json:
        """The object of a copy that is ready here. Raises NotFound."""
        for copy in self.copies():
            if copy["spec"]["image"] == name and state_of(copy) is State.READY:
                return copy
        raise NotFound(f"image {name} is not ready on this node")

    def awaited(self, name: str) -> str:
        """The uid of the Image that waits here for an upload. Raises NotFound."""
        for copy in self.copies():
            if copy["spec"]["image"] == name and state_of(copy) is State.AWAITING_UPLOAD and not is_going(copy):
                return str(copy["spec"]["imageUID"])
        raise NotFound(f"no upload of image {name} is awaited on this node")

    def limit(self, name: str) -> int:
        """The most bytes that the Image may have. Raises NotFound."""
        if (image := self.images(name)) is None:
            raise NotFound(f"there is no Image {name}")
        return limit_of(image)


class _Body:
    """What a request brings; `begin` is called before the first of it is read: who waits for a word is told to send."""

    def __init__(self, stream: io.BufferedIOBase, begin: Callable[[], None]) -> None:
        self._stream = stream
        self._begin: Callable[[], None] | None = begin

    def read(self, size: int) -> bytes:
        begin, self._begin = self._begin, None
        if begin is not None:
            begin()
        return self._stream.read1(size)  # as it comes: between two pieces it is seen that the Image is gone


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_side: ClassVar[CopyServer]
    protocol_version = "HTTP/1.1"
    server_version = "luks-csi"
    sys_version = ""
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_PUT(self) -> None:
        self._answer(self._put)

    def handle_expect_100(self) -> bool:
        """Not yet: who asks, and what is to come, is looked at first (`_Body`)."""
        return True

    def log_message(self, *_: object) -> None:
        """What is worth telling is told by who does it."""

    def _answer(self, do: Callable[[str, str, str], None]) -> None:
        self.close_connection = True
        self.server.has_asked()
        try:
            if self.path == "/readyz" and self.command == "GET":
                return self._ready()
            found = _PATH.fullmatch(self.path)
            if found is None:
                raise NotFound("there is nothing of that name")
            do(found[1], found[2], found[3])
        except DriverError as error:
            status = next((status for kind, status in _STATUS if isinstance(error, kind)), HTTPStatus.BAD_GATEWAY)
            with contextlib.suppress(OSError):
                self._say(status, f"{error}\n".encode())
        except OSError as error:
            log.debug("connection of a copy broke", path=self.path, error=error.strerror or type(error).__name__)
        except Exception as error:  # noqa: BLE001 - of a request that nobody foresaw the others know nothing
            log.error("request of a copy failed", path=self.path, error=type(error).__name__)
            with contextlib.suppress(OSError):
                self._say(HTTPStatus.INTERNAL_SERVER_ERROR, b"it failed; the agent's log tells more\n")

    def _ready(self) -> None:
        obstacle = self.server_side.obstacle()
        status = HTTPStatus.SERVICE_UNAVAILABLE if obstacle else HTTPStatus.OK
        self._say(status, f"{obstacle or 'ok'}\n".encode())

    def _token(self) -> str:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not token:
            raise Unauthenticated("a bearer token of Kubernetes is wanted")
        return token

    def _get(self, what: str, name: str, part: str) -> None:
        if what == "uploads":
            return self._offset(name, part)
        if part not in ("/record", "/file"):
            raise NotFound("there is nothing of that name")
        side = self.server_side
        side.access.check_agent(self._token())
        self.server.is_known()
        copy = side.copy(name)
        record, checksum = side.library.get(name), copy["status"]["image"]["checksum"]
        if record.owner != copy["spec"]["imageUID"]:
            raise NotFound(f"image {name} is not ready on this node")
        if part == "/record":
            return self._say(HTTPStatus.OK, msgspec.json.encode(Offer(record, checksum)), "application/json")
        with side.transfer():
            return self._send(name, record.file_size, f'"{checksum}"')

    def _send(self, name: str, size: int, tag: str) -> None:
        start = 0
        found = _RANGE.fullmatch(self.headers.get("Range", ""))
        if found is not None and self.headers.get("If-Range", tag) == tag:
            start = int(found[1])
            if start >= size:
                raise OutOfRange(f"image {name} has {size} bytes")
        side = self.server_side
        descriptor = os.open(side.library.file(name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.send_response(HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            self._headers(
                {"Content-Type": "application/octet-stream", "Content-Length": str(size - start), "ETag": tag}
            )
            at = start
            while at < size:
                piece = os.pread(descriptor, min(_PIECE, size - at), at)
                if not piece:
                    return
                side.rate.spend(len(piece))
                self.wfile.write(piece)
                at += len(piece)
        finally:
            os.close(descriptor)

    def _offset(self, name: str, part: str) -> None:
        uid = self._uploader("uploads", name, part)
        uploads = self.server_side.uploads
        headers = {"Upload-Offset": str(uploads.received(name, uid))}
        if (total := uploads.total(name, uid)) is not None:
            headers["Upload-Length"] = str(total)
        if (announced := uploads.announced(name, uid)) is not None:
            headers[DIGEST] = digest_of(announced)
        self.send_response(HTTPStatus.NO_CONTENT)
        self._headers(headers)

    def _put(self, what: str, name: str, part: str) -> None:
        uid = self._uploader(what, name, part)
        length = self.headers.get("Content-Length", "")
        found = _CONTENT_RANGE.fullmatch(self.headers.get("Content-Range", ""))
        if found is None or not _LENGTH.fullmatch(length) or int(length) != int(found[2]) - int(found[1]) + 1:
            raise InvalidArgument("an upload says by Content-Range and Content-Length which bytes it brings")
        announced = read_digest(self.headers[DIGEST]) if DIGEST in self.headers else None
        side = self.server_side
        with side.transfer():
            stream = cast("BinaryIO", _Body(self.rfile, self._continue))
            there = side.uploads.receive(
                name, uid, int(found[1]), int(found[3]), int(length), stream, announced=announced,
                most=side.limit(name),
            )  # fmt: skip
        self.send_response(HTTPStatus.NO_CONTENT)
        self._headers({"Upload-Offset": str(there)})

    def _continue(self) -> None:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(HTTPStatus.CONTINUE)
            self.end_headers()

    def _uploader(self, what: str, name: str, part: str) -> str:
        if what != "uploads" or part:
            raise NotFound("there is nothing of that name")
        self.server_side.access.check_upload(self._token(), name)
        self.server.is_known()
        return self.server_side.awaited(name)

    def _say(self, status: HTTPStatus, content: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self._headers({"Content-Type": kind, "Content-Length": str(len(content))})
        self.wfile.write(content)

    def _headers(self, headers: dict[str, str]) -> None:
        for name, value in {**headers, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
