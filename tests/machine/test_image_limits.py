"""A small `make images-limits`, and the proof that it turns red: engines with a bug by the constructor."""

import contextlib
import fcntl
import random
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from csi_driver.images.base import MIB
from csi_driver.images.bring import Meter
from csi_driver.images.checkpoint import Operation
from csi_driver.images.destinations import Connector
from csi_driver.images.library import ImageLibrary
from csi_driver.images.requests import Clone
from csi_driver.images.store import ImageRecord
from csi_driver.model.errors import ResourceExhausted, VolumeBusy
from tests.machine import image_plants
from tests.machine.image_limits import AT_ONCE, FULL, Build, Command, Lab, by_command
from tests.machine.image_matrix import CheapLibrary
from tests.machine.leaks import adopting_orphans
from tests.machine.opens import Ran, WatchedCall

_SIZE = 8 * MIB
_SEED = 7
_HANDFUL = 3


def cheap(folder: Path) -> ImageLibrary:
    """The real engine, but for the cost of key slots."""
    return CheapLibrary(folder, Connector(allow_local=True))


@contextlib.contextmanager
def lab(folder: Path, build: Build = cheap, command: Command = by_command) -> Iterator[Lab]:
    with adopting_orphans():
        lab = Lab(folder, _SEED, _SIZE, build, command)
        with lab.mounted():
            yield lab


def test_several_at_once_succeed_and_a_disk_without_room_is_told(folder: Path) -> None:
    with lab(folder) as tried:
        tried.try_at_once(["qcow2"])
        tried.try_full(random.Random(_SEED).sample(FULL, _HANDFUL))
        tried.try_short([Operation.ENCRYPT])
    result = tried.result
    assert result.wrong == []
    assert (result.at_once, result.full, result.short) == (2 * AT_ONCE, _HANDFUL, 1)


class Bugs(CheapLibrary):
    """An engine with the bug that is named."""

    bug = ""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def clone(self, wanted: Clone, meter: Meter) -> ImageRecord:
        match self.bug:
            case "the first one locks the source":
                with self.file(wanted.source).open("rb") as source:
                    try:
                        fcntl.flock(source, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        raise VolumeBusy(f"image {wanted.source} is in use") from None
                    return super().clone(wanted, meter)
            case "a full disk is not cleaned up":
                try:
                    return super().clone(wanted, meter)
                except ResourceExhausted:
                    (self._folder / "new" / wanted.name).mkdir()
                    raise
            case "a full disk is not noticed":
                with contextlib.suppress(ResourceExhausted):
                    return super().clone(wanted, meter)
                return self.get(wanted.source)
        return super().clone(wanted, meter)


def hasty(arguments: list[str]) -> Ran:
    """A command that writes before it looks whether there is room."""
    with WatchedCall(partial(image_plants.main, "hasty", arguments)) as call:
        return call.end(120)


def test_planted_bugs_turn_it_red(folder: Path) -> None:
    buggy = Bugs(folder / "small/state/images")
    with lab(folder, lambda _: buggy, hasty) as tried:
        wrong = tried.result.wrong
        buggy.bug = "the first one locks the source"
        tried.try_at_once(["raw"])
        assert re.fullmatch(r"at once, raw: made-\d of 3 at once ended with 1: image raw is in use", wrong[0])
        buggy.bug = "a full disk is not cleaned up"
        tried.try_full(["decrypt"])
        assert wrong[-1] == "full, decrypt: left behind: state/images/new/made/"
        buggy.bug = "a full disk is not noticed"
        tried.try_full(["decrypt"])
        assert wrong[-1] == "full, decrypt: it said ''"
        buggy.bug = ""
        tried.try_short([Operation.IGNORE])
        assert re.fullmatch(r"short, ignore: it wrote .*/images/new/made/part", wrong[-1])
