"""Where a volume that is moved is to lie: its id and its parameters over there."""

from typing import Final

import msgspec

from csi_driver.backends.base import shared
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.volume import VolumeParameters, VolumeRecord
from csi_driver.volumes.move_copy import Place

_PLACE: Final = ("thin_pool", "cluster_id", "pool", "data_pool", "image_features", "mounter", "map_options")
"""The parameters of a class that say where in its storage a volume lies, and how that is shown."""


def id_there(record: VolumeRecord, there: Place, place: VolumeParameters | None) -> str:
    """Its id over there; where one tells where it lies, that is as `place` says, or as the move was begun.

    Raises FailedPrecondition, InvalidArgument.
    """
    outside = shared(there.backend)
    if outside is None:
        return record.id
    if not outside.own_node:
        raise FailedPrecondition(
            f"volume {record.id} cannot be moved to {there.state_dir}: only the controller of the backend "
            f"{there.backend.name} makes volumes; make a new one, and copy what is in this one"
        )
    begun = record.move.volume_id if record.move is not None and record.move.other == there.path else None
    if begun is not None and place is None:
        return begun
    wanted = outside.id_for(record.name, place or VolumeParameters())
    if begun not in (None, wanted):
        raise FailedPrecondition(
            f"volume {record.id} is moved to {there.state_dir} as its volume {begun}, and where it is to lie by what "
            f"was said now it would be {wanted}; go on as it was begun, or give that up first (--undo)"
        )
    return wanted


def begun_place(target: VolumeRecord | None, there: Place) -> VolumeParameters:
    """Where it was begun to be put, if nobody says another place."""
    return VolumeParameters() if target is None or shared(there.backend) is None else target.parameters


def placed(source: VolumeRecord, there: Place, place: VolumeParameters) -> VolumeParameters:
    """Its parameters over there."""
    where = {name: getattr(place, name) for name in _PLACE}
    backend = there.backend.name if source.parameters.backend is not None else None
    return msgspec.structs.replace(source.parameters, backend=backend, **where)
