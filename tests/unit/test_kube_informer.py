"""What is known of a kind stays true, whatever is lost; work is done by name, and again where it failed."""

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any, cast

import pytest

from csi_driver.kube.client import Kube
from csi_driver.kube.controller import Controller
from csi_driver.kube.informer import Informer
from csi_driver.kube.kinds import IMAGE, Json, Kind, name_of
from csi_driver.kube.refusals import Conflict, Gone
from csi_driver.model.errors import Aborted, Unavailable

_SECONDS = 30.0


class FakeKube:
    """Lists `things`; a watch gives what is put into `events`, until an error or None, its end."""

    def __init__(self, *things: Json) -> None:
        self.things = [*things]
        self.events: queue.Queue[tuple[str, Json] | Exception | None] = queue.Queue()
        self.lists: queue.Queue[None] = queue.Queue()
        self.fail: Exception | None = None

    def list(self, kind: Kind, **_: object) -> tuple[list[Json], str]:
        self.lists.put(None)
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        return [*self.things], "1"

    def watch(self, kind: Kind, version: str, **_: object) -> Iterator[tuple[str, Json]]:
        while (event := self.events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event


def thing(name: str, version: int = 1) -> Json:
    return {"metadata": {"name": name, "resourceVersion": str(version)}}


class Told:
    """The names that were told, in their order."""

    def __init__(self) -> None:
        self._names: queue.Queue[str] = queue.Queue()

    def __call__(self, changed: Json) -> None:
        self._names.put(name_of(changed))

    def next(self) -> str:
        return self._names.get(timeout=_SECONDS)

    def is_silent(self) -> bool:
        return self._names.empty()


@pytest.fixture
def kube() -> FakeKube:
    return FakeKube(thing("a"), thing("b"))


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def informer(kube: FakeKube, told: Told) -> Iterator[Informer]:
    made = Informer(cast("Kube", kube), IMAGE, told)
    made.start()
    assert made.wait_synced(_SECONDS)
    assert {told.next(), told.next()} == {"a", "b"}
    yield made
    made.ask_to_end()
    kube.events.put(None)


def names(informer: Informer) -> set[str]:
    return {name_of(each) for each in informer.all()}


def test_events_change_what_is_known(kube: FakeKube, informer: Informer, told: Told) -> None:
    kube.events.put(("ADDED", thing("c", 2)))
    kube.events.put(("DELETED", thing("a", 3)))
    kube.events.put(("MODIFIED", thing("b", 4)))
    assert [told.next() for _ in range(3)] == ["c", "a", "b"]
    assert names(informer) == {"b", "c"}
    assert informer.get("b") == thing("b", 4)


@pytest.mark.parametrize("end", [None, Gone("too old"), Unavailable("cut")], ids=["end", "gone", "cut"])
def test_what_was_missed_is_told_by_the_next_listing(
    kube: FakeKube, informer: Informer, told: Told, end: Exception | None
) -> None:
    kube.things = [thing("b"), thing("c", 7)]  # a went and c came, and no event told so
    kube.events.put(end)
    assert {told.next(), told.next()} == {"a", "c"}
    assert names(informer) == {"b", "c"}
    assert told.is_silent()  # b is as it was


def test_an_error_is_told_until_it_is_over(kube: FakeKube, informer: Informer, told: Told) -> None:
    assert informer.error == ""
    kube.fail = Unavailable("the API is away")
    kube.things.append(thing("c", 2))
    kube.events.put(None)
    assert told.next() == "c"
    assert informer.error == ""


class Pauses(threading.Event):
    """Tells how long is waited for it, and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: queue.Queue[float | None] = queue.Queue()

    def wait(self, timeout: float | None = None) -> bool:
        self.asked.put(timeout)
        return super().wait(0)


def test_a_watch_that_ends_without_a_word_is_not_begun_anew_at_once(
    kube: FakeKube, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, pauses = Informer(cast("Kube", kube), IMAGE), Pauses()
    monkeypatch.setattr(made, "_end", pauses)
    made.start()
    kube.events.put(("ADDED", thing("c", 2)))
    kube.events.put(None)  # of one that told something
    kube.events.put(None)
    assert pauses.asked.get(timeout=_SECONDS) == 0.5
    assert kube.lists.qsize() >= 2
    made.ask_to_end()
    kube.events.put(None)


def test_a_watch_that_is_refused_again_and_again_is_asked_for_less_often(
    kube: FakeKube, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, pauses = Informer(cast("Kube", kube), IMAGE), Pauses()
    monkeypatch.setattr(made, "_end", pauses)
    made.start()
    refused = Unavailable("no watch here, though it can be listed")
    for event in (refused, refused, refused, ("ADDED", thing("c", 2)), None, refused, Gone("too old")):
        kube.events.put(event)
    assert [pauses.asked.get(timeout=_SECONDS) for _ in range(5)] == [0.5, 1.0, 2.0, 0.5, 0.5]
    made.ask_to_end()
    kube.events.put(None)


def test_an_own_write_is_seen_at_once_and_an_older_one_never(kube: FakeKube, informer: Informer, told: Told) -> None:
    informer.saw(thing("a", 5))
    kube.events.put(("MODIFIED", thing("a", 3)))  # of before that write
    kube.events.put(("MODIFIED", thing("b", 6)))
    assert told.next() == "b"
    informer.saw(thing("a", 4))
    informer.saw(thing("unknown", 9))
    assert informer.get("a") == thing("a", 5)
    assert names(informer) == {"a", "b"}


def test_what_an_own_write_brought_with_it_is_told_by_the_next_listing(
    kube: FakeKube, informer: Informer, told: Told
) -> None:
    """Somebody changes an object, its event is lost, and the answer of a write of ours has the change in it."""
    informer.saw(thing("a", 3))
    kube.things = [thing("a", 3), thing("b")]
    kube.events.put(None)
    assert told.next() == "a"
    kube.events.put(None)
    kube.events.put(("ADDED", thing("c", 4)))
    assert told.next() == "c"  # and a once


def test_a_listing_that_is_older_than_an_own_write_takes_nothing_back(
    kube: FakeKube, informer: Informer, told: Told
) -> None:
    informer.saw(thing("a", 3))  # while it was on its way
    kube.events.put(None)
    assert told.next() == "a"
    assert informer.get("a") == thing("a", 3)
    kube.events.put(("MODIFIED", thing("a", 3)))
    assert told.next() == "a"


def test_an_event_tells_what_an_own_write_brought_with_it(kube: FakeKube, informer: Informer, told: Told) -> None:
    informer.saw(thing("a", 3))
    kube.events.put(("MODIFIED", thing("a", 3)))
    assert told.next() == "a"
    kube.things = [thing("a", 3), thing("b")]
    kube.events.put(None)
    kube.events.put(("ADDED", thing("c", 4)))
    assert told.next() == "c"


def test_an_object_that_cannot_be_looked_at_hides_no_other(kube: FakeKube, told: Told) -> None:
    def look(changed: Json) -> None:
        if name_of(changed) == "a":
            raise KeyError("spec")

    made = Informer(cast("Kube", kube), IMAGE, look)
    made.tell_too(told)
    made.start()
    assert {told.next(), told.next()} == {"a", "b"}
    kube.events.put(("MODIFIED", thing("a", 3)))
    kube.events.put(("MODIFIED", thing("b", 4)))
    assert [told.next(), told.next()] == ["a", "b"]
    assert made.error == ""
    made.ask_to_end()
    kube.events.put(None)


class Work:
    """Reconciles names as `answers` say, and tells which were looked at."""

    def __init__(self, answers: Mapping[str, list[Any]] | None = None) -> None:
        self.answers = {name: [*each] for name, each in (answers or {}).items()}
        self.looked: queue.Queue[str] = queue.Queue()

    def __call__(self, name: str) -> float | None:
        self.looked.put(name)
        waiting = self.answers.get(name)
        answer = waiting.pop(0) if waiting else None
        if isinstance(answer, Exception):
            raise answer
        return cast("float | None", answer)

    def next(self) -> str:
        return self.looked.get(timeout=_SECONDS)


@pytest.mark.parametrize("answer", [0.001, Aborted("again"), Unavailable("later"), ValueError("unforeseen")], ids=repr)
def test_what_is_not_done_is_looked_at_again(answer: object) -> None:
    work = Work({"a": [answer]})
    controller = Controller("test", work)
    controller.start()
    controller.tell("a")
    assert [work.next(), work.next()] == ["a", "a"]
    controller.ask_to_end()
    controller.join(_SECONDS)
    assert work.looked.empty()


@pytest.mark.parametrize("answer", [Conflict("changed meanwhile"), Unavailable("later")], ids=repr)
def test_it_is_looked_at_again_with_growing_pauses_for_ever(answer: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    real = Controller.tell

    def tell(self: Controller, name: str, after: float = 0.0) -> None:
        pauses.append(after)
        real(self, name)

    monkeypatch.setattr(Controller, "tell", tell)
    monkeypatch.setattr("csi_driver.kube.controller.log.warning", lambda *_, **__: None)
    answers: list[object] = [*[answer] * 1100, 5.0, answer]
    work = Work({"a": answers})
    controller = Controller("test", work)
    controller.start()
    controller.tell("a")
    for _ in range(len(answers) + 1):
        work.next()
    controller.ask_to_end()
    controller.join(_SECONDS)
    assert pauses[1:11] == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert pauses[1100:] == [60.0, 5.0, 0.25]


def test_a_name_told_often_is_looked_at_once_and_never_by_two_at_a_time() -> None:
    at_work, most, guard, go = [0], [0], threading.Lock(), threading.Event()
    looked: queue.Queue[str] = queue.Queue()

    def reconcile(name: str) -> None:
        with guard:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        looked.put(name)
        go.wait(_SECONDS)
        with guard:
            at_work[0] -= 1

    controller = Controller("test", reconcile, threads=4)
    controller.start()
    controller.tell("a")
    assert looked.get(timeout=_SECONDS) == "a"
    for _ in range(10):
        controller.tell("a")  # while it is looked at: once more, afterwards
    go.set()
    assert looked.get(timeout=_SECONDS) == "a"
    controller.tell("b")
    assert looked.get(timeout=_SECONDS) == "b"
    controller.ask_to_end()
    controller.join(_SECONDS)
    assert (most, looked.empty()) == ([1], True)
