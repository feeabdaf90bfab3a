"""Where the volumes of the tests of the machine lie, by BACKEND: in files, or in a place that is said how to look at.

And which tests are not for which place, each by a reason of REASONS.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from csi_driver.backends.base import Backend
from csi_driver.backends.rbdplace import Cluster, digest_of
from csi_driver.host import blockdev
from csi_driver.host.workers import Workers
from csi_driver.model.settings import Settings
from csi_driver.volumes.driver import Host
from tests.backends.ceph import CLUSTER, POOL
from tests.machine.server import ServerProcess
from tests.machine.storage import VOLUMES

BACKEND = os.environ.get("BACKEND") or "loopfile"
OF_FILES = BACKEND == "loopfile"
IN_GROUP = BACKEND.startswith("lvm")
RECORDS_ARE_FILES = OF_FILES or IN_GROUP

DEVICE = {
    "lvm-thick": rf"/dev/mapper/{VOLUMES}\S+",
    "lvm-thin": rf"/dev/mapper/{VOLUMES}\S+",
    "rbd": r"/dev/rbd\d+",
}.get(BACKEND, r"/dev/loop\d+")
"""How an error names the device of a volume."""

REASONS = {
    "files": "it is about what can be done to a file and not to another kind of storage",
    "written": "only of a sparse file it is known what was ever written to it",
    "loop": "it is about loop devices",
    "own disk": "its disk is the test's own, whatever the backend is",
    "key": "only files are moved to another volume key; test_danger_elsewhere.py shows the refusal",
    "thick": "a thick logical volume has all its space from the start",
    "plain thick": "a thick volume that is not encrypted is not enlarged while it is in use",
    "record": "its record is no file, which could be away, or be an older one than is known beside the volume",
    "made": "what a creation that was cut leaves of it is shown by tests/backends, at each step",
    "below": "what becomes of a claim's storage is the other driver's to tell; tests/backends plays that",
    "command": "a command beside the server would ask a Kubernetes, and this cluster is played",
    "given": "Kubernetes takes a volume from the node that it was given to before it is deleted",
    "allocated": "it does not tell how much of a volume takes space",
}
"""Why a test is not for volumes that are no files: no other reason counts."""


class Place(Protocol):
    """Storage in which all volumes of the tests lie. Volumes are named by their ids."""

    parameters: Mapping[str, str]
    """What a class of it says."""
    rounding: int
    """A volume is longer than asked for, up to a multiple of so many bytes."""

    def backend(self, state: Path, workers: Workers) -> Backend:
        """The storage of a driver with that state directory."""

    def settings(self, settings: Settings) -> Settings:
        """Those of a driver for it."""

    def host(self, host: Host) -> Host:
        """That of a driver for it."""

    def server(self, folder: Path, *options: str) -> ServerProcess:
        """A server for it."""

    def before_call(self) -> None:
        """The driver is called next, and must not find the test's own use of a volume, if it would."""

    def give(self, backend: Backend, volume_id: str) -> None:
        """Let the node have a new volume."""

    def take(self, backend: Backend, volume_id: str) -> None:
        """Take it away before it is deleted, if nothing uses it."""

    def shown(self, volume_id: str) -> Path:
        """The bytes of a volume, until `hide`, `put_down` or the driver ends it; no path's where it is gone."""

    def hide(self, volume_id: str) -> None:
        """What a test alone has shown is shown no more."""

    def is_left_shown(self, volume_id: str) -> bool:
        """Whether the driver has left the device of a volume."""

    def raw_record(self, volume_id: str) -> bytes:
        """A volume's record as it is kept."""

    def put_record(self, volume_id: str, content: bytes) -> None:
        """Put another record in its place."""

    def put_down(self) -> None:
        """What a test has shown of its volumes, apart from the driver, is shown no more."""

    def clear_away(self) -> None:
        """The volumes of a test that has ended go."""


_place: list[Place] = []


def current() -> Place | None:
    """The place of volumes, while there is one; None where they are files."""
    return _place[0] if _place else None


@contextmanager
def being(place: Place) -> Iterator[Place]:
    """Let it be the place for the length of the block."""
    _place.append(place)
    try:
        yield place
    finally:
        _place.clear()


def only_of_files(why: str) -> pytest.MarkDecorator:
    """A test that makes no sense elsewhere, by one of REASONS."""
    return pytest.mark.skipif(not OF_FILES, reason=REASONS[why])


def not_on(why: str, *backends: str) -> pytest.MarkDecorator:
    """A test that makes no sense on some backends, by one of REASONS."""
    return pytest.mark.skipif(BACKEND in backends, reason=REASONS[why])


def skip_elsewhere(why: str) -> None:
    """As `only_of_files`, for a fixture."""
    if not OF_FILES:
        pytest.skip(REASONS[why])


def skip_plain_thick(parameters: Mapping[str, str]) -> None:
    """Some classes' volumes cannot be enlarged while they are in use (tests/backends has what is said then)."""
    if BACKEND == "lvm-thick" and not parameters:
        pytest.skip(REASONS["plain thick"])


def of_class(parameters: Mapping[str, str]) -> Mapping[str, str]:
    """A class's parameters, with those that name the place."""
    place = current()
    return parameters if place is None else {**parameters, **place.parameters}


def name_of(volume_id: str) -> str:
    """What CreateVolume calls it."""
    digest = digest_of(volume_id) if BACKEND == "rbd" else None
    return volume_id if digest is None else volume_id.removesuffix(f".{digest}")


def id_of(name: str) -> str:
    """The id of the volume that CreateVolume calls so; an id is its own."""
    if BACKEND != "rbd" or digest_of(name) is not None:
        return name
    return Cluster(CLUSTER, ("one",)).place(POOL).id_for(name)


def server_on(folder: Path, *options: str) -> ServerProcess:
    """A server whose volumes are where those of the other tests are."""
    place = current()
    return ServerProcess(folder, *options) if place is None else place.server(folder, *options)


def settings_on(settings: Settings) -> Settings:
    """Settings of a driver whose volumes are there."""
    place = current()
    return settings if place is None else place.settings(settings)


def host_on(host: Host) -> Host:
    """The host of a driver whose volumes are there."""
    place = current()
    return host if place is None else place.host(host)


def hide(volume_id: str) -> None:
    """What a test alone has shown is shown no more: what is open, or active, counts as in use."""
    if (place := current()) is not None:
        place.hide(volume_id)


def length_of(path: Path) -> int:
    """In bytes, of a file or a device."""
    status = path.stat()
    return blockdev.size_bytes(str(path)) if stat.S_ISBLK(status.st_mode) else status.st_size
