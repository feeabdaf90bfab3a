"""The descriptors that the running call holds: its volume's lock, and the devices that it works on.

Every child of the call inherits them. So a child that outlives a killed server keeps the volume locked and its devices
bound to what they were until it ends: a loop device or mapping that is open gives its number to nobody else. They
travel in a context variable so that no caller can forget them.
"""

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar

_held: ContextVar[tuple[int, ...]] = ContextVar("held_descriptors", default=())
_starting = threading.Lock()


def held_descriptors() -> tuple[int, ...]:
    """What the running call holds, for `pass_fds` and the like."""
    return _held.get()


@contextlib.contextmanager
def holding(*descriptors: int) -> Iterator[None]:
    """Hold these too for the length of the block; the caller closes them afterwards."""
    token = _held.set((*_held.get(), *descriptors))
    try:
        yield
    finally:
        _held.reset(token)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """For the length of the block a program is being started; one at a time.

    From fork to exec a child has a copy of every descriptor of this process, the locks of other calls among them.
    """
    with _starting:
        yield


def await_started() -> None:
    """Wait until no child of this process has copies of descriptors that it was not given."""
    with _starting:
        pass
