"""Where the records of a volume group's volumes are: a small logical volume in it with ext4, mounted for the driver.

<state-dir>/lvm.json    which volume group this node had: one that only has its name is not taken for it
<state-dir>/lvm/        the file system of the logical volume luks_csi_records
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from csi_driver.backends.lvmtool import LACKS, OURS, Group, LogicalVolume, VolumeGroup, dm_name
from csi_driver.host import blockdev
from csi_driver.host.commands import Commands
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.files import Files, read_file
from csi_driver.host.handle import Handle
from csi_driver.host.log import log
from csi_driver.host.mounts import Mounts
from csi_driver.host.workers import Workers
from csi_driver.model.errors import DeviceAbsent, DeviceMismatch, FailedPrecondition, ForeignSignature
from csi_driver.model.reading import decode
from csi_driver.model.settings import MIB, Limits

NAME: Final = "luks_csi_records"  # no volume has a name like it: see `lv_name` of the backend
SIZE: Final = 256 * MIB

OWNER: Final = f"{OURS}.owner="
"""The identity of the state directory whose driver has the group follows: a tag of the records."""

_MAKING: Final = "luks-csi.records=making"
_MADE: Final = "luks-csi.records=made"
_MOUNT_FLAGS: Final = 2 | 4 | 8 | 1024  # MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_NOATIME (mount(2))
_SUPERBLOCK: Final = 1024  # of ext4: Documentation/filesystems/ext4/super.rst
_MTIME: Final = struct.Struct("<44xI8xH62x16s")  # s_mtime, s_magic, s_volume_name
_MAGIC: Final = 0xEF53


class _Known(msgspec.Struct, frozen=True, kw_only=True):
    group: str
    name: str
    records: str


class GroupRecords:
    """The file system with the records, made once and mounted at `folder`; what it was is kept in `memory`."""

    def __init__(
        self,
        group: VolumeGroup,
        folder: Path,
        memory: Path,
        files: Files,
        workers: Workers,
        commands: Commands,
        mapper: DeviceMapper,
        mounts: Mounts,
        limits: Limits,
        owner: Callable[[], str],
    ) -> None:
        self.folder = folder
        self._owner = owner
        self._group = group
        self._memory = memory
        self._files = files
        self._workers = workers
        self._commands = commands
        self._mapper = mapper
        self._mounts = mounts
        self._limits = limits
        self._device: int | None = None

    def prepare(self) -> None:
        """Make the file system if this group never had one, and mount it.

        Raises FailedPrecondition for another group than this node had, for one that others use too, and wherever
        records may have been lost: a new file system never takes the place of one. A group that had its records keeps
        its other volumes when it lacks a disk: they must be put down too.
        """
        group, known = self._group.look(), self._known()
        if not group.is_usable:
            raise FailedPrecondition(
                f"the volume group {self._group.name} is shared, exported or read-only; this driver wants one that is "
                f"this node's alone, and writable"
            )
        if not group.is_whole:
            if known is None:
                raise FailedPrecondition(f"the volume group {self._group.name} {LACKS}")
            log.warning("a volume group lacks disks", volume_group=self._group.name)
        if known is not None and known.group != group.uuid:
            raise FailedPrecondition(
                f"the volume group {self._group.name} is not the one that this node had: expected the UUID "
                f"{known.group}, found {group.uuid}; attach its disks or, if it is meant to be a new one, remove "
                f"{self._memory}"
            )
        found = self._checked(group, known)
        self._own(found)
        if _MAKING in found.tags:
            self._format(found)
        self._mount(found)
        fresh = _Known(group=group.uuid, name=self._group.name, records=found.uuid)
        if fresh != known:
            self._files.write(self._memory, msgspec.json.encode(fresh))

    def check(self) -> None:
        """Raise FailedPrecondition when the records are not mounted; costs one stat."""
        device = os.stat(self.folder).st_dev if self.folder.exists() else None
        if device is not None and device == self._device:
            return
        if device is not None:
            name = blockdev.mapping_name_of((os.major(device), os.minor(device)))
            if name == dm_name(self._group.name, NAME):
                self._device = device
                return
        raise FailedPrecondition(
            f"the records of the volume group {self._group.name} are not mounted at {self.folder}; start the driver's "
            f"server on this node, which mounts them, or run this where it runs"
        )

    def _known(self) -> _Known | None:
        return _read(self._memory)

    def _checked(self, group: Group, known: _Known | None) -> LogicalVolume:
        where = f"{self._group.name}/{NAME}"
        found = self._group.find(NAME)
        if found is None:
            if known is not None or self._group.ours():
                raise FailedPrecondition(
                    f"the volume group {self._group.name} has volumes of this driver, or had, and {where}, which has "
                    f"their records, is gone; restore it, nothing is made in its place"
                )
            self._group.make(NAME, SIZE, [_MAKING])
            found = self._group.find(NAME)
            log.info("records made in a volume group", volume_group=self._group.name, uuid=group.uuid)
        if found is None or OURS not in found.tags or not {_MAKING, _MADE} & found.tags:
            raise FailedPrecondition(
                f"the logical volume {where} was not made by this driver: it lacks the tag {OURS}; rename it"
            )
        if known is not None and _MAKING in found.tags:
            raise FailedPrecondition(
                f"the logical volume {where} is tagged as never used, and this node has used it; nothing was written. "
                f"Restore LVM's metadata, or run lvchange --deltag {_MAKING} --addtag {_MADE} {where}"
            )
        if known is not None and known.records != found.uuid:
            raise FailedPrecondition(
                f"the logical volume {where} is not the one that this node had: expected the UUID {known.records}, "
                f"found {found.uuid}; restore that one, or remove {self._memory} if this one is meant"
            )
        return found

    def _own(self, records: LogicalVolume) -> None:
        """Take the group for this state directory, if it is nobody's. Raises FailedPrecondition for another's."""
        mine = f"{OWNER}{self._owner()}"
        if mine not in records.tags:
            _refuse_owned(self._group.name, records, mine)
            self._group.retag(NAME, None, mine)
            found = self._group.find(NAME)
            try:
                _refuse_owned(self._group.name, found or records, mine)  # by who did so at the same moment
            except FailedPrecondition:
                self._group.retag(NAME, mine, None)
                raise

    def _format(self, volume: LogicalVolume) -> None:
        """What is `making` was never mounted, as that comes behind `made`; only an older metadata of LVM says else."""
        with self._open(volume) as device:
            size = blockdev.size_bytes(device.fd)
            name, limit = f"{self._group.name}/{NAME}", self._limits.format_seconds
            self._workers.call(f"luks-records of {name}", limit, refuse_used, name, device)
            self._workers.call(f"luks-zero of {name}", limit, blockdev.zero_out, device, 0, size, limit)
            self._commands.run(["mkfs.ext4", "-q", "-F", "-m0", "-L", NAME, device], timeout=limit)
            self._workers.call(f"luks-sync of {name}", limit, blockdev.fsync_device, device)
        self._group.retag(NAME, _MAKING, _MADE)

    def _mount(self, volume: LogicalVolume) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        with self._open(volume) as device:
            mount = self._mounts.at(os.path.realpath(self.folder))
            if mount is None:
                self._workers.call(
                    f"luks-mount of {self._group.name}/{NAME}",
                    self._limits.mount_seconds,
                    self._mounts.mount,
                    device,
                    str(self.folder),
                    "ext4",
                    _MOUNT_FLAGS,
                    "errors=remount-ro",
                    f"e2fsck on {self._group.name}/{NAME}",
                )
            elif mount.device != device.number:
                raise DeviceMismatch(
                    f"{mount.source} is mounted at {self.folder} and not {self._group.name}/{NAME}; unmount it"
                )
        self.check()

    def _open(self, volume: LogicalVolume) -> Handle:
        name = dm_name(self._group.name, NAME)
        if self._mapper.get(name) is None:
            self._group.activate(volume.uuid)
        handle = self._mapper.open(name)
        if handle.device.uuid == dm_uuid(volume.group_uuid, volume.uuid):
            return handle
        handle.close()
        raise DeviceAbsent(f"the device {name} is not the logical volume {self._group.name}/{NAME}; remove it")


def remembered_name(memory: Path) -> str:
    """The name of the volume group that a state directory had. Raises FailedPrecondition."""
    found = _read(memory)
    if found is None:
        raise FailedPrecondition(f"{memory} is gone; start the server with --volume-group")
    return found.name


def _read(memory: Path) -> _Known | None:
    try:
        return decode(read_file(memory), _Known)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError:
        raise FailedPrecondition(
            f"{memory} cannot be read; remove it if the volume group of this node is known to be the right one"
        ) from None


def _refuse_owned(group: str, records: LogicalVolume, mine: str) -> None:
    if others := sorted(tag for tag in records.tags if tag.startswith(OWNER) and tag != mine):
        raise FailedPrecondition(
            f"the volume group {group} belongs to the driver whose state directory has the identity "
            f"{others[0].removeprefix(OWNER)}, and this one's is {mine.removeprefix(OWNER)}: two would not know what "
            f"the other one has open. If that state directory is gone for good, run "
            f"lvchange --deltag {others[0]} {group}/{NAME}"
        )


def dm_uuid(group_uuid: str, uuid: str) -> str:
    """The device-mapper UUID of a logical volume, by which it is known: names are anybody's."""
    return "LVM-" + f"{group_uuid}{uuid}".replace("-", "")


def refuse_used(where: str, device: Handle) -> None:
    """Raise ForeignSignature for an ext4 with our name that was mounted. Runs in a worker."""
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        mounted, magic, label = _MTIME.unpack(blockdev.read_at(descriptor, _SUPERBLOCK, _MTIME.size))
    finally:
        os.close(descriptor)
    if magic == _MAGIC and label.rstrip(b"\0") == NAME.encode()[:16] and mounted:
        raise ForeignSignature(
            f"the logical volume {where} is tagged as never used and holds records that were mounted; nothing was "
            f"written. If they are those of these volumes, run lvchange --deltag {_MAKING} --addtag {_MADE} {where}, "
            f"else overwrite its first MiB"
        )
