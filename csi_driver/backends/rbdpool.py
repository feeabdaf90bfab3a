"""A pool of Ceph as one user: objects and their maps, images, the cluster that it is in and its blocklist."""

import base64
import errno
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

import msgspec

from csi_driver.backends import librados, librbd
from csi_driver.backends.librados import Where
from csi_driver.backends.librbd import Image
from csi_driver.backends.rbdclients import CephClients, Credentials
from csi_driver.backends.rbderrors import CephMissing, meant, no_pool, silent
from csi_driver.backends.rbdplace import Place
from csi_driver.host.krbd import ImageAddress
from csi_driver.model.errors import CommandFailed, DeadlineExceeded, DriverError, FailedPrecondition
from csi_driver.model.reading import decode

R = TypeVar("R")
T = TypeVar("T")

_BLOCKED_SECONDS: Final = 5 * 365 * 24 * 3600.0  # as CSI-Addons' network fence: a frozen node may wake up any time


class _Address(msgspec.Struct, frozen=True):
    type: str
    address: str = msgspec.field(name="addr")


class _Addresses(msgspec.Struct, frozen=True):
    all: list[_Address] = msgspec.field(name="addrvec")


class _Monitor(msgspec.Struct, frozen=True):
    addresses: _Addresses = msgspec.field(name="public_addrs")


class _Monitors(msgspec.Struct, frozen=True):
    monitors: list[_Monitor] = msgspec.field(name="mons")


class _PoolStats(msgspec.Struct, frozen=True):
    used: int = msgspec.field(name="bytes_used", default=0)
    stored: int = 0
    available: int = msgspec.field(name="max_avail", default=0)
    quota: int = msgspec.field(name="quota_bytes", default=0)


class PoolRoom(msgspec.Struct, frozen=True):
    """A pool as `ceph df` shows it; `number` is not that of one of the same name that is made later."""

    name: str
    number: int = msgspec.field(name="id")
    stats: _PoolStats = _PoolStats()

    @property
    def used(self) -> int:
        """Bytes that are used."""
        return self.stats.used

    @property
    def available(self) -> int:
        """Bytes that can still be written, to its quota too if it has one."""
        stats = self.stats
        return min(stats.available, max(0, stats.quota - stats.stored)) if stats.quota else stats.available


class _Rooms(msgspec.Struct, frozen=True):
    pools: list[PoolRoom] = []


