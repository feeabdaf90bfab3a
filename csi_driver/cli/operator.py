"""`luks-csi operator`: images as Kubernetes objects; decides and watches, without any right on a node."""

import os
from typing import Any

import click

from csi_driver.cli.cluster import cluster
from csi_driver.cli.loading import loading
from csi_driver.cli.logs import configure_logs
from csi_driver.cli.serve import settings_params
from csi_driver.cli.setting import seconds, setting
from csi_driver.host.hardening import harden_process
from csi_driver.model.settings import LogFormat

_OPTIONS = ("driver_name", "log_format", "log_level")


def _text(text: str) -> str:
    return text


@click.command(
    params=[
        *settings_params(*_OPTIONS),
        setting("--namespace", "namespace", _text, "NAME", "luks-csi", "Where operator and agents run."),
        setting("--backing-image-namespace", "backing_image_namespace", _text, "NAME", "longhorn-system", "Where "
                "BackingImages lie."),
        setting("--lost-seconds", "lost_seconds", seconds(1), "SECONDS", "300", "Without an agent for so long, a "
                "node's copies count no more."),
    ]
)  # fmt: skip
def operator(log_format: LogFormat, log_level: str, **options: Any) -> None:
    """Keep Images true until SIGTERM: have them made, copied to nodes, and removed, by the agents of the nodes."""
    harden_process()
    configure_logs(log_format, log_level)
    kube = cluster()
    with loading():
        from csi_driver.operator.run import Operator
        from csi_driver.operator.settings import OperatorSettings
        from csi_driver.rpc.signals import told_to_stop

    made = Operator(kube, OperatorSettings(**options))
    with told_to_stop() as (told, _):
        made.start()
        os.read(told, 1)
    made.stop()
