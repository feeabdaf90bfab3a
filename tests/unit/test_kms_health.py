"""What is known of each KMS: by looks, by what calls hasten, and by calls alone where a look cannot try."""

import threading
from collections.abc import Callable, Iterator

import pytest

from csi_driver.keys.base import RequestNeeded
from csi_driver.keys.sources import KeySources, Observe
from csi_driver.model.errors import DriverError, FailedPrecondition, KeyLost, Unavailable
from csi_driver.volumes.kms_health import CONFIGURATION, KmsHealth
from tests.told_lines import Told, told_lines

LONG = 3600.0
SECONDS = 60.0
DOWN = Unavailable("KMS a (vault) at https://v.example.com cannot be reached; check its address")


class FakeSources(KeySources):
    """`found` has what a check of each KMS raises."""

    def __init__(self, **found: Exception | None) -> None:
        self.observers: list[Observe] = []
        self.found = dict(found)
        self.broken: DriverError | None = None
        self.asked: list[str] = []
        self.before: Callable[[], object] = list
        self.after = threading.Event()

    def ids(self) -> list[str]:
        if self.broken:
            raise self.broken
        return sorted(self.found)

    def check(self, kms_id: str) -> str:
        self.asked.append(kms_id)
        self.before()
        self.after.set()
        if error := self.found[kms_id]:
            raise error
        return "it works"

    def call(self, kms_id: str, outcome: str) -> None:
        for observe in self.observers:
            observe(kms_id, "fetch", outcome, 0.1)


@pytest.fixture
def told() -> Iterator[Told]:
    with told_lines() as lines:
        yield lines


def told_of(told: Told) -> list[tuple[str, str, str]]:
    return [(line.level, line.event, line.fields["kms"]) for line in told]


def test_what_a_look_finds_is_told_once(told: Told) -> None:
    sources = FakeSources(a=DOWN, b=None)
    health = KmsHealth(sources)
    assert (health.up(), health.details()) == ({}, [])
    for _ in range(3):
        health.look()
    assert health.up() == {"a": 0, "b": 1}
    assert health.details() == ["KMS a does not work, open volumes go on; the log and `luks-csi keys check` tell why"]
    assert told_of(told) == [("warning", "a KMS does not work", "a")]
    assert told[0].fields["error"] == str(DOWN)
    sources.found["a"] = None
    health.look()
    assert (health.up(), health.details()) == ({"a": 1, "b": 1}, [])
    assert told_of(told)[1:] == [("info", "a KMS works again", "a")]


def test_one_that_is_taken_out_of_the_configuration_is_forgotten() -> None:
    sources = FakeSources(a=DOWN, b=RequestNeeded("what a claim brings"))
    health = KmsHealth(sources)
    health.look()
    health.heard("b", "fetch", "Unavailable", 0.1)
    assert health.up() == {"a": 0, "b": 0}
    sources.found.clear()
    health.look()
    assert health.up() == {}


def test_a_configuration_that_cannot_be_read_is_told_and_forgets_nothing(told: Told) -> None:
    sources = FakeSources(a=None)
    health = KmsHealth(sources)
    health.look()
    sources.broken = FailedPrecondition("the KMS configuration /x is no JSON; correct it")
    health.look()
    assert health.up() == {CONFIGURATION: 0, "a": 1}
    sources.broken = None
    health.look()
    assert health.up() == {"a": 1}
    assert told_of(told) == [
        ("warning", "a KMS does not work", CONFIGURATION),
        ("info", "a KMS works again", CONFIGURATION),
    ]


def test_of_one_that_a_look_cannot_try_calls_tell() -> None:
    sources = FakeSources(tenants=RequestNeeded("the namespace of a claim"))
    health = KmsHealth(sources, LONG)
    health.start()
    health.look()
    assert health.up() == {}
    for outcome, known in (
        ("PermissionDenied", {}),  # of one tenant
        ("OK", {"tenants": 1}),
        ("KeyLost", {"tenants": 1}),
        ("Unavailable", {"tenants": 0}),
        ("PermissionDenied", {"tenants": 0}),
        ("OK", {"tenants": 1}),
        ("DeadlineExceeded", {"tenants": 0}),
    ):
        sources.call("tenants", outcome)
        assert health.up() == known
        health.look()
        assert health.up() == known
    health.ask_to_end()
    health.join()


def test_an_error_that_nobody_foresaw_is_told_by_its_kind_alone(told: Told) -> None:
    health = KmsHealth(FakeSources(a=ValueError("a key"), b=None))
    health.look()
    assert health.up() == {"a": 0, "b": 1}
    assert told[0].fields["error"] == "ValueError"


def test_an_id_that_a_terminal_acts_upon_is_written_out() -> None:
    health = KmsHealth(FakeSources(**{"a\n\x1b[31m": DOWN}))
    health.look()
    assert health.details()[0].startswith(r"KMS a\n\x1b[31m does not work")


@pytest.mark.parametrize(("known", "outcome"), [(None, "Unavailable"), (None, "KeyLost"), (DOWN, "OK")])
def test_a_call_that_tells_otherwise_hastens_the_next_look(known: DriverError | None, outcome: str) -> None:
    sources = FakeSources(a=known)
    health = KmsHealth(sources, LONG, LONG, 0.0)
    health.look()
    sources.after.clear()
    sources.found["a"] = None if known else KeyLost("gone")
    health.start()
    sources.call("a", outcome)
    assert sources.after.wait(SECONDS)
    health.ask_to_end()
    health.join()


def test_calls_that_tell_nothing_new_hasten_nothing() -> None:
    sources = FakeSources(a=None, b=DOWN)
    health = KmsHealth(sources, LONG, LONG, 0.0)
    health.look()
    health.start()
    for kms_id, outcome in (("a", "OK"), ("b", "Unavailable"), ("", "Unavailable")):
        sources.call(kms_id, outcome)
    health.ask_to_end()
    health.join()
    assert sources.asked == ["a", "b"]


def test_the_first_look_comes_by_itself_and_so_do_the_next() -> None:
    sources, third = FakeSources(a=None), threading.Event()

    def note() -> None:
        if len(sources.asked) == 3:
            third.set()

    sources.before = note
    health = KmsHealth(sources, 0.001, 0.001, 0.001)
    health.start()
    assert third.wait(SECONDS)
    health.ask_to_end()
    health.join()


def test_a_kms_that_does_not_answer_keeps_nobody_from_stopping_and_tells_nothing_afterwards(told: Told) -> None:
    sources, released = FakeSources(a=DOWN, b=DOWN), threading.Event()

    def hang() -> None:
        sources.after.set()
        released.wait(SECONDS)

    sources.before = hang
    health = KmsHealth(sources, 0.0)
    health.start()
    assert sources.after.wait(SECONDS)
    health.ask_to_end()
    health.join()
    released.set()
    health.join()
    assert sources.asked == ["a"]
    assert told_of(told) == []


def test_one_that_was_never_started_can_be_stopped() -> None:
    health = KmsHealth(FakeSources())
    health.ask_to_end()
    health.join()
