"""What a download needs beside its URL: credentials and certificates, from files and never from the command line."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from csi_driver.cli.secret_files import SecretSource
from csi_driver.images.bring import is_url
from csi_driver.images.credentials import PAIRS, authorization, pair_of

Function = TypeVar("Function", bound=Callable[..., object])

_HEADER: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
_OURS: Final = frozenset({
    "host", "range", "if-range", "connection", "accept-encoding", "transfer-encoding", "content-length", "te",
})  # fmt: skip
_MOST_BYTES: Final = 64 * 1024


def download_options(function: Function) -> Function:
    """Options for a command that downloads; `read_headers` takes all but the last."""
    file = click.Path(exists=True, dir_okay=False, path_type=Path)
    folder = click.Path(exists=True, file_okay=False, path_type=Path)
    options: tuple[tuple[str, dict[str, Any]], ...] = (
        ("--header-file", {"type": file, "help": "File of headers for the server, one a line."}),
        ("--netrc-file", {"type": file, "help": "File of user names and passwords by host, as curl and wget have it."}),
        ("--credentials-dir", {
            "type": folder,
            "help": "Folder like a mounted secret: username and password, or accessKeyId and secretKey.",
        }),
        ("--cacert", {"type": file, "help": "Certificates (PEM) to trust in the place of the system's."}),
    )  # fmt: skip
    for name, attributes in reversed(options):
        function = click.option(name, **attributes)(function)
    return function


def read_source(source: str) -> str:
    """The source that is meant: of `@FILE` the URL in the first line of that file, as a signed one is a credential.

    Raises ClickException; what was read is in no message.
    """
    if not source.startswith("@"):
        return source
    url = _text(Path(source[1:])).strip().partition("\n")[0].strip()
    if not is_url(url):  # not repeated
        raise click.ClickException(
            f"{source[1:]} has no http(s) URL in its first line, expected for {source}; an image of that name is "
            f"./{source}"
        )
    return url


def read_headers(
    source: str, header_file: Path | None, netrc_file: Path | None, credentials_dir: Path | None
) -> dict[str, str]:
    """The headers that a download of `source` sends. Raises ClickException; what was read is in no message."""
    given = [each for each in (header_file, netrc_file, credentials_dir) if each is not None]
    if not given:
        return {}
    if not is_url(source):
        raise click.UsageError("--header-file, --netrc-file and --credentials-dir are for a download; leave them out.")
    if netrc_file is not None and credentials_dir is not None:
        raise click.UsageError("--netrc-file and --credentials-dir exclude each other; give one of them.")
    headers = _headers(header_file) if header_file else {}
    pair = _of_netrc(netrc_file, source) if netrc_file else _of_secret(credentials_dir) if credentials_dir else None
    return headers | (authorization(*pair) if pair else {})


def _headers(file: Path) -> dict[str, str]:
    headers: dict[str, str] = {}
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        found = _HEADER.fullmatch(line.rstrip())
        if not found or found[1].lower() in _OURS:
            what = f"sets {found[1]}, which the download sets itself" if found else "is no header, expected Name: value"
            raise click.ClickException(f"line {number} of {file} {what}")
        headers[found[1]] = found[2]
    return headers


def _of_netrc(file: Path, source: str) -> tuple[str, str] | None:
    import netrc
    from urllib.parse import urlsplit

    try:
        found = netrc.netrc(str(file)).authenticators(urlsplit(source).hostname or "")
    except netrc.NetrcParseError as error:
        raise click.ClickException(f"{file} cannot be read as a netrc file: line {error.lineno}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"{file} cannot be read: {type(error).__name__}") from None
    return (found[0], found[2] or "") if found else None


def _of_secret(folder: Path) -> tuple[str, str]:
    entries: Mapping[str, str] = SecretSource(folder, None).read()
    if (found := pair_of(entries)) is not None:
        return found
    wanted = " or ".join(f"{user} and {password}" for user, password in PAIRS)
    raise click.ClickException(f"the secret in {folder} has no credentials for a download; expected {wanted}")


def _text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(_MOST_BYTES).decode("latin-1")
    except OSError as error:
        raise click.ClickException(f"{file} cannot be read: {error.strerror}") from None
