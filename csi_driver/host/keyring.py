"""Volume keys in kernel keyrings: kept, found, linked and unlinked; payloads are never read.

libcryptsetup puts the volume key of an open device as a `logon` key into the thread keyring of the thread that opened
it, where it dies with that thread. Linked into root's user keyring (@u) it outlives the process, and a table reload
works from any thread that links it into its own thread keyring first, because dm-crypt looks for keys only in the
caller's thread, process and session keyrings (request_key(2)).

In @u each key lies in a keyring of its own that cannot be searched: `cryptsetup luksOpen` of a device that is open
already looks up the key by its name, wherever request_key(2) finds one, and takes it out of every keyring (cryptsetup
2.6, keyring_revoke_and_unlink_key). So what is in @u is found by going through it.
"""

import errno
import os
from pathlib import Path
from typing import Final

from msgspec import Struct

from csi_driver.host.syscalls import error_name, syscall
from csi_driver.model.errors import CommandFailed, FailedPrecondition

_THREAD_KEYRING: Final = -1
_USER_KEYRING: Final = -4
_JOIN_SESSION: Final = 1
_SETPERM: Final = 5
_DESCRIBE: Final = 6
_CLEAR: Final = 7
_LINK: Final = 8
_UNLINK: Final = 9
_SEARCH: Final = 10
_READ: Final = 11
_DESCRIPTION_BYTES: Final = 4096
_QUOTAS: Final = Path("/proc/sys/kernel/keys")

# Permissions (keyrings(7)): possessor's in the highest byte, then the owner's: view 1, read 2, write 4, search 8,
# link 0x10, setattr 0x20. A container whose user is root is the owner too, and possesses what it links. So nobody may
# write, which is to replace the payload or what is in the keyring, and nobody may set permissions: these are for good.
# What is left is the least with which the key can be found, linked into a thread keyring, and used there by dm-crypt.
_BOX_PERMISSIONS: Final = 0x00130000
_KEY_PERMISSIONS: Final = 0x08110000


class KeptKey(Struct, frozen=True):
    """A key in root's user keyring: its serial and that of the keyring around it. No serial is given out anew soon."""

    key: int
    box: int


def find_user(description: str) -> KeptKey | None:
    """What `link_to_user` has kept under that name, or None. Raises CommandFailed, FailedPrecondition."""
    box = _member(_USER_KEYRING, "keyring", _box_name(description))
    key = None if box is None else _member(box, "logon", description)
    return None if box is None or key is None else KeptKey(key, box)


def add_to_thread(description: str, key: bytearray, kind: str = "logon") -> int:
    """Put a key into the calling thread's keyring, as libcryptsetup does; dm-crypt takes it by this name.

    Of the kind `ceph` krbd takes it (net/ceph/ceph_common.c). Returns its serial.

    The kernel has a copy, so the caller wipes his. Raises FailedPrecondition (quota), CommandFailed.
    """
    serial = _call(description, "add_key", kind.encode(), description.encode(), key, len(key), _THREAD_KEYRING)
    if serial is None:
        raise CommandFailed(f"the key {description} could not be put into this thread's keyring; call again")
    return serial


def unlink_from_thread(serial: int) -> None:
    """Take one key out of the calling thread's keyring again; gone is fine."""
    _attempt(_UNLINK, serial, _THREAD_KEYRING)


def link_to_user(description: str) -> KeptKey:
    """Keep the key of the calling thread's keyring in root's user keyring, and take it out of the thread's.

    A key that is kept there under the same name is displaced. Raises FailedPrecondition when the thread has no such
    key or the quota of root's keys is used up, CommandFailed.
    """
    key = _keyctl(description, _SEARCH, _THREAD_KEYRING, b"logon", description.encode(), 0)
    if key is None:
        raise FailedPrecondition(
            f"the key {description} is not in this thread's keyring; it must be linked by the thread that opened the "
            f"device"
        )
    # Made in the thread's keyring, as permissions are for its possessor to set. It is whole, and its permissions and
    # the key's are the last ones, when it comes into @u, where others see it.
    box = _call(description, "add_key", b"keyring", _box_name(description).encode(), None, 0, _THREAD_KEYRING)
    if box is None or any(
        _keyctl(description, *arguments) is None
        for arguments in (
            (_SETPERM, key, _KEY_PERMISSIONS),
            (_LINK, key, box),
            (_SETPERM, box, _BOX_PERMISSIONS),
            (_LINK, box, _USER_KEYRING),
            (_UNLINK, box, _THREAD_KEYRING),
            # libcryptsetup would fail to put the same key here again: that writes to the one it finds.
            (_UNLINK, key, _THREAD_KEYRING),
        )
    ):
        raise CommandFailed(f"the key {description} vanished while it was linked; call again")
    return KeptKey(key, box)


