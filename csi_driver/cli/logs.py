"""Log lines on standard error: text for people on a terminal, one JSON object a line for everything else."""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final

import msgspec

from csi_driver.host.log import Log, log
from csi_driver.model.settings import LogFormat
from csi_driver.model.text import printable, shortened, without_surrogates

LEVELS = ("debug", "info", "warning", "error")

_EVENT_WIDTH, _LEVEL_WIDTH = 30, 9
_QUOTED: Final = frozenset(" =\"'")
_BOLD, _DIM, _RED, _GREEN, _YELLOW, _MAGENTA, _CYAN = 1, 2, 31, 32, 33, 35, 36

Render = Callable[[int, str, Mapping[str, object]], bytes]


def configure_logs(log_format: LogFormat, level: str, descriptor: int = 2) -> None:
    """Set up the process's log, and lead what libraries log by `logging` to it; `level` is one of LEVELS."""
    terminal = os.isatty(descriptor)
    text = log_format is LogFormat.TEXT or (log_format is LogFormat.AUTO and terminal)
    coloured = terminal and not os.environ.get("NO_COLOR")  # https://no-color.org
    render = _text(_coloured if coloured else _plain) if text else _json
    number = logging.getLevelNamesMapping()[level.upper()]
    log.set_up(number, _Lines(descriptor, render).write)
    logging.basicConfig(handlers=[_FromLibraries(log)], level=max(number, logging.WARNING), force=True)


class _Lines:
    """Writes each line whole. A reader that is gone must fail no call."""

    def __init__(self, descriptor: int, render: Render) -> None:
        self._descriptor = descriptor
        self._render = render
        self._guard = threading.Lock()

    def write(self, level: int, event: str, fields: Mapping[str, object]) -> None:
        bounded = {name: shortened(value) if isinstance(value, str) else value for name, value in fields.items()}
        rest = memoryview(self._render(level, shortened(event), bounded) + b"\n")
        with self._guard:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except OSError:
                    return


class _FromLibraries(logging.Handler):
    """Tells what a library logged. Of an exception only class and place: its text may quote a request."""

    def __init__(self, target: Log) -> None:
        super().__init__()
        self._target = target

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[0] is not None:
            kind, where = record.exc_info[0].__name__, f"{record.pathname}:{record.lineno}"
            self._target.log(record.levelno, "library error", library=record.name, kind=kind, where=where)
        else:
            self._target.log(record.levelno, record.getMessage(), library=record.name)


def _now() -> str:
    return f"{datetime.now(UTC).isoformat(timespec='microseconds')[:-6]}Z"


def _level(number: int) -> str:
    return logging.getLevelName(number).lower()


_encode_json = msgspec.json.Encoder(enc_hook=repr).encode


def _json(level: int, event: str, fields: Mapping[str, object]) -> bytes:
    line = {**fields, "event": event, "level": _level(level), "timestamp": _now()}
    try:
        return _encode_json(line)
    except UnicodeEncodeError:
        return _encode_json(without_surrogates(line))


def _plain(text: str, *_colours: int) -> str:
    return text


def _coloured(text: str, *colours: int) -> str:
    """The text between what a terminal takes for these colours (ECMA-48, SGR)."""
    return "".join((*(f"\x1b[{colour}m" for colour in colours), text, "\x1b[0m"))


def _text(style: Callable[..., str]) -> Render:
    def render(level: int, event: str, fields: Mapping[str, object]) -> bytes:
        colour = _GREEN if level < logging.WARNING else _YELLOW if level < logging.ERROR else _RED
        shown = (
            f"{style(printable(name), _CYAN)}={style(_value(value), _MAGENTA)}"
            for name, value in sorted(fields.items())
        )
        head = f"{style(_now(), _DIM)} [{style(_level(level).ljust(_LEVEL_WIDTH), colour, _BOLD)}]"
        line = " ".join((head, style(printable(event).ljust(_EVENT_WIDTH), _BOLD), *shown))
        return line.encode(errors="backslashreplace")

    return render


def _value(value: object) -> str:
    """What is no text is shown by its repr, which writes out by itself what a terminal may act upon."""
    if not isinstance(value, str):
        return repr(value)
    shown = printable(value)
    return shown if _QUOTED.isdisjoint(shown) else repr(shown)
