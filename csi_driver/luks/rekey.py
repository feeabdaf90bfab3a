"""Changes of a volume's header: another passphrase beside or in place of one, another token. Each runs in a worker.

libcryptsetup changes a copy in memory of the header that was checked. What comes of it is checked by the same rules and
then written in an order of our own: the area of a new key slot, then one copy of the header, then the other, each
fsynced. So one copy is whole at any moment, and no header names a key slot that is not there yet. What no key slot
names any more is overwritten behind that.
"""

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from msgspec import Struct

from csi_driver.host import blockdev
from csi_driver.host.handle import Handle
from csi_driver.luks import key_token
from csi_driver.luks.cloned import length_of, write_errors
from csi_driver.luks.device import header_in_memory, read_header, write_at
from csi_driver.luks.formats import LuksFormat
from csi_driver.luks.header import Header, parse
from csi_driver.luks.header_metadata import Keyslot
from csi_driver.luks.header_rules import Limits, validate
from csi_driver.luks.libcryptsetup import CryptDevice, crypt_device
from csi_driver.model.errors import DeviceShort, FailedPrecondition, Unauthenticated
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail, LuksIdentity, NamedSlot

_PIECE = 1 << 20


class Added(Struct, frozen=True):
    """A key slot that is to be added: that of the present passphrase, the new one, and of what header it was made."""

    present: NamedSlot
    new: NamedSlot
    header: bytes


def prepare_passphrase(
    where: str,
    device: Handle,
    size: int,
    identity: LuksIdentity,
    limits: Limits,
    current: Passphrase,
    new: Passphrase,
    chosen: LuksFormat,
    draft: Handle,
) -> Added:
    """Make a key slot for `new` beside that of `current`, in the empty file `draft` and not on the device.

    So whoever keeps the record can name it there before it is written by `write_prepared`. A slot that `new` opens
    already is enough. Raises Unauthenticated when `current` opens none, FailedPrecondition when the two open the same
    or there is no free slot, and what `open_device` raises; CommandFailed; ResourceExhausted.
    """
    with _loaded(where, device, size, identity, limits) as edit:
        before = edit.header
        present = edit.context.unlock(current)
        try:
            added = edit.context.unlock(new)
        except Unauthenticated:
            added = None
        if added == present:
            raise FailedPrecondition(f"the new passphrase of {where} is the one that it has; give another one")
        if added is None:
            if len(before.keyslots) >= limits.keyslots:
                raise FailedPrecondition(
                    f"{where} has {len(before.keyslots)} key slots, which is the most that are tried; remove one "
                    f"that nobody needs (cryptsetup luksKillSlot)"
                )
            added = edit.context.add_keyslot(current, new, chosen)
        both = blockdev.read_at(edit.memory, 0, 2 * before.hdr_size)
        after = parse(both, where)
        write_at(draft.fd, both, 0)
        for slot in after.keyslots.values():
            write_at(draft.fd, blockdev.read_at(edit.memory, slot.area.offset, slot.area.size), slot.area.offset)
        return Added(named_slot(after, present), named_slot(after, added), _digest(edit))


def write_prepared(
    where: str,
    device: Handle,
    size: int,
    identity: LuksIdentity,
    limits: Limits,
    added: Added,
    draft: Handle,
    new: Passphrase,
) -> None:
    """Write what `prepare_passphrase` has made, with proof that `new` opens it. Repeating is fine.

    Raises FailedPrecondition when the header is not the one of which it was made, and as `prepare_passphrase`.
    """
    with _loaded(where, device, size, identity, limits) as edit:
        if _digest(edit) != added.header:
            raise FailedPrecondition(f"the header of {where} was changed by somebody else meanwhile; call again")
        both = blockdev.read_at(draft.fd, 0, 2 * edit.header.hdr_size)
        after = parse(both, where)
        if after.seqid != edit.header.seqid or edit.header.damaged_copy is not None:
            validate(after, identity, edit.length, where, limits=limits)
            _write(where, device, edit.header, after, both, draft.fd)
    with _loaded(where, device, size, identity, limits) as edit:
        if named_slot(edit.header, edit.context.unlock(new)) != added.new:
            raise FailedPrecondition(f"the key slots of {where} were changed by somebody else meanwhile; look at them")


def slot_of(
    where: str, device: Handle, size: int, identity: LuksIdentity, limits: Limits, passphrase: Passphrase
) -> NamedSlot:
    """The key slot that `passphrase` opens; nothing is changed. Errors as `prepare_passphrase`."""
    with _loaded(where, device, size, identity, limits) as edit:
        return named_slot(edit.header, edit.context.unlock(passphrase))


def named_slot(header: Header, number: int) -> NamedSlot:
    """How a key slot of that header is named in a record."""
    return NamedSlot(number=number, salt=header.keyslots[str(number)].kdf.salt.hex())


