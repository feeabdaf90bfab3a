"""Work that goes on beside other work."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Later(Generic[T]):
    """A call in a thread of its own, begun at once. The process may end before it has: it hangs nobody."""

    def __init__(self, name: str, call: Callable[[], T], patience: float) -> None:
        self._call = call
        self._patience = patience
        self._answer: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def has_ended(self, patience: float) -> bool:
        """Whether the call has ended, at most `patience` seconds from now."""
        self._thread.join(patience)
        return not self._thread.is_alive()

    def result(self) -> T:
        """What the call returned, or raised; TimeoutError when it has done neither within `patience` seconds."""
        self._thread.join(self._patience)
        if self._error is not None:
            raise self._error
        if not self._answer:
            raise TimeoutError
        return self._answer[0]

    def _work(self) -> None:
        try:
            self._answer.append(self._call())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            self._error = error
