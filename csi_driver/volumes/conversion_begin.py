"""The begin of a move to another volume key: what must be so before, and the storage with a header of its own."""

import uuid
from dataclasses import replace

import msgspec

from csi_driver.backends.base import Backend
from csi_driver.host import blockdev
from csi_driver.host.handle import Handle
from csi_driver.host.workers import Workers
from csi_driver.keys.secret import SecretKey, require_passphrase
from csi_driver.keys.sources import GENERATED
from csi_driver.luks import device as luks
from csi_driver.luks import key_token, two_keys
from csi_driver.luks.choice import luks_format
from csi_driver.luks.formats import LuksFormat, check_capacity
from csi_driver.model.errors import FailedPrecondition, ResourceExhausted, Unauthenticated
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Limits
from csi_driver.model.volume import Conversion, FileSystemState, KeyTrail, LuksIdentity, VolumeRecord
from csi_driver.volumes.conversion_devices import ConversionDevices
from csi_driver.volumes.encryption import attempt
from csi_driver.volumes.keys import VolumeKeys, previous_tried
from csi_driver.volumes.keyslots import KeySlots, recorded_identity, where_is
from csi_driver.volumes.presence import Presence
from csi_driver.volumes.two_keys import refuse_half


class ConversionBegin:
    """Writes the first record of a move, once all that it needs is there."""

    def __init__(
        self,
        backend: Backend,
        devices: ConversionDevices,
        workers: Workers,
        slots: KeySlots,
        keys: VolumeKeys,
        limits: Limits,
    ) -> None:
        self._backend = backend
        self._devices = devices
        self._workers = workers
        self._slots = slots
        self._keys = keys
        self._limits = limits

    def opening(self, record: VolumeRecord, secret: SecretKey) -> Passphrase:
        """What opens the volume's header: its key, or the secret's passphrase, or the one that it had before."""
        passphrase = self._keys.of(record, secret, "reencrypt").passphrase
        try:
            with self._devices.attached(record) as device, self._keys.using(record, "reencrypt"):
                self._slots.verify(record, device, passphrase)
                return passphrase
        except Unauthenticated:
            if record.key is not None or secret.previous is None:
                raise
        with previous_tried(), self._devices.attached(record) as device, self._keys.using(record, "reencrypt"):
            self._slots.verify(record, device, secret.previous)
        return secret.previous

    def reencryption(self, record: VolumeRecord, secret: SecretKey, passphrase: Passphrase) -> VolumeRecord:
        """Of an encrypted volume, which keeps its passphrase; as `Conversions.reencrypt`."""
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
        present = self._devices.usable(record)
        with self._devices.attached(record) as device:
            header = self._devices.header(record, device, identity)
            if len(header.header.keyslots) != 1:
                raise FailedPrecondition(
                    f"volume {record.id} has {len(header.header.keyslots)} key slots and only the one of its own "
                    f"passphrase can be kept; remove the others first (cryptsetup luksKillSlot)"
                )
            self._check_length(record, device, present, identity.data_offset)
        chosen = replace(self._slots.format_of(record, secret), sector_size=identity.sector_size)
        made = self._make_next(record, chosen, identity.uuid, passphrase, record.key)
        return self._backend.update(msgspec.structs.replace(record, conversion=Conversion(luks=made)))

    def encryption(
        self, record: VolumeRecord, secret: SecretKey, kms_id: str | None, *, generate: bool
    ) -> tuple[VolumeRecord, Passphrase]:
        """Of a plain one; as `Conversions.encrypt`. The passphrase is that of its key."""
        if record.file_system in (FileSystemState.NONE, FileSystemState.MAKING):
            raise FailedPrecondition(
                f"volume {record.id} was never staged, so nothing is in it; delete it and make an encrypted one"
            )
        present = self._devices.usable(record)
        with self._devices.attached(record) as device:
            self._check_length(record, device, present, 0)
        parameters = msgspec.structs.replace(record.parameters, encrypted=True, kms_id=kms_id, generate_key=generate)
        own = kms_id is not None or generate
        if not own and secret.passphrase is None:
            raise FailedPrecondition(
                f"volume {record.id} is to be encrypted and nothing says by which key; give its passphrase, or a KMS "
                f"that is to make one"
            )
        chosen = luks_format(parameters, secret, self._limits.pbkdf_memory_kib, random_key=own)
        with self._keys.making(record.id, parameters, secret, lambda: self._is_begun(record.id)) as trail:
            passphrase = self.passphrase(record, trail, secret)
            made = self._make_next(record, chosen, str(uuid.uuid4()), passphrase, trail)
            conversion = Conversion(luks=made, key=trail)
            return self._backend.update(msgspec.structs.replace(record, conversion=conversion)), passphrase

    def passphrase(self, record: VolumeRecord, trail: KeyTrail | None, secret: SecretKey) -> Passphrase:
        """What that trail leads to; the secret's own without one."""
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
        beside = self._devices.beside(record.id)
        beside.make_next(record.id, size)
        try:
            self._check_freeing(record, identity.data_offset)
            digest = self._format_next(record, chosen, identity, size, passphrase, trail)
        except BaseException:
            attempt(beside.drop_next, record.id)
            raise
        return msgspec.structs.replace(identity, digest=digest)

    def _check_freeing(self, record: VolumeRecord, at: int) -> None:
        """Where nothing that was moved becomes free, all of it must have room a second time."""
        with self._devices.attached_next(record) as fresh:
            if two_keys.gives_back(fresh, at):
                return
        room = self._backend.space(record.parameters).available
        if room < record.capacity_bytes:
            raise ResourceExhausted(
                f"volume {record.id} cannot be moved to another volume key where it is: the file system of the state "
                f"directory frees nothing within a file (fallocate(2), FALLOC_FL_PUNCH_HOLE), so "
                f"{record.capacity_bytes} bytes are wanted and {room} are free above the floor; free space there"
            )

    def _is_begun(self, volume_id: str) -> bool:
        return self._backend.get(volume_id).conversion is not None

    def _format_next(
        self,
        record: VolumeRecord,
        chosen: LuksFormat,
        identity: LuksIdentity,
        size: int,
        passphrase: Passphrase,
        trail: KeyTrail | None,
    ) -> str:
        with (
            self._devices.attached_next(record) as fresh,
            self._slots.unlocking(f"volume {record.id}"),
        ):
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


def refuse_another_key(
    volume_id: str, trail: KeyTrail | None, secret: SecretKey, kms_id: str | None, *, generate: bool
) -> None:
    """Raise FailedPrecondition where another key is asked for than that of `trail`, with which it was begun.

    Where none is asked for it goes on, and another passphrase opens nothing, which is told.
    """
    begun = ["--passphrase-file or --secret-dir"]
    if trail is not None:
        begun = ["--generate-key"] if trail.type == GENERATED else ["--kms", trail.kms_id]
    asked = ["--kms", kms_id] if kms_id is not None else ["--generate-key"] * generate
    if not asked and secret.passphrase is not None:
        asked = ["--passphrase-file or --secret-dir"]
    if asked and asked != begun:
        raise FailedPrecondition(
            f"the encryption of volume {volume_id} was begun with {' '.join(begun)} and not with {' '.join(asked)}; go "
            f"on with the same, and give it another key when it has ended (luks-csi keys rotate)"
        )
