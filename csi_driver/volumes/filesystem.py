"""File systems inside volumes: made once, never again, grown when the volume grows."""

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise

import msgspec

from csi_driver.backends.base import Backend
from csi_driver.host import blockdev
from csi_driver.host.commands import Commands, ProgramFailed
from csi_driver.host.fshealth import Mounting, mount_unless_flagged
from csi_driver.host.growfs import grow
from csi_driver.host.handle import Handle
from csi_driver.host.holders import Holders, describe
from csi_driver.host.keyring import KeptKey
from csi_driver.host.log import log
from csi_driver.host.mountinfo import Mount
from csi_driver.host.mountoptions import MountOptions
from csi_driver.host.mounts import Mounts
from csi_driver.host.signatures import read_signature
from csi_driver.host.workers import Workers
from csi_driver.luks.blank import prove_blank, prove_payload_blank
from csi_driver.luks.never_mounted import prove_never_mounted
from csi_driver.model.errors import DeadlineExceeded, DeviceInUse, FailedPrecondition, OutOfRange
from csi_driver.model.settings import Limits
from csi_driver.model.volume import FileSystemState, VolumeRecord
from csi_driver.volumes.parameters import DEFAULT_FILE_SYSTEM, FILE_SYSTEMS, check_mkfs_options

_MIB = 1 << 20

LEAST_BYTES: Mapping[str, int] = {"ext4": 8 * _MIB, "xfs": 300 * _MIB, "btrfs": 256 * _MIB}
"""The smallest volume for each file system: what mkfs takes; for btrfs, what the kernel lets grow again.

For ext4 2048 blocks of the largest size, 4096 bytes: in fewer mke2fs makes no journal, and succeeds.
"""

_MKFS: Mapping[str, Sequence[str]] = {
    # What a fresh mapping has never written reads as noise: so no assume_storage_prezeroed and no lazy_journal_init.
    "ext4": ("mkfs.ext4", "-q", "-F", "-m0", "-E", "nodiscard,lazy_itable_init=1"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-K"),
    "btrfs": ("mkfs.btrfs", "-q", "-f", "-K"),
}
FSCK: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "ext4": (("e2fsck", "-f", "-n"), ("e2fsck", "-f", "-y")),
    "xfs": (("xfs_repair", "-n"), ("xfs_repair",)),
    "btrfs": (("btrfs", "check", "--readonly"), ("btrfs", "check", "--repair")),
}
"""What checks each file system, with exit code 0 if all is well, and what mends it; the device comes last."""
PROGRAMS: Mapping[str, Sequence[str]] = {fs: (command[0], FSCK[fs][0][0]) for fs, command in _MKFS.items()}
"""What makes and mends each file system."""
_MKFS_TRIES = 5
_MKFS_PAUSE_SECONDS = 0.2
# What mkfs.btrfs may say before it writes: it looks up the loop device of each mount of the node, and gives up on one
# that another's unmount has just let go of (btrfs-progs 6.2, check_mounted_where); and udev, late with the end of an
# earlier mapping of that name, takes the name away for a moment.
_MKFS_PASSING = ("cannot check mount status", "unable to open")
_CHECKED_PER_SECOND = 1 << 30  # of a volume's bytes, by e2fsck: a full one of small files takes some minutes for a TiB
_MENDED_BITS = 3  # e2fsck(8): errors corrected, and "the system should be rebooted", which means mounted anew


class Attached(msgspec.Struct, frozen=True):
    """A volume whose devices are held open: `below` what its backend shows, `shown` what pods get to see of it.

    They differ where it is encrypted: then `kept_key` is where the volume key of a fresh mapping waits for a resize,
    and `kept_next` where the one does that is to take its place.
    """

    record: VolumeRecord
    below: Handle
    shown: Handle
    kept_key: KeptKey | None = None
    kept_next: KeptKey | None = None


