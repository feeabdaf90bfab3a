"""`luks-csi operator`: images as Kubernetes objects; decides and watches, without any right on a node."""

import os
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import click

from csi_driver.cli.cluster import cluster
from csi_driver.cli.loading import loading
from csi_driver.cli.logs import configure_logs
from csi_driver.cli.serve import settings_params
from csi_driver.cli.setting import one_of, seconds, setting
from csi_driver.model.settings import LogFormat
from csi_driver.rpc.endpoint import host_and_port

if TYPE_CHECKING:
    from csi_driver.operator.run import Operator
    from csi_driver.rpc.http import Page

_OPTIONS = ("driver_name", "log_format", "log_level", "http_address")


def _text(text: str) -> str:
    return text


def _listen(text: str) -> tuple[str, int] | None:
    return host_and_port(text) if text else None


@click.command(
    params=[
        *settings_params(*_OPTIONS),
        setting("--namespace", "namespace", _text, "NAME", "luks-csi", "Where operator and agents run."),
        setting("--backing-image-namespace", "backing_image_namespace", _text, "NAME", "longhorn-system", "Where "
                "BackingImages lie."),
        setting("--lost-seconds", "lost_seconds", seconds(1), "SECONDS", "300", "Without an agent for so long, a "
                "node's copies count no more."),
        setting("--unused-seconds", "unused_seconds", seconds(0), "SECONDS", "3600", "A copy beyond those that are "
                "wanted goes when no volume started from it for so long; 0 keeps it."),
        setting("--admission-profile", "profile", one_of(("longhorn", "harvester")), "longhorn|harvester", "longhorn",
                "Whose rules hold where the documents contradict each other."),
        setting("--webhook-listen", "webhook_listen", _listen, "HOST:PORT", "", "Where to serve the admission "
                "webhooks, if at all."),
    ]
)  # fmt: skip
def operator(
    log_format: LogFormat, log_level: str, http_address: str | None, webhook_listen: tuple[str, int] | None,
    profile: str, **options: Any,
) -> None:  # fmt: skip
    """Keep Images true until SIGTERM: have them made, copied to nodes, and removed, by the agents of the nodes."""
    configure_logs(log_format, log_level)
    kube = cluster()
    with loading():
        from csi_driver.operator.run import Operator
        from csi_driver.operator.settings import OperatorSettings, Profile
        from csi_driver.rpc.http import HttpServer
        from csi_driver.rpc.signals import told_to_stop

    made = Operator(kube, OperatorSettings(profile=Profile(profile), **options), webhook_listen)
    pages = HttpServer(http_address, _pages(made)) if http_address else None
    with told_to_stop() as (told, _):
        made.start()
        if pages is not None:
            pages.start()
        os.read(told, 1)
    if pages is not None:
        pages.stop()
    made.stop()


def _pages(operator: "Operator") -> "dict[str, Callable[[], Page]]":
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

    from csi_driver.rpc.http import Page

    registry = CollectorRegistry(auto_describe=False)
    if operator.admission is not None:
        registry.register(operator.admission.tally)

    def ready() -> Page:
        obstacle = operator.obstacle()
        return Page(HTTPStatus.SERVICE_UNAVAILABLE if obstacle else HTTPStatus.OK, f"{obstacle or 'ok'}\n".encode())

    return {
        "/healthz": lambda: Page(HTTPStatus.OK, b"ok\n"),
        "/readyz": ready,
        "/metrics": lambda: Page(HTTPStatus.OK, generate_latest(registry), CONTENT_TYPE_LATEST),
    }
