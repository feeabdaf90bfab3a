"""The keys of this node that a KMS keeps and no record names: being made, or of volumes that are gone.

<state-dir>/keys/<name of the key>.json     written right before the KMS is asked to make or forget it, gone afterwards

A record that names a key has the last word: what is here besides was left by a call that was killed behind its write.
"""

import errno
from pathlib import Path
from typing import Final

import msgspec

from csi_driver.host.files import Files, read_file
from csi_driver.host.log import log
from csi_driver.host.syscalls import error_name
from csi_driver.model.errors import FailedPrecondition, ResourceExhausted
from csi_driver.model.reading import decode
from csi_driver.model.volume import KeyTrail

_VERSION: Final = 1
_SUFFIX: Final = ".json"
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A key of `volume`, by its trail as far as it is known; `leaving` says that nothing needs it any more."""

    volume: str
    key: KeyTrail
    leaving: bool


class _File(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    entry: KeyEntry


class KeyLedger:
    """Keeps an entry per key below `state_dir`, durably; callers hold the lock of its volume."""

    def __init__(self, state_dir: Path, files: Files) -> None:
        self._folder = state_dir / "keys"
        self._files = files

    def note(self, entry: KeyEntry) -> None:
        """Write an entry, in place of an earlier one of the key. Raises ResourceExhausted, FailedPrecondition."""
        path = self._path(entry.key.name)
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._files.write(path, msgspec.json.encode(_File(version=_VERSION, entry=entry)))
        except OSError as error:
            told = f"{path}, which is to name a key of volume {entry.volume}, cannot be written ({error_name(error)})"
            if error.errno in _FULL:
                raise ResourceExhausted(f"{told}; free space there") from None
            raise FailedPrecondition(f"{told}; check that file system") from None

    def forget(self, name: str) -> None:
        """Remove the entry of a key; absent is fine. One that cannot be removed is logged, and does no harm."""
        path = self._path(name)
        try:
            self._files.remove(path)
        except OSError as error:
            log.warning("the entry of a key could not be removed", path=str(path), error=error_name(error))

    def entries(self, volume_id: str | None = None) -> list[KeyEntry]:
        """All entries, or those of a volume, by the names of their keys. Raises FailedPrecondition."""
        if not self._folder.is_dir():
            return []
        begin = "" if volume_id is None else f"{volume_id}."  # as the names of all keys that we make
        found = [self._read(path) for path in sorted(self._folder.glob(f"{begin}*{_SUFFIX}"))]
        return [entry for entry in found if entry is not None and volume_id in (None, entry.volume)]

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{_SUFFIX}"

    def _read(self, path: Path) -> KeyEntry | None:
        try:
            found = decode(read_file(path), _File)
        except FileNotFoundError:
            return None  # it was removed meanwhile
        except (OSError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
            found = None
        if found is None or found.version != _VERSION:
            raise FailedPrecondition(
                f"{path} cannot be read as the entry of a key; remove it, once its KMS was seen to keep no such key"
            )
        return found.entry
