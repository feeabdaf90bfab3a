"""KMS types `vault`, `vaulttokens` and `vaulttenantsa`: DEKs kept in Vault's key-value store, versions 1 and 2.

As Ceph-CSI keeps them: `{"data": {"passphrase": …}}` under the volume's name, so that each finds the other's.
"""

from typing import Any, Final

import msgspec

from csi_driver.keys.base import Announce, EntryReader, nobody, require_name
from csi_driver.keys.http import NoRoute, shaped
from csi_driver.keys.vault import Vault, joined
from csi_driver.model.errors import FailedPrecondition, KeyLost, PermissionDenied
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail

_VERSIONS: Final = {"kv": 1, "generic": 1, "kv-v2": 2}
_CHECKED: Final = "luks-csi-check"


class _Mount(msgspec.Struct):
    """What Vault says of a mount; `options` is null for a store that was never told a version."""

    type: str = ""
    path: str = ""
    options: dict[str, str] | None = None


class _MountAnswer(msgspec.Struct):
    data: _Mount


class _First(msgspec.Struct):
    data: dict[str, object] | None = None


class _Metadata(msgspec.Struct):
    version: int | str = ""


class _Kept(msgspec.Struct):
    data: dict[str, object] | None = None
    metadata: _Metadata | None = None


class _Second(msgspec.Struct):
    data: _Kept | None = None


