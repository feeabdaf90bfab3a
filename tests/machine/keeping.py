"""A KMS that keeps keys and one that wraps them, in memory."""

from csi_driver.keys.base import Announce, Wrapped, nobody
from csi_driver.model.errors import KeyLost
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail


class KeepingKms:
    """A KMS that keeps the keys, as Vault's key-value store does; `down` is what it answers instead."""

    keeps = True

    def __init__(self) -> None:
        self.kept: dict[str, Passphrase] = {}
        self.down: Exception | None = None

    def create(self, name: str, announce: Announce = nobody) -> KeyTrail:
        self._answer()
        announce()
        self.kept.setdefault(name, Passphrase.random())
        return KeyTrail(kms_id="", type="", name=name)

    def fetch(self, trail: KeyTrail) -> Passphrase:
        self._answer()
        if trail.name not in self.kept:
            raise KeyLost(f"no key {trail.name}")
        return self.kept[trail.name]

    def rewrap(self, trail: KeyTrail) -> KeyTrail:
        return trail

    def destroy(self, trail: KeyTrail) -> None:
        self._answer()
        self.kept.pop(trail.name, None)

    def check(self) -> str:
        return "here"

    def close(self) -> None:
        """Nothing is open."""

    def _answer(self) -> None:
        if self.down is not None:
            raise self.down


class WrappingKms:
    """Wraps each key by a version of its own; `wrapped` is what it can unwrap."""

    def __init__(self) -> None:
        self.wrapped: dict[str, Passphrase] = {}

    def wrap(self, name: str, key: Passphrase) -> Wrapped:
        version = str(len(self.wrapped) + 1)
        self.wrapped[f"{name} {version}"] = key
        return Wrapped(f"{name} {version}", "key", version)

    def unwrap(self, trail: KeyTrail) -> Passphrase:
        if trail.wrapped not in self.wrapped:
            raise KeyLost(f"no such wrapping of {trail.name}")
        return self.wrapped[trail.wrapped]

    def check(self) -> str:
        return "here"

    def close(self) -> None:
        """Nothing is open."""
