"""`make storm`: many callers at once on few volumes, while servers and their children are killed, stopped and orphaned.

32 callers ask two servers on one state directory for whatever comes to their mind, on volumes of all kinds and on
images; a bystander takes loop devices as they become free; the clock jumps. Every record that was fsynced in a volume
must be there until the volume is deleted, and the bystander's bytes must stay its own. At the end everything is taken
down and nothing may be left.

SEED and COUNT choose: COUNT calls, drawn with SEED. The threads' turns are the kernel's: a seed gives the same kind of
run, not the same run.
"""

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from csi_driver.rpc.client import CsiClient
from tests.machine.leaks import Facts, adopting_orphans, children, leaked_since, orphans, settled
from tests.machine.server import ServerProcess
from tests.machine.storm_bystander import Bystander
from tests.machine.storm_callers import KINDS, PATIENCE, Caller, Calls, come_to_rest
from tests.machine.storm_chaos import Chaos, Keeper
from tests.machine.storm_images import StormImage, prepare
from tests.machine.storm_model import Ledger, Slot

COUNT: Final = 50_000
CALLERS: Final = 32
_BYSTANDERS: Final = 3
_IMAGES: Final = ("first", "second")
_STALLED_SECONDS: Final = 300.0
_TOLD: Final = 20  # times that it says how far it is
_LEDGER: Final = "ledger.json"
# Memory that a page fault brought is kept: a fault is dear in the guest.
_GUEST: Final = (
    "--timeout", "14400", "--env", "MALLOC_MMAP_THRESHOLD_=33554432", "--env", "MALLOC_TRIM_THRESHOLD_=268435456",
)  # fmt: skip


class Storm:
    """A storm in a folder of its own."""

    def __init__(self, folder: Path, seed: str) -> None:
        self.ledger = Ledger()
        self._folder = folder
        self._seed = seed
        self._state = folder / "one/state"
        # Of options that are given twice the last one counts.
        self._servers = [ServerProcess(folder / name, "--state-dir", str(self._state)) for name in ("one", "two")]
        self._slots = [Slot(f"storm-{number}", kind, folder) for number, kind in enumerate(KINDS)]
        self._known = children()

    def run(self, count: int) -> Ledger:
        """So many calls, and what has to be true then."""
        with self._servers[0]:
            pass  # makes the state directory
        prepare(self._folder, self._state)
        images = [StormImage(name, self._folder, self._state) for name in _IMAGES]
        before = Facts.now(self._state)
        bystanders = [
            Bystander(self._folder / f"bystander-{number}", self.ledger, random.Random(f"{self._seed} by {number}"))
            for number in range(_BYSTANDERS)
        ]
        for bystander in bystanders:
            bystander.start()
        self._blow(count, images)
        self._settle(images)
        for bystander in bystanders:
            bystander.stop()
        for one in leaked_since(before, self._state) + settled(lambda: orphans(self._known)):
            self.ledger.tell("leaked", one)
        return self.ledger

    def _blow(self, count: int, images: Sequence[StormImage]) -> None:
        keepers = [Keeper(server, self.ledger) for server in self._servers]
        rng = random.Random(f"{self._seed} chaos")
        chaos = Chaos(keepers, self._known, self.ledger, rng)
        with ExitStack() as stack:
            clients = [stack.enter_context(CsiClient(server.endpoint, None)) for server in self._servers]
            calls = Calls(
                [(client, keeper.ready) for client, keeper in zip(clients, keepers, strict=True)], self.ledger
            )
            callers = [
                Caller(number, calls, self._slots, images, self.ledger, count, self._seed) for number in range(CALLERS)
            ]
            for thread in (*keepers, *callers, chaos):
                thread.start()
            self._wait(count)
            chaos.stop()
            for caller in callers:
                caller.stop()
            deadline = time.monotonic() + PATIENCE
            for caller in callers:
                caller.join(max(0.0, deadline - time.monotonic()))
                if caller.is_alive():
                    self.ledger.tell("stuck", f"{caller.name} gets no answer to {caller.doing}")
            for keeper in keepers:
                keeper.stop()

    def _wait(self, count: int) -> None:
        """Until there were enough calls, or no call was answered for long."""
        reached, since, told = -1, 0.0, 0
        while self.ledger.calls < count:
            if self.ledger.calls > reached:
                reached, since = self.ledger.calls, time.monotonic()
            elif time.monotonic() > since + _STALLED_SECONDS:
                return
            if reached * _TOLD // count > told:
                told = reached * _TOLD // count
                print(self.ledger.summary, file=sys.stderr, flush=True)
            self.ledger.wait_for_calls(count, 1.0)

    def _settle(self, images: Sequence[StormImage]) -> None:
        """Everything as it was before, by a server that nobody disturbs."""
        rng = random.Random(f"{self._seed} rest")
        with self._servers[0] as server, CsiClient(server.endpoint) as client:
            runs = threading.Event()
            runs.set()
            calls = Calls([(client, runs)], self.ledger)
            for slot in self._slots:
                come_to_rest(slot, calls, self.ledger, rng)
        for image in images:
            image.remove(self.ledger)


def storm(seed: str, count: int) -> Ledger:
    """A storm on the machine's state disk."""
    parent = os.environ.get("MACHINE_STATE", "/var/tmp")
    with adopting_orphans(), tempfile.TemporaryDirectory(prefix="storm-", dir=parent, ignore_cleanup_errors=True) as at:
        return Storm(Path(at), seed).run(count)


def half(seed: str, count: int) -> None:
    """One of the two storms of `make storm`, where device-mapper is; its ledger goes to $MACHINE_OUT. Never returns."""
    ledger = storm(seed, count)
    for what, number in sorted(ledger.counts.items()):
        print(f"{what}: {number}", file=sys.stderr, flush=True)
    (Path(os.environ["MACHINE_OUT"]) / _LEDGER).write_bytes(ledger.dump())
    os._exit(0)  # threads that a dead device keeps would keep the process


def main() -> int:
    """Half of the calls without udev and half of them with it; one line for both."""
    seed = os.environ.get("SEED") or str(time.time_ns() % 100_000)
    count = int(os.environ.get("COUNT") or COUNT)
    both = Ledger()
    for udev in ((), ("--udev",)):
        with tempfile.TemporaryDirectory(prefix="storm-") as out:
            guest = [sys.executable, "-m", "tests.machine.guest", *_GUEST, *udev, "--out", out, "--"]
            subprocess.run([*guest, sys.executable, "-m", __spec__.name, seed, str(count // 2)], check=True)
            both.add((Path(out) / _LEDGER).read_bytes())
    print(f"storm: seed={seed} {both.summary}")
    return int(not both.clean)


if __name__ == "__main__":
    if sys.argv[1:]:
        half(sys.argv[1], int(sys.argv[2]))
    sys.exit(main())
