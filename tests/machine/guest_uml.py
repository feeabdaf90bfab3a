"""User-mode Linux: a Linux kernel that runs as a process, here on the host's own root file system, read-only, with its
own device-mapper, loop devices and mounts. See "User Mode Linux HOWTO" at https://docs.kernel.org.

Its kernel and each of its processes are processes of the host that hand over to each other at every system call. On one
processor of the host that takes less than half the time that it takes between two, and takes it evenly.

Read-only guards the host against accidents, not against malice: root in the guest can mount the host anew, writable.
"""

import contextlib
import os
import platform
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from tests.machine.guest_init import ASKED, JOB, OUT, SHADOWED, STATE, STATUS, STDIN, STUCK, UDEVD, Job, Stream

_KERNEL = "linux.uml"
_HERE = Path(__file__).parent
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Handed to the command without being asked for: they change how it looks, not what it does.
_ENV = ("COLORTERM", "FORCE_COLOR", "LANG", "LC_ALL", "LUKS_CSI_COLOR", "NO_COLOR", "TERM", "TZ")
_FILES = {1: "stdout", 2: "stderr"}
_GONE_SECONDS = 10  # how long killed processes may take to disappear
_TAIL_SECONDS = 0.02  # between two looks at what the guest has written
_ASKED_SECONDS = 30
_LOG_LINES = 40
_LATE_LOG_LINES = 12  # of one whose time was over: few, so that what the command said last is seen above them
# The kernel leads a process group. The guard is told which, and ends it when whoever booted it is gone, kill -9
# included: then its pipe closes.
_START = 'log=$1; shift; echo $$; exec "$@" >>"$log" 2>&1'
# What the kernel starts for a terminal has a session of its own, and outlives the kernel (arch/um/drivers/chan_user.c).
_GUARD = """read -r group; cat; kill -9 "-$group"
for process in /proc/[0-9]*; do
    ! grep -qs "uml_dir=$1/" "$process/cmdline" || kill -9 "${process#/proc/}"
done
sleep 1; rm -rf "$1"
"""


class GuestError(Exception):
    """The guest cannot boot, or ended otherwise than with its command's exit; one sentence. `log` is the end of what
    its kernel said.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True, kw_only=True)
class GuestConfig:
    """What a guest is made of. Sizes are in bytes.

    `disk` is the file that holds /mnt/state: made if it is absent, and kept. None: a disk that lives as long as the
    Guest, over all its boots. `sync`: a boot that ends by itself has written everything to it. `out` is a folder of the
    host that appears as /mnt/out. `env` adds to the environment. `tap` is a tap interface of the host that becomes
    vec0, with the address `mac`. `own` are further folders in which the guest sees nothing of the host but has
    something empty of its own, and `shown` what it must see in spite of that. `kernel_log` gets what the kernel says,
    boot after boot. `udev`: a systemd-udevd looks after /dev. `terminal` is a descriptor above 2 of one that is to be
    the command's own, `stdin` what the command reads where it has none.
    """

    memory: int = 2 << 30
    disk: Path | None = None
    disk_size: int = 8 << 30
    sync: bool = True
    out: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path = field(default_factory=Path.cwd)
    tap: str | None = None
    mac: str = "02:00:00:00:00:01"
    own: Sequence[str] = ()
    shown: Sequence[Path] = ()
    kernel_log: Path | None = None
    udev: bool = False
    terminal: int | None = None
    stdin: bytes = b""


def missing() -> str | None:
    """Why no guest can boot here and what to do, in one sentence; None if one can."""
    if os.geteuid() != 0:
        return "The machine tests need root, for device-mapper or for the guest: run this as root."
    if platform.machine() != "x86_64":
        return f"This {platform.machine()} host has no device-mapper and user-mode Linux is x86_64 only: load dm_mod."
    if not shutil.which(_KERNEL, path=system_path()):
        return "This host has no device-mapper and no guest to boot: install the package user-mode-linux."
    if not shutil.which("mkfs.ext4", path=system_path()):
        return "The guest's disk cannot be made, mkfs.ext4 is absent: install the package e2fsprogs."
    return None


def system_path() -> str:
    """The caller's PATH, with the system's folders that it lacks: root's often has no sbin."""
    given = os.environ.get("PATH", "").split(":")
    return ":".join(dict.fromkeys(folder for folder in (*given, *_SYSTEM_PATH.split(":")) if folder))


