"""What this driver writes: ciphers, key sizes, key derivation, geometry. The allow-lists have their one place here."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from csi_driver.model.errors import InvalidArgument, OutOfRange

MIB: Final = 1 << 20

DATA_OFFSET: Final = 16 * MIB
"""Bytes between the start of the device and the first payload byte; LUKS2's own default."""

HEADER_SIZE: Final = 16 * 1024
"""Bytes of one copy of the header, binary part and JSON area; LUKS2's own default."""

KEYSLOTS_SIZE: Final = 4 * MIB
"""Bytes of the key slot area: room for 16 slots. The default would fill the 16 MiB, all written with random bytes."""

XTS_KEY_BITS: Final = (256, 384, 512)
CBC_KEY_BITS: Final = (128, 192, 256)
CIPHER_KEY_BITS: Final = MappingProxyType(
    {
        "aes-xts-plain64": XTS_KEY_BITS,
        "aes-xts-plain": XTS_KEY_BITS,
        "aes-cbc-plain": CBC_KEY_BITS,
        "aes-cbc-plain64": CBC_KEY_BITS,
        "aes-cbc-essiv:sha256": CBC_KEY_BITS,
    }
)
"""Ciphers a Longhorn secret may name, each with the key sizes in bits that AES has in that mode."""

PLAIN_IV_LIMIT: Final = 2 << 40
"""A `plain` IV counts 512-byte sectors in 32 bits and repeats past 2 TiB (cryptsetup FAQ 5.14)."""

HASHES: Final = ("sha256", "sha384", "sha512")
READABLE_HASHES: Final = (*HASHES, "sha1")
"""Those of images that others made: SHA-1 was cryptsetup's choice up to 2016, and is not broken for key derivation."""
SECTOR_SIZES: Final = (512, 1024, 2048, 4096)
LARGE_SECTOR: Final = 4096
"""What file systems use anyhow, and the largest that dm-crypt takes."""
PBKDFS: Final = ("argon2id", "argon2i", "pbkdf2")

PBKDF2_LEAST_ITERATIONS: Final = 1000
PBKDF2_MOST_ITERATIONS: Final = 10_000_000
ARGON2_LEAST_TIME: Final = 4
ARGON2_MOST_TIME: Final = 64
ARGON2_READABLE_TIME: Final = 1024
"""Passes of headers that others made. cryptsetup takes as many as fit into two seconds: with Ceph-CSI's 32 MiB that was
98 on a slow machine. Where it takes too long, an unlock's time limit ends it."""
ARGON2_LEAST_MEMORY_KIB: Final = 32
ARGON2_DEFAULT_MEMORY_KIB: Final = 64 * 1024


@dataclass(frozen=True)
class LuksFormat:
    """One complete choice for luksFormat. Sizes in bytes, the key in bits, memory in KiB.

    `iterations` is PBKDF2's count or Argon2's time cost. They are fixed and never measured on the node: a busy node
    would choose a weak cost, a big one a cost that the smallest node cannot pay.
    """

    cipher: str = "aes-xts-plain64"
    key_bits: int = 512
    hash: str = "sha256"
    pbkdf: str = "argon2id"
    memory_kib: int = ARGON2_DEFAULT_MEMORY_KIB
    iterations: int = ARGON2_LEAST_TIME
    sector_size: int = 512
    data_offset: int = DATA_OFFSET


def default_iterations(pbkdf: str, hash_name: str) -> int:
    """Cost for a passphrase that may be weak: RFC 9106 section 4 for Argon2, OWASP's 2023 advice for PBKDF2."""
    if pbkdf != "pbkdf2":
        return ARGON2_LEAST_TIME
    return 600_000 if hash_name == "sha256" else 210_000


def default_key_bits(cipher: str) -> int:
    """AES-256 in the cipher's mode."""
    return CIPHER_KEY_BITS[cipher][-1]


def check_capacity(cipher: str, capacity: int) -> None:
    """Raise OutOfRange when the cipher's IV would repeat within `capacity` bytes."""
    if cipher.endswith("-plain") and capacity > PLAIN_IV_LIMIT:
        raise OutOfRange(
            f"the cipher {cipher} repeats its IV past {PLAIN_IV_LIMIT} bytes and {capacity} are wanted; choose "
            f"aes-xts-plain64"
        )


def check_key_bits(cipher: str, key_bits: int) -> None:
    """Raise InvalidArgument when AES has no such key in the cipher's mode."""
    allowed = CIPHER_KEY_BITS[cipher]
    if key_bits not in allowed:
        raise InvalidArgument(
            f"the cipher {cipher} has no {key_bits}-bit key; choose one of {', '.join(map(str, allowed))}"
        )
