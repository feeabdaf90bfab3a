"""The child processes of an agent: each makes one image, tells how far it is, and goes on where another was cut."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Final, cast

import msgspec

from csi_driver.agent.work import Doing, Download, Failed, Line, Made, Request, Used
from csi_driver.host.log import log
from csi_driver.keys.audit import Audit
from csi_driver.model.reading import decode

_RATE_SECONDS: Final = 10.0


class Job:
    """One child at work; `changed` is called, from a thread of its own, when it has told something and when it ended.

    What it did with a passphrase is told to `audit`, as asked by the Image that it is at work for.

    When the agent ends, however it does, the kernel ends the child (`die_with_parent`).
    """

    def __init__(self, request: Request, audit: Audit, changed: Callable[[], None]) -> None:
        self.doing = Doing("starting", 0, None)
        self.bytes_per_second = 0
        self.result: Made | Failed | None = None
        self.downloads = isinstance(request.work, Download)
        self._name = request.name
        self._audit = audit
        self._changed = changed
        self._stopped = False
        self._samples: list[tuple[float, int]] = []
        self._child = subprocess.Popen(
            [sys.executable, "-m", "csi_driver.agent.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        pipes = cast("IO[bytes]", self._child.stdin), cast("IO[bytes]", self._child.stdout)
        self._thread = threading.Thread(
            target=self._follow, args=(request, *pipes), name=f"job {request.name}", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Ask it to end where it can be gone on with; asked again, it ends at once."""
        number = signal.SIGKILL if self._stopped else signal.SIGTERM
        self._stopped = True
        self._child.send_signal(number)

    def join(self, seconds: float) -> bool:
        """Whether it has ended, within that time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _follow(self, request: Request, requests: IO[bytes], lines: IO[bytes]) -> None:
        result: Made | Failed | None = None
        try:
            with requests:
                requests.write(msgspec.json.encode(request))
        except OSError:
            pass  # it has ended; what it said of that comes now
        with lines:
            for text in lines:
                try:
                    line = decode(text, cast("type[Line]", Line))
                except msgspec.MsgspecError:
                    continue
                if isinstance(line, Doing):
                    self._measure(line)
                    self._changed()
                elif isinstance(line, Used):
                    self._audit.record(**line.fields, by=f"Image {request.owner}")
                else:
                    result = line
        code = self._child.wait()
        if result is None:
            said = f"the process that made image {self._name} was ended (exit code {code}); another goes on"
            result = Failed(said, elsewhere=True)  # there may be too little memory
            log.warning("image process ended", image=self._name, code=code)
        self.result = result
        self._changed()

    def _measure(self, doing: Doing) -> None:
        now = time.monotonic()
        if doing.what != self.doing.what:
            self._samples = []
        self.doing = doing
        self._samples = [(at, done) for at, done in self._samples if now - at < _RATE_SECONDS] + [(now, doing.done)]
        first_at, first = self._samples[0]
        self.bytes_per_second = int((doing.done - first) / (now - first_at)) if now > first_at else 0
