"""NodeStageVolume and NodeUnstageVolume: from ciphertext on a backend to a file system at the staging path."""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import msgspec

from csi_driver.backends.base import Backend, movable, shared, takes_many_nodes
from csi_driver.host.fshealth import Mounting
from csi_driver.host.handle import Handle, let_go
from csi_driver.host.log import log
from csi_driver.host.mountinfo import Mount
from csi_driver.host.workers import Workers
from csi_driver.keys.secret import SecretKey
from csi_driver.luks.mapping import Mappings
from csi_driver.model.errors import (
    Aborted,
    AlreadyExists,
    CommandFailed,
    DeviceInUse,
    DeviceUnreadable,
    DriverError,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
)
from csi_driver.model.volume import FileSystemState, VolumeRecord, mapping_name
from csi_driver.volumes import capability as capabilities
from csi_driver.volumes.capability import Capability
from csi_driver.volumes.context import check_context
from csi_driver.volumes.drift import KeyDrift
from csi_driver.volumes.encryption import Encryption, Opened, attempt, raw_if_unseen
from csi_driver.volumes.filesystem import Attached, FileSystems
from csi_driver.volumes.healing import Healing
from csi_driver.volumes.keys import KeyInHand, VolumeKeys, previous_tried
from csi_driver.volumes.moved import Homes
from csi_driver.volumes.presence import Presence, Presences
from csi_driver.volumes.rekey import Rekeying
from csi_driver.volumes.stages import Stage, Stages
from csi_driver.volumes.two_keys import refuse_half

_FULL_BYTES = 16 << 20  # so little, and a device on it fails


class StageRequest(msgspec.Struct, frozen=True):
    """What NodeStageVolume brings. `key` holds what the secret's entries said."""

    volume_id: str
    staging_path: str
    capability: Capability
    key: SecretKey
    context: Mapping[str, str]


