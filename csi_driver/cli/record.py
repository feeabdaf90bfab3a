"""What is recorded of a volume on this node, for `luks-csi volume show`."""

from pathlib import Path

from csi_driver.cli.output import size_text
from csi_driver.model.errors import DriverError, NotFound
from csi_driver.model.settings import Settings
from csi_driver.model.volume import EncryptionState, FileSystemState, VolumeRecord

_ENCRYPTION = {
    EncryptionState.PREPARED: "prepared: the first stage formats it",
    EncryptionState.FORMATTING: "formatting: the next stage goes on with it",
    EncryptionState.CLONING: "cloning: the next creation or stage goes on with it",
    EncryptionState.ENCRYPTED: "encrypted",
}
_FILE_SYSTEM = {
    FileSystemState.NONE: "none yet",
    FileSystemState.MAKING: "being made: the next stage goes on with it",
    FileSystemState.RAW: "never made by this driver, the volume was used as a block device or comes from an image",
}


def read_record(volume_id: str, state_dir: Path) -> tuple[VolumeRecord | None, str]:
    """The record, or None; and in words where it comes from or why there is none."""
    from csi_driver.volumes.driver import build_driver

    try:
        record = build_driver(Settings(state_dir=state_dir)).backend.get(volume_id)
    except NotFound:
        return None, f"not shown: {state_dir} holds no such volume; name the server's --state-dir, on its node"
    except PermissionError:
        return None, f"not shown: {state_dir} may not be read; run this as root"
    except (DriverError, OSError) as error:
        return None, f"not shown: {error}"
    return record, f"read from {state_dir}"


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
    made = record.made_fs_type if record.file_system is FileSystemState.MADE else None
    if record.parameters.backing_image:
        rows.append(("image", record.parameters.backing_image))
    rows.append(("file system", made or _FILE_SYSTEM[record.file_system]))
    if record.parameters.claim:
        rows.append(("claim", record.parameters.claim))
    return [*rows, ("created", record.created)]