class VaultKv:
    """A source that keeps DEKs at `mount`, below `folder` there; `mount_field` of the entry names it."""

    keeps = True

    def __init__(
        self, vault: Vault, reader: EntryReader, mount: str, folder: str, mount_field: str = "vaultBackendPath"
    ) -> None:
        self._vault = vault
        self._mount = joined(mount)
        self._mount_field = mount_field
        self._folder = folder
        self._destroy = reader.truth("vaultDestroyKeys", default=True)
        self._backend = reader.text("vaultBackend", "")
        if self._backend and self._backend not in _VERSIONS:
            raise FailedPrecondition(
                f"the field vaultBackend of {reader.where} must be one of {', '.join(_VERSIONS)}, or left out"
            )
        self._said = _VERSIONS.get(self._backend)
        self._shown: tuple[int | None] | None = None

    def create(self, name: str, announce: Announce = nobody) -> KeyTrail:
        """What a cut call has left is used: nothing was encrypted with it, or with nothing else."""
        self._refuse_other_version()
        path = self._path(name)
        if (found := self._read(name)) is None:
            made = {"data": {"passphrase": Passphrase.random().reveal().decode()}}
            document = {"data": made} if self._is_second else made
            announce()
            if self._ask("POST", path, document, quotes=False) is None:
                raise FailedPrecondition(
                    f"{self._vault.where} takes no key at {path} (HTTP 404); correct vaultBackend, which is version "
                    f"{2 if self._is_second else 1} here, or {self._mount_field}"
                )
            found = self._read(name)
        if found is None:
            raise KeyLost(f"{self._vault.where} took the key of {name} and does not give it back; check its policy")
        _, version = found
        return KeyTrail(kms_id="", type="", name=name, key_id=path, key_version=version)

    def fetch(self, trail: KeyTrail) -> Passphrase:
        """Of the version that was recorded: a newer one is somebody else's doing and opens nothing."""
        require_name(self._vault.where, trail)
        found = self._read(trail.name, trail.key_version)
        if found is None:
            self._refuse_other_version()
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
        """Where it is: a store of version 1 of which the entry says version 2 has it under "data", as in a folder.

        Raises FailedPrecondition where it was kept elsewhere than the entry says today: it would be taken for gone.
        """
        shown = self._version_there()
        if self._said == 1:
            self._refuse_other_version()
        place = joined(self._folder, trail.name)
        if trail.key_id not in ("", f"{self._mount}/data/{place}", f"{self._mount}/{place}"):  # a mount may be upgraded
            raise FailedPrecondition(
                f"{self._vault.where} kept a key at {trail.key_id}, and its entry says {self._path(trail.name)} by "
                f"now; it was not destroyed: put the entry back as it was, or delete the key by hand"
            )
        for_good = self._destroy and shown != 1
        self._ask("DELETE", self._path(trail.name, "metadata" if for_good else "data"))

    def check(self) -> str:
        """Read a key that is not there: that takes a mount of that version, and the right to read."""
        said = self._vault.health()
        self._refuse_other_version()
        self._read(_CHECKED)
        return f"{said} and lets us read, key-value version {2 if self._is_second else 1} at {self._mount}"

    def close(self) -> None:
        self._vault.close()

    def _read(self, name: str, version: str = "") -> tuple[Passphrase, str] | None:
        """The DEK and its version; None where there is none."""
        wanted = f"?version={version}" if version and self._is_second else ""
        answer = self._ask("GET", self._path(name) + wanted)
        if answer is None:
            return None
        found = ""
        if self._is_second:
            read = shaped(self._vault.where, answer, _Second).data or _Kept()
            data, found = read.data, str(read.metadata.version) if read.metadata else ""
        else:
            data = shaped(self._vault.where, answer, _First).data
        kept = (data or {}).get("data")
        passphrase = kept.get("passphrase") if isinstance(kept, dict) else None
        if not isinstance(passphrase, str) or not passphrase:
            raise KeyLost(
                f"what {self._vault.where} keeps at {self._path(name)} is no passphrase of a volume; restore what was "
                f"there"
            )
        return Passphrase(passphrase.encode()), found

    def _ask(self, method: str, path: str, document: object = None, *, quotes: bool = True) -> dict[str, Any] | None:
        try:
            return self._vault.ask(method, path, document, quotes=quotes)
        except NoRoute:
            raise FailedPrecondition(
                f"{self._vault.where} has nothing mounted at {self._mount}; correct {self._mount_field}"
            ) from None

    def _path(self, name: str, second: str = "data") -> str:
        place = joined(self._folder, name)
        return f"{self._mount}/{second}/{place}" if self._is_second else f"{self._mount}/{place}"

    @property
    def _is_second(self) -> bool:
        """Whether it is version 2, as the entry says, else as Vault does."""
        return (self._said or self._version_there()) == 2

    def _refuse_other_version(self) -> None:
        shown = self._version_there()
        if self._said is not None and shown not in (None, self._said):
            raise FailedPrecondition(
                f"the field vaultBackend of {self._vault.where} says {self._backend}, and the key-value store at "
                f"{self._mount} is of version {shown}; correct the field, or leave it out"
            )

    def _version_there(self) -> int | None:
        """The store's version, asked of Vault once; None where it does not say and the entry does."""
        if self._shown is None:
            self._shown = (self._asked_version(),)
        return self._shown[0]

    def _asked_version(self) -> int | None:
        self._vault.log_in()  # a login that is refused is none of a mount, and is not tried twice
        try:
            answer = self._vault.ask("GET", f"sys/internal/ui/mounts/{self._mount}")
        except PermissionDenied:
            if self._said is not None:
                return None
            raise PermissionDenied(
                f"{self._vault.where} shows us no mount {self._mount}: there is none, or our policy allows nothing "
                f"there; correct {self._mount_field} or the policy"
            ) from None
        if answer is None:
            return self._said or 1
        mount = shaped(self._vault.where, answer, _MountAnswer).data
        if mount.type not in ("kv", "generic"):
            raise FailedPrecondition(
                f"what {self._vault.where} has at {self._mount} is of type {mount.type} and no key-value store; "
                f"correct {self._mount_field}"
            )
        second = (mount.options or {}).get("version") == "2"
        if second and joined(mount.path) != self._mount:
            raise FailedPrecondition(
                f"{self._mount_field} of {self._vault.where} is {self._mount}, and the key-value store is "
                f"{mount.path}; give that, and the folder there as vaultPassphrasePath"
            )
        return 2 if second else 1
