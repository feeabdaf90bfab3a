"""What a server with the backend rbd was told: kept in its state directory, for the commands that work beside it."""

from pathlib import Path

import msgspec

from csi_driver.host.files import Files, read_file
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.reading import decode
from csi_driver.model.settings import Service, Settings


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Where its clusters and its user of them are, which node it is, and whether it is a controller. No secret."""

    ceph_config: str
    ceph_secret: str | None
    node_id: str
    is_central: bool

    @classmethod
    def of(cls, settings: Settings) -> "Memory":
        """That of a server with these settings."""
        return cls(
            ceph_config=str(settings.ceph_config),
            ceph_secret=str(settings.ceph_secret) if settings.ceph_secret is not None else None,
            node_id=settings.node_id,
            is_central=Service.CONTROLLER in settings.services,
        )

    def write(self, path: Path, files: Files) -> None:
        """Keep it, durably. Raises OSError."""
        files.keep(path, msgspec.json.encode(self))


def read_memory(path: Path) -> Memory:
    """What was kept there. Raises FailedPrecondition."""
    try:
        return decode(read_file(path), Memory)
    except (OSError, ValueError):  # msgspec's errors are ValueErrors
        raise FailedPrecondition(
            f"{path} cannot be read; start the server with --backend rbd, which makes it anew"
        ) from None
