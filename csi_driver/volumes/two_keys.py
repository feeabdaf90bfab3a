"""Volumes whose volume key is being changed: opened on both their devices, gone on with, and brought to their end.

docs/architecture.md, "A new volume key", tells the order; `csi_driver.volumes.conversion` moves the content.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from csi_driver.backends.base import Backend, movable, storage_beside
from csi_driver.host.devicemapper import Device, Target
from csi_driver.host.handle import Handle
from csi_driver.host.keyring import KeptKey
from csi_driver.host.log import log
from csi_driver.host.workers import Workers
from csi_driver.keys.sources import GENERATED
from csi_driver.luks import recovery, two_keys
from csi_driver.luks.device import Opening, key_name_of, volume_key_name
from csi_driver.luks.formats import DATA_OFFSET
from csi_driver.luks.two_keys import Side, Sides
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Limits
from csi_driver.model.times import recorded_now
from csi_driver.model.volume import Conversion, EncryptionState, VolumeParameters, VolumeRecord
from csi_driver.volumes.keyslots import KeySlots, recorded_identity, where_is
from csi_driver.volumes.stages import Stage


class TwoKeys:
    """Opens and ends volumes with a `conversion`; callers hold the volume's lock."""

    def __init__(self, workers: Workers, slots: KeySlots, limits: Limits) -> None:
        self._workers = workers
        self._slots = slots
        self._limits = limits

    def open(
        self, backend: Backend, record: VolumeRecord, device: Handle, passphrase: Passphrase, *, fresh: bool
    ) -> tuple[KeptKey, KeptKey]:
        """Make the mapping over both devices, or give one that is there the right table. Errors as `open_sides`."""
        where = where_is(record, device)
        with self.sides(backend, record, device, ()) as sides, self._slots.unlocking(f"volume {record.id}"):
            return self._workers.call(
                f"luks-open of {where}",
                2 * self._limits.unlock_seconds,
                two_keys.open_sides,
                where,
                sides,
                self._slots.header_limits,
                passphrase,
                opening_of(record),
                fresh=fresh,
            )

    def go_on(self, backend: Backend, record: VolumeRecord, mapping: Device, stage: Stage | None) -> None:
        """Let I/O flow through a mapping that a killed step left suspended; the record says by which table.

        Raises KeyNeeded, FailedPrecondition (the device is gone, the record is an older one).
        """
        check_boundary(record, mapping)
        device = backend.device_of(record.id)
        if device is None:
            raise FailedPrecondition(
                f"the mapping of volume {record.id} stands still and its device is gone; end what uses it"
            )
        with device, self.sides(backend, record, device, mapping.targets) as sides:
            where = where_is(record, device)
            self._workers.call(
                f"luks-resume of {where}",
                self._limits.mount_seconds,
                two_keys.go_on,
                where,
                sides,
                opening_of(record),
                stage.kept_key if stage else None,
                stage.kept_next if stage else None,
            )
        backend.guard(record.id)
        log.warning("a mapping that was left suspended was resumed", mapping=mapping.name)

    @contextmanager
    def sides(self, backend: Backend, record: VolumeRecord, device: Handle, live: Sequence[Target]) -> Iterator[Sides]:
        """Both devices, with the names that their keys have in the `live` table, if there is one."""
        conversion = conversion_of(record)
        new_key = two_keys.new_key_name(conversion.luks)
        old_keys = [name for name in map(key_name_of, live) if name != new_key]
        identity = recorded_identity(record)
        old = Side(device, identity, old_keys[0] if old_keys else volume_key_name(identity.uuid))
        with storage_beside(backend, record.id).attach_next(record.id) as fresh:
            yield Sides(old, Side(fresh, conversion.luks, new_key), conversion.done, record.capacity_bytes)

    def finish(self, backend: Backend, record: VolumeRecord) -> VolumeRecord:
        """Let the storage to which all was moved be the volume's own. Repeating is fine, wherever it was cut."""
        conversion = conversion_of(record)
        beside = storage_beside(backend, record.id)
        moved = beside.has_next(record.id)
        with beside.attach_next(record.id) if moved else backend.open_storage(record.id) as fresh:
            where = where_is(record, fresh)
            found = self._workers.call(
                f"luks-read of {where}",
                self._limits.mount_seconds,
                recovery.look,
                where,
                fresh,
                self._slots.header_limits,
            )
        if found.identity != conversion.luks:
            raise FailedPrecondition(
                f"the header on {where}, to which its content was moved, is not the one that was made there; nothing "
                f"was changed, restore next.img or the record from a backup"
            )
        if moved:
            beside.take_next(record.id)
        key = conversion.key or record.key
        record = msgspec.structs.replace(
            record,
            encryption=EncryptionState.ENCRYPTED,
            luks=conversion.luks,
            key=key,
            key_since=recorded_now() if conversion.key else record.key_since,
            conversion=None,
            parameters=_parameters(record, conversion),
        )
        with backend.open_storage(record.id) as storage:
            self._slots.back_up_header(backend, record, storage)
        record = backend.update(record)
        log.info("volume has another volume key", volume_id=record.id, luks_uuid=conversion.luks.uuid)
        return record


