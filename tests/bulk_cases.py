"""Every cipher, key size and sector size, with fixed keys and data, and what dm-crypt makes of them.

`DIGESTS` was taken from the device below a real mapping; tests/machine/test_bulk.py takes it again.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import pytest

from csi_driver.luks.bulk import COMPILED
from csi_driver.luks.formats import CIPHER_KEY_BITS, SECTOR_SIZES

FIRST: Final = (1 << 32) - 64
"""Number of the first sector: within the data the numbers outgrow the 32 bits of `plain`."""

DATA: Final = hashlib.shake_256(b"data").digest(17 * 4096)
"""Odd for whatever works on a power of two of sectors at a time, at every sector size."""


@dataclass(frozen=True)
class Case:
    """One way to encrypt DATA."""

    cipher: str
    key_bits: int
    sector_size: int

    @property
    def key(self) -> bytes:
        """A fixed key."""
        return hashlib.shake_256(f"{self.cipher} {self.key_bits}".encode()).digest(self.key_bits // 8)

    def __str__(self) -> str:
        return f"{self.cipher}-{self.key_bits}-{self.sector_size}"


CASES: Final = tuple(
    Case(cipher, key_bits, sector_size)
    for cipher, sizes in CIPHER_KEY_BITS.items()
    for key_bits in sizes
    for sector_size in SECTOR_SIZES
)

WAYS: Final = (
    pytest.param(
        True,
        id="compiled",
        marks=pytest.mark.skipif(
            not os.path.exists(COMPILED) and shutil.which("cc") is None, reason="there is no C compiler"
        ),
    ),
    pytest.param(False, id="sector by sector"),
)
"""Values of `compiled`. Where there is a compiler the compiled part must be there too."""


def done(work: Callable[[int, memoryview, memoryview], None], first: int, data: bytes) -> bytes:
    """What `encrypt` or `decrypt` of a cipher makes of the data."""
    target = bytearray(len(data))
    work(first, memoryview(data), memoryview(target))
    return bytes(target)


def digest(ciphertext: bytes) -> str:
    """As DIGESTS has it."""
    return hashlib.sha256(ciphertext).hexdigest()[:16]


DIGESTS: Final = {
    "aes-xts-plain64-256-512": "25c8ab20c4e20841",
    "aes-xts-plain64-256-1024": "f595da28888481ed",
    "aes-xts-plain64-256-2048": "7ebef6ae6eab0634",
    "aes-xts-plain64-256-4096": "664c905ea2d5d72e",
    "aes-xts-plain64-384-512": "a28e1a1349bbd3a2",
    "aes-xts-plain64-384-1024": "007bdb6f82505b9e",
    "aes-xts-plain64-384-2048": "bada419dc54211b3",
    "aes-xts-plain64-384-4096": "b4adda587938fb42",
    "aes-xts-plain64-512-512": "f0f14b04601d9643",
    "aes-xts-plain64-512-1024": "2a92ed929b87567c",
    "aes-xts-plain64-512-2048": "88b050dbea6b6197",
    "aes-xts-plain64-512-4096": "bd9f3d06cb8f0d82",
    "aes-xts-plain-256-512": "3573c2c172595afc",
    "aes-xts-plain-256-1024": "083a9f579846b697",
    "aes-xts-plain-256-2048": "30cc63a1060b7c39",
    "aes-xts-plain-256-4096": "75d41407b24f9544",
    "aes-xts-plain-384-512": "737162e3924bee57",
    "aes-xts-plain-384-1024": "6bdd74e830117129",
    "aes-xts-plain-384-2048": "9f4326236f9a577c",
    "aes-xts-plain-384-4096": "af97db6e24e188c5",
    "aes-xts-plain-512-512": "b26549027f5f1cee",
    "aes-xts-plain-512-1024": "ed74bf895f0623bb",
    "aes-xts-plain-512-2048": "7c079b6d6538ad0e",
    "aes-xts-plain-512-4096": "61ff8221dc214b6e",
    "aes-cbc-plain-128-512": "fc0eb6ba5f1c4d76",
    "aes-cbc-plain-128-1024": "235aa45e8edaa481",
    "aes-cbc-plain-128-2048": "b1023b1e581b2332",
    "aes-cbc-plain-128-4096": "132b9350f009c58b",
    "aes-cbc-plain-192-512": "ee6566870c5caba7",
    "aes-cbc-plain-192-1024": "c48fdcecd63e5faa",
    "aes-cbc-plain-192-2048": "ed1229fe160b82af",
    "aes-cbc-plain-192-4096": "468b23731e7fd944",
    "aes-cbc-plain-256-512": "ab2db5cf56621878",
    "aes-cbc-plain-256-1024": "62bb6b04681f7cd1",
    "aes-cbc-plain-256-2048": "1333eb4dacf27f95",
    "aes-cbc-plain-256-4096": "e331c20d53dd284f",
    "aes-cbc-plain64-128-512": "766808457c939a1f",
    "aes-cbc-plain64-128-1024": "01edc29d1e73ad0d",
    "aes-cbc-plain64-128-2048": "42f7eed6f1b45737",
    "aes-cbc-plain64-128-4096": "1036369757ae307c",
    "aes-cbc-plain64-192-512": "fb312d09dcb0b30e",
    "aes-cbc-plain64-192-1024": "54e5da89b0ee6f7a",
    "aes-cbc-plain64-192-2048": "a9fa13849ae01cc2",
    "aes-cbc-plain64-192-4096": "fc462807dd43a1f8",
    "aes-cbc-plain64-256-512": "deb3e7050a1cab7e",
    "aes-cbc-plain64-256-1024": "885138ba7b035704",
    "aes-cbc-plain64-256-2048": "5c81a67091a17cb4",
    "aes-cbc-plain64-256-4096": "74327150a49a1183",
    "aes-cbc-essiv:sha256-128-512": "b641ba4f85e8b914",
    "aes-cbc-essiv:sha256-128-1024": "15f4870e6878ba91",
    "aes-cbc-essiv:sha256-128-2048": "6b525db11f3d6d6f",
    "aes-cbc-essiv:sha256-128-4096": "0b13524a1760981c",
    "aes-cbc-essiv:sha256-192-512": "b4aa5db69657ea99",
    "aes-cbc-essiv:sha256-192-1024": "7d2da97f701f0669",
    "aes-cbc-essiv:sha256-192-2048": "e2d3cf37fcbe6c36",
    "aes-cbc-essiv:sha256-192-4096": "d9c480ffe6b73d15",
    "aes-cbc-essiv:sha256-256-512": "cedc83aa3282513a",
    "aes-cbc-essiv:sha256-256-1024": "a03b34a69410b732",
    "aes-cbc-essiv:sha256-256-2048": "e6742a7584148327",
    "aes-cbc-essiv:sha256-256-4096": "1046e2ecc3aece7c",
}
"""Start of the SHA-256 of the encrypted DATA, by case."""
