"""`make bench-images`: prints the table of the image engine; exits 1 when a bound is missed.

Ours is the whole command, `luks-csi image clone`, with the start of Python, the key derivation and every digest. Both
sides read and write the same disk, one after the other, in turns; what was read before is taken out of the page cache.
The tree of the commit before is in $BENCH_IMAGES_BASE. A peer that fails is tried again, then told; the run goes on.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.images_floor import floor, forget
from benchmarks.measure import footprint, seconds, side_by_side
from benchmarks.table import Row, fraction, table, times

_GIB = 1 << 30
_MIB = 1 << 20
_REPETITIONS = 7
_ATTEMPTS = 20  # qemu-img fails at once where it cannot measure the time of its key derivation
_READERS = 4
_PASSPHRASE = "a passphrase of the benchmarks"
_POLL_SECONDS = 0.02
_LUKS_CSI = str(Path(sys.executable).with_name("luks-csi"))

Clock = Callable[[Callable[[], object]], float]


class PeerFailed(Exception):
    """Another program than ours failed each time."""


class Bench:
    """Sources and results in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._state = folder / "state"
        self._secret = folder / "secret"
        self._secret.mkdir(parents=True)
        (self._secret / "CRYPTO_KEY_VALUE").write_text(_PASSPHRASE)
        # Modules compiled beforehand, as in an installed package, though the tree may be read-only.
        self._environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
            "PYTHONPYCACHEPREFIX": str(folder / "pycache"),
        }
        self._key = folder / "key"
        self._key.write_text(_PASSPHRASE)

    def source(self, name: str, size: int, data: int) -> Path:
        """A raw file of `size` bytes, the first `data` of them random and the rest a hole."""
        path = self._folder / name
        with path.open("wb") as file:
            for _ in range(data // _MIB):
                file.write(os.urandom(_MIB))
            file.truncate(size)
            os.fsync(file.fileno())
        return path

    def import_(self, path: Path, name: str) -> None:
        """Have it as an image, and the file no more."""
        self._luks_csi("import", str(path), name)

    def fill_holes(self, name: str, content: Path) -> None:
        """Have the zeros of an image as blocks: an import makes holes of them."""
        _run("cp", "--sparse=never", "--reflink=never", str(content), str(self.file(name)))
        _run("sync", str(self.file(name)))

    def clone(
        self, source: str, operation: str, *options: str, clock: Clock = seconds, tree: Path | None = None
    ) -> Callable[[], float]:
        """What it takes by `clock` to clone an image, with the code in `tree` if one is given; the result goes away."""

        def run() -> float:
            forget(self.file(source))
            taken = clock(lambda: self.make(source, "result", operation, *options, tree=tree))
            self.delete("result")
            return taken

        return run

    def make(self, source: str, name: str, operation: str, *options: str, tree: Path | None = None) -> None:
        """Clone an image."""
        secret = () if operation == "ignore" else ("--secret-dir", str(self._secret))
        self._luks_csi("clone", source, name, "--encryption", operation, *secret, *options, tree=tree)

    def import_packed(self, path: Path) -> Callable[[], float]:
        """How long it takes to import a packed image; the result goes away."""

        def run() -> float:
            forget(path)
            taken = seconds(lambda: self.import_(path, "result"))
            self.delete("result")
            return taken

        return run

    def unpack_and_copy(self, path: Path, program: str) -> Callable[[], float]:
        """How long `program` takes to unpack and cp to copy that."""
        unpacked = self._folder / "unpacked"

        def make(target: str) -> None:
            with unpacked.open("wb") as output:
                subprocess.run([program, "-d", "-q", "-c", str(path)], stdout=output, check=True, timeout=600)
            _run("cp", "--reflink=never", str(unpacked), target)
            unpacked.unlink()

        return self._other(path, make)

    def start(self) -> float:
        """Core-seconds of a command that does nothing."""
        return core_seconds(lambda: self._luks_csi("list"))

    def delete(self, name: str) -> None:
        """Remove an image."""
        self._luks_csi("delete", name, "--yes")

    def copy(self, source: Path) -> Callable[[], float]:
        """How long cp and fsync take."""
        return self._other(source, lambda target: _run("cp", "--sparse=never", "--reflink=never", str(source), target))

    def qemu_luks(self, source: Path) -> Callable[[], float]:
        """How long qemu-img takes to write its LUKS format."""
        secret = f"secret,id=key,file={self._key}"
        options = "key-secret=key,iter-time=10"
        return self._other(
            source,
            lambda target: _run(
                *(
                    "qemu-img",
                    "convert",
                    "--object",
                    secret,
                    "-f",
                    "raw",
                    "-O",
                    "luks",
                    "-o",
                    options,
                    str(source),
                    target,
                )
            ),
        )

    def copy_and_reencrypt(self, source: Path) -> Callable[[], float]:
        """How long cp takes and `cryptsetup reencrypt --encrypt` in place, with 16 MiB more at the end."""
        cheap = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")

        def run(target: str) -> None:
            _run("cp", "--sparse=never", "--reflink=never", str(source), target)
            os.truncate(target, os.path.getsize(target) + 32 * _MIB)
            _run(
                *(
                    "cryptsetup",
                    "reencrypt",
                    "--encrypt",
                    "-q",
                    "--type",
                    "luks2",
                    "--reduce-device-size",
                    "32M",
                    *cheap,
                ),
                *("--sector-size", "512", "--resilience", "none", "--key-file", str(self._key), target),
            )

        return self._other(source, run)

    def peaks(self, source: str) -> tuple[float, int]:
        """Peak memory in MiB of all processes of an encryption, and bytes on the disk besides source and result."""
        command = [
            *(_LUKS_CSI, "image", "clone", source, "result", "--encryption", "encrypt"),
            *("--state-dir", str(self._state), "--secret-dir", str(self._secret)),
        ]
        before = _used(self._state)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self._environment)
        memory, disk = 0.0, 0
        while process.poll() is None:
            try:
                memory = max(memory, footprint(process.pid).memory)
            except OSError:
                continue  # it has just ended
            disk = max(disk, _used(self._state) - before)
            time.sleep(_POLL_SECONDS)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        result = _used(self._state) - before
        self.delete("result")
        return memory, max(0, disk - result)

    def _other(self, source: Path, make: Callable[[str], None]) -> Callable[[], float]:
        target = self._folder / "other"

        def run() -> float:
            forget(source)

            def work() -> None:
                make(str(target))
                _run("sync", str(target))

            failed = ""
            for _ in range(_ATTEMPTS):
                try:
                    return seconds(work)
                except subprocess.CalledProcessError as error:
                    failed = f"{error.cmd[0]} ended with {error.returncode}: {str(error.stderr or '').strip()}"
                finally:
                    target.unlink(missing_ok=True)
            raise PeerFailed(failed)

        return run

    def file(self, name: str) -> Path:
        """The file of an image."""
        return self._state / "images" / "ready" / name / "image"

    def _luks_csi(self, *arguments: str, tree: Path | None = None) -> None:
        environment = {**self._environment, **({"PYTHONPATH": str(tree)} if tree else {})}
        _run(_LUKS_CSI, "image", *arguments, "--state-dir", str(self._state), environment=environment)


