"""`luks-csi volume adopt`: a LUKS2 volume that Ceph-CSI, Longhorn or somebody by hand has made becomes one of ours.

Its file is copied, by shared blocks where the file system can, and stays as it is. UUID and data of the copy are the
file's, and so are its key slots, unless a KMS keeps the key. Our token in its header names the key of a KMS. The new
volume is `raw`: nothing is ever formatted in it.
"""

import os
import stat
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from csi_driver.backends.base import Backend, made_from_file
from csi_driver.host import blockdev
from csi_driver.host.clonefile import FileIdentity, clone_file
from csi_driver.host.handle import open_handle
from csi_driver.host.log import log
from csi_driver.host.loop import LoopDevices
from csi_driver.host.syscalls import error_name
from csi_driver.host.workers import Workers
from csi_driver.keys.base import KeyRequest
from csi_driver.keys.secret import SecretKey, require_passphrase
from csi_driver.keys.sources import GENERATED, KeySources
from csi_driver.luks import recovery
from csi_driver.luks.header_metadata import Argon2i, Keyslot
from csi_driver.luks.header_rules import Limits as HeaderLimits
from csi_driver.model.errors import AlreadyExists, DriverError, FailedPrecondition
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Limits
from csi_driver.model.times import recorded_now
from csi_driver.model.volume import (
    EncryptionState,
    FileSystemState,
    KeyTrail,
    LuksIdentity,
    VolumeParameters,
    VolumeRecord,
    volume_id_for,
)
from csi_driver.volumes.encryption import told_of_a_kms
from csi_driver.volumes.keys import shares_key
from csi_driver.volumes.keyslots import KeySlots, device_size
from csi_driver.volumes.recovery import opened_file, refuse_used
from csi_driver.volumes.rekey import Rekeying

_LEAST_BYTES: Final = 1 << 20
_SLOWEST: Final = 8 << 20  # bytes per second, below which a copy counts as hanging


@dataclass(frozen=True)
class AdoptRequest:
    """A name for the volume, the file with its LUKS2 header and data, and what opens it: a secret's passphrase or,
    with `trail`, a key of a KMS. Without either the token in its header is asked, which our own volumes have. A key
    that the KMS keeps is its maker's to destroy, so the volume gets one of its own, unless it is to `share` that.
    """

    name: str
    file: Path
    secret: SecretKey
    trail: KeyTrail | None = None
    share: bool = False


