"""LUKS2 headers that come with somebody's data: an image's is asked what it is, a clone's gets a UUID of its own.

Each function is one operation of a worker process (`csi_driver.host.workers`).
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from csi_driver.host import blockdev
from csi_driver.host.clonefile import FileIdentity
from csi_driver.host.handle import Handle
from csi_driver.host.syscalls import error_name
from csi_driver.luks.device import read_header, write_at
from csi_driver.luks.header import repaired
from csi_driver.luks.header_metadata import Keyslot
from csi_driver.luks.header_rules import Limits, validate
from csi_driver.luks.image_header import read_image_header
from csi_driver.luks.libcryptsetup import crypt_device
from csi_driver.model.errors import DeviceShort, DeviceUnreadable, FailedPrecondition
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import LuksIdentity

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def check_image(
    where: str, file: FileIdentity, identity: LuksIdentity, limits: Limits, passphrase: Passphrase
) -> tuple[Keyslot, ...]:
    """Validate an image's header, and that `passphrase` opens it; returns its key slots.

    Raises FailedPrecondition when the header is not the recorded one, Aborted when the file is not the one that was
    seen, Unauthenticated, and what `read_image_header` raises.
    """
    descriptor = file.open(where)
    try:
        found = read_image_header(where, lambda at, length: blockdev.read_at(descriptor, at, length), file.size, limits)
    finally:
        os.close(descriptor)
    if found.identity != identity:
        raise FailedPrecondition(
            f"{where} is recorded with the LUKS UUID {identity.uuid} and its file has a header with UUID "
            f"{found.identity.uuid} that is not the recorded one; delete the image and import it anew"
        )
    with found.volume_key(passphrase):
        return tuple(found.header.keyslots.values())


def change_uuid(where: str, clone: Handle, size: int, old: str, identity: LuksIdentity, limits: Limits) -> None:
    """Give the header of a clone's file or device, of at least `size` bytes, the UUID of `identity`.

    The header may have `old` or, as a cut change leaves it, the new UUID in one copy or both; all else must be what
    `identity` says, before and after. Durable when this returns. libcryptsetup sees a copy in memory of what was
    checked. Raises DeviceShort, DeviceBlank, ForeignSignature (any other UUID), InvalidHeader, DeviceUnreadable,
    CommandFailed, OSError (ENOSPC, EDQUOT) when there is no room for a header of its own.
    """
    area, header = read_header(where, clone, old)
    with write_errors(where):
        found = length_of(clone)
    if found < size:
        raise DeviceShort(f"{where} is {found} bytes long and {size} are recorded; check the storage below it")
    expected = identity if header.uuid != old else msgspec.structs.replace(identity, uuid=old)
    validate(header, expected, found, where, limits=limits)
    length = header.hdr_size
    both = _with_uuid(where, repaired(area, header)[: 2 * length], identity)
    with write_errors(where):
        descriptor = os.open(clone, os.O_RDWR | os.O_CLOEXEC)
        try:
            for at in (0, length):  # one of the two copies is whole at any moment
                write_at(descriptor, both[at : at + length], at)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    _, header = read_header(where, clone)
    validate(header, identity, found, where, limits=limits)


@contextmanager
def write_errors(where: str) -> Iterator[None]:
    """Errors of a storage in a sentence, as DeviceUnreadable; what says that it is full goes on as it is."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise DeviceUnreadable(
            f"the LUKS2 header of {where} cannot be written ({error_name(error)}); look at the kernel log and the "
            f"storage"
        ) from None


def _with_uuid(where: str, both: bytes, identity: LuksIdentity) -> bytes:
    """Both copies of a header, with that UUID."""
    copy = os.memfd_create("luks-header", os.MFD_CLOEXEC)
    try:
        os.ftruncate(copy, identity.data_offset)
        write_at(copy, both, 0)
        with crypt_device(where, f"/proc/self/fd/{copy}") as device:
            device.load()
            device.set_uuid(identity.uuid)  # nothing is written where it is there already
        return blockdev.read_at(copy, 0, len(both))
    finally:
        os.close(copy)


def length_of(clone: Handle) -> int:
    """Bytes of a file or device. Raises OSError."""
    with open(clone, "rb", buffering=0) as file:
        return file.seek(0, os.SEEK_END)
