"""The connections of the agent's server: who asks nothing, or slowly, keeps nobody else from it."""

import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from csi_driver.agent.certificate import Certificate
from csi_driver.host.listening import listening

IDLE_SECONDS: Final = 60.0
"""For each read and each write."""
_ASK_SECONDS: Final = 15.0
"""For a handshake and a request's head together: until then nobody knows who it is."""
_MOST_ASKING: Final = 256


class Server(ThreadingHTTPServer):
    """A thread for each connection; TLS and the head of the request have a limit of time together."""

    daemon_threads = True
    block_on_close = False

    def __init__(
        self, listen: tuple[str, int], handler: type[BaseHTTPRequestHandler], certificate: Certificate
    ) -> None:
        self._certificate = certificate
        self._guard = threading.Lock()
        self._asking: dict[int, tuple[float, socket.socket]] = {}
        super().__init__(listen, handler, bind_and_activate=False)
        self.socket.close()  # that one is of IPv4 only
        self.socket = listening(*listen)
        self.server_address = self.socket.getsockname()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In the connection's own thread: who is slow in the handshake keeps nobody else waiting."""
        number = request.fileno()
        with self._guard:
            too_many = len(self._asking) >= _MOST_ASKING
            if not too_many:
                self._asking[number] = time.monotonic() + _ASK_SECONDS, request
        if too_many:
            self.shutdown_request(request)
            return
        try:
            request.settimeout(IDLE_SECONDS)
            try:
                secured = self._certificate.context().wrap_socket(request, server_side=True)
            except OSError:
                self.shutdown_request(request)
                return
            with self._guard:
                if number in self._asking:  # the same descriptor, another object
                    self._asking[number] = self._asking[number][0], secured
            super().process_request_thread(secured, client_address)
        finally:
            self.has_asked(number)

    def has_asked(self, number: int) -> None:
        """The request is there: from now on each read and write has its own limit."""
        with self._guard:
            self._asking.pop(number, None)

    def service_actions(self) -> None:
        """Twice a second: who has not asked in time goes, however little he sends again and again."""
        now = time.monotonic()
        with self._guard:
            for until, connection in self._asking.values():
                if until < now:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, _request: Any, _client_address: Any) -> None:
        """A connection that broke is the other side's to tell; what nobody foresaw `_answer` has told."""
