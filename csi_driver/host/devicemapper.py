"""Mapped devices: looked at, opened, created, reloaded, suspended, removed by ioctl, without dmsetup.

Nothing here waits for udev: no cookie is passed (in a container that does not share the host's IPC namespace one hangs
for ever, bootc#2089), only flags, by which udev's rules link /dev/mapper/<name> and leave the content alone. The name
is made and removed here as well, but udev comes late and may take it away for a moment: what acts on a device opens it
by its number.
"""

import contextlib
import errno
import os
import re
import struct
import time
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from csi_driver.host import dmnodes
from csi_driver.host.dmcontrol import (
    Command,
    Flag,
    UdevFlag,
    call,
    format_message,
    format_table,
    parse_names,
    parse_table,
)
from csi_driver.host.handle import Handle
from csi_driver.host.syscalls import error_name, udev_is_running
from csi_driver.model.errors import (
    CommandFailed,
    DeviceAbsent,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    MappingMismatch,
)

_SECTOR: Final = 512
_OPEN_TRIES: Final = 10
_REMOVE_TRIES: Final = 20
_PAUSE: Final = 0.05
_DEVICE_NUMBER: Final = re.compile(r"\d+:\d+")
# A pod's label must not become a link below /dev/disk, nor its volume group or partitions devices of the host. Without
# PRIMARY_SOURCE the rules take the event for a spurious one and go by what they remember of the device: nothing.
_UDEV: Final = (
    UdevFlag.DISABLE_DISK_RULES
    | UdevFlag.DISABLE_SUBSYSTEM_RULES
    | UdevFlag.DISABLE_OTHER_RULES
    | UdevFlag.PRIMARY_SOURCE
)


class Target(Struct, frozen=True):
    """One line of a table: `length` sectors of 512 bytes from `start` on, served by target `type` with `params`.

    The repr hides the key of a crypt target unless it is a reference into a keyring (":64:logon:name").
    """

    start: int
    length: int
    type: str
    params: str

    def __repr__(self) -> str:
        fields = self.params.split(" ")
        if self.type == "crypt" and len(fields) > 1 and not fields[1].startswith(":"):
            fields[1] = "<key>"
        return f"Target({self.start} {self.length} {self.type} {' '.join(fields)})"

    @property
    def devices(self) -> tuple[tuple[int, int], ...]:
        """(major, minor) of the devices that the params name; of a crypt target only its data device."""
        fields = self.params.split()
        if self.type == "crypt":
            fields = fields[3:4]
        numbers = (field.split(":") for field in fields if _DEVICE_NUMBER.fullmatch(field))
        return tuple((int(major), int(minor)) for major, minor in numbers)


class Device(Struct, frozen=True):
    """A mapped device as the kernel has it; `targets` is the live table, empty when none was resumed.

    One that `is_leaving` goes away with its last user.
    """

    name: str
    uuid: str
    major: int
    minor: int
    open_count: int
    suspended: bool
    read_only: bool
    targets: tuple[Target, ...]
    is_leaving: bool = False

    @property
    def path(self) -> str:
        """Its node in /dev/mapper."""
        return dmnodes.name_path(self.name)

    @property
    def size_bytes(self) -> int:
        """What the live table maps."""
        return max((target.start + target.length for target in self.targets), default=0) * _SECTOR

    @property
    def backing(self) -> tuple[tuple[int, int], ...]:
        """(major, minor) of the devices below, without repetition; empty for error and zero targets."""
        return tuple(dict.fromkeys(number for target in self.targets for number in target.devices))


class MappingHandle(Handle):
    """An open mapped device, /dev/mapper/<name>; `device` is what the kernel showed of it once it was open."""

    def __init__(self, fd: int, device: Device) -> None:
        super().__init__(fd, device.path)
        self.device = device


