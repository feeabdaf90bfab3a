"""`make bench-images`: prints the table of the image engine; exits 1 when a bound is missed.

Ours is the whole command, `luks-csi image clone`, with the start of Python, the key derivation and every digest. Both
sides read and write the same disk, one after the other, in turns; what was read before is taken out of the page cache.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.measure import footprint, side_by_side
from benchmarks.table import Row, fraction, table, times

_GIB = 1 << 30
_MIB = 1 << 20
_REPETITIONS = 5
_PASSPHRASE = "a passphrase of the benchmarks"
_POLL_SECONDS = 0.02
_LUKS_CSI = str(Path(sys.executable).with_name("luks-csi"))


class Bench:
    """Sources and results in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._state = folder / "state"
        self._secret = folder / "secret"
        self._secret.mkdir()
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
        _run("cp", "--sparse=never", "--reflink=never", str(content), str(self._file(name)))
        _run("sync", str(self._file(name)))

    def clone(self, source: str, operation: str, *options: str) -> Callable[[], float]:
        """How long it takes to clone an image; the result goes away."""

        def run() -> float:
            self._forget(self._file(source))
            taken = _seconds(lambda: self.make(source, "result", operation, *options))
            self.delete("result")
            return taken

        return run

    def make(self, source: str, name: str, operation: str, *options: str) -> None:
        """Clone an image."""
        secret = () if operation == "ignore" else ("--secret-dir", str(self._secret))
        self._luks_csi("clone", source, name, "--encryption", operation, *secret, *options)

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
            self._forget(source)

            def work() -> None:
                make(str(target))
                _run("sync", str(target))

            taken = _seconds(work)
            target.unlink()
            return taken

        return run

    def _file(self, name: str) -> Path:
        return self._state / "images" / "ready" / name / "image"

    def _luks_csi(self, *arguments: str) -> None:
        _run(_LUKS_CSI, "image", *arguments, "--state-dir", str(self._state), environment=self._environment)

    @staticmethod
    def _forget(path: Path) -> None:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rows(folder: Path) -> Iterator[Row]:
    """All of the table."""
    bench = Bench(folder)
    raw = bench.source("random.raw", 2 * _GIB, 2 * _GIB)
    bench.import_(raw, "random")
    for sector, bound in (("512", 1.5), ("4096", 1.3)):
        encrypt = bench.clone("random", "encrypt", "--sector-size", sector)
        yield times(f"encrypt, 2 GiB random raw, sectors of {sector}, against cp + fsync",
                    *_turns(encrypt, bench.copy(raw)), bound)  # fmt: skip
        bench.make("random", "encrypted", "encrypt", "--sector-size", sector)
        yield times(f"decrypt, 2 GiB, sectors of {sector}, against cp + fsync",
                    *_turns(bench.clone("encrypted", "decrypt"), bench.copy(raw)), bound)  # fmt: skip
        bench.delete("encrypted")
    encrypt = bench.clone("random", "encrypt")
    yield fraction("encrypt, against qemu-img convert -O luks", *_turns(encrypt, bench.qemu_luks(raw)), 2.5)
    yield fraction("encrypt, against cp + cryptsetup reencrypt --encrypt",
                   *_turns(encrypt, bench.copy_and_reencrypt(raw)), 1.7)  # fmt: skip
    qcow2 = folder / "random.qcow2"
    _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(qcow2))
    raw.unlink()
    bench.import_(qcow2, "qcow2")
    qcow2.unlink()
    yield times("encrypt, the same content as qcow2, against raw",
                *_turns(bench.clone("qcow2", "encrypt"), encrypt), 1.4)  # fmt: skip
    packed = bench.peaks("qcow2")[0]
    for name in ("qcow2", "random"):
        bench.delete(name)

    holes = bench.source("holes.raw", 2 * _GIB, 2 * _GIB // 10)
    bench.import_(holes, "holes")
    zeros = folder / "zeros.raw"
    _run("cp", "--sparse=never", "--reflink=never", str(holes), str(zeros))
    bench.import_(zeros, "zeros")
    bench.fill_holes("zeros", zeros)
    yield times("encrypt, 2 GiB of which 90 % are holes, against the zeros written out",
                *_turns(bench.clone("holes", "encrypt"), bench.clone("zeros", "encrypt")), 1.0)  # fmt: skip
    for path, name in ((holes, "holes"), (zeros, "zeros")):
        path.unlink()
        bench.delete(name)

    peaks = {}
    for gib in (1, 8):
        path = bench.source(f"{gib}.raw", gib * _GIB, _GIB)
        bench.import_(path, f"size-{gib}")
        path.unlink()
        peaks[gib] = bench.peaks(f"size-{gib}")
        bench.delete(f"size-{gib}")
    mib = "{:.0f} MiB".format
    yield Row("encrypt 8 GiB: memory of all processes at its peak", mib(peaks[8][0]), "", peaks[8][0], 250, mib)
    yield Row(
        "encrypt 8 GiB: the same against 1 GiB", mib(peaks[8][0]), mib(peaks[1][0]), peaks[8][0] / peaks[1][0], 1.1
    )
    yield Row("encrypt 2 GiB qcow2: memory of all processes, qemu-nbd's too", mib(packed), "", packed, 250, mib)
    yield Row("encrypt 8 GiB: temporary disk space", mib(peaks[8][1] / _MIB), "", peaks[8][1] / _MIB, 1, mib)


def _turns(ours: Callable[[], float], other: Callable[[], float]) -> tuple[Sequence[float], Sequence[float]]:
    return side_by_side(_REPETITIONS, ours, other, warm_up=1)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


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
    with tempfile.TemporaryDirectory(dir=os.environ.get("MACHINE_STATE"), prefix="bench-images-") as folder:
        found = []
        for row in rows(Path(folder)):
            print(f"{row.what}: {row.ours}, {row.other}: {row.cells()[3]}", file=sys.stderr, flush=True)
            found.append(row)
    for line in table(found):
        print(line)
    return 0 if all(row.met for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
