"""What is there of a volume on this node: one look at the kernel, by identity, for every decision.

Names and recorded stages only say where to look. Device, mapping, mounts and nodes belong to a volume because of what
is below them: the backing file of the loop device, the device and LUKS UUID of the mapping, the number of the mount.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property

from csi_driver.backends.base import Backend, shared
from csi_driver.host import blockdev
from csi_driver.host.devicemapper import Device
from csi_driver.host.handle import Handle, let_go
from csi_driver.host.mountinfo import Mount, MountTable
from csi_driver.host.mounts import Mounts
from csi_driver.luks.device import dm_uuid
from csi_driver.luks.mapping import Fit, Mappings, luks_uuid
from csi_driver.model.errors import DeviceAbsent, DeviceInUse, DriverError
from csi_driver.model.volume import VolumeRecord, is_mapping_name, mapping_name
from csi_driver.volumes.stages import Stage, Stages


@dataclass(frozen=True)
class Presence:
    """One moment of a volume on this node.

    `stage` is what was recorded of this boot. `mapping` is the one that was opened for the volume, and `fit` whether it
    is the volume's own now. `number` is (major, minor) of what pods get to see: the mapping, or the plain device.
    `mounts` are those of the file system on it, `nodes` the places where its node is bind-mounted; `table` is the mount
    table that they come from. What `is_going` an unstage let go of that found it busy: with its last user the number is
    another volume's.
    """

    volume_id: str
    stage: Stage | None
    mapping: Device | None
    fit: Fit
    number: tuple[int, int] | None
    mounts: tuple[Mount, ...]
    nodes: tuple[Mount, ...]
    table: MountTable = field(repr=False)
    is_going: bool = False

    @cached_property
    def staging(self) -> Mount | None:
        """The mount at the recorded staging path, of the volume's own file system."""
        return None if self.stage is None or self.stage.block else self.mount_at(self.stage.staging_path)

    @cached_property
    def publications(self) -> tuple[Mount, ...]:
        """Where pods, or others, see it: every place but the staging path."""
        return *(mount for mount in self.mounts if not self.is_copy(mount, self.staging)), *self.nodes

    def is_copy(self, mount: Mount, of: Mount | None) -> bool:
        """Whether it is that mount, lies on it, or is what propagation shows of it elsewhere: it goes with it."""
        return of is not None and (
            mount.mount_point == of.mount_point or self.table.place(mount) == self.table.place(of)
        )

    @property
    def is_open(self) -> bool:
        """Whether anything of it is attached, open or mounted."""
        return self.number is not None

    @property
    def has_device(self) -> bool:
        """Whether the device that the recorded stage made is there, and is the volume's own."""
        if self.stage is None or self.number is None or self.fit is Fit.STALE or self.is_going:
            return False
        return self.fit is Fit.FITS or self.stage.luks_uuid is None

    @property
    def is_complete(self) -> bool:
        """Whether all that the recorded stage made is there, and is the volume's own."""
        return self.stage is not None and self.has_device and (self.stage.block or self.staging is not None)

    @property
    def lacks_only_mount(self) -> bool:
        """Whether of the recorded stage the mount is missing, and nothing else: it is mounted nowhere.

        With its last mount the loop device of an unencrypted volume goes too.
        """
        if self.stage is None or self.stage.block:
            return False
        if not self.has_device and (self.is_open or self.stage.luks_uuid is not None):
            return False
        return not self.mounts and self.table.at(self.stage.staging_path) is None

    def mount_at(self, path: str) -> Mount | None:
        """The topmost mount at that path, if it is of the volume's file system."""
        return _mount_at(self.table, self.mounts, path)

    def shows_node(self, path: str) -> bool:
        """Whether what lies at that path is a node of the volume's device, links followed."""
        return self.number is not None and blockdev.is_node_of(path, self.number)

    def is_staged_at(self, path: str) -> bool:
        """Whether to unstage it there means this volume's stage, or what is left of one that nobody recorded."""
        if self.stage is not None:
            recorded = self.stage.staging_path
            return recorded == path or os.path.realpath(recorded) == os.path.realpath(path)
        return not (self.mounts or self.nodes) or self.mount_at(path) is not None