def check_boundary(record: VolumeRecord, mapping: Device) -> None:
    """Raise FailedPrecondition where a live mapping shows more of the new device than the record knows of, or, while it
    is not suspended, anything else than that: such a record is not the newest.
    """
    conversion = conversion_of(record)
    live = two_keys.boundary(mapping.targets, two_keys.new_key_name(conversion.luks), record.capacity_bytes)
    if live > conversion.done or (live != conversion.done and not mapping.suspended):
        raise FailedPrecondition(
            f"the mapping {mapping.name} has {live} bytes under the new volume key and the record of volume "
            f"{record.id} says {conversion.done}; restore its newest record"
        )


def conversion_of(record: VolumeRecord) -> Conversion:
    """The change of the volume key that is under way. Raises FailedPrecondition where there is none."""
    if record.conversion is None:
        raise FailedPrecondition(f"volume {record.id} is not being moved to another volume key; there is none to end")
    return record.conversion


def opening_of(record: VolumeRecord) -> Opening:
    """How the volume's mapping is opened."""
    parameters = record.parameters
    return Opening(record.mapping_name, parameters.discard, parameters.no_read_workqueue, parameters.no_write_workqueue)


def refuse_half(backend: Backend, record: VolumeRecord) -> None:
    """Raise FailedPrecondition for a volume of which only half could be read.

    That is a plain one that is being encrypted, and one whose record was written before what is there was moved.
    """
    beside = movable(backend)
    if record.conversion is None and beside is not None and beside.has_next(record.id, DATA_OFFSET):
        raise FailedPrecondition(
            f"the record of volume {record.id} knows nothing of another volume key, and next.img beside it holds what "
            f"was moved to one; restore the newest record, or take next.img away if that is of another volume"
        )
    if record.encryption is None and record.conversion is not None:
        raise FailedPrecondition(
            f"volume {record.id} is being encrypted, {record.percent_moved} % are "
            f"done; let luks-csi volume encrypt {record.id} run to its end on this node, it goes on where it was"
        )


def refuse_changing(record: VolumeRecord) -> None:
    """Raise FailedPrecondition while the volume's key or volume key is being changed."""
    if record.conversion is not None:
        verb = "encrypt" if record.encryption is None else "reencrypt"
        raise FailedPrecondition(
            f"volume {record.id} is being moved to another volume key, {record.percent_moved} % are done; let luks-csi "
            f"volume {verb} {record.id} run to its end first"
        )
    if record.rekey is not None:
        raise FailedPrecondition(
            f"the passphrase of volume {record.id} is being changed; end that first (luks-csi keys rotate {record.id})"
        )


def _parameters(record: VolumeRecord, conversion: Conversion) -> VolumeParameters:
    if record.encryption is not None:
        return record.parameters
    trail = conversion.key
    return msgspec.structs.replace(
        record.parameters,
        encrypted=True,
        kms_id=(trail.kms_id or None) if trail else None,
        generate_key=trail is not None and trail.type == GENERATED,
    )
