"""Blank, and what a killed luksFormat may leave."""

import random
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csi_driver.luks.header import HEADER_SIZES, parse
from csi_driver.luks.header_probe import METADATA_SIZE, is_blank_or_ours
from csi_driver.model.errors import DriverError
from tests.headers import (
    BINARY_SIZE,
    DATA_OFFSET,
    HDR_SIZE,
    OTHER_UUID,
    PASSPHRASE,
    UUID,
    WHERE,
    format_file,
    formatted,
    head_of,
    run_cryptsetup,
    with_field,
)

_SMALL = 2 * HDR_SIZE
_HEAD = 256 * 1024


def head() -> bytes:
    """The copies of a real header and what luksFormat left behind them."""
    return formatted()[:_HEAD]


def is_header(area: bytes) -> bool:
    """Whether the metadata can be read."""
    try:
        parse(area, WHERE)
    except DriverError:
        return False
    return True


def put(area: bytes, at: int, content: bytes) -> bytes:
    return area[:at] + content + area[at + len(content) :]


def test_luks1_is_not_ours(tmp_path: Path) -> None:
    """coreos/ignition PR 1545: a question for LUKS2 alone took LUKS1 for blank."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(4 << 20)
    fast = ("--pbkdf-force-iterations", "1000", "--key-file", "-")
    run_cryptsetup("luksFormat", "-q", "--type", "luks1", "--uuid", UUID, *fast, str(path), key=PASSPHRASE)
    area = path.read_bytes()[:_HEAD]
    assert not is_blank_or_ours(area, UUID)


@pytest.mark.parametrize("size", [0, 512, METADATA_SIZE, _SMALL - 1])
def test_too_little_to_tell_is_never_blank(size: int) -> None:
    assert not is_blank_or_ours(bytes(size), UUID)


@given(st.integers(0, _HEAD - 1), st.integers(1, 255))
def test_one_byte_that_is_not_zero_is_not_blank(at: int, value: int) -> None:
    """But text where the JSON will be, which a torn write may leave."""
    texts = (range(BINARY_SIZE, HDR_SIZE), range(HDR_SIZE + BINARY_SIZE, _SMALL))
    is_text = 0x20 <= value < 0x7F and any(at in text for text in texts)
    assert is_blank_or_ours(put(bytes(_HEAD), at, bytes([value])), UUID) is is_text


def test_blank_and_our_whole_header_are_ours() -> None:
    assert is_blank_or_ours(bytes(DATA_OFFSET), UUID)
    assert is_blank_or_ours(head(), UUID)
    assert is_blank_or_ours(formatted()[: 2 << 20], UUID)


def test_a_header_with_another_uuid_is_not_ours() -> None:
    assert not is_blank_or_ours(head(), OTHER_UUID)
    for offset in (0, HDR_SIZE):
        assert not is_blank_or_ours(with_field(head(), "uuid", OTHER_UUID.encode(), offset), UUID)
        alone = put(bytes(_HEAD), offset, head()[offset : offset + HDR_SIZE])
        assert is_blank_or_ours(alone, UUID)
        assert not is_blank_or_ours(alone, OTHER_UUID)


@pytest.mark.parametrize("place", HEADER_SIZES[1:4])
def test_a_secondary_header_at_another_place_is_not_ours(place: int) -> None:
    """We make 16 KiB copies only; one further out belongs to a header of somebody else's making."""
    stray = put(head(), place, head()[HDR_SIZE : HDR_SIZE + BINARY_SIZE])
    assert not is_blank_or_ours(stray, UUID)


@settings(max_examples=50)
@given(st.data())
def test_whatever_luksformat_had_written_when_it_was_killed_is_ours(data: st.DataObject) -> None:
    """Its writes in order, cut at any sector: zeros, random bytes, then each copy without and with its checksum."""
    final = head()
    state = bytes(_HEAD)
    if data.draw(st.booleans()):  # an earlier try got further; this one begins by zeroing
        state = put(final, 0, bytes(data.draw(st.integers(0, _HEAD // 512)) * 512))
    else:
        state = put(state, _SMALL, final[_SMALL : _SMALL + data.draw(st.integers(0, (_HEAD - _SMALL) // 512)) * 512])
        for offset in (0, HDR_SIZE):
            torn = with_field(final, "csum", bytes(64), offset)
            written = data.draw(st.integers(0, HDR_SIZE // 512)) * 512
            state = put(state, offset, torn[offset : offset + written])
    assert is_blank_or_ours(state, UUID)


@pytest.mark.parametrize(
    "command", [["mkfs.ext4", "-q", "-F"], ["mkfs.xfs", "-q", "-f"], ["mkfs.btrfs", "-q", "-f"], ["mkswap"]]
)
@pytest.mark.parametrize("ours", [0, DATA_OFFSET], ids=["on a blank device", "over our header"])
def test_a_file_system_is_not_ours(command: list[str], ours: int, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(formatted()[:ours])
        file.truncate(320 << 20)
    subprocess.run([*command, str(path)], capture_output=True, check=True, timeout=120)
    with path.open("rb") as file:
        assert not is_blank_or_ours(file.read(8 << 20), UUID)


@pytest.mark.parametrize(
    ("at", "content"),
    [
        (0, b"\x01"),
        (512, b"EFI PART"),
        (1080, b"\x53\xef"),
        (4086, b"SWAPSPACE2"),
        (4096, b"\xfc\x4e\x2b\xa9"),
        (32769, b"CD001"),
        (65600, b"_BHRfS_M"),
    ],
)
def test_a_signature_is_not_ours(at: int, content: bytes) -> None:
    assert not is_blank_or_ours(put(bytes(_HEAD), at, content), UUID)


def test_random_bytes_from_the_first_sector_on_are_not_ours() -> None:
    """Somebody's plain dm-crypt device."""
    assert not is_blank_or_ours(random.Random(7).randbytes(_HEAD), UUID)


def test_a_really_killed_luksformat_is_ours_and_not_taken_for_formatted(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(DATA_OFFSET + (1 << 20))
    options = ("--pbkdf", "argon2id", "--pbkdf-force-iterations", "100000", "--pbkdf-memory", "65536", "--uuid", UUID)
    arguments = ["cryptsetup", "luksFormat", "-q", "--type", "luks2", "--offset", "32768", *options, "--key-file", "-"]
    with subprocess.Popen([*arguments, str(path)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.write(PASSPHRASE)
        process.stdin.close()
        deadline = time.monotonic() + 20
        while not is_header(head_of(path)) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    area = head_of(path)
    assert is_header(area)
    assert is_blank_or_ours(area, UUID)
    assert not is_blank_or_ours(area, OTHER_UUID)
    format_file(
        path, "--sector-size", "512", "--key-size", "512", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"
    )
