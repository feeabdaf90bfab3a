"""The certificate that an agent shows."""

import os
import ssl
import threading
from pathlib import Path

from csi_driver.host.log import log


class Certificate:
    """The certificate of a folder like a mounted secret of type kubernetes.io/tls; read anew when it was changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen = (0, 0)
        self._context: ssl.SSLContext | None = None
        self._told = ""
        self._guard = threading.Lock()

    def context(self) -> ssl.SSLContext:
        """Raises OSError without one (ssl.SSLError is one), and that is logged once."""
        with self._guard:
            try:
                context = self._current()
            except OSError as error:
                if self._told != (said := error.strerror or type(error).__name__):
                    log.warning("no certificate for copies and uploads", folder=str(self._folder), error=said)
                    self._told = said
                raise
            self._told = ""
            return context

    def _current(self) -> ssl.SSLContext:
        found = os.stat(self._folder / "tls.crt")
        seen = (found.st_ino, found.st_mtime_ns)
        if self._context is None or seen != self._seen:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(self._folder / "tls.crt", self._folder / "tls.key")
            self._context, self._seen = context, seen
        return self._context
