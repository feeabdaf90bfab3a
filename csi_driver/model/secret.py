"""Key material on its way from a request or a key management system to the one worker that uses it."""

import base64
import hashlib
import os
from typing import Self

_RANDOM_BYTES = 32


class Passphrase:
    """The exact bytes that open a LUKS2 key slot; shows nothing of them in repr, str or an exception.

    `secret` is the NAMESPACE/NAME of the one that holds them, for who reads that they open nothing; "" where that is
    not known.
    """

    __slots__ = ("_value", "secret")

    def __init__(self, value: bytes, secret: str = "") -> None:
        self._value = value
        self.secret = secret

    @classmethod
    def random(cls) -> Self:
        """A new one: 32 random bytes as base64url text, so that key value stores and people can hold it too."""
        return cls(base64.urlsafe_b64encode(os.urandom(_RANDOM_BYTES)).rstrip(b"="))

    def reveal(self) -> bytes:
        """Return the bytes; only who hands them to libcryptsetup or to a key management system calls this."""
        return self._value

    def digest(self, key: bytes) -> bytes:
        """A digest under `key`, at most 64 bytes: tells whether it is the same again without keeping it."""
        return hashlib.blake2b(self._value, key=key).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Passphrase) and self._value == other._value

    __hash__ = None  # type: ignore[assignment]  # a secret is no key of a mapping

    def __repr__(self) -> str:
        return "Passphrase(…)"
