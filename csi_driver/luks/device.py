"""Work on a volume's LUKS2 device. Each function is one operation of a worker process (csi_driver.host.workers).

`where` names volume and device in errors, such as "volume pvc-1 on /dev/loop3".
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct

from csi_driver.host import blockdev, keyring
from csi_driver.host.devicemapper import DeviceMapper, Target
from csi_driver.host.handle import Handle
from csi_driver.luks import libcryptsetup
from csi_driver.luks.blank import prove_unwritten
from csi_driver.luks.formats import LuksFormat
from csi_driver.luks.header import HEADER_PROBE, Header, parse, repaired
from csi_driver.luks.header_rules import Limits, validate
from csi_driver.luks.key_proof import is_key_of
from csi_driver.luks.libcryptsetup import CryptDevice, crypt_device
from csi_driver.model.errors import (
    DeviceInUse,
    DeviceShort,
    DeviceUnreadable,
    FailedPrecondition,
    InvalidHeader,
    KeyNeeded,
)
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import LuksIdentity

UUID_PREFIX = "CRYPT-LUKS2-"
ALL_KEYS = "cryptsetup:"
"""How the names of all volume keys in keyrings begin."""
_SECTOR = 512
_LONGEST_BLOCK = 4096
_USUAL_HEADER = 64 * 1024
_FORMATTED_SLOTS = (0,)
_CLAIM_TRIES, _CLAIM_PAUSE = 10, 0.05
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Opening(Struct, frozen=True):
    """How a mapping is opened: its name and the StorageClass's flags."""

    name: str
    discard: bool = False
    no_read_workqueue: bool = False
    no_write_workqueue: bool = False

    def target(self, number: tuple[int, int], device_bytes: int, identity: LuksIdentity) -> Target:
        """The table of the mapping on that device: all that lies behind the header, in whole sectors of the volume."""
        payload = device_bytes - identity.data_offset
        end = payload - payload % identity.sector_size
        return self.segment(number, identity, volume_key_name(identity.uuid), 0, end)

    def segment(self, number: tuple[int, int], identity: LuksIdentity, key_name: str, start: int, end: int) -> Target:
        """The part of a mapping from byte `start` to `end` that lies, at the same place, on that device."""
        options = [
            name
            for name, wanted in (
                ("allow_discards", self.discard),
                ("no_read_workqueue", self.no_read_workqueue),
                ("no_write_workqueue", self.no_write_workqueue),
                (f"sector_size:{identity.sector_size}", identity.sector_size != _SECTOR),
            )
            if wanted
        ]
        key = f":{identity.key_bits // 8}:logon:{key_name}"
        major, minor = number
        first = start // _SECTOR
        words = [
            identity.cipher, key, str(first), f"{major}:{minor}", str(identity.data_offset // _SECTOR + first),
        ]  # fmt: skip
        if options:
            words += [str(len(options)), *options]
        return Target(first, end // _SECTOR - first, "crypt", " ".join(words))


def dm_uuid(name: str, uuid: str) -> str:
    """The device-mapper UUID of a LUKS2 mapping, as libcryptsetup gives it."""
    return f"{UUID_PREFIX}{uuid.replace('-', '')}-{name}"


def volume_key_name(uuid: str) -> str:
    """Description under which libcryptsetup keeps the key of a device's data segment in keyrings."""
    return f"{key_prefix(uuid)}d0"


def key_prefix(uuid: str) -> str:
    """How the names of all keys of a device in keyrings begin."""
    return f"{ALL_KEYS}{uuid}-"


def key_name_of(target: Target) -> str:
    """The name of the key that a crypt target uses; "" for one that was not opened by a keyring."""
    _, _, name = target.params.split(" ")[1].partition(":logon:")
    return name


def format_device(
    where: str,
    device: Handle,
    size: int,
    chosen: LuksFormat,
    identity: LuksIdentity,
    limits: Limits,
    passphrase: Passphrase,
    storage: Handle,
    token: bytes | None = None,
) -> str:
    """luksFormat, and proof that it is whole: header valid, one key slot, our passphrase opens it, all of it fsynced.

    Asks once more that the device holds nothing but, perhaps, an earlier try at this very header; `storage` as in
    `prove_unwritten`. `token` goes into the header too (`key_token.encode`). Returns the hexadecimal digest of the
    volume key, to be pinned. Errors as `prove_unwritten` and `open_device`.
    """
    prove_unwritten(where, device, size, identity.uuid, storage)
    with crypt_device(where, device.path) as context:
        context.format(chosen, identity.uuid, passphrase)
        if token is not None:
            context.set_token(token)
    blockdev.fsync_device(device)
    with _header_copy(where, device, identity, size, limits, _FORMATTED_SLOTS) as (copy, header):
        with crypt_device(where, device.path, copy) as context:
            context.load()
            context.unlock(passphrase)
        return header.key_digest


def open_device(
    where: str,
    device: Handle,
    size: int,
    identity: LuksIdentity,
    limits: Limits,
    passphrase: Passphrase,
    opening: Opening,
) -> keyring.KeptKey:
    """Validate the header, unlock it and open the mapping; the volume key stays in root's user keyring for resizing.

    Returns where, to be pinned. Only a sealed copy of the header is ever shown to libcryptsetup, so that it cannot
    change after it was checked. The table is ours, as cryptsetup writes it: it names the very device that is open here.
    Raises DeviceBlank, ForeignSignature, InvalidHeader, DeviceShort, DeviceUnreadable, Unauthenticated, DeviceInUse.
    """
    _refuse_claimed(where, device)
    with checked(where, device, identity, size, limits) as context:
        context.unlock(passphrase, libcryptsetup.KEYRING_KEY)
    found = blockdev.size_bytes(device.fd)
    DeviceMapper().create(
        opening.name, dm_uuid(opening.name, identity.uuid), [opening.target(device.number, found, identity)]
    )
    return keyring.link_to_user(volume_key_name(identity.uuid))


def _refuse_claimed(where: str, device: Handle) -> None:
    """Raise DeviceInUse where somebody has the device for himself: device-mapper makes a second mapping all the same.

    Who only looks whether it is so has it for a moment.
    """
    for left in reversed(range(_CLAIM_TRIES)):
        if not blockdev.is_claimed(device):
            return
        if left:
            time.sleep(_CLAIM_PAUSE)
    who = " and ".join(blockdev.on_top_of(device.number)) or "a mount, or a program"
    raise DeviceInUse(
        f"{where} cannot be opened: {who} has the device for itself, and both would write to it; end that first"
    )


def put_key(context: CryptDevice, passphrase: Passphrase, key_name: str) -> None:
    """Put the volume key that `passphrase` opens into the calling thread's keyring, by that name.

    libcryptsetup's own way has one name for it. Raises Unauthenticated.
    """
    key = context.volume_key(passphrase)
    try:
        keyring.add_to_thread(key_name, key)
    finally:
        key[:] = bytes(len(key))


def check_passphrase(
    where: str, device: Handle, size: int, identity: LuksIdentity, limits: Limits, passphrase: Passphrase
) -> None:
    """Validate the header and try the passphrase, opening nothing. Errors as `open_device`."""
    with checked(where, device, identity, size, limits) as context:
        context.unlock(passphrase)


def resize_mapping(
    where: str,
    device: Handle,
    name: str,
    size: int,
    identity: LuksIdentity,
    limits: Limits,
    passphrase: Passphrase | None,
    pinned: keyring.KeptKey | None = None,
) -> None:
    """Let the open mapping `name` show at least `size` bytes (its device is longer by the data offset).

    The table is loaded again with the key by reference; dm-crypt finds the key in this thread's keyring, where it
    comes from root's user keyring or, where that has lost it or holds another one, from the passphrase. `pinned` is
    what `open_device` returned. Raises FailedPrecondition without a key that is proven to be the mapping's.
    """
    needed = size + identity.data_offset
    found = blockdev.size_bytes(device.fd)
    if found < needed:
        raise DeviceShort(f"{where} is {found} bytes long and {needed} are needed for its new size; check the storage")
    mapper = DeviceMapper()
    mapping = mapper.get(name)
    if mapping is None:
        raise FailedPrecondition(f"the mapping {name} of {where} is not open; stage the volume first")
    (target,) = mapping.targets
    if target.length * _SECTOR >= size:
        return  # a growth that was cut may have left the device longer than recorded: what was shown is never taken
    key_name = key_name_of(target)
    kept = keyring.link_into_thread(key_name, pinned)
    if kept is None or not is_key_of(where, mapper, mapping):
        if passphrase is None:
            fault = (
                "its volume key is not in the kernel's keyring"
                if kept is None
                else "the key in the kernel's keyring is not its volume key, somebody has put it there"
            )
            raise KeyNeeded(
                f"{where} cannot be enlarged while it is open: {fault} and the request brought no secret; unstage and "
                f"stage the volume, or name a node-expand secret in its StorageClass"
            )
        keyring.clear_thread()
        with checked(where, device, identity, found, limits) as context:
            put_key(context, passphrase, key_name)
        if not is_key_of(where, mapper, mapping):
            raise FailedPrecondition(
                f"{where} cannot be enlarged while it is open: the volume key in its LUKS2 header is not that of its "
                f"mapping {name}; unstage and stage the volume"
            )
    # A device with blocks of 4096 bytes takes no table that ends in the middle of one.
    payload = found - identity.data_offset
    end = min(-(-size // _LONGEST_BLOCK) * _LONGEST_BLOCK, payload - payload % identity.sector_size)
    mapper.reload(name, [Target(target.start, end // _SECTOR, target.type, target.params)])


def read_header(where: str, device: str | os.PathLike[str], changed_from: str | None = None) -> tuple[bytes, Header]:
    """Read and parse the header of a device or file: its bytes as far as they matter, and what they say (`parse`).

    Raises DeviceUnreadable, DeviceBlank, ForeignSignature, InvalidHeader.
    """
    area = read_area(where, device, 0, _USUAL_HEADER)
    try:
        return area, parse(area, where, changed_from)
    except InvalidHeader:
        # A damaged primary copy: the secondary one may lie anywhere up to 4 MiB.
        area = read_area(where, device, 0, HEADER_PROBE)
        return area, parse(area, where, changed_from)


@contextmanager
def checked(where: str, device: Handle, identity: LuksIdentity, size: int, limits: Limits) -> Iterator[CryptDevice]:
    """The library's context on a validated copy of the header. Errors as `open_device`."""
    copied = _header_copy(where, device, identity, size, limits)
    with copied as (copy, _), crypt_device(where, device.path, copy) as context:
        context.load()
        yield context


@contextmanager
def _header_copy(
    where: str,
    device: Handle,
    identity: LuksIdentity,
    size: int,
    limits: Limits,
    keyslots: tuple[int, ...] | None = None,
) -> Iterator[tuple[str, Header]]:
    """A sealed copy of the header in memory, validated: its path below /proc/self/fd and what it says."""
    area, header = read_header(where, device)
    found = blockdev.size_bytes(device.fd)
    if found < size:
        raise DeviceShort(f"{where} is {found} bytes long and {size} are recorded; check the storage below it")
    validate(header, identity, found, where, limits=limits, keyslots=keyslots)
    with header_in_memory(where, device, area, header, identity.data_offset) as copy:
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, SEALS)
        yield f"/proc/self/fd/{copy}", header


@contextmanager
def header_in_memory(where: str, device: Handle, area: bytes, header: Header, length: int) -> Iterator[int]:
    """A memfd of `length` bytes with that header, both copies as they were parsed, and the areas of its key slots."""
    copy = os.memfd_create("luks-header", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(copy, length)
        write_at(copy, repaired(area, header)[: 2 * header.hdr_size], 0)
        for slot in header.keyslots.values():
            write_at(copy, read_area(where, device, slot.area.offset, slot.area.size), slot.area.offset)
        yield copy
    finally:
        os.close(copy)


def read_area(where: str, device: str | os.PathLike[str], offset: int, size: int) -> bytes:
    """Bytes of a device or file. Raises DeviceUnreadable."""
    try:
        with open(device, "rb", buffering=0) as opened:
            return blockdev.read_at(opened.fileno(), offset, size)
    except OSError as error:
        raise DeviceUnreadable(
            f"the LUKS2 header of {where} cannot be read ({error.strerror}); look at the kernel log and the storage"
        ) from None


def write_at(descriptor: int, content: bytes, offset: int) -> None:
    """Write all of `content`. Raises OSError."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
