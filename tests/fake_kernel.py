"""A kernel in memory over real sparse files: LUKS2, mappings, mounts and file systems as the use cases see them.

A device's content is a small document at the start of its file, so that it lives and dies with the file; everything
else lives in `Kernel`, which outlives the driver. `step` is told before, within and after everything that a fault may
cut: it raises what fails a step, or `Killed`, after which nothing the dead driver still does has an effect.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import msgspec

from csi_driver.host.commands import Commands, Completed
from csi_driver.host.devicemapper import Device, DeviceMapper, MappingHandle, Target
from csi_driver.host.fshealth import Ailment, FileSystemHealth, Mounting
from csi_driver.host.handle import Handle
from csi_driver.host.keyring import KeptKey
from csi_driver.host.mountinfo import Mount, MountTable
from csi_driver.host.mounts import Mounts
from csi_driver.host.workers import Workers
from csi_driver.luks.device import Opening, dm_uuid
from csi_driver.luks.formats import DATA_OFFSET, LuksFormat
from csi_driver.luks.mapping import Mappings
from csi_driver.model.errors import (
    CommandFailed,
    DeviceAbsent,
    DeviceBlank,
    DeviceInUse,
    DeviceShort,
    DeviceUnreadable,
    FailedPrecondition,
    ForeignSignature,
    InvalidHeader,
    Unauthenticated,
)
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import LuksIdentity
from tests.fake_host import FakeLoops, NoHolders

P = ParamSpec("P")
R = TypeVar("R")
DM_MAJOR = 253
_ROOM = 4096


class Killed(BaseException):
    """The driver's process ends here; what it would still do to clean up it cannot do either."""


class Luks(msgspec.Struct):
    """A header: `key` None is one without key slots, as a killed luksFormat leaves it."""

    uuid: str
    key: bytes | None = None
    digest: str = ""


class Inside(msgspec.Struct):
    """What a device holds: a file system with files, or what was written to it as a block device.

    One with its error flag is `flagged`; where e2fsck cannot mend it, it is `broken`.
    """

    fs_type: str | None = None
    fs_bytes: int = 0
    files: dict[str, str] = {}
    raw: str = ""
    flagged: bool = False
    broken: bool = False


class Content(msgspec.Struct):
    """All that is on a backing file."""

    luks: Luks | None = None
    inside: Inside = msgspec.field(default_factory=Inside)


def content_of(start: bytes) -> Content:
    """What the start of a backing file says; zeros are a blank device."""
    document = start.rstrip(b"\0")
    return msgspec.json.decode(document, type=Content) if document else Content()


@dataclass
class FakeMapping:
    """An open mapping on a loop device."""

    name: str
    uuid: str
    minor: int
    loop: str
    size: int
    open_count: int = 0
    suspended: bool = False