def _prepare(*command: str) -> None:
    """Run one of the host's commands that must succeed before the boot; GuestError tells what it said."""
    environment = {"PATH": system_path(), "LC_ALL": "C"}
    try:
        subprocess.run(command, check=True, timeout=60, capture_output=True, text=True, env=environment)
    except subprocess.CalledProcessError as error:
        raise GuestError(f"The guest cannot be prepared, {command[0]} failed: {error.stderr.strip()}") from error


@contextlib.contextmanager
def _processor() -> Iterator[int]:
    """A processor of the host that no other guest has, as long as there is one."""
    allowed = sorted(os.sched_getaffinity(0))
    with socket.socket(socket.AF_UNIX) as claim:
        for number in allowed:
            with contextlib.suppress(OSError):
                claim.bind(f"\0luks-csi-guest-processor-{number}")  # a name that ends with the process: unix(7)
                break
        else:
            number = allowed[os.getpid() % len(allowed)]
        yield number


def _shown(config: GuestConfig) -> list[str]:
    """The folders that must be seen though the guest puts something of its own in their place."""
    wanted = {config.cwd, _HERE.parent.parent, Path(sys.prefix), Path(sys.base_prefix), *config.shown}
    hidden = [*SHADOWED, *config.own]
    return sorted(str(path) for path in wanted if any(path.is_relative_to(folder) for folder in hidden))


def _environment(extra: Mapping[str, str], *, out: bool, udev: bool) -> dict[str, str]:
    return {
        **{name: os.environ[name] for name in _ENV if name in os.environ},
        "PATH": f"/run/guest/bin:{system_path()}",
        "HOME": os.environ.get("HOME", "/root"),
        "PYTHONDONTWRITEBYTECODE": "1",
        **({} if udev else {"DM_DISABLE_UDEV": "1"}),
        "MACHINE_STATE": STATE,
        **({"MACHINE_OUT": OUT} if out else {}),
        **extra,
    }


def _shape(descriptor: int) -> tuple[int, int] | None:
    """Rows and columns of a terminal."""
    if not os.isatty(descriptor):
        return None
    columns, rows = os.get_terminal_size(descriptor)
    return rows, columns


def _streams() -> list[Stream]:
    """As the caller's own: one stream if both outputs go to one place, so that their order is kept; a terminal if it
    is one, so that the command colours its output.
    """
    if os.path.sameopenfile(1, 2):
        return [("stdout", [1, 2], _shape(1))]
    return [(name, [number], _shape(number)) for number, name in _FILES.items()]


def _members(group: int, folder: Path) -> Iterator[int]:
    """The live processes of a process group, and those of the kernel that has that folder."""
    mark = os.fsencode(f"uml_dir={folder}/")
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, _, members_group = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[:3]
            is_of_it = int(members_group) == group or mark in Path("/proc", entry, "cmdline").read_bytes()
            if is_of_it and state != "Z":
                yield int(entry)


