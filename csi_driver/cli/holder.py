"""`luks-csi holder`: what runs in a holder pod. It opens the pod's block device once and hands it to the driver."""

from pathlib import Path
from typing import Any

import click

from csi_driver.cli.logs import configure_logs
from csi_driver.cli.serve import settings_params
from csi_driver.cli.setting import read_folder, read_path, setting
from csi_driver.model.settings import LogFormat

_OPTIONS = ("log_format", "log_level")


@click.command(
    params=[
        *settings_params(*_OPTIONS),
        setting("--device", "device", read_path, "PATH", "/dev/backing", "The block device of the pod's claim."),
        setting("--folder", "folder", read_folder, "FOLDER", "/holders", "Shared with the driver on this node."),
        setting("--volume-id", "volume_id", str, "ID", "", "The volume that the device is of."),
        setting("--holder-id", "holder_id", str, "UID", "", "Which holder this is: the uid of its pod."),
    ]
)
def holder(**options: Any) -> None:
    """Hold a volume's device on this node until SIGTERM, and beyond that for as long as the volume is in use."""
    path: Path = options["device"]
    if not options["volume_id"]:
        raise click.UsageError("--volume-id says nothing; name the volume that the device is of")
    configure_logs(LogFormat(options["log_format"]), options["log_level"])
    from csi_driver.backends.csiholding import hold
    from csi_driver.backends.csipins import Pins
    from csi_driver.host.files import Files
    from csi_driver.rpc.signals import told_to_stop

    with told_to_stop() as (told, _):
        hold(path, options["volume_id"], options["holder_id"], Pins(options["folder"], Files()), told)
