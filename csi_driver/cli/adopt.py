"""`luks-csi volume adopt`: a LUKS2 volume of another driver, or made by hand, becomes one of ours."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from csi_driver.cli.beside import PARAMS, BesideServer
from csi_driver.cli.local import local_driver
from csi_driver.cli.output import OUTPUT_OPTION, Output, show_json, show_text, size_text
from csi_driver.cli.secret_files import SecretSource, secret_options
from csi_driver.cli.serve import settings_params
from csi_driver.keys.secret import read_secret
from csi_driver.model.volume import KeyTrail, VolumeRecord, volume_id_for

if TYPE_CHECKING:
    from csi_driver.volumes.driver import Driver
    from csi_driver.volumes.takeover import Takeover

_LIMITS = ("format_seconds", "unlock_seconds", "mount_seconds", "pbkdf_memory_kib")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _wrapped(file: Path) -> str:
    """A wrapped key as the other driver keeps it, which is text."""
    try:
        return file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        raise click.ClickException(
            f"the wrapped key cannot be read from {file}: it must be a readable file of text, as it is kept with the "
            f"volume; nothing was adopted"
        ) from None


@click.command(
    cls=BesideServer,
    params=[
        *PARAMS,
        *settings_params("free_space_floor", "kms_config", "kms_programs", "audit_file", *_LIMITS),
        OUTPUT_OPTION,
    ],
)
@click.argument("name")
@click.argument("source", metavar="FILE|VOLUMEHANDLE")
@click.option("--kms", "kms_id", metavar="ID", help="The KMS that has its key, by the id in --kms-config.")
@click.option("--kms-type", metavar="TYPE", help="The type of that KMS.")
@click.option(
    "--kms-name", metavar="NAME", default="", help="What the KMS knows the key by: the id it had as a volume."
)
@click.option("--wrapped", type=_FILE, help="The wrapped key, where the KMS does not keep it (rbd.csi.ceph.com/dek).")
@click.option(
    "--tenant", metavar="NAMESPACE", default="", help="The namespace of its claim, for a KMS that asks by it."
)
@click.option(
    "--share-key", "share", is_flag=True, help="Leave it the key that the KMS keeps for what FILE is a copy of."
)
@secret_options
@click.pass_context
def adopt(
    context: click.Context,
    /,
    name: str,
    source: str,
    kms_id: str | None,
    kms_type: str | None,
    kms_name: str,
    wrapped: Path | None,
    tenant: str,
    output: str,
    *,
    share: bool,
    **given: Any,
) -> None:
    """Make a volume NAME of a LUKS2 FILE: a backing file, or a copy of a device. Without a server, on the node.

    The file is copied and stays as it is. Its header must be one that this driver opens, and its key must open it. It
    comes from the passphrase that is given, or from a KMS. Where the KMS keeps it, the volume gets another one, as that
    one goes with what was copied.

    With the backend rbd, make one of the volume that Ceph-CSI calls VOLUMEHANDLE. Nothing is copied: its image gets
    another name, by which Ceph-CSI finds it no more. Where its key is the image tells.
    """
    from csi_driver.volumes.keys import SHARED, shares_key

    if volume_id_for(name) != name:
        raise click.BadParameter(f"{name!r} cannot be a volume's name here.", context)
    if (kms_id is None) is not (kms_type is None) or (kms_id is None and (wrapped or kms_name)):
        raise click.UsageError("--kms and --kms-type go together, and --kms-name and --wrapped with them.")
    secret = SecretSource(given.pop("secret_dir"), given.pop("passphrase_file"))
    trail = None
    if kms_id is not None and kms_type is not None:
        text = _wrapped(wrapped) if wrapped else ""
        trail = KeyTrail(kms_id=kms_id, type=kms_type, name=kms_name, wrapped=text, tenant=tenant)
    with local_driver(context, given) as driver:
        if (takeover := driver.offline().takeover) is None:
            made = _copied(driver, name, _FILE(source, ctx=context), secret, trail, share=share)
        elif trail or tenant:
            raise click.UsageError("The image tells where its key is: leave --kms and what belongs to it out.")
        else:
            made = _taken(driver, takeover, name, source, secret, share=share)
    if shares_key(made):
        show_text(f"warning: {SHARED.format(made.id)}", err=True)
    if output == Output.JSON:
        show_json(made)
    else:
        show_text(f"encrypted volume {made.id} of {size_text(made.capacity_bytes)} is there, with what is in {source}")


def _copied(
    driver: "Driver", name: str, file: Path, secret: SecretSource, trail: KeyTrail | None, *, share: bool
) -> VolumeRecord:
    from csi_driver.volumes.adoption import AdoptRequest

    key = read_secret(secret.read(f"Passphrase of {file}"))
    with driver.locks.hold(name):
        return driver.offline().adoption.adopt(AdoptRequest(name, file.absolute(), key, trail, share))


def _taken(
    driver: "Driver", takeover: "Takeover", name: str, handle: str, secret: SecretSource, *, share: bool
) -> VolumeRecord:
    from csi_driver.volumes.takeover import TakeoverRequest

    key = read_secret(secret.read(f"Passphrase of {handle}"))
    with driver.locks.hold(takeover.find(handle, name).volume_id):
        return takeover.take(TakeoverRequest(name, takeover.find(handle, name), key, share))
