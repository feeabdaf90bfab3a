"""What the parts of the image engine say to each other: formats, extents, readers, progress."""

from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Final, Protocol

from msgspec import Struct

MIB: Final = 1 << 20
CHUNK: Final = 2 * MIB
"""Bytes of payload that are read, hashed, encrypted and recorded as one. Every chunk but the last is whole."""

Progress = Callable[[int], None]
"""Called with the payload bytes that are done so far, from the thread that drives the work."""


class ImageFormat(StrEnum):
    """What the file of an image is. Detected once, at import; from then on the record says it."""

    RAW = "raw"
    QCOW2 = "qcow2"
    VMDK = "vmdk"
    VHDX = "vhdx"
    VHD = "vhd"
    VDI = "vdi"
    LUKS2 = "luks2"
    LUKS1 = "luks1"


class Extent(Struct, frozen=True):
    """A piece of the payload, in bytes; one that is `zero` reads as zeros and need not be read."""

    offset: int
    length: int
    zero: bool


class Reader(Protocol):
    """The payload of an image: the bytes that a VM sees. Safe for several threads; closing ends what it started."""

    @property
    def size(self) -> int:
        """Bytes of payload."""

    def extents(self) -> Iterator[Extent]:
        """The whole payload in order, without gaps."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`, all of it. Raises DeviceUnreadable, also where the payload ends early."""

    def close(self) -> None:
        """Let go of everything."""
