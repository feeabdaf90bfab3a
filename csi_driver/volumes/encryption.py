"""Encrypted staging: from `prepared` through `formatting` to `encrypted`, and the open mapping.

docs/architecture.md, "A volume's life", is the table this module carries out. Every state is durable before the step
that it announces, and the device is formatted in `prepared` and `formatting` only.
"""

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec

import msgspec

from csi_driver.backends.base import Backend, movable
from csi_driver.host.devicemapper import Device, DeviceMapper, MappingHandle
from csi_driver.host.handle import Handle, let_go
from csi_driver.host.keyring import KeptKey
from csi_driver.host.log import log
from csi_driver.host.workers import Workers
from csi_driver.luks import device as luks
from csi_driver.luks import key_token
from csi_driver.luks.blank import prove_blank
from csi_driver.luks.formats import LuksFormat, check_capacity
from csi_driver.luks.mapping import Fit, Mappings
from csi_driver.model.errors import (
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    KeyLost,
    KeyNeeded,
    Unauthenticated,
)
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Limits
from csi_driver.model.volume import EncryptionState, FileSystemState, KeyTrail, LuksIdentity, VolumeRecord
from csi_driver.volumes.keys import KeyInHand
from csi_driver.volumes.keyslots import KeySlots, device_size, recorded_identity, where_is
from csi_driver.volumes.stages import Stage
from csi_driver.volumes.two_keys import TwoKeys, check_boundary, opening_of

P = ParamSpec("P")


class Opened(msgspec.Struct, frozen=True):
    """An open volume: its record by now, the mapping held open, and where a fresh one's keys are kept.

    There is a next one while the volume key is being changed.
    """

    record: VolumeRecord
    mapping: MappingHandle
    kept_key: KeptKey | None
    kept_next: KeptKey | None = None


