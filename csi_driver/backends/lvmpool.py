"""Thin pools as the kernel has them: how full, and whether a new block reads as zeros.

Layouts: Documentation/admin-guide/device-mapper/thin-provisioning.rst, "thin-pool" target.
"""

from dataclasses import dataclass
from typing import Final

from csi_driver.backends.lvmtool import VolumeGroup, dm_name
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.log import log
from csi_driver.model.errors import FailedPrecondition

_PARTS: Final = ("-tpool", "", "_tdata", "_tmeta")
"""What the kernel's devices of a pool are called, behind its own name."""


@dataclass(frozen=True)
class PoolUse:
    """A thin pool at a moment; size in bytes, data and metadata as parts of what there is, from 0 to 1.

    One that is full takes writes to blocks that it has, and no others.
    """

    size: int
    data: float
    metadata: float
    is_zeroing: bool
    is_well: bool
    is_full: bool = False

    @property
    def fullest(self) -> float:
        """Data or metadata, whichever is scarcer."""
        return max(self.data, self.metadata)

    def __str__(self) -> str:
        return f"{self.data:.0%} of its data and {self.metadata:.0%} of its metadata are used"


class ThinPools:
    """The thin pools of a volume group."""

    def __init__(self, group: VolumeGroup, mapper: DeviceMapper) -> None:
        self._group = group
        self._mapper = mapper

    def use(self, pool: str) -> PoolUse | None:
        """How it is; None where the kernel does not show it."""
        name = dm_name(self._group.name, pool)
        # The second one as long as no volume was ever shown in it.
        return self._use(f"{name}-tpool") or self._use(name)

    def _use(self, name: str) -> PoolUse | None:
        device, status = self._mapper.get(name), self._mapper.status(name)
        if device is None or not device.targets or status is None or device.targets[0].type != "thin-pool":
            return None
        words = status.split()
        if len(words) < 5:  # "Fail": the kernel has given it up
            return PoolUse(device.size_bytes, 1.0, 1.0, is_zeroing=False, is_well=False)
        return PoolUse(
            size=device.size_bytes,
            data=_part(words[2]),
            metadata=_part(words[1]),
            is_zeroing="skip_block_zeroing" not in device.targets[0].params.split(),
            is_well=words[4] == "rw" and "needs_check" not in words,
            is_full=words[4] == "out_of_data_space" and "needs_check" not in words,
        )

    def resume(self, pool: str) -> None:
        """Let I/O flow through a pool that a killed command of LVM has left suspended: writes in it wait for ever.

        By LVM, whose lock a command that is at work still holds.
        """
        for name in (device for part in _PARTS if (device := f"{dm_name(self._group.name, pool)}{part}")):
            found = self._mapper.get(name)
            if found is not None and found.suspended:
                log.warning("a thin pool was left suspended", volume_group=self._group.name, pool=pool, mapping=name)
                self._group.refresh(pool)
                return

    def show(self, pool: str) -> PoolUse | None:
        """How it is, shown if it was not: before a command that would have LVM do so. None where there is none."""
        found = self.use(pool)
        if found is None and self._group.find(pool) is not None:
            self._mapper.target_version("thin-pool")  # loads the module: lvm looks for one in its own file system
            self._group.activate_pool(pool)
            found = self.use(pool)
        return found

    def shown(self, pool: str, *, to_erase: bool = False) -> PoolUse:
        """How it is, shown if it was not. Raises FailedPrecondition where it cannot be, or does not zero new blocks.

        One that is full is fit `to_erase` what lies in it: that is how room is made.
        """
        self.resume(pool)
        found = self.show(pool)
        if found is None:
            raise FailedPrecondition(
                f"{self._group.name}/{pool} is no thin pool that can be used; make it with lvcreate --type thin-pool, "
                f"or name another one by thinPool"
            )
        if not (found.is_well or (to_erase and found.is_full)):
            raise FailedPrecondition(
                f"the thin pool {self._group.name}/{pool} takes no more writes, or must be checked ({found}); extend "
                f"it, or repair it with lvconvert --repair"
            )
        if not found.is_zeroing:
            raise FailedPrecondition(
                f"the thin pool {self._group.name}/{pool} does not clear new blocks, so that what was another's "
                f"could be read; run lvchange --zero y {self._group.name}/{pool}"
            )
        return found


def _part(fraction: str) -> float:
    used, total = map(int, fraction.split("/"))
    return used / total if total else 1.0
