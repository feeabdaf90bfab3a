"""Repr-Digest (RFC 9530): in it who uploads says what checksum the whole file has."""

import base64
import binascii
import re
from typing import Final

from csi_driver.images.checksum import Algorithm, Checksum
from csi_driver.model.errors import InvalidArgument

DIGEST: Final = "Repr-Digest"

_NAMES: Final = {Algorithm.SHA256: "sha-256", Algorithm.SHA512: "sha-512"}
_VALUE: Final = re.compile(r"(sha-256|sha-512)=:([A-Za-z0-9+/=]{1,96}):")


def digest_of(checksum: Checksum) -> str:
    """The header's value."""
    return f"{_NAMES[checksum.algorithm]}=:{base64.b64encode(bytes.fromhex(checksum.digest)).decode()}:"


def read_digest(value: str) -> Checksum:
    """What the header says. Raises InvalidArgument unless it is one digest, SHA-256 or SHA-512."""
    found = _VALUE.fullmatch(value.strip())
    if found is not None:
        try:
            checksum = Checksum.parse(f"{found[1].replace('-', '')}:{base64.b64decode(found[2], validate=True).hex()}")
        except (binascii.Error, InvalidArgument):
            pass
        else:
            return checksum
    raise InvalidArgument(
        f"the header {DIGEST} is to be sha-256=:BASE64: or sha-512=:BASE64:, the digest of the whole file"
    )
