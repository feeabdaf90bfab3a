"""`luks-csi serve`: every setting by option or environment, checked before anything starts."""

import dataclasses
import os
import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click import Option

from csi_driver.cli.loading import loading
from csi_driver.cli.logs import LEVELS, configure_logs
from csi_driver.cli.sizes import read_size
from csi_driver.host.hardening import harden_process
from csi_driver.model.errors import DriverError
from csi_driver.model.settings import Limits, LogFormat, Service, Settings
from csi_driver.rpc.endpoint import endpoint_path, host_and_port

BACKENDS = ("loopfile", "lvm")

_LONGEST_SECONDS = 86400
# CSI bounds the prefix of a topology key, which `Settings.topology_key` makes of the driver's name.
_LONGEST_TOPOLOGY_PREFIX = 63
_DOMAIN_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
# What LVM takes, short enough for device-mapper's names of its volumes: lvm(8), "Valid names".
_GROUP_NAME = re.compile(r"[A-Za-z0-9_.+][A-Za-z0-9_.+-]{0,39}")
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


def _read_services(text: str) -> frozenset[Service]:
    read = _one_of(Service)
    return frozenset({Service.IDENTITY, *(Service(read(name.strip())) for name in text.split(","))})


def _read_folder(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{text!r} is no absolute path")
    return path


def _read_path(text: str) -> Path:
    path = _read_folder(text)
    if text.endswith("/"):
        raise ValueError(f"{text!r} is the path of a folder and must be a file's")
    return path


def _read_some_path(text: str) -> Path | None:
    return _read_path(text) if text else None


def _read_some_endpoint(text: str) -> Path | None:
    return endpoint_path(text) if text else None


def _read_group(text: str) -> str:
    # Device-mapper's names of such a group's volumes would be those of our mappings.
    if text and (not _GROUP_NAME.fullmatch(text) or text in (".", "..", "luks") or text.startswith("luks-")):
        raise ValueError(
            f"{text!r} must be the name of a volume group of at most 40 letters, digits, '_', '.', '+' and '-', and "
            f"not 'luks' or one that begins with 'luks-'"
        )
    return text


def _seconds(least: int) -> Callable[[str], float]:
    def read(text: str) -> float:
        seconds = float(text) if re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,6})?", text) else -1.0
        if not least <= seconds <= _LONGEST_SECONDS:
            raise ValueError(f"{text!r} must be a number of seconds from {least} to {_LONGEST_SECONDS}")
        return seconds

    return read


def _number(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise ValueError(f"{text!r} must be a whole number from {least} to {most}")
        return int(text)

    return read


def _read_truth(text: str) -> bool:
    return _one_of(("true", "false"))(text) == "true"


def _one_of(allowed: Iterable[str]) -> Callable[[str], str]:
    names = tuple(map(str, allowed))

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"{text!r} must be one of {', '.join(names)}")
        return text

    return read


def _read_memory(text: str) -> int:
    kib, rest = divmod(read_size(text), 1 << 10)
    if rest or not 32 <= kib <= 4 << 20:
        raise ValueError(f"{text!r} must be whole KiB, from 32Ki to 4Gi (what Argon2 takes in LUKS2)")
    return kib


def _read_address(text: str) -> str | None:
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


def _read_log_format(text: str) -> LogFormat:
    return LogFormat(_one_of(LogFormat)(text))


