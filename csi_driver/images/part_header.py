"""The LUKS2 header of a part, and the cipher that its key makes."""

from csi_driver.images.checkpoint import Checkpoint
from csi_driver.images.target import Encryption, PartFile, Target, target_errors
from csi_driver.luks.bulk import SectorCipher, sector_cipher
from csi_driver.luks.formats import LuksFormat
from csi_driver.luks.image_header import VolumeKey, limits_of, read_image_header, write_image_header
from csi_driver.model.errors import FailedPrecondition, Unauthenticated
from csi_driver.model.volume import LuksIdentity


def cipher_of(chosen: LuksFormat, key: VolumeKey) -> SectorCipher:
    """What encrypts the sectors of a part. Raises as `sector_cipher`."""
    return sector_cipher(chosen.cipher, bytes(key.value), chosen.sector_size)


def unlock(
    where: str, target: Target, encryption: Encryption, part: PartFile, checkpoint: Checkpoint
) -> VolumeKey | None:
    """The volume key of a part that was begun; None where its header is not the one that `checkpoint` speaks of.

    `where` names the image. Raises Unauthenticated (another passphrase than the part's), TargetFailed.
    """
    unfinished = f"the unfinished copy of {where}"
    try:
        image = read_image_header(unfinished, part.read_at, part.size, limits_of(encryption.format))
    except FailedPrecondition:
        return None
    if image.identity != checkpoint.luks:
        return None
    try:
        return image.volume_key(encryption.passphrase)
    except Unauthenticated as error:
        name = target.folder.name
        raise Unauthenticated(f"{error}, or begin anew after luks-csi image delete {name}") from None


def write_header(where: str, target: Target, encryption: Encryption, payload: int, key: VolumeKey) -> LuksIdentity:
    """Make the header of a part that holds `payload` bytes under `key`, which is wiped; durable when this returns.

    Raises NoRoom, TargetFailed, and what `write_image_header` raises.
    """
    with key, target_errors(where, target.folder, "written"):
        return write_image_header(where, str(target.part), encryption.format, payload, encryption.passphrase, key)
