"""What a server does again and again: at once, after an error too, and no more after its end."""

import threading

from csi_driver.host.regularly import Regularly
from csi_driver.model.errors import FailedPrecondition
from tests.told_lines import told_lines


def test_it_looks_at_once_and_goes_on_after_an_error() -> None:
    looks, third = [0], threading.Event()

    def look() -> None:
        looks[0] += 1
        if looks[0] == 3:
            third.set()
        if looks[0] == 1:
            raise FailedPrecondition("the first look fails; look again")

    regular = Regularly("test", look, 0.001)
    with told_lines() as told:
        regular.start()
        assert third.wait(60)
        regular.stop()
    seen = looks[0]
    assert [line.event for line in told] == ["a regular look failed"]
    assert looks[0] == seen, "it looked after its end"


def test_one_that_was_never_started_can_be_stopped() -> None:
    Regularly("test", lambda: None, 1).stop()
