"""What the commands print: a table for people or JSON for programs; and the question before something is lost."""

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from enum import StrEnum

import click
import msgspec

from csi_driver.model.errors import Aborted
from csi_driver.model.text import printable, without_surrogates

_GAP = "  "
_LEAST_WIDTH, _MOST_WIDTH = 60, 120
_LEAST_COLUMN = 20
_NO_COLOURS: Mapping[str, str] = {}
_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi")


class Output(StrEnum):
    """For whom a command prints."""

    TABLE = "table"
    JSON = "json"


OUTPUT_OPTION = click.Option(
    ["--output", "-o"],
    type=click.Choice([each.value for each in Output]),
    default=Output.TABLE.value,
    show_default=True,
    help="table for people, json for programs.",
)
"""An option for a command's `params`; it gets the text as `output`."""


def show_text(sentence: str, *, err: bool = False) -> None:
    """Print a line for people, which may hold names from anywhere; `err` to standard error."""
    click.echo(printable(sentence), err=err)


def show_json(value: object) -> None:
    """Print a value of plain types, dataclasses or msgspec structs as JSON."""
    plain = without_surrogates(msgspec.to_builtins(value))
    click.echo(msgspec.json.format(msgspec.json.encode(plain), indent=2))


def show_failure(message: str, code: str, exit_code: int) -> None:
    """Print why a command failed, for programs: one line of JSON, on standard error. `code` is a gRPC status's name."""
    failure = {"error": {"code": code, "message": message, "exit_code": exit_code}}
    click.echo(msgspec.json.encode(without_surrogates(failure)), err=True)


def show_table(
    rows: Sequence[Sequence[str]], headers: Sequence[str] = (), colours: Mapping[str, str] = _NO_COLOURS
) -> None:
    """Print aligned columns; the last one is broken into lines where the terminal ends.

    `colours` are those of cells of the first column, on a terminal and without NO_COLOR (https://no-color.org).
    """
    lines = [[*map(printable, line[:-1]), line[-1]] for line in ([headers, *rows] if headers else rows)]
    if not lines:
        return
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    indent = sum(widths) + len(_GAP) * len(widths)
    room = max(_LEAST_COLUMN, _width() - indent)
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        if not os.environ.get("NO_COLOR") and (colour := colours.get(line[0])):
            cells[0] = click.style(cells[0], fg=colour)
        parts = map(printable, line[-1].split("\n"))
        paragraphs = [piece for part in parts for piece in _wrapped(part, room)] or [""]
        click.echo((_GAP.join([*cells, paragraphs[0]])).rstrip())
        for piece in paragraphs[1:]:
            click.echo(" " * indent + piece)


def size_text(size: int) -> str:
    """A size as Kubernetes writes it: the largest unit that divides it, so that nothing is rounded."""
    power = 0
    while size and size % 1024 == 0 and power < len(_UNITS) - 1:
        size //= 1024
        power += 1
    return f"{size}{_UNITS[power]}"


def about(size: int) -> str:
    """A size for the eye, with at most one decimal."""
    power, value = 0, float(size)
    while value >= 1024 and power < len(_UNITS) - 1:
        value /= 1024
        power += 1
    return f"{value:.1f}".removesuffix(".0") + _UNITS[power]


def confirm(question: str, *, yes: bool) -> None:
    """Ask on a terminal; elsewhere `--yes` must have answered. Raises Aborted on a no, UsageError without an answer."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} There is no terminal to ask on; answer with --yes.")
    if not click.confirm(printable(question), err=True):
        raise Aborted("nothing was done")


def _wrapped(text: str, room: int) -> list[str]:
    """The text in lines; a path or the name of a volume stays whole, as it is there to be copied."""
    return textwrap.wrap(text, room, break_on_hyphens=False, break_long_words=False)


def _width() -> int:
    return min(max(shutil.get_terminal_size((100, 24)).columns, _LEAST_WIDTH), _MOST_WIDTH)
