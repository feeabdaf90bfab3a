"""Keep this process's memory out of core dumps and swap; the key workers hold volume keys in it."""

import os
import resource
import signal
from typing import Final

from csi_driver.host.syscalls import check, libc

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4


def harden_process() -> None:
    """No core dump, no ptrace by others, /proc/<pid> owned by root; children inherit the limit.

    RLIMIT_CORE is 0 for good (soft and hard), PR_SET_DUMPABLE is 0 until an exec (prctl(2)). Raises OSError.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    check(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


def die_with_parent() -> None:
    """Have the kernel end this process when the thread that made it does (prctl(2)); for what may be cut anywhere."""
    parent = os.getppid()
    check(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)
