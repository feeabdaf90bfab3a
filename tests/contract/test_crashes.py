"""`make crashes` in small, and proof that it finds what it looks for. It boots guests itself: it runs on the host."""

import random
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.machine.crash_check import Report
from tests.machine.crash_log import Fact, Facts, Follower, Identity, Kind, Record, Step, expected
from tests.machine.crash_plants import Plant
from tests.machine.crash_replay import choose
from tests.machine.crash_workload import Held
from tests.machine.crashes import Moment, Outcome, machine, run
from tests.machine.guest_uml import missing
from tests.machine.write_log import Entry, Flag, Interval, intervals, read_log

SEED, CRASHES, REPLAYS = 22, 4, 10  # a seed with crashes in the first stage and in an expansion
SECONDS = 600  # for all three runs, on a machine that does other things too

guests = [pytest.mark.skipif(missing() is not None, reason=missing() or ""), pytest.mark.timeout(SECONDS)]


def sound_driver() -> Outcome:
    return run(SEED, CRASHES, REPLAYS)


def unsynced_records() -> Report:
    with machine("unsynced", Plant.UNSYNCED) as replayed:
        replayed.replay(40)
    return replayed.report


def forgotten_formats() -> Report:
    with machine("forgetful", Plant.FORGETFUL) as crashed:
        crashed.crash("none", Moment(0, Step.STAGED, 2))
        crashed.end()
    return crashed.report


