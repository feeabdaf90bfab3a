"""`luks-csi`: the group of commands, each loaded only when it is called."""

import importlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

import click

from csi_driver import __version__
from csi_driver.cli.loading import loading
from csi_driver.cli.words import for_people
from csi_driver.host.hardening import harden_process
from csi_driver.model.errors import DriverError, Stopped
from csi_driver.model.text import printable

COMMANDS: Mapping[str, str] = {
    "completion": "csi_driver.cli.manual:completion",
    "controller": "csi_driver.cli.controller:controller",
    "doctor": "csi_driver.cli.doctor:doctor",
    "holder": "csi_driver.cli.holder:holder",
    "image": "csi_driver.cli.image:image",
    "image-agent": "csi_driver.cli.image_agent:image_agent",
    "keys": "csi_driver.cli.keys:keys",
    "man": "csi_driver.cli.manual:man",
    "operator": "csi_driver.cli.operator:operator",
    "orphans": "csi_driver.cli.orphans:orphans",
    "recover": "csi_driver.cli.recover:recover",
    "register": "csi_driver.cli.register:register",
    "serve": "csi_driver.cli.serve:serve",
    "volume": "csi_driver.cli.volume:volume",
}
"""Name of each command, and where it is."""

FAILED: Final = 1
INTERRUPTED: Final = 128 + signal.SIGINT  # as a shell tells it


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
    """Encrypted volumes for Kubernetes on any storage, and encrypted VM images."""


def main(arguments: Sequence[str] | None = None, obj: object = None) -> NoReturn:
    """Run the command of `arguments`, the process's own unless given; `obj` is what tests give it in place of a host.

    Exit codes: 0 done, 1 refused, failed or found bad, 2 a command line or setting that cannot be right, 130 ended by
    Ctrl-C. A failure is one sentence on standard error; with `--output json` a line of JSON.
    """
    # Before anything loads gRPC, which else starts a thread in each child that a command forks: it ends the child when
    # its descriptors are closed, before the child's program runs (findings/grpcio-thread-in-fork.sh).
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    _open_standard_streams()
    harden_process()  # whatever the command: many come to hold a key, a token or a passphrase
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    try:
        code = luks_csi.main(words, prog_name="luks-csi", standalone_mode=False, obj=obj)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        what = "INVALID_ARGUMENT" if isinstance(error, click.UsageError) else "FAILED_PRECONDITION"
        _fail(words, printable(error.format_message()), what, error.exit_code)
    except Stopped as error:
        _fail(words, str(error), "CANCELLED", 128 + signal.Signals[error.signal])
    except DriverError as error:
        said = for_people(str(error))
        if _wants_json(words):
            _fail(words, said, _code_of(error), FAILED)
        answered = getattr(error, "code", None)  # the server's own, of a call to it
        _fail(words, f"{said} ({answered})" if answered else said, "", FAILED)
    except click.Abort as error:
        _fail(words, str(error) or "interrupted", "CANCELLED", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _open_standard_streams() -> None:
    """What the caller has closed reads and writes nothing; else a file of ours would have its descriptor."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - to the end of the process


def _fail(words: Sequence[str], message: str, code: str, exit_code: int) -> NoReturn:
    if _wants_json(words):
        from csi_driver.cli.output import show_failure

        show_failure(message, code, exit_code)
    else:
        click.echo(f"luks-csi: {message}", err=True)
    sys.exit(exit_code)


def _wants_json(words: Sequence[str]) -> bool:
    """Whether the command line asks for JSON, however little of it could be read."""
    return any(
        word in ("-ojson", "--output=json", "-o=json") or (word in ("-o", "--output") and following == "json")
        for word, following in zip(words, [*words[1:], ""], strict=True)
    )


def _code_of(error: DriverError) -> str:
    """The name of its gRPC status: the server's own where a server answered."""
    from csi_driver.rpc.client import RemoteError
    from csi_driver.rpc.status import code_of

    return error.code if isinstance(error, RemoteError) else code_of(error).name
