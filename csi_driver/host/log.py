"""What the driver tells: lines of an event and fields, handed to the writer that was set up. Without one all is silent.

It does what was used of structlog, which takes as long to load as half of this driver.
"""

import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Final

Write = Callable[[int, str, Mapping[str, object]], None]
"""Takes a line: its level (a number of `logging`), its event and its fields."""

_SILENT: Final = logging.CRITICAL + 1

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the call at work; all lines of the call carry it."""


class Log:
    """Hands lines on; safe for many threads."""

    def __init__(self) -> None:
        self.set_up()

    def set_up(self, least: int = _SILENT, write: Write = lambda *_: None) -> None:
        """From now on hand lines of level `least` and above to `write`; without arguments none."""
        self._least = least
        self._write = write

    def tells(self, level: int) -> bool:
        """Whether lines of this level are handed on."""
        return level >= self._least

    def log(self, level: int, event: str, **fields: object) -> None:
        """Tell it at a level of `logging`."""
        if level >= self._least:
            found = request_id.get()
            self._write(level, event, {"request_id": found, **fields} if found else fields)

    def debug(self, event: str, **fields: object) -> None:
        """Tell what only a search for a fault needs."""
        self.log(logging.DEBUG, event, **fields)

    def info(self, event: str, **fields: object) -> None:
        """Tell what was done."""
        self.log(logging.INFO, event, **fields)

    def warning(self, event: str, **fields: object) -> None:
        """Tell what somebody should look at."""
        self.log(logging.WARNING, event, **fields)

    def error(self, event: str, **fields: object) -> None:
        """Tell what went wrong."""
        self.log(logging.ERROR, event, **fields)


log = Log()
"""The process's own."""
