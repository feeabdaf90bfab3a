"""`make images-kills`: kill -9 at random moments of each operation, then completion by the same call again.

A moment lies in the beginning (header, reservation), in the work (more often late, behind a checkpoint), or in the end
(sync, rename). Lost is a run after which the result is not the disk, byte for byte, in the open mapping where it is
encrypted; in which something shows or stays that is not whole; or that does not notice that the source was changed,
between two runs or within one. Also a qemu-nbd that outlives who started it counts.

SEED draws the same again; COUNT is the kills of each operation (50).
"""

import contextlib
import gzip
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

from csi_driver.images.base import MIB, Progress
from csi_driver.images.checkpoint import Operation
from csi_driver.images.library import ImageLibrary
from csi_driver.images.requests import Clone, Import
from csi_driver.keys.secret import SecretKey
from csi_driver.model.errors import DriverError
from csi_driver.model.secret import Passphrase
from tests.machine.image_lab import (
    converted,
    digest_of,
    files_below,
    make_disk,
    opened,
    unmetered,
    unpacked,
    wanted,
    work_folder,
)
from tests.machine.leaks import adopting_orphans, children, orphans, settled

COUNT: Final = 50
SIZE: Final = 272 * MIB + 512
"""More than the 256 MiB between two checkpoints: a killed run is gone on with, if it came so far."""

_PATIENCE: Final = 300.0
_MOST_IN_A_ROW: Final = 4
_CHANGED_EVERY: Final = 12  # kills
_MADE: Final = "made"
_OLD, _NEW = b"the passphrase of the image", b"another one"
_IMPORT: Final = "import"
OPERATIONS: Final = (_IMPORT, *(each.value for each in Operation))


class Lost(Exception):
    """What must not be."""


class Phase(StrEnum):
    """A part of a run, with its weight in the draw."""

    BEGIN = "begin"
    WORK = "work"
    END = "end"


_WEIGHTS: Final = {Phase.BEGIN: 3, Phase.WORK: 5, Phase.END: 2}


@dataclass(frozen=True)
class Moment:
    """`part` of a phase: of its seconds, or of the bytes of the work."""

    phase: Phase
    part: float

    @classmethod
    def draw(cls, chooser: random.Random) -> "Moment":
        phase = chooser.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        return cls(phase, chooser.random() ** (0.3 if phase is Phase.WORK else 1))


@dataclass
class Result:
    """What came of all runs; each entry of `lost` is a sentence. `late` kills found the image complete."""

    kills: int = 0
    late: int = 0
    completed: int = 0
    resumed: int = 0
    changed: int = 0
    lost: list[str] = field(default_factory=list)


@dataclass
class Times:
    """Seconds that a whole run takes to its first byte, and from its last one to its end."""

    begin: float = 0.0
    end: float = 0.0


