"""`luks-csi volume check`: the file system of a closed volume looked at by its own program, and mended if told to.

Nothing is formatted or made here, and no record is changed.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum

from csi_driver.backends.base import Backend
from csi_driver.host.commands import Commands, Completed
from csi_driver.host.fshealth import carries_error_flag
from csi_driver.host.handle import Handle, let_go
from csi_driver.host.workers import Workers
from csi_driver.keys.secret import SecretKey
from csi_driver.luks.mapping import Mappings
from csi_driver.model.errors import DeviceInUse, FailedPrecondition
from csi_driver.model.settings import Limits
from csi_driver.model.volume import EncryptionState, FileSystemState, VolumeRecord
from csi_driver.volumes.attachment import refuse_many_nodes
from csi_driver.volumes.encryption import Encryption, attempt
from csi_driver.volumes.filesystem import FSCK, Attached, FileSystems
from csi_driver.volumes.keys import VolumeKeys
from csi_driver.volumes.moved import Homes
from csi_driver.volumes.presence import Presence, Presences
from csi_driver.volumes.two_keys import refuse_half

_ANY_CODE = range(256)


class Verdict(StrEnum):
    """What came of a check."""

    WELL = "well"
    MENDED = "mended"
    DAMAGED = "damaged"


@dataclass(frozen=True)
class Checked:
    """A check of a volume; `said` is what the programs printed, each below its command line."""

    volume_id: str
    fs_type: str
    verdict: Verdict
    said: str


class Checking:
    """Checks volumes that are not staged; callers hold the volume's lock."""

    def __init__(
        self,
        backend: Backend,
        presences: Presences,
        workers: Workers,
        commands: Commands,
        mappings: Mappings,
        encryption: Encryption,
        file_systems: FileSystems,
        keys: VolumeKeys,
        homes: Homes,
        limits: Limits,
    ) -> None:
        self._backend = backend
        self._presences = presences
        self._workers = workers
        self._commands = commands
        self._mappings = mappings
        self._encryption = encryption
        self._file_systems = file_systems
        self._keys = keys
        self._homes = homes
        self._limits = limits

    def check(self, volume_id: str, key: SecretKey, *, repair: bool, seconds: float) -> Checked:
        """Open the volume, run its file system's own check, mend if `repair`, and close it again.

        Each program may take `seconds`. Whether it was mended a second check says. Raises NotFound, DeviceInUse (it is
        staged or open, or several nodes have it), FailedPrecondition (nothing was formatted or made in it yet, or no
        file system is known in it), Unauthenticated, DeadlineExceeded, DeviceUnreadable (its storage takes no writes),
        and what opening it raises.
        """
        record = self._backend.get(volume_id)
        refuse_many_nodes(self._backend, volume_id)
        self._presences.refuse_others(volume_id)
        _refuse_open(self._presences.of(volume_id, record))
        _refuse_unmade(record)
        record = self._homes.here(record)
        refuse_half(self._backend, record)
        in_hand = self._keys.of(record, key, "check") if record.encryption is not None else None
        with self._workers.session(), ExitStack() as undo:
            record = self._encryption.ended(self._backend, record)
            undo.callback(attempt, self._backend.detach, volume_id)
            device = self._backend.attach(volume_id, lasting=False)
            undo.callback(let_go, device)
            shown: Handle = device
            if in_hand is not None:
                with self._keys.using(record, "check"):
                    shown = self._encryption.open(self._backend, record, device, in_hand, undo).mapping
            self._backend.guard(volume_id)
            checked = self._run(record, Attached(record, device, shown), repair=repair, seconds=seconds)
            shown.close()
            if record.luks is not None:
                self._mappings.close(record.mapping_name, record.luks.uuid)
        return checked

    def _run(self, record: VolumeRecord, volume: Attached, *, repair: bool, seconds: float) -> Checked:
        _, fs_type = self._file_systems.ensure(self._backend, volume, None)
        check, mend = FSCK[fs_type]
        said: list[str] = []

        def run(*argv: str) -> int:
            done = self._commands.run([*argv, volume.shown], timeout=seconds, ok_codes=_ANY_CODE, by_name=True)
            said.append(_words([*argv, volume.shown.name], done))
            return done.code

        def is_well() -> bool:
            return run(*check) == 0 and not (fs_type == "ext4" and self._is_flagged(record, volume.shown))

        verdict = Verdict.WELL if is_well() else Verdict.DAMAGED
        if repair and verdict is Verdict.DAMAGED:
            if fs_type == "ext4":
                self._file_systems.replay_ext4(record.id, volume.shown)
            run(*mend)
            self._file_systems.sync(record.id, volume.shown)  # what the next look finds may be in memory alone
            verdict = Verdict.MENDED if is_well() else Verdict.DAMAGED
        return Checked(record.id, fs_type, verdict, "\n".join(said))

    def _is_flagged(self, record: VolumeRecord, device: Handle) -> bool:
        """Whether the error flag is up, of which `e2fsck -n` says nothing where it finds no error."""
        what = f"luks-read of volume {record.id}"
        return self._workers.call(what, self._limits.mount_seconds, carries_error_flag, device)


def _refuse_open(present: Presence) -> None:
    mapping = present.mapping
    left = present.stage is None and mapping is not None and mapping.open_count == 0  # by a killed call: opened anew
    if present.is_open and not left:
        places = [mount.mount_point for mount in (*present.mounts, *present.nodes)]
        where = f" at {' and '.join(places)}" if places else ""
        raise DeviceInUse(
            f"volume {present.volume_id} is in use{where} and only a closed one can be checked; end its pods, and "
            f"unstage it if Kubernetes does not"
        )


def _refuse_unmade(record: VolumeRecord) -> None:
    if record.encryption not in (None, EncryptionState.ENCRYPTED):
        raise FailedPrecondition(
            f"volume {record.id} was never staged, so there is nothing in it to check; stage it first"
        )
    if record.file_system not in (FileSystemState.MADE, FileSystemState.RAW):
        raise FailedPrecondition(f"volume {record.id} has no file system yet; stage it as a mount first")


def _words(argv: list[str], done: Completed) -> str:
    output = "\n".join(part.strip() for part in (done.stdout, done.stderr) if part.strip())
    return "\n".join(filter(None, (f"$ {' '.join(argv)}", output, f"exit code {done.code}")))
