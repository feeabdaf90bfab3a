"""All key sources by the type of their entry: found, made, kept for a while, and each use of them told.

A source is kept for minutes, so that connections and logins serve more than one volume, and as long as its entry and
what came with the request are the same. It keeps no DEK, and no passphrase.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from csi_driver.host.log import log
from csi_driver.host.workers import Workers
from csi_driver.keys.audit import Audit
from csi_driver.keys.base import EntryReader, KeyRequest, KeySource, RequestNeeded
from csi_driver.keys.config import KmsConfig
from csi_driver.keys.fields import unknown_fields
from csi_driver.keys.generated import GeneratedKeys
from csi_driver.keys.kubernetes import Kubernetes
from csi_driver.keys.types import BUILDERS, NEVER_KEPT, UNNAMED, Surroundings
from csi_driver.model.errors import DriverError, FailedPrecondition, KeyLost
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail

T = TypeVar("T")

GENERATED: Final = "kubernetes-secret"
"""The type of keys that are made without a KMS; no entry has it."""

_MOST_KEPT: Final = 64
_KEPT_SECONDS: Final = 300.0


class CheckedEntry(msgspec.Struct, frozen=True):
    """What a look at an entry of the configuration found; `works` is None where it could not be tried."""

    kms_id: str
    works: bool | None
    found: str
    unknown_fields: tuple[str, ...] = ()


Observe = Callable[[str, str, str, float], None]
"""Takes the KMS's id, the operation, its outcome and its seconds."""