_levels = _one_of(LEVELS)
_OPTIONS = (
    setting("--endpoint", "endpoint", endpoint_path, "SOCKET", Settings.endpoint, "Where to listen."),
    setting("--node-id", "node_id", read_node_id, "NAME", "", "This node; without it, the host's name."),
    setting("--driver-name", "driver_name", read_driver_name, "NAME", Settings.driver_name, "Its name in Kubernetes."),
    setting("--services", "services", _read_services, "LIST", ",".join(Service), "What to serve; identity always is."),
    setting("--state-dir", "state_dir", _read_folder, "FOLDER", Settings.state_dir, "Where volumes and records live."),
    setting("--require-mount", "require_mount", _read_truth, "true|false", "false", "Refuse to start unless the state "
            "directory is a mount of the node.", is_flag=False, flag_value="true"),
    setting("--kubelet-dir", "kubelet_dir", _read_folder, "FOLDER", Settings.kubelet_dir, "Kubelet's own folder."),
    setting("--backend", "backend", _one_of(BACKENDS), "NAME", Settings.backend, "What keeps the ciphertext."),
    setting("--volume-group", "volume_group", _read_group, "NAME", "", "The LVM volume group of the backend lvm."),
    setting("--thin-pool-limit", "thin_pool_limit", _number(1, 100), "PERCENT", Settings.thin_pool_limit, "How full a "
            "thin pool may be for new volumes and growth."),
    setting("--free-space-floor", "free_space_floor", read_size, "SIZE", "1Gi", "Space that new volumes leave free."),
    setting("--threads", "threads", _number(1, 256), "NUMBER", Settings.threads, "Calls at work at once."),
    setting("--grace-seconds", "grace_seconds", _seconds(0), "SECONDS", Settings.grace_seconds, "Time for calls in "
            "flight when the server is told to stop."),
    setting("--log-format", "log_format", _read_log_format, "|".join(LogFormat), Settings.log_format, "auto: text on a "
            "terminal, json else."),
    setting("--log-level", "log_level", _levels, "|".join(LEVELS), Settings.log_level, "The least to be told."),
    setting("--http-address", "http_address", _read_address, "HOST:PORT", "", "Where to show /healthz, /readyz and "
            "/metrics, if at all."),
    setting("--kms-config", "kms_config", _read_path, "FILE", Settings.kms_config, "The KMS configuration, by ids."),
    setting("--kms-programs", "kms_programs", _read_folder, "FOLDER", Settings.kms_programs, "Programs that a KMS of "
            "type exec may be."),
    setting("--audit-file", "audit_file", _read_some_path, "FILE", "", "Where each use of a key is told too, if at "
            "all."),
    setting("--addons-endpoint", "addons_endpoint", _read_some_endpoint, "SOCKET", "", "Where to serve CSI-Addons, if "
            "at all."),
    setting("--format-seconds", "format_seconds", _seconds(1), "SECONDS", Limits.format_seconds, "Limit of luksFormat "
            "and mkfs."),
    setting("--unlock-seconds", "unlock_seconds", _seconds(1), "SECONDS", Limits.unlock_seconds, "Limit of one key "
            "derivation."),
    setting("--mount-seconds", "mount_seconds", _seconds(1), "SECONDS", Limits.mount_seconds, "Limit of mount and "
            "umount."),
    setting("--pbkdf-memory-limit", "pbkdf_memory_kib", _read_memory, "SIZE", f"{Limits.pbkdf_memory_kib}Ki", "The "
            "most memory that a key derivation may take."),
    setting("--unlocks-at-once", "unlocks_at_once", _number(1, 64), "NUMBER", Limits.unlocks_at_once, "Key "
            "derivations at work at once."),
)  # fmt: skip


@click.command(params=list(_OPTIONS))
def serve(**options: Any) -> None:
    """Serve the CSI services on a unix socket until SIGTERM; every option can come from the environment too."""
    harden_process()
    settings = settings_of(options)
    if settings.addons_endpoint == settings.endpoint:
        raise click.UsageError("--addons-endpoint and --endpoint name one socket; give each of them its own")
    if (settings.backend == "lvm") != bool(settings.volume_group):
        raise click.UsageError("--backend lvm and --volume-group belong together; give both or none of them")
    configure_logs(settings.log_format, settings.log_level)
    # Our own part first: it starts the worker launcher, which loads while grpcio does.
    with loading():
        from csi_driver.volumes.driver import build_driver

    driver = build_driver(settings)
    try:
        driver.start()
        with loading():
            from csi_driver.rpc.server import driver_server, serve_until_told

        all_ended = serve_until_told(driver_server(driver), driver.warm_up)
    finally:
        driver.stop()
    if not all_ended:
        # Threads of calls that outlived the grace time would keep the interpreter; their workers hold the locks.
        os._exit(0)


def settings_of(options: dict[str, Any]) -> Settings:
    """The settings of a command line; its option names are fields of Settings and Limits."""
    names = {field.name for field in dataclasses.fields(Limits)}
    limits = Limits(**{name: value for name, value in options.items() if name in names})
    chosen = {name: value for name, value in options.items() if name not in names}
    return Settings(**chosen, limits=limits)


def settings_params(*fields: str) -> list[click.Parameter]:
    """Some of the options of `serve`: the same names, variables and defaults."""
    return [parameter for parameter in serve.params if parameter.name in fields]
