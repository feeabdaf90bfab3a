"""Text from elsewhere, such as requests, names of files and processes, made fit for whoever reads it."""

from typing import Final

LONGEST: Final = 2000
"""Bytes of UTF-8 that a text for people may have. A gRPC status travels in a header, three bytes for each of those that
are not ASCII, and peers bound all headers of an answer together, at 8 KiB as a rule: beyond that its code is now and
then another one (findings/grpcio-long-status-message.sh)."""


def printable(text: str) -> str:
    r"""`text` with whatever a terminal may act upon, or no encoding knows, written out: \x1b, \n, \u202e.

    Bytes of names that are not UTF-8 (PEP 383) are shown as such: \xe9.
    """
    return text if text.isprintable() else "".join(one if one.isprintable() else _written_out(one) for one in text)


def one_line(text: str, most: int) -> str:
    """What somebody else's program said, as a part of a sentence of ours: `printable`, at most so many characters."""
    return printable(" ".join(text.split()))[:most]


def shortened(text: str) -> str:
    """`text`, or if it is longer than LONGEST its beginning and end, and what it had between them."""
    if len(text) * 4 <= LONGEST or len(data := text.encode(errors="backslashreplace")) <= LONGEST:
        return text
    kept = (LONGEST - 100) // 2
    head, tail = (part.decode(errors="ignore") for part in (data[:kept], data[-kept:]))
    return f"{head}… ({len(data) - 2 * kept} of {len(data)} bytes are left out here) …{tail}"


def without_surrogates(value: object) -> object:
    """A value of plain types in which `printable` was done to texts that cannot be encoded."""
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_surrogates(each) for each in value]
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        return printable(value)
    return value


def _written_out(letter: str) -> str:
    number = ord(letter)
    return f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else letter.encode("unicode_escape").decode()
