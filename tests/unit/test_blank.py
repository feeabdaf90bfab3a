"""Where anything was ever written, as the proofs before formatting see it."""

import os
import random
from pathlib import Path

import pytest

from csi_driver.luks.blank import sample_spans, written_spans
from csi_driver.luks.never_mounted import _is_table

MIB = 1 << 20


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A file of 64 MiB to which something was written at 1 and 40 MiB."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
        for at in (MIB, 40 * MIB):
            file.seek(at)
            file.write(b"x")
    return path


def test_of_a_sparse_file_all_that_was_written_is_known_and_little_else(sparse: Path) -> None:
    spans = written_spans(str(sparse), 0, 64 * MIB)
    assert spans is not None
    for at in (MIB, 40 * MIB):
        assert any(start <= at < end for start, end in spans)
    assert sum(end - start for start, end in spans) <= 2 * MIB
    assert written_spans(str(sparse), 8 * MIB, 32 * MIB) == []
    assert written_spans(str(sparse), 48 * MIB, 64 * MIB) == [], "only a hole is left"


def test_what_begins_before_a_part_and_ends_behind_it_is_cut(sparse: Path) -> None:
    with sparse.open("r+b") as file:
        os.pwrite(file.fileno(), bytes(2 * MIB), 9 * MIB)
    spans = written_spans(str(sparse), 10 * MIB, 64 * MIB)
    assert spans is not None
    assert spans[0][0] == 10 * MIB
    assert written_spans(str(sparse), 9 * MIB, 10 * MIB) is None, "all of that part is data"


def test_without_a_file_that_knows_nothing_is_known(sparse: Path) -> None:
    assert written_spans(None, 0, MIB) is None
    assert written_spans("/dev/null", 0, MIB) is None
    with sparse.open("r+b") as file:
        file.write(b"x" * 64 * MIB)
    assert written_spans(str(sparse), 0, 64 * MIB) is None


@pytest.mark.parametrize(("start", "end"), [(0, MIB), (16 * MIB, 17 * MIB + 512), (3 * MIB, 1 << 40), (5, 6), (7, 7)])
def test_samples_are_inside_and_in_order(start: int, end: int) -> None:
    spans = list(sample_spans(start, end))
    assert all(start <= first < last <= end for first, last in spans)
    assert spans == sorted(spans)
    assert len(spans) == (64 if end - start >= 64 else 0)


TABLES = {
    "zeros": bytes(512),
    "the end of a bitmap": bytes(100) + b"\xff" * 412,
    "block numbers, little": b"".join(number.to_bytes(4, "little") for number in range(1 << 20, (1 << 20) + 128)),
    "block numbers, big": b"".join(number.to_bytes(4, "big") for number in range(1 << 20, (1 << 20) + 128)),
    "a folder": b"\x02\0\0\0\x0c\0\1\2.\0\0\0\x0b\0\0\0\xf4\x03\x0a\2lost+found".ljust(512, b"\0"),
}
CONTENT = {
    "a short text": b"diary of a journey".ljust(512, b"\0"),
    "a text": (b"once upon a time, " * 30)[:512],
    "noise": random.Random(1).randbytes(512),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_a_file_system_are_told(name: str) -> None:
    assert _is_table(TABLES[name])


@pytest.mark.parametrize("name", CONTENT)
def test_content_is_no_table(name: str) -> None:
    assert not _is_table(CONTENT[name])
