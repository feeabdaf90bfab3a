"""KMS type `metadata`: DEKs wrapped by a passphrase of a secret, bit for bit as Ceph-CSI does.

scrypt(N=32768, r=8, p=1) of the passphrase, with the volume's id as salt, gives the key of AES-256-GCM; what is kept is
a JSON object of `dek` and `nonce`, in base64 (ceph-csi, internal/kms/secretskms.go, October 2024).
"""

import hashlib
import os
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from csi_driver.keys.base import Wrapped
from csi_driver.keys.extras import load
from csi_driver.keys.secret import CEPH_PASSPHRASE
from csi_driver.model.errors import FailedPrecondition, KeyLost
from csi_driver.model.reading import decode
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail

_N: Final = 32768
_R: Final = 8
_MEMORY: Final = 256 * _N * _R
_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12


class Sealed(msgspec.Struct, frozen=True):
    """What is kept of a DEK, by Ceph-CSI's names."""

    dek: bytes
    nonce: bytes


def read_sealed(text: str, where: str) -> Sealed:
    """Read what is kept. Raises KeyLost when it is nothing of the kind."""
    try:
        return decode(text, Sealed)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        raise KeyLost(
            f"the wrapped key in the volume's record is none of {where}; restore the record from a backup"
        ) from None


class _Cipher(Protocol):
    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes: ...
    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes: ...


class MetadataWrapper:
    """Wraps by the passphrase that `passphrase` finds when it is needed."""

    def __init__(self, where: str, passphrase: Callable[[], Passphrase]) -> None:
        self._where = where
        self._passphrase = passphrase
        self._ciphers = load("cryptography.hazmat.primitives.ciphers.aead", where, "metadata")

    def wrap(self, name: str, key: Passphrase) -> Wrapped:
        nonce = os.urandom(_NONCE_BYTES)
        sealed = Sealed(dek=self._cipher(name).encrypt(nonce, key.reveal(), None), nonce=nonce)
        return Wrapped(msgspec.json.encode(sealed).decode())

    def unwrap(self, trail: KeyTrail) -> Passphrase:
        sealed = read_sealed(trail.wrapped, self._where)
        cipher = self._cipher(trail.name)
        try:
            return Passphrase(cipher.decrypt(sealed.nonce, sealed.dek, None))
        except Exception:  # noqa: BLE001 - InvalidTag, or ValueError for a nonce of another length
            raise KeyLost(
                f"the passphrase of {self._where} does not unwrap the key of {trail.name}; put the one with which the "
                f"volume was made back into its secret"
            ) from None

    def check(self) -> str:
        self._passphrase()
        return "its passphrase is there"

    def close(self) -> None:
        """Nothing is open."""

    def _cipher(self, salt: str) -> _Cipher:
        key = hashlib.scrypt(
            self._passphrase().reveal(), salt=salt.encode(), n=_N, r=_R, p=1, maxmem=_MEMORY, dklen=_KEY_BYTES
        )
        cipher: _Cipher = self._ciphers.AESGCM(key)
        return cipher


def passphrase_of(entries: dict[str, str], place: str) -> Passphrase:
    """The passphrase in a secret of Kubernetes. Raises FailedPrecondition without one."""
    if not (found := entries.get(CEPH_PASSPHRASE)):
        raise FailedPrecondition(f"{place} has no entry {CEPH_PASSPHRASE}; put the passphrase there")
    return Passphrase(found.encode())
