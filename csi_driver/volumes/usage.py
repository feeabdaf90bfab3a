"""NodeGetVolumeStats: how full a published volume is."""

import os

from msgspec import Struct

from csi_driver.backends.base import Backend
from csi_driver.host import blockdev
from csi_driver.model.errors import NotFound
from csi_driver.volumes.presence import Presences


class Usage(Struct, frozen=True):
    """One count of a volume, in "bytes" or "inodes"; of a block device only the total is known."""

    unit: str
    total: int
    used: int | None = None
    available: int | None = None


class Usages:
    """Asks the kernel, never the device: statvfs of a mounted file system does no I/O."""

    def __init__(self, backend: Backend, presences: Presences) -> None:
        self._backend = backend
        self._presences = presences

    def of(self, volume_id: str, volume_path: str) -> list[Usage]:
        """The counts of the volume at `volume_path`. Raises NotFound when volume or path are not there."""
        present = self._presences.of(volume_id)
        if not present.is_open:
            self._backend.get(volume_id)
        if present.number is not None and present.shows_node(volume_path):
            return [Usage("bytes", blockdev.size_of(present.number))]
        if present.mount_at(volume_path) is None:
            raise NotFound(f"volume {volume_id} is not mounted at {volume_path}")
        try:
            found = os.statvfs(volume_path)
        except FileNotFoundError:
            raise NotFound(
                f"volume {volume_id} was taken down at {volume_path} while it was looked at; there is nothing to count"
            ) from None
        size = found.f_frsize
        counts = [Usage("bytes", found.f_blocks * size, (found.f_blocks - found.f_bfree) * size, found.f_bavail * size)]
        if found.f_files:  # btrfs makes inodes as it goes and counts none
            counts.append(Usage("inodes", found.f_files, found.f_files - found.f_ffree, found.f_favail))
        return counts
