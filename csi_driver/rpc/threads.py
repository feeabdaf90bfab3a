"""The threads that calls run in."""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_Call = Callable[[], object]


def listen_with_one_poller() -> None:
    """Have grpcio accept and read by its older poller; to be called before grpcio is first used.

    The newer one hands each event to threads of the library's own once more (findings/grpcio-listener-wakeups.sh). Who
    sets `GRPC_EXPERIMENTS` chooses himself.
    """
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")


class _Ended:
    """What grpcio wants of a Future: to be told when the call has ended. Its result goes to the caller by itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: Callable[[Any], object] | None = None
        self._is_past = False

    def add_done_callback(self, told: Callable[[Any], object]) -> None:
        """Have `told` called with this; grpcio asks once."""
        with self._lock:
            if not self._is_past:
                self._told = told
                return
        told(self)

    def tell(self) -> None:
        """The call has ended."""
        with self._lock:
            self._is_past = True
        if self._told is not None:
            self._told(self)


class _Thread(threading.Thread):
    """Does calls, one at a time, until it is handed None."""

    def __init__(self, pool: "CallThreads", name: str, call: _Call) -> None:
        super().__init__(name=name)
        self._pool = pool
        self._call: _Call | None = call
        self._handed = threading.Lock()
        self._handed.acquire()

    def hand(self, call: _Call | None) -> None:
        """Wake it, which waits, for that."""
        self._call = call
        self._handed.release()

    def run(self) -> None:
        while (call := self._call) is not None:
            # While it waits it keeps nothing of a call: a request has secrets.
            self._call = None
            call()
            del call
            if not self._pool.next_for(self):
                self._handed.acquire()

    def take(self, call: _Call | None) -> None:
        """Go on with that, without waiting."""
        self._call = call


class CallThreads(ThreadPoolExecutor):
    """Up to `threads` threads, each begun when no other one is free; the one that was free last gets the next call.

    An executor for grpcio, which wants to hear of a call's end and of nothing else: the standard library's makes a
    condition variable for each call's result and counts idle threads by a semaphore, a handful of system calls more for
    each call (docs/benchmarks.md). It is one of the standard library's as grpcio takes no other for a service's own
    threads (`experimental_thread_pool`).
    """

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, name)
        self._most = threads
        self._name = name
        self._lock = threading.Lock()
        self._all: list[_Thread] = []
        self._free: list[_Thread] = []
        self._waiting: deque[_Call] = deque()
        self._is_ending = False

    @property
    def free(self) -> int:
        """How many of the threads wait for a call."""
        return len(self._free)

    def submit(self, fn: Callable[..., object], /, *args: Any, **kwargs: Any) -> Any:
        """Have it done; returns what tells of its end. Raises RuntimeError when `shutdown` was called."""
        ended = _Ended()

        def call() -> None:
            try:
                fn(*args, **kwargs)
            except Exception:
                # grpcio's own methods raise nothing: they answer the caller.
                logging.getLogger(__name__).exception("a call ended with an error that nobody was told")
            finally:
                ended.tell()

        with self._lock:
            if self._is_ending:
                raise RuntimeError("no call is taken by threads that are ending")
            if self._free:
                self._free.pop().hand(call)
            elif len(self._all) < self._most:
                thread = _Thread(self, f"{self._name}_{len(self._all)}", call)
                thread.start()  # where there can be no more, grpcio is told and nothing is waited for later
                self._all.append(thread)
            else:
                self._waiting.append(call)
        return ended

    def next_for(self, thread: _Thread) -> bool:
        """Whether there is something for a thread to go on with; else it is free."""
        with self._lock:
            if self._waiting:
                thread.take(self._waiting.popleft())
            elif self._is_ending:
                thread.take(None)
            else:
                self._free.append(thread)
                return False
        return True

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - inherited
        """Take no more; with `cancel_futures` what nobody has begun is dropped. Waits for what was begun."""
        with self._lock:
            self._is_ending = True
            if cancel_futures:
                self._waiting.clear()
            free, self._free = self._free, []
        for thread in free:
            thread.hand(None)
        if wait:
            for thread in self._all:
                thread.join()
