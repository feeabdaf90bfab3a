"""Images to clone, and clones of them, in this process or in one that may be killed."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from csi_driver.images.base import MIB, Extent, ImageFormat, Reader
from csi_driver.images.checkpoint import Job, Operation, SourceIdentity
from csi_driver.images.checksum import Algorithm, Checksum
from csi_driver.images.clone import run_pass
from csi_driver.images.luks_reader import LuksReader
from csi_driver.images.source import RawReader
from csi_driver.images.stopping import Told, untold
from csi_driver.images.stream import Pace
from csi_driver.images.target import Disk, Encryption, PassResult, Target
from csi_driver.luks.formats import LuksFormat
from csi_driver.model.secret import Passphrase

WHERE = "image debian-12"
PASSPHRASE = Passphrase(b"correct horse battery staple")
OTHER_PASSPHRASE = Passphrase(b"another one")
CHEAP = LuksFormat(pbkdf="pbkdf2", iterations=1000, memory_kib=0)
SMALL = Pace(chunk=64 * 1024, stride=1, checkpoint_bytes=256 * 1024)
HEADER = 16 * MIB
ENCRYPTED = Encryption(CHEAP, PASSPHRASE)


def encrypted(passphrase: Passphrase = PASSPHRASE, **format: object) -> Encryption:
    """LUKS2 with a cheap key slot, but for what `format` says."""
    return Encryption(replace(CHEAP, **format), passphrase)  # type: ignore[arg-type]  # names as in LuksFormat


def make_source(path: Path, size: int, seed: int = 1) -> Path:
    """A raw image of `size` random bytes."""
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class WatchedReader:
    """A reader that tells `before` where it is asked to read."""

    def __init__(self, inner: Reader, before: Callable[[int], object]) -> None:
        self._inner = inner
        self._before = before

    @property
    def size(self) -> int:
        return self._inner.size

    def extents(self) -> Iterator[Extent]:
        return self._inner.extents()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._before(offset)
        self._inner.read_into(offset, buffer)

    def close(self) -> None:
        self._inner.close()


def sha256(content: bytes) -> Checksum:
    """Of a file with this content."""
    return Checksum(Algorithm.SHA256, hashlib.sha256(content).hexdigest())


def nothing(_: int) -> None:
    """A progress that nobody looks at."""


def clone(
    operation: Operation,
    source: Path,
    folder: Path,
    encryption: Encryption | None = None,
    *,
    progress: Callable[[int], object] = nothing,
    before: Callable[[int], object] = nothing,
    opened_by: Passphrase = PASSPHRASE,
    disk: Disk | None = None,
    source_format: ImageFormat = ImageFormat.RAW,
    pace: Pace = SMALL,
    threads: int = 2,
    verify: bool = False,
    stopping: Told = untold,
) -> PassResult:
    """One pass from `source`, read as `operation` asks for; `before` each read."""
    identity = SourceIdentity.of(source, WHERE)
    reader: Reader = RawReader(str(source), WHERE)
    if operation in (Operation.DECRYPT, Operation.REENCRYPT):
        reader = LuksReader(reader, opened_by, WHERE)
    with closing(WatchedReader(reader, before)) as watched:
        return run_pass(
            watched,
            Target(folder, encryption, disk=disk or Disk()),
            Job(operation, source, identity, source_format, WHERE),
            lambda done: (progress(done), None)[1],
            threads=threads,
            verify=verify,
            pace=pace,
            stopping=stopping,
        )


def decrypted(source: Path, folder: Path, passphrase: Passphrase = PASSPHRASE) -> str:
    """SHA-256 of what is inside an encrypted image."""
    result = clone(Operation.DECRYPT, source, folder, opened_by=passphrase)
    digest = digest_of(result.part)
    result.part.unlink()
    (folder / "checkpoint.json").unlink()
    return digest


def target_of(operation: Operation) -> Encryption | None:
    """How the result of `operation` is encrypted."""
    return {
        Operation.ENCRYPT: ENCRYPTED,
        Operation.REENCRYPT: encrypted(OTHER_PASSPHRASE, cipher="aes-cbc-essiv:sha256", key_bits=256),
    }.get(operation)


def child(operation: Operation, source: Path, folder: Path) -> subprocess.Popen[bytes]:
    """A process that makes that clone, a few chunks at a time; no reflink, so that there is something to kill."""
    arguments = [sys.executable, "-m", "tests.image_clones", operation, str(source), str(folder)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def kill(process: subprocess.Popen[bytes], after: float) -> int:
    """Kill a clone `after` seconds of work; returns how many bytes it said were done."""
    assert process.stdout is not None
    process.stdout.readline()  # it has begun
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    lines = process.stdout.read().split(b"\n")[:-1]
    return max((int(line) for line in lines if line.isdigit()), default=0)


def complete(operation: Operation, source: Path, folder: Path) -> int:
    """Let a clone end; returns how many chunks killed ones had made."""
    with child(operation, source, folder) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()
    return int(output.split()[-1])


class _NoReflink(Disk):
    def reflink(self, descriptor: int, source: int) -> bool:
        return False


def main() -> None:
    """The child: clone and print how far it is, at last how many chunks an earlier run had made."""
    operation, source, folder = Operation(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    print("begun", flush=True)

    def slowly(_: int) -> None:
        time.sleep(0.003)

    result = clone(
        operation,
        source,
        folder,
        target_of(operation),
        progress=lambda done: os.write(1, b"%d\n" % done),
        before=slowly,
        disk=_NoReflink(),
        verify=True,
    )
    print("resumed", result.resumed, flush=True)


if __name__ == "__main__":
    main()