class DeviceMapper:
    """The kernel's mapped devices, by name. Errors name the mapping; none holds table params.

    Every method raises FailedPrecondition where device-mapper or the right to use it is missing, InvalidArgument for a
    name that cannot be one, CommandFailed for what nobody foresaw.
    """

    def version(self) -> str:
        """Version of the kernel's interface, such as "4.47.0"."""
        return ".".join(map(str, call(Command.VERSION).version))

    def target_version(self, target_type: str) -> str:
        """Version of a target type; the kernel loads its module if it must.

        Raises FailedPrecondition when the kernel has no such target.
        """
        try:
            data = call(Command.GET_TARGET_VERSION, target_type).data
        except OSError:
            raise FailedPrecondition(f"the kernel has no device-mapper target {target_type}") from None
        return ".".join(map(str, struct.unpack_from("=3I", data, 4)))

    def names(self) -> list[str]:
        """Names of all mapped devices, sorted."""
        return sorted(parse_names(call(Command.LIST_DEVICES).data))

    def get(self, name: str) -> Device | None:
        """The device of that name with its live table, or None."""
        try:
            reply = call(Command.TABLE_STATUS, name, flags=Flag.STATUS_TABLE | Flag.SECURE_DATA | Flag.NOFLUSH)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise _failed("read the table of", name, error) from None
        return Device(
            name=reply.name,
            uuid=reply.uuid,
            major=os.major(reply.device),
            minor=os.minor(reply.device),
            open_count=reply.open_count,
            suspended=bool(reply.flags & Flag.SUSPEND),
            read_only=bool(reply.flags & Flag.READONLY),
            targets=tuple(Target(*fields) for fields in parse_table(reply.data, reply.target_count)),
            is_leaving=bool(reply.flags & Flag.DEFERRED_REMOVE),
        )

    def status(self, name: str) -> str | None:
        """What the first target of the device of that name says of itself; None when there is none."""
        try:
            reply = call(Command.TABLE_STATUS, name, flags=Flag.NOFLUSH)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise _failed("read the status of", name, error) from None
        found = parse_table(reply.data, reply.target_count)
        return found[0][3] if found else None

    def open(self, name: str) -> MappingHandle:
        """A handle on the mapped device of that name, whatever its node in /dev/mapper is at the moment.

        Raises DeviceAbsent when there is none or it has no table, MappingMismatch when others keep replacing it.
        """
        for _ in range(_OPEN_TRIES):
            found = self.get(name)
            if found is None:
                raise DeviceAbsent(f"the mapping {name} is not there; stage its volume")
            if not found.targets:
                raise DeviceAbsent(f"the mapping {name} has no table; remove it with 'dmsetup remove {name}'")
            number = os.makedev(found.major, found.minor)
            descriptor = dmnodes.open_number(name, number)
            if descriptor is None:
                dmnodes.drop_node(name, number)
                continue
            try:
                # What is open cannot be removed: if the number is the name's now, it was when it was opened.
                opened = self.get(name)
                if opened is not None and _identity(opened) == _identity(found):
                    handle = MappingHandle(descriptor, opened)
                    descriptor = -1
                    return handle
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
                    dmnodes.drop_node(name, number)
        raise MappingMismatch(
            f"the mapping {name} was another device at each of {_OPEN_TRIES} looks; end what keeps replacing it"
        )

    def create(self, name: str, uuid: str, targets: Sequence[Target], *, read_only: bool = False) -> Device:
        """Make a mapped device with this table, live when the call returns; after a failure nothing remains.

        Raises MappingMismatch when the name or the UUID is taken, FailedPrecondition when the table is refused.
        """
        try:
            call(Command.DEV_CREATE, name, uuid=uuid)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise MappingMismatch(
                    f"the mapping name {name} or its UUID {uuid} is taken by another mapping; find it with "
                    f"'dmsetup info -c'"
                ) from None
            raise _failed("create", name, error) from None
        try:
            _load(name, targets, read_only=read_only)
            self.resume(name)
            device = self.get(name)
            if device is None:
                raise CommandFailed(f"the mapping {name} was removed by somebody while it was being created")
            return device
        except BaseException:
            with contextlib.suppress(DriverError):
                self.remove(name)
            raise

    def reload(self, name: str, targets: Sequence[Target]) -> None:
        """Replace the live table; I/O waits meanwhile, and the device is not suspended when the call returns.

        The kernel suspends, swaps and resumes in one ioctl, so that a killed process leaves nothing frozen. After
        a failure the old table is live and no other is loaded. Raises FailedPrecondition when the table is refused.
        """
        device = self.get(name)
        if device is None:
            raise FailedPrecondition(f"the mapping {name} is not there, so its table cannot be replaced")
        _load(name, targets, read_only=device.read_only)
        try:
            self.resume(name)
        except BaseException:
            with contextlib.suppress(DriverError):
                _clear(name)
                # A swap that fails leaves the device suspended on its old table.
                self.resume(name)
            raise

    def load(self, name: str, targets: Sequence[Target]) -> None:
        """Load a table beside the live one, which it replaces at the next `resume`. Errors as `reload`."""
        device = self.get(name)
        if device is None:
            raise FailedPrecondition(f"the mapping {name} is not there, so no table can be loaded into it")
        _load(name, targets, read_only=device.read_only)

    def clear(self, name: str) -> None:
        """Drop a table that is loaded and not live."""
        _clear(name)

    def suspend(self, name: str) -> None:
        """Wait for the I/O under way, and let none pass until `resume`. A file system on it is not frozen before."""
        try:
            call(Command.DEV_SUSPEND, name, flags=Flag.SUSPEND | Flag.SKIP_LOCKFS)
        except OSError as error:
            raise _failed("suspend", name, error) from None

    def resume(self, name: str) -> None:
        """Make a loaded table live, let I/O go on, and see that /dev/mapper/<name> exists."""
        try:
            # The one ioctl whose event udev reads flags from: a table that is loaded or a removal has none to read.
            reply = call(Command.DEV_SUSPEND, name, udev=_UDEV)
        except OSError as error:
            raise _failed("resume", name, error) from None
        dmnodes.ensure_name(name, reply.device)

    def let_go(self, name: str) -> None:
        """Let the device go away with its last user: now, where there is none. Absent is fine."""
        try:
            call(Command.DEV_REMOVE, name, flags=Flag.DEFERRED_REMOVE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise _failed("let go of", name, error) from None

    def keep(self, name: str) -> None:
        """Undo `let_go` of a device that somebody still has open."""
        try:
            call(Command.TARGET_MSG, name, data=format_message(0, "@cancel_deferred_remove"))
        except OSError as error:
            raise _failed("keep", name, error) from None

    def remove(self, name: str) -> None:
        """Remove the device and its node; absent is fine.

        Raises DeviceInUse when something has it open; the caller knows how to name what.
        """
        # udev opens a device for a moment after each change; only then is waiting worth anything.
        tries = _REMOVE_TRIES if udev_is_running() else 1
        for left in reversed(range(tries)):
            try:
                call(Command.DEV_REMOVE, name)
                break
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break
                if error.errno != errno.EBUSY:
                    raise _failed("remove", name, error) from None
                if not left:
                    raise DeviceInUse(
                        f"the mapping {name} cannot be removed because it is open; end what uses it and call again"
                    ) from None
                time.sleep(_PAUSE)
        if self.get(name) is None:
            dmnodes.remove_name(name)


def _load(name: str, targets: Sequence[Target], *, read_only: bool) -> None:
    """Load a table beside the live one; a refused table leaves nothing behind."""
    data = format_table([(target.start, target.length, target.type, target.params) for target in targets])
    flags = Flag.SECURE_DATA | (Flag.READONLY if read_only else 0)
    try:
        call(Command.TABLE_LOAD, name, flags=flags, data=data, target_count=len(targets))
    except OSError as error:
        types = ", ".join(sorted({target.type for target in targets}))
        reason = {
            errno.EINVAL: f"the kernel refused the table: its log says why; check that it knows {types}",
            errno.ENOKEY: "the volume key is not in this thread's keyring",
            errno.EBUSY: "a device below is held by somebody else",
            errno.ENXIO: "the mapping or a device below is absent",
            errno.ENODEV: "a device below is absent",
            errno.ENOENT: "a device below or a cipher that the kernel does not know",
        }.get(error.errno or 0)
        if reason is None:
            raise _failed("load a table into", name, error) from None
        raise FailedPrecondition(
            f"device-mapper could not load a table into {name} ({error_name(error)}): {reason}"
        ) from (None)


def _clear(name: str) -> None:
    """Drop a table that is loaded and not live."""
    try:
        call(Command.TABLE_CLEAR, name)
    except OSError as error:
        raise _failed("drop the loaded table of", name, error) from None


def _failed(action: str, name: str, error: OSError) -> DriverError:
    text = f"device-mapper could not {action} {name}: {error_name(error)}"
    if error.errno == errno.ENXIO:
        return FailedPrecondition(f"{text}; the mapping is not there")
    if error.errno == errno.EINVAL:
        # A table that reaches past the end of a device below is refused here, not when it is loaded.
        return FailedPrecondition(f"{text}; the kernel refused the table: its log says why")
    if error.errno in (errno.EPERM, errno.EACCES):
        return FailedPrecondition(f"{text}; run as root with CAP_SYS_ADMIN")
    return CommandFailed(text)


def _identity(device: Device) -> tuple[str, int, int]:
    return device.uuid, device.major, device.minor
