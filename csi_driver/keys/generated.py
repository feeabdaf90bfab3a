"""Keys without a KMS: a secret of Kubernetes for each volume (the StorageClass parameter `generateKey`).

The secret is made in the driver's own namespace, immutable, and held by a finalizer, so that nobody deletes it by
mistake while the volume is there.
"""

from typing import Final

from csi_driver.keys.base import Announce, nobody
from csi_driver.keys.kubernetes import Kubernetes
from csi_driver.keys.secret import CEPH_PASSPHRASE
from csi_driver.model.errors import KeyLost
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail

PREFIX: Final = "luks-csi-key-"


class GeneratedKeys:
    """A source whose KMS is the Kubernetes API; the trail's `key_id` is the namespace."""

    keeps = True

    def __init__(self, kubernetes: Kubernetes) -> None:
        self._kubernetes = kubernetes

    def create(self, name: str, announce: Announce = nobody) -> KeyTrail:
        """A secret that a cut call has left is used."""
        namespace = self._kubernetes.namespace
        value = Passphrase.random().reveal().decode()
        self._kubernetes.keep_secret(namespace, PREFIX + name, {CEPH_PASSPHRASE: value}, name, announce)
        return KeyTrail(kms_id="", type="", name=name, key_id=namespace)

    def fetch(self, trail: KeyTrail) -> Passphrase:
        namespace, name = trail.key_id, PREFIX + trail.name
        found = self._kubernetes.find_secret(namespace, name)
        if found is None or not found.get(CEPH_PASSPHRASE):
            raise KeyLost(
                f"the secret {namespace}/{name}, which held the volume's own key, is gone or has no entry "
                f"{CEPH_PASSPHRASE}; restore it from a backup, without it the volume cannot be opened"
            )
        return Passphrase(found[CEPH_PASSPHRASE].encode())

    def rewrap(self, trail: KeyTrail) -> KeyTrail:
        """Kubernetes keeps it."""
        return trail

    def destroy(self, trail: KeyTrail) -> None:
        self._kubernetes.drop_secret(trail.key_id or self._kubernetes.namespace, PREFIX + trail.name)

    def check(self) -> str:
        return self._kubernetes.check()

    def close(self) -> None:
        """The API is closed by who opened it."""
