"""KMS types `vault`, `vaulttokens` and `vaulttenantsa`: DEKs kept in Vault's key-value store, versions 1 and 2.

As Ceph-CSI keeps them: `{"data": {"passphrase": …}}` under the volume's name, so that each finds the other's.
"""

from typing import Any, Final

from csi_driver.keys.base import EntryReader
from csi_driver.keys.vault import Vault, joined
from csi_driver.model.errors import FailedPrecondition, KeyLost
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail

_VERSIONS: Final = {"kv": 1, "generic": 1, "kv-v2": 2}


class VaultKv:
    """A source that keeps DEKs at `mount`, below `folder` there."""

    keeps = True

    def __init__(self, vault: Vault, reader: EntryReader, mount: str, folder: str) -> None:
        self._vault = vault
        self._mount = joined(mount)
        self._folder = folder
        self._destroy = reader.truth("vaultDestroyKeys", default=True)
        backend = reader.text("vaultBackend", "")
        if backend and backend not in _VERSIONS:
            raise FailedPrecondition(
                f"the field vaultBackend of {reader.where} must be one of {', '.join(_VERSIONS)}, or left out"
            )
        self._version = _VERSIONS.get(backend)

    def create(self, name: str) -> KeyTrail:
        """What a cut call has left is used: nothing was encrypted with it, or with nothing else."""
        if (found := self._read(name)) is None:
            made = {"data": {"passphrase": Passphrase.random().reveal().decode()}}
            document = {"data": made} if self._is_second else made
            self._vault.ask("POST", self._path(name), document, quotes=False)
            found = self._read(name)
        if found is None:
            raise KeyLost(f"{self._vault.where} took the key of {name} and does not give it back; check its policy")
        _, version = found
        return KeyTrail(kms_id="", type="", name=name, key_id=self._path(name), key_version=version)

    def fetch(self, trail: KeyTrail) -> Passphrase:
        """Of the version that was recorded: a newer one is somebody else's doing and opens nothing."""
        found = self._read(trail.name, trail.key_version)
        if found is None:
            version = f" in version {trail.key_version}" if trail.key_version else ""
            raise KeyLost(
                f"{self._vault.where} has no key at {self._path(trail.name)}{version}; restore it there (vault kv "
                f"undelete, or from a backup), without it the volume cannot be opened"
            )
        return found[0]

    def rewrap(self, trail: KeyTrail) -> KeyTrail:
        """Vault keeps it, under keys of its own."""
        return trail

    def destroy(self, trail: KeyTrail) -> None:
        self._vault.ask("DELETE", self._path(trail.name, "metadata" if self._destroy else "data"))

    def check(self) -> str:
        said = self._vault.health()
        return f"{said}, key-value version {2 if self._is_second else 1} at {self._mount}"

    def close(self) -> None:
        self._vault.close()

    def _read(self, name: str, version: str = "") -> tuple[Passphrase, str] | None:
        """The DEK and its version; None where there is none."""
        wanted = f"?version={version}" if version and self._is_second else ""
        answer = self._vault.ask("GET", self._path(name) + wanted)
        if answer is None:
            return None
        data = answer.get("data") or {}
        kept: Any = data.get("data")
        if self._is_second:
            kept = kept.get("data") if isinstance(kept, dict) else None
        passphrase = kept.get("passphrase") if isinstance(kept, dict) else None
        if not isinstance(passphrase, str) or not passphrase:
            raise KeyLost(
                f"what {self._vault.where} keeps at {self._path(name)} is no passphrase of a volume; restore what was "
                f"there"
            )
        found = str(data.get("metadata", {}).get("version", "")) if self._is_second else ""
        return Passphrase(passphrase.encode()), found

    def _path(self, name: str, second: str = "data") -> str:
        place = joined(self._folder, name)
        return f"{self._mount}/{second}/{place}" if self._is_second else f"{self._mount}/{place}"

    @property
    def _is_second(self) -> bool:
        """Whether it is version 2, asked of the server once where the entry does not say."""
        if self._version is None:
            answer = self._vault.ask("GET", f"sys/internal/ui/mounts/{self._mount}")
            options = ((answer or {}).get("data") or {}).get("options") or {}
            self._version = 2 if str(options.get("version")) == "2" else 1
        return self._version == 2
