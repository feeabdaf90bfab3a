"""One streaming pass from the payload of an image to a file, plain or encrypted, that a kill at any moment only delays.

What must hold at each moment is told in `csi_driver.images.checkpoint`: nothing is recorded before it is durable, and a
part that does not fit its checkpoint, or its source, is begun anew with a new volume key.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import msgspec

from csi_driver.images.base import ImageFormat, Progress, Reader
from csi_driver.images.checkpoint import (
    VERSION,
    Checkpoint,
    Job,
    Operation,
    Plan,
    SourceChanged,
    check_source,
    load_checkpoint,
    store_checkpoint,
)
from csi_driver.images.later import Later
from csi_driver.images.part_header import cipher_of, unlock, write_header
from csi_driver.images.stopping import Stop, Told, stop_signals, untold
from csi_driver.images.stream import (
    READ_BACK,
    USUAL_PACE,
    Checker,
    Chunk,
    Copier,
    Crew,
    Layout,
    Ledger,
    Pace,
    Worker,
    chunks_of,
)
from csi_driver.images.target import (
    BLOCK,
    Lock,
    NoRoom,
    PartFile,
    PassResult,
    Publish,
    Target,
    TargetFailed,
    hold,
    target_errors,
)
from csi_driver.luks.bulk import SectorCipher
from csi_driver.luks.formats import check_capacity
from csi_driver.luks.image_header import VolumeKey, padded
from csi_driver.model.errors import (
    DeadlineExceeded,
    DriverError,
    InvalidArgument,
    ResourceExhausted,
    Stopped,
)
from csi_driver.model.volume import LuksIdentity

_HEADER_SECONDS: Final = 10.0  # how long the end of a run waits for a header in the making
_THREADS_PER_CORE: Final = 4  # some wait for a disk while others compute
_MOST_THREADS: Final = 16  # each has a chunk in memory, and no disk keeps up with more

_PAYLOAD_IS_FILE: Final = (ImageFormat.RAW, ImageFormat.LUKS2)


def run_pass(
    reader: Reader,
    target: Target,
    job: Job,
    progress: Progress,
    *,
    threads: int | None = None,
    verify: bool = False,
    publish: Publish | None = None,
    pace: Pace = USUAL_PACE,
    stopping: Told = untold,
) -> PassResult:
    """Copy the payload of `reader` into the part of `target`, or go on where an earlier run was cut.

    `threads` is four per core, 16 at most, unless given. `verify` reads the finished part back from the disk and
    compares. `publish` is called with the result while the target is still locked. SIGINT and SIGTERM stop the pass
    behind a checkpoint, `stopping` is told; a second one stops it at once. An `ignore` copy of a whole file shares its
    blocks where the file system can, unless it is to be verified.

    Raises InvalidArgument (empty image, no key to encrypt with), OutOfRange (too long for the cipher), VolumeBusy,
    ResourceExhausted (no room; nothing is left but what an earlier run had begun), FailedPrecondition (the source was
    changed; nothing is left), CommandFailed (the target cannot be written, or reads back otherwise; nothing is left),
    with the part left to go on with: Unauthenticated (another passphrase than the part's), Stopped, DeviceUnreadable
    (source), DeadlineExceeded.
    """
    _check(reader, target, job)
    with hold(target, job.where) as lock:
        threads = threads or min(_THREADS_PER_CORE * len(os.sched_getaffinity(0)), _MOST_THREADS)
        result = _Pass(reader, target, job, progress, threads, pace, lock, verify=verify).run(stopping)
        if publish:
            publish(result)
        return result


def _check(reader: Reader, target: Target, job: Job) -> None:
    if not reader.size:
        raise InvalidArgument(f"{job.where} is empty; name an image with something in it")
    if (target.encryption is not None) != (job.operation.encrypts):
        wants = "needs the key of a secret" if target.encryption is None else "takes no key for its result"
        raise InvalidArgument(f"{job.operation} of {job.where} {wants}; name another operation or secret")
    if target.encryption:
        check_capacity(target.encryption.format.cipher, reader.size)


_Begun = tuple[PartFile, Checkpoint, SectorCipher | None]


class _Pass:
    """One run, under the target's lock."""

    def __init__(
        self,
        reader: Reader,
        target: Target,
        job: Job,
        progress: Progress,
        threads: int,
        pace: Pace,
        lock: Lock,
        *,
        verify: bool,
    ) -> None:
        self._reader = reader
        self._target = target
        self._job = job
        self._progress = progress
        self._threads = threads
        self._pace = pace
        self._lock = lock
        self._stop = Stop()
        self._header: Later[LuksIdentity] | None = None
        chosen = target.encryption.format if target.encryption else None
        self._plan = Plan(job.identity, job.source_format, job.operation, reader.size, pace.chunk, chosen, verify)
        self._layout = Layout(
            payload=reader.size,
            chunk=pace.chunk,
            offset=chosen.data_offset if chosen else 0,
            sector=chosen.sector_size if chosen else 1,
            stride=pace.stride,
            verify=verify,
        )

    def run(self, stopping: Told) -> PassResult:
        """All of it."""
        self._stop.told = stopping
        try:
            with contextlib.ExitStack() as stack:
                return self._run(stack)
        except (NoRoom, TargetFailed, SourceChanged):
            self._discard()
            raise
        finally:
            # Before the lock is let go: else it might write into the next run's part.
            if self._header is not None and not self._header.has_ended(_HEADER_SECONDS):
                self._lock.keep()

    def _run(self, stack: contextlib.ExitStack) -> PassResult:
        verify = self._plan.verify
        stack.enter_context(stop_signals(self._stop))
        found = self._resume(stack)
        if found is None and not verify and self._reflinked():
            return self._result(None, 0)
        part, checkpoint, cipher = found or self._begin(stack)
        resumed = checkpoint.chunks
        self._progress(min(resumed * self._layout.chunk, self._layout.payload))
        if resumed < self._layout.chunks:
            checkpoint = self._copy(part, checkpoint, cipher)
        check_source(self._job)
        part.set_size(self._layout.end)
        if verify and (wrong := self._differing(part, checkpoint, 0)) is not None:
            raise TargetFailed(
                f"the copy of {self._job.where} in {self._target.folder} reads back otherwise than it was written, at "
                f"byte {self._layout.place(wrong)}; it is removed, check that storage and the kernel log"
            )
        return self._result(checkpoint, resumed)

    def _result(self, checkpoint: Checkpoint | None, resumed: int) -> PassResult:
        return PassResult(
            part=self._target.part,
            size=self._layout.end,
            payload=self._layout.payload,
            luks=checkpoint.luks if checkpoint else None,
            resumed=resumed,
            reflinked=checkpoint is None,
        )

    def _resume(self, stack: contextlib.ExitStack) -> _Begun | None:
        """The part that is there, if it belongs to this very plan and its last durable chunks are what they were."""
        target = self._target
        with self._errors("read back"):
            checkpoint = load_checkpoint(target.checkpoint)
            if checkpoint is None or not self._plan.continues(checkpoint.plan) or not target.part.exists():
                return None
            checkpoint = msgspec.structs.replace(checkpoint, plan=self._plan)
        with contextlib.ExitStack() as mine:
            part = self._open(mine, new=False)
            if checkpoint.chunks > self._layout.chunks:
                return None
            cipher = None
            if target.encryption:
                key = unlock(self._job.where, target, target.encryption, part, checkpoint)
                if key is None:
                    return None
                with key:
                    cipher = cipher_of(target.encryption.format, key)
            if self._differing(part, checkpoint, max(checkpoint.first, checkpoint.chunks - READ_BACK)) is not None:
                return None
            self._check_room(part.allocated)
            stack.push(mine.pop_all())
            return part, checkpoint, cipher

    def _begin(self, stack: contextlib.ExitStack) -> _Begun:
        """A new part, reserved, and the checkpoint that says so; one with a header comes with the first chunks.

        Deriving a key takes a core for as long as encrypting a gigabyte does: the header is written meanwhile.
        """
        target = self._target
        with contextlib.ExitStack() as undo:
            part = self._make(undo)
            self._check_room(0)
            part.set_size(self._layout.end)
            cipher = None
            if target.encryption:
                part.reserve(0, self._layout.end)
                key = VolumeKey.fresh(target.encryption.format.key_bits)
                cipher = cipher_of(target.encryption.format, key)
                make = partial(write_header, self._job.where, target, target.encryption, self._layout.payload, key)
                self._header = Later("image-header", make, self._pace.patience)
            else:
                for extent in self._reader.extents():
                    if not extent.zero:
                        part.reserve(extent.offset, extent.length)
                part.sync()
            checkpoint = Checkpoint(VERSION, self._plan, None, b"", 0)
            if not target.encryption:
                self._store(checkpoint)
            undo.pop_all()
        stack.callback(part.close)
        return part, checkpoint, cipher

    def _make(self, undo: contextlib.ExitStack) -> PartFile:
        """An empty part in place of whatever was there; goes away with `undo`."""
        with self._errors("made"):
            self._target.discard()
            self._target.folder.mkdir(mode=0o700, exist_ok=True)
            undo.callback(self._discard)
            part = self._open(undo, new=True)
            self._target.files.sync_folder(self._target.folder)
            self._target.files.sync_folder(self._target.folder.parent)
        return part

    def _open(self, stack: contextlib.ExitStack, *, new: bool) -> PartFile:
        part = PartFile(self._target, self._job.where, new=new)
        stack.callback(part.close)
        return part

    def _identity(self) -> LuksIdentity | None:
        """That of the header, which is whole and durable then; without one nothing of the part stays."""
        if self._header is None:
            return None
        try:
            return self._header.result()
        except DriverError:
            self._discard()
            raise
        except TimeoutError:
            self._lock.keep()  # it may be written later
            raise DeadlineExceeded(
                f"the LUKS2 header of the copy of {self._job.where} in {self._target.folder} could not be written in "
                f"time; look at the kernel log and the storage, then run it again"
            ) from None

    def _reflinked(self) -> bool:
        """Whether an `ignore` copy of the whole file could be had for nothing."""
        job = self._job
        if job.operation is not Operation.IGNORE or job.source_format not in _PAYLOAD_IS_FILE:
            return False
        with contextlib.ExitStack() as undo:
            part = self._make(undo)
            if not part.reflink(job.source):
                return False
            part.set_size(self._layout.end)
            check_source(job)
            undo.pop_all()
            part.close()
        self._progress(self._layout.payload)
        return True

    def _check_room(self, present: int) -> None:
        needed = self._layout.end
        if not self._target.encryption:
            needed = sum(padded(extent.length, BLOCK) for extent in self._reader.extents() if not extent.zero)
        with self._errors("made"):
            free = self._target.disk.free(self._target.folder)
        if needed - present > free:
            raise ResourceExhausted(
                f"no room for {self._job.where} in {self._target.folder}: {needed - present} bytes are wanted and "
                f"{free} are free; free space there"
            )

    def _copy(self, part: PartFile, checkpoint: Checkpoint, cipher: SectorCipher | None) -> Checkpoint:
        """Copy the chunks that are not durable yet. Returns the checkpoint that says that all are."""
        layout, pace = self._layout, self._pace
        chunks = chunks_of(self._reader, layout, checkpoint.chunks, self._job.where)
        ledger = Ledger(layout, checkpoint)
        latest = time.monotonic()
        with self._crew(part, chunks, lambda: Copier(self._reader, part, layout, cipher)) as crew:
            try:
                while ledger.chunks < layout.chunks and not self._stop.name:
                    if end := crew.take():
                        ledger.add(*end)
                        self._progress(ledger.done)
                    fresh = (ledger.chunks - checkpoint.chunks) * layout.chunk
                    late = time.monotonic() - latest >= pace.checkpoint_seconds
                    if fresh and (late or fresh >= pace.checkpoint_bytes):
                        checkpoint = self._secure(part, checkpoint, ledger)
                        latest = time.monotonic()
                crew.stop()
                while end := crew.take():
                    ledger.add(*end)
            except (NoRoom, TargetFailed, SourceChanged, DeadlineExceeded):
                raise
            except DriverError:
                # The reader's. It may have stumbled over what was changed, which is looked at here too.
                crew.stop()
                for end in crew.rest():
                    ledger.add(*end)
                self._secure(part, checkpoint, ledger)
                raise
        checkpoint = self._secure(part, checkpoint, ledger)
        if ledger.chunks < layout.chunks:
            raise self._stopped(f"{checkpoint.chunks * layout.chunk * 100 // layout.payload} % of it are done")
        return checkpoint

    def _secure(self, part: PartFile, checkpoint: Checkpoint, ledger: Ledger) -> Checkpoint:
        """A checkpoint of the leading chunks in `ledger`, behind their bytes."""
        part.sync()
        check_source(self._job)
        checkpoint = msgspec.structs.replace(
            checkpoint, luks=self._identity() or checkpoint.luks, digests=bytes(ledger.digests), chunks=ledger.chunks
        )
        self._store(checkpoint)
        return checkpoint

    def _store(self, checkpoint: Checkpoint) -> None:
        with self._errors("made durable"):
            store_checkpoint(self._target.files, self._target.checkpoint, checkpoint)

    def _differing(self, part: PartFile, checkpoint: Checkpoint, first: int) -> int | None:
        """The first chunk from `first` on that the disk does not hold as it is recorded."""
        chunks = range(first, checkpoint.chunks)
        wrong = []
        with self._crew(part, map(Chunk, chunks), lambda: Checker(part, self._layout)) as crew:
            left = len(chunks)
            while left:
                if self._stop.name:
                    raise self._stopped("its copy is whole and not yet read back")
                if end := crew.take():
                    left -= 1
                    if checkpoint.digest(end[0]) != end[1]:
                        wrong.append(end[0])
        return min(wrong, default=None)

    @contextlib.contextmanager
    def _crew(self, part: PartFile, chunks: Iterator[Chunk], hire: Callable[[], Worker]) -> Iterator[Crew]:
        crew = Crew(chunks, hire, self._threads, self._pace.patience, self._job.where)
        try:
            with crew:
                yield crew
        finally:
            if crew.hanging:
                part.abandon()
                self._lock.keep()

    def _discard(self) -> None:
        with contextlib.suppress(OSError):  # the error that led here tells more
            self._target.discard()

    def _stopped(self, state: str) -> Stopped:
        job, name = self._job, self._stop.name
        return Stopped(f"{job.operation} of {job.where} was stopped by {name}: {state}; run it again to go on", name)

    def _errors(self, done: str) -> contextlib.AbstractContextManager[None]:
        return target_errors(self._job.where, self._target.folder, done)
