"""The ioctls of /dev/mapper/control as the kernel lays them out; `csi_driver.host.devicemapper` gives them meaning.

Layouts: include/uapi/linux/dm-ioctl.h, version 4.
"""

import fcntl
import functools
import os
import struct
from enum import IntEnum, IntFlag
from typing import Final, Self

from msgspec import Struct

from csi_driver.host.syscalls import error_name
from csi_driver.model.errors import CommandFailed, FailedPrecondition, InvalidArgument

NAME_MAX: Final = 127
"""Longest name of a mapping in bytes."""

_CONTROL: Final = "/dev/mapper/control"
_HEADER: Final = struct.Struct("=3I I I I i I I I Q 128s 129s 7x")
_SPEC: Final = struct.Struct("=Q Q i I 16s")
_NAME_RECORD: Final = struct.Struct("=Q I")
_UUID_MAX: Final = 128
_TYPE_MAX: Final = 15
_FIRST_BUFFER: Final = 4 * 1024
_LAST_BUFFER: Final = 16 * 1024 * 1024


class NoDeviceMapper(FailedPrecondition):
    """There is no device-mapper on this host, and so no mapping either."""


class Command(IntEnum):
    """The commands used here; each names its device in the header."""

    VERSION = 0
    LIST_DEVICES = 2
    DEV_CREATE = 3
    DEV_REMOVE = 4
    DEV_SUSPEND = 6
    TABLE_LOAD = 9
    TABLE_CLEAR = 10
    TABLE_STATUS = 12
    TARGET_MSG = 14
    GET_TARGET_VERSION = 17


class Flag(IntFlag):
    """Header flags, sent and answered. SECURE_DATA makes the kernel wipe its copy of the buffer."""

    READONLY = 1 << 0
    SUSPEND = 1 << 1
    STATUS_TABLE = 1 << 4
    BUFFER_FULL = 1 << 8
    SKIP_LOCKFS = 1 << 10
    NOFLUSH = 1 << 11
    SECURE_DATA = 1 << 15
    DEFERRED_REMOVE = 1 << 17


class UdevFlag(IntFlag):
    """What udev's rules are to do about a resume: the upper half of event_nr, which the kernel hands to udev.

    See DM_UDEV_* in libdevmapper.h, and 55-dm.rules. Its lower half is the cookie, a semaphore that udev gives free
    for who waits: it stays 0, which `dmsetup udevcomplete` takes for flags only.
    """

    DISABLE_SUBSYSTEM_RULES = 1 << 17
    DISABLE_DISK_RULES = 1 << 18
    DISABLE_OTHER_RULES = 1 << 19
    PRIMARY_SOURCE = 1 << 22


class Reply(Struct, frozen=True):
    """The header that came back, and the data area behind it; the repr leaves out the data, which may hold keys."""

    version: tuple[int, int, int]
    target_count: int
    open_count: int
    flags: int
    device: int
    name: str
    uuid: str
    data: bytes

    def __repr__(self) -> str:
        return f"Reply({self.name!r}, flags={self.flags:#x})"

    @classmethod
    def parse(cls, buffer: bytearray) -> Self:
        """Take apart what the kernel wrote into the buffer."""
        v1, v2, v3, _, start, count, opened, flags, _, _, device, name, uuid = _HEADER.unpack_from(buffer)
        return cls((v1, v2, v3), count, opened, flags, device, _text(name), _text(uuid), bytes(buffer[start:]))


