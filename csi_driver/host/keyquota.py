"""How much of root's key quota is used: without room the key that an open volume keeps for its enlargement has none."""

from pathlib import Path
from typing import Final

from msgspec import Struct

_USERS: Final = Path("/proc/key-users")
_LIMITS: Final = Path("/proc/sys/kernel/keys")


class KeyQuota(Struct, frozen=True):
    """Keys and bytes of all of root's keys that count against its quota (keyrings(7)), and the most of each."""

    keys: int
    most_keys: int
    bytes: int
    most_bytes: int

    @property
    def used(self) -> float:
        """The part that is used of what is scarcer, from 0 to 1."""
        return max(self.keys / max(self.most_keys, 1), self.bytes / max(self.most_bytes, 1))

    def __str__(self) -> str:
        return f"root has {self.keys} of {self.most_keys} keys, {self.bytes} of {self.most_bytes} bytes"


def read_key_quota(users: Path = _USERS, limits: Path = _LIMITS) -> KeyQuota:
    """Root's row of /proc/key-users: uid, usage, keys/instantiated, keys/most, bytes/most. Raises OSError."""
    for line in users.read_text().splitlines():
        uid, _, rest = line.partition(":")
        if int(uid) == 0:
            (keys, most_keys), (size, most_size) = (map(int, pair.split("/")) for pair in rest.split()[-2:])
            return KeyQuota(keys, most_keys, size, most_size)
    # Nobody has a row before the first key.
    most_keys, most_size = (int((limits / name).read_text()) for name in ("root_maxkeys", "root_maxbytes"))
    return KeyQuota(0, most_keys, 0, most_size)