class FileSystems:
    """Makes, finds, mounts and grows the file system of a volume; callers hold the volume's lock."""

    def __init__(self, workers: Workers, commands: Commands, mounts: Mounts, holders: Holders, limits: Limits) -> None:
        self._workers = workers
        self._commands = commands
        self._mounts = mounts
        self._holders = holders
        self._limits = limits

    def ensure(self, backend: Backend, volume: Attached, fs_type: str | None) -> tuple[VolumeRecord, str]:
        """The volume's file system, made if nobody has seen the inside yet; returns record and type.

        `fs_type` is what the pod asks for; None takes what is there or the default. Raises FailedPrecondition when
        there is another one, or none on a volume that was shown as a block device.
        """
        record = volume.record
        if record.file_system is FileSystemState.MADE:
            found = record.made_fs_type
        elif record.file_system is FileSystemState.RAW:
            found = self._find(record, volume.shown)
        else:
            wanted = fs_type or record.parameters.fs_type or DEFAULT_FILE_SYSTEM
            return self._make(backend, volume, wanted), wanted
        if found is None or fs_type not in (None, found):
            raise FailedPrecondition(
                f"volume {record.id} holds the file system {found or '(unknown)'} and {fs_type} was asked for; it is "
                f"never made anew, ask for {found or 'the one that is there'}"
            )
        return record, found

    def mount(
        self,
        record: VolumeRecord,
        device: Handle,
        path: str,
        fs_type: str,
        options: MountOptions,
        *,
        even_flagged: bool = True,
    ) -> Mounting:
        """Mount the volume's file system, in a worker: a journal is replayed from the device.

        An ext4 that carries its error flag is left alone unless `even_flagged`.
        """
        data = options.data
        if fs_type == "xfs" and record.parameters.backing_image is not None:
            # Volumes of one image have one file system UUID, and xfs mounts no two of them on a node.
            data = ",".join(filter(None, (data, "nouuid")))
        what, limit = f"luks-mount of volume {record.id} at {path}", self._limits.mount_seconds
        arguments = (device, path, fs_type, options.flags, data, repair_command(record.id))
        if even_flagged:
            self._workers.call(what, limit, self._mounts.mount, *arguments)
            return Mounting.MOUNTED
        return self._workers.call(what, limit, mount_unless_flagged, self._mounts, *arguments)

    def refuse_used(self, volume_id: str, device: Handle) -> None:
        """Raise DeviceInUse, naming who, when the device is mounted in a mount namespace that is not ours, or held."""
        if self._workers.call(
            f"luks-read of volume {volume_id}", self._limits.mount_seconds, blockdev.is_claimed, device
        ):
            raise DeviceInUse(
                f"the file system of volume {volume_id} on {device} cannot be checked and mounted anew: it is kept in "
                f"use by {describe(self._holders.of_mount(device.number))}; end that first"
            )

    def mend_ext4(self, record: VolumeRecord, device: Handle) -> None:
        """Check an ext4 that nobody uses and mend what needs no decision: `e2fsck -p`, as kubelet's own mounts do.

        Raises FailedPrecondition, or DeadlineExceeded, with the cure where that is not enough, DeviceUnreadable where
        the storage takes no writes: nothing was changed, or it is to be done again.
        """
        self.replay_ext4(record.id, device)
        cure = f"end the volume's pods, back it up and run {repair_command(record.id)}"
        try:
            done = self._commands.run(
                ["e2fsck", "-f", "-p", device],
                timeout=self._limits.format_seconds + record.capacity_bytes / _CHECKED_PER_SECOND,
                ok_codes=range(256),
            )
        except DeadlineExceeded as error:
            raise DeadlineExceeded(f"{error}; {cure}, which has more time") from None
        if done.code & ~_MENDED_BITS:
            said = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1].strip()
            raise FailedPrecondition(
                f"the ext4 file system of volume {record.id} is damaged and 'e2fsck -p' did not mend it (exit code "
                f"{done.code}: {said}); {cure}"
            )
        self.sync(record.id, device)

    def replay_ext4(self, volume_id: str, device: Handle) -> None:
        """To be done before e2fsck writes to it, see `Mounts.replay_ext4`."""
        what = f"luks-replay of volume {volume_id}"
        self._workers.call(what, self._limits.mount_seconds, self._mounts.replay_ext4, device)

    def sync(self, volume_id: str, device: Handle) -> None:
        """Write back what a program has written. Raises DeviceUnreadable where the device did not take all of it."""
        what = f"luks-sync of volume {volume_id}"
        self._workers.call(what, self._limits.format_seconds, blockdev.fsync_device, device)

    def unmount(self, volume_id: str, mount: Mount) -> None:
        """Unmount, in a worker: the file system writes back what it holds. Raises DeviceInUse naming who uses it."""
        try:
            self._workers.call(
                f"luks-umount of volume {volume_id} at {mount.mount_point}",
                self._limits.mount_seconds,
                self._mounts.unmount_volume,
                mount,
            )
        except DeviceInUse as busy:
            found = self._holders.of_mount(mount.device)
            if not found:
                raise
            raise DeviceInUse(
                f"volume {volume_id} cannot be unmounted from {mount.mount_point}: it is kept busy by "
                f"{describe(found)}; end that first"
            ) from busy

    def grow(self, volume_id: str, fs_type: str, mount: Mount, device: Handle) -> None:
        """Let the file system that is mounted there fill its device; one that fills it already stays as it is."""
        with self._mounts.open(mount) as mounted:
            grown = self._workers.call(
                f"luks-grow of volume {volume_id}",
                self._limits.format_seconds,
                grow,
                f"volume {volume_id} on {device}",
                mounted,
                device,
                fs_type,
            )
        if grown:
            log.info("file system grown", volume_id=volume_id, fs_type=fs_type)

    def _make(self, backend: Backend, volume: Attached, fs_type: str) -> VolumeRecord:
        record, device = volume.record, volume.shown
        check_mkfs_options(fs_type, record.parameters.mkfs_options)
        if record.capacity_bytes < LEAST_BYTES[fs_type]:
            raise OutOfRange(
                f"volume {record.id} has {record.capacity_bytes} bytes and {fs_type} wants at least "
                f"{LEAST_BYTES[fs_type]}; ask for a larger volume or another file system"
            )
        self._prove_unused(backend, volume)
        if record.file_system is FileSystemState.NONE:
            record = backend.update(msgspec.structs.replace(record, file_system=FileSystemState.MAKING))
        self._run_mkfs(fs_type, [*mkfs_command(fs_type, record.parameters.mkfs_options), device])
        self.sync(record.id, device)
        record = backend.update(msgspec.structs.replace(record, file_system=FileSystemState.MADE, made_fs_type=fs_type))
        log.info("file system made", volume_id=record.id, fs_type=fs_type)
        return record

    def _run_mkfs(self, fs_type: str, argv: Sequence[str | Handle]) -> None:
        for left in reversed(range(_MKFS_TRIES)):
            try:
                # mkfs.btrfs tells the kernel the path, which shows it as the mount's source and compares by it later.
                self._commands.run(argv, timeout=self._limits.format_seconds, by_name=fs_type == "btrfs")
            except ProgramFailed as failure:
                if not left or not any(words in failure.stderr for words in _MKFS_PASSING):
                    raise
                time.sleep(_MKFS_PAUSE_SECONDS)
            else:
                return

    def _prove_unused(self, backend: Backend, volume: Attached) -> None:
        """Whatever the record says: nothing was ever written into it but, while `making`, by a mkfs that was cut."""
        record, device, below = volume.record, volume.shown, volume.below
        where = f"volume {record.id} on {device}"
        what, seconds = f"luks-blank proof of {where}", self._limits.format_seconds
        offset = record.luks.data_offset if record.luks else 0
        size = record.capacity_bytes
        with backend.open_storage(record.id) as storage:
            if record.file_system is FileSystemState.MAKING:
                self._workers.call(what, seconds, prove_never_mounted, where, device, size, storage, offset)
            elif record.encryption is None:
                self._workers.call(what, seconds, prove_blank, where, device, size, storage)
            else:
                self._workers.call(what, seconds, prove_payload_blank, where, below, size + offset, storage)

    def _find(self, record: VolumeRecord, device: Handle) -> str:
        found = self._workers.call(
            f"luks-read of volume {record.id}",
            self._limits.mount_seconds,
            read_signature,
            f"volume {record.id} on {device}",
            device,
        )
        if found not in FILE_SYSTEMS:
            image = record.parameters.backing_image
            raise FailedPrecondition(
                f"volume {record.id} {f'starts from image {image}' if image else 'was used as a block device'} and "
                f"never gets a file system made on it; it holds {found or 'no file system that is known here'}, so use "
                f"it as a block device{'' if image else ' again'}"
            )
        return found


def repair_command(volume_id: str) -> str:
    """What errors advise for a damaged file system: it names no device, which would be gone after a failed stage."""
    return f"`luks-csi volume check {volume_id} --repair`"


def mkfs_command(fs_type: str, options: Sequence[str]) -> list[str]:
    """How a file system is made, but for the device: the driver's options, then those of the class.

    Of several -E mke2fs heeds the last one only, so they become one.
    """
    argv = [*_MKFS[fs_type], *options]
    extended = [value for flag, value in pairwise(argv) if flag == "-E"]
    if extended:
        others = [word for at, word in enumerate(argv) if word != "-E" and argv[at - 1] != "-E"]
        argv = [*others, "-E", ",".join(extended)]
    return argv
