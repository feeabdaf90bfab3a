"""A KMS that keeps keys, in memory."""

from csi_driver.model.errors import KeyLost
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail


class KeepingKms:
    """A KMS that keeps the keys, as Vault's key-value store does; `down` is what it answers instead."""

    keeps = True

    def __init__(self) -> None:
        self.kept: dict[str, Passphrase] = {}
        self.down: Exception | None = None

    def create(self, name: str) -> KeyTrail:
        self._answer()
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
