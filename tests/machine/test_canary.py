"""The canary itself: silent over the real server, and red for every leak that is planted."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.host.syscalls import syscall
from tests.machine.canary import LEAST_PLACES, LEAST_SAMPLES, Needles, watch
from tests.machine.canary_plants import KEY_NAME, PLANTS

EXPECTED = {
    "log": r"the passphrase \(as text\) in .*server\.log",
    "arguments": r"the passphrase \(as text\) in the cmdline of process \d+",
    "environment": r"the passphrase \(as text\) in the environ of process \d+",
    "file": r"the passphrase \(hexadecimal\) in /dev/shm/",
    "error": r"the passphrase \(as text\) in error text \d+",
    "key": r"the passphrase \(as text\) in the payload of a user key",
    "core": r"a core of the server",
}


@pytest.fixture
def _tidied() -> Iterator[None]:
    """Planted leaks are taken away again."""
    before = set(Path("/dev/shm").iterdir())
    yield
    for path in set(Path("/dev/shm").iterdir()) - before:
        path.unlink()
    with contextlib.suppress(OSError):  # ENOKEY: another leak was planted
        syscall("keyctl", 9, syscall("keyctl", 10, -4, b"user", KEY_NAME.encode(), 0), -4)  # KEYCTL_UNLINK, SEARCH; @u


def test_no_key_byte_leaves_its_place(folder: Path) -> None:
    report = watch(folder)
    assert not report.hits
    assert report.samples >= LEAST_SAMPLES
    assert report.places >= LEAST_PLACES


@pytest.mark.usefixtures("_tidied")
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_leak_is_found(folder: Path, plant: str) -> None:
    hits = watch(folder, plant).hits
    assert any(re.fullmatch(EXPECTED[plant] + ".*", hit) for hit in hits), hits


SECRET = "aB3dE6gH9jK2mN5pQ8"


@pytest.mark.parametrize(
    "content",
    [
        b"key=E6gH9j",
        "gH9jK2".encode("utf-16-le"),
        "gH9jK2".encode("utf-16-be"),
        b"jK2mN5".hex().encode(),
        b"jK2mN5".hex().upper().encode(),
        b"YUIzZEU2Z0g5aksybU41cFE4",  # base64 of the whole
        b"x" + b"enh4ejNkRTZnSDlqSzJtTjVwUTg=",  # and behind other bytes
    ],
)
def test_a_piece_of_a_key_is_found_in_any_encoding(content: bytes) -> None:
    needles = Needles()
    needles.add_text("the key", SECRET)
    assert needles.find(bytes(range(256)) + content + bytes(99))
    assert not needles.find(bytes(range(256)) + content[::-1] + bytes(99))


def test_a_piece_of_a_volume_key_is_found_in_any_form() -> None:
    needles, key = Needles(), bytes(range(128, 192))
    needles.add_key("the volume key", key)
    assert needles.find(b"x" * 99 + key[10:18] + b"x")
    assert needles.find(b"x: " + key[10:18].hex().encode())
    assert not needles.find(key[::-1])
