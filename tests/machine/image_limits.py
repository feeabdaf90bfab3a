"""`make images-limits`: several calls at once from one source, and disks without room, on a file system of their own.

At once: three encryptions of one image, then three decryptions of one result, all held in the middle of their work
until each of them is there. All must succeed, and what they made must be the disk, each behind a key of its own.

Full: the disk fills in the middle of each operation, on a file system that cannot reserve room. Short: it has too
little room from the start, and the kernel watches that nothing is written. Each must end in the sentence that says so
and leave nothing, neither a file nor a block; with room, the same call must succeed.

SEED draws another disk.
"""

import contextlib
import errno
import gzip
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from csi_driver.images.base import MIB, Progress
from csi_driver.images.bring import Meter
from csi_driver.images.checkpoint import Operation
from csi_driver.images.destinations import Connector
from csi_driver.images.library import ImageLibrary
from csi_driver.images.requests import Clone, Import
from csi_driver.keys.secret import SecretKey
from csi_driver.model.errors import DriverError, NotFound, ResourceExhausted
from csi_driver.model.secret import Passphrase
from tests.image_server import ImageServer, serving
from tests.machine.image_kills import Run
from tests.machine.image_lab import PROGRAM, converted, digest_of, files_below, opened, unmetered, wanted, work_folder
from tests.machine.leaks import adopting_orphans
from tests.machine.opens import Ran, run_watched
from tests.machine.processes import wait_for

SIZE: Final = 64 * MIB
AT_ONCE: Final = 3
FULL: Final = ("import", "unpack", "download", "export", *(each.value for each in Operation))
"""What can fill a disk."""

_PATIENCE: Final = 300.0
_HEADER: Final = 16 * MIB
_SPARE: Final = 2 * MIB  # more than folders, records and tables take
_OLD, _NEW = b"the passphrase of the image", b"another one"
_MADE: Final = "made"
_FULL: Final = re.compile(r"^no space (is left )?(for|to unpack) .*(free space there|make room)$")
_SHORT: Final = re.compile(
    r"^no room for image raw in .*: (\d+) bytes are wanted and (\d+) are free; free space there$"
)

Build = Callable[[Path], ImageLibrary]
Command = Callable[[list[str]], Ran]


def by_command(arguments: list[str]) -> Ran:
    """As a user does, and watched."""
    return run_watched([*PROGRAM, *arguments], _PATIENCE)


def libraries(folder: Path) -> ImageLibrary:
    """The real one; downloads from this machine are allowed."""
    return ImageLibrary(folder, Connector(allow_local=True))


class Wrong(Exception):
    """What must not be."""


@dataclass
class Result:
    """How much was tried; each entry of `wrong` is a sentence."""

    at_once: int = 0
    full: int = 0
    short: int = 0
    wrong: list[str] = field(default_factory=list)


