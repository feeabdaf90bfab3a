"""NodeStageVolume and NodeUnstageVolume: from ciphertext on a backend to a file system at the staging path."""

import threading
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass

import structlog

from csi_driver.backends.base import AttachedDevice, Backend
from csi_driver.host.holders import Holders, describe
from csi_driver.host.mounts import Mount, Mounts
from csi_driver.host.workers import Workers
from csi_driver.keys.secret import SecretKey
from csi_driver.luks.mapping import Mappings
from csi_driver.model.errors import (
    AlreadyExists,
    CommandFailed,
    DeviceInUse,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from csi_driver.model.volume import VolumeRecord, mapping_name
from csi_driver.volumes import capability as capabilities
from csi_driver.volumes.capability import Capability
from csi_driver.volumes.context import check_context
from csi_driver.volumes.encryption import Encryption, attempt, raw_if_unseen
from csi_driver.volumes.filesystem import FileSystems
from csi_driver.volumes.stages import Stage, Stages

_log = structlog.get_logger(__name__)
_CLOSE_SECONDS = 2.0
_FULL_BYTES = 16 << 20  # so little, and a device on it fails


@dataclass(frozen=True)
class StageRequest:
    """What NodeStageVolume brings. `key` holds what the secret's entries said."""

    volume_id: str
    staging_path: str
    capability: Capability
    key: SecretKey
    context: Mapping[str, str]


class Staging:
    """Stages and unstages volumes on this node; callers hold the volume's lock."""

    def __init__(
        self,
        backend: Backend,
        stages: Stages,
        workers: Workers,
        encryption: Encryption,
        file_systems: FileSystems,
        mappings: Mappings,
        mounts: Mounts,
        holders: Holders,
    ) -> None:
        self._backend = backend
        self._stages = stages
        self._workers = workers
        self._encryption = encryption
        self._file_systems = file_systems
        self._mappings = mappings
        self._mounts = mounts
        self._holders = holders

    def stage(self, request: StageRequest) -> None:
        """Make the volume ready on this node, formatting it the first time; repeating a complete stage is cheap.

        After an error nothing of this call remains open, mounted or attached.
        """
        record = self._backend.get(request.volume_id)
        check_context(record, request.context)
        capabilities.check([request.capability])
        staged = self._stages.get(record.id)
        if staged is not None and self._is_complete(record, staged):
            self._check_same(record, staged, request)
            if record.encryption is not None:
                self._encryption.resume(record.mapping_name)
            self._backend.guard(record.id)
            return
        with self._workers.session():
            self._clear(record, request.staging_path, staged)
            try:
                self._stage(record, request)
            except CommandFailed as error:
                # A device on a full disk answers with I/O errors, and what works on it knows nothing of the disk.
                free = self._backend.space().free
                if free > _FULL_BYTES:
                    raise
                raise ResourceExhausted(
                    f"{error}; the storage below volume {record.id} is full ({free} bytes are free), free space there"
                ) from error

    def _stage(self, record: VolumeRecord, request: StageRequest) -> None:
        block = request.capability.block
        with ExitStack() as undo:
            undo.callback(self._stages.remove, record.id)
            undo.callback(attempt, self._backend.guard, record.id)  # an earlier stage's device may still be in use
            lasting = block and record.encryption is None
            device = self._backend.attach(record.id, lasting=lasting)
            if lasting:
                undo.callback(attempt, self._backend.detach, record.id)
            undo.callback(_let_go, device)
            with ExitStack() as opened:
                if record.encryption is not None:
                    record = self._encryption.open(self._backend, record, device, request.key, opened)
                shown = device.path if record.encryption is None else f"/dev/mapper/{record.mapping_name}"
                opened.callback(attempt, self._take_back, record, request.staging_path)
                self._finish(record, shown, request)
                self._backend.guard(record.id)
                opened.pop_all()
            undo.pop_all()
            device.close()

    def forget_earlier_boots(self) -> None:
        """Forget what was staged before this boot."""
        self._stages.forget_earlier_boots()

    def unstage(self, volume_id: str, staging_path: str) -> None:
        """Unmount, close the mapping, let go of the device; needs no key, no record, and nothing to be there.

        Raises DeviceInUse naming who keeps it busy.
        """
        staged = self._stages.get(volume_id)
        with self._workers.session():
            self._encryption.resume(mapping_name(volume_id))
            for path in _staging_paths(staging_path, staged):
                if (found := self._mounts.at(path)) is not None and self._is_ours(volume_id, found, staged):
                    self._unmount(volume_id, path, found)
        self._mappings.close(mapping_name(volume_id), self._known_uuid(volume_id, staged))
        self._backend.detach(volume_id)
        self._stages.remove(volume_id)

    def _finish(self, record: VolumeRecord, device: str, request: StageRequest) -> None:
        uuid = record.luks.uuid if record.luks else None
        if request.capability.block:
            shown = raw_if_unseen(record)
            if shown is not record:
                self._backend.update(shown)
            stage = Stage(staging_path=request.staging_path, block=True, device=device, luks_uuid=uuid)
            self._stages.put(record.id, stage)
            return
        record, fs_type = self._file_systems.ensure(self._backend, record, device, request.capability.fs_type)
        options = request.capability.options(fs_type)
        stage = Stage(
            staging_path=request.staging_path,
            block=False,
            device=device,
            fs_type=fs_type,
            mount_options=options.canonical,
            read_only=options.read_only,
            luks_uuid=uuid,
        )
        self._stages.put(record.id, stage)
        self._file_systems.mount(record, device, request.staging_path, fs_type, options.flags, options.data)
        if record.parameters.backing_image is not None and not options.read_only:
            # It came with the image, and the volume may have been larger from its first moment.
            self._file_systems.grow(record.id, fs_type, device, request.staging_path)

    def _take_back(self, record: VolumeRecord, staging_path: str) -> None:
        """Unmount after an error: a worker that was killed may have mounted before it could say so."""
        self._clear(record, staging_path, self._stages.get(record.id))

    def _is_complete(self, record: VolumeRecord, staged: Stage) -> bool:
        """Whether all that a stage makes is there and is this volume's."""
        if record.encryption is not None and not self._encryption.fits(self._backend, record):
            return False
        if not staged.block:
            mounted = self._mounts.at(staged.staging_path)
            return mounted is not None and self._shows(mounted, staged.device)
        if record.encryption is not None:
            return True
        device = self._backend.device_of(record.id)
        if device is None:
            return False
        with closing(device):
            return device.path == staged.device

    def _check_same(self, record: VolumeRecord, staged: Stage, request: StageRequest) -> None:
        wanted, block = request.capability, request.capability.block
        differences = []
        if staged.staging_path != request.staging_path:
            differences.append(f"at {staged.staging_path}, asked for at {request.staging_path}")
        if staged.block != block:
            kinds = ("a block device", "a mount")
            differences.append(f"as {kinds[not staged.block]}, asked for as {kinds[not block]}")
        elif not block and staged.fs_type is not None:
            if wanted.fs_type not in (None, staged.fs_type):
                differences.append(f"with {staged.fs_type}, asked for with {wanted.fs_type}")
            elif wanted.options(staged.fs_type).canonical != staged.mount_options:
                differences.append(
                    f"with mountOptions {list(staged.mount_options)}, asked for with {list(wanted.mount_flags)}"
                )
        if differences:
            raise AlreadyExists(
                f"volume {record.id} is staged already {' and '.join(differences)}; unstage it before staging it "
                f"another way"
            )

    def _clear(self, record: VolumeRecord, staging_path: str, staged: Stage | None) -> None:
        """Take away what an earlier, cut or outdated stage of this volume left mounted."""
        for path in _staging_paths(staging_path, staged):
            found = self._mounts.at(path)
            if found is None:
                continue
            if not self._is_ours(record.id, found, staged):
                raise FailedPrecondition(
                    f"volume {record.id} cannot be staged at {path}: {found.source} is mounted there; unmount it"
                )
            self._unmount(record.id, path, found)

    def _unmount(self, volume_id: str, path: str, mount: Mount) -> None:
        try:
            self._file_systems.unmount(volume_id, path)
        except DeviceInUse as busy:
            found = self._holders.of_mount(mount.device)
            if not found:
                raise
            raise DeviceInUse(
                f"volume {volume_id} cannot be unmounted from {path}: it is kept busy by {describe(found)}; end that "
                f"first"
            ) from busy

    def _is_ours(self, volume_id: str, mount: Mount, staged: Stage | None) -> bool:
        mapping = f"/dev/mapper/{mapping_name(volume_id)}"
        if mount.source == mapping or (staged is not None and mount.source == staged.device):
            return True
        device = self._backend.device_of(volume_id)
        if device is None:
            return False
        with closing(device):
            return mount.device == (device.major, device.minor)

    def _shows(self, mount: Mount, device: str) -> bool:
        mapping = self._mappings.get(device.removeprefix("/dev/mapper/")) if device.startswith("/dev/mapper/") else None
        # btrfs shows a device number of its own in mountinfo; its source is the name it was mounted from.
        if mapping is None or mount.fs_type == "btrfs":
            return mount.source == device
        return mount.device == (mapping.major, mapping.minor)

    def _known_uuid(self, volume_id: str, staged: Stage | None) -> str | None:
        if staged is not None and staged.luks_uuid:
            return staged.luks_uuid
        try:
            record = self._backend.get(volume_id)
        except (NotFound, FailedPrecondition):
            return None  # unstage works without a record
        return record.luks.uuid if record.luks else None


def _let_go(device: AttachedDevice) -> None:
    """Close a device after an error. The last close waits for I/O under way, which need not end: not our time limit."""
    closing_thread = threading.Thread(target=device.close, name="close", daemon=True)
    closing_thread.start()
    closing_thread.join(_CLOSE_SECONDS)
    if closing_thread.is_alive():
        _log.warning("a device does not answer and stays open until it does", device=device.path)


def _staging_paths(asked: str, staged: Stage | None) -> list[str]:
    """Where a file system of the volume may be mounted: where the caller says, and where we recorded it."""
    return list(dict.fromkeys((asked, *((staged.staging_path,) if staged and not staged.block else ()))))


def require_absolute(name: str, path: str) -> str:
    """A path of the request. Raises InvalidArgument when it is absent or relative."""
    if not path.startswith("/"):
        raise InvalidArgument(f"the request's {name} is {path!r}; it must be an absolute path")
    return path
