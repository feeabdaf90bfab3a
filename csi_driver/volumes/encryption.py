"""Encrypted staging: from `prepared` through `formatting` to `encrypted`, and the open mapping.

docs/architecture.md, "A volume's life", is the table this module carries out. Every state is durable before the step
that it announces, and the device is formatted in `prepared` and `formatting` only.
"""

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ParamSpec

import msgspec

from csi_driver.backends.base import Backend
from csi_driver.host.clonefile import FileIdentity
from csi_driver.host.devicemapper import Device, DeviceMapper, MappingHandle
from csi_driver.host.handle import Handle
from csi_driver.host.keyring import KeptKey
from csi_driver.host.log import log
from csi_driver.host.workers import Workers
from csi_driver.keys.secret import SecretKey
from csi_driver.luks import cloned, key_token, rekey
from csi_driver.luks import device as luks
from csi_driver.luks.blank import prove_blank
from csi_driver.luks.choice import luks_format
from csi_driver.luks.formats import LuksFormat, check_capacity
from csi_driver.luks.header_metadata import Keyslot
from csi_driver.luks.header_rules import Limits as HeaderLimits
from csi_driver.luks.mapping import Fit, Mappings
from csi_driver.model.errors import (
    DeadlineExceeded,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    KeyLost,
    KeyNeeded,
    Unauthenticated,
)
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Limits
from csi_driver.model.volume import EncryptionState, FileSystemState, KeyTrail, LuksIdentity, NamedSlot, VolumeRecord
from csi_driver.volumes.keys import KeyInHand

P = ParamSpec("P")


@dataclass(frozen=True)
class Opened:
    """An open volume: its record by now, the mapping held open, and where a fresh one's key is kept."""

    record: VolumeRecord
    mapping: MappingHandle
    kept_key: KeptKey | None


