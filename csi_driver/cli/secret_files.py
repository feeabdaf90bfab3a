"""Secrets for requests: read from files or standard input, never from the command line or the environment."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import click

from csi_driver.keys.secret import LONGHORN_VALUE
from csi_driver.model.errors import FailedPrecondition, InvalidArgument

Function = TypeVar("Function", bound=Callable[..., object])

_LARGEST = 64 * 1024
_STDIN = "-"


def secret_options(function: Function) -> Function:
    """`--secret-dir` and `--passphrase-file` for a command; `SecretSource` takes both."""
    return _options(
        "",
        "Folder like a mounted Kubernetes secret: one file per entry, taken byte for byte.",
        "File with the passphrase, without the newline at its end; - for standard input, a terminal asks.",
    )(function)


def new_secret_options(function: Function) -> Function:
    """`--new-secret-dir` and `--new-passphrase-file`, for a command that changes the secret."""
    return _options("new-", "The new secret, as --secret-dir.", "The new passphrase, as --passphrase-file.")(function)


@dataclass(frozen=True)
class SecretSource:
    """Where a secret is to come from: a folder, a file, the terminal, or nowhere. Raises UsageError for two of them."""

    folder: Path | None
    file: Path | None

    def __post_init__(self) -> None:
        if self.folder is not None and self.file is not None:
            raise click.UsageError("--secret-dir and --passphrase-file exclude each other; give one of them.")

    @property
    def is_given(self) -> bool:
        """Whether there is to be one."""
        return self.folder is not None or self.file is not None

    @property
    def is_stdin(self) -> bool:
        """Whether it comes from standard input, as a line of a terminal or as it is."""
        return str(self.file) == _STDIN

    def read(self, prompt: str = "Passphrase", *, new: bool = False) -> Mapping[str, str]:
        """The entries. Raises ClickException; what was read is in no message.

        On a terminal a `new` passphrase is asked for twice.
        """
        if not self.is_given:
            return {}
        try:
            if self.folder is not None:
                # Kubernetes mounts entries as links into a hidden folder; what is hidden is its own.
                names = sorted(path.name for path in self.folder.iterdir() if path.name[0] != "." and path.is_file())
                return {name: _text(_read(self.folder / name), f"the entry {name} in {self.folder}") for name in names}
            return {LONGHORN_VALUE: _passphrase(self.file or Path(_STDIN), prompt, new=new)}
        except OSError as error:
            raise click.ClickException(f"the secret cannot be read from {error.filename}: {error.strerror}") from None


def read_for_volume(
    source: SecretSource, volume_id: str, *, encrypted: bool, required: bool, new: bool = False
) -> Mapping[str, str]:
    """The secret for a volume that is there. Raises InvalidArgument for one that would protect nothing,
    FailedPrecondition where one is `required` and none is given, ClickException.
    """
    if source.is_given and not encrypted:
        raise InvalidArgument(
            f"volume {volume_id} is not encrypted, so a passphrase protects nothing in it: leave it out, or "
            f"make an encrypted volume with `luks-csi volume create --encrypted`"
        )
    if required and encrypted and not source.is_given:
        raise FailedPrecondition(
            f"volume {volume_id} is encrypted: give its passphrase with --passphrase-file FILE, - to type it, or with "
            f"--secret-dir FOLDER"
        )
    return source.read(f"{'New passphrase' if new else 'Passphrase'} of volume {volume_id}", new=new)


def _passphrase(file: Path, prompt: str, *, new: bool) -> str:
    if str(file) != _STDIN:
        content, where = _read(file), f"the passphrase in {file}"
    elif sys.stdin.isatty():
        return _typed(prompt, new=new)
    else:
        content, where = _up_to_limit(sys.stdin.buffer, "standard input"), "the passphrase on standard input"
    passphrase = _text(content.removesuffix(b"\n"), where)
    if not passphrase:
        raise click.ClickException(f"{where} is empty; nothing was done with it")
    return passphrase


def _typed(prompt: str, *, new: bool) -> str:
    """A line of the terminal, without echo. The terminal may have other ends than standard input: getpass(3)."""
    passphrase = _line(prompt)
    if not passphrase:
        raise click.ClickException("the passphrase is empty; type one")
    if any("\ud800" <= letter <= "\udfff" for letter in passphrase):  # PEP 383
        raise click.ClickException("what was typed is no UTF-8 text, which is all that CSI can carry; use a file")
    if new and _line(f"{prompt}, again") != passphrase:
        raise click.ClickException("the two passphrases differ; nothing was done, type the same one twice")
    return passphrase


def _line(prompt: str) -> str:
    return str(click.prompt(prompt, hide_input=True, err=True, default="", show_default=False))


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
