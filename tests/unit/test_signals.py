"""A signal to stop is seen wherever the main thread is when it arrives."""

import os
import select
import signal

import pytest

from csi_driver.rpc.signals import told_to_stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_gives_a_byte_before_any_handler_of_python_runs(number: signal.Signals) -> None:
    """Python's own would not run where the main thread is about to wait; what is written where it arrives is there."""
    with told_to_stop() as (asked, told):
        found = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(found)
        assert found == told
        assert not select.select([asked], [], [], 0)[0]
        signal.raise_signal(number)
        assert os.read(asked, 16)


def test_afterwards_all_is_as_it_was() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with told_to_stop() as (asked, told):
        os.write(told, b"\0")
        assert os.read(asked, 16) == b"\0"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    found = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(found)
    assert found == -1
