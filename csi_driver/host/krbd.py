"""RBD images that the kernel shows as block devices of this node: how one is shown, which one is which, how one goes.

What the kernel says of each is below /sys/bus/rbd (Documentation/ABI/testing/sysfs-bus-rbd): the cluster, the pool's
number, the namespace and the image's id, which no other image has, whatever its name; and the address of the client by
which the cluster knows who writes.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from csi_driver.host import keyring
from csi_driver.host.commands import run_program
from csi_driver.host.files import read_attribute
from csi_driver.host.handle import Handle, open_handle
from csi_driver.model.errors import CommandFailed, DeviceInUse, DeviceMismatch, FailedPrecondition

_BUS: Final = "/sys/bus/rbd"
_LOAD_SECONDS: Final = 20.0
_DEVICE: Final = re.compile(r"/devices/rbd/(\d+)/block/rbd\d+")


@dataclass(frozen=True)
class ImageIdentity:
    """By what an image is known in all clusters."""

    cluster: str
    pool_number: int
    namespace: str
    image_id: str

    def __str__(self) -> str:
        within = f"/{self.namespace}" if self.namespace else ""
        return f"image {self.image_id} of pool {self.pool_number}{within} of cluster {self.cluster}"


@dataclass(frozen=True)
class MappedImage:
    """A mapped image. `number` is the kernel's own of it; `client` the address from which this node writes to it."""

    number: int
    identity: ImageIdentity
    is_snapshot: bool
    major: int
    minor: int
    client: str

    @property
    def path(self) -> str:
        """Its node."""
        return f"/dev/rbd{self.number}"


@dataclass(frozen=True)
class ImageAddress:
    """Where an image is found, and as whom; repr leaves the key out, which is the user's as bytes."""

    monitors: Sequence[str]
    user: str
    key: bytes = field(repr=False)
    pool: str
    namespace: str
    image: str
    options: Sequence[str]

    @property
    def line(self) -> str:
        """What the kernel is told; the key it looks for in the keyrings of who tells it."""
        options = [f"name={self.user}", f"key=client.{self.user}", *self.options]
        if self.namespace:
            options.append(f"_pool_ns={self.namespace}")
        return f"{','.join(self.monitors)} {','.join(options)} {self.pool} {self.image} -"


