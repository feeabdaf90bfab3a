"""Volume keys in kernel keyrings: found, linked and unlinked by name; payloads are never read.

libcryptsetup puts the volume key of an open device as a `logon` key into the thread keyring of the thread that opened
it, where it dies with that thread. Linked into root's user keyring (@u) it outlives the process, and a table reload
works from any thread that links it into its own thread keyring first, because dm-crypt looks for keys only in the
caller's thread, process and session keyrings (request_key(2)).

In @u each key lies in a keyring of its own that cannot be searched: `cryptsetup luksOpen` of a device that is open
already looks up the key by its name, wherever request_key(2) finds one, and takes it out of every keyring (cryptsetup
2.6, keyring_revoke_and_unlink_key). So what is in @u is found by going through it.
"""

import errno
from typing import Final

from csi_driver.host.syscalls import error_name, syscall
from csi_driver.model.errors import CommandFailed, FailedPrecondition

_THREAD_KEYRING: Final = -1
_USER_KEYRING: Final = -4
_SETPERM: Final = 5
_DESCRIBE: Final = 6
_CLEAR: Final = 7
_LINK: Final = 8
_UNLINK: Final = 9
_SEARCH: Final = 10
_READ: Final = 11
_DESCRIPTION_BYTES: Final = 4096

# Permissions (keyrings(7)): possessor's in the highest byte, then the owner's: view 1, read 2, write 4, search 8,
# link 0x10, setattr 0x20.
_BOX_PERMISSIONS: Final = 0x37370000
_KEY_PERMISSIONS: Final = 0x3D110000


def find_user(description: str) -> int | None:
    """Serial of the key that `link_to_user` has kept, or None. Raises CommandFailed, FailedPrecondition."""
    box = _box(description)
    return None if box is None else _member(box, "logon", description)


def link_to_user(description: str) -> int:
    """Keep the key of the calling thread's keyring in root's user keyring; returns its serial.

    A key that is kept there under the same name is displaced. Raises FailedPrecondition when the thread has no such
    key or the quota of root's keys is used up, CommandFailed.
    """
    serial = _keyctl(description, _SEARCH, _THREAD_KEYRING, b"logon", description.encode(), 0)
    if serial is None:
        raise FailedPrecondition(
            f"the key {description} is not in this thread's keyring; it must be linked by the thread that opened the "
            f"device"
        )
    # Made in the thread's keyring, as permissions are for its possessor to set; it is whole when it comes into @u.
    box = _call(description, "add_key", b"keyring", _box_name(description).encode(), None, 0, _THREAD_KEYRING)
    if box is None or any(
        _keyctl(description, *arguments) is None
        for arguments in (
            (_SETPERM, box, _BOX_PERMISSIONS),
            (_SETPERM, serial, _KEY_PERMISSIONS),
            (_LINK, serial, box),
            (_LINK, box, _USER_KEYRING),
        )
    ):
        raise CommandFailed(f"the key {description} vanished while it was linked; call again")
    return serial


def link_into_thread(description: str) -> int | None:
    """Link the key that is kept into the calling thread's keyring; its serial, or None when it is absent."""
    serial = find_user(description)
    return None if serial is None or _keyctl(description, _LINK, serial, _THREAD_KEYRING) is None else serial


def unlink_from_user(description: str) -> bool:
    """Take the key out of root's user keyring; False when it was not there.

    The kernel destroys the key once nothing else links it. Raises CommandFailed.
    """
    box = _box(description)
    return box is not None and _keyctl(description, _UNLINK, box, _USER_KEYRING) is not None


def clear_thread() -> None:
    """Drop every key from the calling thread's keyring; keys that nothing else links are destroyed."""
    _keyctl("(all)", _CLEAR, _THREAD_KEYRING)


def _box_name(description: str) -> str:
    return f"luks-csi:{description}"


def _box(description: str) -> int | None:
    """Serial of the keyring around a key."""
    return _member(_USER_KEYRING, "keyring", _box_name(description))


def _member(keyring: int, kind: str, description: str) -> int | None:
    """Serial of the key of that type and name in a keyring."""
    for serial in _members(keyring, description):
        text = bytearray(_DESCRIPTION_BYTES)
        try:
            length = syscall("keyctl", _DESCRIBE, serial, text, len(text))
        except OSError:
            continue  # gone meanwhile, or nobody's business
        # "type;uid;gid;permissions;description" and a NUL
        found = text[: length - 1].decode(errors="replace").split(";", 4)
        if (found[0], found[-1]) == (kind, description):
            return serial
    return None


def _members(keyring: int, description: str) -> list[int]:
    """Serials of what a keyring links."""
    room, needed = bytearray(), 1 << 10
    while needed > len(room):
        room = bytearray(needed)
        needed = _keyctl(description, _READ, keyring, room, len(room)) or 0
    return list(memoryview(room)[:needed].cast("i"))


def _keyctl(description: str, *arguments: int | bytes | bytearray) -> int | None:
    return _call(description, "keyctl", *arguments)


def _call(description: str, name: str, *arguments: int | bytes | bytearray | None) -> int | None:
    """keyctl(2) or add_key(2); None when the key is absent, expired or revoked."""
    try:
        return syscall(name, *arguments)
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
        raise CommandFailed(f"{name}(2) failed on the key {description}: {error_name(error)}") from None
