"""A volume's logical volume: which one it is, how it is told from others, shown, and cleared of what others left.

A logical volume `luks-<id>` carries two tags, `luks-csi` and `luks-csi.id=<id>`. What lacks them is not touched. A
third, `luks-csi.unseen=<bytes>`, is there as long as nobody was ever shown what lies behind so many bytes. LVM keeps it
and not the records, as those may be older than the volume (a restored backup): by them alone nothing is overwritten or
thrown away.
"""

import hashlib
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from csi_driver.backends.lvmpool import ThinPools
from csi_driver.backends.lvmrecords import dm_uuid
from csi_driver.backends.lvmtool import OURS, LogicalVolume, VolumeGroup, dm_name
from csi_driver.host import blockdev, deadline
from csi_driver.host.devicemapper import Device, DeviceMapper, MappingHandle
from csi_driver.host.files import Files, read_file
from csi_driver.host.handle import Handle
from csi_driver.host.workers import Workers
from csi_driver.model.errors import Aborted, DeviceAbsent, DeviceMismatch, DriverError, FailedPrecondition
from csi_driver.model.reading import decode
from csi_driver.model.settings import Limits

VERSION: Final = 1
"""Of lv.json."""

ID_TAG: Final = f"{OURS}.id="
"""The volume's id follows."""

UNSEEN_TAG: Final = f"{OURS}.unseen="
"""The number of bytes before what nobody was ever shown follows."""

STATE: Final = "lv.json"
"""Beside the record of each volume."""
_TRIES: Final = 5
_ANSWER_SECONDS: Final = 5.0  # for the answer to reach a caller who still waits
_LONGEST_DM_NAME: Final = 120  # of 127 (<linux/dm-ioctl.h>), as LVM puts suffixes behind some


class LvState(msgspec.Struct, frozen=True, kw_only=True):
    """Which logical volume is the volume's; without `uuid` it was about to be made.

    Its first `clear` bytes hold nothing of who had them before. None where it is thin: its blocks come as zeros. It is
    `settled` once it has no tag `luks-csi.unseen` any more.
    """

    version: int
    pool: str | None
    uuid: str | None = None
    group_uuid: str | None = None
    clear: int | None = None
    settled: bool = False

    @property
    def dm_uuid(self) -> str | None:
        """By which its device is known."""
        return dm_uuid(self.group_uuid, self.uuid) if self.uuid and self.group_uuid else None


