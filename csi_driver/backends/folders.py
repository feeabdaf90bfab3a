"""Volumes' records in folders of a file system, for every backend that has one to keep them in.

<folder>/volumes/<id>/record.json   the tags; their revision is an extended attribute of the folder too
<folder>/volumes/<id>/header.luks2  a copy of the LUKS2 header, as it is
<folder>/volumes/<id>/header.before the header that restore-header put a copy in the place of
<folder>/new/<id>/                  a volume being made; renamed into volumes/ when it is whole
<folder>/trash/<id>/                a volume being deleted; renamed out of volumes/ first

What else is in a volume's folder is its backend's.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from csi_driver.backends.base import Fill, drop_before, kept_before
from csi_driver.backends.listing import SortedNames
from csi_driver.backends.records import RecordCodec
from csi_driver.host.files import Files, read_file
from csi_driver.model.errors import (
    Aborted,
    DeadlineExceeded,
    DriverError,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
)
from csi_driver.model.volume import VolumeRecord

_RECORD = "record.json"
_HEADER = "header.luks2"
_BEFORE = "header.before"
_MARK = "trusted.luks-csi.revision"  # trusted: only who may administer the host sees or sets it (xattr(7))

Drop = Callable[[Path, int], None]
"""Removes what belongs to the volume of that folder and is not in it; so many bytes from its start on are overwritten
before, and whatever of it is in the folder too. The folder itself goes afterwards.
"""


class VolumeFolders:
    """Records, header copies and the state of being made or deleted, each step durable; `drop` as `Drop` says."""

    def __init__(self, folder: Path, files: Files, codec: RecordCodec, drop: Drop) -> None:
        self._folder = folder
        self._volumes = str(folder / "volumes")
        self._names = SortedNames(folder / "volumes")
        self._files = files
        self._codec = codec
        self._drop = drop

    def prepare(self) -> None:
        """Make the folders. Raises OSError when they cannot be."""
        for name in ("volumes", "new", "trash"):
            (self._folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def volume(self, volume_id: str) -> Path:
        """The folder of a volume."""
        return self._folder / "volumes" / volume_id

    def fresh(self, volume_id: str) -> Path:
        """The folder of a volume being made."""
        return self._folder / "new" / volume_id

    def path(self, volume_id: str, name: str) -> str:
        """A file in the folder of a volume; not by pathlib, which costs more than what is done with it."""
        return f"{self._volumes}/{volume_id}/{name}"

    def refuse_known(self, volume_id: str) -> None:
        """Raise FailedPrecondition where a volume to be made is there, as its record cannot be read then."""
        if self.has(volume_id):
            raise FailedPrecondition(
                f"volume {volume_id} cannot be made: {self.volume(volume_id)} is there without a readable record and "
                f"may hold data; restore its record from a backup or delete the volume"
            )

    def create(self, record: VolumeRecord, make: Callable[[Path], None], *, resume: bool = False) -> VolumeRecord:
        """Let `make` make the volume, in a folder aside, and rename that in: a crash leaves all or nothing.

        With `resume` it finds the folder of an earlier call that was cut, or that ended with Aborted or for want of
        time, as it was left. After any other error nothing is left: nobody may ask again for a volume that could not be
        made.
        """
        fresh = self.fresh(record.id)
        try:
            with self.told_errors(record.id):
                if not resume:
                    self._remove(fresh)
                self._remove(self._folder / "trash" / record.id)
                if not resume or not fresh.exists():
                    self._files.make_folder(fresh)
                make(fresh)
                self._files.write(fresh / _RECORD, self._codec.encode(record))
                self._files.rename(fresh, self.volume(record.id))
        except DriverError as error:
            # Renamed in, it was not yet durable.
            if not (resume and isinstance(error, Aborted | DeadlineExceeded)):
                with contextlib.suppress(DriverError, OSError):
                    self.delete(record.id)
            raise
        return record

    def has(self, volume_id: str) -> bool:
        """Whether its folder is there."""
        return os.path.exists(f"{self._volumes}/{volume_id}")

    def get(self, volume_id: str) -> VolumeRecord:
        """Read the record. Raises FailedPrecondition for one that is older than the last that was written.

        Such a record (from a backup, say) may permit what the newer one forbids: to format. Compared here, so that
        nobody forgets to.
        """
        record = self._read(volume_id)
        newest = self._newest(volume_id)
        if record.revision < newest:
            raise FailedPrecondition(
                f"the record of volume {volume_id} is older than the volume: {self.volume(volume_id) / _RECORD} has "
                f"revision {record.revision} and revision {newest} was written; restore the newest record or, if "
                f"there is none, see what this one says and take it by `luks-csi volume accept-record {volume_id}`"
            )
        return record

    def accept_record(self, volume_id: str, *, half: bool = False) -> VolumeRecord:
        """Take the record that is there for the newest one; `half` says that not all of the volume is in its storage.

        Raises NotFound, FailedPrecondition.
        """
        record = self._read(volume_id)
        if record.conversion is not None or half:
            raise FailedPrecondition(
                f"the record of volume {volume_id} cannot be taken: the volume was being moved to another volume key, "
                f"and by a record that is older half of it would be lost; restore the newest record"
            )
        if record.move is not None:
            raise FailedPrecondition(
                f"the record of volume {volume_id} cannot be taken: by it the volume is {record.move.phase}, moved "
                f"between this driver and that of {record.move.other}, and nobody knows what became of that; restore "
                f"the newest record"
            )
        if not record.is_settled:
            raise FailedPrecondition(
                f"the record of volume {volume_id} cannot be taken: it says encryption={record.encryption or 'none'} "
                f"and filesystem={record.file_system}, by which the volume would be formatted; restore a newer record "
                f"or read the data by hand"
            )
        try:
            self._mark(volume_id, record.revision)
        except OSError as error:
            raise FailedPrecondition(
                f"the record of volume {volume_id} cannot be taken: the attribute {_MARK} of "
                f"{self.volume(volume_id)} cannot be set ({error.strerror}); run this as root on the node"
            ) from None
        return record

    def update(self, record: VolumeRecord) -> VolumeRecord:
        """Write the record if it was made from the one that is there."""
        if self.get(record.id).revision != record.revision:
            raise Aborted(f"the record of volume {record.id} was changed by another writer; call again")
        updated = msgspec.structs.replace(record, revision=record.revision + 1)
        with self.told_errors(record.id):
            self._files.write(self.volume(record.id) / _RECORD, self._codec.encode(updated))
        # Not fsynced: a mark that a power cut took protects less, and never is one ahead of its durable record. For
        # the same reason a file system without such attributes will do.
        with contextlib.suppress(OSError):
            self._mark(record.id, updated.revision)
        return updated

    def delete(self, volume_id: str, check: Callable[[str], None] | None = None) -> None:
        """Take the volume out of sight in one step, then remove it piece by piece.

        A volume that is there must pass `check` before.
        """
        volume, trash, fresh = (self._folder / name / volume_id for name in ("volumes", "trash", "new"))
        for folder in (volume, trash, fresh):
            _refuse_folders(folder)
        if check is not None and volume.exists():
            check(volume_id)
        with self.told_errors(volume_id):
            if volume.exists():
                self._remove(trash)
                self._files.rename(volume, trash)
            self._remove(trash)
            self._remove(fresh)

    def ids(self) -> Sequence[str]:
        """Folder names are the ids."""
        return self._names.read()

    def is_newest(self, record: VolumeRecord) -> bool:
        """Whether the mark says so; a power cut may have taken it."""
        return self._newest(record.id) == record.revision

    def header_copy(self, volume_id: str) -> Path:
        """Where the copy of the volume's header is kept."""
        return self.volume(volume_id) / _HEADER

    def has_header_copy(self, volume_id: str) -> bool:
        """Whether the file is there."""
        return os.path.exists(self.path(volume_id, _HEADER))

    def header_before(self, volume_id: str) -> Path:
        """Where the header is kept that was overwritten by a copy."""
        return self.volume(volume_id) / _BEFORE

    def keep_header_copy(self, volume_id: str, fill: Fill) -> None:
        """Written aside and renamed: there is always a whole one."""
        path = self.header_copy(volume_id)
        fresh = path.with_name(f".{_HEADER}.new")
        try:
            with self.told_errors(volume_id):
                fill(str(fresh))
                with self.replacing(volume_id, path):
                    self._files.rename(fresh, path)
                before, erase = self.header_before(volume_id), self._to_erase(self.volume(volume_id))
                for header in kept_before(before) if erase else ():
                    self._files.overwrite(header, erase)
                drop_before(before, self._files)
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink()

    @contextlib.contextmanager
    def replacing(self, volume_id: str, path: Path) -> Iterator[None]:
        """The block gives `path` to another file: what it was has a header whose key slots may open the volume with a
        passphrase of earlier, or that has another volume key. It is overwritten where the volume's class wants that.
        """
        erase = self._to_erase(self.volume(volume_id))
        if not erase or not path.exists():
            yield
            return
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield
            self._files.overwrite(Path(f"/proc/self/fd/{descriptor}"), erase)  # it has no other name by now
        finally:
            os.close(descriptor)

    def orphans(self) -> Sequence[str]:
        """Half-made and half-deleted volumes, and volume folders without a record."""
        leftovers = [path for name in ("new", "trash") for path in (self._folder / name).iterdir()]
        nameless = [path for path in (self._folder / "volumes").iterdir() if not (path / _RECORD).exists()]
        return sorted(map(str, (*leftovers, *nameless)))

    def remove_orphans(self, volume_id: str) -> Sequence[str]:
        """Remove the half-made and the half-deleted one; a folder that lost its record still holds data and stays."""
        leftovers = [path for name in ("new", "trash") if (path := self._folder / name / volume_id).exists()]
        for path in leftovers:
            self._remove(path)
        return [str(path) for path in leftovers]

    @contextlib.contextmanager
    def told_errors(self, volume_id: str) -> Iterator[None]:
        """System errors of the folders as sentences. Raises ResourceExhausted, FailedPrecondition."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ResourceExhausted(
                    f"no space for volume {volume_id} in {self._folder}: {error.strerror}; free space there"
                ) from None
            raise FailedPrecondition(
                f"volume {volume_id} cannot be written in {self._folder}: {error.strerror}; check that file system"
            ) from None

    def _read(self, volume_id: str) -> VolumeRecord:
        path = self.path(volume_id, _RECORD)
        try:
            content = read_file(path)
        except FileNotFoundError:
            raise NotFound(f"volume {volume_id} does not exist on this node") from None
        record = self._codec.decode(content, path)
        if record.id != volume_id:
            raise FailedPrecondition(
                f"the volume record {path} is that of volume {record.id}; put each volume's own record back"
            )
        return record

    def _newest(self, volume_id: str) -> int:
        """Revision of the newest record that was written; 0 where nothing tells."""
        with contextlib.suppress(OSError, ValueError):
            return int(os.getxattr(f"{self._volumes}/{volume_id}", _MARK))
        return 0

    def _mark(self, volume_id: str, revision: int) -> None:
        # On the folder: the guard of loopfile forbids it on the file of a staged volume.
        os.setxattr(self.volume(volume_id), _MARK, str(revision).encode())

    def _remove(self, folder: Path) -> None:
        if not folder.exists():
            return
        _refuse_folders(folder)
        erase = self._to_erase(folder)
        if erase:
            for header in (folder / _HEADER, *kept_before(folder / _BEFORE)):
                self._files.erase(header, erase)
        self._drop(folder, erase)
        self._files.remove_folder(folder)

    def _to_erase(self, folder: Path) -> int:
        """How many bytes hold header and key slots, where the volume's class wants them overwritten."""
        try:
            record = self._codec.decode(read_file(folder / _RECORD), str(folder / _RECORD))
        except (OSError, FailedPrecondition):
            return 0  # it was never made to its end, or was erased before its record went
        if record.luks is None or not record.parameters.erase_on_delete:
            return 0
        other = record.conversion.luks.data_offset if record.conversion else 0
        return max(record.luks.data_offset, other)


def _refuse_folders(folder: Path) -> None:
    """A folder in a volume's folder is somebody else's: nothing is removed then, and it is named."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        if found := sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False)):
            others = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise FailedPrecondition(
                f"{folder} cannot be removed: it holds the folder {found[0]!r}{others}, which this driver did not "
                f"make; move that away and call again"
            )
