"""`luks-csi completion` and `luks-csi man`: what a shell and man(1) want to know, made from the commands themselves."""

import re
from collections.abc import Iterator

import click
from click.shell_completion import get_completion_class

from csi_driver import __version__
from csi_driver.cli.output import show_text

PROGRAM = "luks-csi"
_SHELLS = ("bash", "zsh", "fish")
_EXIT_CODES = (
    ("0", "done"),
    ("1", "refused or failed, or something bad was found"),
    ("2", "a command line or setting that cannot be right; nothing was done"),
    ("130", "ended by Ctrl-C"),
)


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options and names: source <(luks-csi completion bash)."""
    made = get_completion_class(shell)
    if made is None:  # every choice has one
        raise click.UsageError(f"click knows no completion for {shell}.")
    source = made(context.find_root().command, {}, PROGRAM, "_LUKS_CSI_COMPLETE").source()
    for line in source.splitlines():
        show_text(line.expandtabs())


@click.command()
@click.pass_context
def man(context: click.Context) -> None:
    """Print the man page: luks-csi man >/usr/local/share/man/man1/luks-csi.1, then man luks-csi."""
    for line in man_page(context.find_root().command):
        show_text(line)


def man_page(command: click.Command) -> Iterator[str]:
    """The man page of a command and all below it, in the macros of man(7)."""
    yield f'.TH LUKS-CSI 1 "" "luks-csi {__version__}" "User Commands"'
    yield ".SH NAME"
    yield _text(f"{PROGRAM} - {_first(command)}")
    yield ".SH SYNOPSIS"
    yield f".B {_text(PROGRAM)}"
    yield r".I COMMAND\fR [\fIOPTION\fR]..."
    yield ".SH DESCRIPTION"
    yield from _paragraphs(command)
    yield ".SH COMMANDS"
    yield from _commands(click.Context(command, info_name=PROGRAM))
    yield ".SH EXIT STATUS"
    for code, meaning in _EXIT_CODES:
        yield from (".TP", f".B {code}", _text(meaning))
    yield ".SH SEE ALSO"
    yield ".BR cryptsetup (8),"
    yield ".BR qemu-img (1)"


def _commands(context: click.Context) -> Iterator[str]:
    command = context.command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None and not found.hidden:
                yield from _commands(click.Context(found, info_name=name, parent=context))
        return
    pieces = " ".join(command.collect_usage_pieces(context))
    yield f".SS {_text(f'{context.command_path} {pieces}')}"
    yield from _paragraphs(command)
    for parameter in command.get_params(context):
        if (
            isinstance(parameter, click.Option)
            and parameter.name != "help"
            and (record := parameter.get_help_record(context))
        ):
            names, meaning = record
            yield from (".TP", f".B {_text(names)}", _text(meaning))


def _first(command: click.Command) -> str:
    return (command.help or "").split("\n\n")[0].replace("\n", " ").rstrip(".")


def _paragraphs(command: click.Command) -> Iterator[str]:
    for paragraph in (command.help or "").split("\n\n"):
        yield ".PP"
        yield _text(paragraph)


def _text(text: str) -> str:
    r"""A line of text in which nothing is taken for roff: no \, no control line, no hyphen for a minus."""
    line = re.sub(r"\s+", " ", text).strip().replace("\\", r"\e").replace("-", r"\-")
    return f"\\&{line}" if line[:1] in (".", "'") else line
