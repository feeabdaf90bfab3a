"""What commands share of their settings: each an option and an environment variable, read and checked the same way."""

import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click import Option

from csi_driver.model.errors import DriverError
from csi_driver.model.settings import Settings
from csi_driver.model.sizes import read_size
from csi_driver.model.volume import is_object_name
from csi_driver.rpc.endpoint import endpoint_path, host_and_port

_LONGEST_SECONDS = 86400
# CSI bounds the prefix of a topology key, which `Settings.topology_key` makes of the driver's name.
_LONGEST_TOPOLOGY_PREFIX = 63
_DOMAIN_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
# What LVM takes, short enough for device-mapper's names of its volumes: lvm(8), "Valid names".
_GROUP_NAME = re.compile(r"[A-Za-z0-9_.+][A-Za-z0-9_.+-]{0,39}")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,511}")
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def read_node_id(text: str) -> str:
    """The node's id, which is the value of a topology label too; empty means the host's name. Raises ValueError."""
    chosen = text or socket.gethostname()
    if not _LABEL_VALUE.fullmatch(chosen):
        said = f"{chosen!r}" if text else f"the host name {chosen!r}"
        raise ValueError(
            f"{said} cannot be a node id; it must be 1 to 63 letters, digits, '-', '_' or '.', with a letter or digit "
            f"at both ends (a Kubernetes label value)"
        )
    return chosen


def read_driver_name(text: str) -> str:
    """The driver's name (CSI spec, GetPluginInfo; Kubernetes wants small letters). Raises ValueError."""
    most = _LONGEST_TOPOLOGY_PREFIX - len(Settings(driver_name="").topology_key.removesuffix("/node"))
    if len(text) > most or not _DOMAIN_NAME.fullmatch(text):
        raise ValueError(
            f"{text!r} cannot be a driver name; it must be a domain name of at most {most} small letters, digits, '-' "
            f"and '.', with a letter or digit at both ends, such as {Settings.driver_name}"
        )
    return text


def read_folder(text: str) -> Path:
    """An absolute path. Raises ValueError."""
    path = Path(text)
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{text!r} is no absolute path")
    return path


def read_path(text: str) -> Path:
    """An absolute path of a file. Raises ValueError."""
    path = read_folder(text)
    if text.endswith("/"):
        raise ValueError(f"{text!r} is the path of a folder and must be a file's")
    return path


def read_some_path(text: str) -> Path | None:
    """As `read_path`; nothing is None."""
    return read_path(text) if text else None


def read_some_endpoint(text: str) -> Path | None:
    """A socket; nothing is None. Raises InvalidArgument."""
    return endpoint_path(text) if text else None


def read_group(text: str) -> str:
    """A volume group's name, or nothing. Raises ValueError."""
    # Device-mapper's names of such a group's volumes would be those of our mappings.
    if text and (not _GROUP_NAME.fullmatch(text) or text in (".", "..", "luks") or text.startswith("luks-")):
        raise ValueError(
            f"{text!r} must be the name of a volume group of at most 40 letters, digits, '_', '.', '+' and '-', and "
            f"not 'luks' or one that begins with 'luks-'"
        )
    return text


def read_name(text: str) -> str:
    """The name of an object of Kubernetes, or nothing. Raises ValueError."""
    if text and not is_object_name(text):
        raise ValueError(f"{text!r} cannot be the name of an object of Kubernetes: small letters, digits, '-' and '.'")
    return text


def read_image(text: str) -> str:
    """A container image, or nothing. Raises ValueError."""
    if text and not _IMAGE.fullmatch(text):
        raise ValueError(f"{text!r} must be the name of a container image, such as localhost/luks-csi:0.1.0")
    return text


def seconds(least: int) -> Callable[[str], float]:
    """Reads a number of seconds, `least` at least, or raises ValueError."""

    def read(text: str) -> float:
        found = float(text) if re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,6})?", text) else -1.0
        if not least <= found <= _LONGEST_SECONDS:
            raise ValueError(f"{text!r} must be a number of seconds from {least} to {_LONGEST_SECONDS}")
        return found

    return read


def number(least: int, most: int) -> Callable[[str], int]:
    """Reads a whole number within bounds, or raises ValueError."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise ValueError(f"{text!r} must be a whole number from {least} to {most}")
        return int(text)

    return read


def read_truth(text: str) -> bool:
    """true or false. Raises ValueError."""
    return one_of(("true", "false"))(text) == "true"


def one_of(allowed: Iterable[str]) -> Callable[[str], str]:
    """Reads one of these words, or raises ValueError."""
    names = tuple(map(str, allowed))

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"{text!r} must be one of {', '.join(names)}")
        return text

    return read


def read_memory(text: str) -> int:
    """KiB of a size that Argon2 takes. Raises ValueError."""
    kib, rest = divmod(read_size(text), 1 << 10)
    if rest or not 32 <= kib <= 4 << 20:
        raise ValueError(f"{text!r} must be whole KiB, from 32Ki to 4Gi (what Argon2 takes in LUKS2)")
    return kib


def read_address(text: str) -> str | None:
    """HOST:PORT; nothing is None. Raises InvalidArgument."""
    if text:
        host_and_port(text)
    return text or None


def setting(
    name: str,
    field: str,
    read: Callable[[str], object],
    metavar: str,
    default: object,
    meaning: str,
    **more: Any,
) -> Option:
    """One setting: an option, and an environment variable of the same name; `more` is for click's Option."""

    def check(_context: click.Context, _parameter: click.Parameter, text: str) -> object:
        try:
            return read(text)
        except (DriverError, ValueError) as error:
            raise click.BadParameter(str(error)) from None

    return Option(
        [name, field],
        metavar=metavar,
        default=str(default),
        show_default=bool(default),
        envvar=f"LUKS_CSI_{name.removeprefix('--').replace('-', '_').upper()}",
        show_envvar=True,
        callback=check,
        help=meaning,
        **more,
    )
