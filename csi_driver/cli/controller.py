"""`luks-csi controller`: the part of a cluster that is central and needs no node."""

import os
from typing import Any

import click

from csi_driver.cli.logs import configure_logs
from csi_driver.cli.serve import settings_of, settings_params
from csi_driver.model.settings import Service

_OPTIONS = ("endpoint", "driver_name", "threads", "grace_seconds", "log_format", "log_level", "http_address")


@click.command(params=settings_params(*_OPTIONS))
def controller(**options: Any) -> None:
    """Serve ControllerExpandVolume for csi-resizer until SIGTERM; as any user, without a state directory.

    Everything else of the Controller service is served on each node, by `luks-csi serve`.
    """
    settings = settings_of({**options, "services": frozenset({Service.IDENTITY, Service.CONTROLLER})})
    configure_logs(settings.log_format, settings.log_level)
    from csi_driver.rpc.threads import listen_with_one_poller

    listen_with_one_poller()
    from csi_driver.rpc.server import central_server, serve_until_told

    if not serve_until_told(central_server(settings)):
        os._exit(0)  # as in serve
