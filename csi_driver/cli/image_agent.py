"""`luks-csi image-agent`: makes and keeps a node's copies of the Images of its cluster."""

import contextlib
import ipaddress
import os
from typing import Any

import click

from csi_driver.cli.cluster import cluster
from csi_driver.cli.loading import loading
from csi_driver.cli.logs import configure_logs
from csi_driver.cli.serve import settings_params
from csi_driver.cli.setting import number, read_folder, read_path, read_truth, seconds, setting
from csi_driver.model.settings import LogFormat
from csi_driver.model.sizes import read_size
from csi_driver.rpc.endpoint import host_and_port

_OPTIONS = ("node_id", "state_dir", "audit_file", "log_format", "log_level")


def _address(text: str) -> str:
    """$(POD_IP):9810 of a manifest has no brackets around an address of IPv6."""
    host, _, port = text.rpartition(":")
    with contextlib.suppress(ValueError):
        text = f"[{ipaddress.IPv6Address(host)}]:{port}"
    host_and_port(text)
    return text


def _text(text: str) -> str:
    return text


@click.command(
    params=[
        *settings_params(*_OPTIONS),
        setting("--listen", "listen", host_and_port, "HOST:PORT", ":9810", "Where to serve copies and take uploads."),
        setting("--address", "address", _address, "HOST:PORT", "", "Where other agents reach this one.", required=True),
        setting("--tls-dir", "tls_dir", read_folder, "FOLDER", "/etc/luks-csi/agents", "tls.crt, tls.key and ca.crt."),
        setting("--token-file", "token_file", read_path, "FILE", "/etc/luks-csi/agents/token", "The token "
                "that shows other agents who this is."),
        setting("--account", "account", _text, "USER", "system:serviceaccount:luks-csi:luks-csi-node", "Whose tokens "
                "are agents'."),
        setting("--jobs", "jobs_at_once", number(1, 16), "NUMBER", 2, "Images at work at once, and as many "
                "downloads beside them."),
        setting("--rate-limit", "rate", read_size, "SIZE", "0", "Most bytes a second that go to other nodes, and "
                "that an export reads; 0 is without a limit."),
        setting("--leftover-seconds", "leftover_seconds", seconds(1), "SECONDS", "3600", "How long files stay whose "
                "Image is gone."),
        setting("--allow-local", "allow_local", read_truth, "true|false", "false", "Download from loopback, link-local "
                "and metadata addresses too.", is_flag=False, flag_value="true"),
    ]
)  # fmt: skip
def image_agent(log_format: LogFormat, log_level: str, **options: Any) -> None:
    """Make, keep, give and remove this node's copies of Images until SIGTERM."""
    configure_logs(log_format, log_level)
    kube = cluster()
    with loading():
        from csi_driver.agent.run import NodeAgent
        from csi_driver.agent.settings import AgentSettings
        from csi_driver.images.library import ImageLibrary
        from csi_driver.rpc.signals import told_to_stop

    settings = AgentSettings(node=options.pop("node_id"), **options)
    agent = NodeAgent(kube, settings, ImageLibrary(settings.images))
    with told_to_stop() as (told, _):
        agent.start()
        os.read(told, 1)
    agent.stop()
