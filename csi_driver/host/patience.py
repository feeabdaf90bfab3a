"""Work that a hanging device may hold up for good, done where no thread of the server waits for it."""

import os
import threading
from collections.abc import Callable, Hashable
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")
Task = Callable[[], None]

_idle: list["SimpleQueue[Task]"] = []
"""Threads that wait for work: to make one costs many times what the work does. One that hangs is not here."""
os.register_at_fork(after_in_child=_idle.clear)  # a forked process has none of them


_hanging: dict[Hashable, threading.Event] = {}
"""What did not end in time, each with what is set when it has ended."""


def within(seconds: float, work: Callable[[], T], key: Hashable = None) -> T | None:
    """What `work` returns, if it does so in time; else None, and its thread goes on as a daemon. It must not raise.

    `key` is what it looks at: while an earlier work of the same key hangs, the answer is None at once. So a call that
    is made again and again leaves one thread behind, not one each time.
    """
    if key is not None and not _has_ended(key):
        return None
    answers: SimpleQueue[T] = SimpleQueue()
    ended = threading.Event()

    def task() -> None:
        try:
            answers.put(work())
        finally:
            ended.set()

    try:
        tasks = _idle.pop()
    except IndexError:
        tasks = SimpleQueue()
        threading.Thread(target=_work, args=(tasks,), name="patience", daemon=True).start()
    tasks.put(task)
    try:
        return answers.get(timeout=seconds)
    except Empty:
        if key is not None:
            _hanging[key] = ended
        return None


def _has_ended(key: Hashable) -> bool:
    earlier = _hanging.get(key)
    if earlier is None or earlier.is_set():
        _hanging.pop(key, None)
        return True
    return False


def _work(tasks: "SimpleQueue[Task]") -> None:
    while True:
        tasks.get()()
        _idle.append(tasks)
