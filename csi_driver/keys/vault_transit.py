"""KMS type `vaulttransit`: DEKs wrapped by a key of Vault's transit engine that never leaves it.

The key must be a derived one: only then does its context, the volume's name, bind what was wrapped to the volume
(measured on Vault 1.13; on another key it is ignored).
"""

import base64
import re
from typing import Final

import msgspec

from csi_driver.keys.base import EntryReader, Wrapped
from csi_driver.keys.http import NoRoute, NotTaken, shaped
from csi_driver.keys.vault import Vault, joined
from csi_driver.model.errors import FailedPrecondition, KeyLost
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail

_CHECKED: Final = "luks-csi-check"
_NOTHING: Final = "vault:v1:AAAA"
_NO_KEY: Final = "key not found"  # Vault's words
_CIPHERTEXT: Final = re.compile(r"vault:v([0-9]{1,9}):[A-Za-z0-9+/=]+")


class _Data(msgspec.Struct):
    ciphertext: str = ""
    plaintext: str = ""


class _Answer(msgspec.Struct):
    data: _Data | None = None


class VaultTransit:
    """Wraps by the key `vaultTransitKey` at `vaultTransitPath`."""

    def __init__(self, vault: Vault, reader: EntryReader) -> None:
        self._vault = vault
        self._mount = joined(reader.text("vaultTransitPath", "transit"))
        self._key = joined(reader.text("vaultTransitKey"))

    def wrap(self, name: str, key: Passphrase) -> Wrapped:
        plaintext = base64.b64encode(key.reveal()).decode()
        found = self._ask("encrypt", {"plaintext": plaintext, "context": _context(name)}, quotes=False)
        wrapped = self._wrapped(found)
        self._refuse_unbound(name, wrapped.text)
        return wrapped

    def unwrap(self, trail: KeyTrail) -> Passphrase:
        found = self._known("decrypt", trail)
        try:
            return Passphrase(base64.b64decode(found.plaintext, validate=True))
        except ValueError:
            raise FailedPrecondition(f"{self._vault.where} gave a key that is no base64; check its address") from None

    def rewrap_there(self, trail: KeyTrail) -> Wrapped:
        return self._wrapped(self._known("rewrap", trail))

    def check(self) -> str:
        """Wrap and unwrap a word, by a key that is there: asked to wrap, Vault may make one."""
        said = self._vault.health()
        try:
            self._ask("decrypt", {"ciphertext": _NOTHING, "context": _context(_CHECKED)})
        except NotTaken as error:
            if _NO_KEY in str(error):
                raise self._absent() from None
        made = self.wrap(_CHECKED, Passphrase(_CHECKED.encode()))
        trail = KeyTrail(kms_id="", type="", name=_CHECKED, wrapped=made.text)
        if self.unwrap(trail).reveal() != _CHECKED.encode():
            raise KeyLost(f"the key {self._key} of {self._vault.where} unwraps into something else; look at that Vault")
        return f"{said}, the key {self._key} at {self._mount} wraps and unwraps, in version {made.key_version}"

    def close(self) -> None:
        self._vault.close()

    def _known(self, operation: str, trail: KeyTrail) -> _Data:
        """What comes of a wrapped key. Raises KeyLost where its key, or that version of it, is gone or another one."""
        try:
            return self._ask(operation, {"ciphertext": trail.wrapped, "context": _context(trail.name)})
        except NotTaken as error:
            said = str(error).partition("; ")[0]
            raise KeyLost(
                f"{said}: its key {self._key} does not unwrap that of {trail.name}; restore the key or its version "
                f"there, or the record of the volume from a backup"
            ) from None

    def _ask(self, operation: str, document: dict[str, str], *, quotes: bool = True) -> _Data:
        try:
            answer = self._vault.ask("POST", f"{self._mount}/{operation}/{self._key}", document, quotes=quotes)
        except NoRoute:
            answer = None
        if answer is None:
            raise self._absent()
        return shaped(self._vault.where, answer, _Answer).data or _Data()

    def _absent(self) -> KeyLost:
        return KeyLost(
            f"{self._vault.where} has no transit engine at {self._mount} or no key {self._key}; correct "
            f"vaultTransitPath and vaultTransitKey, or restore the key"
        )

    def _wrapped(self, data: _Data) -> Wrapped:
        if (match := _CIPHERTEXT.fullmatch(data.ciphertext)) is None:
            raise FailedPrecondition(f"{self._vault.where} wrapped a key into something that is no transit ciphertext")
        return Wrapped(data.ciphertext, f"{self._mount}/{self._key}", match.group(1))

    def _refuse_unbound(self, name: str, text: str) -> None:
        try:
            self._ask("decrypt", {"ciphertext": text, "context": _context(f"{name}/another")})
        except NotTaken:
            return  # as it must be: the context is part of the key
        raise FailedPrecondition(
            f"the key {self._key} of {self._vault.where} is no derived one, so one volume's wrapped key would do for "
            f"another; make one with derived=true (vault write -f {self._mount}/keys/NAME derived=true)"
        )


def _context(name: str) -> str:
    return base64.b64encode(name.encode()).decode()
