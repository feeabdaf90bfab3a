"""What a key source must offer: one entry of the KMS configuration, ready to be asked.

A volume with a key source has a data encryption key (DEK) of its own, the passphrase of its LUKS2 header. It is made
once, before the volume, and is never kept in the clear: either the KMS wraps it and the volume's record holds what
comes of that (`Wrapper`), or the KMS keeps it under the volume's name (`KeySource` itself).

Who retries: the sources themselves, within their time limit, what passes by itself. What is raised then is final for
the call: Unavailable (it cannot be reached, is overloaded or broken: the call may be repeated), PermissionDenied (it
refuses us), KeyLost (it has the key no more), FailedPrecondition (the configuration, the certificate, the answer).
"""

import re
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import msgspec

from csi_driver.keys.secret import SecretKey
from csi_driver.model.errors import FailedPrecondition, KeyLost
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import KeyTrail

Entry = Mapping[str, object]
"""One entry of the KMS configuration, as its JSON says."""

SECONDS: Final = 10.0
"""How long one request to a KMS may take, unless its entry says otherwise."""

Announce = Callable[[], None]
"""Called right before a KMS is asked to keep a key: until then it has none of that name, unless it did before."""


def nobody() -> None:
    """Nobody wants to know."""


_MOST_NAMED: Final = 1024
_MOST_WRAPPED: Final = 4096  # it must fit into the LUKS2 header's JSON area, beside the key slots
_TRUTH: Final = {"true": True, "1": True, "t": True, "false": False, "0": False, "f": False}


class KeyRequest(msgspec.Struct, frozen=True):
    """For whom a source is asked: the volume, the namespace of its claim, and the secret that came with the call."""

    volume_id: str
    tenant: str = ""
    secret: SecretKey = msgspec.field(default_factory=lambda: SecretKey(None))


class RequestNeeded(FailedPrecondition):
    """A KMS that is asked with what a request brings, the namespace of a claim or a secret, which this one did not."""


class KeySource(Protocol):
    """An entry of the KMS configuration; safe for many threads."""

    @property
    def keeps(self) -> bool:
        """Whether the KMS keeps DEKs itself, so that one stays there until it is destroyed."""

    def create(self, name: str, announce: Announce = nobody) -> KeyTrail:
        """Make a DEK and have it wrapped or kept; repeating is fine. The trail's `kms_id`, `type` are left to others.

        Where the KMS keeps it, `announce` is called before it is asked to, and what that raises ends it.
        `name` is of letters, digits, '-' and '.'; no other volume, and no earlier key of this one, has it.
        """

    def fetch(self, trail: KeyTrail) -> Passphrase:
        """The DEK."""

    def rewrap(self, trail: KeyTrail) -> KeyTrail:
        """The same DEK under the newest key of the KMS; the trail itself where there is nothing to do."""

    def destroy(self, trail: KeyTrail) -> None:
        """Forget the DEK of a volume that is gone; absent is fine."""

    def check(self) -> str:
        """Ask whether it works, changing nothing; what was found."""

    def close(self) -> None:
        """Close what is open to the KMS; nobody asks it any more."""


def require_name(where: str, trail: KeyTrail) -> None:
    """Raise FailedPrecondition for a trail that names no key, of a KMS that finds keys by their names."""
    if not trail.name:
        raise FailedPrecondition(f"{where} keeps a key for each volume and was asked for none; name it (--kms-name)")


class Wrapped(msgspec.Struct, frozen=True):
    """A wrapped DEK as text, and the key that it is wrapped with, as far as it is told."""

    text: str
    key_id: str = ""
    key_version: str = ""


class Wrapper(Protocol):
    """A KMS that wraps and keeps nothing."""

    def wrap(self, name: str, key: Passphrase) -> Wrapped:
        """Wrap `key`, bound to `name` where the KMS can."""

    def unwrap(self, trail: KeyTrail) -> Passphrase:
        """What `wrap` was given."""

    def check(self) -> str:
        """As `KeySource.check`."""

    def close(self) -> None:
        """As `KeySource.close`."""


class Rewrapper(Protocol):
    """A wrapper whose KMS wraps anew by itself, so that the DEK never leaves it."""

    def rewrap_there(self, trail: KeyTrail) -> Wrapped:
        """The same DEK under the newest key."""


