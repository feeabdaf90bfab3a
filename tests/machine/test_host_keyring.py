"""Volume keys in root's user keyring: found again by us, and neither changed nor replaced by who shares it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.host import keyring
from csi_driver.host.syscalls import syscall
from csi_driver.model.errors import FailedPrecondition

THREAD, SESSION, USER = -1, -3, -4
JOIN_SESSION, UPDATE, REVOKE, CHOWN, SETPERM, CLEAR, LINK, UNLINK, SEARCH = 1, 2, 3, 4, 5, 7, 8, 9, 10
SET_TIMEOUT, INVALIDATE = 15, 21
LOGIN_RIGHTS = 0x3F3F0000


def add(name: str) -> int:
    """A key in this thread's keyring."""
    return syscall("add_key", b"logon", name.encode(), b"secret", 6, THREAD)


@pytest.fixture
def keyed() -> Iterator[str]:
    """A key that is kept, and its name."""
    name = "cryptsetup:kept-d0"
    add(name)
    keyring.link_to_user(name)
    yield name
    keyring.clear_thread()
    keyring.unlink_from_user(name)


def test_a_key_that_the_thread_does_not_have_is_not_linked() -> None:
    with pytest.raises(FailedPrecondition, match="key cryptsetup:absent is not in this thread's keyring"):
        keyring.link_to_user("cryptsetup:absent")
    assert keyring.link_into_thread("cryptsetup:absent") is None


def test_a_kept_key_is_found_by_nobody_who_asks_for_its_name(keyed: str) -> None:
    """As cryptsetup does, to take it away, when somebody opens a device that is open already."""
    with pytest.raises(OSError, match=r"Required key not available|Permission denied"):
        syscall("keyctl", 10, -4, b"logon", keyed.encode(), 0)
    assert keyring.find_user(keyed) is not None


def test_a_kept_key_displaces_the_one_of_its_name(keyed: str) -> None:
    first = keyring.find_user(keyed)
    key = add(keyed)
    second = keyring.link_to_user(keyed)
    assert second.key == key
    assert first is not None
    assert first.box != second.box
    assert keyring.find_user(keyed) == second
    assert keyring.link_into_thread(keyed) == key


def test_of_many_keys_the_right_one_is_found() -> None:
    names = [f"cryptsetup:many-{number}-d0" for number in range(50)]
    try:
        kept = {}
        for name in names:
            key = add(name)
            kept[name] = keyring.link_to_user(name)
            assert kept[name].key == key
        assert {name: keyring.find_user(name) for name in names} == kept
    finally:
        assert all(keyring.unlink_from_user(name) for name in names)
    assert not any(keyring.unlink_from_user(name) for name in names)


def test_who_shares_the_keyring_can_neither_change_a_kept_key_nor_the_keyring_around_it(keyed: str) -> None:
    """Not even possessing both, with all capabilities: what is denied here is denied to every container's root."""
    kept = keyring.find_user(keyed)
    assert kept is not None
    keyring.link_into_thread(keyed)
    other = add("cryptsetup:other-d0")
    for attack in (
        (UPDATE, kept.key, b"other!", 6),
        (REVOKE, kept.key),
        (LINK, other, kept.box),
        (CLEAR, kept.box),
        (REVOKE, kept.box),
        (INVALIDATE, kept.box),
        *((operation, serial, value) for serial in (kept.key, kept.box) for operation, value in
          ((SETPERM, LOGIN_RIGHTS), (CHOWN, 1), (SET_TIMEOUT, 1))),
    ):  # fmt: skip
        with pytest.raises(OSError, match="Permission denied"):
            syscall("keyctl", *attack, *((-1,) if attack[0] == CHOWN else ()))
    assert keyring.find_user(keyed) == kept


def test_a_key_that_took_the_place_of_the_pinned_one_is_not_linked(keyed: str) -> None:
    kept = keyring.find_user(keyed)
    assert kept is not None
    stranger = add(keyed)
    box = syscall("add_key", b"keyring", f"luks-csi:{keyed}".encode(), None, 0, THREAD)
    syscall("keyctl", LINK, stranger, box)
    for serial in (stranger, box):
        syscall("keyctl", SETPERM, serial, LOGIN_RIGHTS)
    syscall("keyctl", LINK, box, USER)
    keyring.clear_thread()
    assert keyring.link_into_thread(keyed, kept) in (None, kept.key)  # the kernel destroys it by and by
    keyring.clear_thread()
    for wrong in (keyring.KeptKey(box, box), keyring.KeptKey(stranger, stranger)):
        assert keyring.link_into_thread(keyed, wrong) is None
    # By its name alone it is found; from now on nobody changes it, so that it can be proven.
    assert keyring.link_into_thread(keyed) == stranger
    with pytest.raises(OSError, match="Permission denied"):
        syscall("keyctl", UPDATE, stranger, b"other!", 6)


def test_no_key_of_the_same_name_is_found_elsewhere_once_ours_is_gone(keyed: str) -> None:
    """dm-crypt asks as request_key(2) does, which goes on from the thread's keyring to the session's, and so to @u."""
    syscall("keyctl", JOIN_SESSION, None)
    syscall("keyctl", LINK, USER, SESSION)  # as a login makes it
    stranger = add(keyed)
    syscall("keyctl", LINK, stranger, USER)
    keyring.clear_thread()
    try:
        assert syscall("keyctl", SEARCH, SESSION, b"logon", keyed.encode(), 0) == stranger
        key = keyring.link_into_thread(keyed)
        assert key is not None
        syscall("keyctl", INVALIDATE, key)
        for place in (THREAD, SESSION):
            with pytest.raises(OSError, match=r"Required key not available|Key has been revoked"):
                syscall("keyctl", SEARCH, place, b"logon", keyed.encode(), 0)
    finally:
        syscall("keyctl", UNLINK, stranger, USER)


def test_a_full_quota_is_told_with_its_numbers() -> None:
    quotas = [Path("/proc/sys/kernel/keys", name) for name in ("root_maxkeys", "root_maxbytes")]
    before = [quota.read_text().strip() for quota in quotas]
    add("cryptsetup:full-d0")
    try:
        quotas[0].write_text("1")
        with pytest.raises(FailedPrecondition, match=rf"root_maxkeys above 1 or .*root_maxbytes above {before[1]}"):
            keyring.link_to_user("cryptsetup:full-d0")
    finally:
        quotas[0].write_text(before[0])
        keyring.clear_thread()