class Staging:
    """Stages and unstages volumes on this node; callers hold the volume's lock.

    `check_state` raises FailedPrecondition when the state directory is not the one that it was: nothing is staged then.
    """

    def __init__(
        self,
        backend: Backend,
        check_state: Callable[[], None],
        stages: Stages,
        presences: Presences,
        workers: Workers,
        encryption: Encryption,
        file_systems: FileSystems,
        mappings: Mappings,
        healing: Healing,
        drift: KeyDrift,
        keys: VolumeKeys,
        rekeying: Rekeying,
        homes: Homes,
    ) -> None:
        self._backend = backend
        self._many_nodes = takes_many_nodes(backend)
        self._check_state = check_state
        self._stages = stages
        self._presences = presences
        self._workers = workers
        self._encryption = encryption
        self._file_systems = file_systems
        self._mappings = mappings
        self._healing = healing
        self._drift = drift
        self._keys = keys
        self._rekeying = rekeying
        self._homes = homes

    def stage(self, request: StageRequest) -> None:
        """Make the volume ready on this node, formatting it the first time; repeating a complete stage is cheap.

        After an error nothing of this call remains open, mounted or attached.
        """
        self._check_state()
        record = self._backend.get(request.volume_id)
        check_context(record, request.context)
        record = self._homes.here(record)
        refuse_half(self._backend, record)
        capabilities.check([request.capability], many_nodes=self._many_nodes)
        present = self._presences.of(record.id, record)
        if present.stage is not None and present.is_complete:
            self._check_same(record, present.stage, request)
        if present.stage is not None and present.is_complete and not self._is_half_closed(record, present):
            if record.encryption is not None:
                self._encryption.resume(self._backend, record, present.mapping, present.stage)
            well = self._healing.ensure_well(present)
            self._backend.guard(record.id)
            if record.parameters.backing_image is not None and well.stage is not None and well.staging is not None:
                with self._presences.held(well) as device:  # the call that mounted it may have been cut before it
                    self._grow(record, well.stage, well.staging, device)
            if record.encryption is not None and record.key is None:
                self._drift.look(record, present.stage, request.key)
            return
        _refuse_link(record, request.staging_path)
        if record.encryption is None and request.key.passphrase is not None:
            log.warning("a secret was given for a volume that is not encrypted", volume_id=record.id)
        # Before anything is attached: a KMS that is down costs a call, and no device.
        key = self._keys.of(record, request.key, "stage") if record.encryption is not None else None
        with self._workers.session():
            record = self._encryption.ended(self._backend, record)
            self._clear(record, present, request.staging_path)
            try:
                self._stage(record, request, key)
            except (CommandFailed, DeviceUnreadable) as error:
                # A device on a full disk answers with I/O errors, and what works on it knows nothing of the disk.
                free = self._free(record)
                if free is None or free > _FULL_BYTES:
                    raise
                raise ResourceExhausted(
                    f"{error}; the storage below volume {record.id} is full ({free} bytes are free), free space there"
                ) from error

    def _is_half_closed(self, record: VolumeRecord, present: Presence) -> bool:
        """Whether an unstage of a block volume was cut between key and mapping: opened anew it can grow again."""
        mapping = present.mapping
        if mapping is None or mapping.open_count or present.mounts or present.nodes or record.luks is None:
            return False
        return record.conversion is None and not self._mappings.keeps_key(record.luks.uuid)

    def _free(self, record: VolumeRecord) -> int | None:
        """What is free below the volume; None where nobody says, as where the storage itself is what failed."""
        try:
            return self._backend.space(record.parameters).free
        except DriverError:
            return None

    def _stage(self, record: VolumeRecord, request: StageRequest, key: KeyInHand | None) -> None:
        block = request.capability.block
        with ExitStack() as undo:
            undo.callback(self._stages.remove, record.id)
            undo.callback(attempt, self._backend.guard, record.id)  # an earlier stage's device may still be in use
            lasting = block and record.encryption is None
            device = self._backend.attach(record.id, lasting=lasting)
            if lasting or shared(self._backend) is not None:
                undo.callback(attempt, self._backend.detach, record.id)
            undo.callback(let_go, device)
            self._refuse_outdated(record)
            with ExitStack() as opened:
                volume = Attached(record, device, device)
                if key is not None:
                    self._presences.refuse_others(record.id, device)
                    unlocked = self._open(record, device, request.key, key, opened)
                    # Once more: who opened it since has not seen this mapping.
                    self._presences.refuse_others(record.id, device)
                    volume = Attached(unlocked.record, device, unlocked.mapping, unlocked.kept_key, unlocked.kept_next)
                opened.callback(attempt, self._take_back, volume.record, request.staging_path)
                self._finish(volume, request)
                self._backend.guard(record.id)
                opened.pop_all()
            undo.pop_all()
            if record.key is None:
                self._drift.opened(record.id, request.key)
            volume.shown.close()
            device.close()

    def _refuse_outdated(self, record: VolumeRecord) -> None:
        """Raise Aborted where another node has formatted it between the look at its record and the attach, which lets
        several nodes have what is settled, and only that.
        """
        if not record.is_settled and self._backend.get(record.id).revision != record.revision:
            raise Aborted(
                f"volume {record.id} was changed, formatted by another node perhaps, while this one began with it; "
                f"this is tried again"
            )

    def _open(self, record: VolumeRecord, device: Handle, secret: SecretKey, key: KeyInHand, undo: ExitStack) -> Opened:
        """Open it, and let a change of its key that was cut, or that the secret asks for, be done."""
        if record.rekey is not None:
            record = self._rekeying.renew(record, device, secret)
            key = self._keys.of(record, secret, "stage") if record.key != key.trail else key
        try:
            with self._keys.using(record, "stage"):
                return self._encryption.open(self._backend, record, device, key, undo)
        except Unauthenticated:
            if secret.previous is None or record.key is not None:
                raise
        renewed = self._rekeying.renew(self._backend.get(record.id), device, secret)
        with previous_tried(), self._keys.using(renewed, "stage"):
            try:
                return self._encryption.open(self._backend, renewed, device, key, undo)
            except Unauthenticated:  # as what hinders the change, which was told, has not ended: a conversion, say
                key = msgspec.structs.replace(key, passphrase=secret.previous)
                return self._encryption.open(self._backend, renewed, device, key, undo)

    def unstage(self, volume_id: str, staging_path: str) -> None:
        """Unmount, close the mapping, let go of the device; needs no key, no record, and nothing to be there.

        A path at which the volume is not staged is fine, and nothing is done (CSI, NodeUnstageVolume). Raises
        DeviceInUse where it is still published, before anything is unmounted, or naming who keeps it busy.
        """
        present = self._presences.of(volume_id)
        if present.is_staged_at(staging_path):
            self._put_down(present, staging_path)

    def release(self, volume_id: str) -> None:
        """Unstage a volume that is about to be deleted, if it was left staged and nobody uses it.

        Kubelet may have died between unpublish and unstage (kubernetes#85476). Raises DeviceInUse, naming who does.
        """
        self._presences.refuse_others(volume_id)
        present = self._presences.of(volume_id)
        if present.is_open or present.stage is not None:  # an unstage may have been cut when its mapping was closed
            self._put_down(present, "")
        else:
            self._stages.remove(volume_id)  # of an earlier boot, or of a state directory that was read-only

    def _put_down(self, present: Presence, staging_path: str) -> None:
        volume_id = present.volume_id
        path = present.stage.staging_path if present.stage else staging_path
        staging = present.mount_at(path)
        others = [one for one in present.publications if not present.is_copy(one, staging)]
        if others:
            places = " and ".join(dict.fromkeys(one.mount_point for one in others))
            known = present.stage or staging  # else the staging path may be one of them: its record was lost
            how, cure = ("published", "unpublish it") if known else ("mounted", "unmount it there")
            raise DeviceInUse(f"volume {volume_id} is still {how} at {places}; {cure} first")
        with self._workers.session():
            self._resume(present)
            self._unmount_all(present, path)
        self._mappings.close(mapping_name(volume_id), self._known_uuid(present))
        self._backend.detach(volume_id)
        self._stages.remove(volume_id)
        self._drift.forget(volume_id)

    def _resume(self, present: Presence) -> None:
        """Let I/O flow again; the record tells how, where it is there."""
        if present.mapping is None or not present.mapping.suspended:
            return
        try:
            record = self._backend.get(present.volume_id)
        except (NotFound, FailedPrecondition):
            if (beside := movable(self._backend)) is not None and beside.has_next(present.volume_id):
                raise
            record = None
        self._encryption.resume(self._backend, record, present.mapping, present.stage)

    def _finish(self, volume: Attached, request: StageRequest) -> None:
        record, device = volume.record, volume.shown
        uuid = record.luks.uuid if record.luks else None
        if request.capability.block:
            shown = raw_if_unseen(record)
            if shown is not record:
                self._backend.update(shown)
            stage = Stage(
                staging_path=request.staging_path,
                block=True,
                device=device.name,
                luks_uuid=uuid,
                kept_key=volume.kept_key,
                kept_next=volume.kept_next,
            )
            self._stages.put(record.id, stage)
            return
        record, fs_type = self._file_systems.ensure(self._backend, volume, request.capability.fs_type)
        options = request.capability.options(fs_type)
        stage = Stage(
            staging_path=request.staging_path,
            block=False,
            device=device.name,
            fs_type=fs_type,
            mount_options=options.canonical,
            read_only=options.read_only,
            luks_uuid=uuid,
            kept_key=volume.kept_key,
            kept_next=volume.kept_next,
        )
        self._stages.put(record.id, stage)
        how = self._healing.mount(record, device, request.staging_path, fs_type, options)
        if how is not Mounting.FULL and volume.record.file_system in (FileSystemState.MADE, FileSystemState.RAW):
            mount = self._presences.mount_on(device.number, fs_type, request.staging_path)
            if mount is not None:
                self._grow(record, stage, mount, device)

    def _grow(self, record: VolumeRecord, stage: Stage, mount: Mount, device: Handle) -> None:
        """Let a file system that was there before fill a device that has grown meanwhile, or was larger than its image.

        One that cannot grow keeps nobody from the data in it; a volume made of an image is refused at its first use.
        """
        if stage.fs_type is None or stage.read_only:
            return
        try:
            self._file_systems.grow(record.id, stage.fs_type, mount, device)
        except DriverError as error:
            if record.parameters.backing_image is not None:
                raise
            log.warning("a file system could not be grown when it was staged", volume_id=record.id, error=str(error))

    def _take_back(self, record: VolumeRecord, staging_path: str) -> None:
        """Unmount after an error: a worker that was killed may have mounted before it could say so."""
        self._clear(record, self._presences.of(record.id, record), staging_path)

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

    def _clear(self, record: VolumeRecord, present: Presence, staging_path: str) -> None:
        """Take away what an earlier, cut or outdated stage of this volume left mounted."""
        for path in dict.fromkeys((staging_path, *((present.stage.staging_path,) if present.stage else ()))):
            self._unmount_all(present, path)
        found = self._presences.table().at(staging_path)
        if found is not None:
            raise FailedPrecondition(
                f"volume {record.id} cannot be staged at {staging_path}: {found.source} is mounted there; unmount it"
            )

    def _unmount_all(self, present: Presence, path: str) -> None:
        """End every mount of the volume at its staging path: they may lie one on the other."""
        staging = present.mount_at(path)
        if staging is not None:
            for mount in reversed(present.mounts):
                if mount.mount_point == staging.mount_point:
                    self._file_systems.unmount(present.volume_id, mount)

    def _known_uuid(self, present: Presence) -> str | None:
        if present.stage is not None:
            return present.stage.luks_uuid
        try:
            record = self._backend.get(present.volume_id)
        except DriverError:
            return None  # unstage works without a record, and without the storage or API that has it
        return record.luks.uuid if record.luks else None


def _refuse_link(record: VolumeRecord, staging_path: str) -> None:
    """The kernel would mount where a link leads, and nothing would be found at the path that is unstaged later."""
    if os.path.islink(staging_path):
        raise FailedPrecondition(
            f"volume {record.id} cannot be staged at {staging_path}: it is a symbolic link and must be a folder; "
            f"remove the link"
        )
