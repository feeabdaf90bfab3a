"""The third part of `make keys-kills`: the power goes at each step of what changes a volume's key, or gives it one.

Each job runs once on a file system whose writes are logged. Then states of it are built that a power cut could have
left (`tests.machine.write_log`): what was flushed, and none, half or most of what was not, the last write of which is
torn. In each the key that the record says must open the volume and its data be whole, at once and when the same job was
called again; and once the job had returned, its work must be there with nothing but the flushes before that.

The KMS is no part of the node and loses nothing: each state meets it as it was when that state came to be.
SEED chooses, COUNT is how many states of each job; all of them without it. Names of jobs choose some.
"""

import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from csi_driver.host.files import Files
from csi_driver.host.workers import Workers
from csi_driver.keys.secret import read_secret
from csi_driver.luks.device import read_header
from csi_driver.model.errors import DriverError, NotFound
from csi_driver.model.volume import RekeyPhase, VolumeRecord
from csi_driver.volumes.driver import WARM
from tests.machine.keys_jobs import JOBS, SIZE, THEIRS, Job, Kept, Lab, Lost
from tests.machine.node import NONE, VOLUME
from tests.machine.write_log import (
    SECTOR,
    Entry,
    Interval,
    Logged,
    another_boot,
    intervals,
    mounted,
    read_log,
    run_program,
)

_SHARES: Final = (0.0, 0.5, 0.9)  # of the writes since the last flush that reached the device


@dataclass
class Result:
    """What came of it; `lost` says of which state and what."""

    jobs: int = 0
    cuts: int = 0
    torn: int = 0
    lost: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Recording:
    """What a job wrote; `kept` is what the KMS had at each mark of the log, the first of which is the job's begin."""

    logged: Logged
    before: VolumeRecord | None
    kept: Sequence[Kept]


def record(folder: Path, workers: Workers, job: Job, content: bytes, files: Files | None = None) -> Recording:
    """Let it run once."""
    logged = Logged(folder)
    kept: list[Kept] = []
    begun = False

    def tell() -> None:
        if begun:
            kept.append((dict(lab.kept[0]), dict(lab.kept[1])))
            logged.mark(len(kept))

    with logged.recording() as place, ExitStack() as stack:
        lab = Lab(place, workers, content, ({}, {}), tell, files)
        stack.callback(lab.clear)
        job.prepare(lab)
        os.sync()
        os.sync()  # what the first one has written to loop devices
        before = lab.node.record() if lab.node.store.has(VOLUME) else None
        begun = True
        tell()
        job.run(lab)
        tell()
    return Recording(logged, before, kept)


def try_states(
    found: Recording, workers: Workers, name: str, content: bytes, rng: random.Random, count: int, result: Result
) -> None:
    """Build and check `count` of the states, or all there are, until one is wrong."""
    job, logged = JOBS[name], found.logged
    with open(logged.log, "rb") as log, open(logged.image, "r+b", buffering=0) as image:
        stretches = list(intervals(list(read_log(log.fileno()))))
        end = next(number for number, each in enumerate(stretches) if each.facts == len(found.kept))
        chosen = _chosen(stretches[: end + 1], rng, count)
        for number, stretch in enumerate(stretches[: end + 1]):
            for share in [share for wanted, share in chosen if wanted == number]:
                survivors, torn = _survivors(stretch, share, rng)
                result.cuts += 1
                result.torn += torn
                said = f"{name}, flush {number} of {end}, {len(survivors)} of {len(stretch.unsure)} unflushed writes"
                with logged.cut(log.fileno(), (*survivors, *stretch.sure)) as device:
                    kept = found.kept[stretch.facts - 1]
                    lost = _judged(device, workers, job, found, kept, content, rng, acknowledged=number == end)
                if lost:
                    result.lost.append(f"{said}: {lost}")
                    return
            for entry in (*stretch.sure, *stretch.unsure):
                entry.apply(log.fileno(), image.fileno())


def _chosen(stretches: Sequence[Interval], rng: random.Random, count: int) -> list[tuple[int, float]]:
    """A stretch each and the share of its unsure writes that is taken for lucky; always the one in which it ended."""
    last = len(stretches) - 1, 0.0
    states = [
        (number, share)
        for number, each in enumerate(stretches)
        for share in (_SHARES if each.unsure else _SHARES[:1])
        if each.facts and (number, share) != last
    ]
    return sorted([last, *(rng.sample(states, min(count - 1, len(states))) if count else states)])


