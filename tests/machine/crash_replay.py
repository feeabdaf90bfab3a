"""Inside the guest: what a power cut could have left, from a log of every write.

A workload runs on a file system whose device is under dm-log-writes, so that records and volume files share one log.
Its facts are marks in that log. Then many states of the device are built that a power cut could have left: all writes
up to a flush, and any of those between it and the next one. Each is mounted as after a boot and checked against the
facts that stand before that next flush: they were acknowledged with nothing but the earlier flush behind them.

`python -m tests.machine.crash_replay SEED COUNT PLANT` prints how many states it checked and reports in $MACHINE_OUT.
The workload is as long as so many states are worth.
See "dm-log-writes" at https://docs.kernel.org/admin-guide/device-mapper/log-writes.html.
"""

import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path

import msgspec

from csi_driver.cli.logs import configure_logs
from csi_driver.host.devicemapper import DeviceMapper, Target
from csi_driver.host.loop import LoopDevices
from csi_driver.host.mounts import Mounts
from csi_driver.model.errors import DriverError
from csi_driver.model.settings import LogFormat
from csi_driver.rpc.client import RemoteError
from csi_driver.volumes.driver import Host
from tests.handles import bind_path, mount_path
from tests.machine.crash_check import Report, check
from tests.machine.crash_log import Fact, Kind
from tests.machine.crash_node import Node
from tests.machine.crash_plants import Plant
from tests.machine.crash_workload import REPORT, Walker

LEAST_STEPS = 15
_FIRST = 3
DEVICE_BYTES = 512 << 20
LOG_BYTES = 2 << 30
COMMAND_SECONDS = 120
KINDS = {
    Kind.EXT4: 4, Kind.BLOCK: 3, Kind.KMS_EXT4: 2, Kind.KMS_BLOCK: 1, Kind.PLAIN_EXT4: 1, Kind.PLAIN_BLOCK: 1,
}  # fmt: skip

_MAPPING = "logged"
_MOUNTED = Path("/mnt/logged")
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_SHARES = (0.0, 0.5, 0.9)  # of the writes since the last flush that reached the device
_SECTOR = 512
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
            _run("env", "E2FSPROGS_FAKE_TIME=1000000000", "mkfs.ext4", "-q", "-F", "-J", "size=8", *fixed, str(path))

    @contextmanager
    def recording(self) -> Iterator[Path]:
        """The file system whose writes are logged."""
        with (
            _attached(self.device) as device,
            _attached(self.log) as log,
            _mapped(f"log-writes {device} {log}") as path,
            _mounted(path) as folder,
        ):
            yield folder

    @contextmanager
    def replaying(self) -> Iterator[str]:
        """A device that shows the image; what is written to it goes away with it."""
        with (
            _attached(self.image) as image,
            _attached(self.changes) as changes,
            _mapped(f"snapshot {image} {changes} N 8") as path,
        ):
            yield path


def record(node_host: Host, logged: Logged, rng: random.Random, steps: int) -> list[Fact]:
    """Let a workload take so many steps; its facts, of which the first n stand before the mark n of the log."""
    facts: list[Fact] = []

    def tell(fact: Fact) -> None:
        facts.append(fact)
        _run("dmsetup", "message", _MAPPING, "0", "mark", str(len(facts)))

    with logged.recording() as folder, Node(folder / "state", node_host) as node:
        walker = Walker(node, tell, rng, "logged", kinds=KINDS)
        for _ in range(steps):
            walker.step()
        walker.leave()
    return facts