class Encryption:
    """Formats, opens, resizes and closes the LUKS2 device of a volume; callers hold the volume's lock."""

    def __init__(self, workers: Workers, mappings: Mappings, limits: Limits) -> None:
        self._workers = workers
        self._mappings = mappings
        self._limits = limits
        self._header_limits = HeaderLimits(memory_kib=limits.pbkdf_memory_kib)
        self._unlocks = threading.BoundedSemaphore(limits.unlocks_at_once)

    def open(
        self,
        backend: Backend,
        record: VolumeRecord,
        device: Handle,
        key: KeyInHand,
        undo: ExitStack,
    ) -> "Opened":
        """Bring the volume to `encrypted` if it never was, and open its mapping.

        `undo` gets what closes both again. A mapping that is open and in use is used again if device, UUID and key
        fit; one that nobody uses is opened anew, whatever left it there. Raises FailedPrecondition when the secret
        disagrees with the volume's parameters, Unauthenticated.
        """
        chosen = self._format_of(record, key.wishes)
        passphrase = key.passphrase
        if record.encryption is not EncryptionState.ENCRYPTED:
            self._refuse_open_mapping(record)
            if record.encryption is EncryptionState.CLONING:
                if record.key is not None:
                    raise FailedPrecondition(
                        f"volume {record.id} was not made to its end: it has the content of its image and not its own "
                        f"key yet; make it again, which goes on with it, or delete it"
                    )
                record = backend.update(self.take_identity(record, device))
            else:
                record = self._format(backend, record, device, chosen, key)
        identity = _identity(record)
        kept = None
        with _told_of_a_kms(_where(record, device), key.trail):
            if not self._reuse(record, device, passphrase):
                undo.callback(attempt, self._mappings.close, record.mapping_name, identity.uuid)
                kept = self._open(record, device, passphrase)
        mapping = self._mappings.open(record.mapping_name)
        undo.callback(mapping.close)
        self._check_opened(record, device, mapping)
        self._ensure_header_copy(backend, record, device)  # of a header that has opened
        return Opened(record, mapping, kept)

    def _open(self, record: VolumeRecord, device: Handle, passphrase: Passphrase) -> KeptKey | None:
        parameters = record.parameters
        opening = luks.Opening(
            record.mapping_name, parameters.discard, parameters.no_read_workqueue, parameters.no_write_workqueue
        )
        with self._unlocking(f"volume {record.id}"):
            return self._workers.call(
                f"luks-open of {_where(record, device)}",
                self._limits.unlock_seconds,
                luks.open_device,
                _where(record, device),
                device,
                device_size(record),
                _identity(record),
                self._header_limits,
                passphrase,
                opening,
            )

    def resume(self, mapping_name: str, mapping: Device | None) -> None:
        """Let I/O flow again through a mapping that a killed resize left suspended."""
        if mapping is not None and mapping.suspended:
            self._workers.call(
                f"luks-resume of the mapping {mapping_name}",
                self._limits.mount_seconds,
                DeviceMapper().resume,
                mapping_name,
            )
            log.warning("a mapping that was left suspended was resumed", mapping=mapping_name)

    def verify(self, record: VolumeRecord, device: Handle, passphrase: Passphrase) -> None:
        """Try the passphrase, changing nothing. Raises Unauthenticated and what `luks.open_device` does."""
        with self._unlocking(f"volume {record.id}"):
            self._workers.call(
                f"luks-unlock of {_where(record, device)}",
                self._limits.unlock_seconds,
                luks.check_passphrase,
                _where(record, device),
                device,
                device_size(record),
                _identity(record),
                self._header_limits,
                passphrase,
            )

    def resize(
        self, record: VolumeRecord, device: Handle, passphrase: Callable[[], Passphrase | None], pinned: KeptKey | None
    ) -> None:
        """Let the open mapping show the recorded capacity; the passphrase is asked for where the kernel has no key.

        `pinned` is where the key was kept when the mapping was opened, if that is known. Raises KeyNeeded.
        """
        try:
            self._resize(record, device, None, pinned)
        except KeyNeeded:
            if (found := passphrase()) is None:
                raise
            self._resize(record, device, found, pinned)

    def _resize(
        self, record: VolumeRecord, device: Handle, passphrase: Passphrase | None, pinned: KeptKey | None
    ) -> None:
        with ExitStack() as undo:
            undo.callback(attempt, self._mappings.end_proof, record.mapping_name)
            self._workers.call(
                f"luks-resize of {_where(record, device)}",
                self._limits.unlock_seconds,
                luks.resize_mapping,
                _where(record, device),
                device,
                record.mapping_name,
                record.capacity_bytes,
                _identity(record),
                self._header_limits,
                passphrase,
                pinned,
            )
            undo.pop_all()

    def check_image(
        self, where: str, file: FileIdentity, identity: LuksIdentity, passphrase: Passphrase
    ) -> tuple[Keyslot, ...]:
        """The key slots of an image's header, once it is validated and the passphrase has opened it."""
        with self._unlocking(where):
            return self._workers.call(
                f"luks-unlock of {where}",
                self._limits.unlock_seconds,
                cloned.check_image,
                where,
                file,
                identity,
                self._header_limits,
                passphrase,
            )

    def take_identity(self, record: VolumeRecord, clone: Handle) -> VolumeRecord:
        """From `cloning` to `encrypted`: the header of the clone, file or device, gets the recorded UUID.

        Returns the record that says so, which the caller writes. No key is needed. Repeating is fine wherever it was
        cut. Errors as `cloned.change_uuid`.
        """
        identity = _identity(record)
        where = f"volume {record.id} on {clone}"
        self._workers.call(
            f"luks-identity of {where}",
            self._limits.mount_seconds,
            cloned.change_uuid,
            where,
            clone,
            device_size(record),
            record.cloned_uuid or identity.uuid,
            identity,
            self._header_limits,
        )
        log.info("clone has its own identity", volume_id=record.id, luks_uuid=identity.uuid)
        return msgspec.structs.replace(record, encryption=EncryptionState.ENCRYPTED, cloned_uuid=None)

    def add_passphrase(
        self,
        backend: Backend,
        record: VolumeRecord,
        device: Handle,
        current: Passphrase,
        new: Passphrase,
        wishes: SecretKey,
    ) -> NamedSlot:
        """Give `new` a key slot beside that of `current`; returns the latter. Errors as `rekey`.

        No header is changed of which there is no copy, and none is left whose copy opens with another key. A copy gives
        way to what was just opened alone: it may be the last good header.
        """
        chosen = self._format_of(record, wishes)
        with self._unlocking(f"volume {record.id}"):
            self._workers.call(
                f"luks-unlock of {_where(record, device)}",
                self._limits.unlock_seconds,
                rekey.prove,
                _where(record, device),
                device,
                device_size(record),
                _identity(record),
                self._header_limits,
                current,
            )
        self._back_up_header(backend, record, device)
        with self._unlocking(f"volume {record.id}"):
            slot = self._workers.call(
                f"luks-add-key of {_where(record, device)}",
                self._limits.format_seconds,
                rekey.add_passphrase,
                _where(record, device),
                device,
                device_size(record),
                _identity(record),
                self._header_limits,
                current,
                new,
                chosen,
            )
        self._back_up_header(backend, record, device)
        return slot

    def take_key(
        self,
        backend: Backend,
        record: VolumeRecord,
        clone: Handle,
        current: Passphrase,
        own: Passphrase,
        wishes: SecretKey,
    ) -> None:
        """Let `own` open the header of a clone, file or device, instead of `current`. Repeating is fine."""
        try:
            slot = self.add_passphrase(backend, record, clone, current, own, wishes)
        except Unauthenticated:
            slot = None  # it was taken out by a call that was cut; that `own` opens the header is proven below
        self.remove_passphrase(backend, record, clone, slot, own)

    def remove_passphrase(
        self, backend: Backend, record: VolumeRecord, device: Handle, slot: NamedSlot | None, keep: Passphrase
    ) -> None:
        """Take out a key slot, None for none, with proof that `keep` opens another; our token says the record's key."""
        with self._unlocking(f"volume {record.id}"):
            self._workers.call(
                f"luks-remove-key of {_where(record, device)}",
                self._limits.format_seconds,
                rekey.remove_passphrase,
                _where(record, device),
                device,
                device_size(record),
                _identity(record),
                self._header_limits,
                slot,
                keep,
                record.key,
            )
        self._back_up_header(backend, record, device)

    def _back_up_header(self, backend: Backend, record: VolumeRecord, device: Handle) -> None:
        """Keep a copy of the header beside the record."""

        def fill(path: str) -> None:
            where = _where(record, device)
            self._workers.call(
                f"luks-backup of {where}", self._limits.mount_seconds, rekey.back_up_header, where, device, path
            )

        backend.keep_header_copy(record.id, fill)

    def _ensure_header_copy(self, backend: Backend, record: VolumeRecord, device: Handle) -> None:
        """Keep a copy where there is none; what hinders it is logged, and keeps nobody from the volume."""
        try:
            if not backend.has_header_copy(record.id):
                self._back_up_header(backend, record, device)
        except (DriverError, OSError) as error:
            log.warning("the header of a volume could not be backed up", volume_id=record.id, error=str(error))

    def _format_of(self, record: VolumeRecord, wishes: SecretKey) -> LuksFormat:
        return luks_format(record.parameters, wishes, self._limits.pbkdf_memory_kib, random_key=record.key is not None)

    def _format(
        self,
        backend: Backend,
        record: VolumeRecord,
        device: Handle,
        chosen: LuksFormat,
        key: KeyInHand,
    ) -> VolumeRecord:
        where = _where(record, device)
        if record.encryption is EncryptionState.PREPARED:
            check_capacity(chosen.cipher, record.capacity_bytes)
            with backend.open_storage(record.id) as storage:
                self._workers.call(
                    f"luks-blank proof of {where}",
                    self._limits.format_seconds,
                    prove_blank,
                    where,
                    device,
                    record.capacity_bytes + chosen.data_offset,
                    storage,
                )
            identity = LuksIdentity(
                uuid=str(uuid.uuid4()),
                cipher=chosen.cipher,
                key_bits=chosen.key_bits,
                sector_size=chosen.sector_size,
                data_offset=chosen.data_offset,
            )
            record = backend.update(
                msgspec.structs.replace(record, encryption=EncryptionState.FORMATTING, luks=identity)
            )
        identity = _identity(record)
        chosen = LuksFormat(
            cipher=identity.cipher,
            key_bits=identity.key_bits,
            hash=chosen.hash,
            pbkdf=chosen.pbkdf,
            memory_kib=chosen.memory_kib,
            iterations=chosen.iterations,
            sector_size=identity.sector_size,
            data_offset=identity.data_offset,
        )
        with self._unlocking(f"volume {record.id}"), backend.open_storage(record.id) as storage:
            digest = self._workers.call(
                f"luks-format of {where}",
                self._limits.format_seconds,
                luks.format_device,
                where,
                device,
                device_size(record),
                chosen,
                identity,
                self._header_limits,
                key.passphrase,
                storage,
                key_token.encode(key.trail) if key.trail else None,
            )
        record = backend.update(
            msgspec.structs.replace(
                record,
                encryption=EncryptionState.ENCRYPTED,
                luks=msgspec.structs.replace(identity, digest=digest),
            )
        )
        log.info("volume formatted", volume_id=record.id, device=device.name, luks_uuid=identity.uuid)
        return record

    def _reuse(self, record: VolumeRecord, device: Handle, passphrase: Passphrase) -> bool:
        """Whether an open mapping serves; one that does not is closed."""
        identity = _identity(record)
        mapping = self._mappings.get(record.mapping_name)
        fit = self._mappings.fit(mapping, record.mapping_name, identity.uuid)
        if mapping is None:
            return False
        usable = fit is Fit.FITS and self._mappings.backing(mapping) == device.number
        if usable:
            self.resume(record.mapping_name, mapping)
        if not usable or mapping.open_count == 0:
            try:
                self._mappings.close(record.mapping_name, identity.uuid)
            except DeviceInUse as busy:
                if usable:
                    raise
                raise DeviceInUse(
                    f"an old mapping of volume {record.id} cannot be used, as its device or LUKS UUID is not the "
                    f"volume's, and it is in use: {busy}"
                ) from None
            return False
        self.verify(record, device, passphrase)
        return True

    def _check_opened(self, record: VolumeRecord, device: Handle, mapping: MappingHandle) -> None:
        """The mapping that is held is the one of this volume, on the device that is held."""
        fit = self._mappings.fit(mapping.device, record.mapping_name, _identity(record).uuid)
        if fit is not Fit.FITS or self._mappings.backing(mapping.device) != device.number:
            raise FailedPrecondition(
                f"the mapping {record.mapping_name} of {_where(record, device)} was opened and is another one now; is "
                f"another program closing it?"
            )

    def _refuse_open_mapping(self, record: VolumeRecord) -> None:
        """A mapping of a volume that was never formatted is a leftover of an earlier volume of the same name."""
        mapping = self._mappings.get(record.mapping_name)
        self._mappings.fit(mapping, record.mapping_name, "")
        self._mappings.close(record.mapping_name, record.luks.uuid if record.luks else None)

    @contextmanager
    def _unlocking(self, what: str) -> Iterator[None]:
        """Bounds how many key derivations run at once: each takes the memory its key slot says."""
        if not self._unlocks.acquire(timeout=self._limits.unlock_seconds):
            raise DeadlineExceeded(
                f"{what} waited {self._limits.unlock_seconds:g} s for other volumes to be unlocked; the "
                f"call may be repeated"
            )
        try:
            yield
        finally:
            self._unlocks.release()


