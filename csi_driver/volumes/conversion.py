"""Another volume key for a volume while it is in use or not, and a first one for a plain volume that is not.

The content is moved chunk by chunk to storage with a header of its own, which takes the volume's place in the end. What
was not moved yet lies untouched where it was, so there is nothing to journal: the record's `done` says where the two
meet, and it is written while nobody can write to the chunk in between (docs/architecture.md, "A new volume key").
"""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

import msgspec

from csi_driver.backends.base import Backend
from csi_driver.host import blockdev, keyring
from csi_driver.host.devicemapper import Device, DeviceMapper
from csi_driver.host.dmcontrol import NoDeviceMapper
from csi_driver.host.handle import Handle
from csi_driver.host.keyring import KeptKey
from csi_driver.host.locks import VolumeLocks
from csi_driver.host.log import log
from csi_driver.host.workers import Workers
from csi_driver.images.stopping import Stop
from csi_driver.keys.secret import SecretKey, require_passphrase
from csi_driver.luks import device as luks
from csi_driver.luks import key_token, two_keys
from csi_driver.luks.bulk import sector_cipher
from csi_driver.luks.choice import luks_format
from csi_driver.luks.formats import LuksFormat, check_capacity
from csi_driver.luks.image_header import ImageHeader, VolumeKey, read_image_header
from csi_driver.luks.mapping import Fit
from csi_driver.luks.two_keys import Mover, Sides
from csi_driver.model.errors import DeviceInUse, DriverError, FailedPrecondition, Stopped, VolumeBusy
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Limits
from csi_driver.model.volume import (
    Conversion,
    EncryptionState,
    FileSystemState,
    KeyTrail,
    LuksIdentity,
    VolumeRecord,
    is_mapping_name,
    volume_of,
)
from csi_driver.volumes.encryption import Encryption
from csi_driver.volumes.keys import VolumeKeys
from csi_driver.volumes.keyslots import KeySlots, recorded_identity, where_is
from csi_driver.volumes.presence import Presence, Presences
from csi_driver.volumes.stages import Stages
from csi_driver.volumes.two_keys import conversion_of, opening_of, refuse_half

CHUNK: Final = 16 << 20
"""Bytes that are moved in one step; a mapping stands still for as long as it takes to read so much again."""

_BUSY_SECONDS: Final = 60.0
_PAUSE: Final = 0.1


@dataclass(frozen=True)
class Watch:
    """Who looks on: `progress` is told the bytes done, `stop` asks for the end, `rate` is the most bytes per second."""

    progress: Callable[[int], None] = lambda _: None
    stop: Stop = field(default_factory=Stop)
    rate: int | None = None