def _survivors(stretch: Interval, share: float, rng: random.Random) -> tuple[list[Entry], bool]:
    """Those of the unsure writes that reached the device, the last one torn, where it has more than a sector."""
    found = [entry for entry in stretch.unsure if rng.random() < share]
    if not found or found[-1].length <= SECTOR:
        return found, False
    length = rng.randrange(1, found[-1].length // SECTOR) * SECTOR
    return [*found[:-1], replace(found[-1], length=length)], True


def _judged(
    device: str,
    workers: Workers,
    job: Job,
    found: Recording,
    kept: Kept,
    content: bytes,
    rng: random.Random,
    *,
    acknowledged: bool,
) -> str:
    """Mount a state as after a boot and check it; what is wrong, or nothing."""
    try:
        with another_boot(rng.randrange(1 << 30)), mounted(device) as folder, ExitStack() as stack:
            lab = Lab(folder, workers, content, kept)
            stack.callback(lab.clear)
            _check(lab, job, found.before, rng, acknowledged=acknowledged)
        run_program("fsck.ext4", "-fn", device)
    except (DriverError, OSError, AssertionError, Lost) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _check(lab: Lab, job: Job, before: VolumeRecord | None, rng: random.Random, *, acknowledged: bool) -> None:
    try:
        record = lab.node.record()
    except NotFound:
        if before is not None or acknowledged:
            raise Lost("the volume is gone") from None
        record = None
    if record is not None:
        secret = _counting(lab, job, record)
        if acknowledged and (record.rekey or record.conversion or not job.is_done(lab, record, before or record)):
            raise Lost("the call had returned and its work is not there")
        is_half_plain = record.encryption is None and record.conversion is not None  # which cannot be used
        if not is_half_plain and (record.conversion is not None or rng.random() < 0.5):
            lab.holds(secret, "after the cut")
    job.run(lab)
    lab.holds(job.new, "after the same call again")
    record = lab.node.record()
    if record.rekey or record.conversion or (before is not None and not job.is_done(lab, record, before)):
        raise Lost("the same call again did not end it")
    _check_nothing_is_left(lab, record)


def _counting(lab: Lab, job: Job, record: VolumeRecord) -> Mapping[str, str]:
    """The secret with which the volume opens, as its record says; raises Lost where that is none."""
    if record.encryption is None or record.conversion is not None:  # which has two headers: the next stage tells
        return job.secret
    if record.key is not None:
        if not lab.opens(record, lab.keys.fetch(record, record.key, read_secret({}), "test")):
            raise Lost(f"the recorded key {record.key.name} does not open it")
        return NONE
    secrets = [job.secret, job.new]
    if record.rekey is not None:
        secrets = [job.new if record.rekey.phase is RekeyPhase.REMOVING else job.secret]
    for secret in secrets:
        if lab.opens(record, read_secret(secret).passphrase):
            return secret
    raise Lost(f"the passphrase that the record tells of does not open it ({record.rekey})")


def _check_nothing_is_left(lab: Lab, record: VolumeRecord) -> None:
    header = lab.node.header()
    if len(header.keyslots) != 1:
        raise Lost(f"it has {len(header.keyslots)} key slots in the end")
    copy = read_header("the copy", str(lab.node.disk().with_name("header.luks2")))[1]
    if copy != header:
        raise Lost("the header and its copy differ in the end")
    if lab.node.disk().with_name("next.img").exists():
        raise Lost("next.img is left")
    named = {record.key.name} if record.key is not None else set()
    if set(lab.kept[0]) - named - {THEIRS} or lab.keys.unnamed(lab.node.store).left:
        raise Lost(f"the KMS keeps {sorted(lab.kept[0])} in the end, and {named} counts")


def run(
    folder: Path, workers: Workers, names: Sequence[str], seed: int, count: int, result: Result,
    files: Files | None = None,
) -> None:  # fmt: skip
    """These jobs, `count` states of each or all."""
    for name in names:
        place = folder / name
        place.mkdir()
        rng = random.Random(f"{seed} {name}")
        content = rng.randbytes(SIZE)
        found = record(place, workers, JOBS[name], content, files)
        cuts = result.cuts
        try_states(found, workers, name, content, rng, count, result)
        result.jobs += 1
        print(f"{name}: {result.cuts - cuts} cuts", file=sys.stderr, flush=True)
        for path in place.iterdir():
            path.unlink()


def main(names: Sequence[str]) -> int:
    """Run it; the exit code is 0 when nothing was lost."""
    if unknown := set(names) - set(JOBS):
        print(f"no such job: {', '.join(sorted(unknown))}; there are {', '.join(JOBS)}", file=sys.stderr)
        return 2
    seed = int(os.environ.get("SEED") or time.time_ns() % 100_000)
    folder = Path(os.environ.get("MACHINE_STATE") or "/var/tmp") / f"keys-cuts-{seed}"
    folder.mkdir()
    begun, result, workers = time.monotonic(), Result(), Workers(WARM)
    workers.start()
    try:
        run(folder, workers, names or list(JOBS), seed, int(os.environ.get("COUNT") or 0), result)
    finally:
        workers.stop()
    for one in result.lost:
        print(one)
    print(
        f"power cuts: jobs={result.jobs} cuts={result.cuts} torn={result.torn} lost={len(result.lost)} "
        f"seconds={time.monotonic() - begun:.0f} seed={seed}"
    )
    return 1 if result.lost or not result.cuts else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
