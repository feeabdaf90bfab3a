"""The second half of `make keys-kills`: kill -9 at every step of a move to another volume key.

A volume in use is written to all the while by a writer that knows what it was told to be durable; one that is not in
use and a plain one are read in the end. After each kill the volume goes on, is used, and the same call ends the move.
SEED chooses, COUNT is how many steps of each of the three; all of them without it.
"""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from csi_driver.backends.base import storage_beside
from csi_driver.host.workers import Workers
from csi_driver.keys.secret import read_secret
from csi_driver.volumes.conversion import Watch
from csi_driver.volumes.driver import WARM
from tests.machine.node import BLOCK, CHEAP, MIB, SECRET, VOLUME, Node

SIZE = 3 * MIB + MIB // 2
PLAIN = {**CHEAP, "encrypted": "false"}
KINDS = ("in use", "closed", "plain")
_BLOCK = 4096
_BUSY_SECONDS = 60.0


@dataclass
class Result:
    """What came of it; `lost` says of which kill and what."""

    points: int = 0
    kills: int = 0
    stood: int = 0
    lost: list[str] = field(default_factory=list)

    def check(self, where: str, content: bytes) -> None:
        """Compare what a staged volume shows."""
        with open(f"/dev/mapper/luks-{VOLUME}", "rb", buffering=0) as file:
            if file.read(SIZE) != content:
                self.lost.append(f"{where}: the content is another one")


class Writer:
    """Writes numbered blocks to a device at random and remembers what was durable, and what may be there."""

    def __init__(self, device: str, seed: int) -> None:
        self._device = device
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self.error: OSError | None = None
        self.durable: dict[int, bytes] = {}
        self.since: dict[int, list[bytes]] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wrong(self) -> list[int]:
        """The places that hold neither what was durable nor anything that was written since."""
        found = []
        with open(self._device, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for place in self.durable.keys() | self.since.keys():
                there = os.pread(file.fileno(), _BLOCK, place * _BLOCK)
                allowed = [self.durable[place]] if place in self.durable else [bytes(_BLOCK)]
                if there not in allowed + self.since.get(place, []):
                    found.append(place)
        return found

    def _write(self) -> None:
        descriptor = os.open(self._device, os.O_RDWR)
        try:
            count = 0
            while not self._stop.is_set():
                for _ in range(8):
                    place, count = self._random.randrange(SIZE // _BLOCK), count + 1
                    block = hashlib.sha256(f"{place} {count}".encode()).digest() * (_BLOCK // 32)
                    self.since.setdefault(place, []).append(block)
                    os.pwrite(descriptor, block, place * _BLOCK)
                os.fsync(descriptor)
                for place, blocks in self.since.items():
                    self.durable[place] = blocks[-1]
                self.since.clear()
                time.sleep(0.005)  # else nothing else has a turn on one processor
        except OSError as error:
            self.error = error
        finally:
            os.close(descriptor)


def run(folder: Path, workers: Workers, kind: str, step: int, result: Result) -> int:
    """One case; returns how many steps there were, where it was not killed (`step` 0)."""
    node = Node(folder, workers)
    noise = bytes(SIZE) if kind == "in use" else random.Random(step).randbytes(SIZE)
    device = made(node, kind, noise)
    where = f"{kind}, step {step}"
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(node.disk().open("rb"))
        writer = stack.enter_context(Writer(device, step)) if kind == "in use" else None
        steps = killed(folder, kind, step, where)
        result.kills += steps is None
        result.stood += go_on(node, where)
        if kind == "closed" and node.record().conversion is not None:
            node.stage(capability=BLOCK)  # used in the middle
            result.check(where, noise)
            node.unstage()
        end(node, kind)
        if kind == "plain" and old.read().strip(b"\0"):
            result.lost.append(f"{where}: plain text lies where the volume was")
    if writer is not None:
        node.unstage()
    node.stage(capability=BLOCK)
    if writer is None:
        result.check(where, noise)
    elif writer.error is not None or writer.wrong():
        result.lost.append(f"{where}: the writer met {writer.error} and misses {len(writer.wrong())} blocks")
    node.unstage()
    if node.record().conversion is not None or storage_beside(node.store, VOLUME).has_next(VOLUME):
        result.lost.append(f"{where}: it did not come to its end")
    node.delete()
    return steps or 0


def made(node: Node, kind: str, content: bytes) -> str:
    """A volume with that content, staged where it is to be in use; the path of its device."""
    node.create(size=SIZE, parameters=PLAIN if kind == "plain" else CHEAP, capability=BLOCK)
    node.stage(capability=BLOCK)
    device = node.loops_of()[0].path if kind == "plain" else f"/dev/mapper/luks-{VOLUME}"
    with open(device, "r+b", buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())
    if kind != "in use":
        node.unstage()
    return device


def killed(folder: Path, kind: str, step: int, where: str) -> int | None:
    """Move it in a process that is killed at that step; how many steps it had where it was not."""
    verb = "encrypt" if kind == "plain" else "reencrypt"
    child = subprocess.run(
        [sys.executable, "-m", "tests.machine.conversion_child", str(folder), verb, str(step)],
        check=False, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if child.returncode == -signal.SIGKILL:
        return None
    assert child.returncode == 0, f"{where}: {child.stderr}"
    return int(child.stdout)


def go_on(node: Node, where: str) -> bool:
    """Let a volume that stands still go on, as the server does; whether it stood."""
    before = node.mapping()
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        node.standing.look(lambda: False)  # which leaves out what a worker of the killed process still works on
        after = node.mapping()
        if after is None or not after.suspended:
            return before is not None and before.suspended
        assert time.monotonic() < deadline, f"{where}: the mapping still stands"


def end(node: Node, kind: str) -> None:
    """The same call once more; what had ended in use is done again."""
    secret = read_secret(SECRET)
    if kind != "plain":
        node.conversions.reencrypt(VOLUME, secret, Watch())
    elif node.record().encryption is None:
        node.conversions.encrypt(VOLUME, secret, None, Watch(), generate=False)


def run_all(folder: Path, seed: int, count: int) -> Result:
    """All kinds, all steps or `count` of each."""
    workers, result = Workers(WARM), Result()
    workers.start()
    drawn = random.Random(seed)
    try:
        for kind in KINDS:
            (folder / kind).mkdir()
            steps = run(folder / kind, workers, kind, 0, result)
            result.points += steps
            chosen = range(1, steps + 1) if not count else sorted(drawn.sample(range(1, steps + 1), min(count, steps)))
            for step in chosen:
                place = folder / f"{kind} {step}"
                place.mkdir()
                run(place, workers, kind, step, result)
    finally:
        workers.stop()
    return result


def main() -> int:
    """Run it; the exit code is 0 when nothing was lost."""
    seed = int(os.environ.get("SEED") or time.time_ns() % 100_000)
    folder = Path(os.environ.get("MACHINE_STATE") or "/var/tmp") / f"conversion-{seed}"
    folder.mkdir()
    begun = time.monotonic()
    result = run_all(folder, seed, int(os.environ.get("COUNT") or 0))
    for one in result.lost:
        print(one)
    print(
        f"volume keys: points={result.points} kills={result.kills} stood={result.stood} lost={len(result.lost)} "
        f"seconds={time.monotonic() - begun:.0f} seed={seed}"
    )
    return 1 if result.lost or not result.kills else 0


if __name__ == "__main__":
    sys.exit(main())
