"""Our token in a volume's LUKS2 header: the trail of its key, so that header and KMS are enough to open it again.

A header is unauthenticated, so the token is believed by `luks-csi recover` and `volume adopt` alone, which have nothing
else, and which try what comes of it on the volume; a volume that is in use follows its record.
"""

from typing import Final

import msgspec

from csi_driver.luks.header import BINARY_SIZE, Copy, Header
from csi_driver.model.reading import decode
from csi_driver.model.volume import KeyTrail

TYPE: Final = "luks-csi-key"


class _KeyToken(msgspec.Struct, frozen=True):
    type: str
    key: KeyTrail
    keyslots: tuple[str, ...] = ()


class _Tokens(msgspec.Struct, frozen=True):
    tokens: dict[str, msgspec.Raw]


def encode(trail: KeyTrail) -> bytes:
    """The token of that trail, as libcryptsetup takes it."""
    return msgspec.json.encode(_KeyToken(TYPE, trail))


def places(header: Header) -> list[int]:
    """The numbers of our tokens in a header."""
    return sorted(int(place) for place, token in header.tokens.items() if token.type == TYPE)


def read(area: bytes, header: Header) -> KeyTrail | None:
    """The trail in a header that was parsed from `area`; None without a token of ours that can be read."""
    found = places(header)
    start = 0 if header.source is Copy.PRIMARY else header.hdr_size
    if not found:
        return None
    text = area[start + BINARY_SIZE : start + header.hdr_size].partition(b"\0")[0]
    try:
        raw = decode(text, _Tokens).tokens[str(found[0])]
        return decode(raw, _KeyToken).key
    except (msgspec.MsgspecError, KeyError, RecursionError):
        return None
