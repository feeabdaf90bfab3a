"""Volumes whose header or record is lost: a copy of the header put back, or used in its place. Runs in workers."""

import fcntl
import os
from dataclasses import dataclass

from csi_driver.host import blockdev, keyring
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.handle import Handle, open_handle
from csi_driver.luks import key_token
from csi_driver.luks.cloned import length_of, write_errors
from csi_driver.luks.device import SEALS, Opening, dm_uuid, header_in_memory, read_header, volume_key_name
from csi_driver.luks.header import Header
from csi_driver.luks.header_rules import Limits, validate
from csi_driver.luks.image_header import identity_of
from csi_driver.luks.libcryptsetup import KEYRING_KEY, crypt_device
from csi_driver.luks.rekey import write_header
from csi_driver.model.errors import DeviceShort
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail, LuksIdentity


@dataclass(frozen=True)
class Found:
    """What a header says: of its volume, and where the key comes from."""

    identity: LuksIdentity
    trail: KeyTrail | None


def look(where: str, header: Handle, limits: Limits) -> Found:
    """Read and check a header, of a device or a copy. Raises what `read_header` does, InvalidHeader."""
    area, found = read_header(where, header)
    identity = identity_of(where, found)
    validate(found, identity, identity.data_offset + identity.sector_size, where, limits=limits)
    return Found(identity, key_token.read(area, found))


def restore_header(where: str, device: Handle, size: int, identity: LuksIdentity, limits: Limits, path: str) -> None:
    """Write the copy at `path` to a device that nobody has open.

    It must be of this very volume: UUID, digest of the volume key, geometry. Raises what `read_header` does of the
    copy, ForeignSignature, InvalidHeader, DeviceShort, DeviceUnreadable.
    """
    copy_where = f"the copy {path} of the header of {where}"
    with write_errors(where):
        found = length_of(device)
    if found < size:
        raise DeviceShort(f"{where} is {found} bytes long and {size} are recorded; check the storage below it")
    with open_handle(path, os.O_RDONLY) as copy:
        area, header = read_header(copy_where, copy)
        validate(header, identity, found, copy_where, limits=limits)
        with header_in_memory(copy_where, copy, area, header, identity.data_offset) as memory:
            both = blockdev.read_at(memory, 0, 2 * header.hdr_size)
            areas = _areas(memory, header)
    write_header(where, device, header.hdr_size, both, areas)
    _, written = read_header(where, device)
    validate(written, identity, found, where, limits=limits)


def open_with_header(
    where: str,
    device: Handle,
    header: Handle,
    identity: LuksIdentity,
    limits: Limits,
    passphrase: Passphrase,
    opening: Opening,
    *,
    read_only: bool,
) -> None:
    """Open a mapping of `device` by a header that lies elsewhere, or on it. Errors as `device.open_device`."""
    area, found = read_header(where, header)
    size = blockdev.size_bytes(device.fd)
    validate(found, identity, size, where, limits=limits)
    with header_in_memory(where, header, area, found, identity.data_offset) as memory:
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEALS)
        with crypt_device(where, device.path, f"/proc/self/fd/{memory}") as context:
            context.load()
            context.unlock(passphrase, KEYRING_KEY)
    table = [opening.target(device.number, size, identity)]
    DeviceMapper().create(opening.name, dm_uuid(opening.name, identity.uuid), table, read_only=read_only)
    keyring.link_to_user(volume_key_name(identity.uuid))


def _areas(memory: int, header: Header) -> dict[int, bytes]:
    return {
        int(slot.area.offset): blockdev.read_at(memory, slot.area.offset, slot.area.size)
        for slot in header.keyslots.values()
    }
