"""`make images-random`: images that qemu makes with options drawn at random, byte for byte against `qemu-img convert`.

All that these formats can be is drawn: cluster, grain and block sizes, extended L2 entries, compression, snapshots,
bitmaps, preallocation, and writes, zeros and discards afterwards. Each is imported and read as a clone reads it.

SEED and COUNT choose: COUNT images (1000), drawn with SEED. Needs root, for the sandbox of qemu-nbd.
"""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from csi_driver.images.base import MIB, ImageFormat, Reader
from csi_driver.images.library import ImageLibrary
from csi_driver.images.qemu import QemuReader
from csi_driver.images.requests import Import
from csi_driver.images.source import RawReader
from csi_driver.images.store import ImageRecord
from csi_driver.model.errors import DriverError
from tests.machine.image_lab import make_disk, unmetered, work_folder

COUNT: Final = 1000

_KIB: Final = 1024
_SECONDS: Final = 300
_PIECE: Final = MIB
Open = Callable[[ImageRecord, Path], Reader]


@dataclass(frozen=True)
class Image:
    """What to make: qemu's name of the format, its options, whether it is compressed, and what is done to it then."""

    number: int
    format: str
    size: int
    options: tuple[str, ...]
    compressed: bool = False
    changes: tuple[str, ...] = ()
    snapshot: bool = False
    bitmap: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("compressed", "snapshot", "bitmap") if getattr(self, name)]
        return f"image {self.number} ({' '.join((self.format, str(self.size), *self.options, *flags, *self.changes))})"


@dataclass
class Result:
    """What came of all images; each entry of `wrong` is a sentence."""

    images: int = 0
    bytes: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def drawn(draw: random.Random, number: int) -> Image:
    """One image at random."""
    size = draw.choice((512, draw.randrange(1, 129) * 512, draw.randrange(1, 20_000) * 512, draw.randrange(1, 9) * MIB))
    format, options, compressed = draw.choice((_qcow2, _qcow2, _qcow2, _vmdk, _vhdx, _vhd, _vdi))(draw)
    changeable = "subformat=streamOptimized" not in options
    changes = tuple(_change(draw, size) for _ in range(draw.randrange(12))) if changeable else ()
    qcow2 = format == "qcow2"
    bitmap = qcow2 and "compat=0.10" not in options and draw.random() < 0.3
    few = {f"refcount_bits={bits}" for bits in (1, 2, 4)}  # no room to count a snapshot's clusters
    snapshot = qcow2 and not few & {*options} and draw.random() < 0.3
    return Image(number, format, size, options, compressed, changes, snapshot, bitmap)


_Drawn = tuple[str, tuple[str, ...], bool]


def _qcow2(draw: random.Random) -> _Drawn:
    bits = draw.randrange(9, 22)
    options = [f"cluster_size={1 << bits}"]
    compressed = draw.random() < 0.4
    if draw.random() < 0.15:
        return "qcow2", (*options, "compat=0.10"), compressed
    if bits >= 14 and draw.random() < 0.4:
        options.append("extended_l2=on")
    if draw.random() < 0.5:
        options.append(f"refcount_bits={draw.choice((1, 2, 4, 8, 16, 32, 64))}")
    if compressed and draw.random() < 0.5:
        options.append("compression_type=zstd")
    if draw.random() < 0.3:
        options.append("lazy_refcounts=on")
    if not compressed and draw.random() < 0.3:
        options.append(f"preallocation={draw.choice(('metadata', 'falloc', 'full'))}")
    return "qcow2", tuple(options), compressed


def _vmdk(draw: random.Random) -> _Drawn:
    if draw.random() < 0.4:
        return "vmdk", ("subformat=streamOptimized", f"adapter_type={draw.choice(('ide', 'lsilogic'))}"), False
    return "vmdk", ("subformat=monolithicSparse", f"zeroed_grain={draw.choice(('on', 'off'))}"), False


def _vhdx(draw: random.Random) -> _Drawn:
    options = [f"subformat={draw.choice(('dynamic', 'fixed'))}", f"block_state_zero={draw.choice(('on', 'off'))}"]
    if draw.random() < 0.7:
        options.append(f"block_size={draw.choice((1, 2, 4, 8, 16, 32)) * MIB}")
    return "vhdx", tuple(options), False


def _vhd(draw: random.Random) -> _Drawn:
    force = ("force_size",) if draw.random() < 0.6 else ()
    return "vpc", (f"subformat={draw.choice(('dynamic', 'dynamic', 'fixed'))}", *force), False


def _vdi(draw: random.Random) -> _Drawn:  # noqa: ARG001 - it has no options
    return "vdi", (), False


