"""Work that a hanging device may hold up for good, done where no thread of the server waits for it."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, name: str, work: Callable[[], T]) -> T | None:
    """What `work` returns, if it does so in time; else None, and its thread goes on as a daemon. It must not raise."""
    answer: list[T] = []
    thread = threading.Thread(target=lambda: answer.append(work()), name=name, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None