class Wrapping:
    """The source that a `Wrapper` makes; what it wraps lives in the volume's record and header."""

    keeps = False

    def __init__(self, wrapper: Wrapper) -> None:
        self._wrapper = wrapper

    def create(self, name: str, announce: Announce = nobody) -> KeyTrail:  # noqa: ARG002 - nothing will be kept there
        """Raises KeyLost, too, where the KMS does not unwrap what it wrapped: nothing may be encrypted with that."""
        key = Passphrase.random()
        trail = _trail(name, self._wrapper.wrap(name, key))
        if self._wrapper.unwrap(trail) != key:
            raise KeyLost(
                f"the key for {name} was wrapped, and unwraps into another one; nothing was encrypted with it. Look at "
                f"the KMS: a faulty program, or several servers behind one address with a key each"
            )
        return trail

    def fetch(self, trail: KeyTrail) -> Passphrase:
        return self._wrapper.unwrap(trail)

    def rewrap(self, trail: KeyTrail) -> KeyTrail:
        there = getattr(self._wrapper, "rewrap_there", None)
        wrapped = there(trail) if there else self._wrapper.wrap(trail.name, self._wrapper.unwrap(trail))
        fresh = _trail(trail.name, wrapped)
        return msgspec.structs.replace(trail, wrapped=fresh.wrapped, key_id=fresh.key_id, key_version=fresh.key_version)

    def destroy(self, trail: KeyTrail) -> None:
        """It goes with the record."""

    def check(self) -> str:
        return self._wrapper.check()

    def close(self) -> None:
        self._wrapper.close()


def _trail(name: str, wrapped: Wrapped) -> KeyTrail:
    if not wrapped.text.isascii() or not wrapped.text.isprintable() or len(wrapped.text) > _MOST_WRAPPED:
        raise FailedPrecondition(
            f"the KMS wrapped a key into {len(wrapped.text)} characters, and at most {_MOST_WRAPPED} of printable "
            f"ASCII can be kept; use another key or plug-in there"
        )
    if max(len(wrapped.key_id), len(wrapped.key_version)) > _MOST_NAMED:
        raise FailedPrecondition(f"the KMS names its key by more than {_MOST_NAMED} characters; use another one there")
    return KeyTrail(
        kms_id="", type="", name=name, wrapped=wrapped.text, key_id=wrapped.key_id, key_version=wrapped.key_version
    )


class EntryReader:
    """Reads an entry of the configuration; what is wrong is told by entry and field, never by value."""

    def __init__(self, where: str, entry: Entry) -> None:
        self._where = where
        self._entry = entry

    @property
    def where(self) -> str:
        """The entry in errors: KMS vault-1 (vault)."""
        return self._where

    def text(self, field_name: str, default: str | None = None) -> str:
        """A text. Raises FailedPrecondition when it is none, or is missing and has no default."""
        value = self._entry.get(field_name)
        if value is None or value == "":
            if default is None:
                raise FailedPrecondition(f"{self._where} lacks the field {field_name}; add it to the KMS configuration")
            return default
        if not isinstance(value, str):
            raise FailedPrecondition(f"the field {field_name} of {self._where} must be a text in quotation marks")
        return value

    def truth(self, field_name: str, *, default: bool) -> bool:
        """A truth: true or false, as text or as it is in JSON."""
        value = self._entry.get(field_name, "")
        if isinstance(value, bool):
            return value
        if value == "":
            return default
        if not isinstance(value, str) or value.lower() not in _TRUTH:
            raise FailedPrecondition(f'the field {field_name} of {self._where} must be "true" or "false"')
        return _TRUTH[value.lower()]

    def seconds(self, field_name: str, default: float) -> float:
        """A number of seconds, as a number or as text."""
        value = self._entry.get(field_name)
        if value is None or value == "":
            return default
        text = str(value)
        if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,3})?", text) or float(text) == 0:
            raise FailedPrecondition(f"the field {field_name} of {self._where} must be a number of seconds")
        return float(text)

    def texts(self, field_name: str) -> tuple[str, ...]:
        """A list of texts; none where it is missing."""
        value = self._entry.get(field_name, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise FailedPrecondition(f"the field {field_name} of {self._where} must be a list of texts")
        return tuple(value)
