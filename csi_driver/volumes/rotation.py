"""New keys by request and by schedule (the StorageClass parameter `keyRotationPeriod`).

The schedule needs no state of its own: the record says since when the key counts and how long it may, and a change that
was cut stands in it too (docs/architecture.md, "A new key"). So a look goes on wherever an earlier process was killed.
"""

import hashlib
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from msgspec import Struct

from csi_driver.backends.base import Backend
from csi_driver.host.locks import VolumeLocks
from csi_driver.host.log import log
from csi_driver.host.regularly import Ending
from csi_driver.keys.audit import asker
from csi_driver.keys.base import RequestNeeded
from csi_driver.keys.secret import LONGHORN_VALUE, PREVIOUS, SecretKey
from csi_driver.model.errors import DeviceInUse, DriverError, FailedPrecondition, NotFound, VolumeBusy
from csi_driver.model.volume import EncryptionState, VolumeRecord
from csi_driver.volumes.moved import is_here
from csi_driver.volumes.rekey import Rekeying

LOOK_SECONDS: Final = 300.0
"""How often the volumes are looked at: a twelfth of the shortest period."""

_SPREAD: Final = 10  # the last tenth of a period is shared out among the volumes of a class
_NO_SECRET: Final = SecretKey(None)


class Schedule(Struct, frozen=True):
    """When a volume's key is changed, in seconds since the epoch: from `due` on, and it is late from `limit` on."""

    due: float
    limit: float


def key_since(record: VolumeRecord) -> datetime:
    """Since when the volume's key counts. Raises FailedPrecondition when the record says no time."""
    text = record.key_since or record.created
    try:
        since = datetime.fromisoformat(text)
    except ValueError:
        raise FailedPrecondition(
            f"the record of volume {record.id} says that its key counts since {text!r}, which is no time; restore it "
            f"from a backup"
        ) from None
    return since if since.tzinfo else since.replace(tzinfo=UTC)


def schedule(record: VolumeRecord) -> Schedule | None:
    """When the key of a volume is to be changed, None where its class wants no rotation. Raises as `key_since`.

    A volume's share of the last tenth of the period follows from its id, so it is the same at each look.
    """
    period = record.parameters.key_rotation_seconds
    if period is None or record.key is None:
        return None
    share = int.from_bytes(hashlib.sha256(record.id.encode()).digest()[:4]) / (1 << 32)
    limit = key_since(record).timestamp() + period
    return Schedule(due=limit - share * period / _SPREAD, limit=limit)


class KeyRotation:
    """Changes keys when it is asked to and, at each look, when they are due: one volume at a time.

    `check_state` raises FailedPrecondition when the state directory is not the one that it was. `clock` tells seconds
    since the epoch.
    """

    def __init__(
        self,
        backend: Backend,
        locks: VolumeLocks,
        rekeying: Rekeying,
        check_state: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._backend = backend
        self._locks = locks
        self._rekeying = rekeying
        self._check_state = check_state
        self._clock = clock
        self._overdue: set[str] = set()
        self._failed = 0
        self._told: set[str] = set()

    def rotate(self, volume_id: str, secret: SecretKey) -> None:
        """Give a volume a new key: of its KMS, or the passphrase of `secret` that follows its previous one.

        Callers hold the volume's lock. Raises FailedPrecondition, also where a passphrase opens the volume and the
        secret holds only one; NotFound, and what `Rekeying.rotate` does.
        """
        self._check_state()
        record = self._backend.get(volume_id)
        of_secret = record.encryption is EncryptionState.ENCRYPTED and record.key is None
        if of_secret and None in (secret.passphrase, secret.previous):
            raise FailedPrecondition(
                f"volume {volume_id} opens with the passphrase of a secret, and only who keeps the secret can change "
                f"it; put the new passphrase into its entry {LONGHORN_VALUE} and the present one into {PREVIOUS}"
            )
        self._rekeying.rotate(volume_id, secret, secret.passphrase if record.key is None else None)

    def overdue(self) -> int:
        """How many volumes have a key that is older than the period of their class, as of the last look."""
        return len(self._overdue)

    def failed(self) -> int:
        """How many scheduled rotations of this process have failed."""
        return self._failed

    def look(self, ending: Ending) -> None:
        """Look at every volume once: end what was cut, change what is due. What hinders it is logged and counted."""
        token = asker.set("schedule")
        try:
            self._look_at_all(ending)
        finally:
            asker.reset(token)

    def _look_at_all(self, ending: Ending) -> None:
        try:
            self._check_state()
            ids = self._backend.ids()
        except (DriverError, OSError) as error:
            log.warning("keys were not looked at", error=str(error))
            return
        self._overdue.intersection_update(ids)
        self._told.intersection_update(ids)
        for volume_id in ids:
            if ending():
                return
            self._look_at(volume_id)

    def _look_at(self, volume_id: str) -> None:
        self._overdue.discard(volume_id)
        try:
            record = self._backend.get(volume_id)
            if self._is_to_change(record):
                self._try(volume_id)
                record = self._backend.get(volume_id)
            if self._is_overdue(record):
                self._overdue.add(volume_id)
        except NotFound:
            pass  # it was deleted meanwhile
        except (DriverError, OSError) as error:
            if self._is_news(volume_id):
                log.warning("a key was not looked at", volume_id=volume_id, error=str(error))

    def _is_news(self, volume_id: str) -> bool:
        """Whether this is the first time that something of a volume is told which does not pass by itself."""
        known = volume_id in self._told
        self._told.add(volume_id)
        return not known

    def _try(self, volume_id: str) -> None:
        try:
            with self._locks.hold(volume_id):
                self._change(volume_id)
            self._told.discard(volume_id)
        except (NotFound, VolumeBusy):
            pass  # it was deleted meanwhile, or its turn comes with the next look
        except RequestNeeded as error:
            if self._is_news(volume_id):
                log.warning("a key is rotated by request only", volume_id=volume_id, error=str(error))
        except DeviceInUse as error:  # somebody else has the volume too, and may for long
            if self._is_news(volume_id):
                log.warning("a key is not rotated while its volume is in use", volume_id=volume_id, error=str(error))
        except (DriverError, OSError) as error:
            self._failed += 1
            log.warning("a key could not be rotated", volume_id=volume_id, error=str(error))
        except Exception as error:  # noqa: BLE001 - what nobody foresaw must not end the looks; its text may quote a key
            self._failed += 1
            where = [f"{one.filename}:{one.lineno} {one.name}" for one in traceback.extract_tb(error.__traceback__)]
            log.warning("a key could not be rotated", volume_id=volume_id, kind=type(error).__name__, where=where)

    def _is_to_change(self, record: VolumeRecord) -> bool:
        if record.encryption is not EncryptionState.ENCRYPTED or record.key is None or not is_here(record):
            return False
        if record.conversion is not None:
            return False  # where it is being encrypted anew, the next look after that is soon enough
        if record.rekey is not None:
            return True
        planned = schedule(record)
        return planned is not None and self._clock() >= planned.due

    def _change(self, volume_id: str) -> None:
        record = self._backend.get(volume_id)  # another one may have changed it meanwhile
        if record.rekey is not None and record.key is not None:
            record = self._rekeying.end(volume_id, _NO_SECRET)
        if self._is_to_change(record):
            self._rekeying.rotate(volume_id, _NO_SECRET, None)

    def _is_overdue(self, record: VolumeRecord) -> bool:
        planned = schedule(record) if record.encryption is EncryptionState.ENCRYPTED and is_here(record) else None
        return planned is not None and self._clock() >= planned.limit
