"""The images that are mapped on this node for volumes, each known by what was pinned before it was mapped.

<folder>/attached/<id>.json    which image of which cluster is the volume's, as of its attaching

What asks by it (publish, unstage) needs no cluster that answers.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from csi_driver.backends.rbdpool import CephPool
from csi_driver.host.files import Files, read_file, though_read_only
from csi_driver.host.handle import Handle
from csi_driver.host.krbd import ImageIdentity, MappedImage, MappedImages
from csi_driver.host.workers import Workers
from csi_driver.model.errors import DeadlineExceeded, DeviceMismatch, FailedPrecondition
from csi_driver.model.reading import decode

VERSION: Final = 1
_LOAD_SECONDS: Final = 30.0
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """An image that is the volume's, by identity, and the `client` by which it was mapped, once it is."""

    version: int = VERSION
    fsid: str
    namespace: str
    pool_number: int
    image_id: str
    image: str
    client: str | None = None

    @property
    def identity(self) -> ImageIdentity:
        """By what its device is known."""
        return ImageIdentity(self.fsid, self.pool_number, self.namespace, self.image_id)

    def is_shown_by(self, mapped: MappedImage) -> bool:
        """Whether that is this image itself, mapped by the client that is known to be the volume's, if one is yet."""
        return mapped.identity == self.identity and not mapped.is_snapshot and self.client in (None, mapped.client)


class BorrowedDevice(Handle):
    """A device that was mapped for this handle alone: `let_go` is called when it is closed."""

    def __init__(self, handle: Handle, let_go: Callable[[], None]) -> None:
        super().__init__(handle.fd, handle.name)
        self._let_go = let_go

    def close(self) -> None:
        """Close it and let go of the device; again is fine."""
        was_open = self.fd >= 0
        super().close()
        if was_open:
            self._let_go()


class MappedVolumes:
    """Maps images and lets go of them; `seconds` is how long the kernel may take for either."""

    def __init__(self, folder: Path, files: Files, workers: Workers, images: MappedImages, seconds: float) -> None:
        self._folder = folder / "attached"
        self._files = files
        self._workers = workers
        self._images = images
        self._seconds = seconds
        self.boot = _BOOT_ID.read_text().strip()

    def prepare(self) -> None:
        """Make the folder. Raises OSError.

        What an earlier boot had mapped, or a kernel let go of late, stays pinned: `detach` has to tell the cluster.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def ids(self) -> Sequence[str]:
        """The volumes that are mapped here, sorted."""
        return sorted(volume_id for volume_id in self._names() if self.mapped(volume_id) is not None)

    def pin(self, volume_id: str) -> Pin | None:
        """What was pinned. Raises FailedPrecondition for what cannot be read."""
        path = self._path(volume_id)
        try:
            found = decode(read_file(path), Pin)
        except FileNotFoundError:
            return None
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise FailedPrecondition(
                f"{path} cannot be read ({error}); unmap the volume's image by hand (rbd showmapped) and remove it"
            ) from None
        if found.version != VERSION:
            raise FailedPrecondition(f"{path} has version {found.version}; run the driver that wrote it on this node")
        return found

    def mapped(self, volume_id: str) -> MappedImage | None:
        """The pinned image as it is mapped here for the volume."""
        pin = self.pin(volume_id)
        found = self._images.find(pin.identity) if pin is not None else ()
        return next((one for one in found if pin is not None and pin.is_shown_by(one)), None)

    def is_of(self, volume_id: str, device: tuple[int, int]) -> bool:
        """Whether the block device of that number shows the pinned image, for the volume."""
        pin, found = self.pin(volume_id), self._images.of_device(device)
        return pin is not None and found is not None and pin.is_shown_by(found)

    def open(self, mapped: MappedImage) -> Handle:
        """Open its device, checked to be still that."""
        return self._images.open(mapped)

    def map(self, volume_id: str, pool: CephPool, pin: Pin, options: Sequence[str]) -> MappedImage:
        """Map the pinned image, by a client of its own, and no other that has its name; it is pinned before.

        Raises DeviceMismatch for another one, which is not mapped then, CephMissing, DeadlineExceeded naming what
        hangs, FailedPrecondition where the kernel's module is not loaded or cannot map such an image, CommandFailed.
        """
        path = self._path(volume_id)
        self._files.write(path, msgspec.json.encode(pin))
        address = pool.address(pin.image, ("noshare", *options))
        what = f"rbd-map of volume {volume_id}"
        if not self._images.is_loaded:
            self._workers.call("modprobe", _LOAD_SECONDS, self._images.load)
        try:
            found = self._workers.call(what, self._seconds, self._images.map, address)
        except DeadlineExceeded as error:
            raise pool.silent(what, self._seconds, error) from None
        except OSError as error:
            of_cluster = pool.meaning(f"mapping {pin.image} for volume {volume_id}", error, self._seconds)
            if of_cluster is not None:
                raise of_cluster from None
            raise FailedPrecondition(
                f"the kernel of this node cannot map the image {pin.image} of volume {volume_id} ({error.strerror}): "
                f"its log (dmesg) says why, a feature that it lacks (imageFeatures of the class) or an option that it "
                f"does not know ({', '.join(options) or 'mapOptions'}), say, which a newer kernel may"
            ) from None
        if not pin.is_shown_by(found):
            self.unmap(volume_id, found)
            raise DeviceMismatch(
                f"the image {pin.image} in {pool.place} is not that of volume {volume_id}: expected the "
                f"{pin.identity}, found {found.identity}; somebody has put another one in its place, put the "
                f"volume's own back"
            )
        self._files.write(path, msgspec.json.encode(msgspec.structs.replace(pin, client=found.client)))
        return found

    def unmap(self, volume_id: str, mapped: MappedImage) -> None:
        """Let the kernel let go of it. Raises DeviceInUse, DeadlineExceeded naming what hangs, CommandFailed."""
        try:
            self._workers.call(
                f"rbd-unmap of volume {volume_id} on {mapped.path}", self._seconds, self._images.unmap, mapped
            )
        except DeadlineExceeded:
            raise DeadlineExceeded(
                f"the device {mapped.path} of volume {volume_id} could not be unmapped within {self._seconds:g} s: the "
                f"kernel waits for its cluster, which does not answer the client {mapped.client} (the process "
                f"rbd-unmap hangs until it does); look at 'ceph status' and at the network of this node, then this "
                f"goes on"
            ) from None

    def refresh(self, device: Handle) -> None:
        """Let its device show the size that its image has."""
        self._workers.call(f"rbd-refresh of {device}", self._seconds, self._images.refresh, device.number)

    def forget(self, volume_id: str) -> None:
        """Remove the pin; absent is fine. On a read-only file system it stays: its client has no mapping any more."""
        with contextlib.suppress(FileNotFoundError), though_read_only("pin", volume_id):
            self._files.remove(self._path(volume_id))

    def _names(self) -> Sequence[str]:
        with contextlib.suppress(FileNotFoundError):
            return [path.stem for path in self._folder.glob("[!.]*.json")]
        return []

    def _path(self, volume_id: str) -> Path:
        return self._folder / f"{volume_id}.json"
