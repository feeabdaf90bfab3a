"""Callers of the storm: each asks for whatever comes to its mind, now and then for what makes sense."""

import os
import random
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from csi_driver.rpc.client import CsiClient, RemoteError
from tests.machine.storm_images import StormImage
from tests.machine.storm_model import GROWTH, MOST_GROWTHS, Code, Kind, Ledger, Op, Slot, There
from tests.machine.storm_views import NotShown, verify, view_of, write
from tests.volume_images import SECRET

_ANY: Final = frozenset({Code.OK, Code.ABORTED, Code.DEADLINE_EXCEEDED})
_REFUSED: Final = _ANY | {Code.FAILED_PRECONDITION}
_UNKNOWN: Final = _REFUSED | {Code.NOT_FOUND}
EXPECTED: Final[Mapping[Op, frozenset[Code]]] = {
    Op.CREATE: _ANY,
    Op.STAGE: _UNKNOWN,
    Op.PUBLISH: _UNKNOWN,
    Op.GROW: _UNKNOWN,
    Op.EXPAND: _UNKNOWN,
    Op.STATS: _UNKNOWN,
    Op.UNPUBLISH: _REFUSED,
    Op.UNSTAGE: _REFUSED,
    Op.DELETE: _REFUSED,
}
"""Answers that each call may get, besides those of a kill."""
_KILLED: Final = ("was killed", "was ended by signal")  # in the words of an INTERNAL that is the storm's own doing
_WITHOUT_SENSE: Final = 0.2
_IMAGES: Final = 0.004
_VERIFIED: Final = 0.2
_PAUSE: Final = 0.05
_START_SECONDS: Final = 60.0
LEAST_TRIES: Final = 20
PATIENCE: Final = 180.0
"""Seconds that something may take which must come to its end, however busy the machine is."""


class Calls:
    """Calls of CSI about slots, by any of several servers; what the answers say goes to the model.

    Each server comes with an event that is set while it runs: calls are made to those that do.
    """

    def __init__(self, servers: Sequence[tuple[CsiClient, threading.Event]], ledger: Ledger) -> None:
        self._servers = servers
        self._ledger = ledger

    def make(self, op: Op, slot: Slot, rng: random.Random, target: Path | None = None) -> tuple[str, str] | None:
        """One call; its code and text, None where the model does not allow it now."""
        client = self._client(rng)
        ticket = slot.begin(op)
        if ticket is None:
            return None
        target = target or rng.choice(slot.targets)
        code, text = Code.CANCELLED.value, ""
        try:
            code, text = self._answer(self._request(client, op, slot, target, rng))
        finally:
            is_known = slot.end(ticket, code)
        if code == Code.OK and op in (Op.PUBLISH, Op.UNPUBLISH):
            slot.shows(target, shown=op is Op.PUBLISH)
        if not is_known:
            self._ledger.tell("lost", f"volume {slot.name} must be there and is not: {text}")
        self._judge(op, slot, code, text)
        return code, text

    def until_done(self, op: Op, slot: Slot, rng: random.Random, target: Path | None = None) -> str:
        """Repeat a call until it succeeds; "" or, after all patience, the last answer."""
        deadline, tries, last = time.monotonic() + PATIENCE, 0, "the model does not allow it"
        while tries < LEAST_TRIES or time.monotonic() < deadline:
            answer = self.make(op, slot, rng, target)
            if answer is not None and answer[0] == Code.OK:
                return ""
            last = ": ".join(answer) if answer else last
            tries += 1
            time.sleep(_PAUSE * min(tries, 10))
        return last

    @staticmethod
    def _answer(call: Callable[[], object]) -> tuple[str, str]:
        try:
            call()
        except RemoteError as error:
            return error.code, str(error)
        return Code.OK, ""

    def _client(self, rng: random.Random) -> CsiClient:
        running = [client for client, ready in self._servers if ready.is_set()]
        if running:
            return rng.choice(running)
        client, ready = rng.choice(self._servers)
        ready.wait(_START_SECONDS)
        return client

    def _request(self, client: CsiClient, op: Op, slot: Slot, target: Path, rng: random.Random) -> Callable[[], object]:
        size = slot.kind.size + rng.randint(0, MOST_GROWTHS) * GROWTH
        wanted, secret = slot.kind.capability, SECRET if slot.kind.encrypted else {}
        match op:
            case Op.CREATE:
                return lambda: client.create_volume(
                    slot.name, [wanted], slot.kind.size, parameters=slot.kind.parameters, secrets=secret
                )
            case Op.STAGE:
                slot.staging.mkdir(parents=True, exist_ok=True)
                return lambda: client.stage(slot.remote, slot.staging, wanted, secret)
            case Op.PUBLISH:
                return lambda: client.publish(slot.remote, slot.staging, target, wanted)
            case Op.GROW:
                return lambda: client.expand_volume(slot.name, size)
            case Op.EXPAND:
                return lambda: client.expand_on_node(slot.name, target, size)
            case Op.STATS:
                return lambda: client.usage(slot.name, target)
            case Op.UNPUBLISH:
                return lambda: client.unpublish(slot.name, target)
            case Op.UNSTAGE:
                return lambda: client.unstage(slot.name, slot.staging)
            case Op.DELETE:
                return lambda: client.delete_volume(slot.name)

    def _judge(self, op: Op, slot: Slot, code: str, text: str) -> None:
        self._ledger.counts[f"{op} {code}"] += 1
        if code == Code.UNAVAILABLE:  # killed, or not yet started again
            time.sleep(_PAUSE)
            return
        if code != Code.CANCELLED:
            self._ledger.count("calls")
        if code in EXPECTED[op] or code == Code.CANCELLED:
            return
        if code != Code.INTERNAL or not any(words in text for words in _KILLED):
            self._ledger.tell("odd", f"{op} of volume {slot.name}: {code}: {text}")


