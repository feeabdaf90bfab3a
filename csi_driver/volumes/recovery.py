"""Recovery without Kubernetes: a volume's header put back from its copy, and any volume opened by header and key."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from csi_driver.backends.base import Backend, kept_before, next_before
from csi_driver.backends.loopfile import half_beside
from csi_driver.host import blockdev
from csi_driver.host.handle import Handle, open_handle
from csi_driver.host.log import log
from csi_driver.host.loop import LoopDevices
from csi_driver.host.syscalls import error_name
from csi_driver.host.workers import Workers
from csi_driver.keys.base import KeyRequest
from csi_driver.keys.secret import SecretKey, with_either
from csi_driver.keys.sources import KeySources
from csi_driver.luks import recovery
from csi_driver.luks.device import Opening
from csi_driver.luks.header_rules import Limits as HeaderLimits
from csi_driver.model.errors import DeviceAbsent, DeviceInUse, DeviceMismatch, FailedPrecondition, Unauthenticated
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Limits
from csi_driver.model.volume import EncryptionState, VolumeRecord
from csi_driver.volumes.attachment import refuse_many_nodes
from csi_driver.volumes.encryption import told_of_a_kms
from csi_driver.volumes.keys import VolumeKeys
from csi_driver.volumes.keyslots import device_size, recorded_identity
from csi_driver.volumes.moved import Homes
from csi_driver.volumes.presence import Presences

_ADVICE: Final = "give its passphrase with --passphrase-file or --secret-dir"
_NAME_DEVICE: Final = "name the volume's device, or the file below it (disk.img)"
_UNUSED: Final = "unstage its volume first (luks-csi volume unstage), or work on a copy"


class Recovery:
    """Works on what is left of volumes; callers hold the lock of a volume that is named."""

    def __init__(
        self,
        backend: Backend,
        presences: Presences,
        workers: Workers,
        loops: LoopDevices,
        sources: KeySources,
        keys: VolumeKeys,
        homes: Homes,
        limits: Limits,
    ) -> None:
        self._backend = backend
        self._presences = presences
        self._workers = workers
        self._loops = loops
        self._sources = sources
        self._keys = keys
        self._homes = homes
        self._limits = limits
        self._header_limits = HeaderLimits(memory_kib=limits.pbkdf_memory_kib)

    def restore_header(self, volume_id: str, copy: Path, secret: SecretKey, *, force: bool = False) -> Path | None:
        """Write that copy of a volume's header back to it; where the header is that was there, if that was one.

        The volume's key, of its KMS or `secret`'s passphrase, must open the copy, unless it is written by `force`.
        Raises DeviceInUse while it is open or several nodes have it, FailedPrecondition for a volume that was never
        formatted or a passphrase that is not given, Unauthenticated, and where the copy is not of this very volume:
        ForeignSignature, InvalidHeader, DeviceBlank; DeviceShort; what a KMS raises.
        """
        record = self._backend.get(volume_id)
        if record.encryption is not EncryptionState.ENCRYPTED or record.luks is None:
            raise FailedPrecondition(f"volume {volume_id} was never formatted, so it has no header to restore")
        refuse_many_nodes(self._backend, volume_id)
        self._presences.refuse_others(volume_id)
        if self._presences.of(volume_id, record).is_open:
            raise DeviceInUse(f"volume {volume_id} is open; unstage it before its header is restored")
        if not copy.is_file():
            raise FailedPrecondition(
                f"there is no copy of the header of volume {volume_id} at {copy}; name another one"
            )
        self._homes.here(record)
        if not (force or record.key or secret.passphrase):
            raise FailedPrecondition(
                f"the copy {copy} of the header of volume {volume_id} is tried with the volume's passphrase before it "
                f"is written; {_ADVICE}, or --force"
            )
        first = self._backend.header_before(volume_id)
        before = next_before(first, len(kept_before(first)))
        with self._workers.session(), self._backend.storage(volume_id) as storage:
            if bound := self._loops.find(storage.name):
                raise DeviceInUse(f"{storage} is in use by {', '.join(each.path for each in bound)}; let go of that")
            write = partial(self._write_header, record, storage, copy, before)
            kept = write(None) if force else self._tried(record, secret, copy, write)
        log.info("header restored", volume_id=volume_id, copy=str(copy), before=str(before) if kept else None)
        return before if kept else None

    def _write_header(
        self, record: VolumeRecord, storage: Handle, copy: Path, before: Path, passphrase: Passphrase | None
    ) -> bool:
        return self._workers.call(
            f"luks-restore of volume {record.id}",
            self._limits.unlock_seconds,
            recovery.restore_header,
            f"volume {record.id}",
            storage,
            device_size(record),
            recorded_identity(record),
            self._header_limits,
            os.path.realpath(copy),
            passphrase,
            str(before),
        )

    def _tried(
        self, record: VolumeRecord, secret: SecretKey, copy: Path, write: Callable[[Passphrase | None], bool]
    ) -> bool:
        """What `write` returns, with what opens the volume."""
        purpose = "restore header"
        passphrase = self._keys.of(record, secret, purpose).passphrase
        try:
            with self._keys.using(record, purpose):
                return with_either(secret, passphrase, write)
        except Unauthenticated:
            what = f"the key {record.key.name} of volume {record.id}" if record.key else "the passphrase"
            raise Unauthenticated(
                f"{what} opens no key slot of the copy {copy} of the header of volume {record.id}; nothing was "
                f"written, name a copy that was made with that key, or write this one all the same (--force)"
            ) from None

    def open(self, device: Path, name: str, header: Path | None, secret: SecretKey, *, read_only: bool) -> str:
        """Open a volume's device, or the file that is below it, as the mapping `name`; returns the mapping's path.

        The key comes from `secret`, else from the KMS that our token in the header names. Nothing is written. Raises
        DeviceAbsent, DeviceMismatch (no device and no file), DeviceInUse (it is open or mounted), FailedPrecondition
        (half of a volume, or the header of another), Unauthenticated, KeyLost (what the KMS gave opens nothing),
        MappingMismatch (the name is taken), and what header and KMS raise.
        """
        where = str(device)
        with self._workers.session(), ExitStack() as stack:
            opened = stack.enter_context(self._device(device, read_only=read_only))
            copy = stack.enter_context(opened_file(header)) if header is not None else opened
            found = self._workers.call(
                f"luks-read of {copy}", self._limits.mount_seconds, recovery.look, str(copy), copy, self._header_limits
            )
            if header is not None:
                self._workers.call(
                    f"luks-read of {where}",
                    self._limits.mount_seconds,
                    recovery.refuse_another,
                    where,
                    opened,
                    str(copy),
                    found.identity,
                )
            passphrase, told = self._passphrase(where, found, secret)
            with told:
                self._workers.call(
                    f"luks-open of {where}",
                    self._limits.unlock_seconds,
                    recovery.open_with_header,
                    where,
                    opened,
                    copy,
                    found.identity,
                    self._header_limits,
                    passphrase,
                    Opening(name),
                    read_only=read_only,
                )
        log.info("volume opened for recovery", device=where, mapping=name, luks_uuid=found.identity.uuid)
        return f"/dev/mapper/{name}"

    def _passphrase(
        self, where: str, found: recovery.Found, secret: SecretKey
    ) -> tuple[Passphrase, AbstractContextManager[None]]:
        """What opens it, and what tells its use."""
        if found.trail is None or (secret.passphrase is not None and found.trail.type != "metadata"):
            if secret.passphrase is None:
                raise FailedPrecondition(f"the header of {where} names no KMS, so a passphrase opens it; {_ADVICE}")
            return secret.passphrase, self._sources.using(KeyRequest(where), "recover")
        key = self._sources.fetch(found.trail, KeyRequest(where, found.trail.tenant, secret), "recover")
        return key, told_of_a_kms(where, found.trail)

    @contextmanager
    def _device(self, path: Path, *, read_only: bool) -> Iterator[Handle]:
        real = os.path.realpath(path)
        handle: Handle
        try:
            mode = os.stat(real).st_mode
            if stat.S_ISREG(mode):
                refuse_used(path, self._loops)
                handle = self._loops.attach(real, autoclear=True, read_only=read_only)
            elif stat.S_ISBLK(mode):
                open_handle(real, os.O_RDONLY | os.O_EXCL).close()  # which a mapping or a mount of it forbids: open(2)
                handle = open_handle(real, os.O_RDONLY if read_only else os.O_RDWR)
            else:
                raise DeviceMismatch(f"{path} is a {blockdev.kind(mode)}; {_NAME_DEVICE}")
        except (FileNotFoundError, NotADirectoryError):
            raise DeviceAbsent(f"there is nothing at {path}; {_NAME_DEVICE}") from None
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise DeviceInUse(f"{path} is in use by a mapping or a mount; {_UNUSED}") from None
            raise FailedPrecondition(f"{path} cannot be opened ({error_name(error)}); {_NAME_DEVICE}") from None
        with handle:
            yield handle


def refuse_used(path: Path, loops: LoopDevices) -> None:
    """Raise FailedPrecondition for a file that is half of a volume, DeviceInUse for one that is attached."""
    real = Path(os.path.realpath(path))
    if other := half_beside(real):
        raise FailedPrecondition(
            f"{path} holds half of a volume that is being moved to another volume key, {other} the other half; let "
            f"luks-csi volume reencrypt run to its end, by the volume's record"
        )
    if bound := loops.find(str(real)):
        raise DeviceInUse(f"{path} is in use by {', '.join(each.path for each in bound)}; {_UNUSED}")


@contextmanager
def opened_file(path: Path) -> Iterator[Handle]:
    """A file with a LUKS2 header, held open for reading. Raises FailedPrecondition."""
    try:
        handle = open_handle(os.path.realpath(path), os.O_RDONLY)
    except OSError as error:
        raise FailedPrecondition(f"the file {path} cannot be read ({error.strerror}); name another one") from None
    with handle:
        yield handle