class Encryption:
    """Formats, opens, resizes and closes the LUKS2 device of a volume; callers hold the volume's lock."""

    def __init__(self, workers: Workers, mappings: Mappings, slots: KeySlots, limits: Limits) -> None:
        self._workers = workers
        self._mappings = mappings
        self._slots = slots
        self.two_keys = TwoKeys(workers, slots, limits)
        self._limits = limits

    def ended(self, backend: Backend, record: VolumeRecord) -> VolumeRecord:
        """The volume's record, once a move to another volume key that was cut at its very end has ended.

        Before its device is attached, as it becomes another one; `refuse_half` was asked before. What one that was cut
        at its very begin has left goes. Raises what `TwoKeys.finish` does.
        """
        if record.conversion is None:
            if (beside := movable(backend)) is not None and beside.has_next(record.id):
                beside.drop_next(record.id)
            return record
        if record.conversion.done < record.capacity_bytes:
            return record
        return self.two_keys.finish(backend, record)

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
        chosen = self._slots.format_of(record, key.wishes)
        passphrase = key.passphrase
        if record.encryption is not EncryptionState.ENCRYPTED:
            self._refuse_open_mapping(record)
            if record.encryption is EncryptionState.CLONING:
                if record.key is not None:
                    raise FailedPrecondition(
                        f"volume {record.id} was not made to its end: it has the content of its image and not its own "
                        f"key yet; make it again, which goes on with it, or delete it"
                    )
                record = backend.update(self._slots.take_identity(record, device))
            else:
                record = self._format(backend, record, device, chosen, key)
        identity = recorded_identity(record)
        kept: KeptKey | None = None
        kept_next: KeptKey | None = None
        with told_of_a_kms(where_is(record, device), key.trail):
            reused = self._reuse(backend, record, device, passphrase)
            if not reused:
                undo.callback(attempt, self._mappings.close, record.mapping_name, identity.uuid)
            if record.conversion is not None:
                kept, kept_next = self.two_keys.open(backend, record, device, passphrase, fresh=not reused)
            elif not reused:
                kept = self._open(record, device, passphrase)
        mapping = self._mappings.open(record.mapping_name)
        undo.callback(let_go, mapping)
        self._check_opened(backend, record, device, mapping)
        if record.conversion is None:
            self._slots.ensure_header_copy(backend, record, device)  # of a header that has opened
        return Opened(record, mapping, kept, kept_next)

    def _open(self, record: VolumeRecord, device: Handle, passphrase: Passphrase) -> KeptKey | None:
        with self._slots.unlocking(f"volume {record.id}"):
            return self._workers.call(
                f"luks-open of {where_is(record, device)}",
                self._limits.unlock_seconds,
                luks.open_device,
                where_is(record, device),
                device,
                device_size(record),
                recorded_identity(record),
                self._slots.header_limits,
                passphrase,
                opening_of(record),
            )

    def resume(
        self, backend: Backend, record: VolumeRecord | None, mapping: Device | None, stage: Stage | None
    ) -> None:
        """Let I/O flow again through a mapping that a killed resize, or a step to another volume key, left suspended.

        The record is needed in the second case. Raises what `TwoKeys.go_on` does.
        """
        if mapping is None or not mapping.suspended:
            return
        if record is not None and record.conversion is not None:
            self.two_keys.go_on(backend, record, mapping, stage)
            return
        self._workers.call(
            f"luks-resume of the mapping {mapping.name}",
            self._limits.mount_seconds,
            DeviceMapper().resume,
            mapping.name,
        )
        log.warning("a mapping that was left suspended was resumed", mapping=mapping.name)

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
                f"luks-resize of {where_is(record, device)}",
                self._limits.unlock_seconds,
                luks.resize_mapping,
                where_is(record, device),
                device,
                record.mapping_name,
                record.capacity_bytes,
                recorded_identity(record),
                self._slots.header_limits,
                passphrase,
                pinned,
            )
            undo.pop_all()

    def _format(
        self,
        backend: Backend,
        record: VolumeRecord,
        device: Handle,
        chosen: LuksFormat,
        key: KeyInHand,
    ) -> VolumeRecord:
        where = where_is(record, device)
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
        identity = recorded_identity(record)
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
        with self._slots.unlocking(f"volume {record.id}"), backend.open_storage(record.id) as storage:
            digest = self._workers.call(
                f"luks-format of {where}",
                self._limits.format_seconds,
                luks.format_device,
                where,
                device,
                device_size(record),
                chosen,
                identity,
                self._slots.header_limits,
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

    def _reuse(self, backend: Backend, record: VolumeRecord, device: Handle, passphrase: Passphrase) -> bool:
        """Whether an open mapping serves; one that does not is closed."""
        identity = recorded_identity(record)
        mapping = self._mappings.get(record.mapping_name)
        fit = self._mappings.fit(mapping, record.mapping_name, identity.uuid)
        if mapping is None:
            self._mappings.end_proof(record.mapping_name)  # that of a killed resize would keep the device
            return False
        usable = fit is Fit.FITS and self._lies_on(backend, record, mapping, device)
        if usable and record.conversion is None:
            self.resume(backend, record, mapping, None)
        elif usable:
            check_boundary(record, mapping)
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
        if record.conversion is None:
            self._slots.verify(record, device, passphrase)
        return True

    def _lies_on(self, backend: Backend, record: VolumeRecord, mapping: Device, device: Handle) -> bool:
        """Whether the mapping is over the volume's device, or over both while it has two."""
        backings = self._mappings.backings(mapping)
        if record.conversion is None:
            return backings == {device.number}
        return bool(backings) and all(backend.is_device_of(record.id, each) for each in backings)

    def _check_opened(self, backend: Backend, record: VolumeRecord, device: Handle, mapping: MappingHandle) -> None:
        """The mapping that is held is the one of this volume, on the device that is held."""
        own = luks.dm_uuid(record.mapping_name, recorded_identity(record).uuid)
        if mapping.device.uuid != own or not self._lies_on(backend, record, mapping.device, device):
            raise FailedPrecondition(
                f"the mapping {record.mapping_name} of {where_is(record, device)} was opened and is another one now; "
                f"is another program closing it?"
            )

    def _refuse_open_mapping(self, record: VolumeRecord) -> None:
        """A mapping of a volume that was never formatted is a leftover of an earlier volume of the same name."""
        mapping = self._mappings.get(record.mapping_name)
        self._mappings.fit(mapping, record.mapping_name, "")
        self._mappings.close(record.mapping_name, record.luks.uuid if record.luks else None)


@contextmanager
def told_of_a_kms(where: str, trail: KeyTrail | None) -> Iterator[None]:
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


def raw_if_unseen(record: VolumeRecord) -> VolumeRecord:
    """The record of a volume that is about to be shown as a block device."""
    if record.file_system in (FileSystemState.NONE, FileSystemState.MAKING):
        return msgspec.structs.replace(record, file_system=FileSystemState.RAW)
    return record
