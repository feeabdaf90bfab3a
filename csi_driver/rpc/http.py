"""The pages for who looks after the driver: /healthz and /readyz for kubelet's probes, /metrics for Prometheus.

Anybody in the cluster may ask. So one thread reads all requests and none of them takes another's place: who is slow to
ask, slow to read or resets waits for himself alone. A page is made in a thread of its own, one at a time; who asks for
it meanwhile gets the same. Imported only where an HTTP address is set.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus

from csi_driver.host.listening import listening
from csi_driver.host.log import log
from csi_driver.model.errors import FailedPrecondition
from csi_driver.rpc.endpoint import host_and_port

_SECONDS_TO_ASK = 3.0
_SECONDS_TO_ANSWER = 30.0  # more than /healthz and /readyz wait for the server
_MOST_CLIENTS = 64  # open at once; one more, and the oldest goes
_LONGEST_HEAD = 16 << 10


@dataclass(frozen=True)
class Page:
    """What a path shows."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


class HttpServer:
    """Shows `pages`, by their paths, at `address` (host:port) from `start` to `stop`.

    A client has `seconds_to_ask` to send the whole head of its request.
    """

    def __init__(
        self, address: str, pages: Mapping[str, Callable[[], Page]], seconds_to_ask: float = _SECONDS_TO_ASK
    ) -> None:
        self._address = address
        self._clients = _Clients(pages, seconds_to_ask)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen. Raises FailedPrecondition when the address cannot be used."""
        try:
            at = listening(*host_and_port(self._address))
        except OSError as error:
            raise FailedPrecondition(
                f"the HTTP address {self._address} cannot be used ({error.strerror}); choose another"
            ) from None
        self._loop = asyncio.new_event_loop()
        server = self._loop.run_until_complete(
            asyncio.start_server(self._clients.serve, sock=at, limit=_LONGEST_HEAD, backlog=_MOST_CLIENTS)
        )
        self._thread = threading.Thread(target=self._serve, args=(self._loop, server), name="http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Listen no more; who was not answered yet will not be."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop = self._thread = None

    def _serve(self, loop: asyncio.AbstractEventLoop, server: asyncio.Server) -> None:
        with contextlib.closing(loop):
            loop.run_forever()
            server.close()
            loop.run_until_complete(self._clients.drop_all())


class _Clients:
    """Everybody who is connected, the oldest first."""

    def __init__(self, pages: Mapping[str, Callable[[], Page]], seconds_to_ask: float) -> None:
        self._pages = pages
        self._seconds_to_ask = seconds_to_ask
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._being_made: dict[str, asyncio.Future[Page]] = {}

    def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, beside all others."""
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
        task.add_done_callback(lambda _: writer.transport.abort())
        if len(self._tasks) > _MOST_CLIENTS:
            next(iter(self._tasks)).cancel()

    async def drop_all(self) -> None:
        """Nobody is connected any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Gone, too slow, too long: nobody is left to be told.
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(self._seconds_to_ask):
                head = await reader.readuntil(b"\r\n\r\n")
            async with asyncio.timeout(_SECONDS_TO_ANSWER):
                writer.write(_response(await self._answer(head)))
                writer.close()
                await writer.wait_closed()

    async def _answer(self, head: bytes) -> Page:
        method, _, target = head.partition(b"\r\n")[0].decode("latin-1").partition(" ")
        path, _, version = target.partition(" ")
        if not version.startswith("HTTP/1."):
            return Page(HTTPStatus.BAD_REQUEST, b"this is no request of HTTP/1\n")
        if method != "GET":
            return Page(HTTPStatus.NOT_IMPLEMENTED, b"there is only GET\n")
        path = path.partition("?")[0]
        if path not in self._pages:
            return Page(HTTPStatus.NOT_FOUND, b"there are /healthz, /readyz and /metrics\n")
        if path not in self._being_made:
            self._being_made[path] = self._make(path)
        return await asyncio.shield(self._being_made[path])

    def _make(self, path: str) -> "asyncio.Future[Page]":
        loop = asyncio.get_running_loop()
        made: asyncio.Future[Page] = loop.create_future()

        def show(page: Page) -> None:
            del self._being_made[path]
            made.set_result(page)

        def make() -> None:
            try:
                page = self._pages[path]()
            except Exception as error:  # noqa: BLE001 - whatever it is, the next one may ask again
                log.error("page not made", path=path, kind=type(error).__name__)
                page = Page(HTTPStatus.INTERNAL_SERVER_ERROR, b"it could not be made; the driver's log tells more\n")
            with contextlib.suppress(RuntimeError):  # the server has stopped meanwhile
                loop.call_soon_threadsafe(show, page)

        # Not a pool's: those are waited for at the end of the process, and a page may hang on a disk.
        threading.Thread(target=make, name=path, daemon=True).start()
        return made


def _response(page: Page) -> bytes:
    head = (
        f"HTTP/1.1 {page.status.value} {page.status.phrase}\r\n"
        f"Server: luks-csi\r\nDate: {formatdate(usegmt=True)}\r\n"
        f"Content-Type: {page.content_type}\r\nContent-Length: {len(page.body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + page.body
