"""Moves a volume to another volume key and is killed at its Nth step: `python -m tests.machine.conversion_child`.

A step is the begin or the end of a call that changes something outside this process: files, mapped devices, keys,
workers, the content. With N 0 it lives, and prints how many steps there were.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csi_driver.host import keyring
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.files import Files
from csi_driver.host.loop import LoopDevices
from csi_driver.host.workers import Workers
from csi_driver.keys.secret import read_secret
from csi_driver.luks.two_keys import Mover
from csi_driver.volumes.conversion import Watch
from csi_driver.volumes.driver import WARM
from tests.machine.node import SECRET, VOLUME, Node

_STEPS: dict[Any, tuple[str, ...]] = {
    Files: ("write", "write_volatile", "set_size", "rename", "remove"),
    DeviceMapper: ("load", "suspend", "resume", "clear"),
    LoopDevices: ("attach", "guard", "unguard"),
    Workers: ("call",),
    Mover: ("copy", "copy_again", "let_go"),
    keyring: ("add_to_thread", "link_to_user", "unlink_from_user"),
}


class Steps:
    """Counts them, and kills at the chosen one."""

    def __init__(self, last: int) -> None:
        self.count = 0
        self._last = last

    def take(self) -> None:
        self.count += 1
        if self.count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def stepped(*args: Any, **kwargs: Any) -> Any:
            self.take()
            result = call(*args, **kwargs)
            self.take()
            return result

        return stepped


def main(folder: str, verb: str, last: str) -> int:
    """Run it in that folder of a `Node`."""
    workers = Workers(WARM)
    node = Node(Path(folder), workers)
    steps = Steps(int(last))
    for owner, names in _STEPS.items():
        for name in names:
            setattr(owner, name, steps.counted(getattr(owner, name)))
    secret = read_secret(SECRET)
    try:
        if verb == "reencrypt":
            node.conversions.reencrypt(VOLUME, secret, Watch())
        else:
            node.conversions.encrypt(VOLUME, secret, None, Watch(), generate=False)
    finally:
        workers.stop()
    print(steps.count)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
