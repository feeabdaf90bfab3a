"""Where a call can be cut: every step that changes something outside the server's process.

The seams of `csi_driver.volumes.driver.Host` are replaced by subclasses that do what their parents do and, around each
step, ask an `Injector`. Unarmed it only tells of the step: that is how the list of points is made. Armed with a `Fault`
it lets the step fail, or kills the server with SIGKILL before, during or after it, or kills the worker that does it.
"""

import contextlib
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import ParamSpec, TypeVar
from unittest import mock

from csi_driver.host import launcher
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.files import Files
from csi_driver.host.handle import Handle
from csi_driver.host.loop import AttachedLoop, LoopDevices, LoopInfo
from csi_driver.host.mounts import Mounts
from csi_driver.host.workers import LauncherProcess, Workers
from csi_driver.model.errors import CommandFailed, DeviceInUse, FailedPrecondition, ResourceExhausted
from csi_driver.volumes.driver import WARM, Host

P = ParamSpec("P")
R = TypeVar("R")

_FOREVER = 600.0
_SOON = 1e-6
_BY_VERB = ("lvm ", "rados ", "rbd ", "ceph ")  # programs whose second word is what they do
_LOOKS = {
    *(f"worker lvm {what}" for what in ("lvs", "vgs")),
    *(f"worker rados {what}" for what in ("get", "getomapval", "listomapkeys", "lspools", "stat")),
    *(f"worker rbd {what}" for what in ("info", "status")),
    *(f"worker ceph {what}" for what in ("df", "fsid", "mon")),
}
"""Steps that change nothing: a kill after one is a kill before the next."""


class Kind(StrEnum):
    """What happens at a point. After an ABANDON nobody repeats the call: the volume is taken down instead."""

    FAIL = "fail"
    BEFORE = "kill before"
    DURING = "kill during, the child works on"
    AFTER = "kill after"
    ABANDON = "kill after, then give up"
    WORKER = "kill the worker, and the program that it runs"
    ZOMBIE = "kill after, then the mapping loses its device"
    FOREIGN = "the device holds somebody else's data"

    @property
    def kills_server(self) -> bool:
        """Whether the server is gone afterwards."""
        return self in (Kind.BEFORE, Kind.DURING, Kind.AFTER, Kind.ABANDON, Kind.ZOMBIE)


