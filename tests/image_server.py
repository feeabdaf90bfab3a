"""An HTTP server on this machine that serves one image, well or as badly as a test says."""

import contextlib
import hashlib
import http.server
import ssl
import threading
from collections.abc import Callable, Iterator

Answer = Callable[["Handler"], None]
"""Answers one request in the place of the usual answer."""


class ImageServer(http.server.ThreadingHTTPServer):
    """Serves `content` at every path, with Range and ETag. `answers` come first, one per request."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, content: bytes = b"", host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), Handler)
        self.host = host
        self.content = content
        self.etag = '"1"'
        self.answers: list[Answer] = []
        self.requests: list[dict[str, str]] = []
        self.ended = threading.Event()

    @property
    def port(self) -> int:
        return self.server_address[1]

    def url(self, path: str = "/image") -> str:
        return f"http://{self.host}:{self.port}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up in the middle are what is tested."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: ImageServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append(
            {"path": self.path, **{name.lower(): value for name, value in self.headers.items()}}
        )
        (self.server.answers.pop(0) if self.server.answers else usual)(self)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""

    def head(self, status: int, **fields: object) -> None:
        """Status and fields, `_` in a name standing for `-`."""
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def first_byte(self) -> int | None:
        """Where the Range that is asked for begins."""
        wanted = self.headers.get("Range")
        return int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else None


def usual(handler: Handler, *, most: int | None = None) -> None:
    """What a good server answers; cut after `most` bytes of the body."""
    server, first = handler.server, handler.first_byte()
    content = server.content
    if first is None or handler.headers.get("If-Range") != server.etag:
        handler.head(200, Content_Length=len(content), ETag=server.etag)
    else:
        last = len(content) - 1
        span = f"bytes {first}-{last}/{len(content)}"
        handler.head(206, Content_Length=len(content) - first, Content_Range=span, ETag=server.etag)
        content = content[first:]
    handler.wfile.write(content[:most])


def cut(most: int) -> Answer:
    """The usual answer, the connection closed after `most` bytes of the body."""
    return lambda handler: usual(handler, most=most)


def status(code: int, **fields: object) -> Answer:
    """An answer without a body."""
    return lambda handler: handler.head(code, Content_Length=0, **fields)


def chunked(content: bytes, *, ended: bool = True) -> Answer:
    def answer(handler: Handler) -> None:
        handler.head(200, Transfer_Encoding="chunked", ETag=handler.server.etag)
        for start in range(0, len(content), 1000):
            piece = content[start : start + 1000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if ended:
            handler.wfile.write(b"0\r\n\r\n")

    return answer


def raw(*pieces: bytes, pause: float = 0.0, times: int = 1) -> Answer:
    """Bytes as they are, `pause` seconds between them, until the test ends."""

    def answer(handler: Handler) -> None:
        for _ in range(times):
            for piece in pieces:
                handler.wfile.write(piece)
                handler.wfile.flush()
                if handler.server.ended.wait(pause) if pause else handler.server.ended.is_set():
                    return

    return answer


@contextlib.contextmanager
def serving(content: bytes = b"", tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> Iterator[ImageServer]:
    """A server for the length of the block; nothing of it remains."""
    with ImageServer(content, host) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()


def sha512(content: bytes) -> str:
    """As Longhorn writes it."""
    return hashlib.sha512(content).hexdigest()