class Caller(threading.Thread):
    """Makes calls until there were enough of all callers together."""

    def __init__(
        self,
        number: int,
        calls: Calls,
        slots: Sequence[Slot],
        images: Sequence[StormImage],
        ledger: Ledger,
        goal: int,
        seed: str,
    ) -> None:
        super().__init__(name=f"caller {number}", daemon=True)
        self._calls = calls
        self._slots = slots
        self._images = images
        self._ledger = ledger
        self._goal = goal
        self._rng = random.Random(f"{seed} {number}")
        self._over = threading.Event()
        self.doing = "nothing"
        """What it is at, for those who wait for it."""

    def stop(self) -> None:
        """Make no further call."""
        self._over.set()

    def run(self) -> None:
        try:
            while self._ledger.calls < self._goal and not self._over.is_set():
                self._step()
        except Exception:  # noqa: BLE001 - it is told
            self._ledger.tell("odd", f"{self.name} broke: {traceback.format_exc()}")

    def _step(self) -> None:
        if self._rng.random() < _IMAGES:
            image = self._rng.choice(self._images)
            self.doing = f"image {image.name}"
            image.step(self._rng, self._ledger)
            return
        slot = self._rng.choice(self._slots)
        op = self._rng.choice(list(Op)) if self._rng.random() < _WITHOUT_SENSE else self._sensible(slot)
        self.doing = f"{op or 'records'} of {slot.name}"
        if op is None:
            self._use(slot)
            return
        target = self._path(slot) if op in (Op.EXPAND, Op.STATS, Op.UNPUBLISH) else None
        if self._calls.make(op, slot, self._rng, target) is None:
            time.sleep(_PAUSE)

    def _sensible(self, slot: Slot) -> Op | None:
        """A call that may succeed in the state that the volume seems to be in; None for using its records."""
        if slot.there is There.DOOMED:
            choices: dict[Op | None, int] = {Op.UNPUBLISH: 2, Op.UNSTAGE: 2, Op.DELETE: 4, Op.STAGE: 1}
        elif slot.there is not There.YES:
            choices = {Op.CREATE: 1}
        elif slot.published:
            choices = {None: 24, Op.EXPAND: 4, Op.PUBLISH: 4, Op.UNPUBLISH: 12, Op.STATS: 2, Op.STAGE: 1}
        elif slot.staged:
            choices = {Op.PUBLISH: 12, Op.UNSTAGE: 5, Op.STAGE: 1}
        else:
            choices = {Op.STAGE: 12, Op.DELETE: 3, Op.GROW: 1, Op.CREATE: 1, Op.UNSTAGE: 1}
        return self._rng.choices(list(choices), list(choices.values()))[0]

    def _path(self, slot: Slot) -> Path:
        return self._rng.choice(sorted(slot.published) or slot.targets)

    def _use(self, slot: Slot) -> None:
        """Write a record or look at all of them, where that can be done now."""
        if not slot.io.acquire(timeout=_PAUSE):
            return
        try:
            with view_of(slot, self._path(slot)) as view:
                if self._rng.random() < _VERIFIED:
                    verify(slot, view, self._ledger)
                else:
                    write(slot, view, self._ledger, self._rng)
        except NotShown:
            time.sleep(_PAUSE)
        finally:
            slot.io.release()


def come_to_rest(slot: Slot, calls: Calls, ledger: Ledger, rng: random.Random) -> None:
    """Look at every record of a volume that must be there, then take the volume down and away."""
    if slot.there is There.YES:
        if refused := calls.until_done(Op.STAGE, slot, rng) or calls.until_done(Op.PUBLISH, slot, rng, slot.targets[0]):
            ledger.tell("lost" if slot.acknowledged(0) else "stuck", f"volume {slot.name} cannot be used: {refused}")
        else:
            with slot.io, view_of(slot, slot.targets[0]) as view:
                verify(slot, view, ledger)
    slot.sick = False
    for op, target in (
        *((Op.UNPUBLISH, target) for target in slot.targets), (Op.UNSTAGE, None), (Op.DELETE, None)
    ):  # fmt: skip
        if refused := calls.until_done(op, slot, rng, target):
            ledger.tell("stuck", f"{op} of volume {slot.name}: {refused}")
    for folder in (slot.staging, slot.targets[0].parent):
        with suppress(OSError):
            os.rmdir(folder)


KINDS: Final[Sequence[Kind]] = (
    Kind(encrypted=True, fs_type="ext4"),
    Kind(encrypted=True, fs_type="ext4"),
    Kind(encrypted=False, fs_type="ext4"),
    Kind(encrypted=False, fs_type="ext4"),
    Kind(encrypted=True, fs_type=None),
    Kind(encrypted=False, fs_type=None),
    Kind(encrypted=True, fs_type="xfs", size=300 << 20),
    Kind(encrypted=True, fs_type="btrfs", size=256 << 20),
    Kind(encrypted=False, fs_type="btrfs", size=256 << 20),
    Kind(encrypted=False, fs_type="xfs", size=300 << 20),
    Kind(encrypted=True, fs_type="ext4", image="locked"),
    Kind(encrypted=False, fs_type=None, image="open"),
)
"""The volumes of a storm."""
