"""Copies of LUKS2 headers, which are kept beside the images, as files of this node for those who read them by a path.

<folder>/<id>             the copy that is in the cluster, fetched
<folder>/.<id>.luks2.new  one on its way there
<folder>/.<id>.before     what `restore-header` overwrites: `csi_driver.backends.base.kept_before`
"""

from pathlib import Path

from csi_driver.backends.base import Fill, drop_before
from csi_driver.backends.rbdaccess import CephAccess
from csi_driver.backends.rbdrecords import VolumeLogs
from csi_driver.host.files import Files, read_file
from csi_driver.model.errors import NotFound


class HeaderCopies:
    """What `Backend` says of header copies, for all volumes."""

    def __init__(self, folder: Path, access: CephAccess, logs: VolumeLogs, files: Files) -> None:
        self._folder = folder
        self._access = access
        self._logs = logs
        self._files = files

    def prepare(self) -> None:
        """Make the folder. Raises OSError."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, volume_id: str) -> Path:
        """Where the copy is now, if there is one."""
        path = self._folder / volume_id
        content = self._logs.header(self._access.pool(volume_id), volume_id)
        if content is None:
            self._files.remove(path)
        else:
            self._files.write(path, content)
        return path

    def has(self, volume_id: str) -> bool:
        """Whether there is a copy."""
        try:
            return self._logs.has_header(self._access.pool(volume_id), volume_id)
        except NotFound:
            return False

    def before(self, volume_id: str) -> Path:
        """Where a header that is overwritten is kept."""
        return self._folder / f".{volume_id}.before"

    def keep(self, volume_id: str, fill: Fill) -> None:
        """Keep what `fill` writes, in place of an earlier copy, of one that this node has fetched too."""
        fresh = self._fresh(volume_id)
        try:
            fill(str(fresh))
            self._logs.keep_header(self._access.pool(volume_id), volume_id, read_file(fresh))
        finally:
            self._files.remove(fresh)
        self._files.remove(self._folder / volume_id)
        drop_before(self.before(volume_id), self._files)

    def drop(self, volume_id: str) -> None:
        """Remove this node's files of a volume that is gone."""
        self._files.remove(self._folder / volume_id)
        self._files.remove(self._fresh(volume_id))
        drop_before(self.before(volume_id), self._files)

    def _fresh(self, volume_id: str) -> Path:
        return self._folder / f".{volume_id}.luks2.new"
