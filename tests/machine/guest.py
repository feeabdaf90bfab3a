"""A Linux with device-mapper, wherever the tests run: `python -m tests.machine.guest -- COMMAND…`.

A host that has device-mapper runs COMMAND itself. Any other host boots a guest on its own root file system, which the
guest sees and cannot write. COMMAND runs there, in the caller's folder, and its output and exit code come back as if it
had run here.

In the guest /run, /tmp, /var/tmp and /mnt are new and empty, and $MACHINE_STATE (/mnt/state) is an ext4 disk made for
this boot. $MACHINE_OUT is the folder of `--out`, writable in both cases. There is no network but loopback, and a udev
with `--udev` only. Nothing stays behind, however it ends: processes, disk, scratch files.

Tests that crash the machine start guests themselves, on whatever host: see `Guest`.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from tests.machine.guest_uml import Guest, GuestConfig, GuestError, missing, system_path

__all__ = ["Guest", "GuestConfig", "GuestError", "has_device_mapper", "main", "missing"]

_UNITS = {"M": 1 << 20, "G": 1 << 30}


def has_device_mapper() -> bool:
    """Whether this process may make device-mapper devices here. Loads dm_crypt if that is what it takes."""
    if os.geteuid() != 0:
        return False
    control = Path("/dev/mapper/control")
    if not control.exists() and (modprobe := shutil.which("modprobe", path=system_path())):
        subprocess.run([modprobe, "-q", "dm_crypt"], check=False, timeout=60, stderr=subprocess.DEVNULL)
    with contextlib.suppress(OSError):
        os.close(os.open(control, os.O_RDWR))
        return True
    return False


def _size(text: str) -> int:
    if not (match := re.fullmatch(r"([1-9]\d{0,5})([MG])", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512M or 8G")
    return int(match[1]) * _UNITS[match[2]]


def _variable(text: str) -> tuple[str, str]:
    name, given, value = text.partition("=")
    return name, value if given else os.environ.get(name, "")


def _terminated(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.machine.guest", description="Run COMMAND where device-mapper is."
    )
    parser.add_argument("--disk", type=_size, default="8G", help="size of the guest's disk (8G; sparse)")
    parser.add_argument("--mem", type=_size, default="2G", help="memory of the guest (2G)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds after which the guest is ended (3600)")
    parser.add_argument("--out", type=Path, help="folder that COMMAND may write to, as $MACHINE_OUT")
    parser.add_argument("--env", type=_variable, action="append", default=[], metavar="NAME[=VALUE]")
    parser.add_argument("--udev", action="store_true", help="have a udevd run in the guest")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    given = parser.parse_args(arguments)
    command = given.command[given.command[:1] == ["--"] :]
    if not command:
        parser.error("no COMMAND was given")
    if has_device_mapper():
        # --udev too: a host has its own, or none.
        out = {"MACHINE_OUT": str(given.out.absolute())} if given.out else {}
        os.execvpe(command[0], command, os.environ | out | dict(given.env))  # noqa: S606 - an argv list
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    config = GuestConfig(
        memory=given.mem, disk_size=given.disk, sync=False, out=given.out, env=dict(given.env), udev=given.udev
    )
    try:
        with Guest(config, forward=True) as guest:
            guest.start(command)
            return guest.wait(given.timeout)
    except GuestError as error:
        print(*filter(None, (error.log, error)), sep="\n", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
