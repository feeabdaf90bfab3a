"""The connections of the agent's server: who asks nothing, or slowly, keeps nobody else from it."""

import contextlib
import math
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
"""For a handshake and a request's head together."""
_MOST_UNKNOWN: Final = 256
"""Connections of which nobody knows yet who it is, those of which Kubernetes is asked just now among them."""


class Server(ThreadingHTTPServer):
    """A thread for each connection; TLS and the head of the request have a limit of time together."""

    daemon_threads = True
    block_on_close = False

    def __init__(
        self, listen: tuple[str, int], handler: type[BaseHTTPRequestHandler], certificate: Certificate
    ) -> None:
        self._certificate = certificate
        self._guard = threading.Lock()
        self._unknown: dict[int, tuple[float, socket.socket]] = {}  # by their threads
        super().__init__(listen, handler, bind_and_activate=False)
        self.socket.close()  # that one is of IPv4 only
        self.socket = listening(*listen)
        self.server_address = self.socket.getsockname()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In the connection's own thread: who is slow in the handshake keeps nobody else waiting."""
        until = time.monotonic() + _ASK_SECONDS
        with self._guard:
            has_room = len(self._unknown) < _MOST_UNKNOWN or self._end_oldest()
            if has_room:
                self._unknown[threading.get_ident()] = until, request
        if not has_room:
            self.shutdown_request(request)
            return
        try:
            request.settimeout(IDLE_SECONDS)
            try:
                context = self._certificate.context()
                request = context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
                with self._guard:
                    self._unknown[threading.get_ident()] = until, request  # it has the descriptor from now on
                request.do_handshake()
            except OSError:
                self.shutdown_request(request)
                return
            super().process_request_thread(request, client_address)
        finally:
            self.is_known()

    def has_asked(self) -> None:
        """The head of the request of this thread is there: how long it takes until it is known who asks is not his."""
        with self._guard:
            if (found := self._unknown.get(threading.get_ident())) is not None:  # else it was ended just now
                self._unknown[threading.get_ident()] = math.inf, found[1]

    def is_known(self) -> None:
        """Who asks in this thread may: from now on each read and write has its own limit."""
        with self._guard:
            self._unknown.pop(threading.get_ident(), None)

    def service_actions(self) -> None:
        """Twice a second: who has not asked in time goes, however little he sends again and again."""
        now = time.monotonic()
        with self._guard:
            for until, connection in self._unknown.values():
                if until < now:
                    _end(connection)

    def _end_oldest(self) -> bool:
        """Let the connection go that has not asked for the longest time; whether there is one. Under the guard."""
        oldest = next((thread for thread, (until, _) in self._unknown.items() if until != math.inf), None)
        if oldest is None:
            return False
        _end(self._unknown.pop(oldest)[1])
        return True

    def handle_error(self, _request: Any, _client_address: Any) -> None:
        """A connection that broke is the other side's to tell; what nobody foresaw `_answer` has told."""


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
