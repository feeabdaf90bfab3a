"""NodeExpandVolume: file, loop device, mapping, file system, in this order."""

from collections.abc import Callable
from functools import partial

from msgspec import Struct

from csi_driver.backends.base import Backend
from csi_driver.host.handle import Handle
from csi_driver.host.workers import Workers
from csi_driver.keys.secret import SecretKey
from csi_driver.model.errors import FailedPrecondition, NotFound, ResourceExhausted, Unauthenticated
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import VolumeRecord, is_volume_id
from csi_driver.volumes.capability import Capability
from csi_driver.volumes.encryption import Encryption
from csi_driver.volumes.filesystem import FileSystems
from csi_driver.volumes.healing import Healing
from csi_driver.volumes.keys import VolumeKeys, previous_tried
from csi_driver.volumes.keyslots import KeySlots
from csi_driver.volumes.presence import Presence, Presences
from csi_driver.volumes.sizing import grow_device


class ExpandRequest(Struct, frozen=True):
    """What NodeExpandVolume brings; sizes in bytes, 0 means not said. The secret is optional."""

    volume_id: str
    volume_path: str
    required_bytes: int
    limit_bytes: int
    key: SecretKey
    staging_path: str = ""
    capability: Capability | None = None


class Expansion:
    """Enlarges staged volumes while they are in use; callers hold the volume's lock. `check_state` as in `Staging`."""

    def __init__(
        self,
        backend: Backend,
        check_state: Callable[[], None],
        presences: Presences,
        workers: Workers,
        encryption: Encryption,
        slots: KeySlots,
        file_systems: FileSystems,
        healing: Healing,
        keys: VolumeKeys,
    ) -> None:
        self._backend = backend
        self._check_state = check_state
        self._presences = presences
        self._workers = workers
        self._encryption = encryption
        self._slots = slots
        self._file_systems = file_systems
        self._healing = healing
        self._keys = keys

    def expand(self, request: ExpandRequest) -> int:
        """Let pods see the volume's new size, to the byte; returns the capacity. Each step may be repeated.

        The device grows here too when the controller only passed the wish on. Raises NotFound, FailedPrecondition
        (no room; not staged here any more; no key for the open mapping; a sick file system), OutOfRange.
        """
        if not is_volume_id(request.volume_id):
            raise NotFound(f"volume {request.volume_id!r} does not exist: it is no id of this driver")
        self._check_state()
        record = self._backend.get(request.volume_id)
        present = self._presences.of(record.id, record)
        if present.stage is None or not _is_shown(present, request.volume_path):
            raise NotFound(f"volume {record.id} is not staged or published at {request.volume_path}; stage it first")
        if not present.is_complete:
            raise FailedPrecondition(
                f"volume {record.id} is recorded as staged at {present.stage.staging_path} and its device, mapping or "
                f"mount is gone or not its own; unstage and stage it first"
            )
        self._healing.refuse_sick(present)
        device = self._backend.device_of(record.id)
        if device is None:
            raise FailedPrecondition(
                f"volume {record.id} is recorded as staged and its device is not attached; unstage and stage it"
            )
        opened = None
        with device, self._workers.session():
            self._backend.refresh(device)  # the controller may have grown it before
            if record.encryption is not None:
                self._encryption.resume(self._backend, record, present.mapping, present.stage)
                if record.key is None and request.key.passphrase is not None:  # before anything grows
                    opened = self._verify(record, device, request.key, request.key.passphrase)
            try:
                record = grow_device(self._backend, record, request.required_bytes, request.limit_bytes)
            except ResourceExhausted as error:
                # With any other code kubelet keeps the pod from starting until there is room, and there may never be.
                raise FailedPrecondition(f"{error}, then start the pod anew: it has the old size until then") from None
            self._backend.refresh(device)
            if record.encryption is not None and record.conversion is None:  # which shows all there is
                self._encryption.resize(
                    record, device, partial(self._passphrase, record, request.key, opened), present.stage.kept_key
                )
            self._grow_file_system(record, present)
        return record.capacity_bytes

    def _verify(self, record: VolumeRecord, device: Handle, secret: SecretKey, passphrase: Passphrase) -> Passphrase:
        """What opens the volume: the secret's passphrase, or the one that it had before, until the next stage."""
        try:
            with self._keys.using(record, "expand"):
                self._slots.verify(record, device, passphrase)
        except Unauthenticated:
            if secret.previous is None:
                raise
            with previous_tried(), self._keys.using(record, "expand"):
                self._slots.verify(record, device, secret.previous)
            return secret.previous
        return passphrase

    def _passphrase(self, record: VolumeRecord, secret: SecretKey, opened: Passphrase | None) -> Passphrase | None:
        """What opens the header, where the kernel has lost the key of the mapping; `opened` was seen to."""
        if record.key is None and opened is None:
            return None
        found = self._keys.of(record, secret, "expand").passphrase
        return opened or found

    def _grow_file_system(self, record: VolumeRecord, present: Presence) -> None:
        stage, mount = present.stage, present.staging
        if stage is None or mount is None or stage.fs_type is None or stage.read_only:
            return
        with self._presences.held(present) as shown:
            self._file_systems.grow(record.id, stage.fs_type, mount, shown)


def _is_shown(present: Presence, path: str) -> bool:
    staged_at = present.stage.staging_path if present.stage else None
    return path == staged_at or present.shows_node(path) or present.mount_at(path) is not None
