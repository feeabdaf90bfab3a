"""How large a volume becomes, and in sectors of which size; and how it grows."""

from typing import TYPE_CHECKING

import msgspec

from csi_driver.backends.base import Backend
from csi_driver.luks import formats
from csi_driver.model.errors import FailedPrecondition, InvalidArgument, OutOfRange
from csi_driver.model.volume import LuksIdentity, VolumeParameters, VolumeRecord
from csi_driver.volumes.filesystem import LEAST_BYTES
from csi_driver.volumes.from_image import BackingImage
from csi_driver.volumes.keyslots import device_size
from csi_driver.volumes.moved import refuse_away
from csi_driver.volumes.parameters import DEFAULT_FILE_SYSTEM, wants_small_blocks

if TYPE_CHECKING:
    from csi_driver.volumes.provision import CreateRequest

DEFAULT_BYTES = 1 << 30
_LEAST_BYTES = 1 << 20
LARGEST_BYTES = (1 << 63) - (1 << 30)
_LARGE_BLOCKS_FROM = 512 << 20  # where mke2fs chooses blocks of 4096 bytes by itself: mke2fs.conf(5), "small"


def grow_device(backend: Backend, record: VolumeRecord, required_bytes: int, limit_bytes: int) -> VolumeRecord:
    """Enlarge device and record to `required_bytes`, rounded up to the volume's sectors; returns the record.

    The device grows before the record says so: a crash between leaves a device that is too long, never one too short.
    """
    check_range(required_bytes, limit_bytes)
    refuse_away(record)
    capacity = _round_up(required_bytes, _sector(record.parameters, record.luks))
    if limit_bytes and max(capacity, record.capacity_bytes) > limit_bytes:
        raise OutOfRange(
            f"volume {record.id} cannot have at most {limit_bytes} bytes: it has {record.capacity_bytes} and "
            f"{required_bytes} are required"
        )
    _check_possible(capacity)
    if record.encryption is not None:
        formats.check_capacity(record.luks.cipher if record.luks else record.parameters.cipher or "", capacity)
    if capacity <= record.capacity_bytes:
        return record
    if record.conversion is not None:
        raise FailedPrecondition(
            f"volume {record.id} is being moved to another volume key and cannot be enlarged meanwhile; let luks-csi "
            f"volume reencrypt {record.id} run to its end on its node, then this succeeds"
        )
    grown = msgspec.structs.replace(record, capacity_bytes=capacity)
    header_to_come = formats.DATA_OFFSET if record.encryption and record.luks is None else 0
    backend.grow(record.id, device_size(grown) + header_to_come)
    return backend.update(grown)


def choose_sector(request: "CreateRequest", parameters: VolumeParameters) -> int | None:
    """The sector size of a class that names none: 4096 bytes where only a file system will see it (docs/benchmarks.md).

    A disk that was installed with blocks of 512 does not boot on larger ones. On larger ones there is no place for a
    file system with smaller blocks: those that were asked for, and those of a small ext4, which mke2fs gives blocks of
    1024 bytes, so that it has a second superblock to be mended from, nor for an exact size that is no multiple.
    """
    if parameters.sector_size is not None or not parameters.encrypted:
        return parameters.sector_size
    large, limit = formats.LARGE_SECTOR, request.limit_bytes
    is_for_files = not any(capability.block for capability in request.capabilities)
    size = _round_up(request.required_bytes or min(DEFAULT_BYTES, limit or DEFAULT_BYTES), large)
    fits = size >= _LARGE_BLOCKS_FROM and (not limit or not request.required_bytes or size <= limit)
    return large if is_for_files and fits and not wants_small_blocks(parameters.mkfs_options) else None


def choose_capacity(request: "CreateRequest", parameters: VolumeParameters, image: BackingImage | None) -> int:
    """Bytes that a pod will see of a new volume, of `image` where there is one. Raises OutOfRange."""
    required, limit = request.required_bytes, request.limit_bytes
    fs_types = {c.fs_type or parameters.fs_type or DEFAULT_FILE_SYSTEM for c in request.capabilities if not c.block}
    least = max([_LEAST_BYTES, *(LEAST_BYTES[fs_type] for fs_type in fs_types)])
    sector = _sector(parameters, image.luks if image else None)
    if image is not None:
        least = max(least, image.size)
        for wish in (required, limit):
            if 0 < wish < image.size:
                raise OutOfRange(
                    f"{image.where} has {image.size} bytes and the volume is to have {wish}; ask for one that holds "
                    f"the image"
                )
    capacity = _round_up(max(required or DEFAULT_BYTES, least), sector)
    if limit and not required:
        capacity = min(capacity, limit - limit % sector)
    if limit and not least <= capacity <= limit:
        raise OutOfRange(
            f"no size from {required} to {limit} bytes can be made: such a volume has at least {least} bytes, in "
            f"sectors of {sector}"
        )
    _check_possible(capacity)
    return capacity


def check_range(required: int, limit: int) -> None:
    """Raise InvalidArgument for a capacity range that holds nothing; 0 is not said."""
    if required < 0 or limit < 0 or (limit and required > limit):
        raise InvalidArgument(f"the capacity range from {required} to {limit} bytes is none")


def _check_possible(capacity: int) -> None:
    if capacity > LARGEST_BYTES:
        raise OutOfRange(f"{capacity} bytes are more than a device can have ({LARGEST_BYTES})")


def _sector(parameters: VolumeParameters, luks: LuksIdentity | None) -> int:
    if luks is not None:
        return luks.sector_size
    return parameters.sector_size or formats.LuksFormat.sector_size


def _round_up(size: int, sector: int) -> int:
    return -(-size // sector) * sector
