"""Images in the storm: made, looked at and deleted by the real command, which may be killed in the middle."""

import random
import subprocess
import threading
from pathlib import Path
from typing import Final

from tests.machine.image_lab import COMMAND_SECONDS, PROGRAM, digest_of
from tests.machine.node import MIB
from tests.machine.storm_model import Ledger, There
from tests.volume_images import SECRET, Made, encrypted_image, make_file_system, put_image

OPEN: Final = "open"
LOCKED: Final = "locked"
_SIZE: Final = 8 * MIB


def prepare(folder: Path, state: Path) -> None:
    """The two images that volumes start from, and clones are made of: the same disk, plain and encrypted."""
    disk = make_file_system(folder / "disk", _SIZE)
    put_image(state, OPEN, Made(disk, _SIZE))
    put_image(state, LOCKED, encrypted_image(disk, folder / "disk.luks"))
    (folder / "passphrase").write_text(SECRET["CRYPTO_KEY_VALUE"])


class StormImage:
    """A name for images, used again and again; one thread at a time works on it."""

    def __init__(self, name: str, folder: Path, state: Path) -> None:
        self.name = name
        self._folder = folder
        self._state = state
        self._there = There.NO
        self._guard = threading.Lock()
        self._disk = digest_of(folder / "disk")

    def step(self, rng: random.Random, ledger: Ledger) -> None:
        """Make it, or look at it and delete it."""
        if not self._guard.acquire(blocking=False):
            return
        try:
            if self._there is There.YES:
                self._look(ledger)
                self._delete(ledger)
            else:
                self._make(rng, ledger)
        finally:
            self._guard.release()

    def remove(self, ledger: Ledger) -> None:
        """Delete it, whatever there is of it."""
        with self._guard:
            if self._there is There.YES:
                self._look(ledger)
            self._delete(ledger)
            if self._there is not There.NO:
                ledger.tell("stuck", f"image {self.name} cannot be deleted")

    def _make(self, rng: random.Random, ledger: Ledger) -> None:
        source = OPEN if self._there is There.MAYBE else rng.choice((OPEN, LOCKED))
        choice = ("--encryption", "decrypt", "--passphrase-file", str(self._folder / "passphrase"))
        self._there = There.MAYBE
        if self._run(ledger, "clone", source, self.name, *(choice if source == LOCKED else ())):
            self._there = There.YES

    def _look(self, ledger: Ledger) -> None:
        file = self._state / "images/ready" / self.name / "image"
        if not file.exists() or digest_of(file) != self._disk:
            ledger.tell("lost", f"image {self.name} was made and is not there, or is not the disk that it was made of")

    def _delete(self, ledger: Ledger) -> None:
        was_sure = self._there is There.YES
        self._there = There.MAYBE
        if self._run(ledger, "delete", "--yes", self.name, may_be_absent=not was_sure):
            self._there = There.NO

    def _run(self, ledger: Ledger, command: str, *arguments: str, may_be_absent: bool = False) -> bool:
        """Whether it succeeded; one that was killed did not."""
        done = subprocess.run(
            [*PROGRAM, command, "--state-dir", str(self._state), *arguments],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False,
        )  # fmt: skip
        ledger.count("calls")
        if done.returncode > 0:
            if may_be_absent and "does not exist" in done.stderr:
                return True
            if command == "clone" and "exists already" in done.stderr:
                return True  # of a run that was killed when all was done
            ledger.tell("odd", f"image {command} {' '.join(arguments)}: {done.stderr.strip()}")
        return done.returncode == 0