@dataclass(frozen=True)
class Point:
    """The n-th use of a seam within a call of a scenario.

    `depth` counts the steps around it. `seconds` is what it took when it was recorded. `again` says that another kind
    of volume, encrypted as this one is or not, has it too: then what differs is what follows it.
    """

    scenario: str
    call: str
    seam: str
    nth: int
    depth: int = field(default=0, compare=False)
    seconds: float = field(default=0.0, compare=False)
    again: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.scenario}: {self.call}: {self.seam} #{self.nth}"

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What can happen here; between the steps of a step, and again, only what does not happen elsewhere."""
        if self.depth:
            return () if self.again else (Kind.FAIL, Kind.AFTER)
        if self.seam in _LOOKS:
            return (Kind.FAIL,) if self.again else (Kind.BEFORE, Kind.FAIL)
        kinds = [Kind.BEFORE, Kind.AFTER]
        if (self.call, self.seam) != ("unstage", "loop unguard"):  # which may fail: attach and delete do it again
            kinds.append(Kind.FAIL)
        if self.seam.startswith("worker"):
            kinds += [Kind.DURING, Kind.WORKER]
        if self.call in ("create", "stage", "publish"):
            kinds.append(Kind.ABANDON)
        return tuple(kind for kind in kinds if not self.again or kind in (Kind.FAIL, Kind.AFTER, Kind.ABANDON))


@dataclass(frozen=True)
class Fault:
    """What the injector is armed with; `delay` in seconds is how far into the step WORKER cuts it.

    `gate` is a path: the child of DURING says that it waits by a file `<gate>.waits`, and works when `gate` is there.
    """

    seam: str
    nth: int
    kind: Kind
    delay: float = 0.0
    gate: str = ""


@dataclass(frozen=True)
class Begun:
    """A step begins."""

    seam: str
    nth: int
    depth: int
    title: str


@dataclass(frozen=True)
class Ended:
    """A step ended well after so many seconds."""

    seam: str
    nth: int
    seconds: float


@dataclass(frozen=True)
class Fired:
    """The fault was injected."""


class Injector:
    """Counts the steps of the running call and does what it is armed with; `tell` carries each message away."""

    def __init__(self, tell: Callable[[Begun | Ended | Fired], None]) -> None:
        self._tell = tell
        self._fault: Fault | None = None
        self._uses: dict[str, int] = {}
        self._active: list[str] = []
        self.before_death: list[Callable[[], None]] = []

    def arm(self, fault: Fault | None) -> None:
        """Begin a call."""
        self._fault = fault
        self._uses.clear()

    def step(
        self,
        seam: str,
        title: str,
        run: Callable[[], R],
        failure: Callable[[], Exception],
        child: Callable[[Fault], R] | None = None,
    ) -> R:
        """Do one step. `failure` makes the error that it raises in life.

        `child` does it in a process of its own that is killed amid it (WORKER) or waits at a gate before it (DURING).
        """
        if seam in self._active:  # a method that calls itself is one step
            return run()
        nth = self._uses[seam] = self._uses.get(seam, 0) + 1
        fault = self._fault if self._fault and (self._fault.seam, self._fault.nth) == (seam, nth) else None
        kind = fault.kind if fault else None
        self._tell(Begun(seam, nth, len(self._active), title))
        if kind is Kind.FAIL:
            self._tell(Fired())
            raise failure()
        if kind is Kind.BEFORE:
            self._die()
        started = time.perf_counter()
        self._active.append(seam)
        try:
            if fault and child and kind is Kind.WORKER:
                self._tell(Fired())
                return child(fault)
            if fault and child and kind is Kind.DURING:
                threading.Thread(target=self._die_when_it_waits, args=(fault.gate,), daemon=True).start()
                child(fault)
            result = run()
        finally:
            self._active.pop()
        if kind in (Kind.AFTER, Kind.ABANDON, Kind.ZOMBIE):
            self._die()
        self._tell(Ended(seam, nth, time.perf_counter() - started))
        return result

    def _die_when_it_waits(self, gate: str) -> None:
        _await(f"{gate}.waits")
        self._die()

    def _die(self) -> None:
        for undo in self.before_death:
            undo()
        self._tell(Fired())
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(_FOREVER)


def die_amid(delay: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Work of a worker that is killed after `delay` seconds, and at the latest before it can answer.

    By SIGALRM, which kills as well: a thread would keep what is run from ending with the worker (`run_program`).
    """
    set_timer = signal.setitimer
    with mock.patch.object(signal, "setitimer"):  # there is one timer, and `librados.answer` would take it
        set_timer(signal.ITIMER_REAL, max(delay, _SOON))
        function(*args, **kwargs)
        time.sleep(_FOREVER)
    raise AssertionError("the timer did not kill this process")


