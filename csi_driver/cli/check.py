"""`luks-csi volume check`: a closed volume's file system, checked and mended; needs no server."""

from typing import Any

import click

from csi_driver.cli.local import local_driver
from csi_driver.cli.names import volume_names
from csi_driver.cli.output import OUTPUT_OPTION, Output, confirm, show_json, show_text
from csi_driver.cli.secret_files import SecretSource, read_for_volume, secret_options
from csi_driver.cli.serve import settings_params
from csi_driver.keys.secret import read_secret
from csi_driver.model.volume import is_volume_id

_LIMITS = ("unlock_seconds", "mount_seconds", "pbkdf_memory_kib")
_SETTINGS = ("state_dir", "kms_config", "kms_programs", "audit_file", *_LIMITS)
_HOUR = 3600.0


@click.command(params=[*settings_params(*_SETTINGS), OUTPUT_OPTION])
@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
@click.option("--repair", is_flag=True, help="Mend what is found, as far as the file system's program can.")
@click.option("--seconds", type=click.FloatRange(1, 30 * 24 * _HOUR), default=24 * _HOUR, show_default=True,
              help="Time limit of each run of that program.")  # fmt: skip
@click.option("--yes", is_flag=True, help="Do not ask before a repair.")
@secret_options
@click.pass_context
def check(context: click.Context, /, volume_id: str, output: str, *, repair: bool, yes: bool, **given: Any) -> None:
    """Check the file system of a volume that is not staged, on its node and without a server.

    It is opened with the secret, looked at by e2fsck, xfs_repair or btrfs check, and closed again; nothing in it is
    changed without --repair. The exit code is 0 when it is well or mended, 1 when it is damaged.
    """
    if not is_volume_id(volume_id):
        raise click.BadParameter(f"{volume_id!r} is no id of a volume.", context)
    seconds: float = given.pop("seconds")
    secret = SecretSource(given.pop("secret_dir"), given.pop("passphrase_file"))
    if repair:
        question = (
            f"Mend the file system of volume {volume_id}? It may cost what is damaged: have a backup of disk.img."
        )
        confirm(question, yes=yes)
    with local_driver(context, given) as driver:
        record = driver.backend.get(volume_id)  # before a lock is made for what is not there
        encrypted = record.encryption is not None
        key = read_secret(read_for_volume(secret, volume_id, encrypted=encrypted, required=record.key is None))
        with driver.locks.hold(volume_id):
            checked = driver.offline().checking.check(volume_id, key, repair=repair, seconds=seconds)
    if output == Output.JSON:
        show_json(checked)
    else:
        for line in checked.said.splitlines():
            show_text(line)
        show_text(_SENTENCES[checked.verdict].format(fs_type=checked.fs_type, volume_id=volume_id))
    if checked.verdict == "damaged":
        context.exit(1)


_SENTENCES = {
    "well": "the {fs_type} file system of volume {volume_id} is well",
    "mended": "the {fs_type} file system of volume {volume_id} was mended; look for lost files in lost+found",
    "damaged": "the {fs_type} file system of volume {volume_id} is DAMAGED; read what is said above, back the volume "
    "up and run this with --repair, or restore a backup where that did not help",
}