class GroupVolumes:
    """The logical volumes of `group` that are volumes; `zero_seconds` is how long one is cleared at
    least by each call, and between two notes of how far that came.
    """

    def __init__(
        self,
        group: VolumeGroup,
        pools: ThinPools,
        mapper: DeviceMapper,
        files: Files,
        workers: Workers,
        limits: Limits,
        zero_seconds: float,
    ) -> None:
        self._group = group
        self._pools = pools
        self._mapper = mapper
        self._files = files
        self._workers = workers
        self._limits = limits
        self._zero_seconds = zero_seconds

    def refuse_foreign(self, volume_id: str, found: LogicalVolume) -> None:
        """Raise FailedPrecondition for one that was not made for that volume."""
        if not self.is_ours(volume_id, found):
            raise FailedPrecondition(
                f"the logical volume {self._group.name}/{found.name} has the name of volume {volume_id} and was not "
                f"made for it: it lacks the tags {OURS} and {ID_TAG}{volume_id}; it was left as it is, rename it"
            )

    @staticmethod
    def is_ours(volume_id: str, found: LogicalVolume) -> bool:
        """Whether its tags say that it was made for that volume."""
        return {OURS, f"{ID_TAG}{volume_id}"} <= found.tags

    def own(self, volume_id: str, state: LvState) -> LogicalVolume:
        """The pinned logical volume. Raises DeviceAbsent, FailedPrecondition."""
        found = self._group.find(self.name_of(volume_id))
        if found is None or found.uuid != state.uuid:
            raise DeviceAbsent(
                f"volume {volume_id} has no logical volume {self._group.name}/{self.name_of(volume_id)} with the UUID "
                f"{state.uuid}; attach the disks of the group, or restore it"
            )
        self.refuse_foreign(volume_id, found)
        return found

    def open(self, volume_id: str, state: LvState, *, to_erase: bool = False) -> MappingHandle:
        """Show and open the pinned logical volume, and no other that has its name; `to_erase` it from a full pool too.

        What is shown for this alone goes with its last user, and what is shown already stays as long as it would.
        """
        name = self.dm_name_of(volume_id)
        if state.uuid is None:
            raise DeviceAbsent(f"volume {volume_id} has no logical volume yet")
        shown, handle = self._shown(volume_id, state, state.uuid, to_erase=to_erase)
        try:
            if handle.device.uuid != state.dm_uuid:
                raise DeviceMismatch(
                    f"the device {name} is not the logical volume of volume {volume_id}: expected {state.dm_uuid}, "
                    f"found {handle.device.uuid}; remove it with 'dmsetup remove {name}'"
                )
            if not shown:
                self._mapper.let_go(name)
        except BaseException:
            handle.close()
            raise
        return handle

    def _shown(self, volume_id: str, state: LvState, uuid: str, *, to_erase: bool) -> tuple[bool, MappingHandle]:
        """Its device, opened, and whether it was there already."""
        name = self.dm_name_of(volume_id)
        for left in reversed(range(_TRIES)):
            device = self._mapper.get(name)
            shown = device is not None and bool(device.targets)
            if device is not None and device.suspended:
                self._group.refresh(self.name_of(volume_id))
            if shown and state.pool is not None:
                self._pools.resume(state.pool)
            if not shown:
                if state.pool is not None:
                    self._pools.shown(state.pool, to_erase=to_erase)
                self._activate(state, uuid)
            try:
                return shown, self._mapper.open(name)
            except DeviceAbsent:
                if not left or not shown:  # else it went away with its last user, just now
                    self._hide(state)
                    self.own(volume_id, state)
                    raise
        raise DeviceAbsent(f"the device {name} of volume {volume_id} goes away again and again; call again")

    def _activate(self, state: LvState, uuid: str) -> None:
        try:
            self._group.activate(uuid)
        except DriverError:
            # A program that was killed may have shown it before it could say so.
            with suppress(DriverError):
                self._hide(state)
            raise

    def _hide(self, state: LvState) -> None:
        """Show no more what was shown for nothing: in vain, or by another name than the logical volume has by now."""
        for name in self._mapper.names():
            device = self._mapper.get(name)
            if device is not None and device.uuid == state.dm_uuid and not device.open_count:
                self._mapper.let_go(name)

    def settle(self, volume_id: str, folder: Path, state: LvState, device: Handle, *, is_plain: bool) -> None:
        """Before anybody is shown it: clear what nobody was, and take the tag off that says so.

        Raises Aborted when something is left to clear, and FailedPrecondition for a plain one that is longer than is
        known to be clear: somebody else lengthened it.
        """
        if not state.settled:
            found = self.own(volume_id, state)
            unseen = unseen_from(found)
            if unseen is not None:
                state = self.clear(volume_id, folder, state, device, unseen)
                self._group.retag(found.name, f"{UNSEEN_TAG}{unseen}", None)
            self.write(folder, msgspec.structs.replace(state, settled=True))
        if is_plain:
            self.refuse_unclear(volume_id, state, blockdev.size_bytes(device.fd))

    def refuse_unclear(self, volume_id: str, state: LvState, size: int) -> None:
        """Raise FailedPrecondition where its `size` bytes are more than are known to hold nothing of others."""
        if state.clear is not None and state.clear < size:
            raise FailedPrecondition(
                f"the logical volume {self._group.name}/{self.name_of(volume_id)} of volume {volume_id} has {size} "
                f"bytes and {state.clear} are known to hold nothing of others, by a record that is older or because it "
                f"was lengthened by hand; restore the newest records, or shorten it (lvreduce) if nothing lies there"
            )

    def clear(self, volume_id: str, folder: Path, state: LvState, device: Handle, unseen: int) -> LvState:
        """Let everything behind `unseen` bytes read as zeros, for as long as the caller waits, and for a while anyhow.

        Callers have seen the tag that permits it. Raises Aborted when something is left.
        """
        size = blockdev.size_bytes(device.fd)
        if state.clear is None or state.clear >= size:
            return state
        done = state.clear
        end = time.monotonic() + max(self._zero_seconds, deadline.seconds_left() - _ANSWER_SECONDS)
        while done < size:
            done = self._workers.call(
                f"luks-zero of volume {volume_id}",
                self._zero_seconds + self._limits.format_seconds,
                blockdev.zero_out,
                device,
                max(done, unseen),
                size,
                self._zero_seconds,
            )
            state = msgspec.structs.replace(state, clear=done)
            self.write(folder, state)
            if done < size and time.monotonic() >= end:
                raise Aborted(
                    f"the logical volume of volume {volume_id} is being cleared, {done * 100 // size} % are done; call "
                    f"again, which goes on with it"
                )
        return state

    def grown(self, folder: Path, state: LvState, found: LogicalVolume, size: int) -> LvState:
        """Lengthen it to `size` bytes at least, told before as what nobody was shown yet."""
        unseen = unseen_from(found)
        # One that is there though all was settled is of a growth of which an older record knows nothing: what it lets
        # be cleared was shown since, and written to. It goes before the record says that there is something to clear.
        if unseen is None or unseen > found.size or (state.settled and unseen != found.size):
            stale = None if unseen is None else f"{UNSEEN_TAG}{unseen}"
            self._group.retag(found.name, stale, f"{UNSEEN_TAG}{found.size}")
        # It may have been shortened since, and what was cut off may have been another's meanwhile.
        clear = None if state.clear is None else min(state.clear, found.size)
        state = msgspec.structs.replace(state, settled=False, clear=clear)
        self.write(folder, state)
        self._group.extend(found.name, size)
        return state

    def state(self, folder: Path) -> LvState | None:
        """What a volume's folder says of its logical volume, if anything. Raises FailedPrecondition."""
        path = folder / STATE
        try:
            found = decode(read_file(path), LvState)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (msgspec.DecodeError, UnicodeError) as error:
            raise FailedPrecondition(f"{path} cannot be read ({error}); restore it from a backup") from None
        if found.version != VERSION:
            raise FailedPrecondition(f"{path} has version {found.version}; run the driver that wrote it on this node")
        return found

    def write(self, folder: Path, state: LvState) -> None:
        """Say it, durably. Raises OSError."""
        self._files.write(folder / STATE, msgspec.json.encode(state))

    def device(self, volume_id: str, state: LvState) -> Device | None:
        """What shows the pinned logical volume, if anything does."""
        device = self._mapper.get(self.dm_name_of(volume_id))
        return device if device is not None and device.uuid == state.dm_uuid else None

    def dm_name_of(self, volume_id: str) -> str:
        """What device-mapper calls it."""
        return dm_name(self._group.name, self.name_of(volume_id))

    def name_of(self, volume_id: str) -> str:
        """`luks-<id>`, or a digest where hyphens, which device-mapper names have twice, make that too long."""
        name = f"luks-{volume_id}"
        if len(dm_name(self._group.name, name)) > _LONGEST_DM_NAME:
            return f"luks-h.{hashlib.sha256(volume_id.encode()).hexdigest()}"
        return name


def unseen_from(found: LogicalVolume) -> int | None:
    """Behind how many bytes nobody was ever shown what lies there; None where all of it may have been."""
    marks = [tag.removeprefix(UNSEEN_TAG) for tag in found.tags if tag.startswith(UNSEEN_TAG)]
    return max(map(int, marks)) if marks and all(map(str.isdecimal, marks)) else None
