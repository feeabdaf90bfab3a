"""What a server does again and again: at once, after an error too, and no more after its end."""

import threading

from csi_driver.host.regularly import Ending, Regularly
from csi_driver.model.errors import FailedPrecondition
from tests.told_lines import told_lines


def test_it_looks_at_once_and_goes_on_after_an_error() -> None:
    looks, third = [0], threading.Event()

    def look(_: Ending) -> None:
        looks[0] += 1
        if looks[0] == 3:
            third.set()
        if looks[0] == 1:
            raise FailedPrecondition("the first look fails; look again")

    regular = Regularly("test", look, 0.001)
    with told_lines() as told:
        regular.start()
        assert third.wait(60)
        regular.ask_to_end()
        regular.join()
    seen = looks[0]
    assert [line.event for line in told] == ["a regular look failed"]
    assert looks[0] == seen, "it looked after its end"


def test_the_first_look_may_wait_and_none_comes_once_it_was_asked_to_end() -> None:
    looks: list[Ending] = []
    regular = Regularly("test", looks.append, 0, first=3600)
    regular.start()
    regular.ask_to_end()
    regular.join()
    assert looks == []


def test_a_look_knows_that_it_is_to_end() -> None:
    begun, seen = threading.Event(), threading.Event()

    def look(ending: Ending) -> None:
        begun.set()
        while not ending():
            seen.wait(0.001)
        seen.set()

    regular = Regularly("test", look, 0)
    regular.start()
    assert begun.wait(60)
    assert not seen.is_set()
    regular.ask_to_end()
    regular.join()
    assert seen.is_set()


def test_one_that_was_never_started_can_be_ended() -> None:
    regular = Regularly("test", lambda _: None, 1)
    regular.ask_to_end()
    regular.join()
