"""How long the caller of the running call waits for its answer: what may take long does as much of it as fits."""

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar

_end: ContextVar[float | None] = ContextVar("deadline", default=None)


@contextlib.contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """For the length of the block the caller waits for so many seconds; None where nobody said."""
    token = _end.set(None if seconds is None else time.monotonic() + seconds)
    try:
        yield
    finally:
        _end.reset(token)


def seconds_left() -> float:
    """For how long the caller still waits; 0 where nobody said.

    The caller over gRPC that sets no deadline waits for ages: so its server says
    (findings/grpcio-time-without-deadline.sh).
    """
    end = _end.get()
    return 0.0 if end is None else max(0.0, end - time.monotonic())
