"""What a log told, for tests."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from csi_driver.host.log import Log, log


@dataclass(frozen=True)
class Line:
    """One told line."""

    level: str
    event: str
    fields: Mapping[str, Any]


class Told(list[Line]):
    """Lines, filled by the logs that write to it."""

    def log(self, least: int) -> Log:
        """A log that tells this list lines of level `least` and above."""
        made = Log()
        made.set_up(least, self.write)
        return made

    def write(self, level: int, event: str, fields: Mapping[str, object]) -> None:
        self.append(Line(logging.getLevelName(level).lower(), event, fields))


@contextmanager
def told_lines() -> Iterator[Told]:
    """What the process's own log tells in the block."""
    told = Told()
    log.set_up(logging.DEBUG, told.write)
    try:
        yield told
    finally:
        log.set_up()
