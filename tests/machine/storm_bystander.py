"""Another program of the node that uses loop devices: it takes whatever number is free and trusts that it has it."""

import contextlib
import os
import random
import threading
from pathlib import Path

from csi_driver.host import loopcontrol
from csi_driver.model.errors import DriverError
from tests.machine.node import MIB
from tests.machine.storm_model import Ledger

_SIZE = 2 * MIB


class Bystander(threading.Thread):
    """Binds a file of its own again and again, for a moment each time, and looks whether its bytes are its own."""

    def __init__(self, file: Path, ledger: Ledger, rng: random.Random) -> None:
        super().__init__(name=f"bystander {file.name}", daemon=True)
        self._file = file
        self._ledger = ledger
        self._rng = rng
        self._over = threading.Event()
        self._pattern = rng.randbytes(64) * (_SIZE // 64)
        file.write_bytes(self._pattern)

    def run(self) -> None:
        while not self._over.wait(self._rng.uniform(0.0, 0.02)):
            # The number may be somebody else's by now: then the next one.
            with contextlib.suppress(OSError, DriverError):
                self._use(loopcontrol.free_node())
        self._check("at the end")

    def stop(self) -> None:
        """Let go of the device."""
        self._over.set()
        self.join()

    def _use(self, node: str) -> None:
        with self._file.open("r+b") as backing:
            device = loopcontrol.open_node(node, read_only=False)
            try:
                loopcontrol.configure(device, backing.fileno(), str(self._file), 0)
                try:
                    self._over.wait(self._rng.choice((0.05, 0.5, 2.0)))
                    os.fsync(device)
                    self._check(node)
                finally:
                    loopcontrol.clear(device)
            finally:
                os.close(device)

    def _check(self, where: str) -> None:
        found = self._file.read_bytes()
        if found == self._pattern:
            return
        at = next((at for at in range(0, _SIZE, 512) if found[at : at + 512] != self._pattern[at : at + 512]), 0)
        self._ledger.tell(
            "foreign",
            f"bytes of the bystander's {self._file.name} on {where} were changed, first at {at}: "
            f"{found[at : at + 16]!r}…, {len(found)} bytes",
        )
        self._file.write_bytes(self._pattern)
