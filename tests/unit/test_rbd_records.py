"""What is known of volumes in a pool of Ceph: who wins of many writers, what a kill leaves, how a log goes on."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from csi_driver.backends.rbdrecords import INDEX, VolumeLogs, VolumeState
from csi_driver.model.errors import Aborted, FailedPrecondition
from tests.ceph_fakes import FakePool

ID = "pvc-1.0123456789"


class Killed(BaseException):
    """The process ends at this very step."""


def counting(state: VolumeState | None) -> VolumeState:
    return msgspec.structs.replace(state or VolumeState(), erase=(state.erase if state else 0) + 1)


def log_of(pool: FakePool) -> str:
    life = pool.maps[INDEX][ID]
    number = max(map(int, pool.maps.get(f"luks-csi.log.{ID}.{life}.0", {})), default=0)
    return f"luks-csi.log.{ID}.{life}.{number}"


def test_a_change_is_seen_by_everybody_and_what_changes_nothing_writes_nothing() -> None:
    pool = FakePool()
    assert VolumeLogs().state(pool, ID) is None
    made = VolumeLogs().change(pool, ID, lambda _: VolumeState(record="r"))
    assert VolumeLogs().state(pool, ID) == made
    written = dict(pool.objects)
    assert VolumeLogs().change(pool, ID, lambda state: state or VolumeState()) == made
    assert pool.objects == written
    assert VolumeLogs().ids(pool) == [ID]


def test_of_two_writers_from_one_state_one_wins_and_the_other_goes_on_from_there() -> None:
    pool = FakePool()
    one, other = VolumeLogs(), VolumeLogs()
    one.change(pool, ID, counting)
    seen: list[int] = []

    def slow(state: VolumeState | None) -> VolumeState:
        assert state is not None
        seen.append(state.erase)
        if len(seen) == 1:
            other.change(pool, ID, counting)  # between the reading and the writing of the first one
        return counting(state)

    assert one.change(pool, ID, slow).erase == 3
    assert seen == [1, 2]


def test_no_change_of_many_writers_is_lost_or_counted_twice() -> None:
    pool, told = FakePool(), list[str]()
    start = threading.Barrier(8)

    def write(writer: int) -> None:
        logs = VolumeLogs()
        start.wait()
        for number in range(40):
            mark = f"{writer}-{number}"

            def add(state: VolumeState | None, mark: str = mark) -> VolumeState:
                return VolumeState(record=f"{state.record if state else ''} {mark}")

            try:
                logs.change(pool, ID, add)
            except Aborted:
                continue
            told.append(mark)

    VolumeLogs().change(pool, ID, lambda _: VolumeState(record=""))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(8)))
    state = VolumeLogs().state(pool, ID)
    assert state is not None
    written = (state.record or "").split()
    assert len(written) == len(set(written))
    assert set(told) <= set(written)
    assert len(told) > 40


def test_a_line_that_comes_late_counts_for_nothing() -> None:
    pool = FakePool()
    VolumeLogs().change(pool, ID, lambda _: VolumeState(record="first"))
    late = pool.objects[log_of(pool)].replace(b"first", b"stale")
    VolumeLogs().change(pool, ID, lambda _: VolumeState(record="second"))
    pool.append(log_of(pool), late)
    assert VolumeLogs().state(pool, ID) == VolumeState(record="second")
    assert VolumeLogs().change(pool, ID, lambda _: VolumeState(record="third")).record == "third"


def test_a_log_that_has_grown_long_goes_on_in_the_next_one_and_leaves_none_behind() -> None:
    pool, logs, other = FakePool(), VolumeLogs(), VolumeLogs()
    for number in range(1, 400):
        assert logs.change(pool, ID, counting).erase == number
        if number % 90 == 0:
            state = other.state(pool, ID)  # it has known an earlier one
            assert state is not None
            assert state.erase == number
    assert len(pool.objects) == 2
    assert sum(map(len, pool.objects.values())) < 20_000
    assert int(log_of(pool).rpartition(".")[2]) > 3
    logs.forget(pool, ID)
    assert (pool.objects, pool.maps[INDEX]) == ({}, {})


def test_a_writer_that_slept_while_the_log_went_on_twice_changes_nothing() -> None:
    pool, logs, sleeper = FakePool(), VolumeLogs(), VolumeLogs()
    for _ in range(63):
        logs.change(pool, ID, counting)
    slept = [False]

    def sleep(step: str) -> None:
        if step.startswith("before append") and step.endswith(".1") and not slept[0]:
            slept[0] = True
            for _ in range(200):
                logs.change(pool, ID, counting)

    pool.step = sleep
    assert sleeper.change(pool, ID, counting).erase == 64
    assert slept[0]
    for reader in (logs, sleeper, VolumeLogs()):
        state = reader.state(pool, ID)
        assert state is not None
        assert state.erase == 264
    assert sleeper.change(pool, ID, counting).erase == 265


def test_killed_at_every_step_of_going_on_nothing_is_lost_and_the_next_writer_goes_on() -> None:
    steps: list[str] = []
    probe = FakePool()
    logs = VolumeLogs()
    for _ in range(63):
        logs.change(probe, ID, counting)
    probe.step = steps.append
    logs.change(probe, ID, counting)
    assert len(steps) > 6
    for left in range(len(steps)):
        pool, logs = FakePool(), VolumeLogs()
        for _ in range(63):
            logs.change(pool, ID, counting)
        remaining = itertools.count(left, -1)

        def step(_: str, remaining: "itertools.count[int]" = remaining) -> None:
            if next(remaining) <= 0:
                raise Killed

        pool.step = step
        with pytest.raises(Killed):
            logs.change(pool, ID, counting)
        pool.step = lambda _: None
        before = VolumeLogs().state(pool, ID)
        assert before is not None
        assert before.erase in (63, 64), steps[left]
        after = before.erase
        for _ in range(140):
            after += 1
            assert VolumeLogs().change(pool, ID, counting).erase == after, steps[left]


def test_of_two_makers_one_alone_is_told_that_it_made_the_volume() -> None:
    pool, one, other = FakePool(), VolumeLogs(), VolumeLogs()
    one.change(pool, ID, lambda _: VolumeState(claim="one"))
    pool.maps[INDEX].clear()  # the other looked before the first wrote
    other.change(pool, ID, lambda _: VolumeState(claim="other"))
    other.confirm(pool, ID)
    with pytest.raises(Aborted, match=r"somebody else"):
        one.confirm(pool, ID)


def test_a_later_volume_of_the_name_sees_nothing_of_an_earlier_one() -> None:
    pool, logs, old = FakePool(), VolumeLogs(), VolumeLogs()
    old.change(pool, ID, lambda _: VolumeState(record="old"))
    logs.keep_header(pool, ID, b"header" * 1000)
    assert logs.header(pool, ID) == b"header" * 1000
    logs.forget(pool, ID)
    assert old.state(pool, ID) is None
    logs.change(pool, ID, lambda _: VolumeState(record="new"))
    assert not logs.has_header(pool, ID)
    found = old.state(pool, ID)
    assert found is not None
    assert found.record == "new"


@pytest.mark.parametrize(
    ("line", "text"),
    [(b"{", "cannot be read"), (b'{"version": 2, "base": 0, "by": "x", "state": {}}', "newer driver")],
)
def test_a_log_that_is_damaged_or_newer_is_refused(line: bytes, text: str) -> None:
    pool = FakePool()
    VolumeLogs().change(pool, ID, lambda _: VolumeState(record="r"))
    pool.append(log_of(pool), line + b"\n")
    with pytest.raises(FailedPrecondition, match=text):
        VolumeLogs().state(pool, ID)
