import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.host.devicemapper import Device, DeviceMapper, Target
from csi_driver.host.dmcontrol import Command, call, format_table, parse_names, parse_table
from csi_driver.model.errors import FailedPrecondition, InvalidArgument

KEY = "00112233445566778899aabbccddeeff" * 2
SPEC = struct.Struct("=QQiI16s")


def crypt(key: str) -> Target:
    return Target(0, 2048, "crypt", f"aes-xts-plain64 {key} 0 7:3 32768 1 allow_discards")


def device(*targets: Target) -> Device:
    return Device("luks-one", "CRYPT-LUKS2-x", 253, 0, 0, suspended=False, read_only=False, targets=targets)


def test_a_key_never_shows_in_a_repr() -> None:
    for shown in (repr(crypt(KEY)), str(crypt(KEY)), repr(device(crypt(KEY))), f"{[crypt(KEY)]}"):
        assert KEY not in shown
        assert "aes-xts-plain64 <key> 0 7:3 32768" in shown


def test_a_keyring_reference_shows() -> None:
    assert ":64:logon:cryptsetup:u-d0" in repr(crypt(":64:logon:cryptsetup:u-d0"))
    assert "8:1 0" in repr(Target(0, 8, "linear", "8:1 0"))


@pytest.mark.parametrize(
    ("targets", "backing"),
    [
        ([crypt(KEY)], ((7, 3),)),
        # The description of a key may look like a device number.
        ([crypt(":32:logon:8:9")], ((7, 3),)),
        ([Target(0, 8, "linear", "8:1 0"), Target(8, 8, "linear", "8:1 8"), Target(16, 8, "linear", "8:2 0")],
         ((8, 1), (8, 2))),
        ([Target(0, 8, "flakey", "7:1 0 5 1")], ((7, 1),)),
        ([Target(0, 8, "error", "")], ()),
        ([Target(0, 8, "crypt", "")], ()),
        ([], ()),
    ],
)  # fmt: skip
def test_backing_devices_are_recognised(targets: list[Target], backing: tuple[tuple[int, int], ...]) -> None:
    assert device(*targets).backing == backing


def test_size_is_what_the_table_maps() -> None:
    assert device(Target(0, 8, "zero", ""), Target(8, 16, "error", "")).size_bytes == 24 * 512
    assert device().size_bytes == 0
    assert device().path == "/dev/mapper/luks-one"


rows = st.tuples(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=15),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=300),
)


@given(st.lists(rows, max_size=6))
def test_a_table_survives_the_way_through_the_kernel(table: list[tuple[int, int, str, str]]) -> None:
    raw = bytearray(format_table(table))
    assert len(raw) % 8 == 0
    # The kernel answers with offsets from the start of the area, where TABLE_LOAD takes them from the spec.
    offset = 0
    while offset < len(raw):
        *head, following, kind = SPEC.unpack_from(raw, offset)
        SPEC.pack_into(raw, offset, *head, offset + following, kind)
        offset += following
    assert parse_table(bytes(raw), len(table)) == table


@pytest.mark.parametrize(("kind", "params"), [("sixteen-letters-", ""), ("", ""), ("linear", "8:1\0 0")])
def test_a_target_that_cannot_be_written_is_refused(kind: str, params: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot be written"):
        format_table([(0, 8, kind, params)])


def test_the_list_of_names_is_read() -> None:
    def record(number: int, following: int, name: bytes) -> bytes:
        return struct.pack("=QI", number, following) + name

    first = record(0xFD00, 32, b"luks-one\0").ljust(32, b"\xff")
    assert parse_names(first + record(0xFD01, 0, b"two\0garbage")) == ["luks-one", "two"]
    assert parse_names(record(0, 0, b"\0")) == []


@pytest.mark.parametrize("name", ["", "a/b", "a\0b", "n" * 128])
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot be the name of a mapping"):
        call(Command.TABLE_STATUS, name)


def test_impossible_uuids_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="cannot be the UUID"):
        call(Command.DEV_CREATE, "luks-one", uuid="u" * 129)


def test_without_device_mapper_the_error_says_what_to_do() -> None:
    try:
        os.close(os.open("/dev/mapper/control", os.O_RDWR))
    except OSError:
        with pytest.raises(FailedPrecondition, match=r"load the kernel module dm_mod|run as root"):
            DeviceMapper().version()
    else:
        assert DeviceMapper().version().startswith("4.")
