"""What is recorded of a volume on this node: shown by `luks-csi volume show`, and taken for the newest there is."""

from typing import Any

import click

from csi_driver.cli.local import local_driver
from csi_driver.cli.names import volume_names
from csi_driver.cli.output import OUTPUT_OPTION, Output, confirm, show_json, show_text, size_text
from csi_driver.cli.serve import settings_params
from csi_driver.model.errors import NotFound
from csi_driver.model.volume import EncryptionState, FileSystemState, Move, MovePhase, VolumeRecord, is_volume_id

_ENCRYPTION = {
    EncryptionState.PREPARED: "prepared: the first stage formats it",
    EncryptionState.FORMATTING: "formatting: the next stage goes on with it",
    EncryptionState.CLONING: "cloning: the next creation or stage goes on with it",
    EncryptionState.ENCRYPTED: "encrypted",
}
_MOVE = {
    MovePhase.LEAVING: "being copied to {}; it is here until that has ended",
    MovePhase.LEFT: "to {}; what is here is its old copy",
    MovePhase.ARRIVED: "copied here from {}; the same command once more ends it",
}
_FILE_SYSTEM = {
    FileSystemState.NONE: "none yet",
    FileSystemState.MAKING: "being made: the next stage goes on with it",
    FileSystemState.RAW: "never made by this driver, the volume was used as a block device or comes from an image",
}


def record_rows(record: VolumeRecord) -> list[tuple[str, str]]:
    """The record for people."""
    rows = [("encryption", _ENCRYPTION[record.encryption] if record.encryption else "none")]
    if record.luks is not None:
        luks = record.luks
        rows += [
            ("LUKS UUID", luks.uuid),
            ("cipher", f"{luks.cipher}, key of {luks.key_bits} bits, sectors of {luks.sector_size} bytes"),
            ("data offset", size_text(luks.data_offset)),
        ]
    if record.conversion is not None:
        rows.append(("volume key", f"moved to another one, {record.percent_moved} %"))
    if record.move is not None:
        rows.append(("moved", _moved(record.move)))
    made = record.made_fs_type if record.file_system is FileSystemState.MADE else None
    if record.parameters.backing_image:
        rows.append(("image", record.parameters.backing_image))
    rows.append(("file system", made or _FILE_SYSTEM[record.file_system]))
    if record.parameters.claim:
        rows.append(("claim", record.parameters.claim))
    return [*rows, ("created", record.created)]


def _moved(move: Move) -> str:
    if move.phase is MovePhase.ARRIVING:
        return f"being copied here from {move.other}, {move.copied.end * 100 // max(move.size, 1)} %"
    return _MOVE[move.phase].format(move.other)


def _question(volume_id: str, coming: VolumeRecord | None) -> str:
    if coming is None or coming.move is None:
        return f"Take the record of volume {volume_id} that is there, though a newer one was written?"
    where = f"{coming.move.other} of node {coming.move.node}" if coming.move.node else coming.move.other
    return (
        f"Volume {volume_id} came from {where}, which does not say that it has left: is that lost, or will it never be "
        f"used again?"
    )


@click.command("accept-record", params=[*settings_params("state_dir"), OUTPUT_OPTION])
@click.argument("volume_id", metavar="VOLUME", shell_complete=volume_names)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def accept_record(context: click.Context, /, volume_id: str, output: str, *, yes: bool, **given: Any) -> None:
    """Take a volume's record from a backup, though a newer one was written; on its node, without a server.

    Only one by which nothing would be formatted: encrypted or plain, with a file system or used as a block device.

    And take a volume that was moved to the driver here, and whose old node was lost before it could say so.
    """
    from csi_driver.volumes.moved import arrived, take

    if not is_volume_id(volume_id):
        raise click.ClickException(f"{volume_id!r} is no volume's id")
    with local_driver(context, given) as driver:
        if not driver.backend.has(volume_id):
            raise NotFound(f"volume {volume_id} does not exist in {driver.settings.state_dir}")
        confirm(_question(volume_id, arrived(driver.backend, volume_id)), yes=yes)
        with driver.locks.hold(volume_id):
            coming = arrived(driver.backend, volume_id)
            record = take(driver.backend, coming) if coming else driver.backend.accept_record(volume_id)
    if output == Output.JSON:
        show_json(record)
    else:
        show_text(f"the record of volume {volume_id} with revision {record.revision} counts from now on")
