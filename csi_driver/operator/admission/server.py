"""HTTPS for reviews. One thread reads all requests, each within time limits of its own, so who is slow keeps nobody
waiting; each review runs in a thread of its own and is answered in time, or not at all: with an HTTP error, as then the
webhook's failurePolicy decides.
"""

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from csi_driver.host.listening import listening
from csi_driver.host.log import log
from csi_driver.model.errors import DriverError, FailedPrecondition, InvalidArgument

_MOST_CLIENTS: Final = 64
_MOST_REVIEWS: Final = 16
_LONGEST_HEAD: Final = 16 << 10
_LONGEST_BODY: Final = 8 << 20
"""The API takes objects of 3 MiB at most; a review of a change has two of them, in text."""

Answer = Callable[[bytes], bytes]
"""A review: what was sent, what is answered. May raise anything; InvalidArgument for what cannot be read."""


@dataclass(frozen=True)
class Limits:
    """Seconds: to shake hands and to send a request, to review, and to be silent between two requests. The API closes
    what was silent for 90 s, and is better the first to do it.
    """

    to_ask: float = 3.0
    to_review: float = 2.5
    to_be_silent: float = 120.0


@dataclass(frozen=True)
class _Response:
    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


class _Refused(Exception):
    """A request that is answered with an error of HTTP; the connection ends, as its rest may be anything."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.response = _Response(status, f"{text}\n".encode())


class ReviewServer:
    """Answers POSTs to `paths` at `listen` (host, port) from `start` to `stop`, with the certificate that `context`
    gives for each connection.
    """

    def __init__(
        self,
        listen: tuple[str, int],
        paths: Mapping[str, Answer],
        context: Callable[[], ssl.SSLContext],
        limits: Limits,
    ) -> None:
        self._listen = listen
        self._paths = paths
        self._certificate = context
        self._limits = limits
        self._room = threading.BoundedSemaphore(_MOST_REVIEWS)
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.port = 0

    def start(self) -> None:
        """Listen. Raises FailedPrecondition when the address cannot be used."""
        host, port = self._listen
        try:
            at = listening(host, port)
        except OSError as error:
            raise FailedPrecondition(
                f"the address {host}:{port} for admission reviews cannot be used ({error.strerror}); choose another"
            ) from None
        self.port = at.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        server = self._loop.run_until_complete(
            asyncio.start_server(
                self._serve_client, sock=at, limit=_LONGEST_HEAD, backlog=_MOST_CLIENTS,
                ssl=self._first_context(), ssl_handshake_timeout=self._limits.to_ask, ssl_shutdown_timeout=1.0,
            )
        )  # fmt: skip
        self._thread = threading.Thread(target=self._run, args=(self._loop, server), name="admission", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Listen no more; who was not answered yet will not be."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop = self._thread = None

    def _run(self, loop: asyncio.AbstractEventLoop, server: asyncio.Server) -> None:
        with contextlib.closing(loop):
            loop.set_exception_handler(_tell_broken)
            loop.run_forever()
            server.close()
            loop.run_until_complete(self._drop_all())

    async def _drop_all(self) -> None:
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _first_context(self) -> ssl.SSLContext:
        """Of all connections until the client's hello; then each gets the certificate that holds now."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2

        def choose(
            connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _context: ssl.SSLContext
        ) -> int | None:
            try:
                connection.context = self._certificate()
            except (DriverError, OSError) as error:
                log.warning("no certificate for admission reviews", error=str(error))
                return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
            return None

        context.sni_callback = choose
        return context

    def _serve_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
        task.add_done_callback(lambda _: writer.transport.abort())
        if len(self._tasks) > _MOST_CLIENTS:
            next(iter(self._tasks)).cancel()  # the oldest

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Gone, too slow, too long: nobody is left to be told.
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            goes_on = True
            while goes_on:
                async with asyncio.timeout(self._limits.to_be_silent):
                    first = await reader.readexactly(1)
                try:
                    async with asyncio.timeout(self._limits.to_ask):
                        path, body = await _read(first, reader, self._paths)
                    response = await self._review(path, body)
                except _Refused as refused:
                    response, goes_on = refused.response, False
                async with asyncio.timeout(self._limits.to_ask):
                    writer.write(_head(response, goes_on=goes_on) + response.body)
                    await writer.drain()
            writer.close()
            async with asyncio.timeout(self._limits.to_ask):
                await writer.wait_closed()

    async def _review(self, path: str, body: bytes) -> _Response:
        loop = asyncio.get_running_loop()
        made: asyncio.Future[_Response] = loop.create_future()

        def show(response: _Response) -> None:
            if not made.done():
                made.set_result(response)

        def review() -> None:
            try:
                response = self._answer(path, body)
            finally:
                self._room.release()
            with contextlib.suppress(RuntimeError):  # the server has stopped meanwhile
                loop.call_soon_threadsafe(show, response)

        if not self._room.acquire(blocking=False):
            return _Response(HTTPStatus.SERVICE_UNAVAILABLE, b"too many reviews at once\n")
        # Not a pool's: those are waited for at the end of the process.
        threading.Thread(target=review, name=path, daemon=True).start()
        try:
            async with asyncio.timeout(self._limits.to_review):
                return await made
        except TimeoutError:
            log.error("admission review failed", webhook=path[1:], error="it took too long")
            return _Response(HTTPStatus.GATEWAY_TIMEOUT, b"the review took too long\n")

    def _answer(self, path: str, body: bytes) -> _Response:
        try:
            return _Response(HTTPStatus.OK, self._paths[path](body), "application/json")
        except InvalidArgument as error:
            return _Response(HTTPStatus.BAD_REQUEST, f"{error}\n".encode())
        except Exception as error:  # noqa: BLE001 - whatever it is, failurePolicy decides
            # A sentence of ours; anything else by its class alone, as a text may quote what the request held.
            said = str(error) if isinstance(error, DriverError) else type(error).__name__
            log.error("admission review failed", webhook=path[1:], error=said)
            return _Response(HTTPStatus.INTERNAL_SERVER_ERROR, b"the review failed; the operator's log tells more\n")


