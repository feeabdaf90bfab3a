"""Volume records as JSON, versioned.

Fields that this version does not know are ignored on reading and gone with the next write. So a field whose loss would
matter raises VERSION, and an older driver then leaves the volume alone.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.reading import convert, decode
from csi_driver.model.volume import VolumeRecord

VERSION = 3
_BEFORE_MOVES = 2
_BEFORE_KEYS = 1

Migration = Callable[[dict[str, Any]], dict[str, Any]]
MIGRATIONS: Mapping[int, Migration] = MappingProxyType({1: lambda volume: volume, 2: lambda volume: volume})
"""From each older version to the next one. A released version never changes its meaning.

2 has `key`, `rekey`, `conversion`, `key_since` and the parameter `key_rotation_seconds`; 3 has `move`.
"""


class RecordCodec:
    """Turns records into bytes and back; older versions are carried forward on reading."""

    def __init__(self, version: int = VERSION, migrations: Mapping[int, Migration] = MIGRATIONS) -> None:
        self._version = version
        self._migrations = migrations

    def encode(self, record: VolumeRecord) -> bytes:
        """Return the record as JSON, of the oldest version that knows all that is in it: older drivers read most."""
        keys = record.key or record.rekey or record.conversion or record.key_since
        before = _BEFORE_MOVES if keys else _BEFORE_KEYS
        version = self._version if record.move else min(self._version, before)
        return msgspec.json.encode({"version": version, "volume": record})

    def decode(self, content: bytes, where: str) -> VolumeRecord:
        """Read a record; `where` names the file in errors.

        Raises FailedPrecondition when it is damaged or of a newer version: the volume is then left alone.
        """
        try:
            document = decode(content, dict[str, Any])
            version = convert(document["version"], int)
            volume = convert(document["volume"], dict[str, Any])
            if version > self._version:
                raise FailedPrecondition(
                    f"the volume record {where} has version {version}, written by a newer driver than this one, which "
                    f"knows version {self._version}; run the newer driver on this node"
                )
            while version < self._version:
                volume = self._migrations[version](volume)
                version += 1
            return convert(volume, VolumeRecord)
        except (ValueError, KeyError, RecursionError) as error:  # msgspec's errors are ValueErrors
            raise FailedPrecondition(
                f"the volume record {where} cannot be read ({error}); restore it from a backup, the device was not "
                f"touched"
            ) from None
