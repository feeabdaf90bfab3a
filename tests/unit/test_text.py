"""Text from elsewhere is made fit for people: printable, and of bounded length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.model.errors import DeviceInUse, DriverError, InvalidArgument
from csi_driver.model.text import LONGEST, printable, shortened, without_surrogates

ANYTHING = st.text(st.characters(), max_size=50) | st.binary(max_size=50).map(
    lambda data: data.decode(errors="surrogateescape")
)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain ä 漢 😀 \\x1b", "plain ä 漢 😀 \\x1b"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("two\r\nlines\t\0\x7f", "two\\r\\nlines\\t\\x00\\x7f"),
        ("C1 \x9b31m", "C1 \\x9b31m"),
        ("turned \u202e around", "turned \\u202e around"),
        (b"caf\xe9".decode(errors="surrogateescape"), "caf\\xe9"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_a_terminal_may_act_upon_is_written_out(given: str, shown: str) -> None:
    assert printable(given) == shown


@given(ANYTHING)
def test_every_text_becomes_printable_once(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    assert shown.encode().decode() == shown


@pytest.mark.parametrize("letter", ["a", "ä", "漢", "😀"])
def test_a_long_text_keeps_its_ends_and_tells_its_length(letter: str) -> None:
    sentence = f"the option '{letter * (1 << 20)}' is not allowed; allowed are ro, rw"
    short = shortened(sentence)
    assert len(short.encode(errors="backslashreplace")) <= LONGEST
    assert short.startswith(f"the option '{letter}")
    assert short.endswith("' is not allowed; allowed are ro, rw")
    assert f" of {len(sentence.encode(errors='backslashreplace'))} bytes are left out" in short


@pytest.mark.parametrize("text", ["", "a" * LONGEST, "ä" * (LONGEST // 2)])
def test_a_short_text_stays(text: str) -> None:
    assert shortened(text) == text


@pytest.mark.parametrize("kind", [DriverError, InvalidArgument, DeviceInUse])
def test_no_error_shows_more_than_a_bounded_printable_sentence(kind: type[DriverError]) -> None:
    error = kind("'" + "\x1b" * 5000 + "' and '" + "漢" * (1 << 20) + "' and 'caf\udce9' are kept busy")
    assert str(error).isprintable()
    assert len(str(error).encode()) <= LONGEST
    assert str(error).endswith("and 'caf\\xe9' are kept busy")


def test_only_what_cannot_be_encoded_is_changed_in_plain_values() -> None:
    value = {"a\udce9": ["\x1b", ("\ud800", 1, None)], "b": {"c": "\udcff"}}
    assert without_surrogates(value) == {"a\\xe9": ["\x1b", ["\\ud800", 1, None]], "b": {"c": "\\xff"}}
