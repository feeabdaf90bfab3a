"""Secrets for requests: read from files or standard input, never from the command line or the environment."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, TypeVar

import click

from csi_driver.host.hardening import harden_process
from csi_driver.keys.secret import LONGHORN_VALUE

Function = TypeVar("Function", bound=Callable[..., object])

_LARGEST = 64 * 1024


def secret_options(function: Function) -> Function:
    """`--secret-dir` and `--passphrase-file` for a command; `read_secrets` takes both."""
    return _options(
        "",
        "Folder like a mounted Kubernetes secret: one file per entry, taken byte for byte.",
        "File with the passphrase, - for standard input; the newline at its end is left out.",
    )(function)


def new_secret_options(function: Function) -> Function:
    """`--new-secret-dir` and `--new-passphrase-file`, for a command that changes the secret."""
    return _options("new-", "The new secret, as --secret-dir.", "The new passphrase, as --passphrase-file.")(function)


def read_secrets(secret_dir: Path | None, passphrase_file: Path | None) -> Mapping[str, str]:
    """The entries of a secret. Raises ClickException; what was read is in no message.

    The process that holds them from here on leaves no core dump.
    """
    if secret_dir is None and passphrase_file is None:
        return {}
    if secret_dir is not None and passphrase_file is not None:
        raise click.UsageError("--secret-dir and --passphrase-file exclude each other; give one of them.")
    harden_process()
    try:
        if secret_dir is not None:
            # Kubernetes mounts entries as links into a hidden folder; what is hidden is its own.
            names = sorted(path.name for path in secret_dir.iterdir() if path.name[0] != "." and path.is_file())
            return {name: _text(_read(secret_dir / name), f"the entry {name} in {secret_dir}") for name in names}
        return {LONGHORN_VALUE: _passphrase(passphrase_file or Path("-"))}
    except OSError as error:
        raise click.ClickException(f"the secret cannot be read from {error.filename}: {error.strerror}") from None


def _passphrase(file: Path) -> str:
    if str(file) != "-":
        content, where = _read(file), f"the passphrase in {file}"
    elif sys.stdin.isatty():
        return str(click.prompt("Passphrase", hide_input=True, err=True))
    else:
        content, where = _up_to_limit(sys.stdin.buffer, "standard input"), "the passphrase on stdin"
    return _text(content.removesuffix(b"\n"), where)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return _up_to_limit(file, str(path))


def _up_to_limit(stream: BinaryIO, where: str) -> bytes:
    content = stream.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise click.ClickException(f"{where} holds more than {_LARGEST} bytes, too much for a secret's entry")
    return content


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise click.ClickException(
            f"{where} is not UTF-8 text, which is all that CSI can carry; encode the key, in base64 for example"
        ) from None


def _options(prefix: str, folder_help: str, file_help: str) -> Callable[[Function], Function]:
    folder = click.Path(exists=True, file_okay=False, path_type=Path)
    file = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)

    def decorate(function: Function) -> Function:
        with_file = click.option(f"--{prefix}passphrase-file", type=file, help=file_help)(function)
        return click.option(f"--{prefix}secret-dir", type=folder, help=folder_help)(with_file)

    return decorate
