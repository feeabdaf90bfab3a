"""Recovery without Kubernetes: a volume's header put back from its copy, and any volume opened by header and key."""

import errno
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Final

from csi_driver.backends.base import Backend
from csi_driver.backends.loopfile import half_beside
from csi_driver.host.handle import Handle, open_handle
from csi_driver.host.log import log
from csi_driver.host.loop import LoopDevices
from csi_driver.host.workers import Workers
from csi_driver.keys.base import KeyRequest
from csi_driver.keys.secret import SecretKey
from csi_driver.keys.sources import KeySources
from csi_driver.luks import recovery
from csi_driver.luks.device import Opening
from csi_driver.luks.header_rules import Limits as HeaderLimits
from csi_driver.model.errors import DeviceAbsent, DeviceInUse, FailedPrecondition
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Limits
from csi_driver.model.volume import EncryptionState
from csi_driver.volumes.keyslots import device_size
from csi_driver.volumes.moved import Homes
from csi_driver.volumes.presence import Presences

_ADVICE: Final = "give its passphrase with --passphrase-file or --secret-dir"


class Recovery:
    """Works on what is left of volumes; callers hold the lock of a volume that is named."""

    def __init__(
        self,
        backend: Backend,
        presences: Presences,
        workers: Workers,
        loops: LoopDevices,
        sources: KeySources,
        homes: Homes,
        limits: Limits,
    ) -> None:
        self._backend = backend
        self._presences = presences
        self._workers = workers
        self._loops = loops
        self._sources = sources
        self._homes = homes
        self._limits = limits
        self._header_limits = HeaderLimits(memory_kib=limits.pbkdf_memory_kib)

    def restore_header(self, volume_id: str, copy: Path) -> None:
        """Write that copy of a volume's header back to it.

        Raises DeviceInUse while it is open, FailedPrecondition for a volume that was never formatted, and where the
        copy is not of this very volume: ForeignSignature, InvalidHeader, DeviceBlank; DeviceShort.
        """
        record = self._backend.get(volume_id)
        if record.encryption is not EncryptionState.ENCRYPTED or record.luks is None:
            raise FailedPrecondition(f"volume {volume_id} was never formatted, so it has no header to restore")
        if self._presences.of(volume_id, record).is_open:
            raise DeviceInUse(f"volume {volume_id} is open; unstage it before its header is restored")
        if not copy.is_file():
            raise FailedPrecondition(
                f"there is no copy of the header of volume {volume_id} at {copy}; name another one"
            )
        self._homes.here(record)
        with self._workers.session(), self._backend.storage(volume_id) as storage:
            self._workers.call(
                f"luks-restore of volume {volume_id}",
                self._limits.mount_seconds,
                recovery.restore_header,
                f"volume {volume_id}",
                storage,
                device_size(record),
                record.luks,
                self._header_limits,
                str(copy),
            )
        log.info("header restored", volume_id=volume_id, copy=str(copy))

    def open(self, device: Path, name: str, header: Path | None, secret: SecretKey, *, read_only: bool) -> str:
        """Open a volume's device, or the file that is below it, as the mapping `name`; returns the mapping's path.

        The key comes from `secret`, else from the KMS that our token in the header names. Nothing is written. Raises
        DeviceAbsent, DeviceInUse (it is open or mounted), Unauthenticated, MappingMismatch (the name is taken), and
        what header and KMS raise.
        """
        where = str(device)
        with self._workers.session(), ExitStack() as stack:
            opened = stack.enter_context(self._device(device, read_only=read_only))
            copy = stack.enter_context(opened_file(header)) if header is not None else opened
            found = self._workers.call(
                f"luks-read of {copy}", self._limits.mount_seconds, recovery.look, str(copy), copy, self._header_limits
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
        return key, nullcontext()

    @contextmanager
    def _device(self, path: Path, *, read_only: bool) -> Iterator[Handle]:
        if not path.exists():
            raise DeviceAbsent(f"there is nothing at {path}; name the volume's device, or the file below it")
        if path.is_file():
            if other := half_beside(path):
                raise FailedPrecondition(
                    f"{path} holds half of a volume that is being moved to another volume key, {other} the other half; "
                    f"let luks-csi volume reencrypt run to its end, by the volume's record"
                )
            if bound := self._loops.find(str(path)):
                raise DeviceInUse(
                    f"{path} is in use by {', '.join(each.path for each in bound)}; unstage its volume first (luks-csi "
                    f"volume unstage), or open a copy"
                )
            with self._loops.attach(str(path), autoclear=True, read_only=read_only) as loop:
                yield loop
            return
        real = os.path.realpath(path)
        try:
            open_handle(real, os.O_RDONLY | os.O_EXCL).close()  # which a mapping or a mount of it forbids: open(2)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise DeviceInUse(
                f"{path} is in use by a mapping or a mount; unstage its volume first (luks-csi volume unstage), or "
                f"open a copy"
            ) from None
        with open_handle(real, os.O_RDONLY if read_only else os.O_RDWR) as handle:
            yield handle


@contextmanager
def opened_file(path: Path) -> Iterator[Handle]:
    """A file with a LUKS2 header, held open for reading. Raises FailedPrecondition."""
    try:
        handle = open_handle(os.path.realpath(path), os.O_RDONLY)
    except OSError as error:
        raise FailedPrecondition(f"the file {path} cannot be read ({error.strerror}); name another one") from None
    with handle:
        yield handle
