"""A container's root without any capability who has found a volume's LUKS UUID in /sys and wants another key in use.

`python -m tests.machine.key_attacker swap|update UUID`, run below `setpriv`; prints what he reached, a line each.
"""

import sys

from csi_driver.host import keyring
from csi_driver.host.syscalls import syscall
from csi_driver.luks.device import volume_key_name

_THREAD, _SESSION, _USER = -1, -3, -4
_JOIN_SESSION, _UPDATE, _SETPERM, _LINK = 1, 2, 5, 8
_ALL_RIGHTS = 0x3F3F0000
_OWN_KEY = b"A" * 64


def _swap(name: str) -> None:
    """Another key, in a keyring of the same name, in place of the kept one."""
    box = syscall("add_key", b"keyring", f"luks-csi:{name}".encode(), None, 0, _SESSION)
    key = syscall("add_key", b"logon", name.encode(), _OWN_KEY, len(_OWN_KEY), box)
    for serial in (box, key):
        syscall("keyctl", _SETPERM, serial, _ALL_RIGHTS)
    syscall("keyctl", _LINK, box, _USER)
    print("swapped")


def _update(name: str) -> None:
    """Another payload in the kept key, by the rights that its possessor has."""
    kept = keyring.find_user(name)
    assert kept is not None
    syscall("keyctl", _LINK, kept.key, _SESSION)
    print("possessed")
    syscall("keyctl", _UPDATE, kept.key, _OWN_KEY, len(_OWN_KEY))
    print("updated")


if __name__ == "__main__":
    syscall("keyctl", _JOIN_SESSION, None)
    {"swap": _swap, "update": _update}[sys.argv[1]](volume_key_name(sys.argv[2]))
