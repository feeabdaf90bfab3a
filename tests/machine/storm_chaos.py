"""What the callers do not foresee: kills, stops, a clock that jumps. Paced by the calls answered, not by time."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from tests.machine.leaks import processes_by_parent
from tests.machine.processes import has_ended
from tests.machine.server import ServerProcess
from tests.machine.storm_model import Ledger

_LONGEST_STOP: Final = 1.0
_LOOK_SECONDS: Final = 0.5
_MOST_FAILED_STARTS: Final = 10
_AT_WORK: Final = 0.9
_LARGEST_JUMP: Final = 7 * 24 * 3600.0
_PAUSE: Final = 0.01


class Keeper(threading.Thread):
    """Keeps a server running: starts it again whenever it was killed, and tells where it ended by itself."""

    def __init__(self, server: ServerProcess, ledger: Ledger) -> None:
        super().__init__(name=f"keeper of {server.endpoint}", daemon=True)
        self._server = server
        self._ledger = ledger
        self._over = threading.Event()
        self.ready = threading.Event()

    @property
    def pid(self) -> int:
        """The server's process id, 0 while it does not run."""
        try:
            return self._server.pid
        except RuntimeError:
            return 0

    def run(self) -> None:
        failed = 0
        while not self._over.is_set():
            try:
                self._server.start()
            except RuntimeError as error:  # its helpers may be killed while it starts
                failed += 1
                if failed == _MOST_FAILED_STARTS:
                    self._ledger.tell("stuck", f"a server does not start any more: {error}")
                continue
            failed = 0
            self.ready.set()
            while not has_ended(self._server.pid) and not self._over.wait(_PAUSE):
                pass
            self.ready.clear()
            if (code := self._server.kill()) != -signal.SIGKILL:
                self._ledger.tell("stuck", f"a server ended by itself, with {code}")

    def stop(self) -> None:
        """Kill the server for good."""
        self._over.set()
        self.join()


class Clock:
    """The machine's clock, which jumps where that is nobody's but ours: in the guest."""

    def __init__(self) -> None:
        self._is_ours = "User Mode Linux" in Path("/proc/cpuinfo").read_text()
        self._ahead = time.time() - time.monotonic()

    def jump(self, rng: random.Random) -> None:
        """To a moment of a week before or behind the true one."""
        self._set(rng.uniform(-_LARGEST_JUMP, _LARGEST_JUMP))

    def right(self) -> None:
        """Back to the true time."""
        self._set(0.0)

    def _set(self, wrong: float) -> None:
        if self._is_ours:
            time.clock_settime(time.CLOCK_REALTIME, time.monotonic() + self._ahead + wrong)


_PACE = (20, 80)
"""So many calls are answered from one deed to the next, from and to."""


class Chaos(threading.Thread):
    """Kills and stops servers and all that they have started, and commands of images."""

    def __init__(
        self,
        keepers: Sequence[Keeper],
        spared: frozenset[int],
        ledger: Ledger,
        rng: random.Random,
    ) -> None:
        super().__init__(name="chaos", daemon=True)
        self._keepers = keepers
        self._spared = spared
        self._ledger = ledger
        self._rng = rng
        self._clock = Clock()
        self._over = threading.Event()
        self._actions = {
            self._kill_server: 2,  # dear: it takes a second or two to start again
            self._kill_child: 10,
            self._stop_server: 2,
            self._stop_child: 3,
            self._orphan: 4,
            self._jump: 1,
        }

    def run(self) -> None:
        goal = 0
        try:
            while not self._over.is_set():
                goal = max(goal, self._ledger.calls - _PACE[1]) + self._rng.randint(*_PACE)
                while not self._ledger.wait_for_calls(goal, 1.0) and not self._over.is_set():
                    pass
                self._rng.choices(list(self._actions), list(self._actions.values()))[0]()
        finally:
            self._clock.right()

    def stop(self) -> None:
        """End it; whatever it stopped goes on."""
        self._over.set()
        self.join()

    def _kill_server(self) -> None:
        if (pid := self._running()) is not None:
            self._kill(pid)

    def _kill_child(self) -> None:
        if (pid := self._child()) is not None:
            self._kill(pid)

    def _stop_server(self) -> None:
        if (pid := self._running()) is not None:
            with self._stopped(pid):
                self._over.wait(self._rng.uniform(0, _LONGEST_STOP))

    def _stop_child(self) -> None:
        if (pid := self._child()) is not None:
            with self._stopped(pid):
                self._over.wait(self._rng.uniform(0, _LONGEST_STOP))

    def _orphan(self) -> None:
        """A child that is slow outlives its server, and goes on when another one may be at work."""
        if (pid := self._child()) is not None:
            with self._stopped(pid):
                for keeper in self._keepers:
                    if keeper.ready.is_set() and (server := keeper.pid) and self._rng.random() < 0.6:
                        self._kill(server)
                self._over.wait(self._rng.uniform(0, 2 * _LONGEST_STOP))

    def _jump(self) -> None:
        self._clock.jump(self._rng)

    def _kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self._ledger.count("kills")

    @contextlib.contextmanager
    def _stopped(self, pid: int) -> Iterator[None]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            self._ledger.count("stops")
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _running(self) -> int | None:
        """A server that answers calls."""
        ready = [keeper.pid for keeper in self._keepers if keeper.ready.is_set() and keeper.pid]
        return self._rng.choice(ready) if ready else None

    def _child(self) -> int | None:
        """A process that a server or a command has started; most often one that is at work."""
        deadline = time.monotonic() + _LOOK_SECONDS
        while True:
            found = self._children()
            busy = [pid for pid, name in found if name != "luks-idle" and not name.startswith("python")]
            if busy and self._rng.random() < _AT_WORK:
                return self._rng.choice(busy)
            if time.monotonic() > deadline:
                return self._rng.choice(found)[0] if found else None
            time.sleep(_PAUSE)

    def _children(self) -> list[tuple[int, str]]:
        """Processes below this one that are no servers, with their kernel names.

        Nor are those that this process is just about to start: stopped in vfork(2) they would stop us.
        """
        below = processes_by_parent()
        servers, ours = {keeper.pid for keeper in self._keepers}, _command_line(os.getpid())
        found, queue = [], [os.getpid()]
        while queue:
            for pid, words, state in below.get(queue.pop(), ()):
                if pid in self._spared:
                    continue
                queue.append(pid)
                name = words.partition("(")[2].removesuffix(")")
                if pid in servers:
                    continue
                if state == "Z":
                    _reap(pid, name)
                elif _command_line(pid) != ours:
                    found.append((pid, name))
        return found


def _command_line(pid: int) -> bytes:
    """The words of a process, b"" for one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _reap(pid: int, name: str) -> None:
    """Take in a dead orphan, so that they do not grow in number; what this process started itself is waited for."""
    if name != "luks-csi":
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
