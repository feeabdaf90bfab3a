"""The whole command, as the shell gets to know it: output, errors, exit code."""

import click
from click.testing import CliRunner, Result

from csi_driver.cli.main import main


def run_cli(*words: object, obj: object = None, stdin: str | bytes | None = None) -> Result:
    """`luks-csi WORDS…`, called in this process; `obj` is what stands in place of a host or server."""
    command = click.Command("luks-csi", callback=lambda: main([str(word) for word in words], obj))
    return CliRunner().invoke(command, [], input=stdin)
