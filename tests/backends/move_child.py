"""Moves a volume to another backend and is killed at its Nth step: `python -m tests.backends.move_child`.

A step is the begin or the end of a call that changes something outside this process. With N 0 it lives, and prints how
many steps there were.
"""

import sys
from pathlib import Path
from typing import Any

from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.files import Files
from csi_driver.host.loop import LoopDevices
from csi_driver.host.workers import Workers
from csi_driver.volumes.driver import WARM
from tests.backends.move_kills import MoveRig, pair_on
from tests.backends.rigs import RIGS
from tests.machine.conversion_child import Steps

_STEPS: dict[Any, tuple[str, ...]] = {
    Files: ("write", "set_size", "rename", "remove", "remove_folder", "make_folder", "overwrite"),
    DeviceMapper: ("let_go", "keep", "remove"),
    LoopDevices: ("attach", "guard", "unguard"),
    Workers: ("call",),
}


def main(storage: str, folder: str, backend: str, source: str, last: str) -> int:
    """Run it between the drivers in `folder`, with the volume group or the Ceph of the rig in `storage`."""
    workers = Workers(WARM)
    rig = RIGS[backend](Path(storage), workers)
    assert isinstance(rig, MoveRig)
    pair = pair_on(rig, Path(folder))
    steps = Steps(int(last))
    for owner, names in _STEPS.items():
        for name in names:
            setattr(owner, name, steps.counted(getattr(owner, name)))
    try:
        pair.move(pair.files if source == "files" else pair.group)
    finally:
        workers.stop()
    print(steps.count)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
