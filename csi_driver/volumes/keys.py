"""Which passphrase opens a volume: that of the secret that came with the call, or its own from a KMS."""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

import msgspec

from csi_driver.backends.base import Backend
from csi_driver.host.log import log
from csi_driver.keys.base import KeyRequest
from csi_driver.keys.ledger import KeyEntry, KeyLedger
from csi_driver.keys.secret import PREVIOUS, SecretKey, require_passphrase
from csi_driver.keys.sources import GENERATED, KeySources
from csi_driver.model.errors import Aborted, DeadlineExceeded, DriverError, NotFound, Unauthenticated
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail, VolumeParameters, VolumeRecord


class KeyInHand(msgspec.Struct, frozen=True):
    """What opens a volume. `wishes` are a secret's for luksFormat; `trail` is set for a key of a KMS, a random one."""

    passphrase: Passphrase
    wishes: SecretKey
    trail: KeyTrail | None = None


SHARED: Final = (
    "volume {0} opens with the key of what it was adopted from, and is lost when that is deleted or gets another key; "
    "give it one of its own (luks-csi keys rotate {0})"
)
"""What is wrong with a volume of which `shares_key` is true."""


class VolumeKeys:
    """Finds the keys of volumes; callers hold the volume's lock where one is made or destroyed.

    Each key has a name that nothing else ever had. What a KMS is to keep is in the ledger before it is there, until a
    record names it, and again from before the record goes until the KMS has forgotten it.
    """

    def __init__(self, sources: KeySources, ledger: KeyLedger) -> None:
        self._sources = sources
        self._ledger = ledger

    @contextmanager
    def making(
        self, volume_id: str, parameters: VolumeParameters, secret: SecretKey, named: Callable[[], bool]
    ) -> Iterator[KeyTrail | None]:
        """The key of a volume that is about to be made, for as long as that takes; None where a secret opens it.

        A key that the same call has left when it was cut is used again, and no other is. After an error the key is
        forgotten, unless the work goes on with the next call or the volume's record is there, which `named` tells.
        Raises what a `KeySource` and the ledger do.
        """
        if parameters.kms_id is None and not parameters.generate_key:
            yield None
            return
        request = KeyRequest(volume_id, _tenant(parameters), secret)
        with self._making(parameters.kms_id, request, "create volume", frozenset(), named) as trail:
            yield trail

    @contextmanager
    def successor(self, record: VolumeRecord, trail: KeyTrail, secret: SecretKey) -> Iterator[KeyTrail]:
        """A new key of the same source for a volume whose key that is, for as long as it takes to record it."""
        kms_id = None if trail.type == GENERATED else trail.kms_id
        request = KeyRequest(record.id, trail.tenant, secret)
        with self._making(kms_id, request, "rotate", _names(record), lambda: True) as made:
            yield made

    @contextmanager
    def _making(
        self, kms_id: str | None, request: KeyRequest, purpose: str, known: Collection[str], named: Callable[[], bool]
    ) -> Iterator[KeyTrail]:
        volume_id = request.volume_id
        begun = [
            entry.key.name
            for entry in self._ledger.entries(volume_id)
            if not entry.leaving
            and entry.key.name not in known
            and (entry.key.kms_id, entry.key.tenant) == (kms_id or "", request.tenant)
        ]
        name = begun[0] if begun else f"{volume_id}.{os.urandom(8).hex()}"

        def announce(trail: KeyTrail) -> None:
            self._ledger.note(KeyEntry(volume=volume_id, key=trail, leaving=False))

        trail = self._sources.create(kms_id, name, request, purpose, announce)
        try:
            yield trail
        except (Aborted, DeadlineExceeded):
            raise  # the next call goes on, with this key
        except (DriverError, OSError):
            if not named():
                self._forget(KeyEntry(volume=volume_id, key=trail, leaving=True), purpose)
            raise
        self._ledger.forget(name)

    def of(self, record: VolumeRecord, secret: SecretKey, purpose: str) -> KeyInHand:
        """What opens the volume now; `using` tells the use of a secret's passphrase.

        Raises FailedPrecondition without one, and what a `KeySource` does.
        """
        if record.key is not None:
            return KeyInHand(self.fetch(record, record.key, secret, purpose), secret, record.key)
        return KeyInHand(require_passphrase(secret, record.id), secret)

    def using(self, record: VolumeRecord, purpose: str, key: KeyTrail | None = None) -> AbstractContextManager[None]:
        """Tell what comes of trying a secret's passphrase; the volume's own `key` was told as it was fetched."""
        if key or record.key:
            return nullcontext()
        return self._sources.using(KeyRequest(record.id, record.tenant), purpose)

    def using_image(self, volume_id: str, parameters: VolumeParameters) -> AbstractContextManager[None]:
        """Tell what comes of trying the passphrase of an image from which a volume is about to be made."""
        return self._sources.using(KeyRequest(volume_id, _tenant(parameters)), "create volume")

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
        """Forget a key that opens nothing any more; where it cannot be forgotten now the ledger keeps its name.

        A retained one stays, and so does a foreign one: it opens what the volume was adopted from.
        """
        if _stays(record, trail):
            self._ledger.forget(trail.name)
            return
        self._forget(KeyEntry(volume=record.id, key=trail, leaving=True), purpose)

    def leave(self, volume_id: str, record: VolumeRecord | None) -> list[KeyEntry]:
        """Note what is to be destroyed once a volume is gone, and return it: what its record and the ledger name.

        What cannot be noted is logged, as a full disk must keep nobody from deleting.
        """
        named = {trail.name: trail for trail in _trails(record)} if record else {}
        gone = [trail for trail in named.values() if record and not _stays(record, trail)]
        leaving = [KeyEntry(volume=volume_id, key=trail, leaving=True) for trail in gone]
        try:
            for entry in self._ledger.entries(volume_id):
                if entry.key.name not in named:
                    leaving.append(msgspec.structs.replace(entry, leaving=True))
                elif entry not in leaving:
                    self._ledger.forget(entry.key.name)
            for entry in leaving:
                if not entry.key.wrapped:
                    self._ledger.note(entry)
        except (DriverError, OSError) as error:
            log.warning("the keys of a volume were not noted", volume_id=volume_id, error=str(error))
        return leaving

    def destroy_left(self, entry: KeyEntry) -> bool:
        """Destroy what `leave` gave, or `left`; whether the KMS has forgotten it, else that is logged."""
        return self._forget(entry, "delete volume", noted=True)

    def forget_left(self, entry: KeyEntry) -> bool:
        """Forget the name of what `left` gave, and ask no KMS; the log tells it. Whether it is forgotten."""
        self._ledger.forget(entry.key.name)
        if entry in self._ledger.entries(entry.volume):
            return False
        log.warning("a key is looked after no more", volume_id=entry.volume, kms=entry.key.kms_id, key=entry.key.name)
        return True

    def hand_over(self, record: VolumeRecord) -> None:
        """Forget what is noted here of the keys of a volume that another driver has: they open it there."""
        for name in _names(record):
            self._ledger.forget(name)

    def unnamed(self, backend: Backend) -> "UnnamedKeys":
        """As `unnamed_keys`."""
        return unnamed_keys(self._ledger, backend)

    def _forget(self, entry: KeyEntry, purpose: str, *, noted: bool = False) -> bool:
        """Whether the KMS has forgotten it."""
        trail = entry.key
        if not (noted or trail.wrapped):
            try:
                self._ledger.note(entry)
            except DriverError as error:
                log.warning("the keys of a volume were not noted", volume_id=entry.volume, error=str(error))
        try:
            self._sources.destroy(trail, KeyRequest(entry.volume, trail.tenant), purpose)
            self._ledger.forget(trail.name)
        except (DriverError, OSError) as error:
            log.warning("a key was left in its KMS", volume_id=entry.volume, key=trail.name, error=str(error))
            return False
        except Exception as error:  # noqa: BLE001 - what nobody foresaw keeps nobody from deleting; its text may quote a key
            log.warning("a key was left in its KMS", volume_id=entry.volume, key=trail.name, error=type(error).__name__)
            return False
        return True


