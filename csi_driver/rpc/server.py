"""The gRPC server."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import grpc

from csi_driver.backends.base import shared
from csi_driver.host.log import log
from csi_driver.keys.sources import KeySources
from csi_driver.model.errors import DriverError
from csi_driver.model.settings import Service, Settings
from csi_driver.rpc import csi_pb2_grpc
from csi_driver.rpc.controller import AttachingControllerServicer, ControllerServicer
from csi_driver.rpc.endpoint import Endpoint, listen_on
from csi_driver.rpc.identity import IdentityServicer
from csi_driver.rpc.interceptors import (
    CallLog,
    Chain,
    Concern,
    Deadlines,
    OwnThreads,
    Statuses,
    StorageAccess,
    Timing,
    VolumeLocking,
)
from csi_driver.rpc.node import NodeServicer
from csi_driver.rpc.signals import told_to_stop
from csi_driver.rpc.threads import CallThreads
from csi_driver.volumes.driver import Driver

if TYPE_CHECKING:
    from csi_driver.rpc.client import CsiClient
    from csi_driver.rpc.metrics import Gauges

_IDENTITY_THREADS = 2
# CSI bounds strings at 128 bytes and maps at 4 KiB; secrets are the largest thing in a request.
_LARGEST_REQUEST = 1 << 20
_AFTER_GRACE_SECONDS = 1.0
READY_SECONDS = 5.0
ALIVE_SECONDS = 20.0
"""How long /readyz and /healthz wait for the server. By the second one kubelet ends it, which helps nobody on a node
that only has too much to do; kubelet's own patience, in the manifests, is longer than each."""


class _Socket:
    """A socket, and the gRPC server that answers there."""

    def __init__(self, path: Path, services: Sequence[str], server: grpc.Server) -> None:
        self.path = path
        self.services = services
        self.server = server
        self.endpoint = Endpoint(path)


class Job(Protocol):
    """Work beside the calls, in a thread of its own, from the server's start to its stop."""

    def start(self) -> None: ...

    def ask_to_end(self) -> None:
        """Begin nothing more."""

    def join(self) -> None:
        """Wait until what was at work has ended."""


Add = Callable[[grpc.Server], None]


class Server:
    """Serves on the unix sockets of the settings, from `start` to `stop`.

    `add` puts the servicers of CSI into a gRPC server, `addons` those of CSI-Addons into another one, where there are
    any; `inner` are concerns next to the methods, `gauges` are metrics, and so are the requests to the key sources.
    `jobs` run as long as it does. `details` are lines that /readyz shows below what Probe says.
    """

    def __init__(
        self,
        settings: Settings,
        add: Sequence[Add],
        inner: Sequence[Concern] = (),
        gauges: "Gauges | None" = None,
        sources: KeySources | None = None,
        addons: Sequence[Add] = (),
        jobs: Sequence[Job] = (),
        details: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._pools = (
            CallThreads(settings.threads, "call"),
            CallThreads(_IDENTITY_THREADS, "identity"),
        )
        concerns: list[Concern] = [OwnThreads("Identity", self._pools[1]), Statuses(), CallLog(log)]
        self._http = None
        if settings.http_address is not None:
            # Half a start-up time, for those who want it.
            from csi_driver.rpc.client import CsiClient  # noqa: PLC0415
            from csi_driver.rpc.http import HttpServer, Page  # noqa: PLC0415
            from csi_driver.rpc.metrics import Metrics  # noqa: PLC0415

            def answer(
                ask: Callable[[CsiClient], object], seconds: float, more: Callable[[], Sequence[str]] = tuple
            ) -> Page:
                obstacle = self._obstacle(ask, seconds)
                text = "".join(f"{line}\n" for line in (obstacle or "ok", *more()))
                return Page(HTTPStatus.SERVICE_UNAVAILABLE if obstacle else HTTPStatus.OK, text.encode())

            metrics = Metrics(gauges or {})
            if sources is not None:
                sources.observers.append(metrics.observe_kms)
            pages = {
                "/healthz": lambda: answer(CsiClient.plugin_info, ALIVE_SECONDS),
                "/readyz": lambda: answer(CsiClient.probe, READY_SECONDS, details),
                "/metrics": metrics.page,
            }
            self._http = HttpServer(settings.http_address, pages)
            concerns.append(Timing(metrics.observe))
        chain = Chain(*concerns, *inner)
        self._sockets = [_Socket(settings.endpoint, sorted(settings.services), self._grpc_server(chain, add))]
        if settings.addons_endpoint is not None and addons:
            # A server of its own: who may connect to the one socket is not thereby let in at the other.
            self._sockets.append(_Socket(settings.addons_endpoint, ["csi-addons"], self._grpc_server(chain, addons)))

    def _grpc_server(self, chain: Chain, add: Sequence[Add]) -> grpc.Server:
        server = grpc.server(
            self._pools[0],
            interceptors=[chain],
            options=[("grpc.max_receive_message_length", _LARGEST_REQUEST), ("grpc.so_reuseport", 0)],
        )
        for servicer in add:
            servicer(server)
        return server

    def start(self) -> None:
        """Listen and answer. Raises DeviceInUse when another server does so there, FailedPrecondition."""
        try:
            for each in self._sockets:
                each.endpoint.place(partial(listen_on, each.server))
            if self._http is not None:
                self._http.start()
        except DriverError:
            self.stop()
            raise
        for job in self._jobs:
            job.start()
        for each in self._sockets:
            log.info("serving", endpoint=str(each.path), services=each.services)

    def stop(self) -> bool:
        """Take the socket away, take no new call, and let those in flight end within the grace time.

        Returns whether they did. One that did not is answered CANCELLED; its thread may be at work still.
        """
        for each in self._sockets:
            each.endpoint.remove()
        for job in self._jobs:
            job.ask_to_end()
        grace = self._settings.grace_seconds
        until = time.monotonic() + grace + _AFTER_GRACE_SECONDS
        for stopped in [each.server.stop(grace) for each in self._sockets]:
            stopped.wait(until - time.monotonic())
        # grpcio only answers what it cuts off; whether the thread has ended its pool knows.
        ending = threading.Thread(target=self._end_threads, daemon=True)
        ending.start()
        ending.join(max(_AFTER_GRACE_SECONDS, until - time.monotonic()))
        in_time = not ending.is_alive()
        if not in_time:
            log.warning("calls were cut off", grace_seconds=grace)
        if self._http is not None:
            self._http.stop()
        log.info("stopped")
        return in_time

    def _end_threads(self) -> None:
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)
        for job in self._jobs:
            job.join()

    def _obstacle(self, ask: "Callable[[CsiClient], object]", seconds: float) -> str | None:
        """Why the server does not work, asked as kubelet asks: through its socket."""
        from csi_driver.rpc.client import CsiClient, RemoteError  # noqa: PLC0415

        try:
            with CsiClient(self._settings.endpoint, timeout=seconds) as client:
                ask(client)
        except RemoteError as error:
            return str(error)
        return None


