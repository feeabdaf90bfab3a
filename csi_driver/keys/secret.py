"""Keys from a Kubernetes secret, in the entries that Longhorn and Ceph-CSI gave their names."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from csi_driver.model.errors import FailedPrecondition, Unauthenticated
from csi_driver.model.secret import Passphrase

LONGHORN_VALUE = "CRYPTO_KEY_VALUE"
PREVIOUS = "CRYPTO_KEY_VALUE_PREVIOUS"
CEPH_PASSPHRASE = "encryptionPassphrase"  # the name of a secret's entry, not a secret
PROVIDER = "CRYPTO_KEY_PROVIDER"
CIPHER = "CRYPTO_KEY_CIPHER"
HASH = "CRYPTO_KEY_HASH"
KEY_SIZE = "CRYPTO_KEY_SIZE"
PBKDF = "CRYPTO_PBKDF"

_LARGEST_PASSPHRASE_BYTES = 64 * 1024

_R = TypeVar("_R")


@dataclass(frozen=True)
class SecretKey:
    """What a secret holds: the passphrase and, in a Longhorn secret, wishes for luksFormat as they stand there.

    `previous` is the passphrase that it had before: what it still opens gets the new one. `entries` are all of them,
    for a KMS that is told to look for its own among them; `where` names the secret in messages.
    """

    passphrase: Passphrase | None
    cipher: str | None = None
    hash: str | None = None
    key_size: str | None = None
    pbkdf: str | None = None
    previous: Passphrase | None = None
    entries: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    where: str = field(default="the secret", compare=False)


def read_secret(entries: Mapping[str, str], name: str = "") -> SecretKey:
    """Read the entries of a secret; entries of other names (a Ceph user, say) are not ours and are left alone. `name`
    is its NAMESPACE/NAME where that is known, for messages: a CSI call does not say it.

    Raises FailedPrecondition for an unknown provider, an empty value, or two passphrases that disagree: a secret can be
    put right while the claim waits.
    """
    where = _named(name)
    provider = entries.get(PROVIDER)
    if provider not in (None, "", "secret"):
        raise FailedPrecondition(
            f"{where}'s entry {PROVIDER} names a key provider that does not exist; leave it out or set it to secret"
        )
    return SecretKey(
        passphrase=_passphrase(entries, name),
        cipher=entries.get(CIPHER) or None,
        hash=entries.get(HASH) or None,
        key_size=entries.get(KEY_SIZE) or None,
        pbkdf=entries.get(PBKDF) or None,
        previous=_value(PREVIOUS, entries[PREVIOUS], name) if entries.get(PREVIOUS) else None,
        entries=entries,
        where=where,
    )


def with_either(key: SecretKey, passphrase: Passphrase, use: Callable[[Passphrase], _R]) -> _R:
    """What `use` makes of `passphrase`, the secret's own; where that opens nothing, of the one that it had before.

    Raises Unauthenticated where neither opens anything.
    """
    try:
        return use(passphrase)
    except Unauthenticated:
        if key.previous is not None:
            with contextlib.suppress(Unauthenticated):
                return use(key.previous)
        raise


def require_passphrase(key: SecretKey, volume_id: str) -> Passphrase:
    """The passphrase of a secret that must hold one.

    Raises FailedPrecondition naming the entries that were looked for and the StorageClass parameters that bring them.
    """
    if key.passphrase is None:
        raise FailedPrecondition(
            f"volume {volume_id} is encrypted but the secret holds neither {LONGHORN_VALUE} nor {CEPH_PASSPHRASE}; add "
            f"one of them to the secret that csi.storage.k8s.io/node-stage-secret-name and -namespace of its "
            f"StorageClass name"
        )
    return key.passphrase


def _passphrase(entries: Mapping[str, str], secret: str) -> Passphrase | None:
    found: dict[str, str] = {name: entries[name] for name in (LONGHORN_VALUE, CEPH_PASSPHRASE) if name in entries}
    passphrases = [_value(name, value, secret) for name, value in found.items()]
    if not passphrases:
        return None
    if len(set(found.values())) > 1:
        raise FailedPrecondition(
            f"{_named(secret)}'s entries {LONGHORN_VALUE} and {CEPH_PASSPHRASE} disagree; keep the one that opens the "
            f"volume"
        )
    return passphrases[0]


def _named(secret: str) -> str:
    return f"the secret {secret}" if secret else "the secret"


def _value(name: str, text: str, secret: str) -> Passphrase:
    value = text.encode()
    if not value:
        raise FailedPrecondition(f"{_named(secret)}'s entry {name} is empty; put the passphrase there")
    if len(value) > _LARGEST_PASSPHRASE_BYTES:
        raise FailedPrecondition(f"{_named(secret)}'s entry {name} is longer than {_LARGEST_PASSPHRASE_BYTES} bytes")
    return Passphrase(value, secret)
