"""`luks-csi volume adopt` where another driver's volumes lie in the backend's own storage: one becomes ours in place.

Nothing is copied. Until the backend has taken it over its device is only read; behind that our token in its header
names the key of a KMS, as in any volume of ours. It is `raw`: nothing is ever formatted in it.
"""

from dataclasses import dataclass

import msgspec

from csi_driver.backends.base import Backend, ForeignVolume, ForeignVolumes
from csi_driver.host.log import log
from csi_driver.host.workers import Workers
from csi_driver.keys.base import KeyRequest
from csi_driver.keys.secret import SecretKey, require_passphrase
from csi_driver.keys.sources import KeySources
from csi_driver.luks import recovery
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Limits
from csi_driver.model.volume import KeyTrail, VolumeRecord
from csi_driver.volumes.adoption import adopted, with_own_key
from csi_driver.volumes.encryption import told_of_a_kms
from csi_driver.volumes.keyslots import KeySlots
from csi_driver.volumes.rekey import Rekeying


@dataclass(frozen=True)
class TakeoverRequest:
    """A name for the volume, what it is, and the secret that comes with it: Ceph-CSI's, say.

    A key that the KMS keeps is its maker's to destroy, so it gets one of its own, unless it is to `share` that.
    """

    name: str
    foreign: ForeignVolume
    secret: SecretKey
    share: bool = False


class Takeover:
    """Makes volumes of another driver ours, in place; callers hold the volume's lock."""

    def __init__(
        self,
        backend: Backend,
        volumes: ForeignVolumes,
        workers: Workers,
        slots: KeySlots,
        sources: KeySources,
        rekeying: Rekeying,
        limits: Limits,
    ) -> None:
        self._backend = backend
        self._volumes = volumes
        self._workers = workers
        self._slots = slots
        self._sources = sources
        self._rekeying = rekeying
        self._limits = limits

    def find(self, handle: str, name: str) -> ForeignVolume:
        """As `ForeignVolumes.find`."""
        return self._volumes.find(handle, name)

    def take(self, request: TakeoverRequest) -> VolumeRecord:
        """Read its header, prove that the key opens it, then take it over, wholly or not at all. Repeating is fine.

        Where it is to have another key and cannot be given it the volume is there, and the error says so. Raises
        DeviceInUse, InvalidHeader and its kind, Unauthenticated, KeyLost, FailedPrecondition, and what backend and KMS
        raise.
        """
        foreign, secret = request.foreign, request.secret
        with self._workers.session():
            if not foreign.is_ours:
                record = self._examined(request)
                self._volumes.take(foreign, record)
                log.info("volume adopted", volume_id=record.id, file=foreign.where, luks_uuid=self._uuid(record))
            record = self._backend.get(foreign.volume_id)
            if not self._backend.has_header_copy(record.id):  # the last step
                with self._backend.storage(record.id) as device:
                    if record.key is not None:
                        self._slots.name_key(record, device, self._passphrase(record.key, record.id, secret))
                    self._slots.ensure_header_copy(self._backend, record, device)
        return record if request.share else with_own_key(self._rekeying, record, secret)

    def _examined(self, request: TakeoverRequest) -> VolumeRecord:
        """Its record, once its key has opened it; nothing was changed."""
        foreign, secret = request.foreign, request.secret
        volume_id, where, trail = foreign.volume_id, foreign.where, None
        if foreign.kms_id:
            trail = self._sources.foreign(foreign.kms_id, foreign.handle, foreign.wrapped, foreign.tenant)
        with self._volumes.looked_at(foreign) as device:
            found = self._workers.call(
                f"luks-read of {where}",
                self._limits.mount_seconds,
                recovery.look,
                where,
                device,
                self._slots.header_limits,
            )
            parameters = msgspec.structs.replace(foreign.parameters, claim=foreign.tenant or None)
            record = adopted(volume_id, request.name, where, foreign.size, found.identity, trail, parameters)
            passphrase = self._passphrase(trail, volume_id, secret)
            with told_of_a_kms(where, trail) if trail else self._sources.using(KeyRequest(volume_id), "adopt"):
                self._slots.verify(record, device, passphrase)
        return record

    def _passphrase(self, trail: KeyTrail | None, volume_id: str, secret: SecretKey) -> Passphrase:
        if trail is None:
            return require_passphrase(secret, volume_id)
        return self._sources.fetch(trail, KeyRequest(volume_id, trail.tenant, secret), "adopt")

    @staticmethod
    def _uuid(record: VolumeRecord) -> str:
        return record.luks.uuid if record.luks else ""
