"""What luksFormat gets: parameters and a secret's wishes, in agreement.

docs/parameters.md, "Agreement", tells users.
"""

import re
from collections.abc import Callable
from typing import Protocol, TypeVar

from csi_driver.luks import formats
from csi_driver.luks.formats import LuksFormat
from csi_driver.model.errors import FailedPrecondition, InvalidArgument
from csi_driver.model.volume import VolumeParameters

T = TypeVar("T")


class Wishes(Protocol):
    """What a secret wishes, as it stands there; None for what it says nothing about."""

    @property
    def cipher(self) -> str | None:
        """CRYPTO_KEY_CIPHER."""

    @property
    def hash(self) -> str | None:
        """CRYPTO_KEY_HASH."""

    @property
    def key_size(self) -> str | None:
        """CRYPTO_KEY_SIZE, in bits."""

    @property
    def pbkdf(self) -> str | None:
        """CRYPTO_PBKDF."""


def luks_format(
    parameters: VolumeParameters, wishes: Wishes, memory_limit_kib: int | None = None, *, random_key: bool = False
) -> LuksFormat:
    """The choice for luksFormat: the parameter, else the secret's wish, else the default.

    The default memory stays below the limit. A `random_key` needs no costly derivation: its default is the cheapest.
    Raises InvalidArgument when the parameters alone do not go together; FailedPrecondition where more than a new class
    can mend it: parameter and secret disagree, a wish is not on the allow-list or does not go with the rest, or the
    memory is above the limit.
    """
    try:
        return _luks_format(parameters, wishes, memory_limit_kib, random_key=random_key)
    except InvalidArgument as error:
        if any((wishes.cipher, wishes.hash, wishes.key_size, wishes.pbkdf)):
            raise FailedPrecondition(f"{error}; the secret's wishes count here too") from None
        raise


def _luks_format(
    parameters: VolumeParameters, wishes: Wishes, memory_limit_kib: int | None, *, random_key: bool
) -> LuksFormat:
    wished_cipher = _wish(one_of(*formats.CIPHER_KEY_BITS), "CRYPTO_KEY_CIPHER", wishes.cipher)
    wished_hash = _wish(one_of(*formats.HASHES), "CRYPTO_KEY_HASH", wishes.hash)
    wished_pbkdf = _wish(one_of(*formats.PBKDFS), "CRYPTO_PBKDF", wishes.pbkdf)
    wished_bits = _wish(whole_number(128, 512), "CRYPTO_KEY_SIZE", wishes.key_size)
    cipher = _agree("cipher", parameters.cipher, "CRYPTO_KEY_CIPHER", wished_cipher) or LuksFormat.cipher
    key_bits = _agree("keySize", parameters.key_bits, "CRYPTO_KEY_SIZE", wished_bits)
    key_bits = key_bits or formats.default_key_bits(cipher)
    formats.check_key_bits(cipher, key_bits)
    hash_name = _agree("hash", parameters.hash, "CRYPTO_KEY_HASH", wished_hash) or LuksFormat.hash
    pbkdf = _agree("pbkdf", parameters.pbkdf, "CRYPTO_PBKDF", wished_pbkdf)
    pbkdf = pbkdf or ("pbkdf2" if random_key and parameters.pbkdf_memory_kib is None else LuksFormat.pbkdf)
    cheapest = formats.PBKDF2_LEAST_ITERATIONS if random_key and pbkdf == "pbkdf2" else None
    iterations = parameters.pbkdf_iterations or cheapest or formats.default_iterations(pbkdf, hash_name)
    least, most = (
        (formats.PBKDF2_LEAST_ITERATIONS, formats.PBKDF2_MOST_ITERATIONS)
        if pbkdf == "pbkdf2"
        else (formats.ARGON2_LEAST_TIME, formats.ARGON2_MOST_TIME)
    )
    if not least <= iterations <= most:
        raise InvalidArgument(
            f"the parameter pbkdfIterations is {iterations}; with {pbkdf} it must be from {least} to {most}"
        )
    if pbkdf == "pbkdf2" and parameters.pbkdf_memory_kib is not None:
        raise InvalidArgument("the parameter pbkdfMemory means nothing with pbkdf2; leave it out or choose argon2id")
    return LuksFormat(
        cipher=cipher,
        key_bits=key_bits,
        hash=hash_name,
        pbkdf=pbkdf,
        memory_kib=0 if pbkdf == "pbkdf2" else _memory(parameters.pbkdf_memory_kib, memory_limit_kib),
        iterations=iterations,
        sector_size=parameters.sector_size or LuksFormat.sector_size,
    )


def _agree(parameter: str, chosen: T | None, entry: str, wished: T | None) -> T | None:
    if chosen is not None and wished is not None and chosen != wished:
        raise FailedPrecondition(
            f"the StorageClass parameter {parameter} is {chosen} and the secret's entry {entry} is {wished}; "
            f"make them equal or leave one out"
        )
    return chosen if chosen is not None else wished


def _memory(chosen: int | None, limit: int | None) -> int:
    if chosen is None:
        return min(formats.ARGON2_DEFAULT_MEMORY_KIB, limit or formats.ARGON2_DEFAULT_MEMORY_KIB)
    if limit is not None and chosen > limit:
        raise FailedPrecondition(
            f"the parameter pbkdfMemory is {chosen} KiB and this driver allows {limit} KiB, so that every node can "
            f"open the volume again; choose less or raise --pbkdf-memory-limit on all nodes"
        )
    return chosen


def _wish(read: Callable[[str], T], entry: str, text: str | None) -> T | None:
    """What an entry of the secret wishes; a wrong one is not quoted, as it may be the passphrase in a wrong place."""
    if text is None:
        return None
    try:
        return read(text)
    except ValueError as error:
        raise FailedPrecondition(f"the secret's entry {entry} is wrong; it must be {error}") from None


def one_of(*allowed: str) -> Callable[[str], str]:
    """A reader of one of these texts; its ValueError says what a text must be."""

    def read(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return text

    return read


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """A reader of a number in that range; its ValueError says what a text must be."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return int(text)

    return read