def remove_passphrase(
    where: str,
    device: Handle,
    size: int,
    identity: LuksIdentity,
    limits: Limits,
    slots: Collection[NamedSlot],
    keep: Passphrase,
    trail: KeyTrail | None,
) -> None:
    """Take out those key slots, after proof that `keep` opens another one; and let our token say `trail`.

    One that is gone is fine, and a number that another key slot has by now is left alone. What earlier ones left on the
    device is overwritten. No other token is touched. Errors as `prepare_passphrase`.
    """
    with _edited(where, device, size, identity, limits) as edit:
        kept = named_slot(edit.header, edit.context.unlock(keep))
        if kept in slots:
            raise FailedPrecondition(
                f"the passphrase that counts opens key slot {kept.number} of {where}, which was to be removed; nothing "
                f"was changed, look at its key slots"
            )
        for slot in slots:
            if str(slot.number) in edit.header.keyslots and named_slot(edit.header, slot.number) == slot:
                edit.context.destroy_keyslot(slot.number)
        if key_token.read(edit.area, edit.header) != trail:
            for place in key_token.places(edit.header):
                edit.context.set_token(None, place)
            if trail is not None:
                edit.context.set_token(key_token.encode(trail))
    if slots:
        _overwrite_unnamed(where, device)


def back_up_header(where: str, device: Handle, path: str) -> None:
    """Write the header and the areas of its key slots into the file at `path`, where they lie on the device, fsynced.

    What cannot be parsed is no backup. Raises what `read_header` does, and OSError.
    """
    area, header = read_header(where, device)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with header_in_memory(where, device, area, header, _end(header)) as memory:
            write_at(descriptor, blockdev.read_at(memory, 0, 2 * header.hdr_size), 0)
            for slot in header.keyslots.values():
                write_at(descriptor, blockdev.read_at(memory, slot.area.offset, slot.area.size), slot.area.offset)
        os.ftruncate(descriptor, _end(header))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Edit(Struct, frozen=True):
    """A header as it was, in the bytes that it was parsed from, and in the library's hands: its copy in `memory`.

    `length` is that of the device, in bytes.
    """

    area: bytes
    header: Header
    context: CryptDevice
    memory: int
    length: int


@contextmanager
def _loaded(where: str, device: Handle, size: int, identity: LuksIdentity, limits: Limits) -> Iterator[_Edit]:
    """The checked header; what is done to it stays in memory."""
    area, before = read_header(where, device)
    with write_errors(where):
        found = length_of(device)
    if found < size:
        raise DeviceShort(f"{where} is {found} bytes long and {size} are recorded; check the storage below it")
    validate(before, identity, found, where, limits=limits)
    with (
        header_in_memory(where, device, area, before, identity.data_offset) as memory,
        crypt_device(where, f"/proc/self/fd/{memory}") as context,
    ):
        context.load()
        yield _Edit(area, before, context, memory, found)


@contextmanager
def _edited(where: str, device: Handle, size: int, identity: LuksIdentity, limits: Limits) -> Iterator[_Edit]:
    """The checked header for changes, written to the device when the block ends without an error and changed it."""
    with _loaded(where, device, size, identity, limits) as edit:
        yield edit
        before = edit.header
        changed = blockdev.read_at(edit.memory, 0, 2 * before.hdr_size)
        after = parse(changed, where)
        if after.seqid != before.seqid or before.damaged_copy is not None:
            validate(after, identity, edit.length, where, limits=limits)
            _write(where, device, before, after, changed, edit.memory)


def _write(where: str, device: Handle, before: Header, after: Header, both: bytes, source: int) -> None:
    """Write a changed header, with the areas of its new key slots as they lie in `source`."""
    areas = {
        int(slot.area.offset): blockdev.read_at(source, slot.area.offset, slot.area.size)
        for key, slot in after.keyslots.items()
        if before.keyslots.get(key) != slot
    }
    write_header(where, device, before.hdr_size, both, areas)


def _digest(edit: _Edit) -> bytes:
    """Of the bytes of a header, both copies."""
    return hashlib.sha256(edit.area[: 2 * edit.header.hdr_size]).digest()


def write_header(where: str, device: Handle, length: int, both: bytes, areas: Mapping[int, bytes]) -> None:
    """Write areas of key slots, then both copies of a header, `length` bytes each, one after the other, each durable.

    Raises DeviceUnreadable, OSError (ENOSPC).
    """
    with write_errors(where):
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            for offset, content in areas.items():
                write_at(descriptor, content, offset)
            os.fsync(descriptor)
            for at in (0, length):
                write_at(descriptor, both[at : at + length], at)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _overwrite_unnamed(where: str, device: Handle) -> None:
    """Random bytes, as luksFormat left there, over what no key slot names: an older header would open with it again."""
    _, header = read_header(where, device)
    with write_errors(where):
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            for start, end in _unnamed(header):
                for at in range(start, end, _PIECE):
                    write_at(descriptor, os.urandom(min(_PIECE, end - at)), at)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _unnamed(header: Header) -> Iterator[tuple[int, int]]:
    """The parts of the key slot area that belong to no key slot."""
    at = 2 * header.hdr_size
    for slot in sorted(header.keyslots.values(), key=_offset):
        if slot.area.offset > at:
            yield at, slot.area.offset
        at = slot.area.offset + slot.area.size
    if at < _end(header):
        yield at, _end(header)


def _offset(slot: Keyslot) -> int:
    return slot.area.offset


def _end(header: Header) -> int:
    return 2 * header.hdr_size + header.config.keyslots_size
