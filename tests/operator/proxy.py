"""A way to the API that can be cut: TCP, byte by byte as it comes."""

import contextlib
import socket
import threading
from collections.abc import Iterator

from tests.keys.servers import HOST

_PIECE = 1 << 16


class Proxy:
    """Passes connections on to `port` until it is cut; then those that are there end, and no new one is let through.

    Of what a client sends `most` bytes come through, and no more, if that is given.
    """

    def __init__(self, port: int, most: int | None = None) -> None:
        self._to = port
        self._most = most
        self._guard = threading.Lock()
        self._is_cut = False
        self._open: list[socket.socket] = []
        self._listening = socket.create_server((HOST, 0))
        self.address = f"https://{HOST}:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        with self._guard:
            self._is_cut = True
            for each in self._open:
                _end(each)
            self._open.clear()

    def mend(self) -> None:
        with self._guard:
            self._is_cut = False

    def close(self) -> None:
        self.cut()
        _end(self._listening)

    def _accept(self) -> None:
        with self._listening, contextlib.suppress(OSError):
            while True:
                here, _ = self._listening.accept()
                threading.Thread(target=self._carry, args=(here,), daemon=True).start()

    def _carry(self, here: socket.socket) -> None:
        """Pass on what one client sends and gets. Nobody closes a socket that somebody else may still read from: its
        number is soon another one's.
        """
        with here, contextlib.suppress(OSError), socket.create_connection((HOST, self._to)) as there:
            with self._guard:
                if self._is_cut:
                    return
                self._open += [here, there]
            back = threading.Thread(target=_pass_on, args=(there, here, None), daemon=True)
            back.start()
            _pass_on(here, there, self._most)
            back.join()


def _pass_on(start: socket.socket, end: socket.socket, most: int | None) -> None:
    passed = 0
    with contextlib.suppress(OSError):
        while piece := start.recv(_PIECE):
            passed += len(piece)
            if most is None or passed <= most:
                end.sendall(piece)
    for each in (start, end):
        _end(each)


def _end(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def proxy(port: int, most: int | None = None) -> Iterator[Proxy]:
    """One as long as the block."""
    made = Proxy(port, most)
    try:
        yield made
    finally:
        made.close()
