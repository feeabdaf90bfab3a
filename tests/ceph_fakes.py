"""A pool of Ceph in memory: objects with maps, images, clients that were fenced off."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from csi_driver.backends.librbd import Image
from csi_driver.backends.rbdclients import CephClients, Credentials
from csi_driver.backends.rbderrors import CephExists, CephMissing
from csi_driver.backends.rbdplace import Cluster, Place
from csi_driver.backends.rbdpool import CephPool, PoolRoom
from csi_driver.host.krbd import ImageAddress
from csi_driver.host.workers import Workers
from csi_driver.model.errors import DeviceInUse

PLACE = Place(Cluster("ceph-one", ("192.0.2.1:6789",)), "rbd")


def no_clients() -> CephClients:
    """Clients that nobody asks."""
    return CephClients(Workers(()), 1)


@dataclass
class FakeImage:
    """An image of the pool."""

    id: str
    size: int
    written: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    open_at: list[str] = field(default_factory=list)
    data_pool: str | None = None
    snapshots: int = 0
    group: str = ""


class FakePool(CephPool):
    """Answers as a pool does; `step` is told before and after each change and may raise."""

    def __init__(self, step: Callable[[str], None] = lambda _: None) -> None:
        super().__init__(no_clients(), PLACE, Credentials("csi", "secret"))
        self.step = step
        self.objects: dict[str, bytes] = {}
        self.maps: dict[str, dict[str, str]] = {}
        self.images: dict[str, FakeImage] = {}
        self.fenced: list[str] = []
        self.reads = 0
        self._guard = threading.Lock()
        self._made = 0

    def get(self, name: str) -> bytes | None:
        self.reads += 1
        return self.objects.get(name)

    def append(self, name: str, content: bytes) -> None:
        self.step(f"before append {name}")
        with self._guard:
            self.objects[name] = self.objects.get(name, b"") + content
        self.step(f"after append {name}")

    def put(self, name: str, content: bytes) -> None:
        self.step(f"before put {name}")
        self.objects[name] = content
        self.step(f"after put {name}")

    def drop(self, name: str) -> None:
        self.step(f"before drop {name}")
        self.objects.pop(name, None)
        self.maps.pop(name, None)
        self.step(f"after drop {name}")

    def has(self, name: str) -> bool:
        return name in self.objects

    def keys(self, name: str) -> Sequence[str]:
        return sorted(self.maps.get(name, {}))

    def value(self, name: str, key: str) -> str | None:
        return self.maps.get(name, {}).get(key)

    def set_value(self, name: str, key: str, value: str) -> None:
        self.step(f"before set {key}")
        self.maps.setdefault(name, {})[key] = value
        self.step(f"after set {key}")

    def drop_value(self, name: str, key: str, only: str | None = None) -> None:
        self.step(f"before unset {key}")
        if only is None or self.value(name, key) == only:
            self.maps.get(name, {}).pop(key, None)
        self.step(f"after unset {key}")

    def info(self, image: str) -> Image | None:
        found = self.images.get(image)
        return Image(found.id, found.size, found.data_pool) if found is not None else None

    def make(self, image: str, size: int, features: Sequence[str], data_pool: str | None) -> None:
        self.step("before create")
        if image in self.images:
            raise CephExists(f"{image} exists")
        self._made += 1
        self.images[image] = FakeImage(f"id{self._made}", size)
        self.step("after create")

    def resize(self, image: str, size: int) -> None:
        self.step("before resize")
        self.images[image].size = max(size, self.images[image].size)

    def remove(self, image: str, seconds: float, only: str | None = None) -> None:
        self.step("before rm")
        if only is not None and image in self.images and self.images[image].id != only:
            return
        if image in self.images and self.images[image].open_at:
            raise DeviceInUse(f"{image} is open")
        self.images.pop(image, None)
        self.step("after rm")

    def watchers(self, image: str) -> Sequence[str]:
        if image not in self.images:
            raise CephMissing(f"no image {image}")
        return tuple(self.images[image].open_at)

    def snapshots(self, image: str) -> int:
        return self.images[image].snapshots

    def group(self, image: str) -> str:
        return self.images[image].group

    def is_unwritten(self, image: str, seconds: float) -> bool:
        return not self.images[image].written

    def describe(self, image: str, key: str, value: str) -> None:
        self.images[image].metadata[key] = value

    def metadata(self, image: str) -> Mapping[str, str]:
        return self.images[image].metadata

    def rename(self, image: str, name: str) -> None:
        self.step("before rename")
        if image not in self.images:
            raise CephMissing(f"no image {image}")
        if name in self.images:
            raise CephExists(f"{name} exists")
        self.images[name] = self.images.pop(image)
        self.step("after rename")

    def overwrite(self, image: str, length: int, seconds: float) -> None:
        self.step(f"overwrite {length}")

    def address(self, image: str, options: Sequence[str]) -> ImageAddress:
        return ImageAddress(("192.0.2.1:6789",), "csi", b"secret", "rbd", "", image, options)

    def rooms(self) -> Sequence[PoolRoom]:
        return [PoolRoom("rbd", 7)]

    def cluster_uuid(self, seconds: float | None = None) -> str:
        return "fsid-1"

    def fence(self, image: str, address: str) -> None:
        self.step(f"fence {address}")
        self.fenced.append(address)
        if image in self.images and address in self.images[image].open_at:
            self.images[image].open_at.remove(address)
