"""Which passphrase opens a volume: that of the secret that came with the call, or its own from a KMS."""

import hashlib
import re
from dataclasses import dataclass

from csi_driver.host.log import log
from csi_driver.keys.base import KeyRequest
from csi_driver.keys.secret import SecretKey, require_passphrase
from csi_driver.keys.sources import GENERATED, KeySources
from csi_driver.model.errors import DriverError
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail, VolumeParameters, VolumeRecord

_GENERATION = re.compile(r"\A(.*)\.([0-9]{1,6})\Z")


@dataclass(frozen=True)
class KeyInHand:
    """What opens a volume. `wishes` are a secret's for luksFormat; `trail` is set for a key of a KMS, a random one."""

    passphrase: Passphrase
    wishes: SecretKey
    trail: KeyTrail | None = None


class VolumeKeys:
    """Finds the keys of volumes; callers hold the volume's lock where one is made or destroyed."""

    def __init__(self, sources: KeySources, node_id: str) -> None:
        self._sources = sources
        self._node = _short(node_id)

    def make(self, volume_id: str, parameters: VolumeParameters, secret: SecretKey) -> KeyTrail | None:
        """The key of a volume that is about to be made; None where a secret opens it.

        A key that a cut call has left under the volume's name on this node is used again. Raises what a `KeySource`
        does.
        """
        if parameters.kms_id is None and not parameters.generate_key:
            return None
        # The node is part of the name: a volume of the same name that another node made, or was about to, has a key of
        # its own, and the deletion of one cannot take the other's.
        name = f"{volume_id}.{self._node}.1"
        tenant = (parameters.claim or "").partition("/")[0]
        return self._sources.create(parameters.kms_id, name, KeyRequest(volume_id, tenant, secret), "create volume")

    def successor(self, record: VolumeRecord, trail: KeyTrail, secret: SecretKey) -> KeyTrail:
        """A new key of the same source for a volume whose key that is."""
        match = _GENERATION.match(trail.name)
        # The name of a foreign key has successors that are another volume's.
        base, number = (
            (match.group(1), int(match.group(2)))
            if match and not trail.foreign
            else (f"{record.id}.{_short(f'{record.created} {trail.name}')}", 0)
        )
        kms_id = None if trail.type == GENERATED else trail.kms_id
        request = KeyRequest(record.id, trail.tenant, secret)
        return self._sources.create(kms_id, f"{base}.{number + 1}", request, "rotate")

    def of(self, record: VolumeRecord, secret: SecretKey, purpose: str) -> KeyInHand:
        """What opens the volume now. Raises FailedPrecondition without a passphrase, and what a `KeySource` does."""
        if record.key is not None:
            return KeyInHand(self.fetch(record, record.key, secret, purpose), secret, record.key)
        passphrase = require_passphrase(secret, record.id)
        self._sources.tell(KeyRequest(record.id, record.tenant), purpose)
        return KeyInHand(passphrase, secret)

    def fetch(self, record: VolumeRecord, trail: KeyTrail, secret: SecretKey, purpose: str) -> Passphrase:
        """The key of that trail."""
        return self._sources.fetch(trail, _request(record, secret), purpose)

    def rewrap(self, record: VolumeRecord, trail: KeyTrail, secret: SecretKey) -> KeyTrail:
        """The trail of the same key, under the newest key of its KMS."""
        return self._sources.rewrap(trail, _request(record, secret))

    def needs_request(self, record: VolumeRecord, trail: KeyTrail) -> bool:
        """Whether that key is rotated only by a request that brings something with it: a secret, a namespace."""
        return self._sources.needs_request(trail, _request(record, SecretKey(None)))

    def destroy(self, record: VolumeRecord, trail: KeyTrail, purpose: str) -> None:
        """Forget a key that opens nothing any more; where it cannot be forgotten now it stays, which is logged.

        A foreign one stays: it opens what the volume was adopted from.
        """
        if record.parameters.retain_key or trail.foreign:
            log.info("key kept", volume_id=record.id, kms=trail.kms_id or trail.type, key=trail.name)
            return
        try:
            self._sources.destroy(trail, _request(record, SecretKey(None)), purpose)
        except DriverError as error:
            log.warning("a key was left in its KMS", volume_id=record.id, key=trail.name, error=str(error))


def _short(text: str) -> str:
    """A part of a key's name that stands for that text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _request(record: VolumeRecord, secret: SecretKey) -> KeyRequest:
    return KeyRequest(record.id, record.tenant, secret)