@dataclass
class Kernel:
    """What outlives the driver. `formatting` and `making` see the loop device before luksFormat and mkfs.

    `ailing` and `frozen` are mounted file systems by the numbers of their devices; to unmount them ends it.
    Those `elsewhere` are mounted in another mount namespace too.
    """

    loops: FakeLoops = field(default_factory=FakeLoops)
    mappings: dict[str, FakeMapping] = field(default_factory=dict)
    mounted: list[Mount] = field(default_factory=list)
    keyring: set[str] = field(default_factory=set)
    held: list["FakeMappingHandle"] = field(default_factory=list)
    ailing: dict[tuple[int, int], Ailment] = field(default_factory=dict)
    frozen: set[tuple[int, int]] = field(default_factory=set)
    takes_no_writes: bool = False
    elsewhere: set[tuple[int, int]] = field(default_factory=set)
    formats: int = 0
    dead: bool = False
    plan: Callable[[str], None] = lambda _: None
    formatting: Callable[[str], None] = lambda _: None
    making: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        self.loops.step = self.step

    def step(self, name: str) -> None:
        if self.dead:
            raise Killed
        try:
            self.plan(name)
        except Killed:
            self.dead = True
            raise

    def end_of_process(self) -> None:
        """The driver's process is gone, and with it what it had open."""
        for handle in list(self.held):
            handle.close()
        self.loops.end_of_process()
        self.dead = False

    def reboot(self) -> None:
        """Nothing but the files is left."""
        self.mounted.clear()
        self.mappings.clear()
        self.keyring.clear()
        self.loops.end_of_process()
        for path in list(self.loops.bound):
            os.close(self.loops.bound.pop(path).backing)
        self.dead = False

    # Devices

    def loop_below(self, device: str) -> str:
        if device.startswith("/dev/mapper/"):
            mapping = self.mappings.get(device.removeprefix("/dev/mapper/"))
            if mapping is None:
                raise DeviceAbsent(f"the device {device} is not there")
            assert not mapping.suspended, f"{device} is suspended: this would hang"
            return mapping.loop
        if device not in self.loops.bound:
            raise DeviceAbsent(f"the device {device} is not there")
        return device

    def read(self, device: str) -> Content:
        return content_of(os.pread(self.loops.bound[self.loop_below(device)].backing, _ROOM, 0))

    def write(self, device: str, content: Content) -> None:
        encoded = msgspec.json.encode(content)
        assert len(encoded) < _ROOM
        os.pwrite(self.loops.bound[self.loop_below(device)].backing, encoded.ljust(_ROOM, b"\0"), 0)

    def size(self, device: str) -> int:
        if device.startswith("/dev/mapper/"):
            return self.mappings[device.removeprefix("/dev/mapper/")].size
        return self.loops.bound[device].info.size_bytes

    def number(self, device: str) -> tuple[int, int]:
        if device.startswith("/dev/mapper/"):
            return DM_MAJOR, self.mappings[device.removeprefix("/dev/mapper/")].minor
        info = self.loops.bound[device].info
        return info.major, info.minor

    def use(self, device: str, change: int) -> None:
        """A file system begins (1) or ceases (-1) to use the device."""
        if device.startswith("/dev/mapper/"):
            self.mappings[device.removeprefix("/dev/mapper/")].open_count += change
        elif change > 0:
            self.loops.use(device)
        else:
            self.loops.release(device)

    def traces(self, volume_id: str) -> list[str]:
        """What is open, mounted or attached of a volume."""
        loops = [info.path for info in self.loops.all() if f"/{volume_id}/" in info.backing_path]
        shown = (*loops, f"/dev/mapper/luks-{volume_id}")
        mounts = [mount.mount_point for mount in self.mounted if mount.source in shown]
        return [*loops, *(name for name in self.mappings if name == f"luks-{volume_id}"), *mounts]


class FakeMappingHandle(MappingHandle):
    """A handle on a mapping, which is in use as long as it is open."""

    def __init__(self, kernel: Kernel, device: Device) -> None:
        super().__init__(os.open(os.devnull, os.O_RDONLY), device)
        self._kernel = kernel
        kernel.mappings[device.name].open_count += 1
        kernel.held.append(self)

    @property
    def number(self) -> tuple[int, int]:
        return self.device.major, self.device.minor

    def close(self) -> None:
        if self.fd >= 0:
            self._kernel.held.remove(self)
            super().close()
            if self.device.name in self._kernel.mappings:
                self._kernel.mappings[self.device.name].open_count -= 1