def choose(stretches: Sequence[Interval], rng: random.Random, count: int) -> list[tuple[int, float]]:
    """Which states to look at: an interval each, and the share of its unsure writes that is taken for lucky.

    Half of them are the hardest, where a fact was told and nothing that had not been flushed survives; the first of
    these always, where a volume was made.
    """
    before = [0, *(stretch.facts for stretch in stretches)]
    hard = [(number, 0.0) for number, stretch in enumerate(stretches) if stretch.facts > before[number]]
    first, rest = hard[:_FIRST], hard[_FIRST:]
    chosen = [*first, *rng.sample(rest, max(0, min(count // 2 - len(first), len(rest))))]
    others = [
        (number, share)
        for number, stretch in enumerate(stretches)
        for share in (_SHARES if stretch.unsure else _SHARES[:1])
        if (number, share) not in chosen
    ]
    return sorted(chosen + rng.sample(others, min(count - len(chosen), len(others))))


def replay(
    node_host: Host, logged: Logged, facts: Sequence[Fact], rng: random.Random, count: int
) -> tuple[int, Report]:
    """Build and check `count` of the states, or all there are, until one is wrong; how many, and what was found."""
    report = Report()
    done = 0
    with open(logged.log, "rb") as log, open(logged.image, "r+b", buffering=0) as image:
        stretches = list(intervals(list(read_log(log.fileno()))))
        chosen = choose(stretches, rng, count)
        for number, stretch in enumerate(stretches):
            for share in [share for wanted, share in chosen if wanted == number]:
                survivors = [entry for entry in stretch.unsure if rng.random() < share]
                done += 1
                with logged.replaying() as path:
                    with open(path, "r+b", buffering=0) as state:
                        for entry in (*survivors, *stretch.sure):
                            entry.apply(log.fileno(), state.fileno())
                        os.fsync(state.fileno())
                    report.add(_judge(node_host, path, facts[: stretch.facts], rng, done))
                if report.findings:
                    report.lost.append(
                        f"all that in state {done}: {len(survivors)} of {len(stretch.unsure)} unflushed writes after "
                        f"flush {number} of {len(stretches)}, {stretch.facts} facts"
                    )
                    return done, report
            for entry in (*stretch.sure, *stretch.unsure):
                entry.apply(log.fileno(), image.fileno())
    return done, report


def _judge(node_host: Host, device: str, facts: Sequence[Fact], rng: random.Random, number: int) -> Report:
    """Mount a state as after a boot, check it, and look at the file system itself when all is over."""
    try:
        with _another_boot(number), _mounted(device) as folder, Node(folder / "state", node_host) as node:
            report = check(node, _forget, facts, rng, everything=True)
        _run("fsck.ext4", "-fn", device)
    except (DriverError, RemoteError, OSError, AssertionError) as error:
        report = Report(lost=[f"{type(error).__name__}: {error}"])
    return report


def _forget(_: Fact) -> None:
    pass


@contextmanager
def _attached(path: Path) -> Iterator[str]:
    """Its device's number, as tables name it."""
    with LoopDevices().attach(str(path), autoclear=True) as loop:
        yield f"{loop.major}:{loop.minor}"


@contextmanager
def _mapped(table: str) -> Iterator[str]:
    mapper = DeviceMapper()
    kind, _, parameters = table.partition(" ")
    device = mapper.create(_MAPPING, "", [Target(0, DEVICE_BYTES // _SECTOR, kind, parameters)])
    try:
        yield device.path
    finally:
        mapper.remove(_MAPPING)


@contextmanager
def _mounted(device: str) -> Iterator[Path]:
    mounts = Mounts()
    _MOUNTED.mkdir(exist_ok=True)
    mount_path(mounts, device, str(_MOUNTED), "ext4", 0, "noinit_itable")
    try:
        yield _MOUNTED
    finally:
        mounts.unmount(str(_MOUNTED))


@contextmanager
def _another_boot(number: int) -> Iterator[None]:
    """Let the driver believe that the guest has booted again: what it keeps of a boot is not to be trusted then."""
    mounts = Mounts()
    other = Path("/run/boot_id")
    other.write_text(f"00000000-0000-4000-8000-{number:012}\n")
    bind_path(mounts, str(other), _BOOT_ID)
    try:
        yield
    finally:
        mounts.unmount(_BOOT_ID)


def _run(*argv: str) -> None:
    done = subprocess.run(argv, check=False, timeout=COMMAND_SECONDS, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{' '.join(argv)} ended with {done.returncode}: {done.stdout}{done.stderr}")


def main(seed: str, count: str, plant: str) -> None:
    out, state = Path(os.environ["MACHINE_OUT"]), Path(os.environ["MACHINE_STATE"])
    configure_logs(LogFormat.TEXT, "info")
    rng = random.Random(seed)
    host = Plant(plant).host()
    logged = Logged(state)
    facts = record(host, logged, rng, steps=LEAST_STEPS + int(count) // 2)
    done, report = replay(host, logged, facts, rng, int(count))
    host.workers.stop()
    (out / REPORT).write_bytes(msgspec.json.encode(report))
    print(done)


if __name__ == "__main__":
    main(*sys.argv[1:])
