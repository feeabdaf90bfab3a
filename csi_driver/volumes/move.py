"""`luks-csi volume move`: a closed volume's bytes from the backend of one driver to that of another one on its node.

Header, UUID, key slots and record go along as they are, and no key is needed. Each step is durable before the next one;
docs/architecture.md, "Another backend", tells the order and what a cut leaves. Where it goes may be storage outside the
nodes: this node has it there by itself until it is whole.
"""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import msgspec

from csi_driver.backends.base import shared
from csi_driver.host import blockdev, copying
from csi_driver.host.handle import Handle
from csi_driver.host.log import log
from csi_driver.host.workers import Workers
from csi_driver.luks.formats import DATA_OFFSET
from csi_driver.model.errors import (
    Aborted,
    AlreadyExists,
    CommandFailed,
    DeviceInUse,
    DeviceShort,
    DriverError,
    FailedPrecondition,
    NotFound,
)
from csi_driver.model.settings import Limits
from csi_driver.model.volume import EncryptionState, FileSystemState, Move, MovePhase, VolumeParameters, VolumeRecord
from csi_driver.volumes.encryption import attempt
from csi_driver.volumes.keys import VolumeKeys
from csi_driver.volumes.move_copy import STRETCH, MoveCopy, Onlooker, Place, move_of
from csi_driver.volumes.move_place import begun_place, id_there, placed
from csi_driver.volumes.moved import away
from csi_driver.volumes.two_keys import refuse_changing, refuse_half


@dataclass(frozen=True)
class MoveRequest:
    """Which volume; where it is to lie, by what a class says of that; whether the old copy is kept, marked as one.

    Without `place` it goes where the move was begun to, in storage outside the nodes; elsewhere it is in no pool.
    """

    volume_id: str
    place: VolumeParameters | None = None
    keep: bool = False


