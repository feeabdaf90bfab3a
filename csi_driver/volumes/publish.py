"""NodePublishVolume and NodeUnpublishVolume: a bind mount of the staged file system or of the device node."""

import contextlib
import errno
import os
import stat
from collections.abc import Mapping
from contextlib import AbstractContextManager

from msgspec import Struct

from csi_driver.backends.base import Backend, takes_many_nodes
from csi_driver.host.handle import Handle
from csi_driver.host.holders import Holders, describe
from csi_driver.host.log import log
from csi_driver.host.mountinfo import Mount, MountTable
from csi_driver.host.mounts import Mounts
from csi_driver.model.errors import (
    AlreadyExists,
    DeviceInUse,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from csi_driver.volumes import capability as capabilities
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.context import check_context
from csi_driver.volumes.filesystem import FileSystems
from csi_driver.volumes.healing import Healing
from csi_driver.volumes.presence import Presence, Presences
from csi_driver.volumes.stages import Stage


class PublishRequest(Struct, frozen=True):
    """What NodePublishVolume brings."""

    volume_id: str
    staging_path: str
    target_path: str
    capability: Capability
    read_only: bool
    context: Mapping[str, str]


class Publishing:
    """Shows staged volumes to pods; callers hold the volume's lock."""

    def __init__(
        self,
        backend: Backend,
        presences: Presences,
        mounts: Mounts,
        holders: Holders,
        file_systems: FileSystems,
        healing: Healing,
    ) -> None:
        self._backend = backend
        self._many_nodes = takes_many_nodes(backend)
        self._presences = presences
        self._mounts = mounts
        self._holders = holders
        self._file_systems = file_systems
        self._healing = healing

    def publish(self, request: PublishRequest) -> None:
        """Bind the volume to the target path, read-only if asked for; repeating it is fine.

        A stage that lost its mount gets it again and a sick file system is healed first, see `Healing`.

        Raises NotFound, ResourceExhausted (no room for the target path), FailedPrecondition (not staged there, staged
        otherwise, sick for good, ReadWriteOncePod already published elsewhere), AlreadyExists (published at this path
        otherwise).
        """
        capabilities.check([request.capability], many_nodes=self._many_nodes)
        present = self._presences.of(request.volume_id)
        staged = self._require_staged(present, request)
        present = self._healing.restored(present)
        _require_complete(present, staged)
        read_only = request.read_only or request.capability.reader_only
        fresh = _make_target(request.target_path, block=staged.block)
        try:
            if not fresh and (there := present.table.at(request.target_path)) is not None:
                _check_present(request, there, present, read_only=read_only or staged.read_only)
                return
            if request.capability.mode is AccessMode.SINGLE_NODE_SINGLE_WRITER:
                _refuse_second(request, present)
            if not fresh:
                _check_target(request.target_path, block=staged.block)
            # A repetition above: who has it already loses nothing, and is not the next pod.
            present = self._healing.ensure_well(present)
            with self._source(present) as source:
                self._mounts.bind(source, request.target_path, read_only=read_only)
        except BaseException:
            if fresh:
                _remove_target(request.target_path)
            raise

    def unpublish(self, volume_id: str, target_path: str) -> None:
        """Unmount the target path and remove it; a path that is not there is fine.

        Raises DeviceInUse naming who keeps it busy, FailedPrecondition when it shows another volume, or something is in
        it: what is not ours to remove stays. On a file system that went read-only the empty path stays.
        """
        if self._presences.is_staging_path(volume_id, target_path):
            raise _refused_target(volume_id, target_path)
        while True:
            table = self._presences.table()
            if (mount := table.at(target_path)) is not None:
                self._unmount(volume_id, mount, table)
            try:
                return _remove_target(target_path)
            except OSError as error:
                # Nobody can remove what something is still mounted on (rmdir(2), unlink(2)).
                if error.errno == errno.EBUSY and self._mounts.at(target_path) is not None:
                    continue
                if error.errno == errno.EROFS:
                    return log.warning("a target path could not be removed", volume_id=volume_id, path=target_path)
                raise FailedPrecondition(
                    f"the target path {target_path} of volume {volume_id} cannot be removed ({error.strerror}); look "
                    f"at what is in it, it was left alone"
                ) from None

    def _unmount(self, volume_id: str, mount: Mount, table: MountTable) -> None:
        target_path = mount.mount_point
        if (other := self._presences.other_on(volume_id, mount)) is not None:
            raise FailedPrecondition(
                f"volume {volume_id} cannot be unpublished from {target_path}: the mapping {other} of another volume "
                f"is shown there; unpublish or unstage that one"
            )
        if table.is_last(mount):
            # The staging mount is gone. This ends the file system, which writes back, or does not if it is frozen.
            return self._file_systems.unmount(volume_id, mount)
        try:
            # Here it ends one of the places where it is seen: umount2(2) does no I/O then, so no device can hold it up.
            self._mounts.unmount(target_path)
        except DeviceInUse as busy:
            found = self._holders.of_place(mount)
            if mount.root == "/":  # not of a device's node: all of /dev is on that file system
                found = found or self._holders.of_mount(mount.device)
            if not found:
                raise
            raise DeviceInUse(
                f"volume {volume_id} cannot be unmounted from {target_path}: it is kept busy by {describe(found)}; end "
                f"that first"
            ) from busy

    def _source(self, present: Presence) -> AbstractContextManager[Handle]:
        """What is bound: the very mount or device that was looked at, held open."""
        staging = present.staging
        return self._presences.held(present) if staging is None else self._mounts.open(staging)

    def _require_staged(self, present: Presence, request: PublishRequest) -> Stage:
        staged = present.stage
        if staged is None:
            check_context(self._backend.get(request.volume_id), request.context)
            raise FailedPrecondition(f"volume {request.volume_id} is not staged on this node; stage it first")
        if staged.staging_path != request.staging_path:
            raise FailedPrecondition(
                f"volume {request.volume_id} is staged at {staged.staging_path} and not at {request.staging_path!r}; "
                f"publish it from there"
            )
        if request.target_path == request.staging_path:
            raise _refused_target(request.volume_id, request.target_path)
        if staged.block != request.capability.block:
            kinds = ("a block device", "a mount")
            raise FailedPrecondition(
                f"volume {request.volume_id} is staged as {kinds[not staged.block]} and was to be published as "
                f"{kinds[not request.capability.block]}; unstage it first"
            )
        return staged


def _require_complete(present: Presence, staged: Stage) -> None:
    if not present.is_complete:
        what = (
            f"volume {present.volume_id} is no longer mounted at {staged.staging_path}"
            if present.has_device and not staged.block
            else f"the device {staged.device} of volume {present.volume_id} is gone or not its own any more"
        )
        raise FailedPrecondition(f"{what}; unstage and stage the volume")


def _refused_target(volume_id: str, path: str) -> InvalidArgument:
    return InvalidArgument(
        f"the target path {path} is the staging path of volume {volume_id}; a pod's must be another one"
    )


def _check_present(request: PublishRequest, there: Mount, present: Presence, *, read_only: bool) -> None:
    if there not in (*present.mounts, *present.nodes):
        raise AlreadyExists(
            f"volume {request.volume_id} cannot be published at {request.target_path}: {there.source} is mounted "
            f"there; unmount it"
        )
    is_read_only = "ro" in there.options
    if is_read_only != read_only:
        modes = ("read-write", "read-only")
        raise AlreadyExists(
            f"volume {request.volume_id} is published at {request.target_path} {modes[is_read_only]}, asked for "
            f"{modes[read_only]}; unpublish it first"
        )


def _refuse_second(request: PublishRequest, present: Presence) -> None:
    if present.publications:
        raise FailedPrecondition(
            f"volume {request.volume_id} has the access mode ReadWriteOncePod and is published at "
            f"{present.publications[0].mount_point} already; end that pod first"
        )


def _make_target(path: str, *, block: bool) -> bool:
    """Make the target path; whether it was not there before, so that nothing can be mounted on it."""
    try:
        if block:
            os.makedirs(os.path.dirname(path), 0o750, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        else:
            try:
                os.mkdir(path, 0o750)
            except FileNotFoundError:
                os.makedirs(path, 0o750)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted(
                f"the target path {path} cannot be made ({error.strerror}); free space on the file system that it "
                f"is to be on"
            ) from None
        raise NotFound(f"the target path {path} cannot be made ({error.strerror})") from None
    return True


def _check_target(path: str, *, block: bool) -> None:
    """Refuse what is at the target path if the volume cannot be mounted on it; a link is never followed."""
    try:
        mode = os.lstat(path).st_mode
    except OSError as error:
        raise NotFound(f"the target path {path} cannot be made ({error.strerror})") from None
    if block and not stat.S_ISREG(mode):
        raise FailedPrecondition(f"the target path {path} exists and is no regular file; remove it")
    if not block and not stat.S_ISDIR(mode):
        raise FailedPrecondition(f"the target path {path} exists and is no folder; remove it")


def _remove_target(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(path)
        if stat.S_ISDIR(found.st_mode):
            os.rmdir(path)
        elif found.st_size:
            raise OSError(errno.ENOTEMPTY, "the file is not empty")
        else:
            os.unlink(path)
