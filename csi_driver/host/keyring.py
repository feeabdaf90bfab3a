"""Volume keys in kernel keyrings: found, linked and unlinked by name; payloads are never read.

libcryptsetup puts the volume key of an open device as a `logon` key into the thread keyring of the thread that opened
it, where it dies with that thread. Linked into root's user keyring (@u) it outlives the process, and a table reload
works from any thread that links it into its own thread keyring first, because dm-crypt looks for keys only in the
caller's thread, process and session keyrings (request_key(2)).

keyctl(2) KEYCTL_SEARCH with a destination does search and link in one step, under the permissions that a possessor has;
a keyring named by its special id counts as possessed (keyrings(7)), so no session keyring is needed.
"""

import errno
from enum import StrEnum
from typing import Final

from csi_driver.host.syscalls import error_name, syscall
from csi_driver.model.errors import CommandFailed, FailedPrecondition

_THREAD_KEYRING: Final = -1
_USER_KEYRING: Final = -4
_CLEAR: Final = 7
_UNLINK: Final = 9
_SEARCH: Final = 10


class KeyType(StrEnum):
    """Key types used for volume keys: `logon` cannot be read back by any process, `user` can (keyrings(7))."""

    LOGON = "logon"
    USER = "user"


def find_user(key_type: str, description: str) -> int | None:
    """Serial of the key in root's user keyring, or None. Raises CommandFailed, FailedPrecondition."""
    return _keyctl(description, _SEARCH, _USER_KEYRING, key_type.encode(), description.encode(), 0)


def link_to_user(key_type: str, description: str) -> int:
    """Link the key of the calling thread's keyring into root's user keyring; returns its serial.

    A key that is linked there already under the same name is displaced. Raises FailedPrecondition when the thread has
    no such key or the quota of root's keys is used up, CommandFailed.
    """
    serial = _keyctl(description, _SEARCH, _THREAD_KEYRING, key_type.encode(), description.encode(), _USER_KEYRING)
    if serial is None:
        raise FailedPrecondition(
            f"the key {description} is not in this thread's keyring; it must be linked by the thread that opened the "
            f"device"
        )
    return serial


def link_into_thread(key_type: str, description: str) -> int | None:
    """Link the key of root's user keyring into the calling thread's keyring; its serial, or None when it is absent."""
    return _keyctl(description, _SEARCH, _USER_KEYRING, key_type.encode(), description.encode(), _THREAD_KEYRING)


def unlink_from_user(description: str, key_type: str = KeyType.LOGON) -> bool:
    """Take the key out of root's user keyring; False when it was not there.

    The kernel destroys the key once nothing else links it. Raises CommandFailed.
    """
    serial = find_user(key_type, description)
    return serial is not None and _keyctl(description, _UNLINK, serial, _USER_KEYRING) is not None


def clear_thread() -> None:
    """Drop every key from the calling thread's keyring; keys that nothing else links are destroyed."""
    _keyctl("(all)", _CLEAR, _THREAD_KEYRING)


def _keyctl(description: str, *arguments: int | bytes) -> int | None:
    """keyctl(2); None when the key is absent, expired or revoked."""
    try:
        return syscall("keyctl", *arguments)
    except OSError as error:
        if error.errno in (errno.ENOKEY, errno.EKEYEXPIRED, errno.EKEYREVOKED, errno.ENOENT):
            return None
        if error.errno == errno.EDQUOT:
            raise FailedPrecondition(
                f"the kernel has no room for the key {description}: raise kernel.keys.root_maxkeys and "
                f"kernel.keys.root_maxbytes"
            ) from None
        if error.errno in (errno.ENOSYS, errno.EPERM):
            raise FailedPrecondition(
                f"this process may not use kernel keyrings ({error_name(error)}): run it privileged, without a seccomp "
                f"filter on keyctl(2)"
            ) from None
        raise CommandFailed(f"keyctl(2) failed on the key {description}: {error_name(error)}") from None
