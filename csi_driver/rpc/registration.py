"""What kubelet must know of the driver: a socket in its folder plugins_registry that answers for it.

Kubelet takes a driver for gone when that socket goes, and asks anew whenever it starts itself. So this is a process of
its own, which stays while the driver restarts.
"""

import os
import select
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from csi_driver.host.log import log
from csi_driver.rpc import pluginregistration_pb2 as registration
from csi_driver.rpc import pluginregistration_pb2_grpc
from csi_driver.rpc.client import CsiClient, RemoteError
from csi_driver.rpc.endpoint import Endpoint, endpoint_path, listen_on
from csi_driver.rpc.signals import told_to_stop

_VERSIONS = ("1.0.0",)  # of CSI, as kubelet compares them: the major one counts
_ANSWER_SECONDS = 5.0
_AGAIN_SECONDS = 1.0
_GRACE_SECONDS = 2.0


class Registrar:
    """Registers the driver that serves on `endpoint` by a socket in `folder`; `kubelet_endpoint` is the driver's
    socket as kubelet sees it.
    """

    def __init__(self, endpoint: Path, kubelet_endpoint: Path, folder: Path) -> None:
        self._endpoint = endpoint
        self._kubelet_endpoint = kubelet_endpoint
        self._folder = folder

    def run(self) -> bool:
        """Register until SIGTERM or SIGINT; False as soon as kubelet refuses the driver, which it does for good.

        Raises DeviceInUse when somebody registers this driver already, FailedPrecondition when the folder cannot be
        used, InvalidArgument when its name is too long for a socket.
        """
        with told_to_stop() as (asked, stop):
            name = self._driver_name(asked)
            return name is None or self._serve(name, asked, stop)

    def _driver_name(self, asked: int) -> str | None:
        """The driver's name, once it answers; None when told to stop before."""
        waiting = False
        while True:
            try:
                with CsiClient(self._endpoint, timeout=_ANSWER_SECONDS) as client:
                    return client.plugin_info().name
            except RemoteError as error:
                if not waiting:
                    log.info("waiting for the driver", endpoint=str(self._endpoint), error=str(error))
                waiting = True
            if select.select([asked], [], [], _AGAIN_SECONDS)[0]:
                return None

    def _serve(self, name: str, asked: int, stop: int) -> bool:
        answers = _Answers(name, str(self._kubelet_endpoint), stop)
        server = grpc.server(ThreadPoolExecutor(1, "registration"), options=[("grpc.so_reuseport", 0)])
        pluginregistration_pb2_grpc.add_RegistrationServicer_to_server(answers, server)
        place = Endpoint(endpoint_path(str(self._folder / f"{name}-reg.sock")))
        place.place(lambda path: listen_on(server, path))
        log.info("registering", driver=name, endpoint=str(self._kubelet_endpoint), folder=str(self._folder))
        os.read(asked, 1)
        place.remove()
        server.stop(_GRACE_SECONDS).wait()
        return not answers.refused


class _Answers(pluginregistration_pb2_grpc.RegistrationServicer):
    def __init__(self, name: str, endpoint: str, stop: int) -> None:
        self._info = registration.PluginInfo(
            type="CSIPlugin", name=name, endpoint=endpoint, supported_versions=_VERSIONS
        )
        self._stop = stop
        self.refused = False

    def GetInfo(self, request: registration.InfoRequest, context: grpc.ServicerContext) -> registration.PluginInfo:
        return self._info

    def NotifyRegistrationStatus(
        self, request: registration.RegistrationStatus, context: grpc.ServicerContext
    ) -> registration.RegistrationStatusResponse:
        if request.plugin_registered:
            log.info("registered", driver=self._info.name)
        else:
            log.error("kubelet refused the driver", driver=self._info.name, error=request.error)
            self.refused = True
            os.write(self._stop, b"\0")
        return registration.RegistrationStatusResponse()
