"""The audit trail: one line of JSON for each use of a key, and the same in the log. No key, no passphrase, no token.

The file is kept to two of `most_bytes`: when it is full it becomes `NAME.1`, in place of the one before.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from csi_driver.host.log import log, request_id

MOST_BYTES: Final = 16 << 20

asker: ContextVar[str] = ContextVar("asker", default="")
"""Who asks, where it is neither a call nor a command."""

_LOGIN: Final = Path("/proc/self/loginuid")
_NOBODY: Final = str((1 << 32) - 1)


class Audit:
    """Writes to the file at `path`, made when it is needed; None is the log alone."""

    def __init__(self, path: Path | None, most_bytes: int = MOST_BYTES) -> None:
        self._path = path
        self._most_bytes = most_bytes
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def using(self, **fields: str) -> Iterator[None]:
        """Tell the use that the block makes of a key, when it has ended: OK, or the class of its error."""
        outcome = "OK"
        try:
            yield
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            self.record(**fields, outcome=outcome)

    def record(self, **fields: str) -> None:
        """Tell one use. What keeps the file from being written is logged: a full disk must not keep volumes closed."""
        asked = request_id.get()
        fields = {"by": "call" if asked else asker.get() or f"command of user {_login()}", **fields}
        log.info("key used", **fields)
        if self._path is None:
            return
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
        content = msgspec.json.encode(line | ({"request_id": asked} if asked else {})) + b"\n"
        try:
            with self._lock:
                self._append(self._path, content)
        except OSError as error:
            log.warning("the audit file cannot be written", path=str(self._path), error=error.strerror)

    def _append(self, path: Path, content: bytes) -> None:
        with _opened(path) as descriptor:
            if os.fstat(descriptor).st_size + len(content) <= self._most_bytes:
                os.write(descriptor, content)
                return
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    os.replace(path, path.with_name(f"{path.name}.1"))
        with _opened(path) as descriptor:
            os.write(descriptor, content)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _login() -> str:
    """The number of the user who logged in, which sudo leaves as it is (audit's loginuid); else that of the process."""
    with contextlib.suppress(OSError):
        if (found := _LOGIN.read_text().strip()) != _NOBODY:
            return found
    return str(os.getuid())
