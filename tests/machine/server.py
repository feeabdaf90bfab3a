"""The real server as a process of its own, for tests."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from csi_driver.rpc.client import CsiClient, RemoteError

PROGRAM = (str(Path(sys.executable).with_name("luks-csi")), "serve")

_START_SECONDS = 60
_STOP_SECONDS = 30


class ServerProcess:
    """`luks-csi serve` on a socket below `folder`, ready when the block begins and gone when it ends."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self.folder = folder
        self.state_dir = folder / "state"
        self.endpoint = folder / "csi.sock"
        self._options = options
        self._program = program
        self._environment = environment or {}
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The server's process id."""
        if self._process is None:
            raise RuntimeError("the server does not run")
        return self._process.pid

    def start(self, *, healthy: bool = True) -> None:
        """Start it and wait until Probe says that it works; any answer will do where it is not to be `healthy`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        argv = [
            *self._program, "--endpoint", str(self.endpoint), "--state-dir", str(self.state_dir),
            "--node-id", "node-1", "--free-space-floor", "64Mi", "--log-format", "json", *self._options,
        ]  # fmt: skip
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **self._environment}
            )
        try:
            with CsiClient(self.endpoint) as client:
                client.wait_until_ready(_START_SECONDS)
        except RemoteError as error:
            if not healthy and error.code != "DEADLINE_EXCEEDED":
                return
            self.kill()
            raise RuntimeError(f"the server does not answer ({error}):\n{self.log()}") from None

    def stop(self) -> int:
        """End it as Kubernetes does, with SIGTERM; returns its exit code."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int:
        """kill -9."""
        return self._end(signal.SIGKILL)

    def log(self) -> str:
        """All that it has logged."""
        return self._log.read_text(errors="replace")

    def _end(self, number: signal.Signals) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(number)
        try:
            code = self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait(_STOP_SECONDS)
        self._process = None
        return code
