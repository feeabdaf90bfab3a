"""Files in memory alone, for secrets that a library takes by path only."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def in_memory(content: bytes) -> Iterator[str]:
    """A path that shows the content to this process, for a while. Raises OSError."""
    descriptor = os.memfd_create("luks-csi-tls", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