class Lab:
    """Sources of all kinds in `folder`, of a disk of `size` bytes, and a small disk, mounted there for the results.

    `command` runs `luks-csi image` with these arguments.
    """

    def __init__(
        self, folder: Path, seed: int, size: int = SIZE, build: Build = libraries, command: Command = by_command
    ) -> None:
        self._folder = folder
        self._size = size
        self._command = command
        self._small = folder / "small"
        self._state = self._small / "state"
        self._images = self._state / "images"
        self._library = build(self._images)
        self._old, self._new = (SecretKey(Passphrase(text), hash="sha512", pbkdf="pbkdf2") for text in (_OLD, _NEW))
        self._disk = folder / "disk"
        self._disk.write_bytes(random.Random(seed).randbytes(size))
        self._digest = digest_of(self._disk)
        self._packed = folder / "disk.gz"
        self._packed.write_bytes(gzip.compress(self._disk.read_bytes(), 1))
        self._secret_dir = folder / "secret"
        self._secret_dir.mkdir()
        for entry, text in (("CRYPTO_KEY_VALUE", _NEW.decode()), ("CRYPTO_PBKDF", "pbkdf2")):
            (self._secret_dir / entry).write_text(text)
        self.result = Result()

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        """The small disk, with a raw, a qcow2 and an encrypted image in its library, and without extents (ext4(5)):
        fallocate(2) cannot reserve room there.
        """
        self._small.mkdir()
        backing = self._folder / "small.ext2"
        with backing.open("wb") as file:
            file.truncate(3 * self._size + (AT_ONCE + 2) * (self._size + _HEADER))
        _run("mkfs.ext2", "-q", "-F", "-m", "0", str(backing))
        _run("mount", "-o", "loop", str(backing), str(self._small))
        try:
            self._state.mkdir()
            for kind in ("raw", "qcow2"):
                self._library.import_(Import(kind, str(converted(self._disk, kind))), unmetered)
            self._library.clone(Clone("raw", "secret", Operation.ENCRYPT, None, self._old), unmetered)
            yield
        finally:
            _run("umount", str(self._small))

    def try_at_once(self, sources: Sequence[str] = ("raw", "qcow2")) -> None:
        """Encrypt each source several times at once, then decrypt one result several times at once."""
        for source in sources:
            with self._told(f"at once, {source}"):
                self._encrypt_at_once(source)
        with self._told("at once, secret"):
            names = self._at_once(lambda name: Clone("secret", name, Operation.DECRYPT, self._old))
            for name in names:
                if digest_of(self._library.file(name)) != self._digest:
                    raise Wrong(f"{name} is not the disk")
                self._library.delete(name)

    def try_full(self, names: Sequence[str] = FULL) -> None:
        """Fill the disk in the middle of each operation."""
        with serving(self._disk.read_bytes()) as server:
            works = self._works(server)
            for name in names:
                with self._told(f"full, {name}"):
                    self._fill_amidst(name, works[name])

    def try_short(self, operations: Sequence[Operation] = (Operation.IGNORE, Operation.ENCRYPT)) -> None:
        """Leave a block too little for a plain and an encrypted result."""
        for operation in operations:
            with self._told(f"short, {operation}"):
                self._begin_short(operation)

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except (Wrong, DriverError, AssertionError, subprocess.SubprocessError) as wrong:
            self.result.wrong.append(f"{what}: {wrong}")
            print(f"wrong: {self.result.wrong[-1]}", file=sys.stderr, flush=True)
            (self._small / _MADE).unlink(missing_ok=True)
            for name in {_MADE, *self._library.names()} - {"raw", "qcow2", "secret"}:
                with contextlib.suppress(NotFound):
                    self._library.delete(name)

    def _encrypt_at_once(self, source: str) -> None:
        names = self._at_once(lambda name: Clone(source, name, Operation.ENCRYPT, None, self._new))
        keys = set()
        for name in names:
            luks = self._library.get(name).luks
            keys.add(luks.digest if luks else None)
            with opened(self._library.file(name), _NEW) as mapping:
                if digest_of(mapping, self._size) != self._digest:
                    raise Wrong(f"{name} does not hold the disk")
        if len(keys) != len(names):
            raise Wrong("two of them have the same volume key")
        for name in names:
            self._library.delete(name)

    def _at_once(self, wanted: Callable[[str], Clone]) -> list[str]:
        """Processes that clone so, each begun before any of them goes on; returns the names of the results."""
        gate = self._folder / "gate"
        gate.unlink(missing_ok=True)

        def work(name: str, progress: Progress) -> None:
            def held(done: int) -> None:
                progress(done)
                wait_for(gate.exists, "the others", _PATIENCE)

            self._library.clone(wanted(name), _meter(held))

        names = [f"{_MADE}-{number}" for number in range(AT_ONCE)]
        runs = [Run(partial(work, name)) for name in names]
        over = [name for name, run in zip(names, runs, strict=True) if run.wait(_PATIENCE, to=0)]
        gate.touch()
        for name, run in zip(names, runs, strict=True):
            self.result.at_once += 1
            code, said = run.end()
            if code or name in over:
                raise Wrong(f"{name} of {AT_ONCE} at once ended with {code}: {said}")
        return names

    def _works(self, server: ImageServer) -> dict[str, Callable[[Meter], object]]:
        """By their names in FULL."""
        library, path = self._library, self._small / _MADE
        return {
            "import": lambda meter: library.import_(Import(_MADE, str(self._disk)), meter),
            "unpack": lambda meter: library.import_(Import(_MADE, str(self._packed)), meter),
            "download": lambda meter: library.import_(Import(_MADE, server.url()), meter),
            "export": lambda meter: library.export("raw", path, meter),
            **{each.value: partial(library.clone, wanted(each, _MADE, self._old, self._new)) for each in Operation},
        }

    def _fill_amidst(self, name: str, work: Callable[[Meter], object]) -> None:
        self.result.full += 1
        before = self._facts()
        ballast = self._small / "ballast"

        def fill(_: int) -> None:
            if not ballast.exists():
                try:
                    self._leave(ballast, self._size // 2)
                except OSError as error:  # the work goes on meanwhile, and may have taken what was to be left
                    if error.errno != errno.ENOSPC:
                        raise

        said = ""
        try:
            work(_meter(fill))
        except ResourceExhausted as full:
            said = str(full)
        ballast.unlink(missing_ok=True)
        if not _FULL.fullmatch(said):
            raise Wrong(f"it said {said!r}")
        self._check_same(before)
        work(unmetered)
        exported = self._small / _MADE
        file = exported if name == "export" else self._library.file(_MADE)
        self._check_whole(file, encrypted=name in (Operation.ENCRYPT, Operation.REENCRYPT))
        exported.unlink(missing_ok=True)
        if name != "export":
            self._library.delete(_MADE)
        self._check_same(before)

    def _begin_short(self, operation: Operation) -> None:
        """By the real command, as it is the kernel that tells what a process writes."""
        self.result.short += 1
        encrypts = operation is Operation.ENCRYPT
        words = ["raw", _MADE, "--encryption", operation.value]
        needed = self._size
        if encrypts:
            words += ["--secret-dir", str(self._secret_dir)]
            needed += _HEADER
        before = self._facts()
        ballast = self._small / "ballast"
        self._leave(ballast, needed - 4096)
        ran = self._command(["clone", *words, "--state-dir", str(self._state)])
        ballast.unlink()
        said = ran.errors.strip().splitlines()[-1:] or [""]
        found = _SHORT.fullmatch(said[0].removeprefix("luks-csi: "))
        if not ran.code or not found:
            raise Wrong(f"it ended with {ran.code} and said {said[0]!r}")
        if int(found[1]) != needed or not needed - _SPARE < int(found[2]) < needed:
            raise Wrong(f"it wanted {found[1]} bytes and saw {found[2]}, expected {needed} and a little less")
        if ran.opens.modified:
            raise Wrong(f"it wrote {', '.join(sorted(ran.opens.modified))}")
        self._check_same(before)

    def _check_whole(self, file: Path, *, encrypted: bool) -> None:
        with opened(file, _NEW) if encrypted else contextlib.nullcontext(file) as inside:
            if digest_of(inside, self._size) != self._digest:
                raise Wrong(f"{file} does not hold the disk")

    def _leave(self, ballast: Path, wanted: int) -> None:
        """Fill the small disk until only `wanted` bytes are free."""
        with ballast.open("wb") as file:
            while (most := self._free() - wanted) > 0:
                file.write(bytes(min(most, MIB)))
                file.flush()
                os.fsync(file.fileno())

    def _free(self) -> int:
        found = os.statvfs(self._small)
        return found.f_bavail * found.f_frsize

    def _facts(self) -> tuple[set[str], int]:
        """All files of the small disk, and its free bytes."""
        os.sync()
        return files_below(self._small), self._free()

    def _check_same(self, before: tuple[set[str], int]) -> None:
        after = self._facts()
        if left := after[0] - before[0]:
            raise Wrong(f"left behind: {', '.join(sorted(left))}")
        if after[1] < before[1]:
            raise Wrong(f"{before[1] - after[1]} bytes are not free any more")


def _meter(progress: Progress) -> Meter:
    @contextlib.contextmanager
    def meter(what: str, total: int | None) -> Iterator[Progress]:  # noqa: ARG001 - the Protocol names them
        yield progress

    return meter


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, timeout=_PATIENCE, stdin=subprocess.DEVNULL, capture_output=True)


def main() -> int:
    """Exit code 0 when everything was as it must be."""
    seed = int(os.environ.get("SEED") or time.time_ns() % 100_000)
    started = time.monotonic()
    with adopting_orphans(), work_folder("limits-") as folder:
        lab = Lab(folder, seed)
        with lab.mounted():
            lab.try_at_once()
            lab.try_full()
            lab.try_short()
    result = lab.result
    print(
        f"at-once={result.at_once} full={result.full} short={result.short} wrong={len(result.wrong)} "
        f"seconds={time.monotonic() - started:.0f} seed={seed}"
    )
    return int(bool(result.wrong))


if __name__ == "__main__":
    sys.exit(main())
