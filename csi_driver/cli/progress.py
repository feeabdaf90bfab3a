"""How far a long command is: one line that is written over on a terminal, a line now and then elsewhere."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final, Self, TextIO

from csi_driver.cli.output import about
from csi_driver.model.text import printable

_BAR: Final = 24
_SECONDS_ON_A_TERMINAL: Final = 0.1
_SECONDS_ELSEWHERE: Final = 10.0


def tell_stopping(descriptor: int = 2) -> None:
    """Say at once that Ctrl-C was heard. From a signal handler: standard error's own buffer may be in use just now."""
    begin = "\r\x1b[K" if os.isatty(descriptor) else ""
    with contextlib.suppress(OSError):
        os.write(descriptor, f"{begin}stopping at the next checkpoint; again stops now\n".encode())


class ProgressLine:
    """Percent, rate and time left of `total` bytes, if that is known, on standard error; `with` ends the line.

    Call it with the bytes done so far. The rate is that since the start of this process, so what an earlier one did
    does not count.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = printable(what)
        self._total = total
        self._stream = stream or sys.stderr
        self._clock = clock
        self._live = self._stream.isatty()
        self._begun = clock()
        self._first: int | None = None
        self._done = 0
        self._shown_at = 0.0 if self._live else self._begun

    def __call__(self, done: int) -> None:
        if self._first is None:
            self._first = done
        self._done = done
        now = self._clock()
        if now - self._shown_at >= (_SECONDS_ON_A_TERMINAL if self._live else _SECONDS_ELSEWHERE):
            self._shown_at = now
            self._show()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._first is not None:
            self._show()
        self._write("\n" if self._live else "")

    def _show(self) -> None:
        line = self._text()
        self._write(f"\r\x1b[K{line}" if self._live else f"{line}\n")

    def _write(self, text: str) -> None:
        """Nobody may read it any more: the work goes on, and what is left unwritten does not fail its end."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.dup2(nowhere, self._stream.fileno())
                finally:
                    os.close(nowhere)

    def _text(self) -> str:
        seconds = max(self._clock() - self._begun, 1e-3)
        rate = (self._done - (self._first or 0)) / seconds
        if self._total is None:
            return f"{self._what}: {about(self._done)}B, {about(int(rate))}B/s"
        part = min(self._done / self._total, 1.0) if self._total else 1.0
        left = f", {_clock_text((self._total - self._done) / rate)} left" if rate > 0 and part < 1 else ""
        filled = int(part * _BAR)
        bar = f"[{'#' * filled}{'.' * (_BAR - filled)}] " if self._live else ""
        return f"{self._what}: {bar}{part:4.0%} of {about(self._total)}B, {about(int(rate))}B/s{left}"


class ProgressMeter:
    """A progress line for each part of the work."""

    @contextlib.contextmanager
    def __call__(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        with ProgressLine(what, total) as line:
            yield line


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