class Moves:
    """Moves volumes away from the driver `here`. It holds the volume's lock in both places, from begin to end."""

    def __init__(self, here: Place, workers: Workers, keys: VolumeKeys, limits: Limits, stretch: int = STRETCH) -> None:
        self.here = here
        self._keys = keys
        self._workers = workers
        self._limits = limits
        self._stretch = stretch

    def move(self, request: MoveRequest, there: Place, onlooker: Onlooker) -> VolumeRecord:
        """Move a closed volume, or go on where that was cut; returns its record over there.

        Raises NotFound, DeviceInUse (it is staged, open or bound), FailedPrecondition (a change of it is under way, it
        is not here), InvalidArgument (nothing says where it is to lie), AlreadyExists, ResourceExhausted, VolumeBusy,
        Stopped, Aborted (it was written to meanwhile), DeviceUnreadable, CommandFailed; the same call goes on after any
        of them.
        """
        self._sweep(request.volume_id)
        with self._locked(request.volume_id, there, request.place) as (source, target):
            _refuse_coming(source)
            if source.move is not None and source.move.phase is MovePhase.LEFT:
                return self._ended(source, target, there, keep=request.keep)
            copier = MoveCopy(there, self._workers, self._limits, onlooker, self._stretch)
            copied = self._copied(source, target, request, there, copier, onlooker)
            return self._ended(*copied, there, keep=request.keep)

    def undo(self, volume_id: str, there: Place, place: VolumeParameters | None = None) -> VolumeRecord:
        """Give up a move that did not come to its end: what was copied is removed, and the volume is here as before.

        Raises NotFound, DeviceInUse, VolumeBusy, InvalidArgument, FailedPrecondition where the volume is over there
        already.
        """
        with self._locked(volume_id, there, place) as (source, target):
            _refuse_coming(source)
            if source.move is not None:
                _refuse_elsewhere(source, there)
                if source.move.phase is MovePhase.LEFT and target is not None and not self._is_of(target, source):
                    raise FailedPrecondition(
                        f"volume {volume_id} was moved to {there.state_dir} and may have been used there since; move "
                        f"it back from there"
                    )
            if target is not None and self._is_of(target, source):
                _refuse_open(there, target)
                there.backend.delete(target.id)
            elif target is None and source.move is not None:
                there.backend.delete(source.move.volume_id)  # half made
            log.info("move given up", volume_id=volume_id, state_dir=str(there.state_dir))
            if source.move is None:
                return source
            return self.here.backend.update(msgspec.structs.replace(source, move=None))

    def _sweep(self, volume_id: str) -> None:
        """Remove what is left here of a volume that is not here any more: the move was cut in its very last step."""
        if shared(self.here.backend) is None and not self.here.backend.has(volume_id):
            with self.here.locks.hold(volume_id):
                self.here.backend.remove_orphans(volume_id)

    @contextmanager
    def _locked(
        self, volume_id: str, there: Place, place: VolumeParameters | None
    ) -> Iterator[tuple[VolumeRecord, VolumeRecord | None]]:
        """Both locks, and both records. Raises NotFound, VolumeBusy, FailedPrecondition, InvalidArgument."""
        if there.path == self.here.path:
            raise FailedPrecondition(
                f"{there.state_dir} is the state directory of the driver that has volume {volume_id}; name that of "
                f"another one"
            )
        if shared(self.here.backend) is not None:
            raise FailedPrecondition(
                f"volume {volume_id} is of the backend {self.here.backend.name}, which lies outside this node, and is "
                f"not moved away from there; copy what is in it to a new volume"
            )
        record = self.here.backend.get(volume_id)  # before a lock is made for what is not there
        other_id = id_there(record, there, place)
        with self.here.locks.hold(volume_id), there.locks.hold(other_id), self._workers.session():
            target = None
            with suppress(NotFound):
                target = there.backend.get(other_id)
            yield self.here.backend.get(volume_id), target

    def _copied(
        self,
        source: VolumeRecord,
        target: VolumeRecord | None,
        request: MoveRequest,
        there: Place,
        copier: MoveCopy,
        onlooker: Onlooker,
    ) -> tuple[VolumeRecord, VolumeRecord]:
        """The volume over there, whole, compared and durable, and both records, which say so."""
        _refuse_unsettled(source)
        refuse_half(self.here.backend, source)
        _refuse_open(self.here, source)
        with _held(self.here, source) as device, self.here.backend.open_storage(source.id) as storage:
            size = _size(source, device)
            source, target = self._begun(source, target, request, there, copier, onlooker, storage, size)

            def check(present: VolumeRecord) -> None:
                revision = self.here.backend.get(source.id).revision
                if move_of(present).source != f"{revision} {copying.stamp(storage)}":
                    raise Aborted(
                        f"volume {source.id} was written to while it was copied; end what writes to it, and run the "
                        f"same command again, which copies it anew"
                    )

            _refuse_open(there, target)
            with _held(there, target) as blank:
                target = copier.copy(target, storage, blank, check)
            with there.backend.open_storage(target.id) as copied:
                target = copier.compare(target, copied)
            self._refuse_different(target, there)
            copier.copy_header(source, target, self.here.backend)
            check(target)
        target = _advanced(there, target, MovePhase.ARRIVED)
        return _advanced(self.here, source, MovePhase.LEFT), target

    def _begun(
        self,
        source: VolumeRecord,
        target: VolumeRecord | None,
        request: MoveRequest,
        there: Place,
        copier: MoveCopy,
        onlooker: Onlooker,
        storage: Handle,
        size: int,
    ) -> tuple[VolumeRecord, VolumeRecord]:
        """Both records of a move that is under way: one that was cut, if nothing has changed since, or a new one."""
        stamp = copying.stamp(storage)
        other_id = id_there(source, there, request.place)
        parameters = placed(source, there, request.place or begun_place(target, there))
        if target is not None:
            if not self._is_of(target, source):
                raise AlreadyExists(
                    f"the driver with the state directory {there.state_dir} has a volume {target.id} already; it was "
                    f"left as it is, delete that first or choose another driver"
                )
            is_same = source.move is not None and source.move.id == move_of(target).id
            fits = (move_of(target).source, move_of(target).size) == (f"{source.revision} {stamp}", size)
            if is_same and fits and target.parameters == parameters and copier.is_still_of(target, storage):
                return source, target
            onlooker.tell(f"volume {source.id} was used since a part of it was copied, or is to go elsewhere: anew")
            there.backend.delete(target.id)
        move = Move(phase=MovePhase.LEAVING, id=str(uuid.uuid4()), other=there.path, volume_id=other_id)
        source = self.here.backend.update(msgspec.structs.replace(source, move=move))
        outside = shared(there.backend)
        coming = msgspec.structs.replace(
            source,
            id=other_id,
            capacity_bytes=_capacity(source, size),
            parameters=parameters,
            move=Move(
                phase=MovePhase.ARRIVING,
                id=move.id,
                other=self.here.path,
                volume_id=source.id,
                node=outside.own_node if outside is not None else "",
                source=f"{source.revision} {stamp}",
                size=size,
            ),
        )
        try:
            return source, copier.make(coming, size)
        except DriverError:
            attempt(self.here.backend.update, msgspec.structs.replace(source, move=None))
            raise

    def _refuse_different(self, target: VolumeRecord, there: Place) -> None:
        move = move_of(target)
        if move.compared == move.copied:
            return
        there.backend.delete(target.id)
        raise CommandFailed(
            f"what was read back of volume {target.id} in {there.state_dir} is not what was written: expected the "
            f"digest {move.copied.digest}, found {move.compared.digest}; the copy was removed and the volume is where "
            f"it was, check disks and memory"
        )

    def _ended(self, source: VolumeRecord, target: VolumeRecord | None, there: Place, *, keep: bool) -> VolumeRecord:
        """The volume over there, for use; what lies here goes, unless it is kept."""
        _refuse_elsewhere(source, there)
        if target is None or (target.name, target.created) != (source.name, source.created):
            raise FailedPrecondition(
                f"volume {source.id} was moved to {there.state_dir} and is not there any more; the old copy here was "
                f"left as it is: delete it, or, unless the volume was moved on from there, let it count again (--undo) "
                f"as it was when it was moved"
            )
        if target.move is not None:
            if target.move.id != move_of(source).id:
                raise away(target, target.move)
            target = there.backend.update(msgspec.structs.replace(target, move=None))
        self._keys.hand_over(source)
        if not keep:
            self.here.backend.delete(source.id)
        log.info("volume moved", volume_id=source.id, state_dir=str(there.state_dir), backend=there.backend.name)
        return target

    def _is_of(self, target: VolumeRecord, source: VolumeRecord) -> bool:
        """Whether it is a copy of that volume, or is to become one, that is not used there yet."""
        move = target.move
        return (
            move is not None
            and move.phase in (MovePhase.ARRIVING, MovePhase.ARRIVED)
            and (move.other, move.volume_id) == (self.here.path, source.id)
        )


