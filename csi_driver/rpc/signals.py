"""SIGTERM and SIGINT as something that can be waited for."""

import contextlib
import os
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def told_to_stop() -> Iterator[tuple[int, int]]:
    """A descriptor that gives a byte for each SIGTERM and SIGINT, and one that takes bytes with the same effect.

    A pipe and not an Event: a handler runs between any two instructions of the main thread, holding its locks.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def tell(_number: int, _frame: object) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(writer, b"\0")

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield reader, writer
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
