"""Key drift: the secret of a staged volume no longer opens it, which nobody would notice before the node's next boot.

A repeated NodeStageVolume brings the secret as it is now. It succeeds all the same: what is staged works on.
"""

import os

import msgspec

from csi_driver.backends.base import Backend
from csi_driver.host.log import log
from csi_driver.keys.secret import SecretKey
from csi_driver.model.errors import DeviceAbsent, DriverError, Unauthenticated
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import VolumeRecord
from csi_driver.volumes.keys import VolumeKeys
from csi_driver.volumes.keyslots import KeySlots
from csi_driver.volumes.stages import Stage, Stages


class KeyDrift:
    """Tries secrets that staged volumes were not seen with before; callers hold the volume's lock.

    What was seen is remembered as a digest under a random key of this process, and in memory alone.
    """

    def __init__(self, backend: Backend, stages: Stages, slots: KeySlots, keys: VolumeKeys) -> None:
        self._backend = backend
        self._stages = stages
        self._slots = slots
        self._keys = keys
        self._digest_key = os.urandom(32)
        self._seen: dict[str, tuple[bytes, bool]] = {}

    def opened(self, volume_id: str, key: SecretKey) -> None:
        """The volume was just opened with that secret."""
        if key.passphrase is not None:
            self._seen[volume_id] = self._digest(key), True

    def forget(self, volume_id: str) -> None:
        """The volume is not staged any more."""
        self._seen.pop(volume_id, None)

    def look(self, record: VolumeRecord, stage: Stage, key: SecretKey) -> None:
        """Try the secret of a repeated stage, if it is not the one that was seen last, and tell when it does not open.

        The stage's `key_drift` says so to other processes. What hinders the look itself is logged, and no error. A call
        that brings no passphrase tells nothing.
        """
        if key.passphrase is None:
            return
        digest = self._digest(key)
        seen, opens = self._seen.get(record.id, (b"", False))
        if seen != digest:
            try:
                # A previous passphrase that opens it is no drift: the next stage changes it.
                opens = self._opens(record, key.passphrase) or (
                    key.previous is not None and self._opens(record, key.previous)
                )
            except DriverError as error:
                log.warning("the secret of a staged volume could not be tried", volume_id=record.id, error=str(error))
                return
            self._seen[record.id] = digest, opens
        if not opens:
            log.warning("the secret of a staged volume no longer opens it", volume_id=record.id)
        if stage.key_drift is opens:
            try:
                self._stages.put(record.id, msgspec.structs.replace(stage, key_drift=not opens))
            except OSError as error:
                log.warning("a stage could not be written", volume_id=record.id, error=error.strerror)

    def _opens(self, record: VolumeRecord, passphrase: Passphrase) -> bool:
        device = self._backend.device_of(record.id)
        if device is None:
            raise DeviceAbsent(f"the device of volume {record.id} is not attached")
        with device:
            try:
                with self._keys.using(record, "stage"):
                    self._slots.verify(record, device, passphrase)
            except Unauthenticated:
                return False
            return True

    def _digest(self, key: SecretKey) -> bytes:
        return b"".join(each.digest(self._digest_key) for each in (key.passphrase, key.previous) if each is not None)
