"""Another key for a volume, staged or not: a new passphrase beside the old one first, the old one out last.

Each step is durable before the next, and the record says which key counts (docs/architecture.md, "A new key"):

    adding      the old one opens the volume; the new one may have a key slot, which is named before it is written
    removing    the new one was proven to open it and counts; the old one's key slot, if it is there, is to go
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NoReturn

import msgspec

from csi_driver.backends.base import Backend
from csi_driver.host.handle import Handle
from csi_driver.host.log import log
from csi_driver.host.workers import Workers
from csi_driver.keys.secret import SecretKey
from csi_driver.luks.rekey import Added
from csi_driver.model.errors import DriverError, FailedPrecondition, InvalidArgument, KeyLost, Unauthenticated
from csi_driver.model.secret import Passphrase
from csi_driver.model.times import recorded_now
from csi_driver.model.volume import EncryptionState, KeyTrail, NamedSlot, Rekey, RekeyPhase, VolumeRecord
from csi_driver.volumes.attachment import refuse_many_nodes
from csi_driver.volumes.encryption import attempt, told_of_a_kms
from csi_driver.volumes.keys import VolumeKeys
from csi_driver.volumes.keyslots import KeySlots, where_is
from csi_driver.volumes.moved import refuse_away
from csi_driver.volumes.presence import Presences


class Rekeyed(msgspec.Struct, frozen=True):
    """What came of it: the volume's record by now, and whether its key is another one than before."""

    record: VolumeRecord
    changed: bool


class KeyMixedUp(KeyLost):
    """A KMS that gives another key each time that it is asked for one, or one key by two names."""


