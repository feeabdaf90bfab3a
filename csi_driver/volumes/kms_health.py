"""How the key management systems of the configuration do: for metrics, the log, and `/readyz` beside what Probe says.

No call waits for a look, and Probe does not fail by one: open volumes go on without their KMS, and a restart would mend
nothing. What calls tell hastens the next look, or is all that is known where an entry is asked with what each claim
brings.
"""

import threading
from collections.abc import Mapping
from typing import Final

from csi_driver.host.log import log
from csi_driver.keys.base import RequestNeeded
from csi_driver.keys.sources import KeySources
from csi_driver.model.errors import DeadlineExceeded, DriverError, Unavailable
from csi_driver.model.text import printable

LOOK_SECONDS: Final = 300.0
"""How often each KMS is asked while calls tell nothing new."""

CONFIGURATION: Final = "(configuration)"
"""Stands for a KMS where the configuration as a whole cannot be read."""

_FIRST_SECONDS: Final = 10.0  # a node that comes back has its volumes to stage
_LEAST_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 2.0
_DOWN: Final = frozenset({Unavailable.__name__, DeadlineExceeded.__name__})


class KmsHealth:
    """Looks at every KMS from `start` to `join`, in a thread of its own: after `first` seconds, then every `regular`
    ones, and where a call tells otherwise than the last look did, `least` seconds after that.
    """

    def __init__(
        self,
        sources: KeySources,
        first: float = _FIRST_SECONDS,
        regular: float = LOOK_SECONDS,
        least: float = _LEAST_SECONDS,
    ) -> None:
        self._sources = sources
        self._first = first
        self._regular = regular
        self._least = least
        self._lock = threading.Lock()
        self._known: dict[str, bool] = {}
        self._by_calls: set[str] = set()  # which a look cannot try
        self._hasten = threading.Event()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look, and to hear of calls."""
        self._sources.observers.append(self.heard)
        self._thread = threading.Thread(target=self._run, name="kms health", daemon=True)
        self._thread.start()

    def ask_to_end(self) -> None:
        """Ask no further KMS."""
        self._ending.set()
        self._hasten.set()

    def join(self) -> None:
        """Wait for a look under way, but not as long as a KMS may take: it changes nothing."""
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)

    def up(self) -> Mapping[str, int]:
        """1 or 0 for each KMS of which something is known, by its id."""
        with self._lock:
            return {kms_id: int(works) for kms_id, works in sorted(self._known.items())}

    def details(self) -> list[str]:
        """A line for each KMS that does not work. It names no address: anybody may read it."""
        return [
            f"KMS {printable(kms_id)} does not work, open volumes go on; the log and `luks-csi keys check` tell why"
            for kms_id, works in self.up().items()
            if not works
        ]

    def heard(self, kms_id: str, _operation: str, outcome: str, _seconds: float) -> None:
        """Take note of how a call ended: OK, or the class of its error."""
        if not kms_id:
            return
        works = outcome == "OK"
        with self._lock:
            by_calls, known = kms_id in self._by_calls, self._known.get(kms_id, True)
        if by_calls and (works or outcome in _DOWN):
            self._tell(kms_id, None if works else f"the last call that asked it ended in {outcome}")
        elif not by_calls and works != known:
            self._hasten.set()

    def look(self) -> None:
        """Ask every KMS of the configuration once."""
        try:
            ids = self._sources.ids()
        except (DriverError, OSError) as error:
            self._tell(CONFIGURATION, str(error))
            return
        if CONFIGURATION in self.up():
            self._tell(CONFIGURATION, None)
        with self._lock:
            for gone in self._known.keys() - set(ids):
                del self._known[gone]
            self._by_calls.intersection_update(ids)
        for kms_id in ids:
            if self._ending.is_set():
                return
            self._look_at(kms_id)

    def _look_at(self, kms_id: str) -> None:
        trouble = None
        try:
            self._sources.check(kms_id)
        except RequestNeeded:
            with self._lock:
                self._by_calls.add(kms_id)
            return
        except DriverError as error:
            trouble = str(error)
        except Exception as error:  # noqa: BLE001 - what nobody foresaw must not end the looks; its text may quote a key
            trouble = type(error).__name__
        if not self._ending.is_set():  # else what it was asked by may be closed already
            with self._lock:
                self._by_calls.discard(kms_id)
            self._tell(kms_id, trouble)

    def _tell(self, kms_id: str, trouble: str | None) -> None:
        with self._lock:
            before, self._known[kms_id] = self._known.get(kms_id, True), trouble is None
        if trouble is not None and before:
            log.warning("a KMS does not work", kms=kms_id, error=trouble)
        elif trouble is None and not before:
            log.info("a KMS works again", kms=kms_id)

    def _run(self) -> None:
        pause = self._first
        while True:
            self._hasten.wait(pause)
            if self._ending.is_set():
                return
            self._hasten.clear()
            self.look()
            if self._ending.wait(self._least):
                return
            pause = max(0.0, self._regular - self._least)
