"""The bytes of a volume that is moved to another backend: made room for, copied, and compared by their digest."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from csi_driver.backends.base import Backend
from csi_driver.host import copying
from csi_driver.host.copying import Stretch
from csi_driver.host.handle import Handle
from csi_driver.host.locks import VolumeLocks
from csi_driver.host.workers import Workers
from csi_driver.images.base import Progress
from csi_driver.images.bring import Meter
from csi_driver.images.stopping import Stop
from csi_driver.model.errors import Aborted, CommandFailed, FailedPrecondition, ResourceExhausted, Stopped, VolumeBusy
from csi_driver.model.settings import Limits
from csi_driver.model.volume import Move, Span, VolumeRecord
from csi_driver.volumes.presence import Presences

STRETCH: Final = 64 << 20
"""Bytes that are read in one step, at whose end it is durable how far it came."""

_FULL_BYTES: Final = 16 << 20  # so little, and a device on it fails
_PAUSE: Final = 0.1


@dataclass(frozen=True)
class Place:
    """A driver of this node, by what its volumes are found and kept from others with."""

    state_dir: Path
    backend: Backend
    locks: VolumeLocks
    presences: Presences

    @property
    def path(self) -> str:
        """The state directory, by which the other driver's record names it."""
        return os.path.realpath(self.state_dir)


@dataclass(frozen=True)
class Onlooker:
    """`meter` shows each part of the work, `tell` gets what is worth knowing, `stop` asks for the end, `rate` is the
    most bytes per second.
    """

    meter: Meter
    tell: Callable[[str], None] = lambda _: None
    stop: Stop = field(default_factory=Stop)
    rate: int | None = None


class MoveCopy:
    """Fills a volume of `there`; its record says how far that came."""

    def __init__(self, there: Place, workers: Workers, limits: Limits, onlooker: Onlooker, stretch: int) -> None:
        self._there = there
        self._workers = workers
        self._limits = limits
        self._onlooker = onlooker
        self._stretch = stretch

    def make(self, target: VolumeRecord, size: int) -> VolumeRecord:
        """The blank volume, however many calls that takes. Raises ResourceExhausted, Stopped."""
        while True:
            try:
                return self._there.backend.create(target, size)
            except VolumeBusy:
                raise
            except Aborted as error:  # the next call goes on with it
                self._onlooker.tell(str(error))
                if name := self._onlooker.stop.name:
                    raise Stopped(f"{name} stopped it: {error}") from None

    def copy(
        self, target: VolumeRecord, storage: Handle, blank: Handle, check: Callable[[VolumeRecord], None]
    ) -> VolumeRecord:
        """Copy what is left to copy; `check` is told the target's record behind each step, before it counts.

        Raises DeviceUnreadable, DeviceShort, ResourceExhausted, CommandFailed, Stopped.
        """
        what, size = f"luks-copy of volume {target.id}", move_of(target).size
        with self._onlooker.meter(f"copying volume {target.id}", size) as progress:
            progress(move_of(target).copied.end)
            while (done := move_of(target).copied).end < size:
                begun = time.monotonic()
                try:
                    stretch = self._workers.call(
                        what,
                        self._limits.format_seconds,
                        copying.copy,
                        storage,
                        blank,
                        done.end,
                        size,
                        done.digest,
                        self._stretch,
                    )
                except CommandFailed as error:
                    raise self._told_full(target, error) from None
                check(target)
                target = self._noted(target, copied=Span(end=stretch.end, digest=stretch.digest))
                self._rest(stretch, size, begun, progress)
        return target

    def is_still_of(self, target: VolumeRecord, storage: Handle) -> bool:
        """Whether `storage` holds what was copied of it when the move was cut. Raises DeviceUnreadable, Stopped.

        It was free for everybody since. Of a file the stamp in the record tells; a device is read once more.
        """
        done = move_of(target).copied
        if copying.stamp_tells(storage) or not done.end:
            return True
        return self._read(f"looking again at volume {target.id}", target.id, storage, Span(), done.end) == done

    def compare(self, target: VolumeRecord, copied: Handle) -> VolumeRecord:
        """Read back what is left to compare. Raises DeviceUnreadable, DeviceShort, Stopped."""

        def note(done: Span) -> None:
            nonlocal target
            target = self._noted(target, compared=done)

        move = move_of(target)
        self._read(f"comparing volume {target.id}", target.id, copied, move.compared, move.size, note)
        return target

    def copy_header(self, source: VolumeRecord, target: VolumeRecord, backend: Backend) -> None:
        """The copy of its header goes along, if `backend` keeps one of the source. Raises ResourceExhausted."""
        if not backend.has_header_copy(source.id):
            return
        path = str(backend.header_copy(source.id))

        def fill(made: str) -> None:
            what = f"luks-backup of volume {target.id}"
            self._workers.call(what, self._limits.mount_seconds, copying.copy_file, path, made)

        self._there.backend.keep_header_copy(target.id, fill)

    def _read(
        self,
        title: str,
        volume_id: str,
        device: Handle,
        done: Span,
        size: int,
        note: Callable[[Span], None] = lambda _: None,
    ) -> Span:
        """What the device holds before `size`, of which `done` was read; `note` is told each step."""
        with self._onlooker.meter(title, size) as progress:
            progress(done.end)
            while done.end < size:
                begun = time.monotonic()
                stretch = self._workers.call(
                    f"luks-compare of volume {volume_id}",
                    self._limits.format_seconds,
                    copying.look,
                    device,
                    done.end,
                    size,
                    done.digest,
                    self._stretch,
                )
                done = Span(end=stretch.end, digest=stretch.digest)
                note(done)
                self._rest(stretch, size, begun, progress)
        return done

    def _noted(self, target: VolumeRecord, **done: Span) -> VolumeRecord:
        move = msgspec.structs.replace(move_of(target), **done)
        return self._there.backend.update(msgspec.structs.replace(target, move=move))

    def _told_full(self, target: VolumeRecord, error: CommandFailed) -> CommandFailed | ResourceExhausted:
        free = self._there.backend.space(target.parameters).free
        if free > _FULL_BYTES:
            return error
        return ResourceExhausted(
            f"{error}; the storage to which volume {target.id} is moved is full ({free} bytes are free), free space "
            f"there and run the same command again, which goes on"
        )

    def _rest(self, stretch: Stretch, size: int, begun: float, progress: Progress) -> None:
        """Tell how far it is, and leave the disks to others for as long as the rate wants. Raises Stopped."""
        progress(stretch.end)
        stop, rate = self._onlooker.stop, self._onlooker.rate
        until = begun + (stretch.read / rate if rate else 0.0)
        while not stop.name and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _PAUSE))
        if stop.name and stretch.end < size:
            raise Stopped(f"{stop.name} stopped it, {stretch.end * 100 // size} % are done; the same command goes on")


def move_of(record: VolumeRecord) -> Move:
    """The move that is under way. Raises FailedPrecondition where there is none."""
    if record.move is None:
        raise FailedPrecondition(f"volume {record.id} is not being moved to another backend; there is nothing to end")
    return record.move
