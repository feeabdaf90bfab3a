"""`luks-csi register`: tells kubelet that the driver is there."""

from pathlib import Path
from typing import Any

import click

from csi_driver.cli.logs import configure_logs
from csi_driver.cli.serve import settings_params
from csi_driver.cli.setting import setting
from csi_driver.model.settings import LogFormat
from csi_driver.rpc.endpoint import endpoint_path

_OPTIONS = ("endpoint", "kubelet_dir", "log_format", "log_level")


@click.command(
    params=[
        *settings_params(*_OPTIONS),
        setting(
            "--kubelet-endpoint",
            "kubelet_endpoint",
            lambda text: endpoint_path(text) if text else None,
            "SOCKET",
            "",
            "The driver's socket as kubelet sees it; without it, --endpoint.",
        ),
    ]
)
@click.pass_context
def register(context: click.Context, /, **options: Any) -> None:
    """Register the driver with kubelet until SIGTERM; ends with exit code 1 when kubelet refuses it.

    Waits for the driver as long as it takes, and stays while the driver restarts.
    """
    configure_logs(LogFormat(options["log_format"]), options["log_level"])
    from csi_driver.rpc.registration import Registrar

    endpoint: Path = options["endpoint"]
    folder: Path = options["kubelet_dir"]
    registrar = Registrar(endpoint, options["kubelet_endpoint"] or endpoint, folder / "plugins_registry")
    context.exit(0 if registrar.run() else 1)
