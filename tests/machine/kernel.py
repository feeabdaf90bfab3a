"""What only tests ask of the kernel, or do with it."""

from pathlib import Path

from csi_driver.host import loopcontrol
from csi_driver.host.dmcontrol import Command, Flag, call
from csi_driver.host.loop import LoopDevices, LoopInfo
from csi_driver.host.mountinfo import Mount, parse_mountinfo


def suspend(mapping: str, *, noflush: bool = False) -> None:
    """Stop I/O: a file system on it is frozen and writes are flushed first; with `noflush` they stay queued."""
    call(Command.DEV_SUSPEND, mapping, flags=Flag.SUSPEND | (Flag.NOFLUSH if noflush else 0))


def bound_loops() -> list[LoopInfo]:
    """All bound loop devices, in the order of their numbers."""
    infos = map(LoopDevices().info, loopcontrol.bound_nodes())
    return [info for info in infos if info is not None]


def mounts() -> list[Mount]:
    """All mounts that this process sees."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())
