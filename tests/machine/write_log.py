"""A file system whose every write is logged, by dm-log-writes, and states of it that a power cut could have left.

What a device holds after a power cut: all writes up to a flush, and any of those between it and the next one.
See "dm-log-writes" at https://docs.kernel.org/admin-guide/device-mapper/log-writes.html.
"""

import os
import struct
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path

from csi_driver.host.devicemapper import DeviceMapper, Target
from csi_driver.host.loop import LoopDevices
from csi_driver.host.mounts import Mounts
from tests.handles import bind_path, mount_path

DEVICE_BYTES = 512 << 20
LOG_BYTES = 2 << 30
SECTOR = 512

_COMMAND_SECONDS = 120
_MAPPING = "logged"
MOUNTED = Path("/mnt/logged")
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_HASH_SEED = "00000000-0000-4000-8000-000000000001"

_MAGIC, _VERSION = 0x6A736677736872, 1
_SUPER = struct.Struct("<QQQI")  # magic, version, entries, sector size; see linux/drivers/md/dm-log-writes.c
_ENTRY = struct.Struct("<QQQQ")  # sector, number of sectors, flags, length of the data behind it in this sector


class Flag(IntFlag):
    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8


@dataclass(frozen=True)
class Entry:
    """One write; `offset`, `length` of the device and `at` of the log are in bytes. `mark` is a number of ours."""

    flags: Flag
    offset: int
    length: int
    at: int
    mark: int | None = None

    def apply(self, log: int, image: int) -> None:
        """Do to the image what the write did."""
        if not self.length or self.mark is not None:
            return
        content = bytes(self.length) if self.flags & Flag.DISCARD else os.pread(log, self.length, self.at)
        if os.pwrite(image, content, self.offset) != self.length:
            raise OSError(f"a write of {self.length} bytes was cut")


@dataclass(frozen=True)
class Interval:
    """What lies between two flushes. `sure` is on the device when it ends, `unsure` may be: nothing had flushed it.
    `facts` is how many facts had been told when it ended.
    """

    sure: Sequence[Entry]
    unsure: Sequence[Entry]
    facts: int


def read_log(log: int) -> Iterator[Entry]:
    """The entries in the order in which they were completed, except that writes stand right before their flush."""
    magic, version, count, sector = _SUPER.unpack(os.pread(log, _SUPER.size, 0))
    if (magic, version) != (_MAGIC, _VERSION):
        raise ValueError(f"the log begins with {magic:#x}, version {version}")
    at = sector
    for _ in range(count):
        header = os.pread(log, sector, at)
        start, sectors, number, extra = _ENTRY.unpack_from(header)
        at += sector
        flags = Flag(number & 15)
        if flags & Flag.MARK:
            text = header[_ENTRY.size : _ENTRY.size + extra].rstrip(b"\0")
            if text.isdigit():  # the kernel makes one itself, at the end
                yield Entry(flags, 0, 0, at, int(text))
            continue
        yield Entry(flags, start * sector, sectors * sector, at)
        at += 0 if flags & Flag.DISCARD else sectors * sector


def intervals(entries: Sequence[Entry]) -> Iterator[Interval]:
    """The log from flush to flush."""
    sure: list[Entry] = []
    unsure: list[Entry] = []
    facts = 0
    for entry in entries:
        if entry.mark is not None:
            facts = entry.mark
        elif entry.flags & Flag.FLUSH:
            yield Interval(sure, unsure, facts)
            sure, unsure = [entry], []
        elif entry.flags & Flag.FUA:
            sure.append(entry)
        else:
            unsure.append(entry)
    yield Interval(sure, unsure, facts)


class Logged:
    """The devices: `device` carries the workload, `log` what it wrote, `image` is built again from that."""

    def __init__(self, folder: Path) -> None:
        self.device, self.log, self.image, self.changes = (
            folder / name for name in ("device", "log", "image", "changes")
        )
        sizes = {self.device: DEVICE_BYTES, self.log: LOG_BYTES, self.image: DEVICE_BYTES, self.changes: DEVICE_BYTES}
        for path, size in sizes.items():
            with open(path, "xb") as file:
                file.truncate(size)
        for path in (self.device, self.image):
            # Twice the same bytes: the writes are replayed on what they were made on.
            fixed = ("-U", "00000000-0000-4000-8000-000000000000", "-E", f"hash_seed={_HASH_SEED},nodiscard")
            run_program(
                "env", "E2FSPROGS_FAKE_TIME=1000000000", "mkfs.ext4", "-q", "-F", "-J", "size=8", *fixed, str(path)
            )

    def mark(self, number: int) -> None:
        """Set a mark in the log of what is being recorded."""
        run_program("dmsetup", "message", _MAPPING, "0", "mark", str(number))

    @contextmanager
    def recording(self) -> Iterator[Path]:
        """The file system whose writes are logged."""
        with (
            _attached(self.device) as device,
            _attached(self.log) as log,
            _mapped(f"log-writes {device} {log}") as path,
            mounted(path) as folder,
        ):
            yield folder

    @contextmanager
    def cut(self, log: int, writes: Iterable[Entry]) -> Iterator[str]:
        """A device that shows the image and those writes behind it; what is written to it goes away with it."""
        with (
            _attached(self.image) as image,
            _attached(self.changes) as changes,
            _mapped(f"snapshot {image} {changes} N 8") as path,
        ):
            with open(path, "r+b", buffering=0) as state:
                for entry in writes:
                    entry.apply(log, state.fileno())
                os.fsync(state.fileno())
            yield path


@contextmanager
def _attached(path: Path) -> Iterator[str]:
    """Its device's number, as tables name it."""
    with LoopDevices().attach(str(path), autoclear=True) as loop:
        yield f"{loop.major}:{loop.minor}"


@contextmanager
def _mapped(table: str) -> Iterator[str]:
    mapper = DeviceMapper()
    kind, _, parameters = table.partition(" ")
    device = mapper.create(_MAPPING, "", [Target(0, DEVICE_BYTES // SECTOR, kind, parameters)])
    try:
        yield device.path
    finally:
        mapper.remove(_MAPPING)


@contextmanager
def mounted(device: str) -> Iterator[Path]:
    mounts = Mounts()
    MOUNTED.mkdir(exist_ok=True)
    mount_path(mounts, device, str(MOUNTED), "ext4", 0, "noinit_itable")
    try:
        yield MOUNTED
    finally:
        mounts.unmount(str(MOUNTED))


@contextmanager
def another_boot(number: int) -> Iterator[None]:
    """Let the driver believe that the guest has booted again: what it keeps of a boot is not to be trusted then."""
    mounts = Mounts()
    other = Path("/run/boot_id")
    other.write_text(f"00000000-0000-4000-8000-{number:012}\n")
    bind_path(mounts, str(other), _BOOT_ID)
    try:
        yield
    finally:
        mounts.unmount(_BOOT_ID)


def run_program(*argv: str) -> None:
    done = subprocess.run(argv, check=False, timeout=_COMMAND_SECONDS, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{' '.join(argv)} ended with {done.returncode}: {done.stdout}{done.stderr}")
