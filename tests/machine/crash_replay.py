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
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from csi_driver.cli.logs import configure_logs
from csi_driver.model.errors import DriverError
from csi_driver.model.settings import LogFormat
from csi_driver.rpc.client import RemoteError
from csi_driver.volumes.driver import Host
from tests.machine.crash_check import Report, check
from tests.machine.crash_log import Fact, Kind
from tests.machine.crash_node import Node
from tests.machine.crash_plants import Plant
from tests.machine.crash_workload import REPORT, Walker
from tests.machine.write_log import Interval, Logged, another_boot, intervals, mounted, read_log, run_program

LEAST_STEPS = 15
_FIRST = 3
KINDS = {
    Kind.EXT4: 4, Kind.BLOCK: 3, Kind.KMS_EXT4: 2, Kind.KMS_BLOCK: 1, Kind.PLAIN_EXT4: 1, Kind.PLAIN_BLOCK: 1,
}  # fmt: skip
_SHARES = (0.0, 0.5, 0.9)  # of the writes since the last flush that reached the device


def record(node_host: Host, logged: Logged, rng: random.Random, steps: int) -> list[Fact]:
    """Let a workload take so many steps; its facts, of which the first n stand before the mark n of the log."""
    facts: list[Fact] = []

    def tell(fact: Fact) -> None:
        facts.append(fact)
        logged.mark(len(facts))

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
                with logged.cut(log.fileno(), (*survivors, *stretch.sure)) as path:
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
        with another_boot(number), mounted(device) as folder, Node(folder / "state", node_host) as node:
            report = check(node, _forget, facts, rng, everything=True)
        run_program("fsck.ext4", "-fn", device)
    except (DriverError, RemoteError, OSError, AssertionError) as error:
        report = Report(lost=[f"{type(error).__name__}: {error}"])
    return report


def _forget(_: Fact) -> None:
    pass


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
