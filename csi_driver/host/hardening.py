"""Keep this process's memory out of core dumps and swap; the key workers hold volume keys in it."""

import os
import resource
import signal
from typing import Final

from csi_driver.host.syscalls import check, libc

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4


def harden_process() -> None:
    """No core dump, no ptrace by others, /proc/<pid> owned by root; programs that it starts inherit the limit.

    `forbid_core` for good, PR_SET_DUMPABLE is 0 until an exec (prctl(2)). Raises OSError.
    """
    forbid_core()
    check(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


def forbid_core() -> None:
    """Leave no core dump, nor let a program that this process becomes: RLIMIT_CORE is 1, soft and hard.

    0 forbids a file alone: where core_pattern names a program, that gets the dump all the same (core(5)). Of 1 the
    kernel makes neither (fs/coredump.c), but for a collector at a socket (`@`, of Linux 6.16).
    """
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    except ValueError:  # it was 0 for good already, and to raise it takes a capability
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def die_with_parent() -> None:
    """Have the kernel end this process when the thread that made it does (prctl(2)); for what may be cut anywhere."""
    parent = os.getppid()
    check(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)
