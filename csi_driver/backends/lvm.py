"""Volumes as logical volumes of one LVM volume group of this node, thick or in a thin pool.

<records>/{volumes,new,trash}/<id>/    the records: `csi_driver.backends.folders`, in the group itself
<records>/…/<id>/lv.json               which logical volume is the volume's, and how much of it is known to be clear

A logical volume `luks-<id>` carries two tags, `luks-csi` and `luks-csi.id=<id>`. What lacks them is not touched.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from csi_driver.backends.base import Fill, Space
from csi_driver.backends.folders import VolumeFolders
from csi_driver.backends.lvmpool import PoolUse, ThinPools
from csi_driver.backends.lvmrecords import GroupRecords
from csi_driver.backends.lvmtool import LACKS, LogicalVolume, VolumeGroup
from csi_driver.backends.lvmvolume import (
    ID_TAG,
    STATE,
    UNSEEN_TAG,
    VERSION,
    GroupVolumes,
    LvState,
    unseen_from,
)
from csi_driver.backends.records import RecordCodec
from csi_driver.host import blockdev
from csi_driver.host.devicemapper import Device, DeviceMapper
from csi_driver.host.files import Files
from csi_driver.host.handle import Handle
from csi_driver.host.log import log
from csi_driver.host.workers import Workers
from csi_driver.model.errors import (
    DeviceAbsent,
    DeviceInUse,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
)
from csi_driver.model.settings import Limits
from csi_driver.model.volume import VolumeParameters, VolumeRecord


class LvmBackend:
    """Logical volumes of `group`. `pool_limit` is the part of a thin pool, from 0 to 1, above which nothing new is made
    in it; `zero_seconds` is how long one call at least clears what belonged to others.
    """

    name = "lvm"

    def __init__(
        self,
        group: VolumeGroup,
        records: GroupRecords,
        codec: RecordCodec,
        files: Files,
        workers: Workers,
        mapper: DeviceMapper,
        limits: Limits,
        pool_limit: float,
        zero_seconds: float = 8.0,
    ) -> None:
        self._group = group
        self._records = records
        self._unchecked = VolumeFolders(records.folder, files, codec, self._drop)
        self._files = files
        self._workers = workers
        self._mapper = mapper
        self._limits = limits
        self._pools = ThinPools(group, mapper)
        self._volumes = GroupVolumes(group, self._pools, mapper, files, workers, limits, zero_seconds)
        self._pool_limit = pool_limit

    @property
    def _folders(self) -> VolumeFolders:
        """The records, looked at to be there: without their mount every volume would seem deleted."""
        self._records.check()
        return self._unchecked

    def prepare(self) -> None:
        """Make and mount the file system for the records."""
        self._records.prepare()
        self._folders.prepare()

    def create(self, record: VolumeRecord, size: int) -> VolumeRecord:
        """Make the logical volume, clear what it holds of others, and rename its record in.

        Raises Aborted while a large one is being cleared: the call goes on with it.
        """
        self._folders.refuse_known(record.id)
        pool = record.parameters.thin_pool

        def make(fresh: Path) -> None:
            state = self._made(fresh, record.id, size, pool)
            with self._volumes.open(record.id, state) as device:
                self._volumes.clear(record.id, fresh, state, device, 0)

        return self._folders.create(record, make, resume=True)

    def has(self, volume_id: str) -> bool:
        return self._folders.has(volume_id)

    def get(self, volume_id: str) -> VolumeRecord:
        return self._folders.get(volume_id)

    def accept_record(self, volume_id: str) -> VolumeRecord:
        return self._folders.accept_record(volume_id)

    def update(self, record: VolumeRecord) -> VolumeRecord:
        return self._folders.update(record)

    def delete(self, volume_id: str) -> None:
        self._folders.delete(volume_id, self._refuse_open)

    def ids(self) -> Sequence[str]:
        return self._folders.ids()

    def grow(self, volume_id: str, size: int) -> None:
        """Lengthen it; of a thick one the new extents are cleared before anybody is shown them.

        A plain thick volume that is attached would show them at once: FailedPrecondition.
        """
        folder = self._folders.volume(volume_id)
        state = self._volumes.state(folder)
        if state is None:
            raise NotFound(f"volume {volume_id} has no logical volume: {folder / STATE} is absent")
        found = self._volumes.own(volume_id, state)
        device = self._volumes.device(volume_id, state)
        # A lasting one may be a pod's node, which counts as no opener.
        is_shown = device is not None and (device.open_count or not device.is_leaving)
        to_clear = state.pool is None and (found.size < size or not state.settled)
        if to_clear and is_shown and self._is_plain(volume_id):
            raise FailedPrecondition(
                f"volume {volume_id} is not encrypted, is attached, and has extents of its own: what the new ones hold "
                f"of others would be seen before it is cleared; unstage it, then enlarge it"
            )
        if found.size < size:
            if (state.settled or unseen_from(found) is None) and self._is_plain(volume_id):
                self._volumes.refuse_unclear(volume_id, state, found.size)  # what is between would never be cleared
            self._check_room(volume_id, size - found.size, state.pool)
            state = self._volumes.grown(folder, state, found, size)
            found = self._volumes.own(volume_id, state)
        if device is not None and device.size_bytes < found.size:
            self._group.refresh(found.name)  # also where an earlier call was cut before it
        if not state.settled:
            with self._volumes.open(volume_id, state) as opened:
                self._volumes.settle(volume_id, folder, state, opened, is_plain=self._is_plain(volume_id))

    @contextmanager
    def storage(self, volume_id: str) -> Iterator[Handle]:
        """The logical volume."""
        with self.open_storage(volume_id) as handle:
            self._settle(volume_id, handle)
            yield handle

    def open_storage(self, volume_id: str) -> Handle:
        """The logical volume: nobody knows what was ever written to it, so samples are read of it."""
        return self._volumes.open(volume_id, self._pinned(volume_id))

    def is_newest(self, record: VolumeRecord) -> bool:
        return self._folders.is_newest(record)

    def header_copy(self, volume_id: str) -> Path:
        return self._folders.header_copy(volume_id)

    def has_header_copy(self, volume_id: str) -> bool:
        return self._folders.has_header_copy(volume_id)

    def header_before(self, volume_id: str) -> Path:
        return self._folders.header_before(volume_id)

    def keep_header_copy(self, volume_id: str, fill: Fill) -> None:
        self._folders.keep_header_copy(volume_id, fill)

    def attach(self, volume_id: str, *, lasting: bool) -> Handle:
        """Show the logical volume; device-mapper removes the device with its last user unless it is lasting."""
        state = self._pinned(volume_id)
        handle = self._volumes.open(volume_id, state)
        try:
            self._settle(volume_id, handle)
            stays = self._mapper.keep if lasting else self._mapper.let_go
            stays(handle.device.name)  # not before it is settled: what fails leaves no device
        except BaseException:
            handle.close()
            raise
        if state.pool is not None and (use := self._pools.use(state.pool)) and self._is_full(use):
            log.warning("a thin pool is nearly full", volume_group=self._group.name, pool=state.pool, found=str(use))
        return handle

    def guard(self, volume_id: str) -> None:
        """Nothing is to be done: there is one device, and the mapping or mount on it has it for itself.

        A file can be bound a second time, and a loop device over it knows of no other; a second device over a logical
        volume can only be made of the first, which O_EXCL forbids (open(2)): to cryptsetup, mkfs, LVM and this driver.
        """

    def refresh(self, device: Handle) -> None:
        """LVM has shown the new size already."""

    def device_of(self, volume_id: str) -> Handle | None:
        """The active device of the pinned logical volume."""
        state = self._volumes.state(self._folders.volume(volume_id))
        if state is None or self._volumes.device(volume_id, state) is None:
            return None
        with suppress(DeviceAbsent):
            handle = self._mapper.open(self._volumes.dm_name_of(volume_id))
            if handle.device.uuid == state.dm_uuid:
                return handle
            handle.close()
        return None

    def is_device_of(self, volume_id: str, number: tuple[int, int]) -> bool:
        """Whether device-mapper knows it by the UUIDs of group and logical volume that are pinned."""
        state = self._volumes.state(self._folders.volume(volume_id))
        expected = state.dm_uuid if state is not None else None
        return expected is not None and blockdev.mapping_uuid_of(number) == expected

    def detach(self, volume_id: str) -> None:
        """Remove the device; the logical volume stays. For a group that no other node uses LVM does no more."""
        state = self._volumes.state(self._folders.volume(volume_id))
        device = self._volumes.device(volume_id, state) if state is not None else None
        if device is not None:
            try:
                self._mapper.remove(device.name)
            except DeviceInUse:
                raise self._in_use(volume_id, device, "let go of") from None

    def space(self, parameters: VolumeParameters | None = None) -> Space:
        """Free extents; of a thin pool what is free of its data below the limit: room now, not room promised.

        None is to be had in a group that lacks disks.
        """
        pool, group = parameters.thin_pool if parameters is not None else None, self._group.look()
        if not group.is_whole:
            return Space(group.size, group.free, 0)
        if pool is None:
            return Space(group.size, group.free, group.free)
        use = self._pools.shown(pool)
        return Space(use.size, int(use.size * (1 - use.data)), self._room(use))

    def orphans(self) -> Sequence[str]:
        """As the folders tell, and logical volumes of ours that no folder knows of."""
        folders = self._folders
        found = folders.orphans()
        known = {*folders.ids(), *(Path(path).name for path in found)}
        ours = (tag.removeprefix(ID_TAG) for tags in self._group.ours() for tag in tags if tag.startswith(ID_TAG))
        return sorted((*found, *(f"{self._group.name}/{each}" for each in ours if each not in known)))

    def remove_orphans(self, volume_id: str) -> Sequence[str]:
        """Remove what is half-made or half-deleted; a logical volume that lost its record holds data and stays."""
        return self._folders.remove_orphans(volume_id)

    def full_pools(self) -> Sequence[str]:
        return [self._told(pool, use) for pool, use in self._pools_in_use() if self._is_full(use)]

    def fullest_pool(self) -> int:
        return int(100 * max((use.fullest for _, use in self._pools_in_use()), default=0.0))

    def ailment(self, volume_id: str) -> str | None:
        state = self._volumes.state(self._folders.volume(volume_id))
        use = self._pools.use(state.pool) if state is not None and state.pool is not None else None
        return self._told(state.pool, use) if state is not None and state.pool and use and self._is_full(use) else None

    def _settle(self, volume_id: str, device: Handle) -> None:
        folder, state = self._folders.volume(volume_id), self._pinned(volume_id)
        self._volumes.settle(volume_id, folder, state, device, is_plain=self._is_plain(volume_id))

    def _is_full(self, use: PoolUse) -> bool:
        return use.fullest >= self._pool_limit or not use.is_well

    def _told(self, pool: str, use: PoolUse) -> str:
        return (
            f"its thin pool {self._group.name}/{pool} is nearly full: {use}, the limit is {self._pool_limit:.0%}; "
            f"extend it (lvextend) before writes fail"
        )

    def _pools_in_use(self) -> Sequence[tuple[str, PoolUse]]:
        """The thin pools that volumes here are in and that the kernel shows, with how full they are."""
        folders = self._folders
        states = (self._volumes.state(folders.volume(volume_id)) for volume_id in folders.ids())
        names = sorted({state.pool for state in states if state is not None and state.pool is not None})
        return [(name, use) for name in names if (use := self._pools.use(name)) is not None]

    def _made(self, fresh: Path, volume_id: str, size: int, pool: str | None) -> LvState:
        """The logical volume of a volume in the making, as an earlier call left it or made now."""
        name = self._volumes.name_of(volume_id)
        state, found = self._volumes.state(fresh), self._group.find(name)
        if found is not None:
            self._volumes.refuse_foreign(volume_id, found)
            if state is None or unseen_from(found) != 0:
                raise FailedPrecondition(
                    f"volume {volume_id} cannot be made: the logical volume {self._group.name}/{name} was made for it "
                    f"before, has no record and may hold data; restore its record, or remove it with lvremove"
                )
            if state.pool == pool and found.size - size in range(self._group.look().extent) and state.uuid:
                return state
            self._remove(found)
        self._check_room(volume_id, size, pool)
        state = LvState(version=VERSION, pool=pool, clear=0 if pool is None else None)
        self._volumes.write(fresh, state)  # before it is made: what is there without this is not taken for a leftover
        self._files.sync_folder(fresh.parent)
        self._group.make(name, size, [f"{ID_TAG}{volume_id}", f"{UNSEEN_TAG}0"], pool)
        made = self._group.find(name)
        if made is None:
            raise DeviceAbsent(f"the logical volume {self._group.name}/{name} was made and is gone; call again")
        self._volumes.refuse_foreign(volume_id, made)
        state = msgspec.structs.replace(state, uuid=made.uuid, group_uuid=made.group_uuid)
        self._volumes.write(fresh, state)
        return state

    def _drop(self, folder: Path, erase: int) -> None:
        """Remove the logical volume of that folder; another one that has come to its name stays.

        So does one that was made to its end, where the folder is that of one in the making: an older record.
        """
        volume_id, state = folder.name, self._volumes.state(folder)
        found = self._group.find(self._volumes.name_of(volume_id)) if state is not None else None
        if state is None or found is None:
            return
        is_other = state.uuid not in (None, found.uuid)
        is_foreign = state.uuid is None and not self._volumes.is_ours(volume_id, found)
        if is_other or is_foreign or (folder == self._unchecked.fresh(volume_id) and unseen_from(found) != 0):
            log.warning("a logical volume was left alone", volume_id=volume_id, logical_volume=found.name)
            return
        self._volumes.refuse_foreign(volume_id, found)
        self._refuse_open(volume_id, state)
        if erase and state.uuid is not None:
            with self._volumes.open(volume_id, state, to_erase=True) as device:
                what = f"luks-erase of volume {volume_id}"
                self._workers.call(what, self._limits.format_seconds, blockdev.overwrite, device, erase)
        self._remove(found)

    def _remove(self, found: LogicalVolume) -> None:
        if found.pool is not None:
            self._pools.show(found.pool)
        self._group.remove(found.uuid)

    def _refuse_open(self, volume_id: str, state: LvState | None = None) -> None:
        state = state or self._volumes.state(self._folders.volume(volume_id))
        device = self._volumes.device(volume_id, state) if state is not None else None
        if device is not None and device.open_count:
            raise self._in_use(volume_id, device, "deleted")
        if state is None or state.pool is not None:
            return  # snapshots of a thin one need no origin
        name = self._volumes.name_of(volume_id)
        if made := self._group.made_of(name):
            raise DeviceInUse(
                f"volume {volume_id} cannot be deleted: LVM would remove {', '.join(made)} of the volume group "
                f"{self._group.name} with it, made of its logical volume {name}; remove them by lvremove if nobody "
                f"needs them"
            )

    def _in_use(self, volume_id: str, device: Device, what: str) -> DeviceInUse:
        on_top = blockdev.on_top_of((device.major, device.minor))
        return DeviceInUse(
            f"volume {volume_id} cannot be {what}: its logical volume {self._group.name}/"
            f"{self._volumes.name_of(volume_id)} is still in use as /dev/dm-{device.minor}"
            f"{', below ' + ' and '.join(on_top) if on_top else ''}; unpublish and unstage it, or end what else uses it"
        )

    def _check_room(self, volume_id: str, size: int, pool: str | None) -> None:
        group = self._group.look()
        if not group.is_whole:
            raise ResourceExhausted(f"no room for volume {volume_id}: the volume group {self._group.name} {LACKS}")
        if pool is None:
            if size > group.free:
                raise ResourceExhausted(
                    f"no room for volume {volume_id} in the volume group {self._group.name}: {size} bytes are wanted "
                    f"and {group.free} are free; extend it or choose another node"
                )
            return
        use = self._pools.shown(pool)
        where = f"the thin pool {self._group.name}/{pool}"
        if use.fullest >= self._pool_limit:
            raise ResourceExhausted(
                f"no room for volume {volume_id} in {where}: {use}, and above {self._pool_limit:.0%} nothing new is "
                f"made (--thin-pool-limit); extend it (lvextend) or free space in it"
            )
        if size > self._room(use):
            raise ResourceExhausted(
                f"no room for volume {volume_id} in {where}: {size} bytes are wanted and {self._room(use)} are free "
                f"below the limit of {self._pool_limit:.0%}; extend it (lvextend) or choose another node"
            )

    def _room(self, use: PoolUse) -> int:
        return 0 if use.metadata >= self._pool_limit else max(0, int(use.size * (self._pool_limit - use.data)))

    def _is_plain(self, volume_id: str) -> bool:
        return self.get(volume_id).encryption is None

    def _pinned(self, volume_id: str) -> LvState:
        folder = self._folders.volume(volume_id)
        if (state := self._volumes.state(folder)) is None:
            raise DeviceAbsent(f"volume {volume_id} has no logical volume: {folder / STATE} is absent")
        return state
