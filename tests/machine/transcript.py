"""What a demonstration tells while it runs: numbered steps with their times, and checks that can fail."""

import os
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_WIDTH = 100
_COLOURS = {"bold": "1", "dim": "2", "red": "1;31", "green": "32"}
_CLEAR_LINE = "\r\x1b[K"


class Transcript:
    """Writes to `stream`: coloured on a terminal, plain when piped; NO_COLOR and FORCE_COLOR decide otherwise."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._colour = not os.environ.get("NO_COLOR") and (self._terminal or bool(os.environ.get("FORCE_COLOR")))
        self._steps = 0
        self.title = ""
        self._lines: list[str] = []
        self._started = time.monotonic()
        self.passed = 0
        self.failed: list[str] = []

    @property
    def seconds(self) -> float:
        """Time since the beginning."""
        return time.monotonic() - self._started

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """One step: its title with its time, then what was told and checked in it, also when it is cut by an error."""
        self._steps += 1
        self.title = f"{self._steps} ({title})"
        title = f"{self._steps:2}. {title}"
        if self._terminal:
            self._write(f"{title} …", end="")
        started = time.monotonic()
        try:
            yield
        finally:
            took = f"{time.monotonic() - started:.2f} s"
            clear = _CLEAR_LINE if self._terminal else ""
            gap = " " * (_WIDTH - len(title) - len(took))
            self._write(f"{clear}{self._in('bold', title)}{gap}{self._in('dim', took)}")
            for line in self._lines:
                self._write(line)
            self._lines.clear()

    def command(self, line: str) -> None:
        """The command that does the same by hand."""
        pieces = textwrap.wrap(f"$ luks-csi {line}", _WIDTH - 6, break_on_hyphens=False, subsequent_indent="    ")
        self._lines += [self._in("dim", f"    {piece}") for piece in " \\\n".join(pieces).splitlines()]

    def tell(self, line: str) -> None:
        """Something to look at."""
        pieces = textwrap.wrap(line, _WIDTH - 6, drop_whitespace=False)
        self._lines += [f"      {piece}".rstrip() for piece in pieces]

    def check(self, statement: str, found: object, wanted: object) -> None:
        """A statement that holds if `found` is what is wanted; else it tells both."""
        if found == wanted:
            self.passed += 1
            self._lines.append(f"    {self._in('green', '✓')} {statement}")
        else:
            self.failed.append(statement)
            self._lines.append(f"    {self._in('red', '✗ NOT SO:')} {statement} (found {found}, wanted {wanted})")

    def say(self, text: str) -> None:
        """A line outside of all steps."""
        self._write(text)

    def verdict(self, text: str) -> None:
        """The last line."""
        self._write(self._in("red" if self.failed else "green", text))

    def _in(self, colour: str, text: str) -> str:
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if self._colour else text

    def _write(self, text: str, end: str = "\n") -> None:
        self._stream.write(text + end)
        self._stream.flush()