def link_into_thread(description: str, pinned: KeptKey | None = None) -> int | None:
    """Link the key that is kept into the calling thread's keyring; its serial, or None when there is none.

    With `pinned`, what `link_to_user` returned, it is that very key or none; without, one is found by its name and may
    be a stranger's. Whoever reloads a table with it must prove it to be the mapping's. Its payload cannot be changed
    from now on. Raises FailedPrecondition, CommandFailed.
    """
    kept = pinned or find_user(description)
    if (
        kept is None
        or not _is(kept.box, "keyring", _box_name(description))
        or not _is(kept.key, "logon", description)
        or _attempt(_LINK, kept.key, _THREAD_KEYRING) is None
    ):
        return None
    # One that an earlier version kept may still be written to by whoever possesses it: not between proof and use.
    _attempt(_SETPERM, kept.key, _KEY_PERMISSIONS)
    if _described(kept.key)[3:4] != [f"{_KEY_PERMISSIONS:08x}"]:
        clear_thread()
        return None
    # Without @u, which the session keyring of a login links: dm-crypt looks there where the key in the thread's keyring
    # was invalidated, and there may be a stranger's of the same name.
    _keyctl(description, _JOIN_SESSION, None)
    return kept.key


def unlink_from_user(description: str) -> bool:
    """Take the key out of root's user keyring; False when it was not there.

    The kernel destroys the key once nothing else links it. Raises CommandFailed.
    """
    box = _member(_USER_KEYRING, "keyring", _box_name(description))
    return box is not None and _keyctl(description, _UNLINK, box, _USER_KEYRING) is not None


def kept(prefix: str) -> dict[str, int]:
    """The keys in root's user keyring whose name begins so, and the serial of the keyring around each.

    Raises FailedPrecondition, CommandFailed.
    """
    found = ((_described(box), box) for box in _members(_USER_KEYRING, prefix))
    return {
        each[4].removeprefix(_box_name("")): box
        for each, box in found
        if each[:2] == ["keyring", str(os.geteuid())] and each[4].startswith(_box_name(prefix))
    }


def unlink_all(prefix: str, but: str = "") -> None:
    """Take every key whose name begins so out of root's user keyring, but the one named. Errors as `kept`."""
    for name, box in kept(prefix).items():
        if name != but:
            _keyctl(name, _UNLINK, box, _USER_KEYRING)


def clear_thread() -> None:
    """Drop every key from the calling thread's keyring; keys that nothing else links are destroyed."""
    _keyctl("(all)", _CLEAR, _THREAD_KEYRING)


def _box_name(description: str) -> str:
    return f"luks-csi:{description}"


def _member(keyring: int, kind: str, description: str) -> int | None:
    """Serial of the key of that type and name in a keyring."""
    return next((serial for serial in _members(keyring, description) if _is(serial, kind, description)), None)


def _is(serial: int, kind: str, description: str) -> bool:
    """Whether it is a key of that type and name of this process's user."""
    found = _described(serial)
    return len(found) == 5 and (found[0], found[1], found[4]) == (kind, str(os.geteuid()), description)


def _described(serial: int) -> list[str]:
    """Type, uid, gid, permissions in hexadecimal, and description; nothing where it is gone, or nobody's business."""
    text = bytearray(_DESCRIPTION_BYTES)
    length = _attempt(_DESCRIBE, serial, text, len(text))
    # "type;uid;gid;permissions;description" and a NUL
    return [] if length is None else text[: length - 1].decode(errors="replace").split(";", 4)


def _members(keyring: int, description: str) -> list[int]:
    """Serials of what a keyring links."""
    room, needed = bytearray(), 1 << 10
    while needed > len(room):
        room = bytearray(needed)
        needed = _keyctl(description, _READ, keyring, room, len(room)) or 0
    return list(memoryview(room)[:needed].cast("i"))


def _attempt(*arguments: int | bytes | bytearray) -> int | None:
    """keyctl(2) on a key that may be somebody else's; None when it fails."""
    try:
        return syscall("keyctl", *arguments)
    except OSError:
        return None


def _keyctl(description: str, *arguments: int | bytes | bytearray | None) -> int | None:
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
                f"the kernel has no room for the key {description}: root's quota of keys is used up (/proc/key-users), "
                f"raise kernel.keys.root_maxkeys above {_quota('root_maxkeys')} or kernel.keys.root_maxbytes above "
                f"{_quota('root_maxbytes')}"
            ) from None
        if error.errno in (errno.ENOSYS, errno.EPERM):
            raise FailedPrecondition(
                f"this process may not use kernel keyrings ({error_name(error)}): run it privileged, without a seccomp "
                f"filter on keyctl(2)"
            ) from None
        raise CommandFailed(f"{name}(2) failed on the key {description}: {error_name(error)}") from None


def _quota(name: str) -> str:
    """The limit of keyrings(7) as it is now."""
    try:
        return (_QUOTAS / name).read_text().strip()
    except OSError:
        return "what it is"  # hidden from this container