class MappedImages:
    """The mapped images of this node. `bus` is where the kernel tells of them."""

    def __init__(self, bus: str = _BUS) -> None:
        self._bus = bus

    @property
    def is_loaded(self) -> bool:
        """Whether the kernel can map images."""
        return os.path.isdir(self._bus)

    def load(self) -> None:
        """Have the kernel load its module, where modprobe and the modules are. Raises FailedPrecondition."""
        if not self.is_loaded:
            with contextlib.suppress(FailedPrecondition, CommandFailed):
                run_program(("modprobe", "rbd", "single_major=Y"), timeout=_LOAD_SECONDS)
            if not self.is_loaded:
                raise FailedPrecondition(
                    "the kernel's module rbd is not loaded on this node, and the driver could not load it; run "
                    "'modprobe rbd' there, and have it loaded at each boot"
                )

    def map(self, address: ImageAddress) -> MappedImage:
        """Show it as a device of this node, by its name: what came is to be compared with what was meant.

        Waits for the cluster as long as the options allow. Raises OSError as the kernel answers, FailedPrecondition
        where it takes no such request from us, CommandFailed.
        """
        before = {(one.number, one.client) for one in self.all()}  # a number is soon another's, a client never
        key = keyring.add_to_thread(f"client.{address.user}", bytearray(address.key), "ceph")
        try:
            self._tell(self._request("add"), address.line)
        finally:
            keyring.unlink_from_thread(key)
        for one in self.all():
            with contextlib.suppress(OSError):  # of one that goes meanwhile
                place = self._read(one.number, "pool"), one.identity.namespace, self._read(one.number, "name")
                is_new = (one.number, one.client) not in before
                if is_new and place == (address.pool, address.namespace, address.image):
                    return one
        raise CommandFailed(f"the image {address.image} was mapped and is gone; somebody unmapped it, call again")

    def find(self, identity: ImageIdentity) -> list[MappedImage]:
        """Those of that very image, in the kernel's order; snapshots are none."""
        return [one for one in self.all() if one.identity == identity and not one.is_snapshot]

    def of_device(self, device: tuple[int, int]) -> MappedImage | None:
        """What the block device of that (major, minor) shows; None for a partition and for what is none."""
        major, minor = device
        found = _DEVICE.search(os.path.realpath(f"/sys/dev/block/{major}:{minor}"))
        return self.look(int(found[1])) if found is not None and found.end() == len(found.string) else None

    def look(self, number: int) -> MappedImage | None:
        """The mapped image of that number."""
        try:
            told = {name: self._read(number, name) for name in _ATTRIBUTES}
        except OSError:
            return None  # it went meanwhile
        identity = ImageIdentity(told["cluster_fsid"], int(told["pool_id"]), told["pool_ns"], told["image_id"])
        return MappedImage(
            number,
            identity,
            told["current_snap"] != "-",
            int(told["major"]),
            int(told["minor"]),
            told["client_addr"],
        )

    def open(self, mapped: MappedImage) -> Handle:
        """Open it, and look once more: what is open keeps its number. Raises DeviceMismatch, CommandFailed."""
        try:
            handle = open_handle(mapped.path, os.O_RDONLY)
        except OSError as error:
            raise CommandFailed(
                f"the device {mapped.path} of the {mapped.identity} cannot be opened "
                f"({os.strerror(error.errno or 0)}); /dev must be the host's"
            ) from None
        if handle.number != (mapped.major, mapped.minor) or self.look(mapped.number) != mapped:
            handle.close()
            raise DeviceMismatch(
                f"the device {mapped.path} is not the {mapped.identity} any more, or no node of it; call again"
            )
        return handle

    def refresh(self, device: tuple[int, int]) -> None:
        """Let the device show the size that its image has now. May wait for the cluster. Errors as `unmap`."""
        mapped = self.of_device(device)
        if mapped is not None:
            self._tell_of(mapped, f"devices/{mapped.number}/refresh", "1")

    def unmap(self, mapped: MappedImage) -> None:
        """Let go of it; gone is fine. Waits for the cluster without limit.

        Raises DeviceInUse, FailedPrecondition where the kernel takes no request from us, CommandFailed.
        """
        if self.look(mapped.number) == mapped:
            self._tell_of(mapped, self._request("remove"), str(mapped.number))

    def _tell_of(self, mapped: MappedImage, name: str, text: str) -> None:
        try:
            self._tell(name, text)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            if error.errno == errno.EBUSY:
                raise DeviceInUse(f"the device {mapped.path} of the {mapped.identity} is still open") from None
            raise CommandFailed(
                f"the kernel refuses what was asked of {mapped.path}, the {mapped.identity}: "
                f"{os.strerror(error.errno or 0)}; look at the kernel log"
            ) from None

    def _request(self, what: str) -> str:
        """How the kernel is asked to `add` or `remove`; by the second name where its module has a major for each."""
        name = f"{what}_single_major"
        return name if os.path.exists(f"{self._bus}/{name}") else what

    def _tell(self, name: str, text: str) -> None:
        """Raises OSError as the kernel answers, FailedPrecondition where it takes no request from us."""
        try:
            descriptor = os.open(f"{self._bus}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise FailedPrecondition(
                f"the kernel of this node takes no request for images of Ceph from this process ({self._bus}/{name}: "
                f"{error.strerror}); run it privileged, with /sys writable and the module rbd loaded"
            ) from None
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)

    def all(self) -> Iterator[MappedImage]:
        """Every mapped image, in the kernel's order."""
        numbers: list[int] = []
        with contextlib.suppress(FileNotFoundError):
            numbers = sorted(int(name) for name in os.listdir(f"{self._bus}/devices"))
        for number in numbers:
            if (found := self.look(number)) is not None:
                yield found

    def _read(self, number: int, name: str) -> str:
        return os.fsdecode(read_attribute(f"{self._bus}/devices/{number}/{name}")).strip()


_ATTRIBUTES: Final = (
    "cluster_fsid",
    "pool_id",
    "pool_ns",
    "image_id",
    "current_snap",
    "major",
    "minor",
    "client_addr",
)
