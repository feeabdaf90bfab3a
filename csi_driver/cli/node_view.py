"""What the node itself shows of a volume, beside what the server tells: its record, where it is, how it is."""

from dataclasses import dataclass
from pathlib import Path

from csi_driver.model.errors import DriverError, FailedPrecondition, NotFound
from csi_driver.model.settings import Settings
from csi_driver.model.volume import VolumeRecord
from csi_driver.volumes.condition import Condition


@dataclass(frozen=True)
class Seen:
    """What is seen of a volume. `source` tells where the record was read, or why there is none.

    `condition` is None where it cannot be seen; `unseen` tells why.
    """

    record: VolumeRecord | None
    source: str
    condition: Condition | None
    unseen: str = ""

    def require(self, volume_id: str) -> Condition:
        """The condition. Raises FailedPrecondition where it cannot be seen: nobody's word is taken for it then."""
        if self.condition is None:
            raise FailedPrecondition(f"where volume {volume_id} is cannot be seen: {self.unseen}")
        return self.condition


def see(volume_id: str, endpoint: Path, state_dir: Path | None) -> Seen:
    """Look at a volume on this node; `state_dir` None is the one of the server at `endpoint`."""
    from csi_driver.volumes.driver import build_driver
    from csi_driver.volumes.statedir import server_state_dir

    try:
        folder = server_state_dir(endpoint, state_dir, Settings.state_dir)
    except DriverError as error:
        return Seen(None, f"not shown: {error}", None, str(error))
    driver = build_driver(Settings(state_dir=folder))
    record, source = None, f"read from {folder}"
    try:
        record = driver.backend.get(volume_id)
    except NotFound:
        source = f"not shown: {folder} holds no such volume; name the server's --state-dir, on its node"
    except PermissionError:
        source = f"not shown: {folder} may not be read; run this as root"
    except (DriverError, OSError) as error:
        source = f"not shown: {error}"
    try:
        return Seen(record, source, driver.conditions.of(volume_id, record))
    except PermissionError:
        return Seen(record, source, None, "this user may not look at the node's devices; run this as root")
    except (DriverError, OSError) as error:
        return Seen(record, source, None, str(error))