class KernelMappings(Mappings):
    """Judges like the real one; what it looks at and closes is the fake kernel's."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(DeviceMapper(), NoHolders())
        self._kernel = kernel

    def get(self, name: str) -> Device | None:
        found = self._kernel.mappings.get(name)
        if found is None:
            return None
        loop = self._kernel.loops.bound[found.loop].info
        table = f"aes-xts-plain64 :64:logon:key 0 {loop.major}:{loop.minor} {DATA_OFFSET // 512}"
        return Device(
            name, found.uuid, DM_MAJOR, found.minor, found.open_count, found.suspended,
            read_only=False, targets=(Target(0, found.size // 512, "crypt", table),),
        )  # fmt: skip

    def open(self, name: str) -> MappingHandle:
        device = self.get(name)
        if device is None:
            raise DeviceAbsent(f"the mapping {name} is not there")
        return FakeMappingHandle(self._kernel, device)

    def names(self) -> list[str]:
        return sorted(self._kernel.mappings)

    def backings(self, mapping: Device) -> frozenset[tuple[int, int]]:
        return frozenset(mapping.backing)

    def others_on(self, number: tuple[int, int], name: str) -> list[str]:
        found = self._kernel.mappings.values()
        return [f"/dev/mapper/{one.name}" for one in found if one.name != name and self._below(one) == number]

    def keeps_key(self, uuid: str) -> bool:
        return uuid in self._kernel.keyring

    def _below(self, mapping: FakeMapping) -> tuple[int, int]:
        return self._kernel.number(mapping.loop)

    def close(self, name: str, uuid: str | None = None) -> None:
        self._kernel.step("before close")
        found = self._kernel.mappings.get(name)
        if found is not None:
            if found.open_count:
                raise DeviceInUse(f"the mapping {name} is in use")
            assert not found.suspended, f"{name} is suspended: this would hang"
            del self._kernel.mappings[name]
            self._kernel.loops.release(found.loop)
        self._kernel.step("in close")
        self._kernel.keyring.discard(str(uuid))
        self._kernel.step("after close")


class FakeTable(MountTable):
    """The fake kernel's mounts of one moment."""

    def __init__(self, mounted: Sequence[Mount]) -> None:
        super().__init__(b"")
        self._mounted = tuple(mounted)

    def at(self, path: str) -> Mount | None:
        return next((mount for mount in reversed(self._mounted) if mount.mount_point == path), None)

    def of_device(self, number: tuple[int, int], fs_type: str | None = None) -> list[Mount]:
        return [mount for mount in self._mounted if mount.device == number]

    def is_last(self, mount: Mount) -> bool:
        return self.of_device(mount.device) == [mount]

    def of_node(self, number: tuple[int, int]) -> list[Mount]:
        return []


class KernelMounts(Mounts):
    """Mounts of the fake kernel; a file system is in use as long as any mount of it is there."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self._kernel = kernel

    def table(self) -> MountTable:
        return FakeTable(self._kernel.mounted)

    def open(self, mount: Mount) -> Handle:
        assert mount in self._kernel.mounted
        return Handle(os.open(os.devnull, os.O_RDONLY), mount.mount_point)

    def mount(self, device: Handle, target: str, fs_type: str, flags: int, data: str, repair: str = "") -> None:
        source = device.name
        found = self._kernel.read(source).inside
        if found.fs_type != fs_type or found.fs_bytes > self._kernel.size(source):
            raise FailedPrecondition(f"{source} could not be mounted: it holds {found.fs_type}")
        self._add(target, source, fs_type, self._kernel.number(source), read_only=bool(flags & 1))
        if found.flagged:
            self._kernel.ailing[self._kernel.number(source)] = Ailment.ERROR_FLAG

    def replay_ext4(self, device: Handle) -> None:
        if self._kernel.takes_no_writes:
            raise DeviceUnreadable(f"the journal of the ext4 on {device} cannot be replayed")

    def bind(self, source: Handle, target: str, *, read_only: bool) -> None:
        self._kernel.step("before bind")
        below = self.at(source.name)
        assert below is not None
        assert os.path.isdir(target)
        self._add(target, below.source, below.fs_type, below.device, read_only=read_only)
        self._kernel.step("after bind")

    def thaw(self, mount: Mount) -> bool:
        return False

    def unmount(self, path: str) -> None:
        self._kernel.step("before unmount")
        found = self.at(path)
        if found is not None:
            self._kernel.loop_below(found.source)
            self._kernel.mounted.remove(found)
            if not any(mount.device == found.device for mount in self._kernel.mounted):
                self._kernel.use(found.source, -1)
                self._kernel.ailing.pop(found.device, None)
                self._kernel.frozen.discard(found.device)
        self._kernel.step("after unmount")

    def _add(self, target: str, source: str, fs_type: str, device: tuple[int, int], *, read_only: bool) -> None:
        if not any(mount.device == device for mount in self._kernel.mounted):
            self._kernel.use(source, 1)
        options = frozenset({"ro" if read_only else "rw"})
        number = max((mount.mount_id for mount in self._kernel.mounted), default=100) + 1
        self._kernel.mounted.append(Mount(number, 1, device, "/", target, options, fs_type, source, options))


class KernelFileSystemHealth(FileSystemHealth):
    """Sees what the test did to a mounted file system, and the flag that it was mounted with."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(KernelMounts(kernel))
        self._kernel = kernel

    def ailment(self, mount: Mount) -> Ailment | None:
        return self._kernel.ailing.get(mount.device)

    def thaw(self, mount: Mount) -> bool:
        frozen = mount.device in self._kernel.frozen
        self._kernel.frozen.discard(mount.device)
        return frozen


