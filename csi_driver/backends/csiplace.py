"""Where the backend csi of a server is: kept in its state directory, for the commands that work beside it."""

from pathlib import Path

import msgspec

from csi_driver.host.files import Files, read_file
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.reading import decode
from csi_driver.model.settings import Service, Settings


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """What a server was told and commands are not. Paths are texts; one that is no node is the controller."""

    namespace: str
    driver_name: str
    node_id: str
    kubelet_dir: str
    is_node: bool = True

    @classmethod
    def of(cls, settings: Settings, namespace: str) -> "Place":
        """That of a server with these settings."""
        return cls(
            namespace=namespace,
            driver_name=settings.driver_name,
            node_id=settings.node_id,
            kubelet_dir=str(settings.kubelet_dir),
            is_node=Service.NODE in settings.services,
        )

    def write(self, path: Path, files: Files) -> None:
        """Keep it, durably. Raises OSError."""
        files.keep(path, msgspec.json.encode(self))


def read_place(path: Path) -> Place:
    """What was kept there. Raises FailedPrecondition."""
    try:
        return decode(read_file(path), Place)
    except (OSError, ValueError):  # msgspec's errors are ValueErrors
        raise FailedPrecondition(
            f"{path} cannot be read; start the server with --backend csi, which makes it anew"
        ) from None
