"""The payload of an encrypted image: what lies behind its LUKS header, decrypted in memory as it is read."""

from collections.abc import Iterator
from typing import Final

from msgspec.structs import replace

from csi_driver.images.base import Extent, Reader
from csi_driver.luks.bulk import sector_cipher
from csi_driver.luks.formats import READABLE_HASHES
from csi_driver.luks.header_rules import DEFAULT_LIMITS, Limits
from csi_driver.luks.image_header import padded, read_image_header
from csi_driver.model.secret import Passphrase

MOST_COST: Final = replace(DEFAULT_LIMITS, memory_kib=1 << 20, hashes=READABLE_HASHES)
"""What one unlock of an image may cost: cryptsetup's own choice takes up to 1 GiB (luksFormat, --pbkdf-memory)."""

_UNIT: Final = 512


class LuksReader:
    """Reads what `passphrase` opens in `source`, the reader of the ciphertext, which closes with this one.

    `where` names the image in errors, `limits` what its key slots may cost. The payload ends where the header's token
    says, if that is within the last sector, else with the data. Errors of the constructor: DeviceBlank,
    ForeignSignature, InvalidHeader, DeviceShort, Unauthenticated, DeviceUnreadable; `source` is then left open.
    """

    def __init__(self, source: Reader, passphrase: Passphrase, where: str, limits: Limits = MOST_COST) -> None:
        self._source = source
        self._image = read_image_header(where, self._ciphertext, source.size, limits)
        identity = self._image.identity
        with self._image.volume_key(passphrase) as key:
            self._cipher = sector_cipher(identity.cipher, bytes(key.value), identity.sector_size)

    @property
    def size(self) -> int:
        return self._image.payload

    def extents(self) -> Iterator[Extent]:
        """One extent of data: a hole in ciphertext does not read as zeros."""
        yield Extent(0, self._image.payload, zero=False)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        sector, length = self._image.identity.sector_size, len(buffer)
        skip = offset % sector
        span = padded(skip + length, sector)
        if span == length:
            self._decrypt(offset, buffer)
            return
        # A few bytes of a sector are wanted: where an image's end is not a sector's.
        with memoryview(bytearray(span)) as whole:
            self._decrypt(offset - skip, whole)
            buffer[:] = whole[skip : skip + length]

    def close(self) -> None:
        self._source.close()

    def _decrypt(self, offset: int, buffer: memoryview) -> None:
        self._source.read_into(self._image.identity.data_offset + offset, buffer)
        self._cipher.decrypt(offset // _UNIT, buffer, buffer)

    def _ciphertext(self, offset: int, length: int) -> bytes:
        found = bytearray(max(0, min(length, self._source.size - offset)))
        with memoryview(found) as view:
            self._source.read_into(offset, view)
        return bytes(found)
