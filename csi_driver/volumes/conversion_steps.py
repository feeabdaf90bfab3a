"""A move to another volume key, chunk by chunk, beneath an open mapping or without one."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import msgspec

from csi_driver.backends.base import Backend
from csi_driver.host import keyring
from csi_driver.host.devicemapper import Device, DeviceMapper
from csi_driver.host.handle import Handle
from csi_driver.host.keyring import KeptKey
from csi_driver.host.log import log
from csi_driver.luks import two_keys
from csi_driver.luks.bulk import sector_cipher
from csi_driver.luks.image_header import VolumeKey
from csi_driver.luks.two_keys import Mover, Sides
from csi_driver.model.errors import DriverError, FailedPrecondition, ResourceExhausted
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import LuksIdentity, VolumeRecord
from csi_driver.volumes.conversion_devices import ConversionDevices
from csi_driver.volumes.encryption import Encryption
from csi_driver.volumes.presence import Presence, Presences
from csi_driver.volumes.stages import Stages
from csi_driver.volumes.two_keys import check_boundary, conversion_of, opening_of


@dataclass(frozen=True)
class KeyPair:
    """The volume keys in hand: None for the old one of a plain volume."""

    old: VolumeKey | None
    new: VolumeKey


@dataclass
class Moving:
    """What this process moves with, to the header that `luks` tells of.

    `kept` says where it has kept which key in root's keyring.
    """

    mover: Mover
    keys: KeyPair
    luks: LuksIdentity
    kept: dict[str, KeptKey] = field(default_factory=dict)


class ConversionSteps:
    """Moves one chunk at a time, of `chunk` bytes at most, and counts it."""

    def __init__(
        self,
        backend: Backend,
        devices: ConversionDevices,
        presences: Presences,
        stages: Stages,
        mapper: DeviceMapper,
        encryption: Encryption,
        chunk: int,
    ) -> None:
        self._backend = backend
        self._devices = devices
        self._presences = presences
        self._stages = stages
        self._mapper = mapper
        self._encryption = encryption
        self._chunk = chunk

    @contextmanager
    def moving(self, record: VolumeRecord, passphrase: Passphrase) -> Iterator[Moving]:
        """Both volume keys, and what moves from under one to under the other."""
        conversion = conversion_of(record)
        identity = record.luks
        with ExitStack() as stack:
            old: VolumeKey | None = None
            old_cipher = None
            with (
                self._devices.attached(record) as device,
                self._devices.attached_next(record) as fresh,
            ):
                if identity is not None:
                    old = stack.enter_context(self._devices.header(record, device, identity).volume_key(passphrase))
                    old_cipher = sector_cipher(identity.cipher, bytes(old.value), identity.sector_size)
                new = stack.enter_context(self._devices.header(record, fresh, conversion.luks).volume_key(passphrase))
                new_cipher = sector_cipher(conversion.luks.cipher, bytes(new.value), conversion.luks.sector_size)
                mover = Mover(
                    f"volume {record.id}",
                    old_cipher,
                    identity.data_offset if identity else 0,
                    new_cipher,
                    conversion.luks.data_offset,
                    self._chunk,
                )
                length = min(self._chunk, record.capacity_bytes - conversion.done)
                closed = self._presences.of(record.id, record).mapping is None
                if length and closed and not self._backend.is_newest(record):
                    mover.refuse_moved(device, fresh, conversion.done, length)
                if conversion.done:  # an earlier process may have been cut before it freed its last chunk
                    start = (conversion.done - 1) // self._chunk * self._chunk
                    mover.let_go_again(device, start, conversion.done - start)
            yield Moving(mover, KeyPair(old, new), conversion.luks)

    def step(self, record: VolumeRecord, moving: Moving, passphrase: Passphrase) -> VolumeRecord:
        """Move one chunk; what lies there now is used by whoever uses the volume when this returns."""
        present = self._devices.usable(record)
        start = conversion_of(record).done
        length = min(self._chunk, record.capacity_bytes - start)
        room = self._backend.space(record.parameters).available
        if room < length:  # what is freed may be shared with another file
            raise ResourceExhausted(
                f"no room to move more of volume {record.id}: {length} bytes are wanted and {room} are free above the "
                f"floor; free space there, the same command goes on"
            )
        try:
            with self._devices.attached(record) as device:
                if present.mapping is None:
                    with self._devices.attached_next(record) as fresh:
                        moving.mover.copy(device, fresh, start, length)
                        record = self._advanced(record, start + length)
                else:
                    record = self._step_beneath(record, present, present.mapping, device, moving, passphrase)
                moving.mover.let_go(device, start, length)
        finally:
            self._backend.guard(record.id)
        return record

    def _step_beneath(
        self,
        record: VolumeRecord,
        present: Presence,
        mapping: Device,
        device: Handle,
        moving: Moving,
        passphrase: Passphrase,
    ) -> VolumeRecord:
        """Move one chunk beneath an open mapping, which stands still while its copy is compared once more."""
        if mapping.suspended:
            kept = self._encryption.two_keys.open(self._backend, record, device, passphrase, fresh=False)
            self.note(record, kept)
            mapping = self._devices.usable(record).mapping or mapping
        with self._encryption.two_keys.sides(self._backend, record, device, mapping.targets) as sides:
            check_boundary(record, mapping)
            self._keep(record, present, sides, moving)
            start, length = sides.done, min(self._chunk, sides.capacity - sides.done)
            source, target = sides.old.device, sides.new.device
            moving.mover.copy(source, target, start, length)
            try:
                self._mapper.load(
                    mapping.name, msgspec.structs.replace(sides, done=start + length).table(opening_of(record))
                )
                self._mapper.suspend(mapping.name)
                moving.mover.copy_again(source, target, start, length)
                record = self._advanced(record, start + length)
                self._mapper.resume(mapping.name)
            except BaseException:
                self._go_on(record.id, mapping.name, start, start + length)
                raise
        return record

    def _go_on(self, volume_id: str, name: str, before: int, moved: int) -> None:
        """After an error: let I/O flow by the table that the record says, of the two that are there.

        Where that cannot be, by the old one, which is counted again first: nobody has written to the chunk, and it is
        still where it was. But not if the new table was live for a moment: then somebody may have.
        """
        try:
            record = self._backend.get(volume_id)
            if conversion_of(record).done != moved:
                self._mapper.clear(name)
            try:
                self._mapper.resume(name)
            except DriverError:
                live = self._mapper.get(name)
                new_key = two_keys.new_key_name(conversion_of(record).luks)
                if live is None or two_keys.boundary(live.targets, new_key, record.capacity_bytes) != before:
                    raise
                if conversion_of(record).done != before:
                    self._advanced(record, before)
                self._mapper.clear(name)
                self._mapper.resume(name)
        except (DriverError, OSError) as error:
            log.error("a volume stands still until the next call for it", volume_id=volume_id, error=str(error))

    def _keep(self, record: VolumeRecord, present: Presence, sides: Sides, moving: Moving) -> None:
        """Have both keys in this thread's keyring, and, for whoever must go on after a kill, in root's."""
        if sides.old.key_name in moving.kept:
            return
        if moving.keys.old is None:
            raise FailedPrecondition(f"volume {record.id} is open and was not encrypted; unstage it first")
        for side, key in ((sides.old, moving.keys.old), (sides.new, moving.keys.new)):
            keyring.add_to_thread(side.key_name, key.value)
            moving.kept[side.key_name] = keyring.link_to_user(side.key_name)
        for name, kept in moving.kept.items():
            keyring.link_into_thread(name, kept)
        if present.stage is not None:
            self.note(record, (moving.kept[sides.old.key_name], moving.kept[sides.new.key_name]))

    def note(self, record: VolumeRecord, kept: tuple[KeptKey, KeptKey | None]) -> None:
        """Let the stage say where the keys are kept."""
        if (stage := self._stages.get(record.id)) is not None:
            self._stages.put(record.id, msgspec.structs.replace(stage, kept_key=kept[0], kept_next=kept[1]))

    def _advanced(self, record: VolumeRecord, done: int) -> VolumeRecord:
        conversion = msgspec.structs.replace(conversion_of(record), done=done)
        return self._backend.update(msgspec.structs.replace(record, conversion=conversion))
