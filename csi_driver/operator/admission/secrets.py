"""Secrets with passphrases: what such a one has to hold, and who must not lose it."""

import base64
import binascii
import contextlib
from collections.abc import Iterable, Mapping
from typing import Final

from csi_driver.keys.secret import (
    CEPH_PASSPHRASE,
    CIPHER,
    HASH,
    KEY_SIZE,
    LONGHORN_VALUE,
    PBKDF,
    PREVIOUS,
    PROVIDER,
    SecretKey,
    read_secret,
)
from csi_driver.kube.kinds import IMAGE, SECRET, STORAGE_CLASS, VOLUME, Json
from csi_driver.luks.choice import luks_format
from csi_driver.model.errors import DriverError, FailedPrecondition, InvalidArgument
from csi_driver.model.volume import VolumeParameters
from csi_driver.operator.admission.lookups import Cluster, is_ending
from csi_driver.operator.admission.review import Request, Verdict
from csi_driver.operator.users import Place, named, users_of_secret

ALLOW_LOSS: Final = "luks.csi.internal/allow-key-loss"
"""Annotation of a secret: "true" lets it be deleted and changed though something needs it."""
_ENTRIES: Final = (LONGHORN_VALUE, CEPH_PASSPHRASE, PREVIOUS, PROVIDER, CIPHER, HASH, KEY_SIZE, PBKDF)


def check_content(secret: Json, place: Place) -> None:
    """Raise InvalidArgument unless a volume or an image can be encrypted with what the secret holds."""
    what = f"the secret {'/'.join(place)} cannot be used"
    try:
        key = _read(secret)
        if key.passphrase is None:
            raise FailedPrecondition(
                f"it holds neither {LONGHORN_VALUE} nor {CEPH_PASSPHRASE}; put the passphrase into one of them"
            )
        luks_format(VolumeParameters(), key)
    except DriverError as error:
        raise InvalidArgument(f"{what}: {error}") from None


def look_at(cluster: Cluster, place: Place) -> str:
    """Why the secret cannot be used because it is not there, "" where it is. Raises what `check_content` raises."""
    found = cluster.get(SECRET, place[1], place[0])
    if found is None:
        return f"there is no secret {'/'.join(place)}"
    check_content(found, place)
    return ""


def unguarded(places: Iterable[Place], own_namespace: str) -> list[str]:
    """What to warn of where a secret lies in a namespace whose secrets are never reviewed (webhooks.yaml)."""
    return [
        f"nobody keeps the secret {'/'.join(place)} from being deleted, as secrets of namespace {place[0]} are not "
        f"reviewed; use one of another namespace"
        for place in dict.fromkeys(places)
        if place[0] in (own_namespace, "kube-system")
    ]


class SecretRules:
    """Reviews creation, change and deletion of secrets that hold a passphrase."""

    def __init__(self, cluster: Cluster, driver_name: str) -> None:
        self._cluster = cluster
        self._driver_name = driver_name

    def review(self, request: Request) -> Verdict:
        """Raises FailedPrecondition for what would make volumes or images unreadable, InvalidArgument for what makes a
        good secret one that nothing new can be encrypted with.
        """
        place = request.namespace, request.name
        users = users_of_secret(
            place, self._driver_name, *(self._cluster.all(kind) for kind in (STORAGE_CLASS, IMAGE, VOLUME))
        )
        if not users:
            return Verdict()
        if request.thing is None:
            self._keep(request, place, users, "its deletion would make their data unreadable")
            return Verdict()
        warnings = []
        if request.old is not None:
            warnings = self._change(request, place, users, request.old, request.thing)
        try:
            check_content(request.thing, place)
        except InvalidArgument as error:
            if request.old is not None and _is_good(request.old, place):
                raise
            warnings.append(str(error))
        return Verdict(warnings)

    def _change(self, request: Request, place: Place, users: list[str], old: Json, new: Json) -> list[str]:
        """What to warn of."""
        try:
            before = _read(old)
        except DriverError as error:
            # Not now; but what it has may be what its volumes were made with, before it became so.
            if _passphrases(old) - _passphrases(new):
                self._keep(
                    request,
                    place,
                    users,
                    f"a passphrase goes that may be what opens them, as nobody can tell which one does ({error}); "
                    f"keep that one too, as {PREVIOUS}",
                )
            return []
        if before.passphrase is None:
            return []
        try:
            after = _read(new)
        except DriverError as error:
            self._keep(request, place, users, f"it could be read no more: {error}")
            return []
        if before.passphrase not in (after.passphrase, after.previous):
            self._keep(
                request,
                place,
                users,
                f"a new passphrase would make their data unreadable; keep the old one as {PREVIOUS} beside it",
            )
        elif after.passphrase is None:
            self._keep(request, place, users, "without its passphrase their data cannot be read")
        if before.previous is not None and after.previous != before.previous:
            secret = "/".join(place)
            if images := users_of_secret(place, self._driver_name, (), self._cluster.all(IMAGE), ()):
                self._keep(
                    request,
                    place,
                    images,
                    f"the {PREVIOUS} that goes may be what opens it, as an image is never given another passphrase; "
                    f"clone it with reencrypt, and have the clone used instead",
                )
            return [f"what was not opened since secret {secret} was last changed needs the {PREVIOUS} that goes"]
        return []

    def _keep(self, request: Request, place: Place, users: list[str], why: str) -> None:
        """Refuse, unless the loss was allowed or all in the namespace goes."""
        notes = [(thing or {}).get("metadata", {}).get("annotations") or {} for thing in (request.thing, request.old)]
        if any(each.get(ALLOW_LOSS) == "true" for each in notes) or is_ending(self._cluster, place[0]):
            return
        raise FailedPrecondition(
            f"the secret {'/'.join(place)} is used by {named(users)}, and {why}; if that is wanted, annotate the "
            f'secret with {ALLOW_LOSS}: "true" first'
        )


def _is_good(secret: Json, place: Place) -> bool:
    with contextlib.suppress(InvalidArgument):
        check_content(secret, place)
        return True
    return False


def _read(secret: Json) -> SecretKey:
    return read_secret(_entries(secret.get("data") or {}))


def _passphrases(secret: Json) -> set[str]:
    """What is in the entries of passphrases, encoded as it is, whatever else is wrong with the secret."""
    data = secret.get("data") or {}
    return {data[name] for name in (LONGHORN_VALUE, CEPH_PASSPHRASE, PREVIOUS) if data.get(name)}


def _entries(data: Mapping[str, str | None]) -> dict[str, str]:
    """Those that count, as CSI hands them on. Raises FailedPrecondition for one that is no text."""
    found = {}
    for name in _ENTRIES:
        if name not in data:
            continue
        try:
            found[name] = base64.b64decode(data[name] or "", validate=True).decode()
        except (binascii.Error, ValueError):
            raise FailedPrecondition(f"the secret's entry {name} is no text in UTF-8, and CSI hands on text") from None
    return found