Maker = Callable[[], Row]


def rows(folder: Path) -> Iterator[Maker]:
    """All of the table, a function for each row; the sources of a row are there until the next one is asked for."""
    bench = Bench(folder)
    base = Path(os.environ["BENCH_IMAGES_BASE"])
    raw = bench.source("random.raw", 2 * _GIB, 2 * _GIB)
    bench.import_(raw, "random")
    raw.unlink()
    for sector in ("512", "4096"):
        size = ("--sector-size", sector)
        ours = bench.clone("random", "encrypt", *size, clock=core_seconds)
        theirs = bench.clone("random", "encrypt", *size, clock=core_seconds, tree=base)
        yield _beside(
            f"encrypt, 2 GiB, sectors of {sector}: core-seconds, against the commit before", ours, theirs, 0.6
        )
    yield from _against_cp(bench, "random", "2 GiB", 1.0)
    raw = bench.file("random")
    encrypt = bench.clone("random", "encrypt")
    yield _faster("encrypt, against qemu-img convert -O luks", encrypt, bench.qemu_luks(raw), 6.5)
    yield _faster("encrypt, against cp + cryptsetup reencrypt --encrypt", encrypt, bench.copy_and_reencrypt(raw), 1.7)
    qcow2 = folder / "random.qcow2"
    _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(qcow2))
    bench.import_(qcow2, "qcow2")
    qcow2.unlink()
    yield _beside("encrypt, the same content as qcow2, against raw", bench.clone("qcow2", "encrypt"), encrypt, 1.4)
    packed = bench.peaks("qcow2")[0]
    for name in ("qcow2", "random"):
        bench.delete(name)

    half = bench.source("half.raw", _GIB, _GIB // 2)
    for program, suffix, level in (("zstd", "zst", "-1"), ("xz", "xz", "-0")):
        path = half.with_suffix(f".{suffix}")
        with path.open("wb") as output:
            subprocess.run([program, level, "-T0", "-q", "-c", str(half)], stdout=output, check=True, timeout=600)
        peer = bench.unpack_and_copy(path, program)
        yield _beside(f"import of a .{suffix}, 1 GiB, against {program} -d + cp", bench.import_packed(path), peer, 1.1)
        path.unlink()
    half.unlink()

    holes = bench.source("holes.raw", 2 * _GIB, 2 * _GIB // 10)
    bench.import_(holes, "holes")
    zeros = folder / "zeros.raw"
    _run("cp", "--sparse=never", "--reflink=never", str(holes), str(zeros))
    bench.import_(zeros, "zeros")
    bench.fill_holes("zeros", zeros)
    yield _beside("encrypt, 2 GiB of which 90 % are holes, against the zeros written out",
                  bench.clone("holes", "encrypt"), bench.clone("zeros", "encrypt"), 1.0)  # fmt: skip
    for path, name in ((holes, "holes"), (zeros, "zeros")):
        path.unlink()
        bench.delete(name)

    path = bench.source("8.raw", 8 * _GIB, 8 * _GIB)
    bench.import_(path, "large")
    path.unlink()
    yield from _against_cp(bench, "large", "8 GiB", 0.9)
    bench.delete("large")

    yield from _peaks(bench, packed)


def _peaks(bench: Bench, packed: float) -> Iterator[Maker]:
    peaks = {}
    for gib in (1, 8):
        path = bench.source(f"{gib}.raw", gib * _GIB, _GIB)
        bench.import_(path, f"size-{gib}")
        path.unlink()
        peaks[gib] = bench.peaks(f"size-{gib}")
        bench.delete(f"size-{gib}")
    yield lambda: _mib("encrypt 8 GiB: memory of all processes at its peak", peaks[8][0], 110)
    yield lambda: Row(
        "encrypt 8 GiB: the same against 1 GiB", _in_mib(peaks[8][0]), _in_mib(peaks[1][0]),
        peaks[8][0] / peaks[1][0], 1.1,
    )  # fmt: skip
    yield lambda: _mib("encrypt 2 GiB qcow2: memory of all processes, qemu-nbd's too", packed, 250)
    yield lambda: _mib("encrypt 8 GiB: temporary disk space", peaks[8][1] / _MIB, 1)


def _against_cp(bench: Bench, name: str, size: str, bound: float) -> Iterator[Maker]:
    raw = bench.file(name)
    for sector in ("512", "4096"):
        encrypt = bench.clone(name, "encrypt", "--sector-size", sector)
        yield _beside(f"encrypt, {size} random raw, sectors of {sector}, against cp + fsync",
                      encrypt, bench.copy(raw), bound)  # fmt: skip
        bench.make(name, "encrypted", "encrypt", "--sector-size", sector)
        decrypt = bench.clone("encrypted", "decrypt")
        yield _beside(f"decrypt, {size}, sectors of {sector}, against cp + fsync", decrypt, bench.copy(raw), bound)
        bench.delete("encrypted")


def _beside(what: str, ours: Callable[[], float], other: Callable[[], float], bound: float) -> Maker:
    return lambda: times(what, *_turns(ours, other), bound)


def _faster(what: str, ours: Callable[[], float], other: Callable[[], float], most: float) -> Maker:
    return lambda: fraction(what, *_turns(ours, other), most)


def _mib(what: str, value: float, bound: float) -> Row:
    return Row(what, _in_mib(value), "", value, bound, _in_mib)


_in_mib = "{:.0f} MiB".format


def _turns(ours: Callable[[], float], other: Callable[[], float]) -> tuple[Sequence[float], Sequence[float]]:
    return side_by_side(_REPETITIONS, ours, other, warm_up=1)


def core_seconds(call: Callable[[], object]) -> float:
    """User and system time of the processes that `call` starts and waits for."""

    def spent() -> float:
        found = resource.getrusage(resource.RUSAGE_CHILDREN)
        return found.ru_utime + found.ru_stime

    before = spent()
    call()
    return spent() - before


def _run(*command: str, environment: Mapping[str, str] | None = None) -> None:
    output = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600, env=environment)
    if output.returncode:
        raise subprocess.CalledProcessError(output.returncode, command, output.stdout, output.stderr)


def _used(folder: Path) -> int:
    """Bytes that the files below a folder take of the disk."""
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(at, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def main() -> int:
    """Measure all rows; returns the exit code."""
    failed: list[str] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("MACHINE_STATE"), prefix="bench-images-") as folder:
        found = []
        for make in rows(Path(folder)):
            try:
                row = make()
            except PeerFailed as error:
                failed.append(f"a row was not measured, {_ATTEMPTS} times {error}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            print(f"{row.what}: {row.ours}, {row.other}: {row.cells()[3]}", file=sys.stderr, flush=True)
            found.append(row)
        told = list(floor(Path(folder), 2 * _GIB, _READERS, Bench(Path(folder) / "start").start))
    for line in (*table(found), *told, *failed):
        print(line)
    return 0 if all(row.met for row in found) and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