class KernelCommands(Commands):
    """mkfs and e2fsck."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(Workers(()))
        self._kernel = kernel

    def run(
        self,
        argv: Sequence[str | Handle],
        *,
        timeout: float,
        ok_codes: Sequence[int] = (0,),
        by_name: bool = False,
    ) -> Completed:
        program, device = str(argv[0]), argv[-1]
        assert isinstance(device, Handle)
        self._kernel.step(f"before {program}")
        code = 0
        if program == "e2fsck":
            code = self._e2fsck(device.name)
        else:
            self._mkfs(program.removeprefix("mkfs."), device.name)
        self._kernel.step(f"after {program}")
        assert code in ok_codes
        return Completed(code, "UNEXPECTED INCONSISTENCY" if code == 4 else "", "")

    def _e2fsck(self, device: str) -> int:
        assert not any(mount.source == device for mount in self._kernel.mounted), "e2fsck of a mounted file system"
        content = self._kernel.read(device)
        if content.inside.broken:
            return 4
        code, content.inside.flagged = int(content.inside.flagged), False
        self._kernel.write(device, content)
        return code

    def _mkfs(self, fs_type: str, device: str) -> None:
        self._kernel.making(self._kernel.loop_below(device))
        assert not any(mount.source == device for mount in self._kernel.mounted), "mkfs under a mounted file system"
        content = self._kernel.read(device)
        content.inside = Inside()
        self._kernel.write(device, content)
        self._kernel.step("in mkfs")
        content.inside = Inside(fs_type=fs_type, fs_bytes=self._kernel.size(device))
        self._kernel.write(device, content)


class KernelWorkers(Workers):
    """Carries out the functions of workers on the fake kernel's devices, at once."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(())
        self._kernel = kernel

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        yield

    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        name = function.__name__
        self._kernel.step(f"before {name}")
        ours: Callable[..., Any] = getattr(self, f"_{name}", function)
        result = cast("R", ours(*args, **kwargs))
        self._kernel.step(f"after {name}")
        return result

    def _prove_blank(self, where: str, device: Handle, least: int, storage: Handle) -> None:
        if self._kernel.size(device.name) < least:
            raise DeviceShort(f"{where} is too short")
        if self._kernel.read(device.name) != Content():
            raise ForeignSignature(f"{where} holds something")

    def _prove_payload_blank(self, where: str, device: Handle, least: int, storage: Handle) -> None:
        if self._kernel.read(device.name).inside != Inside():
            raise ForeignSignature(f"{where} holds something")

    def _prove_never_mounted(self, where: str, device: Handle, size: int, storage: Handle, offset: int) -> None:
        inside = self._kernel.read(device.name).inside
        if inside.files or inside.raw:
            raise ForeignSignature(f"{where} holds something")

    def _format_device(
        self,
        where: str,
        device: Handle,
        size: int,
        chosen: LuksFormat,
        identity: LuksIdentity,
        limits: object,
        key: Passphrase,
        storage: Handle,
        token: bytes | None,
    ) -> str:
        if self._kernel.size(device.name) < size:
            raise DeviceShort(f"{where} is too short")
        self._kernel.formatting(device.name)
        content = self._kernel.read(device.name)
        if content.inside != Inside() or (content.luks is not None and content.luks.uuid != identity.uuid):
            raise ForeignSignature(f"{where} holds something")
        self._kernel.formats += 1
        self._kernel.write(device.name, Content(Luks(identity.uuid)))
        self._kernel.step("in format")
        digest = f"digest {self._kernel.formats}"
        self._kernel.write(device.name, Content(Luks(identity.uuid, key.reveal(), digest)))
        return digest

    def _back_up_header(self, where: str, device: Handle, path: str) -> None:
        Path(path).write_bytes(b"a header")

    def _check_passphrase(
        self, where: str, device: Handle, size: int, identity: LuksIdentity, limits: object, key: Passphrase
    ) -> None:
        found = self._kernel.read(device.name).luks
        if self._kernel.size(device.name) < size:
            raise DeviceShort(f"{where} is too short")
        if found is None:
            raise DeviceBlank(f"{where} is blank")
        if found.key is None or (found.uuid, found.digest) != (identity.uuid, identity.digest):
            raise InvalidHeader(f"{where} has another header")
        if found.key != key.reveal():
            raise Unauthenticated(f"the secret does not open {where}")

    def _open_device(
        self,
        where: str,
        device: Handle,
        size: int,
        identity: LuksIdentity,
        limits: object,
        key: Passphrase,
        opening: Opening,
    ) -> KeptKey:
        self._check_passphrase(where, device, size, identity, limits, key)
        if opening.name in self._kernel.mappings:
            raise CommandFailed(f"the name {opening.name} is taken")
        minor = next(n for n in range(100) if n not in {one.minor for one in self._kernel.mappings.values()})
        self._kernel.mappings[opening.name] = FakeMapping(
            opening.name,
            dm_uuid(opening.name, identity.uuid),
            minor,
            device.name,
            self._kernel.size(device.name) - DATA_OFFSET,
        )
        self._kernel.loops.use(device.name)
        self._kernel.step("in open")
        self._kernel.keyring.add(identity.uuid)
        return KeptKey(1, 2)

    def _resize_mapping(
        self,
        where: str,
        device: Handle,
        name: str,
        size: int,
        identity: LuksIdentity,
        limits: object,
        key: Passphrase | None,
        pinned: KeptKey | None,
    ) -> None:
        mapping = self._kernel.mappings[name]
        if self._kernel.size(device.name) < size + DATA_OFFSET:
            raise DeviceShort(f"{where} is too short")
        if key is not None:
            self._check_passphrase(where, device, size, identity, limits, key)
        elif identity.uuid not in self._kernel.keyring:
            raise FailedPrecondition(f"the volume key of {where} is not there")
        if mapping.size >= size:
            return
        mapping.suspended = True
        self._kernel.step("in resize")
        mapping.size = size
        mapping.suspended = False

    def _resume(self, name: str) -> None:
        self._kernel.mappings[name].suspended = False

    def _is_claimed(self, device: Handle) -> bool:
        return self._kernel.number(device.name) in self._kernel.elsewhere

    def _carries_error_flag(self, device: Handle) -> bool:
        return self._kernel.read(device.name).inside.flagged

    def _mount_unless_flagged(
        self, mounts: Mounts, device: Handle, target: str, fs_type: str, flags: int, data: str, repair: str
    ) -> Mounting:
        inside = self._kernel.read(device.name).inside
        if inside.flagged:
            return Mounting.LEFT_ALONE
        mounts.mount(device, target, fs_type, flags, data, repair)
        is_full = fs_type == "ext4" and inside.fs_bytes == self._kernel.size(device.name)
        return Mounting.FULL if is_full else Mounting.MOUNTED

    def _fsync_device(self, device: Handle) -> None:
        self._kernel.loop_below(device.name)

    def _read_signature(self, where: str, device: Handle) -> str | None:
        return self._kernel.read(device.name).inside.fs_type

    def _grow(self, where: str, mount: Handle, device: Handle, fs_type: str) -> bool:
        content = self._kernel.read(device.name)
        grown = content.inside.fs_bytes < self._kernel.size(device.name)
        content.inside.fs_bytes = self._kernel.size(device.name)
        self._kernel.write(device.name, content)
        return grown
