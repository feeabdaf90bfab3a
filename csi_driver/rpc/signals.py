"""SIGTERM and SIGINT as something that can be waited for."""

import contextlib
import os
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def told_to_stop() -> Iterator[tuple[int, int]]:
    """A descriptor that gives a byte for each SIGTERM and SIGINT, and one that takes bytes with the same effect.

    A pipe and not an Event: a handler runs between any two instructions of the main thread, holding its locks. The byte
    is written where the signal arrives (signal.set_wakeup_fd), not by Python's handler, which would not run any more
    where the main thread was about to wait: it would wait for good.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def tell(_number: int, _frame: object) -> None:
        """The byte is there already."""

    earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield reader, writer
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(earlier)
        os.close(reader)
        os.close(writer)