class Presences:
    """Looks at volumes; nothing is cached."""

    def __init__(self, backend: Backend, stages: Stages, mappings: Mappings, mounts: Mounts) -> None:
        self._backend = backend
        self._binds_itself = shared(backend) is None
        self._stages = stages
        self._mappings = mappings
        self._mounts = mounts

    def of(self, volume_id: str, record: VolumeRecord | None = None) -> Presence:
        """What is there of the volume; with its record, what is there is compared with that."""
        stage = self._stages.get(volume_id)
        name = mapping_name(volume_id)
        mapping = None if _is_plain(record, stage) else self._mappings.find(name)
        if mapping is not None and not self._mappings.is_made_for(mapping, name):
            mapping = None
        fit = Fit.ABSENT
        number = None
        if mapping is not None:
            number = mapping.major, mapping.minor
            fit = self.fit(volume_id, mapping, _recorded_uuid(record, stage) or luks_uuid(mapping.uuid, name) or "")
        elif stage is None or stage.luks_uuid is None:
            number = self._plain_device(volume_id, stage)
        is_raw = stage is not None and stage.block and stage.luks_uuid is None and self._binds_itself
        table = self._mounts.table()
        return Presence(
            volume_id=volume_id,
            stage=stage,
            mapping=mapping,
            fit=fit,
            number=number,
            mounts=() if number is None else tuple(table.of_device(number, stage.fs_type if stage else None)),
            nodes=() if number is None or (stage and not stage.block) else tuple(table.of_node(number)),
            table=table,
            is_going=is_raw and number is not None and blockdev.is_going(number),
        )

    def fit(self, volume_id: str, mapping: Device, uuid: str) -> Fit:
        """Whether that mapping, opened for the volume, is of that LUKS UUID and on the volume's own live device."""
        backings = self._mappings.backings(mapping)
        if mapping.uuid != dm_uuid(mapping.name, uuid) or not backings:
            return Fit.STALE
        return Fit.FITS if all(self._backend.is_device_of(volume_id, each) for each in backings) else Fit.STALE

    def refuse_others(self, volume_id: str, device: Handle | None = None) -> None:
        """Raise DeviceInUse where anything but the volume's own mapping lies on its device: whoever writes through that
        and whoever writes through the volume's mapping do not know of each other.

        `device` is the attached one where the caller holds it; without one, and none attached, there is nothing.
        """
        with ExitStack() as stack:
            if device is None and (device := self._backend.device_of(volume_id)) is not None:
                stack.enter_context(device)
            found = self._mappings.others_on(device.number, mapping_name(volume_id)) if device is not None else []
            if device is not None and found:
                raise DeviceInUse(
                    f"volume {volume_id} on {device} is open as {' and '.join(found)} too, by luks-csi recover or by "
                    f"hand; unmount that and close it first ({' and '.join(map(_closing, found))})"
                )

    def table(self) -> MountTable:
        """All mounts that this node's pods and the driver see now."""
        return self._mounts.table()

    def mount_on(self, number: tuple[int, int], fs_type: str, path: str) -> Mount | None:
        """The topmost mount at that path, if it is of the file system on that device."""
        table = self._mounts.table()
        return _mount_at(table, tuple(table.of_device(number, fs_type)), path)

    def is_staging_path(self, volume_id: str, path: str) -> bool:
        """Whether the volume is recorded as staged at that path."""
        stage = self._stages.get(volume_id)
        return stage is not None and stage.staging_path == path

    @staticmethod
    def other_on(volume_id: str, mount: Mount) -> str | None:
        """The name of the mapping of another volume that is shown there, if one is."""
        try:
            number = mount.device if mount.root == "/" else blockdev.device_number(mount.mount_point)
        except DriverError:
            number = mount.device
        name = blockdev.mapping_name_of(number)
        return name if name not in (None, mapping_name(volume_id)) and is_mapping_name(str(name)) else None

    @contextmanager
    def held(self, present: Presence) -> Iterator[Handle]:
        """What pods get to see of an open volume, held open and checked to be what was seen. Raises DeviceAbsent."""
        if present.mapping is not None:
            handle: Handle | None = self._mappings.open(present.mapping.name)
        else:
            handle = self._backend.device_of(present.volume_id)
        if handle is None:
            raise DeviceAbsent(f"the device of volume {present.volume_id} is gone; unstage and stage the volume")
        try:
            if handle.number != present.number:
                raise DeviceAbsent(f"the device of volume {present.volume_id} became another one meanwhile; call again")
            yield handle
        except BaseException:
            let_go(handle)
            raise
        handle.close()

    def _plain_device(self, volume_id: str, stage: Stage | None) -> tuple[int, int] | None:
        """The attached device of an unencrypted volume; where the stage says it was is looked at first."""
        if stage is not None:
            with suppress(DriverError):
                number = blockdev.device_number(stage.device)
                if self._backend.is_device_of(volume_id, number):
                    return number
        found = self._backend.device_of(volume_id)
        if found is None:
            return None
        with found:
            return found.number


def _mount_at(table: MountTable, mounts: tuple[Mount, ...], path: str) -> Mount | None:
    found = (table.at(path) or table.at(os.path.realpath(path))) if mounts else None
    return found if found in mounts else None


def _closing(path: str) -> str:
    """The command that closes what lies on a device."""
    folder, name = os.path.split(path)
    return f"cryptsetup close {name}" if folder == "/dev/mapper" else f"stop {path}"


def _is_plain(record: VolumeRecord | None, stage: Stage | None) -> bool:
    """Whether there can be no mapping: then a host without device-mapper will do."""
    if record is not None:
        return record.encryption is None
    return stage is not None and stage.luks_uuid is None


def _recorded_uuid(record: VolumeRecord | None, stage: Stage | None) -> str | None:
    if record is not None and record.luks is not None:
        return record.luks.uuid
    return stage.luks_uuid if stage is not None else None