class Adoption:
    """Makes volumes of LUKS2 files; callers hold the volume's lock."""

    def __init__(
        self,
        backend: Backend,
        workers: Workers,
        loops: LoopDevices,
        slots: KeySlots,
        sources: KeySources,
        rekeying: Rekeying,
        limits: Limits,
    ) -> None:
        self._backend = backend
        self._workers = workers
        self._loops = loops
        self._slots = slots
        self._sources = sources
        self._rekeying = rekeying
        self._limits = limits
        self._header_limits = HeaderLimits(memory_kib=limits.pbkdf_memory_kib)

    def adopt(self, request: AdoptRequest) -> VolumeRecord:
        """Look at the file, prove that the key opens it, then make the volume, wholly or not at all.

        Where it is to have another key and cannot be given it the volume is there, and the error says so. Raises
        AlreadyExists, FailedPrecondition (no file, half of a volume, too small), DeviceInUse (it is attached),
        InvalidHeader (what this driver does not open), Unauthenticated, KeyLost, ResourceExhausted, Aborted (the file
        was changed meanwhile), and what a KMS raises.
        """
        volume_id, where = volume_id_for(request.name), str(request.file)
        maker = made_from_file(self._backend, volume_id)
        if self._backend.has(volume_id):
            raise AlreadyExists(f"volume {volume_id} exists already; choose another name")
        file = self._file(request.file)
        with self._workers.session():
            with opened_file(request.file) as header:
                found = self._workers.call(
                    f"luks-read of {where}",
                    self._limits.mount_seconds,
                    recovery.look,
                    where,
                    header,
                    self._header_limits,
                )
            luks, trail = found.identity, request.trail
            if trail is None and request.secret.passphrase is None:
                trail = found.trail
            if trail is not None:
                trail = msgspec.structs.replace(trail, foreign=True)
            if trail is not None:
                told: AbstractContextManager[None] = told_of_a_kms(where, trail)
                passphrase = self._sources.fetch(trail, KeyRequest(volume_id, trail.tenant, request.secret), "adopt")
            else:
                passphrase = require_passphrase(request.secret, volume_id)
                told = self._sources.using(KeyRequest(volume_id), "adopt")
            with told:
                slots = self._slots.check_image(where, file, luks, passphrase)
            parameters = VolumeParameters(encrypted=True)
            record = adopted(volume_id, request.name, where, file.size, luks, trail, parameters)
            fill = partial(self._fill, where, file, record, passphrase)
            record = maker.create_filled(record, device_size(record), fill)
            with self._backend.storage(volume_id) as storage:
                self._slots.ensure_header_copy(self._backend, record, storage)  # else the next stage does
        log.info("volume adopted", volume_id=volume_id, file=str(request.file), luks_uuid=luks.uuid)
        if (memory := _memory_kib(slots)) > Limits.pbkdf_memory_kib:
            log.warning("the server needs this limit too", volume_id=volume_id, pbkdf_memory_limit=f"{memory}Ki")
        return record if request.share else with_own_key(self._rekeying, record, request.secret)

    def _file(self, path: Path) -> FileIdentity:
        """The file that is adopted, links followed; nobody else uses it."""
        real = os.path.realpath(path)
        try:
            mode = os.stat(real).st_mode
            if not stat.S_ISREG(mode):
                raise FailedPrecondition(
                    f"{path} is a {blockdev.kind(mode)} and a volume is made of a file; copy it to one first (dd)"
                )
            refuse_used(path, self._loops)
            return FileIdentity.of(real)
        except OSError as error:
            raise FailedPrecondition(
                f"{path} cannot be looked at ({error_name(error)}); name a file of LUKS2"
            ) from None

    def _fill(self, where: str, file: FileIdentity, record: VolumeRecord, passphrase: Passphrase, path: str) -> None:
        self._workers.call(
            f"luks-clone of {where}",
            self._limits.format_seconds + file.size / _SLOWEST,
            clone_file,
            where,
            file,
            path,
            device_size(record),
        )
        if record.key is not None:  # before the volume is there: header and KMS are enough from the start
            with open_handle(path, os.O_RDWR) as clone:
                self._slots.name_key(record, clone, passphrase)


def adopted(
    volume_id: str,
    name: str,
    where: str,
    size: int,
    luks: LuksIdentity,
    trail: KeyTrail | None,
    parameters: VolumeParameters,
) -> VolumeRecord:
    """The record of what is `size` bytes long, with its header. Raises FailedPrecondition where that is too little."""
    capacity = (size - luks.data_offset) // luks.sector_size * luks.sector_size
    if capacity < _LEAST_BYTES:
        raise FailedPrecondition(f"{where} holds {max(capacity, 0)} bytes and a volume has at least {_LEAST_BYTES}")
    return VolumeRecord(
        id=volume_id,
        name=name,
        capacity_bytes=capacity,
        parameters=msgspec.structs.replace(
            parameters,
            kms_id=(trail.kms_id or None) if trail else None,
            generate_key=trail is not None and trail.type == GENERATED,
        ),
        encryption=EncryptionState.ENCRYPTED,
        luks=luks,
        key=trail,
        file_system=FileSystemState.RAW,
        created=recorded_now(),
    )


def with_own_key(rekeying: Rekeying, record: VolumeRecord, secret: SecretKey) -> VolumeRecord:
    """The volume, opened by a key that is nobody else's. Where it cannot have one the error says that it is there."""
    if not shares_key(record):
        return record
    try:
        return rekeying.rotate(record.id, secret, None).record
    except DriverError as error:
        raise type(error)(
            f"volume {record.id} was adopted and opens with the key of what it was copied from, which is lost with "
            f"that, as it could not be given its own: {error}; then give it one (luks-csi keys rotate {record.id})"
        ) from None


def _memory_kib(slots: Iterable[Keyslot]) -> int:
    """What the costliest of them takes."""
    return max((slot.kdf.memory for slot in slots if isinstance(slot.kdf, Argon2i)), default=0)
