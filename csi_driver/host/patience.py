"""Work that a hanging device may hold up for good, done where no thread of the server waits for it."""

import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")
Task = Callable[[], None]

_idle: list["SimpleQueue[Task]"] = []
"""Threads that wait for work: to make one costs many times what the work does. One that hangs is not here."""
os.register_at_fork(after_in_child=_idle.clear)  # a forked process has none of them


def within(seconds: float, work: Callable[[], T]) -> T | None:
    """What `work` returns, if it does so in time; else None, and its thread goes on as a daemon. It must not raise."""
    answers: SimpleQueue[T] = SimpleQueue()
    try:
        tasks = _idle.pop()
    except IndexError:
        tasks = SimpleQueue()
        threading.Thread(target=_work, args=(tasks,), name="patience", daemon=True).start()
    tasks.put(lambda: answers.put(work()))
    try:
        return answers.get(timeout=seconds)
    except Empty:
        return None


def _work(tasks: "SimpleQueue[Task]") -> None:
    while True:
        tasks.get()()
        _idle.append(tasks)
