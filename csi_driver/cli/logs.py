"""Log lines on standard error: text for people on a terminal, one JSON object a line for everything else."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from csi_driver.model.settings import LogFormat
from csi_driver.model.text import printable, shortened, without_surrogates


@contextmanager
def _without_rich() -> Iterator[None]:
    """Import structlog without rich, which it takes where it finds it, to print tracebacks that are never printed here.

    Measured: half of structlog's import, an eighth of the time from the start of the server to its first answer.
    """
    if "rich" in sys.modules:
        yield
        return
    sys.modules["rich"] = None  # type: ignore[assignment]  # "not to be had", says the import system's manual
    try:
        yield
    finally:
        del sys.modules["rich"]


with _without_rich():
    import structlog
    from structlog.typing import EventDict, Processor, WrappedLogger

LEVELS = ("debug", "info", "warning", "error")


def configure_logs(log_format: LogFormat, level: str, descriptor: int = 2) -> None:
    """Set up structlog, and lead what libraries log by `logging` to it; `level` is one of LEVELS."""
    terminal = os.isatty(descriptor)
    text = log_format is LogFormat.TEXT or (log_format is LogFormat.AUTO and terminal)
    render: Processor = structlog.dev.ConsoleRenderer(colors=terminal) if text else _json
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _bounded,
            *((_for_terminals,) if text else ()),
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=_Lines(descriptor),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_FromLibraries()], level=max(number, logging.WARNING), force=True)


class _Lines:
    """Makes and is the logger of structlog: writes each line whole. A reader that is gone must fail no call."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._guard = threading.Lock()

    def __call__(self, *_args: object) -> "_Lines":
        return self

    def msg(self, line: str | bytes) -> None:
        rest = memoryview((line if isinstance(line, bytes) else line.encode(errors="backslashreplace")) + b"\n")
        with self._guard:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except OSError:
                    return

    debug = info = warning = error = critical = msg


class _FromLibraries(logging.Handler):
    """Tells what a library logged. Of an exception only class and place: its text may quote a request."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger(record.name)
        if record.exc_info and record.exc_info[0] is not None:
            kind, where = record.exc_info[0].__name__, f"{record.pathname}:{record.lineno}"
            log.log(record.levelno, "library error", library=record.name, kind=kind, where=where)
        else:
            log.log(record.levelno, record.getMessage(), library=record.name)


_encode_json = msgspec.json.Encoder(enc_hook=repr).encode


def _bounded(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {name: shortened(value) if isinstance(value, str) else value for name, value in event.items()}


def _for_terminals(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """What is no text is shown by its repr, which writes out by itself what a terminal may act upon."""
    return {name: printable(value) if isinstance(value, str) else value for name, value in event.items()}


def _json(_logger: WrappedLogger, _method: str, event: EventDict) -> bytes:
    try:
        return _encode_json(event)
    except UnicodeEncodeError:
        return _encode_json(without_surrogates(event))
