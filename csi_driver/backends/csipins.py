"""Which device of this node is a volume's, while it is attached: what the kernel calls it, in a file for each volume.

The folder is shared with the holder pods: who holds a device sees here whether it may let go of it.

<folder>/<digest of the id>.sock   where the volume's holder hands its device on
<folder>/<digest of the id>.json   the pin
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from csi_driver.host.boot import boot_id
from csi_driver.host.files import Files, read_attribute, read_file, though_read_only
from csi_driver.host.handle import Handle
from csi_driver.host.passing import remove_dead
from csi_driver.model.reading import decode

_PIN: Final = ".json"
_SOCKET: Final = ".sock"


class Direct(msgspec.Struct, frozen=True, kw_only=True):
    """What the node service of the driver below is told of a volume: its `handle` and `context` (CSI's volume_id and
    volume_context), as the PersistentVolume below has them. `driver` is the name that must answer.
    """

    driver: str
    handle: str
    context: dict[str, str] = {}


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """The device of a volume that is attached, in this boot.

    A number can become another device's; `disk` tells disks apart that had it (`diskseq` of sysfs; 0 where the kernel
    tells none). `holder` is the uid of the pod that handed it on. `ticket` is what the volume's record says of this
    very attachment. One that is `released` only waits for the record to hear of it.

    With `direct` there is no holder: the driver below is called, and a pin without a number says that it may have been.
    One that is `leaving` is being put down there, whoever asks for it.
    """

    volume_id: str
    boot_id: str
    major: int = 0
    minor: int = 0
    disk: int = 0
    holder: str = ""
    ticket: str
    released: bool = False
    leaving: bool = False
    direct: Direct | None = None

    @property
    def number(self) -> tuple[int, int]:
        """(major, minor)."""
        return self.major, self.minor

    @property
    def has_device(self) -> bool:
        """Whether the device was handed on."""
        return self.number != (0, 0)

    def without_device(self, *, leaving: bool) -> "Pin":
        """The same, before or behind that."""
        return msgspec.structs.replace(self, major=0, minor=0, disk=0, leaving=leaving)


class Pins:
    """The pins in `folder`; those of an earlier boot count as none, and need no fsync.

    But for those of a driver below that was called: until it is told that the volume is put down, they are kept.
    """

    def __init__(self, folder: Path, files: Files) -> None:
        self._folder = folder
        self._files = files
        self._boot_id = boot_id()

    @property
    def boot_id(self) -> str:
        """Of this boot."""
        return self._boot_id

    def prepare(self) -> None:
        """Make the folder, and remove what is of no use any more in it. Raises OSError."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in sorted(self._folder.iterdir()):
            if path.suffix == _PIN and (pin := _decoded(path)) is not None and pin.boot_id != self._boot_id:
                if pin.direct is None:
                    self._files.remove(path)
            elif path.suffix == _SOCKET:
                remove_dead(path)

    def socket(self, volume_id: str) -> Path:
        """Where the volume's holder hands its device on."""
        return self._folder / f"{digest(volume_id)}{_SOCKET}"

    def get(self, volume_id: str) -> Pin | None:
        """The pin of this boot, released or not."""
        found = _decoded(self._path(volume_id))
        is_its = found is not None and (found.volume_id, found.boot_id) == (volume_id, self._boot_id)
        return found if is_its else None

    def held(self, volume_id: str) -> Pin | None:
        """The pin of a volume that is attached."""
        found = self.get(volume_id)
        return found if found is not None and not found.released else None

    def left(self, volume_id: str) -> Pin | None:
        """The pin of an earlier boot, of a driver below that was called then."""
        found = _decoded(self._path(volume_id))
        return found if found is not None and found.volume_id == volume_id and self.is_left(found) else None

    def put(self, pin: Pin) -> None:
        """Write it, before anything is put on the device. Raises OSError."""
        content = msgspec.json.encode(pin)
        if pin.direct is None:
            self._files.write_volatile(self._path(pin.volume_id), content)
        else:
            self._files.write(self._path(pin.volume_id), content)

    def note(self, pin: Pin) -> bool:
        """Write that it comes to its end; False where there is no room for that.

        On a read-only file system it stays as it was: no device is put on it.
        """
        try:
            with though_read_only("pin", pin.volume_id):
                self.put(pin)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return False
        return True

    def remove(self, volume_id: str) -> None:
        """Forget it; absent is fine. On a read-only file system it stays, of an attachment that has ended."""
        with though_read_only("pin", volume_id):
            self._files.remove(self._path(volume_id))

    def all(self) -> Sequence[Pin]:
        """The pins of this boot, in the order of the volumes' ids."""
        return [pin for pin in self._all() if pin.boot_id == self._boot_id]

    def all_left(self) -> Sequence[Pin]:
        """What `left` tells, of all volumes."""
        return [pin for pin in self._all() if self.is_left(pin)]

    def _all(self) -> Sequence[Pin]:
        return sorted(self._files_of_pins(), key=lambda pin: pin.volume_id)

    def _files_of_pins(self) -> Iterator[Pin]:
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._folder):
                if name.endswith(_PIN) and name[0] != "." and (found := _decoded(self._folder / name)):
                    yield found

    def is_left(self, pin: Pin) -> bool:
        """Whether it is of an earlier boot."""
        return pin.boot_id != self._boot_id and pin.direct is not None

    def _path(self, volume_id: str) -> Path:
        return self._folder / f"{digest(volume_id)}{_PIN}"


def _decoded(path: Path) -> Pin | None:
    try:
        return decode(read_file(path), Pin)
    except (FileNotFoundError, ValueError):  # msgspec's errors are ValueErrors
        return None


def digest(volume_id: str) -> str:
    """A short name for a volume: ids are longer than a label of Kubernetes, or a socket's name, can be."""
    return hashlib.sha256(volume_id.encode()).hexdigest()[:32]


def disk_of(number: tuple[int, int]) -> int:
    """Tells the disk of that number from others that had the number (`diskseq`, Linux 5.15); 0 where nothing tells."""
    major, minor = number
    for place in ("diskseq", "../diskseq"):  # of a partition its disk has it
        with contextlib.suppress(OSError, ValueError):
            return int(read_attribute(f"/sys/dev/block/{major}:{minor}/{place}"))
    return 0


def fits(pin: Pin, number: tuple[int, int]) -> bool:
    """Whether the device of that number is the pinned one, still."""
    return pin.has_device and pin.number == number and pin.disk == disk_of(number)


def opened_by_number(name: str, number: tuple[int, int], aside: Path) -> Handle | None:
    """The block device of that number, by the kernel's node `name`, else by one made at `aside` for the moment.

    None when there is no such device any more. Raises OSError.
    """
    device = os.makedev(*number)
    with contextlib.suppress(OSError):
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if os.fstat(descriptor).st_rdev == device:
            return Handle(descriptor, name)
        os.close(descriptor)
    with contextlib.suppress(FileNotFoundError):
        aside.unlink()
    os.mknod(aside, 0o60600, device)
    try:
        return Handle(os.open(aside, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), name)
    except OSError:
        return None
    finally:
        aside.unlink()
