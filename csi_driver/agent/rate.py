"""How fast an agent may work beside the pods of its node."""

import contextlib
import threading
import time
from collections.abc import Iterator

from csi_driver.images.base import Progress
from csi_driver.images.bring import Meter


class Rate:
    """At most so many bytes a second, all who spend together; 0 is without a limit."""

    def __init__(self, bytes_per_second: int) -> None:
        self._per_second = bytes_per_second
        self._guard = threading.Lock()
        self._free_at = 0.0

    def spend(self, count: int) -> None:
        """Wait until so many bytes more may go."""
        if not self._per_second:
            return
        with self._guard:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + count / self._per_second
            wait = self._free_at - now
        time.sleep(wait)


def paced(meter: Meter, rate: Rate) -> Meter:
    """The same, of work that goes no faster; what an earlier run of it has done costs nothing."""

    @contextlib.contextmanager
    def slower(what: str, total: int | None) -> Iterator[Progress]:
        before: int | None = None
        with meter(what, total) as tell:

            def progress(done: int) -> None:
                nonlocal before
                tell(done)
                rate.spend(0 if before is None else done - before)
                before = done

            yield progress

    return slower
