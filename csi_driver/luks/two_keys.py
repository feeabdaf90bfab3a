"""A volume between two volume keys: its start lies under the new one on one device, its rest under the old on another.

Each device has a LUKS2 header of its own and the same passphrase opens both; the mapping has one crypt target for each.
What opens and goes on with such a mapping runs in workers; `Mover` is for the process of the command that moves.
"""

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from msgspec import Struct

from csi_driver.host import keyring
from csi_driver.host.devicemapper import DeviceMapper, Target
from csi_driver.host.handle import Handle
from csi_driver.host.syscalls import error_name
from csi_driver.luks.bulk import SectorCipher
from csi_driver.luks.device import Opening, checked, dm_uuid, key_prefix, put_key
from csi_driver.luks.header_rules import Limits
from csi_driver.model.errors import DeviceUnreadable, FailedPrecondition, KeyNeeded
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import LuksIdentity

_SECTOR: Final = 512
_BLKDISCARD: Final = 0x1277
_PIECE: Final = 64 << 10


class Side(Struct, frozen=True):
    """One of the two devices, held open; `key_name` is that of its volume key in keyrings."""

    device: Handle
    identity: LuksIdentity
    key_name: str


class Sides(Struct, frozen=True):
    """Of `capacity` bytes `done` lie on `new`, the others on `old`, each at its own place."""

    old: Side
    new: Side
    done: int
    capacity: int

    def table(self, opening: Opening) -> list[Target]:
        """The table of the mapping."""
        parts = ((self.new, 0, self.done), (self.old, self.done, self.capacity))
        return [
            opening.segment(side.device.number, side.identity, side.key_name, start, end)
            for side, start, end in parts
            if end > start
        ]


def new_key_name(identity: LuksIdentity) -> str:
    """What the key of the new device is called: the old one has the usual name, or one like this of an earlier time."""
    return f"{key_prefix(identity.uuid)}{(identity.digest or '')[:32]}"


def boundary(targets: Sequence[Target], new_key: str, capacity: int) -> int:
    """How much of `capacity` bytes a live table has on the device of the key `new_key`."""
    rest = sum(target.length * _SECTOR for target in targets if f":logon:{new_key} " not in target.params)
    return capacity - rest


def open_sides(
    where: str, sides: Sides, limits: Limits, passphrase: Passphrase, opening: Opening, *, fresh: bool
) -> tuple[keyring.KeptKey, keyring.KeptKey]:
    """Unlock both headers and make the mapping, or, where it is there, let it go on by the right table.

    Returns where the old and the new key stay in root's user keyring. Errors as `device.open_device`.
    """
    for side in (sides.old, sides.new):
        size = side.identity.data_offset + sides.capacity
        with checked(where, side.device, side.identity, size, limits) as context:
            put_key(context, passphrase, side.key_name)
    mapper, table = DeviceMapper(), sides.table(opening)
    if fresh:
        mapper.create(opening.name, dm_uuid(opening.name, sides.old.identity.uuid), table)
    else:
        mapper.load(opening.name, table)
        mapper.resume(opening.name)
    return keyring.link_to_user(sides.old.key_name), keyring.link_to_user(sides.new.key_name)


def go_on(
    where: str, sides: Sides, opening: Opening, old_key: keyring.KeptKey | None, new_key: keyring.KeptKey | None
) -> None:
    """Let I/O flow through a suspended mapping by the right table, with the keys that were kept when it was opened.

    They are taken by their serials: what a stranger has put under their names is none. Raises KeyNeeded.
    """
    for side, kept, needed in ((sides.old, old_key, sides.done < sides.capacity), (sides.new, new_key, sides.done)):
        if needed and (kept is None or keyring.link_into_thread(side.key_name, kept) is None):
            raise KeyNeeded(
                f"{where} stands still in the middle of a step to another volume key, and one of its two keys is not "
                f"in the kernel's keyring; let luks-csi volume reencrypt go on with it, nothing is lost"
            )
    mapper = DeviceMapper()
    mapper.load(opening.name, sides.table(opening))
    mapper.resume(opening.name)


def discard(descriptor: int, at: int, length: int) -> bool:
    """BLKDISCARD; False where the storage says that it frees nothing. Raises OSError."""
    try:
        fcntl.ioctl(descriptor, _BLKDISCARD, struct.pack("=QQ", at, length))
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False
    return True


def gives_back(device: Handle, at: int) -> bool:
    """Whether what is freed there is free; asked of a block of blank storage, which is blank again behind it.

    By what is read then: of a loop device sysfs (discard_max_bytes) and the kernel's answer say less than that, as a
    file system that refuses is passed over (blk_ioctl_discard). Raises DeviceUnreadable.
    """
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            _fill(descriptor, at, b"\xff")
            discard(descriptor, at, _PIECE)
            is_free = not os.pread(descriptor, _PIECE, at).strip(b"\0")
            if not is_free:
                _fill(descriptor, at, b"\0")
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DeviceUnreadable(
            f"the device {device} cannot be freed at byte {at} ({error_name(error)}); look at the kernel log"
        ) from None
    return is_free


def _fill(descriptor: int, at: int, byte: bytes) -> None:
    os.pwrite(descriptor, byte * _PIECE, at)
    os.fsync(descriptor)