@contextmanager
def previous_tried() -> Iterator[None]:
    """Tell of what opens nothing that it was the secret's previous passphrase, after the one that it has."""
    try:
        yield
    except Unauthenticated as error:
        raise Unauthenticated(f"{error}; its {PREVIOUS} was tried too and opens none either") from None


class UnnamedKeys(msgspec.Struct, frozen=True):
    """Keys that no record names which can be read: a KMS keeps those that are `left` for nothing; of those that are
    `untold` nobody can tell that, each with why.
    """

    left: list[KeyEntry]
    untold: list[tuple[KeyEntry, DriverError]]


def unnamed_keys(ledger: KeyLedger, backend: Backend) -> UnnamedKeys:
    """The ledger's keys, but for those that the record of a volume names.

    One of a volume that is being made at this moment is left. Raises what `Backend.get` does, as a record that cannot
    be read might name any. A node of storage that others share lists the volumes that are attached there: of another
    one the record is asked for, and where that cannot be read, or went with the pool that it was in, its keys are
    untold.
    """
    listed, found = frozenset(backend.ids()), UnnamedKeys([], [])
    named = {name for volume_id in listed for name in _names(backend.get(volume_id))}
    for entry in ledger.entries():
        if entry.key.name in named:
            continue
        try:
            if entry.volume in listed or entry.key.name not in _names(backend.get(entry.volume)):
                found.left.append(entry)
        except DriverError as error:
            if type(error) is NotFound:  # its subclasses miss something else than the volume, a pool say
                found.left.append(entry)
            else:
                found.untold.append((entry, error))
    return found


def shares_key(record: VolumeRecord) -> bool:
    """Whether the volume is lost with what it was adopted from: a KMS keeps one key for both, and that owns it."""
    return record.key is not None and record.key.foreign and not record.key.wrapped


def _tenant(parameters: VolumeParameters) -> str:
    """The namespace of the claim of a volume of that class."""
    return (parameters.claim or "").partition("/")[0]


def _trails(record: VolumeRecord) -> list[KeyTrail]:
    """All keys that a record names."""
    others = record.rekey.other if record.rekey else None, record.conversion.key if record.conversion else None
    return [trail for trail in (record.key, *others) if trail is not None]


def _names(record: VolumeRecord) -> frozenset[str]:
    return frozenset(trail.name for trail in _trails(record))


def _stays(record: VolumeRecord, trail: KeyTrail) -> bool:
    """Whether a key outlives its use, which is told."""
    if not (record.parameters.retain_key or trail.foreign):
        return False
    log.info("key kept", volume_id=record.id, kms=trail.kms_id or trail.type, key=trail.name)
    return True


def _request(record: VolumeRecord, secret: SecretKey) -> KeyRequest:
    return KeyRequest(record.id, record.tenant, secret)
