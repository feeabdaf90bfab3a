"""What a look at the node has found."""

import errno
from collections.abc import Callable
from dataclasses import dataclass

from csi_driver.model.errors import DriverError


@dataclass(frozen=True)
class Finding:
    """One look at the node. `fatal` ones stop staging; only they make Probe fail."""

    name: str
    ok: bool
    fatal: bool
    found: str
    advice: str = ""


def look_at(name: str, look: Callable[[], str], advice: str, *, fatal: bool = True) -> Finding:
    """What `look` says or raises; `advice` where its error gives none of its own."""
    try:
        return Finding(name, ok=True, fatal=fatal, found=look())
    except DriverError as error:
        # An error that says itself what to do, behind its semicolon, knows better than the general advice.
        found, _, better = str(error).partition("; ")
        return Finding(name, ok=False, fatal=fatal, found=found, advice=better or advice)
    except OSError as error:
        found = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        if error.errno in (errno.EPERM, errno.EACCES):
            advice = "run this as root"
        return Finding(name, ok=False, fatal=fatal, found=found, advice=advice)
