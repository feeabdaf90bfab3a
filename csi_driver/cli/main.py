"""`luks-csi`: the group of commands, each loaded only when it is called."""

import importlib
import sys
from collections.abc import Mapping

import click

from csi_driver import __version__
from csi_driver.cli.loading import loading
from csi_driver.model.errors import DriverError
from csi_driver.model.text import printable

COMMANDS: Mapping[str, str] = {
    "controller": "csi_driver.cli.controller:controller",
    "doctor": "csi_driver.cli.doctor:doctor",
    "image": "csi_driver.cli.image:image",
    "orphans": "csi_driver.cli.orphans:orphans",
    "register": "csi_driver.cli.register:register",
    "serve": "csi_driver.cli.serve:serve",
    "volume": "csi_driver.cli.volume:volume",
}
"""Name of each command, and where it is."""


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if (place := COMMANDS.get(cmd_name)) is None:
            return None
        module, _, name = place.partition(":")
        with loading():
            command = getattr(importlib.import_module(module), name)
        if not isinstance(command, click.Command):
            raise TypeError(f"{place} is no command")
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, message="luks-csi %(version)s")
def luks_csi() -> None:
    """Encrypted volumes for Kubernetes on any storage."""


def main() -> None:
    """Run the command that was asked for.

    A failure is one sentence on standard error, with exit code 2 for a command line or setting that cannot be right
    and 1 for all else.
    """
    try:
        code = luks_csi.main(prog_name="luks-csi", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        click.echo(printable(f"luks-csi: {error.format_message()}"), err=True)
        sys.exit(error.exit_code)
    except DriverError as error:
        click.echo(f"luks-csi: {error}", err=True)
        sys.exit(1)
    except click.Abort:
        sys.exit(130)  # Ctrl-C, as a shell tells it
    sys.exit(code if isinstance(code, int) else 0)
