"""The gRPC server."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import structlog

from csi_driver.model.errors import DriverError, FailedPrecondition
from csi_driver.model.settings import Service
from csi_driver.rpc import csi_pb2_grpc
from csi_driver.rpc.controller import ControllerServicer
from csi_driver.rpc.endpoint import Endpoint, address_of
from csi_driver.rpc.identity import IdentityServicer
from csi_driver.rpc.interceptors import CallLog, Chain, Concern, OwnThreads, Statuses, Timing, VolumeLocking
from csi_driver.rpc.node import NodeServicer
from csi_driver.volumes.driver import Driver

_IDENTITY_THREADS = 2
# CSI bounds strings at 128 bytes and maps at 4 KiB; secrets are the largest thing in a request.
_LARGEST_REQUEST = 1 << 20
_AFTER_GRACE_SECONDS = 1.0


class Server:
    """Serves a started driver on the unix socket of its settings, from `start` to `stop`."""

    def __init__(self, driver: Driver) -> None:
        settings = driver.settings
        self._settings = settings
        self._endpoint = Endpoint(settings.endpoint)
        self._log = structlog.get_logger(__name__).bind()
        self._pools = (
            ThreadPoolExecutor(settings.threads, "call"),
            ThreadPoolExecutor(_IDENTITY_THREADS, "identity"),
        )
        concerns: list[Concern] = [OwnThreads("Identity", self._pools[1]), Statuses(), CallLog(self._log)]
        self._metrics = None
        if settings.metrics_address is not None:
            from csi_driver.rpc.metrics import Metrics  # noqa: PLC0415 - half a start-up time, for those who want it

            self._metrics = Metrics(settings.metrics_address, driver.health)
            concerns.append(Timing(self._metrics.observe))
        self._server = grpc.server(
            self._pools[0],
            interceptors=[Chain(*concerns, VolumeLocking(driver.locks))],
            options=[("grpc.max_receive_message_length", _LARGEST_REQUEST), ("grpc.so_reuseport", 0)],
        )
        csi_pb2_grpc.add_IdentityServicer_to_server(IdentityServicer(settings, driver.health), self._server)
        if Service.CONTROLLER in settings.services:
            csi_pb2_grpc.add_ControllerServicer_to_server(ControllerServicer(driver.provisioning), self._server)
        if Service.NODE in settings.services:
            node = NodeServicer(settings, driver.staging, driver.publishing, driver.expansion, driver.usage)
            csi_pb2_grpc.add_NodeServicer_to_server(node, self._server)

    def start(self) -> None:
        """Listen and answer. Raises DeviceInUse when another server does so there, FailedPrecondition."""
        try:
            if self._metrics is not None:
                self._metrics.start()
            self._endpoint.place(self._listen)
        except DriverError:
            self.stop()
            raise
        self._log.info("serving", endpoint=str(self._settings.endpoint), services=sorted(self._settings.services))

    def stop(self) -> bool:
        """Take the socket away, take no new call, and let those in flight end within the grace time.

        Returns whether they did. One that did not is answered CANCELLED; its thread may be at work still.
        """
        self._endpoint.remove()
        grace = self._settings.grace_seconds
        self._server.stop(grace).wait(grace + _AFTER_GRACE_SECONDS)
        # grpcio only answers what it cuts off; whether the thread has ended its pool knows.
        ending = threading.Thread(target=self._end_threads, daemon=True)
        ending.start()
        ending.join(_AFTER_GRACE_SECONDS)
        in_time = not ending.is_alive()
        if not in_time:
            self._log.warning("calls were cut off", grace_seconds=grace)
        if self._metrics is not None:
            self._metrics.stop()
        self._log.info("stopped")
        return in_time

    def _end_threads(self) -> None:
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def _listen(self, path: Path) -> None:
        try:
            self._server.add_insecure_port(address_of(path))
        except RuntimeError:
            raise FailedPrecondition(
                f"the endpoint {self._settings.endpoint} cannot be made: nothing can listen in its folder; choose a "
                f"path on a file system that holds sockets"
            ) from None
        self._server.start()


def serve(driver: Driver) -> bool:
    """Serve until SIGTERM or SIGINT; returns whether all calls ended within the grace time."""
    with _signals(signal.SIGTERM, signal.SIGINT) as asked_to_stop:
        server = Server(driver)
        server.start()
        os.read(asked_to_stop, 1)
        return server.stop()


@contextlib.contextmanager
def _signals(*numbers: signal.Signals) -> Iterator[int]:
    """A descriptor that gives a byte for each of these signals.

    A pipe and not an Event: a handler runs between any two instructions of the main thread, holding its locks.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def tell(_number: int, _frame: object) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(writer, b"\0")

    before = {number: signal.signal(number, tell) for number in numbers}
    try:
        yield reader
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
