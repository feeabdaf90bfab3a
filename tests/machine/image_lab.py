"""What the suites of the image engine have in common: the real command, the real cryptsetup, disks for images."""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Final

from csi_driver.cli.main import main as luks_csi
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.mounts import Mounts
from csi_driver.images.base import MIB, Progress
from csi_driver.images.checkpoint import Operation
from csi_driver.images.requests import Clone
from csi_driver.keys.secret import SecretKey
from tests.handles import mount_path

PROGRAM: Final = (str(Path(sys.executable).with_name("luks-csi")), "image")
COMMAND_SECONDS: Final = 600.0
MS_RDONLY: Final = 1

# qemu-img's options for an image of each kind; raw is the disk itself.
KINDS: Final = {
    "raw": (),
    "qcow2": ("-O", "qcow2"),
    "qcow2-zlib": ("-c", "-O", "qcow2"),
    "qcow2-zstd": ("-c", "-O", "qcow2", "-o", "compression_type=zstd"),
    "vmdk-sparse": ("-O", "vmdk", "-o", "subformat=monolithicSparse"),
    "vmdk-stream": ("-O", "vmdk", "-o", "subformat=streamOptimized"),
    "vhdx": ("-O", "vhdx"),
    "vhd": ("-O", "vpc", "-o", "subformat=dynamic,force_size"),
    "vdi": ("-O", "vdi"),
}

_PIECE: Final = 4 * MIB
_names = count()


@contextlib.contextmanager
def unmetered(what: str, total: int | None) -> Iterator[Progress]:  # noqa: ARG001 - the Protocol names them
    """A meter that nobody looks at."""
    yield lambda _: None


@contextlib.contextmanager
def work_folder(prefix: str) -> Iterator[Path]:
    """A folder on the machine's state disk that goes away, also on SIGTERM."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    parent = os.environ.get("MACHINE_STATE", "/var/tmp")
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def image_command(arguments: Sequence[str]) -> None:
    """`luks-csi image` in this process. Raises SystemExit."""
    sys.argv = ["luks-csi", "image", *arguments]
    luks_csi()


def make_disk(path: Path, size: int, seed: int) -> Path:
    """A disk of `size` bytes: random bytes, text that compresses and holes in turn; of a large one the ends alone."""
    draw = random.Random(f"{seed} {size}")
    with path.open("wb") as file:
        for start in _starts(size):
            length = min(64 * 1024, size - start)
            match draw.randrange(3) if start else 0:  # what begins with text is taken for no disk
                case 0:
                    piece = draw.randbytes(length)
                case 1:
                    piece = bytes(draw.choices(b"abcdefgh\n", k=64)) * (length // 64 + 1)
                case _:
                    continue
            file.seek(start)
            file.write(piece[:length])
        file.truncate(size)
    return path


def converted(disk: Path, kind: str) -> Path:
    """An image of that kind with the content of `disk`, beside it; qemu-img rounds its size up to 512 bytes."""
    if kind == "raw":
        return disk
    target = disk.with_name(f"{disk.name}.{kind}")
    command = ["qemu-img", "convert", "-f", "raw", *KINDS[kind], str(disk), str(target)]
    subprocess.run(command, check=True, timeout=COMMAND_SECONDS, stdin=subprocess.DEVNULL, capture_output=True)
    return target


def unpacked(image: Path, raw: Path) -> Path:
    """The disk that is in a qcow2, as a new file, by qemu-img."""
    command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(raw)]
    subprocess.run(command, check=True, timeout=COMMAND_SECONDS, stdin=subprocess.DEVNULL, capture_output=True)
    return raw


def digest_of(path: Path, length: int | None = None) -> str:
    """SHA-256 of a file or device, of its first `length` bytes if that is told."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while length is None or length > 0:
            piece = file.read(_PIECE if length is None else min(_PIECE, length))
            if not piece:
                break
            found.update(piece)
            length = None if length is None else length - len(piece)
    return found.hexdigest()


def holds(path: Path, wanted: bytes) -> bool:
    """Whether `wanted` is somewhere in a file or device."""
    tail = b""
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            if wanted in tail + piece:
                return True
            tail = piece[1 - len(wanted) :]
    return False


def size_of(path: Path) -> int:
    """Bytes of a file or device."""
    with path.open("rb", buffering=0) as file:
        return file.seek(0, os.SEEK_END)


def cryptsetup(*arguments: str, key: bytes = b"") -> str:
    """What the real cryptsetup prints; `key` goes in by stdin. Raises CalledProcessError."""
    done = subprocess.run(
        ["cryptsetup", *arguments],
        input=key,
        capture_output=True,
        check=True,
        timeout=COMMAND_SECONDS,
        env={**os.environ, "DM_DISABLE_UDEV": "1"},
    )
    return done.stdout.decode()


@contextlib.contextmanager
def opened(path: Path, passphrase: bytes) -> Iterator[Path]:
    """The device that the real cryptsetup makes of a LUKS2 file, by the kernel's dm-crypt."""
    name = f"images-{os.getpid()}-{next(_names)}"
    cryptsetup("open", "--type", "luks2", "--readonly", "--key-file", "-", str(path), name, key=passphrase)
    try:
        yield Path("/dev/mapper", name)
    finally:
        DeviceMapper().remove(name)  # a second start of cryptsetup would take a third of a short test


@contextlib.contextmanager
def mounted(device: str, path: Path, fs_type: str, flags: int = 0) -> Iterator[Path]:
    """A file system mounted at `path`, a folder that is made."""
    path.mkdir(exist_ok=True)
    mount_path(Mounts(), device, str(path), fs_type, flags)
    try:
        yield path
    finally:
        Mounts().unmount(str(path))


def files_below(folder: Path) -> set[str]:
    """All that is below a folder, by its name from there; folders end in a slash."""
    found, start = set(), len(str(folder)) + 1
    for at, folders, names in os.walk(folder):
        found |= {f"{at}/{name}"[start:] for name in names} | {f"{at}/{name}/"[start:] for name in folders}
    return found


def _starts(size: int) -> Iterator[int]:
    """Where the pieces of a disk begin: everywhere, but for a huge one near its ends and at odd places between."""
    if size <= 1 << 30:
        yield from range(0, size, 64 * 1024)
        return
    yield from range(0, MIB, 64 * 1024)
    yield from range(size // 3 // 4096 * 4096 + 512, size, size // 5 // 4096 * 4096)
    yield from range(size - MIB, size, 64 * 1024)


def wanted(operation: Operation, name: str, old: SecretKey, new: SecretKey) -> Clone:
    """A clone `name` of the image that suits: "raw" as it is, "qcow2" encrypted, "secret" with `old` opened."""
    match operation:
        case Operation.IGNORE:
            return Clone("raw", name)
        case Operation.ENCRYPT:
            return Clone("qcow2", name, operation, None, new)
        case Operation.DECRYPT:
            return Clone("secret", name, operation, old)
        case Operation.REENCRYPT:
            return Clone("secret", name, operation, old, new)
