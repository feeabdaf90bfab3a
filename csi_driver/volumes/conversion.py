"""Another volume key for a volume while it is in use or not, and a first one for a plain volume that is not.

The content is moved chunk by chunk to storage with a header of its own, which takes the volume's place in the end. What
was not moved yet lies untouched where it was, so there is nothing to journal: the record's `done` says where the two
meet, and it is written while nobody can write to the chunk in between (docs/architecture.md, "A new volume key").
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Final

from csi_driver.backends.base import Backend
from csi_driver.host import keyring
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.locks import VolumeLocks
from csi_driver.host.workers import Workers
from csi_driver.images.stopping import Stop
from csi_driver.keys.secret import SecretKey
from csi_driver.luks import device as luks
from csi_driver.luks import two_keys
from csi_driver.model.errors import Aborted, FailedPrecondition, Stopped, VolumeBusy
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Limits
from csi_driver.model.volume import EncryptionState, VolumeRecord
from csi_driver.volumes.conversion_begin import ConversionBegin, refuse_another_key
from csi_driver.volumes.conversion_devices import ConversionDevices
from csi_driver.volumes.conversion_steps import ConversionSteps, Moving
from csi_driver.volumes.encryption import Encryption
from csi_driver.volumes.keys import VolumeKeys
from csi_driver.volumes.keyslots import KeySlots
from csi_driver.volumes.moved import refuse_away
from csi_driver.volumes.presence import Presences
from csi_driver.volumes.stages import Stages
from csi_driver.volumes.two_keys import conversion_of

CHUNK: Final = 16 << 20
"""Bytes that are moved in one step; a mapping stands still for as long as it takes to read so much again."""

_BUSY_SECONDS: Final = 60.0
_PAUSE: Final = 0.1
_LEAST_REST: Final = 0.05


@dataclass(frozen=True)
class Watch:
    """Who looks on: `progress` is told the bytes done, `stop` asks for the end, `rate` is the most bytes per second."""

    progress: Callable[[int], None] = lambda _: None
    stop: Stop = field(default_factory=Stop)
    rate: int | None = None


class Conversions:
    """Moves volumes under other volume keys. It takes the volume's lock itself, for a step at a time."""

    def __init__(
        self,
        backend: Backend,
        locks: VolumeLocks,
        presences: Presences,
        stages: Stages,
        workers: Workers,
        mapper: DeviceMapper,
        encryption: Encryption,
        slots: KeySlots,
        keys: VolumeKeys,
        limits: Limits,
        chunk: int = CHUNK,
    ) -> None:
        self._backend = backend
        self._locks = locks
        self._stages = stages
        self._workers = workers
        self._encryption = encryption
        self._keys = keys
        self._devices = ConversionDevices(backend, presences, slots)
        self._begin = ConversionBegin(backend, self._devices, workers, slots, keys, limits)
        self._steps = ConversionSteps(backend, self._devices, presences, stages, mapper, encryption, chunk)

    def reencrypt(self, volume_id: str, secret: SecretKey, watch: Watch) -> VolumeRecord:
        """Give the volume another volume key, or go on where that was cut; its passphrase stays.

        Pods may use it, start and end meanwhile. Raises FailedPrecondition (not encrypted, never staged, a change of
        its passphrase or an expansion under way, key slots of others), Unauthenticated, ResourceExhausted, VolumeBusy,
        Stopped, DeviceUnreadable, and what sources and headers raise; the same call goes on after any of them.
        """
        self._devices.beside(volume_id)
        with self._locks.hold(volume_id), self._workers.session():
            record = self._backend.get(volume_id)
            refuse_away(record)
            if record.encryption is None:
                raise FailedPrecondition(
                    f"volume {volume_id} is not encrypted; luks-csi volume encrypt {volume_id} does that"
                )
            if record.encryption is not EncryptionState.ENCRYPTED:
                raise FailedPrecondition(f"volume {volume_id} was never staged, so it has no key yet; stage it first")
            if record.conversion is not None and self._is_at_its_end(record):
                return self._finish(record)
            passphrase = self._begin.opening(record, secret)
            if record.conversion is None:
                record = self._begin.reencryption(record, secret, passphrase)
        return self._run(record, passphrase, watch)

    def encrypt(
        self, volume_id: str, secret: SecretKey, kms_id: str | None, watch: Watch, *, generate: bool
    ) -> VolumeRecord:
        """Encrypt a plain volume that is not in use, or go on where that was cut.

        Its key is `secret`'s passphrase, or one of its own in that KMS or, to `generate`, in a secret. Raises as
        `reencrypt`, and DeviceInUse, FailedPrecondition where it was begun with another key.
        """
        self._devices.beside(volume_id)
        with self._locks.hold(volume_id), self._workers.session():
            record = self._backend.get(volume_id)
            refuse_away(record)
            if record.encryption is not None:
                raise FailedPrecondition(
                    f"volume {volume_id} is encrypted already; luks-csi volume reencrypt {volume_id} gives it another "
                    f"volume key"
                )
            if record.conversion is None:
                record, passphrase = self._begin.encryption(record, secret, kms_id, generate=generate)
            else:
                refuse_another_key(volume_id, record.conversion.key, secret, kms_id, generate=generate)
                passphrase = self._begin.passphrase(record, record.conversion.key, secret)
        return self._run(record, passphrase, watch)

    def _is_at_its_end(self, record: VolumeRecord) -> bool:
        """Whether all was moved and has taken its place, and the record alone does not say so."""
        beside = self._devices.beside(record.id)
        return conversion_of(record).done >= record.capacity_bytes and not beside.has_next(record.id)

    def _run(self, record: VolumeRecord, passphrase: Passphrase, watch: Watch) -> VolumeRecord:
        volume_id, capacity = record.id, record.capacity_bytes
        watch.progress(conversion_of(record).done)
        with ExitStack() as stack:
            stack.callback(keyring.clear_thread)
            moving: Moving | None = None
            while True:
                with self._held(volume_id), self._workers.session():
                    begun = time.monotonic()
                    record = self._backend.get(volume_id)
                    if record.conversion is None:
                        return record  # another command has ended it
                    done = record.conversion.done
                    if moving is None and self._devices.beside(volume_id).has_next(volume_id):
                        moving = stack.enter_context(self._moving(record, passphrase))
                    if done >= capacity:
                        return self._finish(record)
                    if moving is None or moving.luks != record.conversion.luks:
                        raise Aborted(
                            f"volume {volume_id} is being moved to another volume key than this command was at; call "
                            f"again"
                        )
                    record = self._steps.step(record, moving, passphrase)
                moved, took = conversion_of(record).done, time.monotonic() - begun
                watch.progress(moved)
                _rest(watch, max(took, _LEAST_REST, (moved - done) / watch.rate - took if watch.rate else 0.0))
                if watch.stop.name and moved < capacity:
                    raise Stopped(
                        f"{watch.stop.name} stopped it: {record.percent_moved} % of volume {volume_id} are under "
                        f"the new volume key; the same command goes on with it, and should soon"
                    )

    @contextmanager
    def _moving(self, record: VolumeRecord, passphrase: Passphrase) -> Iterator[Moving]:
        with ExitStack() as stack:
            if record.encryption is not None:  # which `ConversionBegin.opening` has told
                moving = stack.enter_context(self._steps.moving(record, passphrase))
            else:
                with self._keys.using(record, "encrypt", conversion_of(record).key):
                    moving = stack.enter_context(self._steps.moving(record, passphrase))
            yield moving

    def _finish(self, record: VolumeRecord) -> VolumeRecord:
        stage = self._stages.get(record.id)
        identity = conversion_of(record).luks
        record = self._encryption.two_keys.finish(self._backend, record)
        self._backend.guard(record.id)
        if stage is not None and stage.kept_next is not None:
            self._steps.note(record, (stage.kept_next, None))
        keyring.unlink_all(luks.key_prefix(identity.uuid), but=two_keys.new_key_name(identity))
        return record

    @contextmanager
    def _held(self, volume_id: str) -> Iterator[None]:
        """The lock, for which kubelet's calls for the volume are waited for."""
        deadline = time.monotonic() + _BUSY_SECONDS
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(self._locks.hold(volume_id))
                    break
                except VolumeBusy:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(_PAUSE)
            yield


def _rest(watch: Watch, seconds: float) -> None:
    """Leave the volume, and its disk, to others for so long: kubelet's calls find its lock free."""
    until = time.monotonic() + seconds
    while not watch.stop.name and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _PAUSE))
