"""Ctrl-C, SIGTERM and a terminal that goes as a wish that long work looks at, to end where it can go on later."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

Told = Callable[[], None]
"""Tells that the end was asked for. It runs in a signal handler, between any two steps of the main thread."""


def untold() -> None:
    """Nobody is told."""


@dataclass
class Stop:
    """`name` is that of the signal which asked for the end, or nothing; `told` is called when it does."""

    told: Told = untold
    name: str = ""


@contextlib.contextmanager
def stop_signals(stop: Stop) -> Iterator[None]:
    """Note SIGINT, SIGTERM and SIGHUP, once each way: the next one does what it did before.

    Only the main thread sees them.
    """
    before: dict[int, Callable[[int, FrameType | None], object] | int] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, _: FrameType | None) -> None:
        stop.name = signal.Signals(number).name
        restore()
        stop.told()

    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, note) or signal.SIG_DFL
        yield
    finally:
        restore()
