"""NodePublishVolume and NodeUnpublishVolume: a bind mount of the staged file system or of the device node."""

import contextlib
import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass

from csi_driver.backends.base import Backend
from csi_driver.host import blockdev
from csi_driver.host.mounts import Mount, Mounts
from csi_driver.model.errors import AlreadyExists, FailedPrecondition, NotFound
from csi_driver.volumes import capability as capabilities
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.context import check_context
from csi_driver.volumes.stages import Stage, Stages


@dataclass(frozen=True)
class PublishRequest:
    """What NodePublishVolume brings."""

    volume_id: str
    staging_path: str
    target_path: str
    capability: Capability
    read_only: bool
    context: Mapping[str, str]


class Publishing:
    """Shows staged volumes to pods; callers hold the volume's lock."""

    def __init__(self, backend: Backend, stages: Stages, mounts: Mounts) -> None:
        self._backend = backend
        self._stages = stages
        self._mounts = mounts

    def publish(self, request: PublishRequest) -> None:
        """Bind the volume to the target path, read-only if asked for; repeating it is fine.

        Raises NotFound, FailedPrecondition (not staged there, staged otherwise, ReadWriteOncePod already published
        elsewhere), AlreadyExists (published at this path otherwise).
        """
        capabilities.check([request.capability])
        staged = self._require_staged(request)
        read_only = request.read_only or request.capability.reader_only
        source = staged.device if staged.block else staged.staging_path
        fresh = _make_target(request.target_path, block=staged.block)
        try:
            if not fresh and (present := self._mounts.at(request.target_path)) is not None:
                self._check_present(request, present, staged, read_only=read_only)
                return
            if request.capability.mode is AccessMode.SINGLE_NODE_SINGLE_WRITER:
                self._refuse_second(request, staged)
            if not fresh:
                _check_target(request.target_path, block=staged.block)
            self._mounts.bind(source, request.target_path, read_only=read_only)
        except BaseException:
            if fresh:
                _remove_target(request.target_path)
            raise

    def unpublish(self, volume_id: str, target_path: str) -> None:
        """Unmount the target path and remove it; a path that is not there is fine.

        Raises FailedPrecondition when something is in it: what is not ours to remove stays.
        """
        while True:
            self._mounts.unmount(target_path)
            try:
                return _remove_target(target_path)
            except OSError as error:
                # Nobody can remove what something is still mounted on (rmdir(2), unlink(2)).
                if error.errno == errno.EBUSY and self._mounts.at(target_path) is not None:
                    continue
                raise FailedPrecondition(
                    f"the target path {target_path} of volume {volume_id} cannot be removed ({error.strerror}); look "
                    f"at what is in it, it was left alone"
                ) from None

    def targets(self, staged: Stage) -> list[str]:
        """The paths at which the volume is mounted besides its staging path."""
        return [mount.mount_point for mount in self._published(staged)]

    def _published(self, staged: Stage) -> list[Mount]:
        if staged.block:
            with contextlib.suppress(FileNotFoundError):
                wanted = os.stat(staged.device).st_rdev
                return [mount for mount in self._mounts.table() if _is_node(mount, wanted)]
            return []
        stage = self._mounts.at(staged.staging_path)
        if stage is None:
            return []
        return [
            mount
            for mount in self._mounts.table()
            if mount.device == stage.device and mount.mount_point != stage.mount_point
        ]

    def _require_staged(self, request: PublishRequest) -> Stage:
        staged = self._stages.get(request.volume_id)
        if staged is None:
            check_context(self._backend.get(request.volume_id), request.context)
            raise FailedPrecondition(f"volume {request.volume_id} is not staged on this node; stage it first")
        if staged.staging_path != request.staging_path:
            raise FailedPrecondition(
                f"volume {request.volume_id} is staged at {staged.staging_path} and not at {request.staging_path!r}; "
                f"publish it from there"
            )
        if staged.block != request.capability.block:
            kinds = ("a block device", "a mount")
            raise FailedPrecondition(
                f"volume {request.volume_id} is staged as {kinds[not staged.block]} and was to be published as "
                f"{kinds[not request.capability.block]}; unstage it first"
            )
        if staged.block and not blockdev.is_block_device(staged.device):
            raise FailedPrecondition(
                f"the device {staged.device} of volume {request.volume_id} is gone; unstage and stage the volume"
            )
        if not staged.block and self._mounts.at(staged.staging_path) is None:
            raise FailedPrecondition(
                f"volume {request.volume_id} is no longer mounted at {staged.staging_path}; unstage and stage it"
            )
        return staged

    def _check_present(self, request: PublishRequest, present: Mount, staged: Stage, *, read_only: bool) -> None:
        if staged.block:
            same = _is_node(present, os.stat(staged.device).st_rdev)
        else:
            stage = self._mounts.at(staged.staging_path)
            same = stage is not None and stage.device == present.device
        if not same:
            raise AlreadyExists(
                f"volume {request.volume_id} cannot be published at {request.target_path}: {present.source} is mounted "
                f"there; unmount it"
            )
        is_read_only = "ro" in present.options
        if is_read_only != (read_only or staged.read_only):
            modes = ("read-write", "read-only")
            raise AlreadyExists(
                f"volume {request.volume_id} is published at {request.target_path} {modes[is_read_only]}, asked for "
                f"{modes[read_only]}; unpublish it first"
            )

    def _refuse_second(self, request: PublishRequest, staged: Stage) -> None:
        others = self.targets(staged)
        if others:
            raise FailedPrecondition(
                f"volume {request.volume_id} has the access mode ReadWriteOncePod and is published at {others[0]} "
                f"already; end that pod first"
            )


def _is_node(mount: Mount, device: int) -> bool:
    """Whether a mount shows the device node of that number: only those of a file can."""
    if mount.fs_type not in ("devtmpfs", "tmpfs"):
        return False
    try:
        found = os.stat(mount.mount_point)
    except OSError:
        return False
    return stat.S_ISBLK(found.st_mode) and found.st_rdev == device


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
