"""The pages for who looks after the driver: /healthz and /readyz for kubelet's probes, /metrics for Prometheus.

Imported only where an HTTP address is set.
"""

import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from csi_driver.model.errors import FailedPrecondition
from csi_driver.rpc.endpoint import host_and_port

_CLIENT_SECONDS = 10.0
_MOST_CLIENTS = 16  # at once; anybody in the cluster may ask


@dataclass(frozen=True)
class Page:
    """What a path shows."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


class HttpServer:
    """Shows `pages`, by their paths, at `address` (host:port) from `start` to `stop`."""

    def __init__(self, address: str, pages: Mapping[str, Callable[[], Page]]) -> None:
        self._address = address
        self._pages = pages
        self._running: tuple[ThreadingHTTPServer, threading.Thread] | None = None

    def start(self) -> None:
        """Listen. Raises FailedPrecondition when the address cannot be used."""
        try:
            server = _Server(host_and_port(self._address), self._pages)
        except OSError as error:
            raise FailedPrecondition(
                f"the HTTP address {self._address} cannot be used ({error.strerror}); choose another"
            ) from None
        thread = threading.Thread(target=server.serve_forever, name="http", daemon=True)
        thread.start()
        self._running = server, thread

    def stop(self) -> None:
        """Listen no more."""
        if self._running is not None:
            server, thread = self._running
            server.shutdown()
            server.server_close()
            thread.join()
            self._running = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], pages: Mapping[str, Callable[[], Page]]) -> None:
        self.pages = pages
        self._slots = threading.BoundedSemaphore(_MOST_CLIENTS)
        host, port = address
        super().__init__(address, _Handler, bind_and_activate=False)
        self.socket.close()
        # Without a host: every address, of IPv6 too where there is such a thing. Clusters can be IPv6 only.
        both = not host and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
        self.socket = socket.create_server((host, port), family=family, dualstack_ipv6=both)
        self.server_name, self.server_port = host, port

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """In a thread, or not at all when there are too many."""
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        """Make room again at the end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _CLIENT_SECONDS
    server_version, sys_version = "luks-csi", ""

    def do_GET(self) -> None:
        """Show the page of the path."""
        make = self.server.pages.get(self.path.partition("?")[0])
        page = make() if make else Page(HTTPStatus.NOT_FOUND, b"there are /healthz, /readyz and /metrics\n")
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.end_headers()
        self.wfile.write(page.body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: probes come every few seconds."""
