"""Where a volume is on this node and how it is, for people: from the one view of `Presences`."""

import os

from msgspec import Struct

from csi_driver.backends.base import Backend, HasPools
from csi_driver.host.fshealth import FileSystemHealth
from csi_driver.model.volume import VolumeRecord
from csi_driver.volumes.filesystem import repair_command
from csi_driver.volumes.presence import Presence, Presences


class Condition(Struct, frozen=True):
    """`staged_at` is None where the volume is not staged; `healthy` is None where nothing of it is open.

    `health` is one phrase for a person, with what to do if it is not healthy.
    """

    staged_at: str | None
    published_at: tuple[str, ...]
    healthy: bool | None
    health: str

    @property
    def is_closed(self) -> bool:
        """Whether nothing of it is staged, open or mounted on this node."""
        return self.staged_at is None and self.healthy is None

    def is_at(self, path: str) -> bool:
        """Whether it is staged or published at that path, links in it followed."""
        return _same(path, self.staged_at) or self.is_published_at(path)

    def is_staged_at(self, path: str) -> bool:
        """Whether it is staged at that path; one that is open without a stage is taken down by any."""
        return _same(path, self.staged_at) or (self.staged_at is None and not self.is_closed)

    def is_published_at(self, path: str) -> bool:
        """Whether it is published at that path."""
        return any(_same(path, place) for place in self.published_at)

    def __str__(self) -> str:
        places = [f"staged at {self.staged_at}"] if self.staged_at is not None else ["not staged"]
        return ", ".join([*places, *(f"published at {place}" for place in self.published_at)])


class Conditions:
    """Looks at volumes and changes nothing; needs no lock."""

    def __init__(self, backend: Backend, presences: Presences, health: FileSystemHealth) -> None:
        self._backend = backend
        self._presences = presences
        self._health = health

    def of(self, volume_id: str, record: VolumeRecord | None = None) -> Condition:
        """The volume's condition; with its record, what is there is compared with that."""
        present = self._presences.of(volume_id, record)
        published = dict.fromkeys(mount.mount_point for mount in present.publications)
        staged_at = present.stage.staging_path if present.stage is not None else None
        if staged_at is None and not present.is_open:
            return Condition(None, (), None, "closed")
        ailment = self._ailment(present)
        return Condition(staged_at, tuple(published), ailment is None, ailment or "well")

    def _ailment(self, present: Presence) -> str | None:
        stage = present.stage
        if stage is None:
            return "open, and no stage is recorded; unstage it"
        if not present.is_complete:
            return "its device, mapping or mount is gone or not its own; unstage and stage it"
        if present.staging is not None and not stage.read_only:
            found = self._health.ailment(present.staging)
            if found is not None:
                return (
                    f"its file system {found}; unpublish and publish it, and if that does not help unstage it and run "
                    f"{repair_command(present.volume_id)}"
                )
        if stage.key_drift:
            return "its secret no longer opens it; put the passphrase that it was last given back"
        return self._backend.ailment(present.volume_id) if isinstance(self._backend, HasPools) else None


def _same(path: str, place: str | None) -> bool:
    return place is not None and (path == place or os.path.realpath(path) == os.path.realpath(place))