def work_late(gate: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Work of a worker that is still about to do it when its server has been killed and replaced."""
    Path(f"{gate}.waits").touch()
    _await(gate)
    return function(*args, **kwargs)


def _await(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.005)


def faulty_host(injector: Injector) -> Host:
    """The operating system with an injector around every step."""
    return Host(
        files=FaultyFiles(injector),
        workers=FaultyWorkers(injector),
        loops=FaultyLoops(injector),
        mapper=FaultyMapper(injector),
        mounts=FaultyMounts(injector),
    )


class FaultyFiles(Files):
    def __init__(self, injector: Injector) -> None:
        self._injector = injector

    def write(self, path: Path, content: bytes) -> None:
        self._step("write", path, lambda: super(FaultyFiles, self).write(path, content), errno.EIO)

    def write_volatile(self, path: Path, content: bytes) -> None:
        self._step("write_volatile", path, lambda: super(FaultyFiles, self).write_volatile(path, content), errno.EIO)

    def fill(self, path: Path, content: bytes, *, durable: bool) -> None:
        self._step("fill", path, lambda: super(FaultyFiles, self).fill(path, content, durable=durable), errno.ENOSPC)

    def set_size(self, path: Path, size: int, *, new: bool = False) -> None:
        self._step("set_size", path, lambda: super(FaultyFiles, self).set_size(path, size, new=new), errno.ENOSPC)

    def make_folder(self, folder: Path) -> None:
        self._step("make_folder", folder, lambda: super(FaultyFiles, self).make_folder(folder), errno.ENOSPC)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", target, lambda: super(FaultyFiles, self).rename(source, target), errno.EIO)

    def sync_folder(self, folder: Path) -> None:
        self._step("sync_folder", folder, lambda: super(FaultyFiles, self).sync_folder(folder), errno.EIO)

    def remove(self, path: Path) -> None:
        self._step("remove", path, lambda: super(FaultyFiles, self).remove(path), errno.EIO)

    def remove_folder(self, folder: Path, last: str = "") -> None:
        self._step("remove_folder", folder, lambda: super(FaultyFiles, self).remove_folder(folder, last), errno.EIO)

    def _step(self, name: str, path: Path, run: Callable[[], None], number: int) -> None:
        what = "note" if path.parent.name == "keys" else "file"  # of a key that a KMS makes or forgets
        if path.name.endswith(".luks2.new"):  # of a header, on its way to a cluster
            what = "copy"
        self._injector.step(f"{what} {name}", str(path), run, lambda: OSError(number, os.strerror(number), str(path)))


class FaultyWorkers(Workers):
    def __init__(self, injector: Injector) -> None:
        super().__init__(WARM, fork_launcher)
        self._injector = injector

    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        call = super().call

        def child(fault: Fault) -> R:
            if fault.kind is Kind.WORKER:
                return call(what, timeout, die_amid, fault.delay, function, *args, **kwargs)
            return call(what, timeout, work_late, fault.gate, function, *args, **kwargs)

        return self._injector.step(
            f"worker {' '.join(what.split(' ')[: 2 if what.startswith(_BY_VERB) else 1])}",
            what,
            lambda: call(what, timeout, function, *args, **kwargs),
            lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
            child,
        )


class FaultyLoops(LoopDevices):
    def __init__(self, injector: Injector) -> None:
        self._injector = injector

    def attach(self, path: str, *, autoclear: bool, read_only: bool = False) -> AttachedLoop:
        return self._injector.step(
            "loop attach",
            path,
            lambda: super(FaultyLoops, self).attach(path, autoclear=autoclear, read_only=read_only),
            lambda: ResourceExhausted(f"no loop device could be bound to {path}"),
        )

    def guard(self, path: str) -> None:
        self._injector.step(
            "loop guard",
            path,
            lambda: super(FaultyLoops, self).guard(path),
            lambda: FailedPrecondition(f"{path} cannot be guarded against writers"),
        )

    def unguard(self, path: str) -> None:
        self._injector.step(
            "loop unguard",
            path,
            lambda: super(FaultyLoops, self).unguard(path),
            lambda: FailedPrecondition(f"{path} cannot be opened to writers"),
        )

    def set_capacity(self, device: Handle) -> None:
        self._injector.step(
            "loop set_capacity",
            device.name,
            lambda: super(FaultyLoops, self).set_capacity(device),
            lambda: CommandFailed(f"could not resize {device}"),
        )

    def detach(self, device_path: str, expected: LoopInfo | None = None) -> None:
        self._injector.step(
            "loop detach",
            device_path,
            lambda: super(FaultyLoops, self).detach(device_path, expected),
            lambda: DeviceInUse(f"the loop device {device_path} is still open somewhere"),
        )


class FaultyMapper(DeviceMapper):
    def __init__(self, injector: Injector) -> None:
        self._injector = injector

    def remove(self, name: str) -> None:
        self._injector.step(
            "mapper remove",
            name,
            lambda: super(FaultyMapper, self).remove(name),
            lambda: CommandFailed(f"device-mapper could not remove {name}"),
        )


class FaultyMounts(Mounts):
    def __init__(self, injector: Injector) -> None:
        super().__init__()
        self._injector = injector

    def __reduce__(self) -> tuple[type[Mounts], tuple[()]]:
        return Mounts, ()  # in a worker it is the plain one: there the step is the worker's call

    def bind(self, source: Handle, target: str, *, read_only: bool) -> None:
        self._injector.step(
            "mount bind",
            target,
            lambda: super(FaultyMounts, self).bind(source, target, read_only=read_only),
            lambda: CommandFailed(f"{source} could not be bind-mounted at {target}"),
        )

    def unmount(self, path: str) -> None:
        self._injector.step(
            "mount unmount",
            path,
            lambda: super(FaultyMounts, self).unmount(path),
            lambda: DeviceInUse(f"{path} could not be unmounted"),
        )


class ForkedLauncher:
    """A launcher that was forked off this process instead of started: half a second less in the guest."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)


def fork_launcher(control: socket.socket, warm: Sequence[str]) -> LauncherProcess:
    """A launcher that has everything loaded. What it inherits but for `control` it closes, as an exec would."""
    pid = os.fork()
    if pid:
        return ForkedLauncher(pid)
    code = 1
    try:
        os.setsid()
        _close_all_but(control.fileno())
        code = launcher.main([str(control.fileno()), *warm])
    finally:
        os._exit(code)


_OPENED_ONCE = ("/dev/urandom", "/dev/mapper/control")
"""What libcryptsetup and the driver open once: what a test has opened, the worker goes on with."""


def _close_all_but(kept: int) -> None:
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if number > 2 and number != kept and os.readlink(f"/proc/self/fd/{number}") not in _OPENED_ONCE:
                os.close(number)
