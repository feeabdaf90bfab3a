"""NodeExpandVolume: file, loop device, mapping, file system, in this order."""

from contextlib import closing
from dataclasses import dataclass

from csi_driver.backends.base import AttachedDevice, Backend
from csi_driver.host import blockdev
from csi_driver.host.mounts import Mounts
from csi_driver.host.workers import Workers
from csi_driver.keys.secret import SecretKey
from csi_driver.model.errors import FailedPrecondition, NotFound, ResourceExhausted
from csi_driver.model.volume import VolumeRecord, is_volume_id
from csi_driver.volumes.capability import Capability
from csi_driver.volumes.encryption import Encryption
from csi_driver.volumes.filesystem import FileSystems
from csi_driver.volumes.provision import grow_device
from csi_driver.volumes.stages import Stage, Stages


@dataclass(frozen=True)
class ExpandRequest:
    """What NodeExpandVolume brings; sizes in bytes, 0 means not said. The secret is optional."""

    volume_id: str
    volume_path: str
    required_bytes: int
    limit_bytes: int
    key: SecretKey
    staging_path: str = ""
    capability: Capability | None = None


class Expansion:
    """Enlarges staged volumes while they are in use; callers hold the volume's lock."""

    def __init__(
        self,
        backend: Backend,
        stages: Stages,
        workers: Workers,
        encryption: Encryption,
        file_systems: FileSystems,
        mounts: Mounts,
    ) -> None:
        self._backend = backend
        self._stages = stages
        self._workers = workers
        self._encryption = encryption
        self._file_systems = file_systems
        self._mounts = mounts

    def expand(self, request: ExpandRequest) -> int:
        """Let pods see the volume's new size, to the byte; returns the capacity. Each step may be repeated.

        The device grows here too when the controller only passed the wish on. Raises NotFound, FailedPrecondition
        (no room; the device is gone; no key for the open mapping), OutOfRange.
        """
        if not is_volume_id(request.volume_id):
            raise NotFound(f"volume {request.volume_id!r} does not exist: it is no id of this driver")
        record = self._backend.get(request.volume_id)
        staged = self._stages.get(record.id)
        if staged is None or not self._is_shown(staged, request.volume_path):
            raise NotFound(f"volume {record.id} is not staged or published at {request.volume_path}; stage it first")
        device = self._backend.device_of(record.id)
        if device is None:
            raise FailedPrecondition(
                f"volume {record.id} is recorded as staged and its device is not attached; unstage and stage it"
            )
        with closing(device), self._workers.session():
            self._backend.refresh(device.path)  # the controller may have grown it before
            if record.encryption is not None:
                self._check_mapping(record, device, request)
            try:
                record = grow_device(self._backend, record, request.required_bytes, request.limit_bytes)
            except ResourceExhausted as error:
                # With any other code kubelet keeps the pod from starting until there is room, and there may never be.
                raise FailedPrecondition(f"{error}, then start the pod anew: it has the old size until then") from None
            self._backend.refresh(device.path)
            if record.encryption is not None:
                self._encryption.resize(record, device, request.key.passphrase)
        if not staged.block and staged.fs_type is not None and not staged.read_only:
            self._file_systems.grow(record.id, staged.fs_type, staged.device, staged.staging_path)
        return record.capacity_bytes

    def _check_mapping(self, record: VolumeRecord, device: AttachedDevice, request: ExpandRequest) -> None:
        """Refuse before anything grows: a mapping that is not the volume's, a secret that does not open it."""
        self._encryption.resume(record.mapping_name)
        if not self._encryption.fits(self._backend, record):
            raise FailedPrecondition(
                f"the mapping {record.mapping_name} of volume {record.id} is not the volume's own; unstage and stage "
                f"the volume"
            )
        if request.key.passphrase is not None:
            self._encryption.verify(record, device, request.key.passphrase)

    def _is_shown(self, staged: Stage, path: str) -> bool:
        if path in (staged.staging_path, staged.device):
            return True
        if staged.block:
            return blockdev.is_block_device(path) and blockdev.device_number(path) == blockdev.device_number(
                staged.device
            )
        staging, shown = self._mounts.at(staged.staging_path), self._mounts.at(path)
        return staging is not None and shown is not None and shown.device == staging.device
