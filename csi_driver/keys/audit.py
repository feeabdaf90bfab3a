"""The audit trail: one line of JSON for each use of a key, and the same in the log. No key, no passphrase, no token.

The file is kept to two of `most_bytes`: when it is full it becomes `NAME.1`, in place of the one before.
"""

import contextlib
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from csi_driver.host.log import log, request_id

MOST_BYTES: Final = 16 << 20


class Audit:
    """Writes to the file at `path`, made when it is needed; None is the log alone."""

    def __init__(self, path: Path | None, most_bytes: int = MOST_BYTES) -> None:
        self._path = path
        self._most_bytes = most_bytes
        self._lock = threading.Lock()

    def record(self, **fields: str) -> None:
        """Tell one use. What keeps the file from being written is logged: a full disk must not keep volumes closed."""
        log.info("key used", **fields)
        if self._path is None:
            return
        asked = request_id.get()
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
        content = msgspec.json.encode(line | ({"request_id": asked} if asked else {})) + b"\n"
        try:
            with self._lock:
                self._append(self._path, content)
        except OSError as error:
            log.warning("the audit file cannot be written", path=str(self._path), error=error.strerror)

    def _append(self, path: Path, content: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.fstat(descriptor).st_size + len(content) > self._most_bytes:
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                        os.replace(path, path.with_name(f"{path.name}.1"))
                os.close(descriptor)
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            os.write(descriptor, content)
        finally:
            os.close(descriptor)
