"""Credentials of a download in the entries of a secret."""

import base64
from collections.abc import Mapping
from typing import Final

PAIRS: Final = (("username", "password"), ("accessKeyId", "secretKey"))
"""Of the type kubernetes.io/basic-auth, and as KubeVirt's importer has them."""


def pair_of(entries: Mapping[str, str]) -> tuple[str, str] | None:
    """User and password; None where the secret has no such entries."""
    for user, password in PAIRS:
        if user in entries and password in entries:
            return entries[user].rstrip("\n"), entries[password].rstrip("\n")
    return None


def authorization(user: str, password: str) -> dict[str, str]:
    """The header that a server takes them by (RFC 7617)."""
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}
