"""KMS type `vaulttransit`: DEKs wrapped by a key of Vault's transit engine that never leaves it.

The key must be a derived one: only then does its context, the volume's name, bind what was wrapped to the volume
(measured on Vault 1.13; on another key it is ignored).
"""

import base64
import re
from typing import Any, Final

from csi_driver.keys.base import EntryReader, Wrapped
from csi_driver.keys.http import NotTaken
from csi_driver.keys.vault import Vault, joined
from csi_driver.model.errors import FailedPrecondition, KeyLost
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail

_CIPHERTEXT: Final = re.compile(r"vault:v([0-9]{1,9}):[A-Za-z0-9+/=]+")


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
            return Passphrase(base64.b64decode(str(found.get("plaintext", "")), validate=True))
        except ValueError:
            raise FailedPrecondition(f"{self._vault.where} gave a key that is no base64; check its address") from None

    def rewrap_there(self, trail: KeyTrail) -> Wrapped:
        return self._wrapped(self._known("rewrap", trail))

    def check(self) -> str:
        return f"{self._vault.health()}, key {self._key} at {self._mount}"

    def close(self) -> None:
        self._vault.close()

    def _known(self, operation: str, trail: KeyTrail) -> dict[str, Any]:
        """What comes of a wrapped key. Raises KeyLost where its key, or that version of it, is gone or another one."""
        try:
            return self._ask(operation, {"ciphertext": trail.wrapped, "context": _context(trail.name)})
        except NotTaken as error:
            said = str(error).partition("; ")[0]
            raise KeyLost(
                f"{said}: its key {self._key} does not unwrap that of {trail.name}; restore the key or its version "
                f"there, or the record of the volume from a backup"
            ) from None

    def _ask(self, operation: str, document: dict[str, str], *, quotes: bool = True) -> dict[str, Any]:
        answer = self._vault.ask("POST", f"{self._mount}/{operation}/{self._key}", document, quotes=quotes)
        if answer is None:
            raise KeyLost(
                f"{self._vault.where} has no transit engine at {self._mount} or no key {self._key}; correct "
                f"vaultTransitPath and vaultTransitKey, or restore the key"
            )
        data: dict[str, Any] = answer.get("data") or {}
        return data

    def _wrapped(self, data: dict[str, Any]) -> Wrapped:
        text = str(data.get("ciphertext", ""))
        if (match := _CIPHERTEXT.fullmatch(text)) is None:
            raise FailedPrecondition(f"{self._vault.where} wrapped a key into something that is no transit ciphertext")
        return Wrapped(text, f"{self._mount}/{self._key}", match.group(1))

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