@contextmanager
def _told_of_a_kms(where: str, trail: KeyTrail | None) -> Iterator[None]:
    """Nobody has a secret to put right where a KMS gave what opens nothing."""
    try:
        yield
    except Unauthenticated:
        if trail is None:
            raise
        raise KeyLost(
            f"the key {trail.name} of {f'the KMS {trail.kms_id}' if trail.kms_id else trail.type} opens no key slot of "
            f"{where}; restore the key that it was there, or the volume's header or record from a backup"
        ) from None


def attempt(undo: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Undo a step after an error as far as it goes: the caller must hear of that error and not of this one."""
    try:
        undo(*args, **kwargs)
    except DriverError as error:
        log.warning("something was left behind after an error", error=str(error))


def device_size(record: VolumeRecord) -> int:
    """Bytes that the volume's device must have: its capacity and, encrypted, the room before the payload."""
    return record.capacity_bytes + (record.luks.data_offset if record.luks else 0)


def raw_if_unseen(record: VolumeRecord) -> VolumeRecord:
    """The record of a volume that is about to be shown as a block device."""
    if record.file_system in (FileSystemState.NONE, FileSystemState.MAKING):
        return msgspec.structs.replace(record, file_system=FileSystemState.RAW)
    return record


def _where(record: VolumeRecord, device: Handle) -> str:
    return f"volume {record.id} on {device}"


def _identity(record: VolumeRecord) -> LuksIdentity:
    if record.luks is None:
        raise FailedPrecondition(
            f"the record of volume {record.id} says it is {record.encryption} and names no LUKS UUID; restore the "
            f"record from a backup"
        )
    return record.luks