class Run:
    """A child at work on an operation; it tells how many bytes are done, and its error if it ends in one.

    It stops itself (SIGSTOP) when `stand_at` bytes are done: who is to stop it from outside may come too late.
    """

    def __init__(self, work: Callable[[Progress], None], stand_at: int | None = None) -> None:
        self._pipe, theirs = os.pipe()
        self._text = b""
        self.first: int | None = None
        self.done = 0
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                os.close(self._pipe)
                _child(work, theirs, stand_at)
            os._exit(2)
        os.close(theirs)

    def wait(self, seconds: float, *, to: int | None = None) -> bool:
        """Follow it until it is over or has done `to` bytes, at most for some seconds; whether it is over."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and (to is None or self.first is None or self.done < to):
            if select.select([self._pipe], [], [], left)[0]:
                piece = os.read(self._pipe, 1 << 16)
                if not piece:
                    return True
                self._text += piece
                *lines, self._text = self._text.split(b"\n")
                for line in filter(bytes.isdigit, lines):
                    self.done = int(line)
                    self.first = self.done if self.first is None else self.first
        return False

    def wait_until_it_stands(self) -> None:
        """Raises Lost when it is over instead."""
        found = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if found is None or found.si_code != os.CLD_STOPPED:
            code, said = self.end()
            raise Lost(f"a run that was to stand was over with {code}: {said}")

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> tuple[int, str]:
        """Its exit code, negative for a signal, and what it said at last."""
        if not self.wait(_PATIENCE):
            self.send(signal.SIGKILL)
        os.close(self._pipe)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), self._text.decode(errors="replace")


def _child(work: Callable[[Progress], None], pipe: int, stand_at: int | None) -> None:
    """What a run does; it never returns."""
    before = -1

    def tell(done: int) -> None:
        nonlocal before
        os.write(pipe, b"%d\n" % done)
        if stand_at is not None and before < stand_at <= done:
            os.kill(os.getpid(), signal.SIGSTOP)
        before = done

    try:
        work(tell)
    except DriverError as error:
        os.write(pipe, str(error).encode())
        os._exit(1)
    except BaseException:  # noqa: BLE001 - it is told
        os.write(pipe, traceback.format_exc().replace("\n", " | ").encode())
        os._exit(2)
    os._exit(0)


Build = Callable[[Path], ImageLibrary]


class Lab:
    """A library in `folder` with the sources of each operation, made of a disk of `size` bytes."""

    def __init__(self, folder: Path, seed: int, size: int = SIZE, build: Build = ImageLibrary) -> None:
        self._folder = folder
        self._images = folder / "images"
        self._library = build(self._images)
        self._draw = random.Random(seed)
        self._size = size
        self._known = children()
        # The quickest of the key derivations that a secret can ask for.
        self._old, self._new = (SecretKey(Passphrase(text), hash="sha512", pbkdf="pbkdf2") for text in (_OLD, _NEW))
        self.result = Result()
        disk = make_disk(folder / "disk", size, seed)
        self._digest = digest_of(disk)
        self._packed = folder / "disk.gz"
        with disk.open("rb") as plain, gzip.open(self._packed, "wb", compresslevel=1) as packed:
            shutil.copyfileobj(plain, packed, MIB)
        for kind in ("raw", "qcow2"):
            self._library.import_(Import(kind, str(converted(disk, kind))), unmetered)
        self._library.clone(Clone("raw", "secret", Operation.ENCRYPT, None, self._old), unmetered)

    def try_operation(self, operation: str, count: int) -> None:
        """Kill it that often, each few times followed by a completion; what is lost is told on standard error."""
        times = self._measure(operation)
        goal, changes = self.result.kills + count, 0
        while self.result.kills < goal:
            start, before = self.result.kills, self.result.late
            try:
                for _ in range(min(self._draw.randint(1, _MOST_IN_A_ROW), goal - self.result.kills)):
                    self._kill(operation, times)
                overdue = changes * _CHANGED_EVERY <= count - (goal - self.result.kills)
                if overdue and self.result.late == before:
                    changes += 1
                    self._complete_changed(operation)
                    self._change_meanwhile(operation)
                else:
                    self._complete(operation, self._digest)
            except Lost as lost:
                self.result.lost.append(f"{operation}, after kill {start + 1}: {lost}")
                print(f"lost: {self.result.lost[-1]}", file=sys.stderr, flush=True)
                self._clear()

    def _work(self, operation: str) -> Callable[[Progress], None]:
        def work(progress: Progress) -> None:
            @contextlib.contextmanager
            def meter(what: str, total: int | None) -> Iterator[Progress]:  # noqa: ARG001 - the Protocol names them
                yield progress

            if operation == _IMPORT:
                self._library.import_(Import(_MADE, str(self._packed)), meter)
            else:
                self._library.clone(wanted(Operation(operation), _MADE, self._old, self._new), meter)

        return work

    def _source(self, operation: str) -> Path:
        if operation == _IMPORT:
            return self._packed
        return self._library.file(wanted(Operation(operation), _MADE, self._old, self._new).source)

    def _total(self, operation: str) -> int:
        """Bytes that a whole run says to have done at last."""
        return self._packed.stat().st_size if operation == _IMPORT else self._size

    def _measure(self, operation: str) -> Times:
        """Let it run undisturbed once."""
        times, started = Times(), time.monotonic()
        run = Run(self._work(operation))
        run.wait(_PATIENCE, to=0)
        times.begin = time.monotonic() - started
        run.wait(_PATIENCE, to=self._total(operation))
        started = time.monotonic()
        code, said = run.end()
        times.end = time.monotonic() - started
        if code:
            raise Lost(f"an undisturbed run ended with {code}: {said}")
        self._check(operation, self._digest)
        return times

    def _kill(self, operation: str, times: Times) -> None:
        """Begin or go on, and kill."""
        moment = Moment.draw(self._draw)
        run = Run(self._work(operation))
        match moment.phase:
            case Phase.BEGIN:
                run.wait(moment.part * times.begin)
            case Phase.WORK:
                run.wait(_PATIENCE, to=0)
                run.wait(_PATIENCE, to=run.done + int(moment.part * (self._total(operation) - run.done)))
            case Phase.END:
                run.wait(_PATIENCE, to=self._total(operation))
                run.wait(moment.part * times.end)
        run.send(signal.SIGKILL)
        code, said = run.end()
        self.result.kills += 1
        self._count(run)
        if code not in (0, -signal.SIGKILL):
            raise Lost(f"a run ended with {code} before it was killed: {said}")
        if _MADE in self._library.names():
            self.result.late += 1
            self._check(operation, self._digest, killed=True)
        if left := settled(lambda: orphans(self._known)):
            raise Lost(f"left running by a killed run: {'; '.join(left)}")

    def _complete(self, operation: str, digest: str) -> None:
        """Let it end: the result must be there and be the disk of that digest."""
        run = Run(self._work(operation))
        code, said = run.end()
        self._count(run)
        if code:
            raise Lost(f"the completion ended with {code}: {said}")
        self.result.completed += 1
        self._check(operation, digest)

    def _complete_changed(self, operation: str) -> None:
        """Let it end from a source that is not what it was when it was killed: the result must be of the new one."""
        if operation == _IMPORT:  # a gzip whose bytes were changed is refused; it is never gone on with
            self._complete(operation, self._digest)
            return
        with self._changed(operation):
            self._complete(operation, self._digest_of_source(operation))
            self.result.changed += 1

    def _change_meanwhile(self, operation: str) -> None:
        """Change the source within a run: that must end in the sentence that says so, and leave nothing."""
        run = Run(self._work(operation), self._total(operation) // 8)
        run.wait_until_it_stands()
        with self._changed(operation):
            run.send(signal.SIGCONT)
            code, said = run.end()
        if code != 1 or "changed" not in said:
            raise Lost(f"a source that was changed meanwhile was not noticed: {code} {said}")
        self._check_nothing_unfinished()
        self.result.changed += 1
        self._complete(operation, self._digest)

    @contextlib.contextmanager
    def _changed(self, operation: str) -> Iterator[None]:
        """Other bytes in the first chunk of the source's data, then the old ones again."""
        source = self._source(operation)
        at = {"secret": 17 * MIB, "qcow2": MIB}.get(source.parent.name, 4096)
        with source.open("r+b") as file:
            before = os.pread(file.fileno(), 512, at)
            os.pwrite(file.fileno(), bytes(byte ^ 0xFF for byte in before), at)
        try:
            yield
        finally:
            with source.open("r+b") as file:
                os.pwrite(file.fileno(), before, at)

    def _digest_of_source(self, operation: str) -> str:
        """Of the disk that the source is now, by others' programs."""
        source = self._source(operation)
        match Operation(operation):
            case Operation.IGNORE:
                return digest_of(source)
            case Operation.ENCRYPT:
                raw = unpacked(source, self._folder / "changed")
                digest = digest_of(raw)
                raw.unlink()
                return digest
            case _:
                with opened(source, _OLD) as mapping:
                    return digest_of(mapping)

    def _check(self, operation: str, digest: str, *, killed: bool = False) -> None:
        """The image is there, alone, and is the disk of that digest; it is deleted then.

        A run that was `killed` when it was there may have left its lock file, which goes with the image.
        """
        file = self._library.file(_MADE)
        if operation in (Operation.ENCRYPT, Operation.REENCRYPT):
            with opened(file, _NEW) as mapping:
                found = digest_of(mapping, self._size)
        else:
            found = digest_of(file)
        if found != digest:
            raise Lost(f"the result has the digest {found}, expected {digest}")
        if not killed:
            self._check_nothing_unfinished()
        self._library.delete(_MADE)
        self._check_nothing_unfinished()

    def _check_nothing_unfinished(self) -> None:
        folders = ("new/", "trash/")
        if left := [place for place in files_below(self._images) if place.startswith(folders) and place not in folders]:
            raise Lost(f"left behind: {', '.join(sorted(left))}")

    def _count(self, run: Run) -> None:
        self.result.resumed += bool(run.first)

    def _clear(self) -> None:
        with contextlib.suppress(DriverError):
            self._library.delete(_MADE)


def main() -> int:
    """Exit code 0 when nothing was lost, and kills came late enough for some runs to be gone on with."""
    seed = int(os.environ.get("SEED") or time.time_ns() % 100_000)
    count = int(os.environ.get("COUNT") or COUNT)
    started = time.monotonic()
    with adopting_orphans(), work_folder("kills-") as folder:
        lab = Lab(folder, seed)
        for operation in OPERATIONS:
            print(f"{count} kills of {operation}", file=sys.stderr, flush=True)
            lab.try_operation(operation, count)
    result = lab.result
    print(
        f"kills={result.kills} late={result.late} completed={result.completed} resumed={result.resumed} "
        f"changed={result.changed} lost={len(result.lost)} seconds={time.monotonic() - started:.0f} seed={seed}"
    )
    return int(bool(result.lost) or not result.resumed)


if __name__ == "__main__":
    sys.exit(main())