def _change(draw: random.Random, size: int) -> str:
    """A command of qemu-io(1): a write, zeros or a discard somewhere."""
    first = draw.randrange(size // 512)
    length = min(draw.choice((1, 8, 128, 1024, 4096)), size // 512 - first) * 512
    what = draw.choice((f"write -P {draw.randrange(1, 256)}", "write -z", "write -z -u", "discard"))
    return f"{what} {first * 512} {length}"


def make(image: Image, folder: Path) -> Path:
    """Make it, beside the raw disk that it begins with."""
    disk, path = make_disk(folder / "disk", image.size, image.number), folder / "image"
    options = ("-o", ",".join(image.options)) if image.options else ()
    compress = ("-c",) if image.compressed else ()
    _run("qemu-img", "convert", "-f", "raw", "-O", image.format, *compress, *options, str(disk), str(path))
    half = len(image.changes) // 2
    _write(image, path, image.changes[:half])
    if image.snapshot:
        _run("qemu-img", "snapshot", "-c", "before", str(path))
    if image.bitmap:
        _run("qemu-img", "bitmap", "-f", "qcow2", "--add", str(path), "changed")
    _write(image, path, image.changes[half:])
    return path


def open_as_clones_do(record: ImageRecord, file: Path) -> Reader:
    """The reader that a clone has of an image."""
    if record.format is ImageFormat.RAW:
        return RawReader(str(file), record.name)
    return QemuReader(str(file), record.format, record.name, connections=1)


class Lab:
    """Tries images in `folder`."""

    def __init__(self, folder: Path, open_image: Open = open_as_clones_do) -> None:
        self._folder = folder
        self._open = open_image
        self._library = ImageLibrary(folder / "state" / "images")
        self.result = Result()

    def try_all(self, images: Sequence[Image]) -> Result:
        """Each of them; what is wrong is printed at once."""
        for image in images:
            self.result.images += 1
            self.result.formats[image.format] = self.result.formats.get(image.format, 0) + 1
            try:
                wrong = self._try(image)
            except (DriverError, subprocess.CalledProcessError) as error:
                wrong = f"{error} {getattr(error, 'stderr', b'')!r}"
            if wrong:
                print(f"{image}: {wrong}", file=sys.stderr)
                self.result.wrong.append(f"{image}: {wrong}")
        return self.result

    def _try(self, image: Image) -> str:
        """What is wrong with one, "" if nothing is."""
        path, raw = make(image, self._folder), self._folder / "raw"
        _run("qemu-img", "convert", "-f", image.format, "-O", "raw", str(path), str(raw))
        name = f"image-{image.number}"
        try:
            record = self._library.import_(Import(name, str(path)), unmetered)
            with contextlib.closing(self._open(record, self._library.file(name))) as reader, raw.open("rb") as wanted:
                return self._compare(record, reader, wanted.fileno())
        finally:
            with contextlib.suppress(DriverError):
                self._library.delete(name)

    def _compare(self, record: ImageRecord, reader: Reader, wanted: int) -> str:
        size = os.fstat(wanted).st_size
        if (record.size, reader.size) != (size, size):
            return f"it is recorded with {record.size} bytes and read with {reader.size}, expected {size}"
        end = 0
        for extent in reader.extents():
            if extent.offset != end:
                return f"an extent begins at {extent.offset}, expected {end}"
            end += extent.length
            for at in range(extent.offset, end, _PIECE):
                buffer = bytearray(min(_PIECE, end - at))
                if not extent.zero:
                    reader.read_into(at, memoryview(buffer))
                if buffer != os.pread(wanted, len(buffer), at):
                    return f"it is not what qemu-img gives between {at} and {at + len(buffer)}"
                self.result.bytes += len(buffer)
        return "" if end == size else f"its extents end at {end}, expected {size}"


def _write(image: Image, path: Path, changes: Sequence[str]) -> None:
    if changes:
        commands = [word for change in changes for word in ("-c", change)]
        _run("qemu-io", "-d", "unmap", "-f", image.format, *commands, str(path))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=_SECONDS, stdin=subprocess.DEVNULL, capture_output=True)


def main() -> int:
    """Exit code 0 when every image was as it must be."""
    seed = int(os.environ.get("SEED") or time.time_ns() % 100_000)
    draw = random.Random(seed)
    images = [drawn(draw, number) for number in range(int(os.environ.get("COUNT") or COUNT))]
    started = time.monotonic()
    with work_folder("random-") as folder:
        result = Lab(folder).try_all(images)
    formats = " ".join(f"{name}={count}" for name, count in sorted(result.formats.items()))
    print(
        f"images={result.images} {formats} bytes={result.bytes} wrong={len(result.wrong)} "
        f"seconds={time.monotonic() - started:.0f} seed={seed}"
    )
    return int(bool(result.wrong))


if __name__ == "__main__":
    sys.exit(main())
