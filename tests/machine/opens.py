"""Which files a command opens and which it writes, told by the kernel (fanotify(7)) and not by the command.

The command runs in a mount namespace of its own, and every mount of that is watched: so what is seen was done by the
command or by what it started, and nothing that they did in that namespace is missed. What belongs to no disk, such as
/proc, is left out.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from typing import Final, NoReturn, Protocol, Self

from csi_driver.host.syscalls import AT_FDCWD, check, libc
from tests.machine.processes import wait_for

_FAN_CLOEXEC, _FAN_NONBLOCK, _FAN_UNLIMITED_QUEUE, _FAN_UNLIMITED_MARKS = 0x1, 0x2, 0x10, 0x20
_FAN_MARK_ADD, _FAN_MARK_MOUNT = 0x1, 0x10
_FAN_MODIFY, _FAN_CLOSE_WRITE, _FAN_OPEN, _FAN_Q_OVERFLOW = 0x2, 0x8, 0x20, 0x4000
_CLONE_NEWNS: Final = 0x00020000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_EVENT: Final = Struct("=IBBHQii")  # length, version, reserved, length of this, mask, descriptor, pid
_BUFFER: Final = 64 * 1024
_NO_DISK: Final = frozenset({b"proc", b"sysfs", b"cgroup", b"cgroup2"})
# Waits until it is watched; then the command takes its place.
_GATE: Final = 'read -r _ && exec "$@" </dev/null'


@dataclass
class Opens:
    """Paths as the command saw them, " (deleted)" behind those that were removed meanwhile.

    `written` were open for writing, `modified` got other bytes or another length.
    """

    opened: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    modified: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Ran:
    """How a watched command ended, and what it did."""

    code: int
    output: str
    errors: str
    opens: Opens


class _Process(Protocol):
    """A process that waits, in a mount namespace of its own or on its way there, until it is told to go."""

    @property
    def pid(self) -> int: ...

    def go(self) -> None: ...

    def end(self, seconds: float) -> tuple[int, str, str]:
        """Its exit code, output and errors. Raises subprocess.TimeoutExpired."""

    def close(self) -> None:
        """End it, if it has not ended."""


class _Command:
    def __init__(self, argv: Sequence[str], environment: Mapping[str, str] | None) -> None:
        self._process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", _GATE, "sh", *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def end(self, seconds: float) -> tuple[int, str, str]:
        output, errors = self._process.communicate(timeout=seconds)
        return self._process.returncode, output, errors

    def close(self) -> None:
        with self._process:
            self._process.kill()


class _Call:
    def __init__(self, call: Callable[[], object]) -> None:
        self._ended = False
        self._said = [os.memfd_create(name) for name in ("output", "errors")]
        gate, self._gate = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._gate)
            _fork(call, gate, self._said)
        os.close(gate)

    @property
    def pid(self) -> int:
        return self._pid

    def go(self) -> None:
        os.write(self._gate, b"g")

    def end(self, seconds: float) -> tuple[int, str, str]:
        process = os.pidfd_open(self._pid)
        try:
            ended, _, _ = select.select([process], [], [], seconds)
        finally:
            os.close(process)
        if not ended:
            raise subprocess.TimeoutExpired("a call", seconds)
        self._ended = True
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        output, errors = (os.pread(said, os.fstat(said).st_size, 0).decode() for said in self._said)
        return code, output, errors

    def close(self) -> None:
        for descriptor in (self._gate, *self._said):
            os.close(descriptor)
        if not self._ended:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


def _fork(call: Callable[[], object], gate: int, said: Sequence[int]) -> NoReturn:
    """The child of _Call."""
    code = 1
    try:
        check(libc.unshare(_CLONE_NEWNS), "unshare")
        check(libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "mount")
        os.read(gate, 1)
        for descriptor, told in zip((1, 2), said, strict=True):
            os.dup2(told, descriptor)
        sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
        try:
            call()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001 - it is told
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class Watched:
    """A process that runs, and is watched, from the start of the block on; `end` waits for it."""

    def __init__(self, start: Callable[[], _Process]) -> None:
        self._start = start
        self._stack = contextlib.ExitStack()
        self._opens = Opens()
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._process = self._start()
            stack.callback(self._process.close)
            ours = os.readlink("/proc/self/ns/mnt")
            wait_for(lambda: os.readlink(f"/proc/{self.pid}/ns/mnt") != ours, "a mount namespace")
            # Held open: the names of its mounts are wanted when the last event is read, behind the command's end.
            stack.callback(os.close, os.open(f"/proc/{self.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
            group = _group(self.pid)
            stack.callback(os.close, group)
            reader = threading.Thread(target=self._read, args=(group,), daemon=True)
            reader.start()
            stack.callback(reader.join)
            stack.callback(self._ended.set)
            self._stack = stack.pop_all()
        self._process.go()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def end(self, seconds: float) -> Ran:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        code, output, errors = self._process.end(seconds)
        self._stack.close()
        return Ran(code, output, errors, self._opens)

    def _read(self, group: int) -> None:
        poller = select.poll()
        poller.register(group, select.POLLIN)
        while True:
            last = self._ended.is_set()  # before the look: what came before the end is read
            if poller.poll(20):
                for mask, path in _events(group):
                    self._opens.opened.add(path)
                    if mask & (_FAN_MODIFY | _FAN_CLOSE_WRITE):
                        self._opens.written.add(path)
                    if mask & _FAN_MODIFY:
                        self._opens.modified.add(path)
            elif last:
                return


class WatchedCommand(Watched):
    """A command."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        super().__init__(lambda: _Command(argv, environment))


class WatchedCall(Watched):
    """A call in a fork of this process, for which no interpreter starts anew; else as a command."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(lambda: _Call(call))


def run_watched(argv: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Ran:
    """Run a command to its end and tell what it did."""
    with WatchedCommand(argv, environment) as command:
        return command.end(seconds)


def _group(pid: int) -> int:
    """A fanotify group that hears of every file opened or written through the mounts that process `pid` sees."""
    flags = _FAN_CLOEXEC | _FAN_NONBLOCK | _FAN_UNLIMITED_QUEUE | _FAN_UNLIMITED_MARKS
    event_flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    group = check(libc.fanotify_init(ctypes.c_uint(flags), ctypes.c_uint(event_flags)), "fanotify_init")
    mask = ctypes.c_uint64(_FAN_MODIFY | _FAN_CLOSE_WRITE | _FAN_OPEN)
    for line in Path(f"/proc/{pid}/mountinfo").read_bytes().splitlines():
        head, _, tail = line.partition(b" - ")
        if tail.split(b" ")[0] in _NO_DISK:
            continue
        name = head.split(b" ")[4].decode("unicode_escape").encode("latin-1")  # as \040 for a space (proc(5))
        point = b"/proc/%d/root%b" % (pid, name)
        mark = ctypes.c_uint(_FAN_MARK_ADD | _FAN_MARK_MOUNT)
        check(libc.fanotify_mark(group, mark, mask, AT_FDCWD, point), f"fanotify_mark of {point!r}")
    return group


def _events(group: int) -> Iterator[tuple[int, str]]:
    with contextlib.suppress(BlockingIOError):
        content = os.read(group, _BUFFER)
        while content:
            length, *_, mask, descriptor, _pid = _EVENT.unpack_from(content)
            content = content[length:]
            assert not mask & _FAN_Q_OVERFLOW, "files were opened that nobody saw"
            try:
                yield mask, os.readlink(f"/proc/self/fd/{descriptor}")
            finally:
                os.close(descriptor)
