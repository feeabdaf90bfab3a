"""What befalls a volume's storage behind the driver's back: a file's on loopfile, a logical volume's in a group, an
image's on Ceph. What is below a claim is a file, and the other driver's.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csi_driver.backends.lvmtool import dm_name
from csi_driver.host.devicemapper import DeviceMapper
from tests.backends.rigs import GROUP, lvm
from tests.machine.ceph_place import CephPlace, admin, spec
from tests.machine.node import DATA_OFFSET, MIB, SIZE, VOLUME, Node
from tests.machine.places import BACKEND, IN_GROUP, OF_FILES, current

SHORTER = (4 * MIB, SIZE + DATA_OFFSET - 4 * MIB) if IN_GROUP else (0, MIB, SIZE + DATA_OFFSET - 512)
"""Lengths that are less than a volume's."""

GONE = {"rbd": "has no image", "csi": "is gone"}.get(
    BACKEND, "has no logical volume" if IN_GROUP else r"disk\.img is not there"
)
"""What is said of storage that is not there."""


def lose(node: Node, volume: str = VOLUME) -> None:
    """It is removed by hand."""
    if (ceph := _ceph()) is not None:
        admin(ceph, "rm", "--no-progress", spec(volume))
    elif IN_GROUP:
        lvm("lvremove", _logical(volume))
    else:
        node.disk(volume).unlink()


def shorten(node: Node, length: int, volume: str = VOLUME) -> None:
    """It is cut off behind so many bytes."""
    if (ceph := _ceph()) is not None:
        admin(ceph, "resize", "--no-progress", "--allow-shrink", "--size", f"{length}B", spec(volume))
    elif IN_GROUP:
        lvm("lvreduce", "-f", "-L", f"{length}b", _logical(volume))
    else:
        os.truncate(node.disk(volume), length)


def lengthen(node: Node, length: int, volume: str = VOLUME) -> None:
    """It gets so many bytes."""
    if (ceph := _ceph()) is not None:
        admin(ceph, "resize", "--no-progress", "--size", f"{length}B", spec(volume))
    elif IN_GROUP:
        lvm("lvextend", "-L", f"{length}b", _logical(volume))
    else:
        os.truncate(node.disk(volume), length)


@contextmanager
def away(node: Node, volume: str = VOLUME) -> Iterator[None]:
    """It has another name."""
    if (ceph := _ceph()) is not None:
        admin(ceph, "rename", spec(volume), spec("kept"))
        yield
        admin(ceph, "rename", spec("kept"), spec(volume))
        return
    if IN_GROUP:
        lvm("lvrename", _logical(volume), f"{GROUP}/kept")
        yield
        lvm("lvrename", f"{GROUP}/kept", _logical(volume))
        return
    kept = node.disk(volume).with_name("kept")
    node.disk(volume).rename(kept)
    yield
    kept.rename(node.disk(volume))


@contextmanager
def blank_instead(node: Node, volume: str = VOLUME) -> Iterator[None]:
    """A blank one is in its place: another file; or all of a disk is zeros, of which the rest was put back."""
    if not OF_FILES:
        content = node.disk(volume).read_bytes()
        _put(node.disk(volume), bytes(len(content)))
        yield
        _put(node.disk(volume), content)
        return
    with away(node, volume):
        with node.disk(volume).open("wb") as blank:
            blank.truncate(SIZE + DATA_OFFSET)
        yield


def swap(node: Node, one: str, other: str) -> None:
    """Each has what the other had."""
    if not OF_FILES:
        contents = [node.disk(volume).read_bytes() for volume in (one, other)]
        for volume, content in zip((other, one), contents, strict=True):
            _put(node.disk(volume), content)
        return
    aside = node.disk(one).with_name("aside")
    node.disk(one).rename(aside)
    node.disk(other).rename(node.disk(one))
    aside.rename(node.disk(other))


def swap_names(one: str, other: str) -> None:
    """Two logical volumes are renamed."""
    lvm("lvrename", _logical(one), f"{GROUP}/kept")
    lvm("lvrename", _logical(other), _logical(one))
    lvm("lvrename", f"{GROUP}/kept", _logical(other))


def allocated(node: Node, volume: str = VOLUME) -> int:
    """How many bytes of it take space: of a sparse file, or in a thin pool."""
    if not IN_GROUP:  # of a claim's file too
        return node.disk(volume).stat().st_blocks * 512
    node.disk(volume)  # shows it
    told = DeviceMapper().status(dm_name(GROUP, f"luks-{volume}"))
    assert told is not None
    return int(told.split()[0]) * 512  # Documentation/admin-guide/device-mapper/thin-provisioning.rst


def is_in_use(node: Node, volume: str = VOLUME) -> bool:
    """Whether something has its device open, or shows it."""
    if not IN_GROUP:
        return node.is_attached(volume)
    device = DeviceMapper().get(dm_name(GROUP, f"luks-{volume}"))
    return device is not None and device.open_count > 0


def copy_of(node: Node, path: Path, volume: str = VOLUME) -> Path:
    """All its bytes in another file."""
    shutil.copyfile(node.disk(volume), path)
    return path


def _put(path: Path, content: bytes) -> None:
    words = ("bs=1M", "oflag=direct", "conv=notrunc", "status=none")
    subprocess.run(["dd", f"of={path}", *words], input=content, check=True, timeout=60)


def _ceph() -> CephPlace | None:
    place = current()
    return place if isinstance(place, CephPlace) else None


def _logical(volume: str) -> str:
    return f"{GROUP}/luks-{volume}"