async def _read(first: bytes, reader: asyncio.StreamReader, paths: Mapping[str, Answer]) -> tuple[str, bytes]:
    """Path and body of a request. Raises _Refused."""
    head = first + await reader.readuntil(b"\r\n\r\n")
    line, *lines = head.decode("latin-1").split("\r\n")
    method, _, target = line.partition(" ")
    target, _, version = target.partition(" ")
    path = target.partition("?")[0]
    if version != "HTTP/1.1":
        raise _Refused(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "this is no request of HTTP/1.1")
    if path not in paths:
        raise _Refused(HTTPStatus.NOT_FOUND, f"there are {', '.join(paths)}")
    if method != "POST":
        raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED, "there is only POST")
    headers = {name.strip().lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers or not (length.isascii() and length.isdigit()):
        raise _Refused(HTTPStatus.LENGTH_REQUIRED, "a request must tell its Content-Length")
    if len(length) > len(str(_LONGEST_BODY)) or int(length) > _LONGEST_BODY:
        raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a review has at most {_LONGEST_BODY} bytes")
    return path, await reader.readexactly(int(length))


def _head(response: _Response, *, goes_on: bool) -> bytes:
    return (
        f"HTTP/1.1 {response.status.value} {response.status.phrase}\r\nServer: luks-csi\r\n"
        f"Content-Type: {response.content_type}\r\nContent-Length: {len(response.body)}\r\n"
        f"Connection: {'keep-alive' if goes_on else 'close'}\r\n\r\n"
    ).encode()


def _tell_broken(_loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """A connection that broke is the other side's to tell."""
    error = context.get("exception")
    if not isinstance(error, OSError | TimeoutError):
        log.error("admission review failed", webhook="", error=type(error).__name__)
