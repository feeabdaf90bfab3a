"""Two drivers of one node, on sparse files and on a volume group or Ceph, and volumes that go between them."""

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from csi_driver.backends.base import Backend
from csi_driver.host.workers import Workers
from csi_driver.model.errors import FailedPrecondition, NotFound
from csi_driver.model.volume import Move, MovePhase, VolumeParameters, VolumeRecord
from csi_driver.volumes.move import MoveRequest
from csi_driver.volumes.move_copy import Onlooker
from tests.machine.node import BLOCK, MIB, NAME, Node

SIZE = 5 * MIB + 512
PLAIN = {"encrypted": "false"}
_MOST = 64 * MIB


@dataclass
class Shown:
    """A meter that keeps what it was shown."""

    parts: list[str] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    each: Callable[[int], object] = lambda _: None

    @contextlib.contextmanager
    def __call__(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        self.parts.append(f"{what} of {total}")

        def progress(done: int) -> None:
            self.done.append(done)
            self.each(done)

        yield progress


@dataclass
class Pair:
    """The two drivers; `place` is where in the group, or in Ceph, volumes are to be, `far` the volume's id there."""

    files: Node
    group: Node
    place: VolumeParameters
    far: str

    @property
    def pool(self) -> str | None:
        return self.place.thin_pool

    def id_at(self, node: Node) -> str:
        return self.far if node is self.group else NAME

    def other(self, node: Node) -> Node:
        return self.group if node is self.files else self.files

    def move(self, source: Node | None = None, onlooker: Onlooker | None = None, *, keep: bool = False) -> VolumeRecord:
        """From the files unless told otherwise."""
        source = source or self.files
        there, place = self.other(source), self.place if source is self.files else None
        return source.moves.move(MoveRequest(NAME, place, keep), there.moves.here, onlooker or Onlooker(Shown()))


def pair_in(
    folder: Path, group: Backend, workers: Workers, place: VolumeParameters, far: str = NAME, stretch: int = MIB
) -> Pair:
    """The two drivers, each of which can ask for the other one's records."""
    nodes: list[Node] = []

    def has_left(move: Move) -> bool:
        (other,) = (node for node in nodes if os.path.realpath(node.state) == move.other)
        found = other.record(move.volume_id).move
        return found is not None and (found.phase, found.id) == (MovePhase.LEFT, move.id)

    nodes.append(Node(folder / "files", workers, has_left=has_left, stretch=stretch))
    nodes.append(Node(folder / "group", workers, backend=group, has_left=has_left, stretch=stretch))
    return Pair(nodes[0], nodes[1], place, far)


@contextlib.contextmanager
def opened(node: Node, volume: str = NAME) -> Iterator[int]:
    """What a pod sees of the volume as a block device, for as long as it is staged."""
    node.stage(volume, BLOCK)
    try:
        with node.presences.held(node.presences.of(volume, node.record(volume))) as device:
            descriptor = os.open(device, os.O_RDWR)
            try:
                yield descriptor
            finally:
                os.close(descriptor)
    finally:
        node.unstage(volume)


def fill(node: Node, parameters: Mapping[str, str], seed: int = 1, thin_pool: str | None = None) -> bytes:
    """A block volume with noise, and a hole in it; closed. Returns what a pod sees of it."""
    pool = {"thinPool": thin_pool} if thin_pool else {}
    node.create(size=SIZE, parameters={**parameters, **pool}, capability=BLOCK)
    return write(node, seed)


def write(node: Node, seed: int, volume: str = NAME) -> bytes:
    """Other noise in it. Returns what a pod sees of it."""
    with opened(node, volume) as device:
        noise = random.Random(seed).randbytes(SIZE)
        os.pwrite(device, noise[:MIB], 0)
        os.pwrite(device, noise[3 * MIB :], 3 * MIB)
        os.fsync(device)
        return os.pread(device, _MOST, 0)


def shown(node: Node, volume: str = NAME) -> bytes:
    """What a stage shows of the volume; of a hole in it noise, which stays the same."""
    with opened(node, volume) as device:
        return os.pread(device, _MOST, 0)


def is_refused(node: Node, volume: str = NAME) -> bool:
    """Whether the volume cannot be used there."""
    try:
        shown(node, volume)
    except (FailedPrecondition, NotFound):
        return True
    return False