class CephPool:
    """One place as one user: a pool, in it a namespace perhaps. Errors as `CephClients.ask`."""

    def __init__(self, clients: CephClients, place: Place, credentials: Credentials) -> None:
        self.place = place
        self._clients = clients
        self._credentials = credentials

    # --- objects

    def get(self, name: str) -> bytes | None:
        """All of an object; None where it is absent."""
        return self._ask(f"rados get {name}", librados.get, self._where, name)

    def append(self, name: str, content: bytes) -> None:
        """Lengthen an object, or make it, in one step that is done or is not."""
        self._ask(f"rados append {name}", librados.append, self._where, name, content)

    def put(self, name: str, content: bytes) -> None:
        """Replace an object's content, in one step."""
        self._ask(f"rados put {name}", librados.put, self._where, name, content)

    def drop(self, name: str) -> None:
        """Remove an object; absent is fine."""
        self._ask(f"rados rm {name}", librados.drop, self._where, name)

    def has(self, name: str) -> bool:
        """Whether an object is there."""
        return self._ask(f"rados stat {name}", librados.has, self._where, name)

    def keys(self, name: str) -> Sequence[str]:
        """The keys of an object's map, sorted."""
        return self._ask(f"rados listomapkeys {name}", librados.keys, self._where, name)

    def value(self, name: str, key: str) -> str | None:
        """A value of an object's map; None where there is none."""
        return self._ask(f"rados getomapval {name} {key}", librados.value, self._where, name, key)

    def set_value(self, name: str, key: str, value: str) -> None:
        """Set a value of an object's map, which is made if it is absent."""
        self._ask(f"rados setomapval {name} {key}", librados.set_value, self._where, name, key, value)

    def drop_value(self, name: str, key: str, only: str | None = None) -> None:
        """Remove a value of an object's map, in one step only if it is `only`; absent or another one is fine."""
        self._ask(f"rados rmomapkey {name} {key}", librados.drop_value, self._where, name, key, only)

    # --- images

    def info(self, image: str) -> Image | None:
        """The image of that name, whoever made it."""
        return self._ask(f"rbd info {self._spec(image)}", librbd.info, self._where, image)

    def make(self, image: str, size: int, features: Sequence[str], data_pool: str | None) -> None:
        """Make a blank image of `size` bytes. Raises CephExists."""
        self._ask(f"rbd create {self._spec(image)}", librbd.make, self._where, image, size, features, data_pool)

    def resize(self, image: str, size: int) -> None:
        """Give it `size` bytes; one that is longer stays so. Where it is mapped that is seen when this returns."""
        self._ask(f"rbd resize {self._spec(image)}", librbd.resize, self._where, image, size)

    def remove(self, image: str, seconds: float, only: str | None = None) -> None:
        """Remove it, and what is left of one that was half made or half removed; absent is fine.

        With an id nothing is done to another image that has the name. Raises DeviceInUse while anybody has it open.
        """
        self._ask(f"rbd rm {self._spec(image)}", librbd.remove, self._where, image, only, seconds=seconds)

    def watchers(self, image: str) -> Sequence[str]:
        """The addresses of those who have it open for writing."""
        return self._ask(f"rbd status {self._spec(image)}", librbd.watchers, self._where, image)

    def snapshots(self, image: str) -> int:
        """How many snapshots it has: with one it cannot be removed."""
        return self._ask(f"rbd snap ls {self._spec(image)}", librbd.snapshots, self._where, image)

    def group(self, image: str) -> str:
        """The name of the group that it is in, "" for none: from one it cannot be removed."""
        return self._ask(f"rbd info {self._spec(image)}", librbd.group, self._where, image)

    def is_unwritten(self, image: str, seconds: float) -> bool:
        """Whether nothing was ever written to it that is still there."""
        return self._ask(f"rbd du {self._spec(image)}", librbd.is_unwritten, self._where, image, seconds=seconds)

    def describe(self, image: str, key: str, value: str) -> None:
        """Set one key of its metadata, which `rbd image-meta list` shows."""
        what = f"rbd image-meta set {self._spec(image)} {key}"
        self._ask(what, librbd.describe, self._where, image, key, value)

    def metadata(self, image: str) -> Mapping[str, str]:
        """All of its metadata."""
        return self._ask(f"rbd image-meta list {self._spec(image)}", librbd.metadata, self._where, image)

    def rename(self, image: str, name: str) -> None:
        """Give it another name, in one step; who has it open goes on. Raises CephMissing, CephExists."""
        what = f"rbd rename {self._spec(image)} {self._spec(name)}"
        self._ask(what, librbd.rename, self._where, image, name)

    def overwrite(self, image: str, length: int, seconds: float) -> None:
        """Random bytes over its first `length` bytes, without mapping it. Raises CephMissing."""
        self._ask(f"overwriting {self._spec(image)}", librbd.overwrite, self._where, image, length, seconds=seconds)

    def address(self, image: str, options: Sequence[str]) -> ImageAddress:
        """Where the kernel finds it. Raises FailedPrecondition where no monitor speaks what the options want."""
        said = self._ask("ceph mon dump", librados.command, {"prefix": "mon dump", "format": "json"})
        wanted = "v2" if any(one.startswith("ms_mode=") and one != "ms_mode=legacy" for one in options) else "v1"
        monitors = _decoded(_Monitors, said, "ceph mon dump").monitors
        found = [one.address for each in monitors for one in each.addresses.all if one.type == wanted]
        if not found:
            raise FailedPrecondition(
                f"the monitors of the Ceph cluster {self.place.cluster.id} have no address of the kind {wanted}, which "
                f"the kernel would speak to; set ms_mode in mapOptions of the class (prefer-crc, say) where they have "
                f"v2 alone, and leave it out where they have v1"
            )
        place, user = self.place, self._credentials
        namespace = place.cluster.namespace
        return ImageAddress(found, user.user, base64.b64decode(user.key), place.pool, namespace, image, options)

    def meaning(self, what: str, error: OSError, seconds: float) -> DriverError | None:
        """What the kernel answered within so many seconds, as an error of ours, if it is about the cluster."""
        if error.errno == errno.ETIMEDOUT:
            return silent(self.place.cluster, what, seconds)
        if error.errno in (errno.ENOENT, errno.ESHUTDOWN):
            return meant(self.place.cluster, self._credentials.user, what, error.errno, str(error.strerror))
        return None

    def silent(self, what: str, seconds: float, error: DeadlineExceeded) -> DeadlineExceeded:
        """That the kernel did not answer, naming the cluster."""
        return silent(self.place.cluster, what, seconds, error)

    # --- the cluster

    def cluster_uuid(self, seconds: float | None = None) -> str:
        """The cluster's fsid."""
        return self._ask("ceph fsid", librados.uuid, seconds=seconds)

    def rooms(self) -> Sequence[PoolRoom]:
        """Every pool of the cluster, with what room it has. Raises FailedPrecondition where nobody counts that."""
        said = self._ask("ceph df", librados.command, {"prefix": "df", "detail": "detail", "format": "json"})
        found = _decoded(_Rooms, said, "ceph df").pools
        if not found:
            raise FailedPrecondition(
                f"the Ceph cluster {self.place.cluster.id} does not tell how full its pools are: its manager "
                f"(ceph-mgr), which counts that, does not run; start it"
            )
        return found

    def room_of(self, rooms: Sequence[PoolRoom], name: str) -> PoolRoom:
        """The one of that name. Raises FailedPrecondition."""
        for room in rooms:
            if room.name == name:
                return room
        raise no_pool(self.place.cluster, "ceph df", name)

    def fence(self, image: str, address: str) -> None:
        """Let nobody of that address write any more, durably, and let go of the image's lock if he has it."""
        words = {"prefix": "osd blocklist", "blocklistop": "add", "addr": address, "expire": _BLOCKED_SECONDS}
        self._ask(f"ceph osd blocklist add {address}", librados.command, words)
        spec = self._spec(image)
        try:
            for lock in self._ask(f"rbd lock ls {spec}", librbd.locks, self._where, image):
                if lock.address == address:
                    self._ask(f"rbd lock rm {spec}", librbd.break_lock, self._where, image, lock)
        except CephMissing:
            return

    @property
    def _where(self) -> Where:
        return Where(self.place.pool, self.place.cluster.namespace)

    def _spec(self, image: str) -> str:
        return f"{self.place.spec}/{image}"

    def _ask(self, what: str, function: Callable[..., R], *args: object, seconds: float | None = None) -> R:
        return self._clients.ask(self.place.cluster, self._credentials, what, function, *args, seconds=seconds)


def _decoded(kind: type[T], said: str | bytes, what: str) -> T:
    try:
        return decode(said, kind)
    except msgspec.MsgspecError as error:
        raise CommandFailed(f"{what} gave an answer that cannot be read ({error})") from None
