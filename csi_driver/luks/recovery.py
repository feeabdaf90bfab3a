"""Volumes whose header or record is lost: a copy of the header put back, or used in its place. Runs in workers."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from msgspec import Struct

from csi_driver.host import blockdev
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.files import Files
from csi_driver.host.handle import Handle, open_handle
from csi_driver.host.syscalls import error_name
from csi_driver.luks import key_token
from csi_driver.luks.cloned import length_of, write_errors
from csi_driver.luks.device import SEALS, Opening, dm_uuid, header_in_memory, read_header
from csi_driver.luks.header import Header
from csi_driver.luks.header_rules import Limits, validate
from csi_driver.luks.image_header import identity_of
from csi_driver.luks.libcryptsetup import KEYRING_KEY, crypt_device
from csi_driver.luks.rekey import back_up_header, write_header
from csi_driver.model.errors import DeviceInUse, DeviceMismatch, DeviceShort, FailedPrecondition, InvalidHeader
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail, LuksIdentity


class Found(Struct, frozen=True):
    """What a header says: of its volume, and where the key comes from."""

    identity: LuksIdentity
    trail: KeyTrail | None


def look(where: str, header: Handle, limits: Limits) -> Found:
    """Read and check a header, of a device or a copy. Raises what `read_header` does, InvalidHeader."""
    area, found = read_header(where, header)
    identity = identity_of(where, found)
    validate(found, identity, identity.data_offset + identity.sector_size, where, limits=limits)
    return Found(identity, key_token.read(area, found))


def refuse_another(where: str, device: Handle, copy: str, identity: LuksIdentity) -> None:
    """Raise FailedPrecondition where the device's own header can be read and is not that of the volume of which `copy`
    is: by it the content is noise, and what is written over it is lost.
    """
    try:
        own = identity_of(where, read_header(where, device)[1])
    except (DeviceMismatch, InvalidHeader):
        return
    if own.uuid != identity.uuid:
        raise FailedPrecondition(
            f"{copy} is the header of another volume: it has the LUKS UUID {identity.uuid} and the header on {where} "
            f"{own.uuid}; nothing was opened, name the header of this one"
        )
    if own.digest != identity.digest:
        raise FailedPrecondition(
            f"{copy} has another volume key than the header on {where}, which was encrypted anew since; nothing was "
            f"opened, leave --header out or name a newer copy"
        )


def restore_header(
    where: str,
    device: Handle,
    size: int,
    identity: LuksIdentity,
    limits: Limits,
    path: str,
    passphrase: Passphrase | None,
    before: str,
) -> bool:
    """Write the copy at `path` to a device that nobody has open; whether the header that was there is at `before` now.

    It must be of this very volume: UUID, digest of the volume key, geometry; and `passphrase`, if there is one, must
    open it. What was there is kept where it can be read as a header. Raises what `read_header` does of the copy,
    ForeignSignature, InvalidHeader, Unauthenticated, DeviceShort, DeviceUnreadable, FailedPrecondition (`before` cannot
    be written).
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
            if passphrase is not None:
                with crypt_device(copy_where, f"/proc/self/fd/{memory}") as context:
                    context.load()
                    context.unlock(passphrase)
    kept = _keep(where, device, before)
    write_header(where, device, header.hdr_size, both, areas)
    _, written = read_header(where, device)
    validate(written, identity, found, where, limits=limits)
    return kept


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
    """Open a mapping of `device` by a header that lies elsewhere, or on it.

    Errors as `device.open_device`, and DeviceInUse where its volume was staged while the key was derived.
    """
    area, found = read_header(where, header)
    size = blockdev.size_bytes(device.fd)
    validate(found, identity, size, where, limits=limits)
    with header_in_memory(where, header, area, found, identity.data_offset) as memory:
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEALS)
        with crypt_device(where, device.path, f"/proc/self/fd/{memory}") as context:
            context.load()
            context.unlock(passphrase, KEYRING_KEY)
    table = [opening.target(device.number, size, identity)]
    mapper = DeviceMapper()
    made = mapper.create(opening.name, dm_uuid(opening.name, identity.uuid), table, read_only=read_only)
    if set(blockdev.on_top_of(device.number)) - {made.path}:
        mapper.remove(opening.name)
        raise DeviceInUse(f"{where} was opened by somebody else meanwhile, and was let go of; unstage its volume first")


def _keep(where: str, device: Handle, path: str) -> bool:
    """Keep the header of the device at `path`, durably, if it is one."""
    try:
        back_up_header(where, device, path)
        Files().sync_folder(Path(path).parent)
    except (DeviceMismatch, InvalidHeader):
        with suppress(OSError):
            os.unlink(path)
        return False
    except OSError as error:
        with suppress(OSError):
            os.unlink(path)
        raise FailedPrecondition(
            f"the header that {where} has cannot be kept at {path} ({error_name(error)}); nothing was written to it, "
            f"free space there"
        ) from None
    return True


def _areas(memory: int, header: Header) -> dict[int, bytes]:
    return {
        int(slot.area.offset): blockdev.read_at(memory, slot.area.offset, slot.area.size)
        for slot in header.keyslots.values()
    }