def driver_server(driver: Driver) -> Server:
    """The server of a started driver, with the services of its settings."""
    settings, health, storage = driver.settings, driver.health, shared(driver.backend)
    add: list[Add] = [
        lambda server: csi_pb2_grpc.add_IdentityServicer_to_server(IdentityServicer(settings, health.obstacle), server)
    ]
    if Service.CONTROLLER in settings.services:
        attachments, made = driver.attachments, driver.provisioning
        controller = ControllerServicer(made) if attachments is None else AttachingControllerServicer(made, attachments)
        add.append(lambda server: csi_pb2_grpc.add_ControllerServicer_to_server(controller, server))
    if Service.NODE in settings.services:
        most = storage.most_volumes if storage is not None else lambda: 0
        node = NodeServicer(settings, driver.staging, driver.publishing, driver.expansion, driver.usage, most)
        add.append(lambda server: csi_pb2_grpc.add_NodeServicer_to_server(node, server))
    gauges: Gauges = {
        "luks_csi_open_mappings": ("Open LUKS mappings of volumes on this node.", health.open_mappings),
        "luks_csi_root_keys": ("Kernel keys that count against root's quota.", health.root_keys),
        "luks_csi_root_keys_percent": ("What is used of root's quota of kernel keys.", health.root_keys_percent),
        "luks_csi_processes": ("Processes of the driver: server, launcher, workers, programs.", health.processes),
        "luks_csi_resident_bytes": ("Their resident memory.", health.resident_bytes),
        "luks_csi_free_bytes": ("Bytes that new volumes may take on this node.", health.free_bytes),
        "luks_csi_thin_pool_used_percent": (
            "What is used of the fullest LVM thin pool with volumes, of data or metadata.",
            health.thin_pool_percent,
        ),
        "luks_csi_drifted_secrets": ("Staged volumes whose secret no longer opens them.", health.drifted_secrets),
        "luks_csi_kms_up": ("Whether each KMS works, as of the last look at it.", driver.kms_health.up),
        "luks_csi_overdue_key_rotations": (
            "Volumes whose key is older than the rotation period of their class.",
            driver.rotation.overdue,
        ),
        "luks_csi_failed_key_rotations_total": ("Scheduled rotations that failed.", driver.rotation.failed),
        "luks_csi_healed_file_systems_total": ("Sick file systems that were made well.", driver.healing.healed),
    }
    addons: list[Add] = []
    if settings.addons_endpoint is not None:
        from csi_driver.rpc.addons import servicers  # noqa: PLC0415

        addons = servicers(settings, health.obstacle, driver.rotation)
    jobs: list[Job] = [driver.kms_health, *driver.mends, *(driver.jobs if Service.NODE in settings.services else ())]
    details = driver.kms_health.details
    new_id = driver.provisioning.new_id
    inner: list[Concern] = [Deadlines(), VolumeLocking(driver.locks, new_id, attaching=storage is not None)]
    if storage is not None:
        inner.append(StorageAccess(storage.use, new_id))
    return Server(settings, add, inner, gauges, driver.sources, addons, jobs, details)


def central_server(settings: Settings) -> Server:
    """The server of `luks-csi controller`: it has no volumes, so nothing can be in its way."""
    from csi_driver.rpc.central import CentralControllerServicer  # noqa: PLC0415

    identity, controller = IdentityServicer(settings, lambda: None), CentralControllerServicer()
    return Server(
        settings,
        [
            lambda server: csi_pb2_grpc.add_IdentityServicer_to_server(identity, server),
            lambda server: csi_pb2_grpc.add_ControllerServicer_to_server(controller, server),
        ],
    )


def serve_until_told(server: Server, listening: Callable[[], None] = lambda: None) -> bool:
    """Serve until SIGTERM or SIGINT; returns whether all calls ended within the grace time.

    `listening` does what may wait until the server answers.
    """
    with told_to_stop() as (asked, _):
        server.start()
        listening()
        os.read(asked, 1)
        return server.stop()
