"""How a volume's image is made and removed, so that a kill anywhere leaves what the next call goes on with.

| step of the making | a kill behind it |
| the log says that the volume is being made, and by whom | nothing is there; the next call says it is the one |
| rbd create | an image in which nothing was ever written, of a volume without a record: removed, made anew |
| the log says the image's id, and the record | the volume is whole |

Removed is in the other order: the log loses the record first, and with it goes the volume.
"""

import contextlib
import secrets
from collections.abc import Iterator
from typing import Final

import msgspec

from csi_driver.backends.rbderrors import CephExists, CephMissing
from csi_driver.backends.rbdplace import image_name
from csi_driver.backends.rbdpool import CephPool
from csi_driver.backends.rbdrecords import VolumeLogs, VolumeState
from csi_driver.host.log import log
from csi_driver.model.errors import (
    Aborted,
    DeadlineExceeded,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    ResourceExhausted,
)
from csi_driver.model.volume import EncryptionState, VolumeParameters, VolumeRecord

FEATURES: Final = ("layering", "exclusive-lock", "object-map", "fast-diff")
"""Of an image whose class says nothing: a lock that the cluster takes from a client that is gone, and quick answers to
what was ever written."""

_SECTOR: Final = 512
_ENCRYPTED: Final = "rbd.csi.ceph.com/encrypted"  # Ceph-CSI, internal/rbd/encryption.go
_HEADER_SIZE: Final = "rbd.csi.ceph.com/luks2HeaderSize"


