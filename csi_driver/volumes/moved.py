"""What may be done with a volume that is moved to another backend, or was: the record of either driver decides.

Its content counts in one place at any moment: docs/architecture.md, "Another backend".
"""

from collections.abc import Callable

import msgspec

from csi_driver.backends.base import Backend
from csi_driver.host.log import log
from csi_driver.model.errors import DriverError, FailedPrecondition
from csi_driver.model.volume import Move, MovePhase, VolumeRecord

HasLeft = Callable[[Move], bool]
"""Whether the driver from which a volume `arrived` says that it has left. Raises DriverError, OSError."""


class Homes:
    """Says of a volume whether it is here, before it is used."""

    def __init__(self, backend: Backend, has_left: HasLeft) -> None:
        self._backend = backend
        self._has_left = has_left

    def here(self, record: VolumeRecord) -> VolumeRecord:
        """The record of a volume that is about to be used here; a copy of it that is under way counts no more.

        One that arrived is here once the other driver says that it has left. Callers hold the volume's lock. Raises
        FailedPrecondition where the volume is not here.
        """
        if record.move is None:
            return record
        if record.move.phase is MovePhase.LEAVING:
            log.warning("a volume is used, so a copy of it that was under way counts no more", volume_id=record.id)
        elif record.move.phase is not MovePhase.ARRIVED or not self._is_settled(record.move):
            raise away(record, record.move)
        return self._backend.update(msgspec.structs.replace(record, move=None))

    def _is_settled(self, move: Move) -> bool:
        try:
            return self._has_left(move)
        except (DriverError, OSError) as error:
            log.warning("the driver that a volume came from cannot be asked", state_dir=move.other, error=str(error))
            return False


def refuse_away(record: VolumeRecord) -> None:
    """Raise FailedPrecondition for a volume that is not here, or may not be; what is changed here would be lost."""
    if record.move is not None and record.move.phase is not MovePhase.LEAVING:
        raise away(record, record.move)


def refuse_giving(record: VolumeRecord) -> None:
    """Raise FailedPrecondition for a volume that no node may be given, as its record alone says that it is not here.

    Whether one that arrived is here, the node finds out.
    """
    if record.move is not None and record.move.phase in (MovePhase.LEFT, MovePhase.ARRIVING):
        raise away(record, record.move)


def arrived(backend: Backend, volume_id: str) -> VolumeRecord | None:
    """The record of a volume that arrived and may be used where it came from; None for any other. Raises NotFound."""
    try:
        record = backend.get(volume_id)
    except FailedPrecondition:
        return None
    return record if record.move is not None and record.move.phase is MovePhase.ARRIVED else None


def take(backend: Backend, record: VolumeRecord) -> VolumeRecord:
    """Let a volume that arrived be here, though nobody says that it has left; where it came from must be lost for good.

    Raises Aborted.
    """
    log.warning("a volume is taken from a driver that does not say that it has left", volume_id=record.id)
    return backend.update(msgspec.structs.replace(record, move=None))


def is_here(record: VolumeRecord) -> bool:
    """Whether the volume is here as far as its record alone tells; a copy of it may be under way."""
    return record.move is None or record.move.phase is MovePhase.LEAVING


def away(record: VolumeRecord, move: Move) -> FailedPrecondition:
    """Why it cannot be used here, and where it can."""
    again = f"luks-csi volume move {move.volume_id} --state-dir {move.other} --to-state-dir …"
    other, node = (f"{move.other} of node {move.node}", "that node") if move.node else (move.other, "this node")
    if move.phase is MovePhase.LEFT:
        return FailedPrecondition(
            f"volume {record.id} was moved to the driver with the state directory {move.other}, and what lies here is "
            f"its old copy; stage it by that driver, as its volume {move.volume_id}"
        )
    if move.phase is MovePhase.ARRIVED:
        return FailedPrecondition(
            f"volume {record.id} was copied here from {other}, and nobody knows whether it may still be used there; "
            f"run the same command once more on {node}, which ends the move: {again}"
        )
    done = move.copied.end * 100 // move.size if move.size else 0
    return FailedPrecondition(
        f"volume {record.id} is being copied here from {other}, {done} % are there; let the same command run to its "
        f"end on {node} ({again}), or use it by the driver from which it comes"
    )