def call(
    command: Command,
    name: str = "",
    *,
    uuid: str = "",
    flags: int = 0,
    udev: int = 0,
    data: bytes = b"",
    target_count: int = 0,
) -> Reply:
    """One ioctl, repeated with a larger buffer while the kernel says that its answer does not fit.

    `udev` are flags of `UdevFlag`; only a resume has use for them. Raises OSError as the kernel answers,
    FailedPrecondition without device-mapper, InvalidArgument for a name or UUID that cannot be one.
    """
    _check(command, name, uuid)
    size = max(_FIRST_BUFFER, _HEADER.size + len(data))
    names = os.fsencode(name), uuid.encode()
    while size <= _LAST_BUFFER:
        buffer = bytearray(size)
        _HEADER.pack_into(buffer, 0, 4, 0, 0, size, _HEADER.size, target_count, 0, flags, udev, 0, 0, *names)
        buffer[_HEADER.size : _HEADER.size + len(data)] = data
        fcntl.ioctl(_control(), _request(command), buffer)
        reply = Reply.parse(buffer)
        if not reply.flags & Flag.BUFFER_FULL:
            return reply
        size *= 4
    raise CommandFailed(f"device-mapper has an answer of more than {_LAST_BUFFER} bytes about {name!r}")


def parse_names(data: bytes) -> list[str]:
    """The names in the answer to LIST_DEVICES (struct dm_name_list)."""
    names: list[str] = []
    offset = 0
    while True:
        device, following = _NAME_RECORD.unpack_from(data, offset)
        # An empty list is one record without a device.
        if device:
            names.append(_text(data[offset + _NAME_RECORD.size :]))
        if not following:
            return names
        offset += following


def format_table(targets: list[tuple[int, int, str, str]]) -> bytes:
    """(start, length, type, params) of each target as TABLE_LOAD wants them (struct dm_target_spec)."""
    table = bytearray()
    for start, length, kind, params in targets:
        raw = params.encode()
        if not 0 < len(kind.encode()) <= _TYPE_MAX or b"\0" in raw:
            raise InvalidArgument(f"a device-mapper target of type {kind!r} cannot be written")
        # The next spec is aligned to eight bytes, behind the NUL that ends the params.
        size = (_SPEC.size + len(raw) + 8) & ~7
        table += _SPEC.pack(start, length, 0, size, kind.encode()) + raw + bytes(size - _SPEC.size - len(raw))
    return bytes(table)


def format_message(sector: int, text: str) -> bytes:
    """A message to the target at that sector as TARGET_MSG wants it (struct dm_target_msg)."""
    return struct.pack("=Q", sector) + text.encode() + b"\0"


def parse_table(data: bytes, count: int) -> list[tuple[int, int, str, str]]:
    """(start, length, type, params) of each target in the answer to TABLE_STATUS.

    Here `next` counts from the start of the data area; in TABLE_LOAD it counts from the spec it stands in.
    """
    targets: list[tuple[int, int, str, str]] = []
    offset = 0
    for _ in range(count):
        start, length, _status, following, kind = _SPEC.unpack_from(data, offset)
        targets.append((start, length, _text(kind), _text(data[offset + _SPEC.size :])))
        offset = following
    return targets


def _check(command: Command, name: str, uuid: str) -> None:
    nameless = command in (Command.VERSION, Command.LIST_DEVICES)
    if not (nameless or name) or len(os.fsencode(name)) > NAME_MAX or "/" in name or "\0" in name:
        raise InvalidArgument(f"{name!r} cannot be the name of a mapping: 1 to {NAME_MAX} bytes without '/'")
    if len(uuid.encode()) > _UUID_MAX or "\0" in uuid:
        raise InvalidArgument(f"{uuid!r} cannot be the UUID of a mapping: at most {_UUID_MAX} bytes")


def _request(command: Command) -> int:
    """_IOWR(DM_IOCTL, command, struct dm_ioctl) of asm-generic/ioctl.h."""
    return 3 << 30 | _HEADER.size << 16 | 0xFD << 8 | command


@functools.cache
def _control() -> int:
    """The open control node, kept for the life of the process. Raises FailedPrecondition, NoDeviceMapper."""
    try:
        return os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        raise FailedPrecondition(f"{_CONTROL} may not be opened; run as root with CAP_SYS_ADMIN") from None
    except OSError as error:
        raise NoDeviceMapper(
            f"this host has no device-mapper, {_CONTROL} cannot be opened ({error_name(error)}); load the kernel "
            f"module dm_mod, run on a host that has it, or try things in the guest of `make shell`, in the source tree"
        ) from None


def _text(raw: bytes) -> str:
    return os.fsdecode(raw[: raw.index(0)])
