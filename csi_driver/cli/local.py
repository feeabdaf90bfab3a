"""The driver without a server, for commands that work on a node's volumes themselves."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import click

from csi_driver.cli.logs import configure_logs
from csi_driver.cli.serve import settings_of
from csi_driver.model.settings import LogFormat
from csi_driver.volumes.driver import Driver


@contextmanager
def local_driver(context: click.Context, given: dict[str, Any]) -> Iterator[Driver]:
    """A driver by the settings that were given, as long as a command works with it.

    A secret that the command was given may have what reaches its storage too, as one of Ceph-CSI has a user of Ceph.
    Raises ClickException where the state directory is not to be had.
    """
    from csi_driver.cli.below import below
    from csi_driver.volumes.driver import Host, build_driver

    configure_logs(LogFormat.AUTO, "warning")
    settings = dataclasses.replace(settings_of(given), ceph_secret=context.params.get("secret_dir"))
    with ExitStack() as stack:
        try:
            driver: Driver = context.obj(settings) if context.obj else build_driver(settings, Host(below=below))
            stack.callback(driver.stop)
            yield driver
        except OSError as error:
            raise click.ClickException(
                f"{settings.state_dir} cannot be used ({error.strerror}: {error.filename}); run this as root, on the "
                f"node, with the --state-dir of its server"
            ) from None