class Mover:
    """Moves chunks from one device to another, from under one cipher, or none, to under another one.

    `where` names the volume in errors; the offsets are those of the data and `chunk` is the largest, in bytes. All I/O
    is direct: a page cache would not see what a mapping writes below it. Raises DeviceUnreadable.
    """

    def __init__(
        self, where: str, old: SectorCipher | None, old_offset: int, new: SectorCipher, new_offset: int, chunk: int
    ) -> None:
        self._where = where
        self._old, self._old_offset = old, old_offset
        self._new, self._new_offset = new, new_offset
        self._read, self._again, self._written = (mmap.mmap(-1, chunk) for _ in range(3))  # aligned
        for buffer in (self._read, self._again, self._written):
            buffer[:] = bytes(chunk)  # nothing is to wait for memory while a mapping stands still

    def copy(self, source: Handle, target: Handle, start: int, length: int) -> None:
        """Copy a chunk, durably. Somebody may be writing to the source: see `copy_again`."""
        self._fill(source, self._read, self._old_offset + start, length)
        self._put(target, start, length)

    def copy_again(self, source: Handle, target: Handle, start: int, length: int) -> None:
        """Copy what was written to since the last `copy` of the chunk. Nobody may be writing by now.

        Compared in pieces: a mapping stands still meanwhile, and memory for all of it might have to wait for it.
        """
        self._fill(source, self._again, self._old_offset + start, length)
        changed = [
            at for at in range(0, length, _PIECE) if self._again[at : at + _PIECE] != self._read[at : at + _PIECE]
        ]
        self._read, self._again = self._again, self._read
        if changed:
            first, end = changed[0], min(changed[-1] + _PIECE, length)
            self._put(target, start, end, first)

    def refuse_moved(self, source: Handle, target: Handle, start: int, length: int) -> None:
        """Raise FailedPrecondition if the chunk was moved before, by a record that is newer than the one at hand.

        What was moved is gone from the source, and its place there reads as zeros. A copy that was cut has written
        nothing but what the next one writes, or left zeros.
        """
        self._fill(source, self._read, self._old_offset + start, length)
        if self._read[:length].strip(b"\0"):
            return
        self._encrypt(start, length)
        self._fill(target, self._again, self._new_offset + start, length)
        zeros = bytes(_SECTOR)
        for at in range(0, length, _SECTOR):
            found = self._again[at : at + _SECTOR]
            if found not in (zeros, self._written[at : at + _SECTOR]):
                raise FailedPrecondition(
                    f"{self._where} was moved further to its new volume key than its record says, {start} bytes; "
                    f"restore the newest record"
                )

    def let_go_again(self, source: Handle, start: int, length: int) -> None:
        """As `let_go`, of a chunk that an earlier process has moved and may not have freed."""
        self._fill(source, self._read, self._old_offset + start, length)
        self.let_go(source, start, length)

    def let_go(self, source: Handle, start: int, length: int) -> None:
        """Free the room of the chunk of the last copy. What was not encrypted is overwritten before."""
        at = self._old_offset + start
        with self._opened(source, os.O_RDWR, "freed", at) as descriptor:
            if self._old is None and self._read[:length].strip(b"\0"):
                self._overwrite(descriptor, at, length)
            if not discard(descriptor, at, length) and self._old is not None:
                self._overwrite(descriptor, at, length)  # it takes room until the end, and reads as what is freed

    def _overwrite(self, descriptor: int, at: int, length: int) -> None:
        self._again[:length] = bytes(length)
        self._write(descriptor, self._again, at, length)
        os.fsync(descriptor)

    def _encrypt(self, start: int, length: int, begin: int = 0) -> None:
        """From what was read to what is to be written, from `begin` to `length` bytes into the chunk."""
        first = (start + begin) // _SECTOR
        read, out = memoryview(self._read)[begin:length], memoryview(self._written)[begin:length]
        if self._old is None:
            self._new.encrypt(first, read, out)
        else:
            self._old.decrypt(first, read, out)
            self._new.encrypt(first, out, out)

    def _put(self, target: Handle, start: int, length: int, begin: int = 0) -> None:
        self._encrypt(start, length, begin)
        at = self._new_offset + start
        with self._opened(target, os.O_RDWR, "written", at) as descriptor:
            self._write(descriptor, self._written, at, length, begin)
            os.fsync(descriptor)

    def _fill(self, device: Handle, buffer: mmap.mmap, at: int, length: int) -> None:
        with self._opened(device, os.O_RDONLY, "read", at) as descriptor:
            view, done = memoryview(buffer)[:length], 0
            while done < length:
                count = os.preadv(descriptor, [view[done:]], at + done)
                if not count:
                    raise DeviceUnreadable(
                        f"{self._where} ends on {device} at byte {at + done}, before byte {at + length}; check the "
                        f"storage below it"
                    )
                done += count

    @staticmethod
    def _write(descriptor: int, buffer: mmap.mmap, at: int, length: int, begin: int = 0) -> None:
        view, done = memoryview(buffer)[:length], begin
        while done < length:
            done += os.pwritev(descriptor, [view[done:]], at + done)

    @contextmanager
    def _opened(self, device: Handle, flags: int, how: str, at: int) -> Iterator[int]:
        try:
            descriptor = os.open(device, flags | os.O_DIRECT | os.O_CLOEXEC)
            try:
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DeviceUnreadable(
                f"{self._where} cannot be {how} on {device} at byte {at} ({error_name(error)}); look at the kernel log "
                f"and at the room on the storage below it, then call again"
            ) from None
