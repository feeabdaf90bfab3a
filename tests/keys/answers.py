"""What a server of keys over HTTP may answer."""

import http.server
import threading
from collections.abc import Callable

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


def status(code: int, content: bytes = b"", **headers: str) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def truncated(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Less than was announced."""
    status(200, b'{"data": {"ciph', **{"Content-Length": "500", "Content-Type": "application/json"})(handler)
    handler.close_connection = True


def until(released: threading.Event) -> Answer:
    """No answer until then."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        released.wait(60)
        handler.close_connection = True

    return answer
