"""Something that is done again and again beside the calls of a server."""

import threading
from collections.abc import Callable

from csi_driver.host.log import log
from csi_driver.model.errors import DriverError


class Regularly:
    """Calls `look` in a thread of its own, at once and then every so many seconds; an error is logged, and no end."""

    def __init__(self, name: str, look: Callable[[], None], seconds: float) -> None:
        self._name = name
        self._look = look
        self._seconds = seconds
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; once."""
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Wait for a look under way, and look no more; not started is fine."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                self._look()
            except (DriverError, OSError) as error:
                log.warning("a regular look failed", look=self._name, error=str(error))
            except Exception as error:  # noqa: BLE001 - what nobody foresaw must not end the looks
                log.error("a regular look failed", look=self._name, error=type(error).__name__)
            self._end.wait(self._seconds)