class Guest:
    """A guest and its disk: `with Guest(config) as guest: guest.start(command); code = guest.wait(60)`.

    Between `start` and `start` the disk stays as it is, also over `kill`, which is to the guest what a kernel crash is
    to a machine. `forward` copies the command's output to this process's own while `wait` runs; `output` has it
    in any case.
    """

    def __init__(self, config: GuestConfig | None = None, *, forward: bool = False) -> None:
        self._config = config or GuestConfig()
        self._forward = forward
        self._stack = ExitStack()
        self._boot = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._streams: list[Stream] = []
        self._seen: dict[str, int] = {}
        self.disk = Path()

    def __enter__(self) -> Self:
        if reason := missing():
            raise GuestError(reason)
        if self._config.udev and not os.path.exists(UDEVD):
            raise GuestError("This host has no udev for the guest: install the package udev.")
        with ExitStack() as stack:
            self._scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="guest-")))
            self.disk = self._config.disk or self._scratch / "disk"
            if not self.disk.exists():
                self._make_disk()
            self._kernel_log = self._config.kernel_log or self._scratch / "kernel.log"
            (self._scratch / "ubd").symlink_to(self.disk.absolute())
            stack.callback(self.kill)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _make_disk(self) -> None:
        with open(self.disk, "xb") as file:
            file.truncate(self._config.disk_size)
        # The blocks of a new sparse file are zeros: nothing needs to be cleared.
        lazy = "lazy_itable_init=1,lazy_journal_init=1"
        _prepare("mkfs.ext4", "-q", "-F", "-E", lazy, str(self.disk))

    def start(self, command: Sequence[str]) -> None:
        """Boot and run a command. What an earlier boot has written is forgotten, its disk is not."""
        self.kill()
        config = self._config
        self._seen = {}
        self._log_start = self._kernel_log.stat().st_size if self._kernel_log.exists() else 0
        self._streams = _streams() if self._forward else [(name, [n], None) for n, name in _FILES.items()]
        for name in (*_FILES.values(), STATUS, ASKED, STUCK):
            (self._scratch / name).unlink(missing_ok=True)
        job = Job(
            command=list(command),
            cwd=str(config.cwd),
            env=_environment(config.env, out=config.out is not None, udev=config.udev),
            streams=self._streams,
            out=str(config.out.absolute()) if config.out else None,
            own=list(config.own),
            shown=_shown(config),
            sync=config.sync,
            udev=config.udev,
            terminal=None if config.terminal is None else _shape(config.terminal),
        )
        (self._scratch / STDIN).write_bytes(config.stdin)
        (self._scratch / JOB).write_bytes(job.dump())
        init = self._scratch / "init"
        init.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{_HERE / "guest_init.py"}" "{self._scratch}"\n')
        init.chmod(0o755)
        with ExitStack() as boot:
            source, tether = os.pipe()
            boot.callback(os.close, tether)
            with open(source, "rb") as stdin:
                guard = self._spawn([_GUARD, "guard", str(self._scratch)], stdin, subprocess.DEVNULL)
            boot.callback(self._end_group, guard)
            bound = ["taskset", "-c", str(boot.enter_context(_processor()))]
            self._process = self._spawn(
                [_START, "start", str(self._kernel_log), *bound, *self._kernel(init)], subprocess.DEVNULL, tether
            )
            boot.callback(self._end_group, self._process)
            self._boot = boot.pop_all()

    def _kernel(self, init: Path) -> list[str]:
        tap, mac = self._config.tap, self._config.mac
        terminal = self._config.terminal
        console = [] if terminal is None else [f"con1=fd:{terminal},fd:{terminal}"]
        network = [f"vec0:transport=tap,ifname={tap},depth=128,gro=1,mac={mac}"] if tap else []
        return [
            shutil.which(_KERNEL, path=system_path()) or _KERNEL,
            f"mem={self._config.memory >> 20}M",
            "umid=guest",
            f"uml_dir={self._scratch}/",
            f"ubd0={self._scratch}/ubd",
            "root=/dev/root",
            "rootfstype=hostfs",
            "rootflags=/",
            "ro",
            f"init={init}",
            "con=null",
            "con0=null,fd:1",
            *console,
            "oops=panic",
            "noreboot",
            *network,
        ]

    def _kernel_environment(self) -> dict[str, str]:
        shm = os.statvfs("/dev/shm")
        roomy = shm.f_bavail * shm.f_frsize >= self._config.memory and not shm.f_flag & os.ST_NOEXEC
        environment = {"PATH": system_path(), "HOME": str(self._scratch)}
        # The guest's memory is a deleted file, mapped with leave to execute.
        environment["TMPDIR"] = "/dev/shm" if roomy else str(self._scratch)
        if shutil.which("cc", path=system_path()):
            shim = self._scratch / "xstate.so"
            if not shim.exists():
                _prepare("cc", "-O1", "-shared", "-fPIC", "-o", str(shim), str(_HERE / "guest_xstate.c"))
            environment["LD_PRELOAD"] = str(shim)
        return environment

    def _spawn(self, script: list[str], stdin: int | IO[bytes], stdout: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["/bin/sh", "-c", *script],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            cwd=self._scratch,
            env=self._kernel_environment(),
            start_new_session=True,
            pass_fds=() if self._config.terminal is None else (self._config.terminal,),
        )

    def _end_group(self, leader: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)
        leader.wait(_GONE_SECONDS)
        deadline = time.monotonic() + _GONE_SECONDS
        while left := list(_members(leader.pid, self._scratch)):
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise GuestError(f"Killed processes {left} of the guest do not go away.")
            time.sleep(_TAIL_SECONDS)

    def kill(self) -> None:
        """End the guest at once, whatever it is doing; nothing if it does not run. What it had written to its disk is
        there, what it kept in memory is lost.
        """
        self._boot.close()
        self._process = None

    def output(self, stream: str = "stdout") -> bytes:
        """What the command has written so far to `stdout` or `stderr`."""
        with contextlib.suppress(FileNotFoundError):
            return (self._scratch / stream).read_bytes()
        return b""

    def wait(self, timeout: float) -> int:
        """The command's exit code, 128 + n if signal n ended it; the guest is down then.

        GuestError: it does not end within `timeout` seconds, its kernel panics, or memory runs out in it.
        """
        process = self._process
        if process is None:
            raise GuestError("The guest does not run: start it first.")
        deadline = time.monotonic() + timeout
        poller = select.poll()
        with ExitStack() as stack:
            pidfd = os.pidfd_open(process.pid)
            stack.callback(os.close, pidfd)
            stack.callback(self.kill)
            poller.register(pidfd, select.POLLIN)
            while True:
                ended = bool(poller.poll(_TAIL_SECONDS * 1000))
                code = self._code()  # before the output: the guest writes it last
                self._tail()
                if code is not None:
                    return self._judged(code)
                if ended:
                    raise self._crashed(process.wait(_GONE_SECONDS))
                if time.monotonic() > deadline:
                    ran = f"its command still ran after {timeout:g} s, {self._stuck()}"
                    raise GuestError(f"The guest was ended: {ran}.", self._log(_LATE_LOG_LINES))

    def _stuck(self) -> str:
        """Who waits in the guest's kernel for good, by its process 1."""
        told = self._scratch / STUCK
        (self._scratch / ASKED).touch()
        deadline = time.monotonic() + _ASKED_SECONDS
        while not told.exists():
            if time.monotonic() > deadline:
                return "and its process 1 does not answer"
            time.sleep(_TAIL_SECONDS)
        return f"in state D: {told.read_text() or 'nothing'}"

    def _code(self) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return int((self._scratch / STATUS).read_text())
        return None

    def _tail(self) -> None:
        """Carry what is new in the guest's output to this process's own."""
        if not self._forward:
            return
        for name, descriptors, _ in self._streams:
            with contextlib.suppress(FileNotFoundError), open(self._scratch / name, "rb") as file:
                file.seek(self._seen.get(name, 0))
                while data := file.read(1 << 16):
                    self._seen[name] = file.tell()
                    while data:
                        data = data[os.write(descriptors[0], data) :]

    def _whole_log(self) -> str:
        """What the kernel has said since it booted."""
        return self._kernel_log.read_bytes()[self._log_start :].decode(errors="replace")

    def _log(self, lines: int = _LOG_LINES) -> str:
        return "\n".join(self._whole_log().splitlines()[-lines:])

    def _judged(self, code: int) -> int:
        log = self._whole_log()
        if killed := re.search(r"^.*Out of memory: Killed process \d+ \((.*?)\)", log, re.MULTILINE):
            memory = self._config.memory >> 20
            raise GuestError(f"The guest's {memory} MiB of memory ran out and {killed[1]} was killed: give it more.")
        return code

    def _crashed(self, code: int) -> GuestError:
        log = self._whole_log()
        if "ptrace set fp regs failed" in log:
            return GuestError("This processor has more registers than user-mode Linux knows: install gcc.", self._log())
        if panic := re.search(r"Kernel panic - not syncing: (.*)", log):
            return GuestError(f"The guest's kernel panicked: {panic[1]}.", self._log())
        return GuestError(f"The guest went down before its command ended ({_KERNEL} exited {code}).", self._log())
