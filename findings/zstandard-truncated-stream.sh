#!/bin/sh
# What is left of a cut .zst file reads as a whole one, by each of four ways that zstandard has of reading a stream; and
# one of the four ends behind the first of several frames.
#
# Version:  zstandard 0.25.0, CPython's gzip, bz2 and lzma.
# Expected: half of a compressed file is an error when its end comes, as gzip, bz2 and lzma have it (EOFError): else who
#           unpacks a download that was cut has a shorter file and does not know. Frames one behind the other, as pzstd
#           and "cat a.zst b.zst" make them, are one stream, as for zstd(1).
# Seen:     stream_reader, open, copy_stream and read_to_iter give what was there and then the end, without an error, for
#           a file cut in half, or by its last four bytes. Of two frames read_to_iter gives the first and says nothing of
#           the second; the other three give both.
# Needs:    python3 with venv, PyPI.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv >/dev/null || exit 2
venv/bin/pip install --quiet zstandard==0.25.0 || exit 2
cat >try.py <<'PY'
import bz2
import gzip
import io
import lzma
import random

import zstandard

DATA = random.Random(1).randbytes(1 << 20)
compress, reading = zstandard.ZstdCompressor().compress, zstandard.ZstdDecompressor


def copied(source):
    target = io.BytesIO()
    reading().copy_stream(source, target)
    return target.getvalue()


WAYS = {
    "stream_reader": lambda source: reading().stream_reader(source).read(),
    "open": lambda source: zstandard.open(source).read(),
    "copy_stream": copied,
    "read_to_iter": lambda source: b"".join(reading().read_to_iter(source)),
}
STANDARD = {
    "gzip": (gzip.compress, lambda source: gzip.open(source).read()),
    "bz2": (bz2.compress, lambda source: bz2.open(source).read()),
    "lzma": (lzma.compress, lambda source: lzma.open(source).read()),
}


def what(read, content):
    try:
        found = read(io.BytesIO(content))
    except (EOFError, zstandard.ZstdError) as error:
        return type(error).__name__
    return "all" if found == DATA else "the beginning" if DATA.startswith(found) else "something else"


for name, (pack, read) in STANDARD.items():
    packed = pack(DATA)
    if (what(read, packed), what(read, packed[: len(packed) // 2])) != ("all", "EOFError"):
        raise SystemExit(2)
whole, half = compress(DATA), len(DATA) // 2
two = compress(DATA[:half]) + compress(DATA[half:])
found = {
    name: tuple(what(read, content) for content in (whole, whole[: len(whole) // 2], whole[:-4], two))
    for name, read in WAYS.items()
}
for name, (full, cut, last, frames) in found.items():
    print(f"{name}: whole {full}; half of it {cut}; without its last 4 bytes {last}; two frames {frames}")
begun = ("all", "the beginning", "the beginning")
expected = {name: (*begun, "the beginning" if name == "read_to_iter" else "all") for name in WAYS}
raise SystemExit(0 if found == expected else 1)
PY
venv/bin/python try.py
