"""A shell in the guest, for trying luks-csi by hand: `python -m tests.machine.shell`, or `make shell`.

The guest has device-mapper, whatever the host has; its disk, /mnt/state, is made for this boot and gone with it. What
comes on a standard input that is no terminal is run as a script, and its exit code comes back.
"""

import contextlib
import os
import signal
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

from tests.machine.guest import Guest, GuestConfig, GuestError
from tests.machine.guest_init import STATE

_RC = Path(__file__).with_name("shell.rc")
_BIN = Path(sys.prefix) / "bin"


@contextlib.contextmanager
def _left_as_it_was(terminal: int) -> Iterator[None]:
    """The guest makes the terminal raw, and may be killed then. Its keys are the guest's, Ctrl-C too."""
    before = termios.tcgetattr(terminal)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        signal.signal(signal.SIGINT, handler)


def config(terminal: int | None, script: bytes = b"") -> GuestConfig:
    """A guest in which `luks-csi` is found, and finds its state directory."""
    environment = {
        "HOME": STATE,
        "LUKS_CSI_STATE_DIR": f"{STATE}/luks-csi",
        "LUKS_CSI_BIN": str(_BIN),
        "TERM": os.environ.get("TERM", "linux"),
    }
    return GuestConfig(sync=False, env=environment, shown=[Path.cwd()], terminal=terminal, stdin=script)


def main() -> int:
    terminal = os.dup(0) if os.isatty(0) else None
    script = b"" if terminal is not None else sys.stdin.buffer.read()
    command = ["bash", "--rcfile", str(_RC), "-i"] if terminal is not None else ["bash", str(_RC)]
    try:
        with contextlib.ExitStack() as stack:
            guest = stack.enter_context(Guest(config(terminal, script), forward=terminal is None))
            if terminal is not None:
                stack.enter_context(_left_as_it_was(terminal))
            guest.start(command)
            return guest.wait(float("inf"))
    except GuestError as error:
        print(*filter(None, (error.log, error)), sep="\n", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
