"""Sick file systems get well between two pods: thawed, checked, mounted anew; else the next pod is refused and told.

A file system that was aborted, shut down, frozen, or has noted an error stays so for as long as it is mounted, and
kubelet does not unstage a volume whose next pod is there already (nbs#2936, velero#2113, democratic-csi#392).
"""

import threading
from contextlib import AbstractContextManager

from csi_driver.backends.base import Backend
from csi_driver.host.fshealth import Ailment, FileSystemHealth, Mounting
from csi_driver.host.handle import Handle
from csi_driver.host.log import log
from csi_driver.host.mountoptions import MountOptions, parse_options
from csi_driver.host.workers import Workers
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.volume import VolumeRecord
from csi_driver.volumes.filesystem import FileSystems, repair_command
from csi_driver.volumes.presence import Presence, Presences


class Healing:
    """Looks after the file systems of volumes that are staged to be written; callers hold the volume's lock."""

    def __init__(
        self,
        backend: Backend,
        presences: Presences,
        workers: Workers,
        file_systems: FileSystems,
        health: FileSystemHealth,
    ) -> None:
        self._backend = backend
        self._presences = presences
        self._workers = workers
        self._file_systems = file_systems
        self._health = health
        self._guard = threading.Lock()
        self._healed = 0

    def healed(self) -> int:
        """How often this process made a file system well."""
        return self._healed

    def ensure_well(self, present: Presence) -> Presence:
        """What is there of a complete stage, once its file system is well; cheap when it is.

        With nobody else on it, it is thawed, or unmounted, checked and mounted anew. Raises FailedPrecondition with
        the cure where others use it or that does not help, DeviceInUse naming processes on it, and what `mount` does.
        """
        staging = present.staging
        if staging is None or present.stage is None or present.stage.read_only:
            return present
        if not present.publications and self._health.thaw(staging):
            self._tell(present.volume_id, staging.fs_type, "was frozen")
        ailment = self._health.ailment(staging)
        if ailment is None:
            return present
        if present.publications:
            raise _refusal(present, ailment, f" and is in use at {present.publications[0].mount_point}")
        self._mount_anew(present)
        present = self._presences.of(present.volume_id)
        left = self._health.ailment(present.staging) if present.staging else ailment
        if left is not None:
            raise _refusal(present, left, " and does so still, mounted anew")
        self._tell(present.volume_id, staging.fs_type, ailment)
        return present

    def restored(self, present: Presence) -> Presence:
        """What is there of a stage that lacks only its mount, once that is made again; others stay as they are.

        A call that mounted it anew was killed, or somebody unmounted it; and kubelet stages no volume again that it has
        staged, however often a publication is refused. Raises what `mount` does.
        """
        stage = present.stage
        if stage is None or not present.lacks_only_mount:
            return present
        record = self._backend.get(present.volume_id)
        fs_type = stage.fs_type or record.made_fs_type
        if fs_type is None:
            return present
        options = parse_options(stage.mount_options, fs_type)
        with self._device(present) as device, self._workers.session():
            self.mount(record, device, stage.staging_path, fs_type, options)
            self._backend.guard(record.id)
        log.warning("a staged volume was not mounted any more", volume_id=record.id, path=stage.staging_path)
        return self._presences.of(record.id)

    def refuse_sick(self, present: Presence) -> None:
        """Nothing grows on a sick file system. Raises FailedPrecondition with the cure, so that kubelet goes on."""
        staging = present.staging
        if staging is None or present.stage is None or present.stage.read_only:
            return
        ailment = self._health.ailment(staging)
        if ailment is not None:
            raise _refusal(present, ailment, " and cannot be enlarged")

    def mount(self, record: VolumeRecord, device: Handle, path: str, fs_type: str, options: MountOptions) -> Mounting:
        """Mount a file system for the first time on this node; an ext4 with its error flag is checked before.

        Raises FailedPrecondition with the cure where it cannot be mended, and what `FileSystems.mount` does.
        """
        how = self._file_systems.mount(record, device, path, fs_type, options, even_flagged=options.read_only)
        if how is Mounting.LEFT_ALONE:
            self._file_systems.refuse_used(record.id, device)
            self._file_systems.mend_ext4(record, device)
            how = self._file_systems.mount(record, device, path, fs_type, options)
            self._tell(record.id, fs_type, Ailment.ERROR_FLAG)
        return how

    def _mount_anew(self, present: Presence) -> None:
        stage, staging = present.stage, present.staging
        if stage is None or staging is None:
            return
        record = self._backend.get(present.volume_id)
        fs_type = stage.fs_type or staging.fs_type
        options = parse_options(stage.mount_options, fs_type)
        with self._presences.held(present) as device, self._workers.session():
            for mount in reversed(present.mounts):  # they may lie one on the other
                self._file_systems.unmount(record.id, mount)
            # What is not mended stays unmounted: the next publish finds it so, and says the same again.
            self._file_systems.refuse_used(record.id, device)
            if fs_type == "ext4":
                self._file_systems.mend_ext4(record, device)
            self._file_systems.mount(record, device, stage.staging_path, fs_type, options)

    def _device(self, present: Presence) -> AbstractContextManager[Handle]:
        """What is mounted, held open."""
        return (
            self._presences.held(present) if present.is_open else self._backend.attach(present.volume_id, lasting=False)
        )

    def _tell(self, volume_id: str, fs_type: str, reason: str) -> None:
        with self._guard:
            self._healed += 1
        log.warning("a sick file system was healed", volume_id=volume_id, fs_type=fs_type, reason=str(reason))


def _refusal(present: Presence, ailment: Ailment, rest: str) -> FailedPrecondition:
    fs_type = present.staging.fs_type if present.staging else "unmounted"
    return FailedPrecondition(
        f"the {fs_type} file system of volume {present.volume_id} {ailment}{rest}; end the volume's pods and start "
        f"them anew, and if that does not help run {repair_command(present.volume_id)} meanwhile"
    )
