"""`luks-csi recover` and `luks-csi volume restore-header`: what is left of a volume, opened and mended by hand."""

import re
from pathlib import Path
from typing import Any

import click

from csi_driver.cli.beside import PARAMS, BesideServer
from csi_driver.cli.local import local_driver
from csi_driver.cli.logs import configure_logs
from csi_driver.cli.names import volume_names
from csi_driver.cli.output import confirm, show_text
from csi_driver.cli.secret_files import SecretSource, secret_options
from csi_driver.cli.serve import settings_params
from csi_driver.keys.secret import read_secret
from csi_driver.model.errors import NotFound
from csi_driver.model.settings import Limits, LogFormat, Settings

_LIMITS = ("unlock_seconds", "mount_seconds", "pbkdf_memory_kib")
_NAME = re.compile(r"[A-Za-z0-9+_.:][A-Za-z0-9+_.:-]{0,126}")  # what cryptsetup and dmsetup take as it is
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(params=settings_params("kms_config", "kms_programs", "audit_file", *_LIMITS))
@click.argument("device", type=click.Path(exists=True, path_type=Path))
@click.argument("name")
@click.option("--header", type=_FILE, help="A copy of the header, header.luks2 of the volume; else the device's own.")
@click.option("--read-only", is_flag=True, help="So that nothing in it can be changed.")
@secret_options
@click.pass_context
def recover(
    context: click.Context, /, device: Path, name: str, header: Path | None, *, read_only: bool, **given: Any
) -> None:
    """Open what is left of a volume as /dev/mapper/NAME: DEVICE is its device, or the file below it (disk.img).

    Neither Kubernetes nor a server nor the volume's record is needed. The key comes from the passphrase that is given,
    else from the KMS that the header names, by --kms-config. Close it with `cryptsetup close NAME`.
    """
    from csi_driver.volumes.driver import build_driver

    configure_logs(LogFormat.AUTO, "warning")
    secret = SecretSource(given.pop("secret_dir"), given.pop("passphrase_file"))
    if not _NAME.fullmatch(name) or name in (".", "..", "control"):
        raise click.BadParameter(
            f"{name!r} cannot be the name of a mapping: 1 to 127 letters, digits and + _ . : -, the first one no -.",
            context,
        )
    limits = Limits(**{field: given.pop(field) for field in _LIMITS})
    driver = (context.obj or build_driver)(Settings(**given, limits=limits))
    try:
        key = read_secret(secret.read(f"Passphrase of {device}"))
        path = driver.offline().recovery.open(device.absolute(), name, header, key, read_only=read_only)
    finally:
        driver.stop()
    show_text(f"{device} is open as {path}; close it with `cryptsetup close {name}`")


@click.command(
    "restore-header",
    cls=BesideServer,
    params=[*PARAMS, *settings_params("kms_config", "kms_programs", "audit_file", *_LIMITS)],
)
@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
@click.option("--from", "copy", type=_FILE, help="The copy; else the one that the driver keeps with the volume.")
@click.option("--force", is_flag=True, help="Write it without a key that opens it.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@secret_options
@click.pass_context
def restore_header(
    context: click.Context, /, volume_id: str, copy: Path | None, *, force: bool, yes: bool, **given: Any
) -> None:
    """Write a copy of its LUKS2 header back to a volume that is not staged; on its node, without a server.

    Only a copy of this very volume: the LUKS UUID, the digest of the volume key and the sizes must be the recorded
    ones, and the volume's key, of its KMS or the passphrase that is given, must open it. The header that is there is
    kept. A key slot that was removed since the copy was made opens the volume again.
    """
    secret = SecretSource(given.pop("secret_dir"), given.pop("passphrase_file"))
    with local_driver(context, given) as driver:
        if not driver.backend.has(volume_id):
            raise NotFound(f"volume {volume_id} does not exist in {driver.settings.state_dir}")
        confirm(f"Write a copy of its header over that of volume {volume_id}?", yes=yes)
        key = read_secret(secret.read(f"Passphrase of volume {volume_id}"))
        with driver.locks.hold(volume_id):
            source = copy or driver.backend.header_copy(volume_id)
            kept = driver.offline().recovery.restore_header(volume_id, source, key, force=force)
    show_text(f"the header of volume {volume_id} is the copy's again")
    if kept is not None:
        show_text(f"the header that it had is in {kept}, until its key is changed or it is deleted")
