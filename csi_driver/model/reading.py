"""Reading JSON as typed values, from any number of threads.

What msgspec has to know of a struct it finds out at the first reading of one, and keeps it with the class while it is
still at it: a second thread that reads at that moment uses the half of it, and the process ends with SIGSEGV (msgspec
0.22.0; two first calls of a server at once were enough). So everything typed is read here.
"""

import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

T = TypeVar("T")

_learning: Final = threading.Lock()
_learnt: Final[set[object]] = set()


def decode(content: bytes | str, kind: type[T]) -> T:
    """Read JSON as that type. Raises ValueError when it is none, or is of another shape (msgspec.DecodeError)."""
    _learn(kind)
    return msgspec.json.decode(content, type=kind)


def convert(value: object, kind: type[T], dec_hook: Callable[[type, Any], Any] | None = None) -> T:
    """Read a value of plain types as that type, as `msgspec.convert` does. Raises ValueError for another shape."""
    _learn(kind)
    return msgspec.convert(value, kind, dec_hook=dec_hook)


def _learn(kind: object) -> None:
    """Have all of it known, with every struct inside."""
    if kind not in _learnt:
        with _learning:
            msgspec.json.Decoder(kind)
            _learnt.add(kind)
