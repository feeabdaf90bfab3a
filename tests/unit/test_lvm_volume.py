"""What may be cleared of a thick logical volume: what nobody was shown, and nothing that an older record forgot."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from csi_driver.backends.lvmtool import OURS, LogicalVolume
from csi_driver.backends.lvmvolume import ID_TAG, VERSION, GroupVolumes, LvState, unseen_from
from csi_driver.host import blockdev
from csi_driver.host.files import Files
from csi_driver.model.errors import CommandFailed, FailedPrecondition
from csi_driver.model.settings import Limits

MIB = 1 << 20
MADE = LvState(version=VERSION, pool=None, uuid="U", group_uuid="G", clear=64 * MIB, settled=True)


class Group:
    """A volume group with one logical volume."""

    name = "vg"

    def __init__(self) -> None:
        self.found = LogicalVolume("luks-v", "U", "G", 64 * MIB, None, frozenset({OURS, f"{ID_TAG}v"}))

    def find(self, _: str) -> LogicalVolume:
        return self.found

    def retag(self, _: str, old: str | None, new: str | None) -> None:
        tags = frozenset({*self.found.tags} - {old} | {each for each in (new,) if each is not None})
        self.found = dataclasses.replace(self.found, tags=tags)

    def extend(self, _: str, size: int) -> None:
        self.found = dataclasses.replace(self.found, size=size)


class World:
    """That logical volume, what was cleared of it, and the folder of its records."""

    def __init__(self, folder: Path) -> None:
        self.group, self.folder, self.device = Group(), folder, SimpleNamespace(fd=0)
        self.cleared: list[tuple[int, int]] = []
        make: Any = GroupVolumes
        workers = SimpleNamespace(call=self._clear)
        self.volumes: GroupVolumes = make(self.group, None, None, Files(), workers, Limits(), 8.0)
        self.volumes.write(folder, MADE)

    def _clear(self, _: str, __: float, ___: object, ____: object, start: int, end: int, _____: float) -> int:
        self.cleared.append((start // MIB, end // MIB))
        return end

    def grow(self, size: int) -> None:
        state = self.volumes.state(self.folder)
        assert state is not None
        self.volumes.grown(self.folder, state, self.group.found, size)

    def settle(self, *, is_plain: bool = False) -> None:
        state, device = self.volumes.state(self.folder), self.device
        assert state is not None
        self.volumes.settle("v", self.folder, state, device, is_plain=is_plain)  # type: ignore[arg-type]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path)
    monkeypatch.setattr(blockdev, "size_bytes", lambda _: world.group.found.size)
    return world


def test_what_a_growth_adds_is_cleared_once_and_the_tag_that_lets_it_goes(world: World) -> None:
    world.grow(128 * MIB)
    world.settle()
    world.settle()
    assert world.cleared == [(64, 128)]
    assert unseen_from(world.group.found) is None


def test_a_growth_after_an_older_record_clears_nothing_that_was_shown_since(world: World) -> None:
    """One was cut before its end, then a backup of the records was restored, and the volume used in full length."""
    world.grow(128 * MIB)
    world.volumes.write(world.folder, MADE)
    world.settle()
    assert world.cleared == []
    world.grow(192 * MIB)
    world.settle()
    assert world.cleared == [(128, 192)]
    assert unseen_from(world.group.found) is None


@pytest.mark.parametrize("cut", ["retag", "write"])
@pytest.mark.parametrize("sizes", [(), (192 * MIB,)])
def test_nor_does_one_that_is_cut_before_it_is_told(
    world: World, monkeypatch: pytest.MonkeyPatch, cut: str, sizes: tuple[int, ...]
) -> None:
    world.grow(128 * MIB)
    world.volumes.write(world.folder, MADE)
    world.settle()

    def fail(*_: object) -> None:
        raise CommandFailed("no")

    with monkeypatch.context() as patch:
        patch.setattr(world.group if cut == "retag" else world.volumes, cut, fail)
        with pytest.raises(CommandFailed):
            world.grow(192 * MIB)
    for size in sizes:
        world.grow(size)
    world.settle()
    assert world.cleared == [(128, 192) for _ in sizes]


def test_a_growth_that_was_cut_before_it_began_is_cleared_from_where_it_begins(world: World) -> None:
    world.group.retag("luks-v", None, f"luks-csi.unseen={64 * MIB}")
    world.grow(128 * MIB)
    world.settle(is_plain=True)
    assert world.cleared == [(64, 128)]


def test_a_plain_one_that_is_longer_than_is_known_to_be_clear_is_not_used(world: World) -> None:
    world.group.extend("luks-v", 128 * MIB)
    with pytest.raises(FailedPrecondition, match=r"has 134217728 bytes and 67108864 are known to hold nothing"):
        world.settle(is_plain=True)