class Runs:
    """The three runs, two at a time: each is bound by the one processor of its guest."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.sound: Future[Outcome] = pool.submit(sound_driver)
        self.unsynced: Future[Report] = pool.submit(unsynced_records)
        self.forgetful: Future[Report] = pool.submit(forgotten_formats)


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    with ThreadPoolExecutor(2) as pool:
        started = Runs(pool)
        yield started
        pool.shutdown(cancel_futures=True)


class TestGuests:
    pytestmark = guests

    def test_crashes_and_replays_lose_nothing(self, runs: Runs) -> None:
        outcome = runs.sound.result(SECONDS)
        assert outcome.report.findings == []
        assert (outcome.crashes, outcome.replays) == (CRASHES, REPLAYS)
        assert outcome.report.volumes
        assert outcome.report.bytes

    def test_a_record_that_is_not_synced_is_found_lost(self, runs: Runs) -> None:
        assert runs.unsynced.result(SECONDS).lost

    def test_a_volume_that_is_formatted_again_is_found(self, runs: Runs) -> None:
        assert runs.forgetful.result(SECONDS).reformatted


KEY = Identity("uuid", "digest", None)


def test_facts_come_back_and_one_that_a_crash_cut_never_was(tmp_path: Path) -> None:
    path = tmp_path / "facts"
    follower = Follower(path)
    assert follower.news() == []
    told = [
        Fact(Step.CREATING, "v", Kind.XFS, capacity=7),
        Fact(Step.STAGED, "v", Kind.XFS, usable=5, identity=KEY),
        Fact(Step.WRITTEN, "v", Kind.XFS, record=Record(3, "data-0", 1, 2)),
    ]
    for fact in told:
        Facts(path).add(fact)
    assert follower.news() == told
    with path.open("ab") as file:
        file.write(b'{"step":"deleted"')
        file.flush()
        assert follower.news() == []
        file.write(b"}\n")
    assert follower.news() == [Fact(Step.DELETED)]


def test_what_has_to_be_found_is_the_first_identity_and_the_largest_size() -> None:
    again = Identity("uuid", "another", None)
    volume = expected(
        [
            Fact(Step.READY),
            Fact(Step.CREATING, "v", Kind.BLOCK, capacity=10),
            Fact(Step.CREATED, "v", Kind.BLOCK, capacity=10),
            Fact(Step.FORMATTING, "v", Kind.BLOCK),
            Fact(Step.STAGED, "v", Kind.BLOCK, usable=10, identity=KEY),
            Fact(Step.EXPANDING, "v", Kind.BLOCK, capacity=30),
            Fact(Step.EXPANDED, "v", Kind.BLOCK, capacity=20, usable=20),
            Fact(Step.STAGED, "v", Kind.BLOCK, usable=20, identity=again),
            Fact(Step.DELETING, "v", Kind.BLOCK),
        ]
    )["v"]
    assert (volume.asked, volume.capacity, volume.usable) == (30, 20, 20)
    assert (volume.identity, volume.identities) == (KEY, {KEY, again})
    assert (volume.created, volume.deleting, volume.deleted) == (True, True, False)


@pytest.mark.parametrize(
    ("other", "agrees"),
    [
        (Identity("uuid", "digest", "fs"), True),
        (Identity("uuid", "digest", None), True),
        (Identity("uuid", "digest", "another"), False),
        (Identity("uuid", "another", "fs"), False),
        (Identity("another", "digest", "fs"), False),
        (Identity(None, None, None), False),
    ],
)
def test_only_the_same_key_and_file_system_are_the_same_volume(other: Identity, *, agrees: bool) -> None:
    assert Identity("uuid", "digest", "fs").agrees(other) is agrees


def test_after_a_crash_nothing_is_written_where_a_cut_enlargement_may_not_have_come() -> None:
    facts = [Fact(Step.CREATING, "v", Kind.PLAIN_BLOCK, 16), Fact(Step.CREATED, "v", Kind.PLAIN_BLOCK, 16)]
    begun = Fact(Step.EXPANDING, "v", Kind.PLAIN_BLOCK, 32)
    found = expected([*facts, begun])["v"]
    assert (found.asked, Held.adopt(found).capacity) == (32, 16)
    done = Fact(Step.EXPANDED, "v", Kind.PLAIN_BLOCK, 32)
    assert Held.adopt(expected([*facts, begun, done])["v"]).capacity == 32
    assert Held.adopt(expected(facts[:1])["v"]).capacity == 16


def test_a_log_is_cut_at_its_flushes_and_facts_count_before_them(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as log:
        log.write(struct.pack("<QQQI", 0x6A736677736872, 1, 8, 512).ljust(512, b"\0"))

        def add(flags: Flag, sector: int = 0, content: bytes = b"", text: bytes = b"") -> None:
            head = struct.pack("<QQQQ", sector, len(content) // 512, flags, len(text)) + text
            log.write(head.ljust(512, b"\0") + content)

        add(Flag(0), 1, b"a" * 512)
        add(Flag.FLUSH)
        add(Flag.MARK, text=b"1")
        add(Flag.FUA, 2, b"b" * 1024)
        add(Flag(0), 1, b"c" * 512)
        add(Flag.FLUSH)
        add(Flag.MARK, text=b"2")
        add(Flag.MARK, text=b"dm-log-writes-end")
    with path.open("rb") as written, (tmp_path / "image").open("w+b") as image:
        first, second, last = intervals(list(read_log(written.fileno())))
        assert [len(part) for part in (first.sure, first.unsure)] == [0, 1]
        assert [len(part) for part in (second.sure, second.unsure)] == [2, 1]
        assert (first.facts, second.facts, last.facts) == (0, 1, 2)
        for entry in (*first.unsure, *second.sure):
            entry.apply(written.fileno(), image.fileno())
        image.seek(0)
        assert image.read() == bytes(512) + b"a" * 512 + b"b" * 1024


def test_half_of_the_states_are_those_right_after_a_fact() -> None:
    write = Entry(Flag(0), 0, 512, 0)
    stretches = [Interval([], [write], facts) for facts in (0, 0, 1, 1, 1, 2, 2, 2)]
    chosen = choose(stretches, random.Random(1), 4)
    assert {(2, 0.0), (5, 0.0)} <= set(chosen)
    assert len(set(chosen)) == 4
    assert chosen == sorted(chosen)
    assert len(choose(stretches, random.Random(1), 1000)) == 3 * len(stretches)
    assert len(choose([Interval([], [], 0)], random.Random(1), 1000)) == 1