class Rekeying:
    """Changes the keys of volumes; callers hold the volume's lock."""

    def __init__(
        self, backend: Backend, presences: Presences, workers: Workers, slots: KeySlots, keys: VolumeKeys
    ) -> None:
        self._backend = backend
        self._presences = presences
        self._workers = workers
        self._slots = slots
        self._keys = keys

    def rotate(self, volume_id: str, secret: SecretKey, new: Passphrase | None) -> Rekeyed:
        """Give the volume a new key: of its KMS, or `new` where `secret` holds the present passphrase.

        What an earlier call could not end is ended first. Raises InvalidArgument, FailedPrecondition (never formatted),
        Unauthenticated, and what sources and devices raise; the volume opens with its recorded key after any error.
        """
        record = self._usable(volume_id)
        if (record.key is None) is (new is None):
            raise InvalidArgument(
                f"volume {volume_id} has a key of its KMS, which makes the new one; leave the new passphrase out"
                if record.key is not None
                else f"volume {volume_id} opens with a passphrase; give the new one too"
            )
        with self._device(volume_id) as device, self._workers.session():
            if record.key is None:
                with self._keys.using(record, "rotate"):
                    return self._change_passphrase(record, device, secret, new)
            record = self._end(record, device, secret)
            return Rekeyed(self._change_key(record, device, secret), changed=True)

    def end(self, volume_id: str, secret: SecretKey) -> VolumeRecord:
        """End a change from key to key that was cut, and begin none. Errors as `rotate`."""
        record = self._usable(volume_id)
        with self._device(volume_id) as device, self._workers.session():
            return self._end(record, device, secret)

    def rewrap(self, volume_id: str, secret: SecretKey) -> Rekeyed:
        """Wrap the volume's key anew, by the newest key of its KMS; its key slot stays. Errors as `rotate`."""
        record = self._usable(volume_id)
        if record.key is None:
            raise FailedPrecondition(f"volume {volume_id} opens with a secret's passphrase; there is nothing to wrap")
        fresh, rekey = self._keys.rewrap(record, record.key, secret), record.rekey
        if rekey is not None and rekey.phase is RekeyPhase.ADDING and rekey.other is not None:
            other = self._keys.rewrap(record, rekey.other, secret)  # a change that was cut must still find its key
            self._keys.fetch(record, other, secret, "rewrap")
            rekey = msgspec.structs.replace(rekey, other=other)
        changed = (fresh, rekey) != (record.key, record.rekey)
        with self._device(volume_id) as device, self._workers.session():
            passphrase = self._keys.fetch(record, fresh, secret, "rewrap")
            if changed:  # what was wrapped anew counts when it was unwrapped and has opened the volume, not before
                self._slots.verify(record, device, passphrase)
                record = self._backend.update(msgspec.structs.replace(record, key=fresh, rekey=rekey))
            self._slots.remove_passphrase(self._backend, record, device, (), passphrase)
        if changed:
            log.info("key wrapped anew", volume_id=volume_id, kms=fresh.kms_id, key_version=fresh.key_version)
        return Rekeyed(record, changed)

    def renew(self, record: VolumeRecord, device: Handle, secret: SecretKey) -> VolumeRecord:
        """End a change that was cut, as far as `secret` lets it, and begin the one that the secret asks for.

        It asks by CRYPTO_KEY_VALUE_PREVIOUS: where that opens the volume and the new passphrase does not. Called while
        a volume is staged, with its device. What hinders it (another node that has the volume too, say) is logged and
        no error: some key opens the volume.
        """
        try:
            return self._renewed(record, device, secret)
        except (DriverError, OSError) as error:
            log.warning("a key could not be changed when its volume was staged", volume_id=record.id, error=str(error))
            return self._backend.get(record.id)

    def _renewed(self, record: VolumeRecord, device: Handle, secret: SecretKey) -> VolumeRecord:
        if record.encryption is not EncryptionState.ENCRYPTED or record.conversion is not None:
            return record
        new, asked = secret.passphrase, record.key is None and secret.previous not in (None, secret.passphrase)
        if record.rekey is None and not asked:
            return record
        refuse_many_nodes(self._backend, record.id)
        if record.key is not None:
            return self._end(record, device, secret)
        if new is None:
            return record
        with self._keys.using(record, "rotate"):
            if asked:
                return self._change_passphrase(record, device, secret, new).record
            return self._settled(record, device, new)

    def _change_passphrase(
        self, record: VolumeRecord, device: Handle, secret: SecretKey, new: Passphrase | None
    ) -> Rekeyed:
        """From one passphrase of secrets to another; both are in hand, so a cut one is simply done again.

        The secret may have been changed once more since: one that was cut while it was `removing` ends with whichever
        of the two opens another key slot than those that are to go, and whatever was being added goes with the old one.
        """
        old = secret.previous if new is secret.passphrase else secret.passphrase
        if old is None or new is None:
            raise FailedPrecondition(
                f"volume {record.id} opens with a passphrase; give the one that it has and the new one"
            )
        if old == new:
            raise FailedPrecondition(f"the new passphrase of volume {record.id} is the one that it has; give another")
        ended = record.rekey is not None and record.rekey.phase is RekeyPhase.REMOVING
        if ended:
            try:
                record = self._remove(record, device, new)
            except (Unauthenticated, FailedPrecondition) as error:
                try:
                    record = self._remove(record, device, old)
                except Unauthenticated:
                    raise error from None
        try:
            record = self._added(record, device, old, new, secret, None)
        except Unauthenticated:
            if record.rekey is None:
                self._slots.verify(record, device, new)
                return Rekeyed(record, changed=ended)  # it was changed already
            return Rekeyed(self._settled(record, device, new), changed=True)
        record = self._remove(record, device, new)
        log.info("passphrase changed", volume_id=record.id)
        return Rekeyed(record, changed=True)

    def _settled(self, record: VolumeRecord, device: Handle, keep: Passphrase) -> VolumeRecord:
        """End a change of passphrases that was cut with the one that is in hand, if its key slot is one of ours."""
        if record.rekey is None:
            return record
        if record.rekey.phase is RekeyPhase.ADDING:
            kept = self._slots.slot_of(record, device, keep)
            if kept not in record.rekey.slots:
                return record
            record = self._note(record, Rekey(phase=RekeyPhase.REMOVING, slots=_without(record.rekey.slots, kept)))
        return self._remove(record, device, keep)

    def _added(
        self,
        record: VolumeRecord,
        device: Handle,
        current: Passphrase,
        new: Passphrase,
        secret: SecretKey,
        key: KeyTrail | None,
    ) -> VolumeRecord:
        """Give `new`, whose trail is `key`, a slot beside that of `current`, then let it count.

        The record names both slots before one is written, and those of earlier changes that were cut: all but the one
        that counts are to go in the end. A KMS must have given `new` twice. Raises Unauthenticated when `current` opens
        none, which changes nothing.
        """
        begun = record.rekey.slots if record.rekey else ()

        def announce(added: Added) -> None:
            nonlocal record, begun
            begun = tuple(dict.fromkeys((*begun, added.present, added.new)))
            record = self._note(record, Rekey(phase=RekeyPhase.ADDING, other=key, slots=begun))

        added = self._slots.add_passphrase(self._backend, record, device, current, new, secret, announce)
        if key is not None and self._keys.fetch(record, key, secret, "rotate") != new:
            raise KeyMixedUp(
                f"the key {key.name} that is to be that of volume {record.id} is another one each time that its KMS is "
                f"asked; the volume has the key that it had, look at the KMS"
            )
        removing = Rekey(phase=RekeyPhase.REMOVING, other=record.key, slots=_without(begun, added.new))
        return self._backend.update(msgspec.structs.replace(record, key=key, rekey=removing, key_since=recorded_now()))

    def _change_key(self, record: VolumeRecord, device: Handle, secret: SecretKey) -> VolumeRecord:
        with self._keys.successor(record, _trail(record), secret) as new:
            record = self._note(record, Rekey(phase=RekeyPhase.ADDING, other=new))
        return self._end(record, device, secret)

    def _end(self, record: VolumeRecord, device: Handle, secret: SecretKey) -> VolumeRecord:
        """Go on with a change from key to key, wherever it was cut; one whose new key is lost is given up."""
        if record.rekey is None:
            return record
        other = record.rekey.other
        if record.rekey.phase is RekeyPhase.ADDING:
            if other is None:
                raise FailedPrecondition(
                    f"the record of volume {record.id} tells of a new key and names none; restore it from a backup"
                )
            old = _trail(record)
            current = self._keys.fetch(record, old, secret, "rotate")
            try:
                keep = self._keys.fetch(record, other, secret, "rotate")
            except KeyLost as error:
                return self._given_up(record, device, current, other, error)
            if keep == current:
                self._refuse_same(record, device, current, other)
            try:
                with told_of_a_kms(where_is(record, device), old):
                    record = self._added(record, device, current, keep, secret, other)
            except KeyMixedUp as error:
                self._given_up(self._backend.get(record.id), device, current, other, error)
                raise
            other = old
        else:
            keep = self._keys.fetch(record, _trail(record), secret, "rotate")
        slots = record.rekey.slots if record.rekey else ()
        with told_of_a_kms(where_is(record, device), _trail(record)):
            self._slots.remove_passphrase(self._backend, record, device, slots, keep)
        if other is not None:
            self._keys.destroy(record, other, "rotate")
        record = self._note(record, None)
        log.info("key changed", volume_id=record.id, key=_trail(record).name)
        return record

    def _given_up(
        self, record: VolumeRecord, device: Handle, current: Passphrase, lost: KeyTrail, error: KeyLost
    ) -> VolumeRecord:
        """Take back a change to a key that is lost before it counted: the key slots that it was given go."""
        log.warning("a new key is lost and was given up", volume_id=record.id, key=lost.name, error=str(error))
        self._take_back(record, device, current)
        self._keys.destroy(record, lost, "rotate")
        return self._note(record, None)

    def _refuse_same(self, record: VolumeRecord, device: Handle, current: Passphrase, other: KeyTrail) -> NoReturn:
        """Take back a change to a key that is the present one; nothing is destroyed, it opens the volume."""
        self._take_back(record, device, current)
        self._note(record, None)
        raise KeyMixedUp(
            f"the key {other.name} that is to be that of volume {record.id} is the very one that it has, "
            f"{_trail(record).name}; the volume has the key that it had, let the KMS keep one for each name and remove "
            f"neither there before"
        )

    def _take_back(self, record: VolumeRecord, device: Handle, current: Passphrase) -> None:
        """Take out the key slots of a change that has not counted; the record still tells of it."""
        if record.rekey is not None and record.rekey.slots:
            kept = self._slots.slot_of(record, device, current)
            self._slots.remove_passphrase(self._backend, record, device, _without(record.rekey.slots, kept), current)

    def _remove(self, record: VolumeRecord, device: Handle, keep: Passphrase) -> VolumeRecord:
        slots = record.rekey.slots if record.rekey else ()
        self._slots.remove_passphrase(self._backend, record, device, slots, keep)
        return self._note(record, None)

    def _note(self, record: VolumeRecord, rekey: Rekey | None) -> VolumeRecord:
        if record.rekey == rekey:
            return record
        return self._backend.update(msgspec.structs.replace(record, rekey=rekey))

    def _usable(self, volume_id: str) -> VolumeRecord:
        record = self._backend.get(volume_id)
        if record.encryption is None:
            raise FailedPrecondition(f"volume {volume_id} is not encrypted, so it has no key")
        if record.encryption is not EncryptionState.ENCRYPTED:
            raise FailedPrecondition(f"volume {volume_id} was never staged, so it has no key slot yet; stage it first")
        refuse_away(record)
        refuse_many_nodes(self._backend, volume_id)  # each would write the header, and neither knows of the other
        if record.conversion is not None:
            raise FailedPrecondition(
                f"volume {volume_id} is being moved to another volume key; let luks-csi volume reencrypt {volume_id} "
                f"run to its end first"
            )
        return record

    @contextmanager
    def _device(self, volume_id: str) -> Iterator[Handle]:
        """The volume's device: as it is attached, or attached for as long as this takes. Raises DeviceInUse."""
        attached = self._backend.device_of(volume_id)
        with ExitStack() as stack:
            if attached is None:
                stack.callback(attempt, self._backend.detach, volume_id)
                attached = self._backend.attach(volume_id, lasting=False)
            with attached:
                self._presences.refuse_others(volume_id, attached)
                yield attached


def _without(slots: tuple[NamedSlot, ...], kept: NamedSlot) -> tuple[NamedSlot, ...]:
    return tuple(slot for slot in slots if slot != kept)


def _trail(record: VolumeRecord) -> KeyTrail:
    if record.key is None:
        raise FailedPrecondition(
            f"the record of volume {record.id} tells of a change from key to key and names none; restore it from a "
            f"backup"
        )
    return record.key
