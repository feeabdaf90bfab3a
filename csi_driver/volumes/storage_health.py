"""What `luks-csi doctor` looks at of the state directory and what is kept in it; a server never loads it."""

from collections.abc import Callable, Sequence

from csi_driver.backends.base import Backend, HasPools
from csi_driver.host.files import Files
from csi_driver.host.machine import Machine
from csi_driver.keys.ledger import KeyLedger
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.settings import Settings
from csi_driver.model.volume import MovePhase, VolumeRecord
from csi_driver.volumes.finding import Finding, look_at
from csi_driver.volumes.keys import SHARED, shares_key, unnamed_keys
from csi_driver.volumes.stages import Stages

_GIB = 1 << 30
# Kubelet's default for nodefs.available (Kubernetes documentation, "Node-pressure Eviction").
_EVICTED_BELOW = 0.1
_LOST_AT_BOOT = frozenset({"overlay", "ramfs", "tmpfs"})


class StorageHealth:
    """Looks at a state directory that is there; nothing here changes it."""

    def __init__(self, settings: Settings, backend: Backend, stages: Stages, machine: Callable[[], Machine]) -> None:
        self._settings = settings
        self._backend = backend
        self._stages = stages
        self._machine = machine

    def findings(self) -> list[Finding]:
        """None of them is fatal."""
        floor = (self._floor,) if self._backend.name == "loopfile" else ()
        checks = (
            self._disk,
            self._space,
            *floor,
            self._thin_pools,
            self._orphans,
            self._secrets,
            self._keys,
            self._moves,
        )
        return [check() for check in checks]

    def _disk(self) -> Finding:
        path = self._settings.state_dir

        def look() -> str:
            disk = self._machine().disk(path)
            told = f"{path} is on {disk.device} ({disk.fs_type}, {disk.total / _GIB:.1f} GiB)"
            if disk.fs_type in _LOST_AT_BOOT:
                raise FailedPrecondition(f"{told}, which does not outlive the node's next start or the container's")
            return told

        return look_at("disk", look, "put the state directory on a disk of the node", fatal=False)

    def _space(self) -> Finding:
        def look() -> str:
            try:
                space = self._backend.space()
            except FileNotFoundError:
                return "not looked at; no driver was started here yet"
            floor = self._settings.free_space_floor
            above = f" above the floor of {floor / _GIB:g} GiB" if self._backend.name == "loopfile" else ""
            if space.available == 0:
                raise FailedPrecondition(f"nothing is free{above}")
            return f"{space.available / _GIB:.1f} of {space.total / _GIB:.1f} GiB are free{above}"

        return look_at("free space", look, "free space there; no volume can be made or enlarged", fatal=False)

    def _floor(self) -> Finding:
        path, floor = self._settings.state_dir, self._settings.free_space_floor

        def look() -> str:
            least = int(self._machine().disk(path).total * _EVICTED_BELOW)
            kubelet = self._settings.kubelet_dir
            if kubelet.exists() and kubelet.stat().st_dev != path.stat().st_dev:
                return f"{floor / _GIB:g} GiB, on another file system than kubelet's folder"
            if floor < least:
                raise FailedPrecondition(
                    f"{floor / _GIB:g} GiB are less than 10 % of the file system, and below that kubelet evicts pods; "
                    f"set --free-space-floor to {least / _GIB:.1f} GiB or more, or give the state directory a disk of "
                    f"its own"
                )
            return f"{floor / _GIB:g} GiB, not less than the 10 % below which kubelet evicts pods"

        return look_at("free-space floor", look, "raise --free-space-floor", fatal=False)

    def _thin_pools(self) -> Finding:
        def look() -> str:
            if not isinstance(self._backend, HasPools):
                return f"the backend {self._backend.name} has none"
            if full := self._backend.full_pools():
                raise FailedPrecondition(". ".join(full))
            return f"the fullest one with volumes is used by {self._backend.fullest_pool()} %"

        return look_at("thin pools", look, "extend them with lvextend", fatal=False)

    def _orphans(self) -> Finding:
        def look() -> str:
            try:
                orphans = self._backend.orphans()
            except FileNotFoundError:
                return "none; no driver was started here yet"
            if orphans:
                raise FailedPrecondition(
                    f"left by killed calls: {', '.join(orphans[:5])}{' and others' * (len(orphans) > 5)}"
                )
            return "none"

        return look_at("orphans", look, "look at them with `luks-csi orphans list`", fatal=False)

    def _secrets(self) -> Finding:
        def look() -> str:
            if drifted := self._stages.drifted():
                raise FailedPrecondition(
                    f"the secret no longer opens: {', '.join(drifted[:5])}{' and others' * (len(drifted) > 5)}"
                )
            return "no secret was seen that no longer opens its staged volume"

        advice = "put the passphrase that they were last given back into the secret before this node boots again"
        return look_at("secrets", look, advice, fatal=False)

    def _keys(self) -> Finding:
        def look() -> str:
            if (records := self._records()) is None:
                return "none; no driver was started here yet"
            if shared := [record.id for record in records if shares_key(record)]:
                raise FailedPrecondition(SHARED.format(shared[0]))
            if cut := [record.id for record in records if record.rekey is not None]:
                raise FailedPrecondition(
                    f"a change of the key is under way or was cut: {', '.join(cut[:5])}"
                    f"{' and others' * (len(cut) > 5)}; stage the volume with the secret that it has, or end it by "
                    f"luks-csi keys rotate"
                )
            unnamed = unnamed_keys(KeyLedger(self._settings.state_dir, Files()), self._backend)
            if unnamed.left:
                raise FailedPrecondition(
                    f"a KMS keeps {len(unnamed.left)} keys for nothing; look at them with `luks-csi keys leftovers`"
                )
            if unnamed.untold:
                raise FailedPrecondition(
                    f"of {len(unnamed.untold)} keys nobody can tell whether a volume has them; look at them with "
                    f"`luks-csi keys leftovers`"
                )
            return "each volume has its own, and none is left in a KMS"

        return look_at("volume keys", look, "look at them with `luks-csi keys status`", fatal=False)

    def _moves(self) -> Finding:
        def look() -> str:
            moves = [(record.id, record.move) for record in self._records() or () if record.move is not None]
            if cut := [(volume_id, move) for volume_id, move in moves if move.phase is not MovePhase.LEFT]:
                names = ", ".join(f"{volume_id} ({move.phase}, {move.other})" for volume_id, move in cut[:5])
                others = " and others" * (len(cut) > 5)
                raise FailedPrecondition(f"a move to or from another backend is under way or was cut: {names}{others}")
            if moves:
                kept = ", ".join(volume_id for volume_id, _ in moves[:5])
                return f"old copies of volumes that have left are kept: {kept}{' and others' * (len(moves) > 5)}"
            return "no volume is on its way to another backend"

        advice = "run the same `luks-csi volume move` again, which goes on, or give the move up with --undo"
        return look_at("moves", look, advice, fatal=False)

    def _records(self) -> Sequence[VolumeRecord] | None:
        """All of them; None where no driver was started yet."""
        try:
            return [self._backend.get(volume_id) for volume_id in self._backend.ids()]
        except FileNotFoundError:
            return None