class Images:
    """Makes and removes images; `seconds` is how long may take what a cluster does object by object."""

    def __init__(self, logs: VolumeLogs, seconds: float) -> None:
        self._logs = logs
        self._seconds = seconds

    def check_room(self, pool: CephPool, volume_id: str, parameters: VolumeParameters, size: int) -> int:
        """Raise ResourceExhausted where so many bytes cannot be written any more; returns the number of the pool."""
        rooms, name = pool.rooms(), parameters.data_pool or pool.place.pool
        available = pool.room_of(rooms, name).available
        if size > available:
            raise ResourceExhausted(
                f"no room for volume {volume_id} in the pool {name} of the Ceph cluster {pool.place.cluster.id}: "
                f"{size} bytes are wanted and {available} are free; free space in it or add disks"
            )
        return pool.room_of(rooms, pool.place.pool).number

    def make(
        self,
        pool: CephPool,
        volume_id: str,
        state: VolumeState | None,
        parameters: VolumeParameters,
        size: int,
        made: VolumeState,
    ) -> None:
        """Make the image and then the volume, from the state that it has; it becomes `made` with the image's id.

        Raises FailedPrecondition for somebody else's image of its name.
        """
        image, mine = image_name(volume_id), secrets.token_hex(8)
        if state is None and pool.info(image) is not None:
            raise FailedPrecondition(
                f"the image {image} in {pool.place} has the name of volume {volume_id} and was not made by this "
                f"driver; it was left as it is, rename it"
            )
        if state is not None and state.removing:
            self.remove(pool, volume_id, state)
            self._logs.forget(pool, volume_id)  # who removes it at the same time forgets that life, and not ours
            state = None

        def claim(found: VolumeState | None) -> VolumeState:
            if found is not None and (found.record is not None or found.removing):
                raise Aborted(f"volume {volume_id} was made or removed by somebody else meanwhile; call again")
            return VolumeState(claim=mine)

        claimed = self._logs.change(pool, volume_id, claim)
        with self._given_up(pool, volume_id, mine):
            if state is not None:
                self.remove(pool, volume_id, claimed)
            pool.make(image, rounded(size), parameters.image_features or FEATURES, parameters.data_pool)
            fresh = pool.info(image)
        if fresh is None:
            raise CephExists(f"the image {image} in {pool.place} was made and is gone; call again")
        self._complete(pool, volume_id, mine, msgspec.structs.replace(made, image_id=fresh.id))

    def _complete(self, pool: CephPool, volume_id: str, mine: str, made: VolumeState) -> None:
        """Let the image be the volume; it goes where somebody has deleted that meanwhile, and nobody makes it anew."""

        def complete(found: VolumeState | None) -> VolumeState:
            if found is None or found.claim != mine:
                raise Aborted(f"volume {volume_id} was made or removed by somebody else at the same time; call again")
            return made

        try:
            self._logs.change(pool, volume_id, complete)
            self._logs.confirm(pool, volume_id)
        except Aborted:
            state = self._logs.state(pool, volume_id)
            if state is None or state.removing:
                pool.remove(image_name(volume_id), self._seconds, only=made.image_id)
            raise

    @contextlib.contextmanager
    def _given_up(self, pool: CephPool, volume_id: str, mine: str) -> Iterator[None]:
        """Where the block fails for good what it has made goes, unless somebody else is at it or has made it."""

        def take(state: VolumeState | None) -> VolumeState:
            if state is None or state.claim != mine or state.record is not None:
                raise Aborted(f"volume {volume_id} is made by somebody else")
            return VolumeState(removing=True)

        try:
            yield
        except DriverError as error:
            if not isinstance(error, Aborted | DeadlineExceeded | FailedPrecondition):
                with contextlib.suppress(DriverError):
                    self.remove(pool, volume_id, self._logs.change(pool, volume_id, take))
                    self._logs.forget(pool, volume_id)
            raise

    def remove(self, pool: CephPool, volume_id: str, state: VolumeState) -> None:
        """Remove the image of a volume without a record: one that is removed, or in which nothing was ever written."""
        image = image_name(volume_id)
        found = pool.info(image)
        if found is not None and state.image_id is not None:
            if found.id != state.image_id:
                log.warning("an image was left alone: it is not the volume's", volume_id=volume_id, image=image)
                return
            if state.erase:
                pool.overwrite(image, state.erase, self._seconds)
        elif found is not None and not pool.is_unwritten(image, self._seconds):
            raise FailedPrecondition(
                f"the image {image} in {pool.place} has the name of volume {volume_id}, has no record and holds data; "
                f"it was left as it is, rename it or remove it by hand"
            )
        pool.remove(image, self._seconds, only=found.id if found is not None else None)

    def refuse_used(self, pool: CephPool, volume_id: str, state: VolumeState) -> None:
        """Raise DeviceInUse while a node has it, a client has its image open, or that has snapshots or a group."""
        image = image_name(volume_id)
        text = f"volume {volume_id} cannot be deleted: "
        if state.nodes:
            raise DeviceInUse(f"{text}it was given to {', '.join(sorted(state.nodes))}; unpublish and unstage it first")
        try:
            clients, snapshots, group = pool.watchers(image), pool.snapshots(image), pool.group(image)
        except CephMissing:
            return
        if clients:
            raise DeviceInUse(
                f"{text}its image {pool.place.spec}/{image} is open at {', '.join(clients)}; unpublish and unstage it "
                f"first, or wait 30 s for a client that crashed"
            )
        if snapshots:
            raise DeviceInUse(
                f"{text}Ceph keeps its image {pool.place.spec}/{image} for its snapshots ({snapshots}); 'rbd snap ls "
                f"--all' tells them, remove them first if nobody needs them, or flatten what was cloned of one in the "
                f"trash ('rbd children --all')"
            )
        if group:
            raise DeviceInUse(
                f"{text}its image {pool.place.spec}/{image} is in the group {group}; take it out of that first ('rbd "
                f"group image rm')"
            )

    def mark_removed(self, pool: CephPool, volume_id: str, erase: int | None) -> VolumeState:
        """Take the record away, or the claim of who makes it, in one step: nobody completes it from then on.

        Without `erase` one that has a record by now is left as it is. Raises Aborted then, and DeviceInUse where a node
        was given the volume meanwhile.
        """

        def take(state: VolumeState | None) -> VolumeState:
            if state is None or state.record is None:
                return VolumeState(removing=True) if state is None or not state.removing else state
            if erase is None:
                raise Aborted(f"volume {volume_id} was made by somebody else meanwhile; it was left as it is")
            if state.nodes:
                self.refuse_used(pool, volume_id, state)
            return msgspec.structs.replace(state, record=None, removing=True, erase=erase)

        return self._logs.change(pool, volume_id, take)

    def describe(self, pool: CephPool, record: VolumeRecord) -> None:
        """Set Ceph-CSI's own keys of the image, for people and its tools; our record decides."""
        if record.encryption is None:
            return
        is_made = record.encryption is EncryptionState.ENCRYPTED
        pairs = {_ENCRYPTED: "encrypted" if is_made else "encryptionPrepared"}
        if is_made and record.luks is not None:
            pairs[_HEADER_SIZE] = str(record.luks.data_offset)
        try:
            for key, value in pairs.items():
                pool.describe(image_name(record.id), key, value)
        except DriverError as error:
            log.warning("the metadata of an image could not be set", volume_id=record.id, error=str(error))


def rounded(size: int) -> int:
    """In whole sectors, which is what a device has."""
    return -(-size // _SECTOR) * _SECTOR
