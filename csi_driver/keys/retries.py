"""Asking a KMS again: what passes by itself is asked three times within seconds; all else is final at once."""

from collections.abc import Callable
from typing import Any, Final, TypeVar

from csi_driver.keys.extras import load
from csi_driver.model.errors import Unavailable

T = TypeVar("T")

_POLICY: Final[dict[str, Any]] = {
    "attempts": 3,
    "wait_initial": 0.2,
    "wait_max": 2.0,
    "wait_jitter": 0.3,
}


def retried(where: str, extra: str, call: Callable[[], T]) -> T:
    """What `call` returns; after Unavailable it is called again, with growing pauses.

    `where` names the KMS, `extra` the one of the package that brings its client.
    """
    stamina = load("stamina", where, extra)
    stamina.instrumentation.set_on_retry_hooks([])  # they log what was called, with its arguments
    last: T
    for attempt in stamina.retry_context(on=Unavailable, **_POLICY):
        with attempt:
            last = call()
    return last
