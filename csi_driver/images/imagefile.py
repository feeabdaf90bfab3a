"""A file that shall become an image, as the checks of its format read it."""

import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from csi_driver.host.blockdev import read_at
from csi_driver.images.base import MIB
from csi_driver.model.errors import DeviceUnreadable, InvalidArgument

SECTOR: Final = 512

# Array types of 4 and 8 bytes.
_WIDTHS: Final = {"I": 4, "Q": 8}
Order = Literal["little", "big"]


@dataclass(frozen=True)
class ImageFile:
    """An open regular file of `size` bytes; `where` names it in sentences, `most_bytes` bounds the disk that it holds.

    Every method raises DeviceUnreadable where a read fails, and InvalidArgument where it refuses the file.
    """

    descriptor: int
    where: str
    size: int
    most_bytes: int

    def refusal(self, reason: str) -> InvalidArgument:
        """The error that refuses this file; `reason` tells what was found and what to do."""
        return InvalidArgument(f"{self.where} is refused: {reason}")

    def peek(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`, fewer at the end."""
        try:
            return read_at(self.descriptor, offset, length)
        except OSError as error:
            raise DeviceUnreadable(
                f"{self.where} cannot be read at offset {offset} ({error.strerror}); check the storage below it"
            ) from None

    def read(self, offset: int, length: int, what: str) -> bytes:
        """All of `length` bytes from `offset`; `what` names them in a sentence."""
        self.require(offset, length, what)
        content = self.peek(offset, length)
        if len(content) < length:
            raise self.refusal("it became shorter while it was read; give a file that nobody changes")
        return content

    def numbers(self, code: Literal["I", "Q"], order: Order, offset: int, count: int, what: str) -> Iterator[int]:
        """A table of `count` unsigned numbers of 4 (`I`) or 8 (`Q`) bytes, read piece by piece."""
        width = _WIDTHS[code]
        self.require(offset, count * width, what)
        for start in range(0, count * width, MIB):
            yield from self.table(code, order, offset + start, min(count * width - start, MIB) // width, what)

    def table(self, code: Literal["I", "Q"], order: Order, offset: int, count: int, what: str) -> "array[int]":
        """The same, at once."""
        table = array(code, self.read(offset, count * _WIDTHS[code], what))
        if sys.byteorder != order:
            table.byteswap()
        return table

    def require(self, offset: int, length: int, what: str) -> None:
        """Refuse the file unless all of `what` lies in it: qemu reads zeros past the end."""
        if offset + length > self.size:
            raise self.refusal(
                f"its {what} (offset {offset}, {length} bytes) reaches past the end of the file ({self.size} bytes); "
                "it is truncated or damaged, fetch it again"
            )

    def require_size(self, disk: int) -> None:
        """Refuse a virtual size of `disk` bytes that cannot be or is over the limit."""
        if not disk or disk % SECTOR:
            raise self.refusal(
                f"its virtual size is {disk} bytes, expected a multiple of {SECTOR} above 0; make the image anew"
            )
        self.require_limit(disk)

    def require_limit(self, disk: int) -> None:
        """Refuse a virtual size of `disk` bytes that is over the limit."""
        if disk > self.most_bytes:
            raise self.refusal(
                f"its virtual size is {disk} bytes and at most {self.most_bytes} are allowed; raise the limit if the "
                "image is meant to be that big"
            )