@dataclass(frozen=True)
class _Keys:
    """The volume keys in hand: None for the old one of a plain volume."""

    old: VolumeKey | None
    new: VolumeKey


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
        self._presences = presences
        self._stages = stages
        self._workers = workers
        self._mapper = mapper
        self._encryption = encryption
        self._slots = slots
        self._keys = keys
        self._limits = limits
        self._chunk = chunk

    def reencrypt(self, volume_id: str, secret: SecretKey, watch: Watch) -> VolumeRecord:
        """Give the volume another volume key, or go on where that was cut; its passphrase stays.

        Pods may use it, start and end meanwhile. Raises FailedPrecondition (not encrypted, never staged, a change of
        its passphrase or an expansion under way, key slots of others), Unauthenticated, ResourceExhausted, VolumeBusy,
        Stopped, DeviceUnreadable, and what sources and headers raise; the same call goes on after any of them.
        """
        with self._locks.hold(volume_id), self._workers.session():
            record = self._backend.get(volume_id)
            if record.encryption is None:
                raise FailedPrecondition(
                    f"volume {volume_id} is not encrypted; luks-csi volume encrypt {volume_id} does that"
                )
            if record.encryption is not EncryptionState.ENCRYPTED:
                raise FailedPrecondition(f"volume {volume_id} was never staged, so it has no key yet; stage it first")
            passphrase = self._keys.of(record, secret, "reencrypt").passphrase
            if record.conversion is None:
                record = self._begin_reencryption(record, secret, passphrase)
        return self._run(record, passphrase, watch)

    def encrypt(
        self, volume_id: str, secret: SecretKey, kms_id: str | None, watch: Watch, *, generate: bool
    ) -> VolumeRecord:
        """Encrypt a plain volume that is not in use, or go on where that was cut.

        Its key is `secret`'s passphrase, or one of its own in that KMS or, to `generate`, in a secret. Raises as
        `reencrypt`, and DeviceInUse.
        """
        with self._locks.hold(volume_id), self._workers.session():
            record = self._backend.get(volume_id)
            if record.encryption is not None:
                raise FailedPrecondition(
                    f"volume {volume_id} is encrypted already; luks-csi volume reencrypt {volume_id} gives it another "
                    f"volume key"
                )
            if record.conversion is None:
                record, passphrase = self._begin_encryption(record, secret, kms_id, generate=generate)
            else:
                passphrase = self._passphrase(record, record.conversion.key, secret)
        return self._run(record, passphrase, watch)

    def go_on_all(self) -> None:
        """Let I/O flow again through every mapping that a killed step has left suspended; what fails is logged.

        One that a step holds just now is left to it.
        """
        try:
            names = self._mapper.names()
        except NoDeviceMapper:
            return
        for name in filter(is_mapping_name, names):
            mapping, volume_id = self._mapper.get(name), volume_of(name)
            if mapping is None or not mapping.suspended or not self._backend.has(volume_id):
                continue
            try:
                with self._locks.hold(volume_id), self._workers.session():
                    record = self._backend.get(volume_id)
                    present = self._presences.of(volume_id, record)
                    if record.conversion is not None and present.fit is Fit.FITS:
                        self._encryption.resume(self._backend, record, present.mapping, present.stage)
            except VolumeBusy:
                continue
            except (DriverError, OSError) as error:
                log.error("a volume stands still", volume_id=volume_id, error=str(error))

    def _begin_reencryption(self, record: VolumeRecord, secret: SecretKey, passphrase: Passphrase) -> VolumeRecord:
        if record.rekey is not None:
            raise FailedPrecondition(
                f"the passphrase of volume {record.id} is being changed; end that first (luks-csi keys rotate "
                f"{record.id})"
            )
        identity = recorded_identity(record)
        present = self._usable(record)
        with self._device(record) as device:
            self._slots.verify(record, device, passphrase)
            header = self._header(record, device, identity)
            if len(header.header.keyslots) != 1:
                raise FailedPrecondition(
                    f"volume {record.id} has {len(header.header.keyslots)} key slots and only the one of its own "
                    f"passphrase can be kept; remove the others first (cryptsetup luksKillSlot)"
                )
            self._check_length(record, device, present, identity.data_offset)
        chosen = replace(self._slots.format_of(record, secret), sector_size=identity.sector_size)
        made = self._make_next(record, chosen, identity.uuid, passphrase, record.key)
        return self._backend.update(msgspec.structs.replace(record, conversion=Conversion(luks=made)))

    def _begin_encryption(
        self, record: VolumeRecord, secret: SecretKey, kms_id: str | None, *, generate: bool
    ) -> tuple[VolumeRecord, Passphrase]:
        if record.file_system in (FileSystemState.NONE, FileSystemState.MAKING):
            raise FailedPrecondition(
                f"volume {record.id} was never staged, so nothing is in it; delete it and make an encrypted one"
            )
        present = self._usable(record)
        with self._device(record) as device:
            self._check_length(record, device, present, 0)
        parameters = msgspec.structs.replace(record.parameters, encrypted=True, kms_id=kms_id, generate_key=generate)
        own = kms_id is not None or generate
        if not own:
            require_passphrase(secret, record.id)
        chosen = luks_format(parameters, secret, self._limits.pbkdf_memory_kib, random_key=own)
        trail = self._keys.make(record.id, parameters, secret)
        passphrase = self._passphrase(record, trail, secret)
        made = self._make_next(record, chosen, str(uuid.uuid4()), passphrase, trail)
        conversion = Conversion(luks=made, key=trail)
        return self._backend.update(msgspec.structs.replace(record, conversion=conversion)), passphrase

    def _passphrase(self, record: VolumeRecord, trail: KeyTrail | None, secret: SecretKey) -> Passphrase:
        if trail is None:
            return require_passphrase(secret, record.id)
        return self._keys.fetch(record, trail, secret, "encrypt")

    def _make_next(
        self, record: VolumeRecord, chosen: LuksFormat, luks_uuid: str, passphrase: Passphrase, trail: KeyTrail | None
    ) -> LuksIdentity:
        """Storage with a header of its own, to move to; returns what that says."""
        refuse_half(self._backend, record)
        check_capacity(chosen.cipher, record.capacity_bytes)
        identity = LuksIdentity(
            uuid=luks_uuid,
            cipher=chosen.cipher,
            key_bits=chosen.key_bits,
            sector_size=chosen.sector_size,
            data_offset=chosen.data_offset,
        )
        size = record.capacity_bytes + chosen.data_offset
        self._backend.make_next(record.id, size)
        with self._backend.attach_next(record.id) as fresh, self._slots.unlocking(f"volume {record.id}"):
            where = where_is(record, fresh)
            digest = self._workers.call(
                f"luks-format of {where}",
                self._limits.format_seconds,
                luks.format_device,
                where,
                fresh,
                size,
                chosen,
                identity,
                self._slots.header_limits,
                passphrase,
                fresh,
                key_token.encode(trail) if trail else None,
            )
        return msgspec.structs.replace(identity, digest=digest)

    def _run(self, record: VolumeRecord, passphrase: Passphrase, watch: Watch) -> VolumeRecord:
        volume_id, capacity = record.id, record.capacity_bytes
        watch.progress(conversion_of(record).done)
        with ExitStack() as stack:
            stack.callback(keyring.clear_thread)
            moving: _Moving | None = None
            while True:
                begun = time.monotonic()
                with self._held(volume_id), self._workers.session():
                    record = self._backend.get(volume_id)
                    done = conversion_of(record).done
                    if done >= capacity:
                        return self._finish(record, moving)
                    if moving is None:
                        moving = stack.enter_context(self._moving(record, passphrase))
                    record = self._step(record, moving, passphrase)
                moved = conversion_of(record).done
                watch.progress(moved)
                if watch.stop.name and moved < capacity:
                    raise Stopped(
                        f"{watch.stop.name} stopped it: {moved * 100 // capacity} % of volume {volume_id} are under "
                        f"the new volume key; the same command goes on with it, and should soon"
                    )
                if watch.rate:
                    time.sleep(max(0.0, (moved - done) / watch.rate - (time.monotonic() - begun)))

    @contextmanager
    def _moving(self, record: VolumeRecord, passphrase: Passphrase) -> Iterator["_Moving"]:
        """Both volume keys, and what moves from under one to under the other."""
        conversion = conversion_of(record)
        identity = record.luks
        with ExitStack() as stack:
            old: VolumeKey | None = None
            old_cipher = None
            with self._device(record) as device, self._backend.attach_next(record.id) as fresh:
                if identity is not None:
                    old = stack.enter_context(self._header(record, device, identity).volume_key(passphrase))
                    old_cipher = sector_cipher(identity.cipher, bytes(old.value), identity.sector_size)
                new = stack.enter_context(self._header(record, fresh, conversion.luks).volume_key(passphrase))
                new_cipher = sector_cipher(conversion.luks.cipher, bytes(new.value), conversion.luks.sector_size)
                mover = Mover(
                    f"volume {record.id}",
                    old_cipher,
                    identity.data_offset if identity else 0,
                    new_cipher,
                    conversion.luks.data_offset,
                    self._chunk,
                )
                if self._presences.of(record.id, record).mapping is None:
                    length = min(self._chunk, record.capacity_bytes - conversion.done)
                    mover.refuse_moved(device, fresh, conversion.done, length)
            yield _Moving(mover, _Keys(old, new))

    def _header(self, record: VolumeRecord, device: Handle, identity: LuksIdentity) -> ImageHeader:
        """The checked header of one of the volume's devices, in this process."""
        where = where_is(record, device)

        def read(offset: int, length: int) -> bytes:
            with open(device, "rb", buffering=0) as opened:
                return blockdev.read_at(opened.fileno(), offset, length)

        found = read_image_header(where, read, blockdev.size_bytes(device.fd), self._slots.header_limits)
        if found.identity != identity:
            raise FailedPrecondition(
                f"expected the header with UUID {identity.uuid} and volume key digest {identity.digest} on {where}, "
                f"found UUID {found.identity.uuid} and digest {found.identity.digest}; nothing was changed, check the "
                f"record and that this is the volume's device"
            )
        return found

    def _step(self, record: VolumeRecord, moving: "_Moving", passphrase: Passphrase) -> VolumeRecord:
        """Move one chunk; what lies there now is used by whoever uses the volume when this returns."""
        present = self._usable(record)
        start = conversion_of(record).done
        length = min(self._chunk, record.capacity_bytes - start)
        with self._device(record) as device:
            if present.mapping is None:
                with self._backend.attach_next(record.id) as fresh:
                    moving.mover.copy(device, fresh, start, length)
                    record = self._advanced(record, start + length)
            else:
                record = self._step_beneath(record, present, present.mapping, device, moving, passphrase)
            moving.mover.let_go(device, start, length)
        self._backend.guard(record.id)
        return record

    def _step_beneath(
        self,
        record: VolumeRecord,
        present: Presence,
        mapping: Device,
        device: Handle,
        moving: "_Moving",
        passphrase: Passphrase,
    ) -> VolumeRecord:
        """Move one chunk beneath an open mapping, which stands still while its copy is compared once more."""
        if mapping.suspended:
            kept = self._encryption.two_keys.open(self._backend, record, device, passphrase, fresh=False)
            self._note(record, kept)
            mapping = self._usable(record).mapping or mapping
        with self._encryption.two_keys.sides(self._backend, record, device, mapping.targets) as sides:
            found = two_keys.boundary(mapping.targets, sides.new.key_name, record.capacity_bytes)
            if found != sides.done:
                raise FailedPrecondition(
                    f"the mapping {mapping.name} has {found} bytes under the new volume key and the record of volume "
                    f"{record.id} says {sides.done}; restore its newest record"
                )
            self._keep(record, present, sides, moving)
            start, length = sides.done, min(self._chunk, sides.capacity - sides.done)
            source, target = sides.old.device, sides.new.device
            moving.mover.copy(source, target, start, length)
            self._mapper.load(mapping.name, replace(sides, done=start + length).table(opening_of(record)))
            try:
                self._mapper.suspend(mapping.name)
                moving.mover.copy_again(source, target, start, length)
                record = self._advanced(record, start + length)
            except BaseException:
                self._go_on(record.id, mapping.name, start + length)
                raise
            try:
                self._mapper.resume(mapping.name)
            except DriverError:
                self._advanced(record, start)  # nobody has written to the chunk, and it is still where it was
                self._go_on(record.id, mapping.name, start + length)
                raise
        return record

    def _go_on(self, volume_id: str, name: str, moved: int) -> None:
        """After an error: let I/O flow by the table that the record says, of the two that are there."""
        try:
            if conversion_of(self._backend.get(volume_id)).done != moved:
                self._mapper.clear(name)
            self._mapper.resume(name)
        except (DriverError, OSError) as error:
            log.error("a volume stands still until the next call for it", volume_id=volume_id, error=str(error))

    def _keep(self, record: VolumeRecord, present: Presence, sides: Sides, moving: "_Moving") -> None:
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
            self._note(record, (moving.kept[sides.old.key_name], moving.kept[sides.new.key_name]))

    def _note(self, record: VolumeRecord, kept: tuple[KeptKey, KeptKey | None]) -> None:
        """Let the stage say where the keys are kept."""
        if (stage := self._stages.get(record.id)) is not None:
            self._stages.put(record.id, msgspec.structs.replace(stage, kept_key=kept[0], kept_next=kept[1]))

    def _finish(self, record: VolumeRecord, moving: "_Moving | None") -> VolumeRecord:
        stage = self._stages.get(record.id)
        new_key = two_keys.new_key_name(conversion_of(record).luks)
        names = {luks.volume_key_name(record.luks.uuid)} if record.luks else set()
        record = self._encryption.two_keys.finish(self._backend, record)
        self._backend.guard(record.id)
        if stage is not None and stage.kept_next is not None:
            self._note(record, (stage.kept_next, None))
        for name in (names | set(moving.kept if moving else ())) - {new_key}:
            keyring.unlink_from_user(name)
        return record

    def _advanced(self, record: VolumeRecord, done: int) -> VolumeRecord:
        conversion = msgspec.structs.replace(conversion_of(record), done=done)
        return self._backend.update(msgspec.structs.replace(record, conversion=conversion))

    def _usable(self, record: VolumeRecord) -> Presence:
        present = self._presences.of(record.id, record)
        if record.encryption is None and present.is_open:
            raise DeviceInUse(
                f"volume {record.id} is in use and only one that is not can be encrypted; end its pods, and unstage it "
                f"if Kubernetes does not"
            )
        if present.mapping is not None and present.fit is not Fit.FITS:
            raise FailedPrecondition(
                f"the mapping {present.mapping.name} is not over the device of volume {record.id}; unstage the volume"
            )
        return present

    def _check_length(self, record: VolumeRecord, device: Handle, present: Presence, offset: int) -> None:
        """An expansion that was cut has left more than is recorded, and would be moved as far as that."""
        sector = record.luks.sector_size if record.luks else 1
        found = blockdev.size_bytes(device.fd) - offset
        shown = present.mapping.size_bytes if present.mapping is not None else record.capacity_bytes
        if found - found % sector != record.capacity_bytes or shown != record.capacity_bytes:
            raise FailedPrecondition(
                f"volume {record.id} is recorded with {record.capacity_bytes} bytes and its device has {found}, of "
                f"which {shown} are shown; end its expansion first"
            )

    @contextmanager
    def _device(self, record: VolumeRecord) -> Iterator[Handle]:
        device = self._backend.device_of(record.id) or self._backend.attach(record.id, lasting=False)
        with device:
            yield device

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


@dataclass
class _Moving:
    """What this process moves with; `kept` says where it has kept which key in root's keyring."""

    mover: Mover
    keys: _Keys
    kept: dict[str, KeptKey] = field(default_factory=dict)
