"""Work by name: each name is worked on by one thread at a time, as often as something was told of it, never twice for
nothing, and again with growing pauses where it failed.
"""

import threading
import time
from collections.abc import Callable, Hashable
from typing import Final

from csi_driver.host.log import log
from csi_driver.model.errors import Aborted, DriverError

Reconcile = Callable[[str], float | None]
"""Makes what there is be what is wanted, for one name; seconds after which to look again, None for when it is told."""

_FIRST_SECONDS: Final = 0.25
_MOST_SECONDS: Final = 60.0
_MOST_DOUBLINGS: Final = 10  # no float holds the product of a thousand


class Controller:
    """Calls `reconcile` for each name that it is told, in `threads` threads, from `start` on."""

    def __init__(self, name: str, reconcile: Reconcile, threads: int = 1) -> None:
        self._name = name
        self._reconcile = reconcile
        self._due: dict[str, float] = {}
        self._working: set[Hashable] = set()
        self._failures: dict[str, int] = {}
        self._change = threading.Condition()
        self._ended = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name} {number}", daemon=True) for number in range(threads)
        ]

    def start(self) -> None:
        """Begin; once."""
        for thread in self._threads:
            thread.start()

    def tell(self, name: str, after: float = 0.0) -> None:
        """Have it looked at, in so many seconds at the latest."""
        with self._change:
            at = time.monotonic() + after
            self._due[name] = min(at, self._due.get(name, at))
            self._change.notify()

    def ask_to_end(self) -> None:
        """Begin nothing any more."""
        with self._change:
            self._ended = True
            self._change.notify_all()

    def join(self, seconds: float) -> None:
        """Wait until what is under way has ended, that long at most."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        while (name := self._next()) is not None:
            after = self._once(name)
            with self._change:
                self._working.discard(name)
                self._change.notify()
            if after is not None:
                self.tell(name, after)

    def _next(self) -> str | None:
        with self._change:
            while not self._ended:
                ready = [(at, name) for name, at in self._due.items() if name not in self._working]
                at, name = min(ready, default=(None, ""))
                now = time.monotonic()
                if at is not None and at <= now:
                    del self._due[name]
                    self._working.add(name)
                    return name
                self._change.wait(None if at is None else at - now)
            return None

    def _once(self, name: str) -> float | None:
        try:
            after = self._reconcile(name)
        except Aborted as error:
            log.debug("looked at again", controller=self._name, name=name, error=str(error))
            return self._pause(name)
        except DriverError as error:
            log.warning("not done yet", controller=self._name, name=name, error=str(error))
            return self._pause(name)
        except Exception as error:  # noqa: BLE001 - what nobody foresaw must not end all the other work
            kind = type(error).__name__
            log.error("not done yet", controller=self._name, name=name, error=kind, where=_where(error))
            return self._pause(name)
        self._failures.pop(name, None)
        return after

    def _pause(self, name: str) -> float:
        count = self._failures.get(name, 0)
        self._failures[name] = count + 1
        return float(min(_FIRST_SECONDS * 2 ** min(count, _MOST_DOUBLINGS), _MOST_SECONDS))


def _where(error: BaseException) -> str:
    """File and line; not the text, which may quote anything."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}" if at else ""
