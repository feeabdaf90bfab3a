"""The LUKS2 parser against headers that the real cryptsetup wrote, and against damage."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from csi_driver.luks.header import HEADER_SIZES, Copy, Header, parse, repaired
from csi_driver.luks.header_metadata import Argon2i, Argon2id, Pbkdf2
from csi_driver.model.errors import DeviceBlank, DeviceMismatch, ForeignSignature, InvalidHeader
from tests.headers import (
    BINARY_SIZE,
    CHEAP_PBKDF2,
    FIELDS,
    HDR_SIZE,
    OTHER_UUID,
    PASSPHRASE,
    UUID,
    WHERE,
    accepts,
    checksummed,
    forged,
    format_file,
    formatted,
    head_of,
    metadata_of,
    run_cryptsetup,
    with_field,
    with_json,
    write_sparse,
)

_SMALL = 2 * HDR_SIZE
_VARIANTS = (
    ("--cipher", "aes-xts-plain64", "--key-size", "512", "--sector-size", "512", *CHEAP_PBKDF2),
    ("--cipher", "aes-xts-plain64", "--key-size", "256", "--sector-size", "4096", "--label", "größe", *CHEAP_PBKDF2),
    ("--cipher", "aes-xts-plain", "--key-size", "256", "--hash", "sha384", "--subsystem", "ours", *CHEAP_PBKDF2),
    ("--cipher", "aes-cbc-essiv:sha256", "--key-size", "256", "--sector-size", "512", *CHEAP_PBKDF2),
    ("--cipher", "aes-cbc-plain", "--key-size", "256", "--sector-size", "512", *CHEAP_PBKDF2),
    ("--cipher", "aes-cbc-plain64", "--key-size", "128", "--sector-size", "1024", *CHEAP_PBKDF2),
    ("--luks2-metadata-size", "65536", *CHEAP_PBKDF2),
    *(
        ("--pbkdf", kdf, "--pbkdf-force-iterations", "4", "--pbkdf-memory", "32", "--pbkdf-parallel", "1", *more)
        for kdf, more in (("argon2id", ("--hash", "sha512")), ("argon2i", ()))
    ),
)


def small() -> bytes:
    """Both copies of a real header and nothing more."""
    return formatted()[:_SMALL]


def facts(header: Header) -> Header:
    """What `header` says, whichever copy said it."""
    return replace(header, source=Copy.PRIMARY, damaged_copy=None)


def as_json(header: Header) -> dict[str, Any]:
    """The metadata part of `header` in the form that luksDump prints."""
    parts = {name: getattr(header, name) for name in ("keyslots", "tokens", "segments", "digests", "config")}
    made: dict[str, Any] = json.loads(msgspec.json.encode(parts, enc_hook=str))
    for slot in made["keyslots"].values():
        assert slot.pop("priority") == 1
    for segment in made["segments"].values():
        assert segment.pop("flags") == []
        assert segment.pop("integrity") is None
    assert made["config"].pop("flags") == []
    assert made["config"].pop("requirements") is None
    return made


@pytest.mark.parametrize("options", _VARIANTS, ids=lambda options: " ".join(options[:4]))
def test_parse_says_what_luksdump_says(options: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    format_file(path, *options)
    area = head_of(path)
    header = parse(area, WHERE)
    assert as_json(header) == json.loads(run_cryptsetup("luksDump", "--dump-json-metadata", str(path)))
    dump = run_cryptsetup("luksDump", str(path)).decode()
    assert f"Epoch:         \t{header.seqid}\n" in dump
    assert f"Metadata area: \t{header.hdr_size} [bytes]" in dump
    assert f"Label:         \t{header.label or '(no label)'}\n" in dump
    assert f"Subsystem:     \t{header.subsystem or '(no subsystem)'}\n" in dump
    assert header.uuid == UUID
    assert (header.source, header.damaged_copy) == (Copy.PRIMARY, None)
    assert repaired(area, header) is area
    (slot,) = header.keyslots.values()
    kinds = {"argon2id": Argon2id, "argon2i": Argon2i}
    assert type(slot.kdf) is kinds.get(options[1], Pbkdf2)


def test_tokens_slots_and_priorities_that_cryptsetup_adds_are_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    format_file(path, *CHEAP_PBKDF2)
    second = tmp_path / "second"
    second.write_bytes(b"another passphrase")
    run_cryptsetup("luksAddKey", "-q", "--key-file", "-", *CHEAP_PBKDF2, str(path), str(second), key=PASSPHRASE)
    run_cryptsetup("config", "--key-slot", "1", "--priority", "prefer", str(path))
    token = b'{"type":"luks-csi","keyslots":["0"],"volume":"a/b","nested":{"more":[1,2.5,null]}}'
    run_cryptsetup("token", "import", "--json-file", "-", str(path), key=token)
    header = parse(head_of(path)[:_SMALL], WHERE)
    assert sorted(header.keyslots) == ["0", "1"]
    assert [header.keyslots[key].priority for key in "01"] == [1, 2]
    assert (header.tokens["0"].type, header.tokens["0"].keyslots) == ("luks-csi", ("0",))
    assert sorted(next(iter(header.digests.values())).keyslots) == ["0", "1"]


def test_key_digest_is_the_hexadecimal_one_of_luksdump(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    format_file(path, *CHEAP_PBKDF2)
    dump = run_cryptsetup("luksDump", str(path)).decode()
    shown = "".join(dump.split("Digest:     ", 1)[1].split())
    assert parse(head_of(path)[:_SMALL], WHERE).key_digest == shown


def _newer(area: bytes, offset: int) -> bytes:
    """The copy at `offset` as a cut update leaves it: written whole, with another label, the other copy still old."""
    (seqid,) = struct.unpack_from(">Q", area, 16)
    area = with_field(area, "seqid", seqid + 1, offset)
    return checksummed(with_field(area, "label", b"newer", offset), offset)


def _torn(area: bytes, offset: int) -> bytes:
    """The copy at `offset` as libcryptsetup first writes it: without its checksum."""
    return with_field(area, "csum", bytes(64), offset)


def _zeroed(area: bytes, offset: int) -> bytes:
    return area[:offset] + bytes(BINARY_SIZE) + area[offset + BINARY_SIZE :]


@pytest.mark.parametrize(
    ("change", "offset", "source"),
    [
        (_newer, 0, Copy.PRIMARY),
        (_newer, HDR_SIZE, Copy.SECONDARY),
        (_torn, 0, Copy.SECONDARY),
        (_torn, HDR_SIZE, Copy.PRIMARY),
        (_zeroed, 0, Copy.SECONDARY),
        (_zeroed, HDR_SIZE, Copy.PRIMARY),
    ],
)
def test_one_good_copy_is_the_header_for_us_and_for_cryptsetup(
    change: Callable[[bytes, int], bytes], offset: int, source: Copy, tmp_path: Path
) -> None:
    area = formatted()[:131072]
    if change is not _newer:
        area = _newer(_newer(area, 0), HDR_SIZE)
    cut = change(area, offset)
    header = parse(cut, WHERE)
    other = {Copy.PRIMARY: Copy.SECONDARY, Copy.SECONDARY: Copy.PRIMARY}
    assert (header.source, header.damaged_copy) == (source, other[source])
    assert header.label == "newer"

    whole = repaired(cut, header)
    again = parse(whole, WHERE)
    assert again.damaged_copy is None
    assert facts(again) == facts(header)
    assert whole[_SMALL:] == area[_SMALL:]

    path = tmp_path / "disk.img"
    write_sparse(path, whole)
    assert b"newer" in run_cryptsetup("luksDump", str(path))
    assert head_of(path)[:_SMALL] == whole[:_SMALL], "cryptsetup found something to recover"
    write_sparse(path, cut)
    assert b"newer" in run_cryptsetup("luksDump", str(path)), "cryptsetup takes the other copy"


def test_the_secondary_copy_is_found_at_every_place_it_may_have() -> None:
    for size in HEADER_SIZES:
        area = bytes(BINARY_SIZE) + _resized(size)[BINARY_SIZE:]
        header = parse(area, WHERE)
        assert (header.hdr_size, header.source, header.damaged_copy) == (size, Copy.SECONDARY, Copy.PRIMARY)


def _resized(size: int) -> bytes:
    """A real header made anew with copies of `size` bytes, a multiple of 512."""
    real = formatted()
    config = {"config": {"json_size": str(size - BINARY_SIZE), "keyslots_size": "0"}}
    text = msgspec.json.encode(metadata_of(real) | config)
    area = bytes(2 * size)
    for offset, binary in ((0, real[:BINARY_SIZE]), (size, real[HDR_SIZE : HDR_SIZE + BINARY_SIZE])):
        area = area[:offset] + (binary + text).ljust(size, b"\0") + area[offset + size :]
        area = with_field(with_field(area, "hdr_size", size, offset), "hdr_offset", offset, offset)
        area = checksummed(area, offset, size)
    return area


def test_a_header_size_that_is_no_power_of_two_is_refused() -> None:
    assert parse(_resized(32768), WHERE).hdr_size == 32768
    with pytest.raises(InvalidHeader, match="a power of two, found 20480 bytes"):
        parse(_resized(20480), WHERE)


def test_sha512_checksums_are_read() -> None:
    area = small()
    for offset in (0, HDR_SIZE):
        area = checksummed(with_field(area, "checksum_alg", b"sha512", offset), offset)
    assert facts(parse(area, WHERE)) == facts(parse(small(), WHERE))


def _both(field: str, value: bytes | int) -> bytes:
    area = small()
    for offset in (0, HDR_SIZE):
        area = checksummed(with_field(area, field, value, offset), offset)
    return area


def _text(change: tuple[bytes, bytes]) -> bytes:
    text = small()[BINARY_SIZE:HDR_SIZE].rstrip(b"\0")
    assert change[0] in text
    return with_json(small(), text.replace(*change, 1))


_SHAPE = "its JSON metadata cannot be read"
_FORM = "as libcryptsetup writes it"


@pytest.mark.parametrize(
    ("area", "message"),
    [
        (lambda: _torn(_torn(small(), 0), HDR_SIZE), "found both damaged"),
        (lambda: _zeroed(_torn(small(), 0), HDR_SIZE), "found both damaged"),
        (lambda: _both("version", 3), "found both damaged"),
        (lambda: _both("hdr_size", 1 << 40), "found both damaged"),
        (lambda: _both("uuid", b"../../etc"), "expected a UUID, found '../../etc'"),
        (lambda: _both("checksum_alg", b"sha1"), "expected checksum algorithm sha256 or sha512, found 'sha1'"),
        (
            lambda: checksummed(with_field(small(), "uuid", OTHER_UUID.encode()), 0),
            f"different UUIDs, '{OTHER_UUID}' and",
        ),
        (lambda: checksummed(with_field(small(), "label", b"x"), 0), "same sequence id 3 and different content"),
        (lambda: with_json(small(), b"{}", (0,)), "same sequence id 3 and different content"),
        (lambda: small()[:-1], "expected two copies of 16384 bytes, found 32767 bytes"),
        (lambda: small()[:HDR_SIZE], "expected two copies of 16384 bytes, found 16384 bytes"),
        (lambda: _zeroed(small(), 0)[:-1], "expected 16384 bytes of header at offset 16384, found 16383"),
        (lambda: with_json(small(), b"\0"), _SHAPE),
        (lambda: with_json(small(), b"[]"), _SHAPE),
        (lambda: with_json(small(), b"{" * 12287), _SHAPE),
        (lambda: with_json(small(), b"[" * 12287), _SHAPE),
        (lambda: with_json(small(), b"\xff\xfe{}"), _SHAPE),
        (lambda: with_json(small(), b'{"keyslots":{}}'), _SHAPE),
        (lambda: with_json(small(), b" " * 12288), "expected zeros behind the JSON metadata"),
        (lambda: with_json(small(), b"{}\0{}"), "expected zeros behind the JSON metadata"),
        (lambda: _text((b'{"keyslots"', b' {"keyslots"')), _FORM),
        (lambda: _text((b'"tokens":{}', b'"tokens":{},"tokens":{}')), _FORM),
        (lambda: _text((b'"key_size":64', b'"key_size":6.4e1')), _FORM),
        (lambda: _text((b'"type":"luks2"', b'"type":"reencrypt","type":"luks2"')), _FORM),
        (lambda: _text((b'"crypt"', b'"cryp\\u0074"')), _FORM),
        (lambda: _text((b'"tokens"', b'"segments\\u0000":{},"tokens"')), _FORM),
        (lambda: _text((b'"tokens":{}', b'/* */"tokens":{}')), _SHAPE),
        (lambda: _text((b'"iterations":1000', b'"iterations":NaN')), _SHAPE),
        (lambda: _text((b'"iterations":1000', b'"iterations":-1')), _SHAPE),
        (lambda: _text((b'"iterations":1000', b'"iterations":18446744073709551616')), _SHAPE),
        (lambda: _text((b'"iterations":1000', b'"iterations":"1000"')), _SHAPE),
        (lambda: _text((b'"16777216"', b"16777216")), "Expected a decimal number in a string"),
        (lambda: _text((b'"16777216"', b'"016777216"')), "Expected a decimal number in a string"),
        (lambda: _text((b'"16777216"', b'"16777216 "')), "Expected a decimal number in a string"),
        (lambda: _text((b'"16777216"', b'"99999999999999999999"')), "Expected a decimal number in a string"),
        (lambda: _text((b'"0":{"type":"luks2"', b'"00":{"type":"luks2"')), _SHAPE),
        (lambda: _text((b'"0":{"type":"luks2"', b'"32":{"type":"luks2"')), _SHAPE),
        (
            lambda: _text((b'"type":"luks2"', b'"type":"reencrypt"')),
            "expected type 'luks2' in keyslots 0, found 'reencrypt'",
        ),
        (lambda: _text((b'"type":"crypt"', b'"type":"linear"')), "expected type 'crypt' in segments 0, found 'linear'"),
        (
            lambda: _text((b'"type":"crypt"', b'"type":"hw-opal"')),
            "expected type 'crypt' in segments 0, found 'hw-opal'",
        ),
        (lambda: _text((b'"type":"raw"', b'"type":"journal"')), "Invalid enum value 'journal'"),
        (lambda: _text((b'"type":"luks1"', b'"type":"none"')), "Invalid enum value 'none'"),
        (lambda: _text((b'"json_size":"12288"', b'"json_size":"28672"')), "expected json_size 12288, found 28672"),
        (lambda: _text((b'"tokens":{}', b'"tokens":{},"surprise":{}')), "unknown field `surprise`"),
    ],
)
def test_a_header_that_is_not_luks2_metadata_is_refused_in_one_sentence(
    area: Callable[[], bytes], message: str
) -> None:
    with pytest.raises(InvalidHeader) as caught:
        parse(area(), WHERE)
    text = str(caught.value)
    assert message in text
    assert f"the LUKS2 header of {WHERE} is refused: expected" in text or "refused: its " in text
    assert len(text) < 600
    assert text.isprintable()


def test_a_long_or_unprintable_name_does_not_get_into_the_sentence() -> None:
    def rename(metadata: dict[str, object]) -> None:
        metadata["config"] = {"json_size": "12288", "keyslots_size": "0", "flags\n" + "x" * 9000: []}

    with pytest.raises(InvalidHeader) as caught:
        parse(forged(small(), rename), WHERE)
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


def test_the_slash_may_be_escaped_as_older_json_c_does() -> None:
    text = small()[BINARY_SIZE:HDR_SIZE].rstrip(b"\0")
    token = b'"tokens":{"0":{"type":"a/b","keyslots":[]}}'
    plain = with_json(small(), text.replace(b'"tokens":{}', token))
    escaped = with_json(small(), text.replace(b'"tokens":{}', token).replace(b"/", b"\\/"))
    assert plain != escaped
    assert parse(escaped, WHERE) == parse(plain, WHERE)


def test_a_name_that_two_readers_understand_differently_is_refused(tmp_path: Path) -> None:
    """The reason for asking for one form: cryptsetup believes the second, forged segments."""
    text = formatted()[BINARY_SIZE:HDR_SIZE].rstrip(b"\0")
    segments = msgspec.json.encode(metadata_of(formatted())["segments"])
    null = segments.replace(b"aes-xts-plain64", b"cipher_null-ecb")
    area = with_json(formatted(), text.replace(b',"config"', b',"segments\\u0000":' + null + b',"config"'))
    assert accepts(area)
    path = tmp_path / "disk.img"
    write_sparse(path, area)
    assert b"cipher: cipher_null-ecb" in run_cryptsetup("luksDump", str(path))
    with pytest.raises(InvalidHeader, match=_FORM):
        parse(area, WHERE)


def test_blank_luks1_and_foreign_devices_are_each_named() -> None:
    with pytest.raises(DeviceBlank, match=f"on {WHERE}, found only zeros in its first 32768 bytes"):
        parse(bytes(_SMALL), WHERE)
    with pytest.raises(ForeignSignature, match="found LUKS version 1"):
        parse(with_field(small(), "version", 1), WHERE)
    with pytest.raises(ForeignSignature, match="found other data at its start"):
        parse(b"EFI PART" + small()[8:], WHERE)
    with pytest.raises(ForeignSignature, match="found other data at its start"):
        parse(bytes(1080) + b"\x53\xef" + bytes(8192), WHERE)


@given(st.binary(max_size=6000))
def test_any_bytes_end_in_our_own_errors(content: bytes) -> None:
    for area in (content, b"LUKS\xba\xbe\0\2" + content, bytes(HDR_SIZE) + b"SKUL\xba\xbe\0\2" + content):
        with pytest.raises((InvalidHeader, DeviceMismatch)):
            parse(area, WHERE)


@settings(max_examples=50)
@given(st.data())
def test_damage_is_survived_or_refused_never_believed(data: st.DataObject) -> None:
    """Random bytes over a real header: the same facts, or an error of ours."""
    area = bytearray(small())
    original = facts(parse(small(), WHERE))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(
            st.one_of(st.integers(0, 512), st.integers(HDR_SIZE, HDR_SIZE + 512), st.integers(0, _SMALL - 1))
        )
        piece = data.draw(st.binary(min_size=1, max_size=600))
        area[at : at + len(piece)] = piece[: _SMALL - at]
    try:
        found = parse(bytes(area), WHERE)
    except (InvalidHeader, ForeignSignature, DeviceBlank):
        return
    assert facts(found) == original


@settings(max_examples=50)
@given(st.data())
def test_forged_bytes_in_the_metadata_end_in_our_own_errors(data: st.DataObject) -> None:
    """The same with right checksums: what is believed has passed every check of form and type."""
    text = bytearray(small()[BINARY_SIZE:HDR_SIZE].rstrip(b"\0"))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b'"', b"{", b"}", b"\\", b"9", b"\0"]))
        text[at : at + data.draw(st.integers(0, 8))] = piece
    try:
        found = parse(with_json(small(), bytes(text)), WHERE)
    except InvalidHeader:
        return
    assert found.config.json_size == HDR_SIZE - BINARY_SIZE


@given(st.sampled_from(sorted(set(FIELDS) - {"csum", "checksum_alg"})), st.binary(min_size=8, max_size=64), st.data())
def test_forged_fields_of_the_binary_header_end_in_our_own_errors(
    field: str, value: bytes, data: st.DataObject
) -> None:
    offset = data.draw(st.sampled_from([0, HDR_SIZE]))
    at = offset + FIELDS[field][0]
    size = struct.calcsize(FIELDS[field][1])
    area = small()[:at] + value[:size].ljust(size, b"\0") + small()[at + size :]
    try:
        found = parse(checksummed(area, offset), WHERE)
    except (InvalidHeader, ForeignSignature):
        return
    assert found.uuid == UUID
    assert found.keyslots == parse(small(), WHERE).keyslots
