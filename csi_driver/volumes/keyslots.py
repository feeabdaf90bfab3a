"""The key slots of a volume's LUKS2 header: tried, added, removed, and the header's copy beside the record.

What changes one does so in a worker, by csi_driver.luks.rekey; docs/architecture.md, "A new key", tells the order.
"""

import os
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import msgspec

from csi_driver.backends.base import Backend
from csi_driver.host.clonefile import FileIdentity
from csi_driver.host.handle import Handle
from csi_driver.host.log import log
from csi_driver.host.workers import Workers
from csi_driver.keys.secret import SecretKey, with_either
from csi_driver.luks import cloned, rekey
from csi_driver.luks import device as luks
from csi_driver.luks.choice import luks_format
from csi_driver.luks.formats import LuksFormat
from csi_driver.luks.header_metadata import Keyslot
from csi_driver.luks.header_rules import Limits as HeaderLimits
from csi_driver.model.errors import DeadlineExceeded, DriverError, FailedPrecondition, Unauthenticated
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Limits
from csi_driver.model.volume import EncryptionState, LuksIdentity, NamedSlot, VolumeRecord


class KeySlots:
    """Tries passphrases on headers and changes who opens them; callers hold the volume's lock."""

    def __init__(self, workers: Workers, limits: Limits) -> None:
        self._workers = workers
        self._limits = limits
        self._unlocks = threading.BoundedSemaphore(limits.unlocks_at_once)
        self.header_limits = HeaderLimits(memory_kib=limits.pbkdf_memory_kib)

    def verify(self, record: VolumeRecord, device: Handle, passphrase: Passphrase) -> None:
        """Try the passphrase, changing nothing. Raises Unauthenticated and what `luks.open_device` does."""
        with self.unlocking(f"volume {record.id}"):
            self._workers.call(
                f"luks-unlock of {where_is(record, device)}",
                self._limits.unlock_seconds,
                luks.check_passphrase,
                where_is(record, device),
                device,
                device_size(record),
                recorded_identity(record),
                self.header_limits,
                passphrase,
            )

    def check_image(
        self, where: str, file: FileIdentity, identity: LuksIdentity, passphrase: Passphrase
    ) -> tuple[Keyslot, ...]:
        """The key slots of an image's header, once it is validated and the passphrase has opened it."""
        with self.unlocking(where):
            return self._workers.call(
                f"luks-unlock of {where}",
                self._limits.unlock_seconds,
                cloned.check_image,
                where,
                file,
                identity,
                self.header_limits,
                passphrase,
            )

    def take_identity(self, record: VolumeRecord, clone: Handle) -> VolumeRecord:
        """From `cloning` to `encrypted`: the header of the clone, file or device, gets the recorded UUID.

        Returns the record that says so, which the caller writes. No key is needed. Repeating is fine wherever it was
        cut. Errors as `cloned.change_uuid`.
        """
        identity = recorded_identity(record)
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
            self.header_limits,
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
        announce: Callable[[rekey.Added], None] = lambda _: None,
    ) -> rekey.Added:
        """Give `new` a key slot beside that of `current`. `announce` is told of both before anything is written.

        No header is changed of which there is no copy, and none is left whose copy opens with another key. A copy gives
        way to what was just opened alone: it may be the last good header. Errors as `rekey`.
        """
        chosen = self.format_of(record, wishes)
        where = where_is(record, device)
        checked = where, device, device_size(record), recorded_identity(record), self.header_limits
        with Handle(os.memfd_create("luks-draft", os.MFD_CLOEXEC), "a header to be") as draft:
            with self.unlocking(f"volume {record.id}"):
                added = self._workers.call(
                    f"luks-make-key of {where}",
                    self._limits.format_seconds,
                    rekey.prepare_passphrase,
                    *checked,
                    current,
                    new,
                    chosen,
                    draft,
                )
            self.back_up_header(backend, record, device)
            announce(added)
            with self.unlocking(f"volume {record.id}"):
                self._workers.call(
                    f"luks-add-key of {where}",
                    self._limits.format_seconds,
                    rekey.write_prepared,
                    *checked,
                    added,
                    draft,
                    new,
                )
        self.back_up_header(backend, record, device)
        return added

    def slot_of(self, record: VolumeRecord, device: Handle, passphrase: Passphrase) -> NamedSlot:
        """The key slot that the passphrase opens. Errors as `rekey`."""
        with self.unlocking(f"volume {record.id}"):
            return self._workers.call(
                f"luks-unlock of {where_is(record, device)}",
                self._limits.unlock_seconds,
                rekey.slot_of,
                where_is(record, device),
                device,
                device_size(record),
                recorded_identity(record),
                self.header_limits,
                passphrase,
            )

    def take_key(
        self,
        backend: Backend,
        record: VolumeRecord,
        clone: Handle,
        current: Passphrase,
        own: Passphrase,
        wishes: SecretKey,
    ) -> None:
        """Let `own` open the header of a clone, file or device, instead of `current` or what the secret had before it.

        Repeating is fine.
        """
        try:
            going = [
                with_either(
                    wishes, current, lambda each: self.add_passphrase(backend, record, clone, each, own, wishes).present
                )
            ]
        except Unauthenticated:
            going = []  # it was taken out by a call that was cut; that `own` opens the header is proven below
        self.remove_passphrase(backend, record, clone, going, own)

    def remove_passphrase(
        self, backend: Backend, record: VolumeRecord, device: Handle, slots: Collection[NamedSlot], keep: Passphrase
    ) -> None:
        """Take out key slots, with proof that `keep` opens another; our token says the record's key."""
        self._remove(record, device, slots, keep)
        self.back_up_header(backend, record, device)

    def name_key(self, record: VolumeRecord, clone: Handle, passphrase: Passphrase) -> None:
        """Let our token in the header of a volume in the making, file or device, say its key, which opens it."""
        self._remove(record, clone, (), passphrase)

    def _remove(self, record: VolumeRecord, device: Handle, slots: Collection[NamedSlot], keep: Passphrase) -> None:
        with self.unlocking(f"volume {record.id}"):
            self._workers.call(
                f"luks-remove-key of {where_is(record, device)}",
                self._limits.format_seconds,
                rekey.remove_passphrase,
                where_is(record, device),
                device,
                device_size(record),
                recorded_identity(record),
                self.header_limits,
                slots,
                keep,
                record.key,
            )

    def back_up_header(self, backend: Backend, record: VolumeRecord, device: Handle) -> None:
        """Keep a copy of the header beside the record."""

        def fill(path: str) -> None:
            where = where_is(record, device)
            self._workers.call(
                f"luks-backup of {where}", self._limits.mount_seconds, rekey.back_up_header, where, device, path
            )

        backend.keep_header_copy(record.id, fill)

    def ensure_header_copy(self, backend: Backend, record: VolumeRecord, device: Handle) -> None:
        """Keep a copy where there is none; what hinders it is logged, and keeps nobody from the volume."""
        try:
            if not backend.has_header_copy(record.id):
                self.back_up_header(backend, record, device)
        except (DriverError, OSError) as error:
            log.warning("the header of a volume could not be backed up", volume_id=record.id, error=str(error))

    def format_of(self, record: VolumeRecord, wishes: SecretKey) -> LuksFormat:
        """How the volume's header, or another key slot of it, is made. Errors as `luks_format`."""
        return luks_format(record.parameters, wishes, self._limits.pbkdf_memory_kib, random_key=record.key is not None)

    @contextmanager
    def unlocking(self, what: str) -> Iterator[None]:
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


def device_size(record: VolumeRecord) -> int:
    """Bytes that the volume's device must have: its capacity and, encrypted, the room before the payload."""
    return record.capacity_bytes + (record.luks.data_offset if record.luks else 0)


def where_is(record: VolumeRecord, device: Handle) -> str:
    """Volume and device in errors."""
    return f"volume {record.id} on {device}"


def recorded_identity(record: VolumeRecord) -> LuksIdentity:
    """What the volume's header must say. Raises FailedPrecondition."""
    if record.luks is None:
        raise FailedPrecondition(
            f"the record of volume {record.id} says it is {record.encryption} and names no LUKS UUID; restore the "
            f"record from a backup"
        )
    return record.luks