class KeySources:
    """Makes, fetches, rewraps and destroys DEKs; safe for many threads.

    `programs` is the folder of the programs that entries of type exec may name. Each use is told to `audit` and to each
    of `observers`.
    """

    def __init__(
        self, config: KmsConfig, kubernetes: Kubernetes, workers: Workers, programs: Path, audit: Audit
    ) -> None:
        self._config = config
        self._kubernetes = kubernetes
        self._workers = workers
        self._programs = programs
        self._audit = audit
        self._digest_key = os.urandom(32)
        self._kept: dict[bytes, tuple[float, KeySource]] = {}
        self._lock = threading.Lock()
        self._unknown_told: dict[str, list[str]] = {}
        self.observers: list[Observe] = []

    def create(
        self,
        kms_id: str | None,
        name: str,
        request: KeyRequest,
        purpose: str,
        announce: Callable[[KeyTrail], None] = lambda _: None,
    ) -> KeyTrail:
        """A new DEK under `name`; kms_id None is a secret made for it. Nothing is asked twice if this is repeated.

        Where the KMS is to keep it, `announce` is told right before what will have to be destroyed.
        """
        kind, source = self._source(kms_id, request)

        def created() -> KeyTrail:
            trail = KeyTrail(kms_id=kms_id or "", type=kind, name=name, tenant=request.tenant)
            return source.create(name, lambda: announce(trail))

        made = self._told("create", purpose, request, kms_id, name, created)
        return msgspec.structs.replace(made, kms_id=kms_id or "", type=kind, tenant=request.tenant)

    def fetch(self, trail: KeyTrail, request: KeyRequest, purpose: str) -> Passphrase:
        """The DEK of a volume."""
        source = self._source_of(trail, request)

        def fetched() -> Passphrase:
            key = source.fetch(trail)
            if not key.reveal():  # libcryptsetup would take it, and then anybody could open the volume
                raise KeyLost(
                    f"the KMS {trail.kms_id!r} gave an empty key for {trail.name}; check its entry, or restore the key"
                )
            return key

        return self._told("fetch", purpose, request, trail.kms_id, trail.name, fetched, trail)

    def foreign(self, kms_id: str, name: str, wrapped: str, tenant: str) -> KeyTrail:
        """The trail of a key that Ceph-CSI had made for its volume `name`; `wrapped` where its KMS does not keep it."""
        kind, _ = self._config.entry(kms_id)
        known = "" if wrapped and kind in UNNAMED else name
        return KeyTrail(kms_id=kms_id, type=kind, name=known, wrapped=wrapped, tenant=tenant, foreign=True)

    def rewrap(self, trail: KeyTrail, request: KeyRequest) -> KeyTrail:
        """The same DEK under the newest key of its KMS."""
        source = self._source_of(trail, request)
        return self._told("rewrap", "rewrap", request, trail.kms_id, trail.name, lambda: source.rewrap(trail), trail)

    def destroy(self, trail: KeyTrail, request: KeyRequest, purpose: str) -> None:
        """Forget a DEK of which nothing is left."""
        source = self._source_of(trail, request)
        self._told("destroy", purpose, request, trail.kms_id, trail.name, lambda: source.destroy(trail), trail)

    def needs_request(self, trail: KeyTrail, request: KeyRequest) -> bool:
        """Whether the KMS of that trail is asked with what a request brings and this one did not. It may be asked."""
        try:
            self._source_of(trail, request).check()
        except RequestNeeded:
            return True
        except DriverError:
            return False
        return False

    def using(self, request: KeyRequest, purpose: str) -> AbstractContextManager[None]:
        """Tell the use of a passphrase that came in a secret, or was given, and how it ended."""
        return self._audit.using(
            volume=request.volume_id, claim_namespace=request.tenant, kms="", key="secret", operation="use",
            purpose=purpose,
        )  # fmt: skip

    def ids(self) -> list[str]:
        """The ids of all entries of the configuration, sorted. Raises as `check`."""
        return self._config.ids()

    def check(self, kms_id: str) -> str:
        """Ask the KMS of an entry whether it works, changing nothing; what was found.

        Raises RequestNeeded where it is asked with what a request brings, FailedPrecondition, and what a source does.
        """
        kind, source = self._source(kms_id, KeyRequest(volume_id=""))
        return f"{kind}: {source.check()}"

    def checked(self) -> list[CheckedEntry]:
        """What a look at each entry of the configuration finds."""
        return [CheckedEntry(kms_id, *self._tried(kms_id), self._unknown_fields(kms_id)) for kms_id in self.ids()]

    def _tried(self, kms_id: str) -> tuple[bool | None, str]:
        try:
            return True, self.check(kms_id)
        except RequestNeeded:
            return None, "asked with what each claim brings, so not tried"
        except DriverError as error:
            return False, str(error)
        except Exception as error:  # noqa: BLE001 - what nobody foresaw hides no other; its text may quote a key
            return False, f"the check ended in {type(error).__name__}, which nobody foresaw"

    def _unknown_fields(self, kms_id: str) -> tuple[str, ...]:
        try:
            kind, entry = self._config.entry(kms_id)
        except DriverError:
            return ()
        return tuple(unknown_fields(kind, entry)) if kind in BUILDERS else ()

    def close(self) -> None:
        """Close what is open to any KMS; whoever asks again opens it again."""
        with self._lock:
            kept, self._kept = self._kept, {}
        for _, source in kept.values():
            source.close()
        self._kubernetes.close()

    def _source_of(self, trail: KeyTrail, request: KeyRequest) -> KeySource:
        kms_id = None if trail.type == GENERATED else trail.kms_id
        kind, source = self._source(kms_id, KeyRequest(request.volume_id, trail.tenant, request.secret))
        if kind != trail.type:
            raise FailedPrecondition(
                f"the key of volume {request.volume_id} is of the KMS {kms_id!r}, which was of type {trail.type} and "
                f"is of type {kind} now; give the new one another id in the KMS configuration"
            )
        return source

    def _source(self, kms_id: str | None, request: KeyRequest) -> tuple[str, KeySource]:
        if kms_id is None:
            return GENERATED, GeneratedKeys(self._kubernetes)
        kind, entry = self._config.entry(kms_id)
        if kind not in BUILDERS:
            raise FailedPrecondition(
                f"the KMS {kms_id!r} is of type {kind!r}, which this driver does not know; known are "
                f"{', '.join(sorted(BUILDERS))}"
            )
        self._tell_unknown(kms_id, unknown_fields(kind, entry))
        key = hashlib.blake2b(
            msgspec.json.encode([kms_id, dict(entry), request.tenant, dict(request.secret.entries)], order="sorted"),
            key=self._digest_key,
        ).digest()
        now = time.monotonic()
        with self._lock:
            made_at, source = self._kept.pop(key, (-_KEPT_SECONDS, None))
            if source is not None and now - made_at < _KEPT_SECONDS:
                self._kept[key] = made_at, source  # the last one is the one used last
                return kind, source
        reader = EntryReader(f"KMS {kms_id} ({kind})", entry)
        source = BUILDERS[kind](Surroundings(reader, entry, request, self._kubernetes, self._workers, self._programs))
        if kind in NEVER_KEPT:
            return kind, source
        with self._lock:
            for old in [each for each, (made_at, _) in self._kept.items() if now - made_at >= _KEPT_SECONDS]:
                del self._kept[old]
            self._kept[key] = now, source
            while len(self._kept) > _MOST_KEPT:
                self._kept.pop(next(iter(self._kept)))
        return kind, source

    def _tell_unknown(self, kms_id: str, fields: list[str]) -> None:
        if self._unknown_told.get(kms_id, []) != fields:
            self._unknown_told[kms_id] = fields
            if fields:
                log.warning("a KMS entry has fields that nobody reads", kms=kms_id, fields=", ".join(fields))

    def _told(
        self,
        operation: str,
        purpose: str,
        request: KeyRequest,
        kms_id: str | None,
        name: str,
        call: Callable[[], T],
        trail: KeyTrail | None = None,
    ) -> T:
        started, outcome = time.perf_counter(), "OK"
        try:
            result = call()
            trail = result if isinstance(result, KeyTrail) else trail
            return result
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            seconds = time.perf_counter() - started
            for observe in self.observers:
                observe(kms_id or "", operation, outcome, seconds)
            self._audit.record(
                volume=request.volume_id,
                claim_namespace=request.tenant,
                kms=kms_id or GENERATED,
                key=" ".join(filter(None, (name, *((trail.key_id, trail.key_version) if trail else ())))),
                operation=operation,
                purpose=purpose,
                outcome=outcome,
            )
