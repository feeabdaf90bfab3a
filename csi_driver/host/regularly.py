"""Something that is done again and again beside the calls of a server."""

import threading
from collections.abc import Callable

from csi_driver.host.log import log
from csi_driver.model.errors import DriverError

Ending = Callable[[], bool]
"""Whether the looks are asked to end: a long one asks between two things that it does."""


class Regularly:
    """Calls `look` in a thread of its own every so many seconds; an error is logged, and no end.

    The first look comes after `first` seconds.
    """

    def __init__(self, name: str, look: Callable[[Ending], None], seconds: float, first: float = 0.0) -> None:
        self._name = name
        self._look = look
        self._seconds = seconds
        self._first = first
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; once."""
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def ask_to_end(self) -> None:
        """Begin no look any more."""
        self._end.set()

    def join(self) -> None:
        """Wait until a look under way has ended; not started is fine."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        wait = self._first
        while not self._end.wait(wait):
            try:
                self._look(self._end.is_set)
            except (DriverError, OSError) as error:
                log.warning("a regular look failed", look=self._name, error=str(error))
            except Exception as error:  # noqa: BLE001 - what nobody foresaw must not end the looks
                log.error("a regular look failed", look=self._name, error=type(error).__name__)
            wait = self._seconds
