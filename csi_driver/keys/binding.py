"""A DEK and the name of its volume in one plaintext, for a KMS that binds what it wraps to nothing itself."""

import msgspec

from csi_driver.model.errors import KeyLost
from csi_driver.model.reading import decode
from csi_driver.model.secret import Passphrase


class _Inside(msgspec.Struct, frozen=True):
    name: str
    key: bytes


def bound(name: str, key: Passphrase) -> bytes:
    """What is wrapped in place of the key alone."""
    return msgspec.json.encode(_Inside(name, key.reveal()))


def unbound(where: str, name: str, plaintext: bytes) -> Passphrase:
    """The key that was bound to `name`. Raises KeyLost when it is another volume's, or none at all."""
    try:
        inside = decode(plaintext, _Inside)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        inside = _Inside("", b"")
    if not name or inside.name != name:
        raise KeyLost(
            f"what {where} unwrapped is not the key of {name}; restore the record of the volume from a backup"
        )
    return Passphrase(inside.key)