@contextmanager
def _held(place: Place, record: VolumeRecord) -> Iterator[Handle]:
    """The volume's device, attached, and kept from every other user as long as it is held. Raises DeviceInUse."""
    with ExitStack() as stack:
        stack.callback(attempt, place.backend.detach, record.id)
        device = stack.enter_context(place.backend.attach(record.id, lasting=False))
        try:
            stack.callback(os.close, os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise DeviceInUse(
                f"the device {device} of volume {record.id} is in use by a mapping or mount that is not the driver's; "
                f"end that first"
            ) from None
        place.backend.guard(record.id)
        yield device


def _size(record: VolumeRecord, device: Handle) -> int:
    """Bytes that are copied: all of the device, as all behind the header is shown, and may have been written to."""
    present, wanted = blockdev.size_bytes(device.fd), record.capacity_bytes + _room_before(record)
    if present < wanted:
        raise DeviceShort(
            f"the device {device} of volume {record.id} is expected to have {wanted} bytes and has {present}; nothing "
            f"was copied, check its storage"
        )
    return present


def _room_before(record: VolumeRecord) -> int:
    """Bytes of the device before what a pod sees, or will see."""
    if record.encryption is None:
        return 0
    return record.luks.data_offset if record.luks else DATA_OFFSET


def _capacity(record: VolumeRecord, size: int) -> int:
    """What a pod saw of a device of `size` bytes: more than was asked for, where it is of whole extents."""
    sector = record.luks.sector_size if record.luks else 512
    shown = size - _room_before(record)
    return max(record.capacity_bytes, shown - shown % sector)


def _advanced(place: Place, record: VolumeRecord, phase: MovePhase) -> VolumeRecord:
    move = msgspec.structs.replace(move_of(record), phase=phase)
    return place.backend.update(msgspec.structs.replace(record, move=move))


def _refuse_coming(source: VolumeRecord) -> None:
    if source.move is not None and source.move.phase in (MovePhase.ARRIVING, MovePhase.ARRIVED):
        raise away(source, source.move)


def _refuse_elsewhere(source: VolumeRecord, there: Place) -> None:
    move = move_of(source)
    if move.other != there.path:
        raise FailedPrecondition(
            f"volume {source.id} is moved to the driver with the state directory {move.other}; name that by "
            f"--to-state-dir, and not {there.state_dir}"
        )


def _refuse_open(place: Place, record: VolumeRecord) -> None:
    present = place.presences.of(record.id, record)
    # A device that nobody has open goes by and by: no reason. Who has it open keeps it from being held.
    if present.stage is not None or present.mapping is not None or present.mounts or present.nodes:
        places = [mount.mount_point for mount in (*present.mounts, *present.nodes)]
        where = f" at {' and '.join(places)}" if places else ""
        raise DeviceInUse(
            f"volume {record.id} is in use{where} and only a closed one can be moved; end its pods, and unstage it if "
            f"Kubernetes does not"
        )


def _refuse_unsettled(record: VolumeRecord) -> None:
    """What the record alone says against it: only what is whole is moved, or what nobody ever staged."""
    where = f"volume {record.id}"
    refuse_changing(record)
    is_settled = msgspec.structs.replace(record, move=None).is_settled
    is_fresh = record.encryption in (None, EncryptionState.PREPARED) and record.file_system is FileSystemState.NONE
    if not is_settled and not is_fresh:
        raise FailedPrecondition(
            f"{where} is in the middle of its first stage (encryption {record.encryption or 'none'}, file system "
            f"{record.file_system}); stage it once more, so that it comes to its end, and unstage it"
        )
