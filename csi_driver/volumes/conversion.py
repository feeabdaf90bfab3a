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

from csi_driver.backends.base import Backend, MovesVolumeKey, storage_beside
from csi_driver.host import blockdev, keyring
from csi_driver.host.devicemapper import Device, DeviceMapper
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
from csi_driver.model.errors import (
    Aborted,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    ResourceExhausted,
    Stopped,
    Unauthenticated,
    VolumeBusy,
)
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Limits
from csi_driver.model.volume import (
    Conversion,
    EncryptionState,
    FileSystemState,
    KeyTrail,
    LuksIdentity,
    VolumeRecord,
)
from csi_driver.volumes.encryption import Encryption, attempt
from csi_driver.volumes.keys import VolumeKeys
from csi_driver.volumes.keyslots import KeySlots, recorded_identity, where_is
from csi_driver.volumes.presence import Presence, Presences
from csi_driver.volumes.stages import Stages
from csi_driver.volumes.two_keys import check_boundary, conversion_of, opening_of, refuse_half

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
        self._beside(volume_id)
        with self._locks.hold(volume_id), self._workers.session():
            record = self._backend.get(volume_id)
            if record.encryption is None:
                raise FailedPrecondition(
                    f"volume {volume_id} is not encrypted; luks-csi volume encrypt {volume_id} does that"
                )
            if record.encryption is not EncryptionState.ENCRYPTED:
                raise FailedPrecondition(f"volume {volume_id} was never staged, so it has no key yet; stage it first")
            if record.conversion is not None and self._is_at_its_end(record):
                return self._finish(record)
            passphrase = self._opening(record, secret)
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
        self._beside(volume_id)
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

    def _is_at_its_end(self, record: VolumeRecord) -> bool:
        """Whether all was moved and has taken its place, and the record alone does not say so."""
        return conversion_of(record).done >= record.capacity_bytes and not self._beside(record.id).has_next(record.id)

    def _beside(self, volume_id: str) -> MovesVolumeKey:
        return storage_beside(self._backend, volume_id)

    def _opening(self, record: VolumeRecord, secret: SecretKey) -> Passphrase:
        """What opens the volume's header: its key, or the secret's passphrase, or the one that it had before."""
        passphrase = self._keys.of(record, secret, "reencrypt").passphrase
        try:
            with self._device(record) as device:
                self._slots.verify(record, device, passphrase)
                return passphrase
        except Unauthenticated:
            if record.key is not None or secret.previous is None:
                raise
        with self._device(record) as device:
            self._slots.verify(record, device, secret.previous)
        return secret.previous

    def _begin_reencryption(self, record: VolumeRecord, secret: SecretKey, passphrase: Passphrase) -> VolumeRecord:
        if record.rekey is not None:
            raise FailedPrecondition(
                f"the passphrase of volume {record.id} is being changed; end that first (luks-csi keys rotate "
                f"{record.id})"
            )
        if record.file_system in (FileSystemState.NONE, FileSystemState.MAKING):
            raise FailedPrecondition(
                f"volume {record.id} has no file system yet, and would never get one if it were moved now; stage it "
                f"first"
            )
        identity = recorded_identity(record)
        present = self._usable(record)
        with self._device(record) as device:
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
        if not own and secret.passphrase is None:
            raise FailedPrecondition(
                f"volume {record.id} is to be encrypted and nothing says by which key; give its passphrase, or a KMS "
                f"that is to make one"
            )
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
        beside = self._beside(record.id)
        beside.make_next(record.id, size)
        try:
            digest = self._format_next(record, chosen, identity, size, passphrase, trail)
        except BaseException:
            attempt(beside.drop_next, record.id)
            raise
        return msgspec.structs.replace(identity, digest=digest)

    def _format_next(
        self,
        record: VolumeRecord,
        chosen: LuksFormat,
        identity: LuksIdentity,
        size: int,
        passphrase: Passphrase,
        trail: KeyTrail | None,
    ) -> str:
        with self._beside(record.id).attach_next(record.id) as fresh, self._slots.unlocking(f"volume {record.id}"):
            where = where_is(record, fresh)
            return self._workers.call(
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

    def _run(self, record: VolumeRecord, passphrase: Passphrase, watch: Watch) -> VolumeRecord:
        volume_id, capacity = record.id, record.capacity_bytes
        watch.progress(conversion_of(record).done)
        with ExitStack() as stack:
            stack.callback(keyring.clear_thread)
            moving: _Moving | None = None
            while True:
                with self._held(volume_id), self._workers.session():
                    begun = time.monotonic()
                    record = self._backend.get(volume_id)
                    if record.conversion is None:
                        return record  # another command has ended it
                    done = record.conversion.done
                    if moving is None and self._beside(volume_id).has_next(volume_id):
                        moving = stack.enter_context(self._moving(record, passphrase))
                    if done >= capacity:
                        return self._finish(record)
                    if moving is None or moving.luks != record.conversion.luks:
                        raise Aborted(
                            f"volume {volume_id} is being moved to another volume key than this command was at; call "
                            f"again"
                        )
                    record = self._step(record, moving, passphrase)
                moved, took = conversion_of(record).done, time.monotonic() - begun
                watch.progress(moved)
                _rest(watch, max(took, _LEAST_REST, (moved - done) / watch.rate - took if watch.rate else 0.0))
                if watch.stop.name and moved < capacity:
                    raise Stopped(
                        f"{watch.stop.name} stopped it: {record.percent_moved} % of volume {volume_id} are under "
                        f"the new volume key; the same command goes on with it, and should soon"
                    )

    @contextmanager
    def _moving(self, record: VolumeRecord, passphrase: Passphrase) -> Iterator["_Moving"]:
        """Both volume keys, and what moves from under one to under the other."""
        conversion = conversion_of(record)
        identity = record.luks
        with ExitStack() as stack:
            old: VolumeKey | None = None
            old_cipher = None
            with self._device(record) as device, self._beside(record.id).attach_next(record.id) as fresh:
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
                length = min(self._chunk, record.capacity_bytes - conversion.done)
                closed = self._presences.of(record.id, record).mapping is None
                if length and closed and not self._backend.is_newest(record):
                    mover.refuse_moved(device, fresh, conversion.done, length)
                if conversion.done:  # an earlier process may have been cut before it freed its last chunk
                    start = (conversion.done - 1) // self._chunk * self._chunk
                    mover.let_go_again(device, start, conversion.done - start)
            yield _Moving(mover, _Keys(old, new), conversion.luks)

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
        room = self._backend.space(record.parameters).available
        if room < length:  # what is freed may be shared with another file
            raise ResourceExhausted(
                f"no room to move more of volume {record.id}: {length} bytes are wanted and {room} are free above the "
                f"floor; free space there, the same command goes on"
            )
        try:
            with self._device(record) as device:
                if present.mapping is None:
                    with self._beside(record.id).attach_next(record.id) as fresh:
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
        moving: "_Moving",
        passphrase: Passphrase,
    ) -> VolumeRecord:
        """Move one chunk beneath an open mapping, which stands still while its copy is compared once more."""
        if mapping.suspended:
            kept = self._encryption.two_keys.open(self._backend, record, device, passphrase, fresh=False)
            self._note(record, kept)
            mapping = self._usable(record).mapping or mapping
        with self._encryption.two_keys.sides(self._backend, record, device, mapping.targets) as sides:
            check_boundary(record, mapping)
            self._keep(record, present, sides, moving)
            start, length = sides.done, min(self._chunk, sides.capacity - sides.done)
            source, target = sides.old.device, sides.new.device
            moving.mover.copy(source, target, start, length)
            try:
                self._mapper.load(mapping.name, replace(sides, done=start + length).table(opening_of(record)))
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

    def _finish(self, record: VolumeRecord) -> VolumeRecord:
        stage = self._stages.get(record.id)
        identity = conversion_of(record).luks
        record = self._encryption.two_keys.finish(self._backend, record)
        self._backend.guard(record.id)
        if stage is not None and stage.kept_next is not None:
            self._note(record, (stage.kept_next, None))
        keyring.unlink_all(luks.key_prefix(identity.uuid), but=two_keys.new_key_name(identity))
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


def _rest(watch: Watch, seconds: float) -> None:
    """Leave the volume, and its disk, to others for so long: kubelet's calls find its lock free."""
    until = time.monotonic() + seconds
    while not watch.stop.name and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _PAUSE))


@dataclass
class _Moving:
    """What this process moves with, to the header that `luks` tells of.

    `kept` says where it has kept which key in root's keyring.
    """

    mover: Mover
    keys: _Keys
    luks: LuksIdentity
    kept: dict[str, KeptKey] = field(default_factory=dict)
