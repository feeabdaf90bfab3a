"""A pool of Ceph as the place of all volumes of the tests.

A volume's image is looked at by a mapping of the test's own. The driver refuses an image that somebody else has open:
so that mapping goes before each call.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from csi_driver.backends.base import Backend
from csi_driver.backends.rbd import RbdBackend
from csi_driver.backends.rbdplace import image_name
from csi_driver.backends.rbdrecords import VolumeLogs, VolumeState
from csi_driver.host.krbd import MappedImage, MappedImages
from csi_driver.host.workers import Workers
from csi_driver.model.errors import NotFound
from csi_driver.model.settings import Settings
from csi_driver.volumes.driver import Host, make_backend
from tests.backends.ceph import POOL
from tests.backends.rigs import LIMITS, RbdRig
from tests.machine.leaks import settled
from tests.machine.server import ServerProcess
from tests.machine.storage import CephStorage

_NOTHING = Path("/dev/rbd-of-no-image")


class CephPlace:
    """The volumes of one pool. `rig` is the cluster."""

    parameters = CephStorage.parameters
    rounding = RbdRig.rounding

    def __init__(self, rig: RbdRig) -> None:
        self.rig = rig
        self._looking = rig.backend(node_id="who looks")
        self._shown: dict[str, MappedImage] = {}
        self._images: dict[str, str] = {}

    def backend(self, state: Path, workers: Workers) -> Backend:
        settings = self.settings(Settings(node_id="node-1", state_dir=state, limits=LIMITS))
        made = make_backend(settings, Host(workers=workers))
        made.prepare()
        return made

    def settings(self, settings: Settings) -> Settings:
        return CephStorage(self.rig).settings(settings)

    def host(self, host: Host) -> Host:
        return host

    def server(self, folder: Path, *options: str) -> ServerProcess:
        place = ("--backend", "rbd", "--ceph-config", str(self.rig.config), "--ceph-secret", str(self.rig.secret))
        return ServerProcess(folder, *place, *options)

    def before_call(self) -> None:
        for volume_id in list(self._shown):
            self.hide(volume_id)

    def give(self, backend: Backend, volume_id: str) -> None:
        assert isinstance(backend, RbdBackend)
        backend.publish(volume_id, backend.own_node, many_nodes=False)
        self._note(volume_id)

    def take(self, backend: Backend, volume_id: str) -> None:
        assert isinstance(backend, RbdBackend)
        if not any(self._mapped(volume_id)):
            with suppress(NotFound):
                backend.unpublish(volume_id, backend.own_node)

    def shown(self, volume_id: str) -> Path:
        if (found := next(iter(self._mapped(volume_id)), None)) is not None:
            return Path(found.path)
        pool = self._looking.pool_of(volume_id)
        if pool.info(image_name(volume_id)) is None:
            return _NOTHING
        self._shown[volume_id] = made = MappedImages().map(pool.address(image_name(volume_id), ("noshare",)))
        return Path(made.path)

    def hide(self, volume_id: str) -> None:
        if (made := self._shown.get(volume_id)) is not None:
            os.sync()  # what a test has written to the device, by whatever way
            MappedImages().unmap(made)
            del self._shown[volume_id]

    def is_left_shown(self, volume_id: str) -> bool:
        own = {each.number for each in self._shown.values()}
        return bool(settled(lambda: [one.path for one in self._mapped(volume_id) if one.number not in own]))

    def raw_record(self, volume_id: str) -> bytes:
        state = VolumeLogs().state(self._looking.pool_of(volume_id), volume_id)
        assert state is not None, f"nothing is known of volume {volume_id}"
        return (state.record or "").encode()

    def put_record(self, volume_id: str, content: bytes) -> None:
        def put(state: VolumeState | None) -> VolumeState:
            assert state is not None
            return msgspec.structs.replace(state, record=content.decode())

        VolumeLogs().change(self._looking.pool_of(volume_id), volume_id, put)

    def put_down(self) -> None:
        self.before_call()

    def clear_away(self) -> None:
        self._images.clear()
        self.rig.clear()

    def _note(self, volume_id: str) -> None:
        """The id of its image, by which a mapping is known when the image is gone."""
        info = self._looking.pool_of(volume_id).info(image_name(volume_id))
        if info is not None:
            self._images[volume_id] = info.id

    def _mapped(self, volume_id: str) -> Iterator[MappedImage]:
        """By the id of the image that it has or had."""
        self._note(volume_id)
        for one in MappedImages().all():
            if one.identity.image_id == self._images.get(volume_id):
                yield one


@contextmanager
def ceph_of_tests(folder: Path, workers: Workers) -> Iterator[CephPlace]:
    """A Ceph of the tests; one that is outside is fast."""
    folder.mkdir()
    with RbdRig(folder, workers) as rig:
        rig.clear()
        yield CephPlace(rig)


def admin(place: CephPlace, *words: str) -> None:
    """What an administrator does to images, which nobody has open then."""
    place.before_call()
    place.rig.ceph.admin("rbd", *words)


def spec(volume_id: str) -> str:
    """How he names one."""
    return f"{POOL}/{image_name(volume_id)}"
