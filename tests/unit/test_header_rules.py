"""What the driver refuses of a header whose checksums are right: each rule, and that nothing forged gets by."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csi_driver.luks.formats import ARGON2_DEFAULT_MEMORY_KIB, CIPHER_KEY_BITS
from csi_driver.luks.header import parse
from csi_driver.luks.header_rules import DEFAULT_LIMITS, Limits, validate
from csi_driver.model.errors import DeviceShort, ForeignSignature, InvalidHeader
from csi_driver.model.volume import LuksIdentity
from tests.headers import (
    BINARY_SIZE,
    CHEAP_PBKDF2,
    DATA_OFFSET,
    DEVICE_SIZE,
    HDR_SIZE,
    OTHER_UUID,
    PASSPHRASE,
    UUID,
    WHERE,
    Change,
    Metadata,
    accepts,
    forged,
    format_file,
    formatted,
    head_of,
    run_cryptsetup,
    with_json,
)

_SMALL = 2 * HDR_SIZE
_ARGON2 = ("--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "32", "--pbkdf-parallel", "1")


def small(*options: str) -> bytes:
    return formatted(*options)[:_SMALL]


def identity(
    *,
    uuid: str = UUID,
    cipher: str = "aes-xts-plain64",
    key_bits: int = 512,
    sector_size: int = 512,
    data_offset: int = DATA_OFFSET,
    digest: str | None = None,
) -> LuksIdentity:
    return LuksIdentity(
        uuid=uuid, cipher=cipher, key_bits=key_bits, sector_size=sector_size, data_offset=data_offset, digest=digest
    )


def check(
    area: bytes,
    expected: LuksIdentity | None = None,
    *,
    device_size: int = DEVICE_SIZE,
    limits: Limits = DEFAULT_LIMITS,
    keyslots: Collection[int] | None = None,
) -> None:
    validate(parse(area, WHERE), expected or identity(), device_size, WHERE, limits=limits, keyslots=keyslots)


def put(path: str, value: object) -> Change:
    """A change of the one member at `path`, parts of which are divided by dots."""
    *parents, last = path.split(".")

    def change(metadata: Metadata) -> None:
        target: Any = metadata
        for parent in parents:
            target = target[parent]
        target[last] = value

    return change


def add_slot(**area: object) -> Change:
    """A second key slot like the first, bound to the digest, its area changed by `area`."""

    def change(metadata: Metadata) -> None:
        slot = metadata["keyslots"]["0"]
        placed = {"offset": str(32768 + 258048), **area}
        metadata["keyslots"]["1"] = slot | {"area": slot["area"] | placed}
        metadata["digests"]["0"]["keyslots"].append("1")

    return change


def many_slots(metadata: Metadata) -> None:
    slot = metadata["keyslots"]["0"]
    for number in range(1, 9):
        metadata["keyslots"][str(number)] = slot | {"area": slot["area"] | {"offset": str(32768 + number * 258048)}}
    metadata["digests"]["0"]["keyslots"] = [str(number) for number in range(9)]


def second_segment(**changes: object) -> Change:
    def change(metadata: Metadata) -> None:
        metadata["segments"]["1"] = metadata["segments"]["0"] | {"offset": str(DATA_OFFSET + 512), **changes}

    return change


def drop_keyslots(metadata: Metadata) -> None:
    """What luksFormat leaves when it is killed in its key derivation (measured)."""
    metadata["keyslots"] = {}
    metadata["digests"]["0"]["keyslots"] = []


def second_digest(metadata: Metadata) -> None:
    metadata["digests"]["1"] = metadata["digests"]["0"] | {"keyslots": []}


@pytest.mark.parametrize(
    ("cipher", "key_bits", "sector_size"),
    [
        ("aes-xts-plain64", 512, 4096),
        ("aes-xts-plain64", 256, 512),
        ("aes-xts-plain", 256, 1024),
        ("aes-cbc-plain64", 192, 2048),
        ("aes-cbc-plain", 128, 512),
        ("aes-cbc-essiv:sha256", 256, 512),
    ],
)
def test_what_cryptsetup_makes_of_our_choices_is_accepted(cipher: str, key_bits: int, sector_size: int) -> None:
    options = ("--cipher", cipher, "--key-size", str(key_bits), "--sector-size", str(sector_size), *CHEAP_PBKDF2)
    area = small(*options)
    pinned = parse(area, WHERE).key_digest
    expected = identity(cipher=cipher, key_bits=key_bits, sector_size=sector_size, digest=pinned)
    check(area, expected, keyslots=(0,))


def test_the_driver_s_default_format_is_accepted() -> None:
    area = small("--sector-size", "512", "--key-size", "512", *_ARGON2)
    check(forged(area, put("keyslots.0.kdf.memory", ARGON2_DEFAULT_MEMORY_KIB)))


def test_a_second_key_slot_and_a_token_by_cryptsetup_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    format_file(path, "--sector-size", "512", "--key-size", "512", *CHEAP_PBKDF2)
    second = tmp_path / "second"
    second.write_bytes(b"another passphrase")
    run_cryptsetup("luksAddKey", "-q", "--key-file", "-", *CHEAP_PBKDF2, str(path), str(second), key=PASSPHRASE)
    run_cryptsetup("token", "import", "--json-file", "-", str(path), key=b'{"type":"luks-csi","keyslots":["1"]}')
    area = head_of(path)[:_SMALL]
    check(area, keyslots=(0, 1))
    with pytest.raises(InvalidHeader, match="expected key slots 0, found 0, 1"):
        check(area, keyslots=(0,))


NULL = "cipher_null-ecb"
RULES: list[tuple[Change, str]] = [
    # CVE-2021-4122: metadata of a reencryption that nobody started
    (put("config.requirements", {"mandatory": ["online-reencrypt"]}), "no requirements, found online-reencrypt;"),
    (put("config.requirements", {"mandatory": ["online-reencrypt-v2"]}), "no requirements, found online-reencrypt-v2"),
    (put("config.requirements", {"mandatory": ["unheard-of"]}), "no requirements, found unheard-of"),
    (put("keyslots.0.type", "reencrypt"), "expected type 'luks2' in keyslots 0, found 'reencrypt'"),
    (second_segment(), "expected segment 0 alone, found 0, 1"),
    (second_segment(flags=["backup-final"]), "expected segment 0 alone, found 0, 1"),
    (put("segments.0.flags", ["backup-previous"]), "expected no segment flags, found backup-previous"),
    (put("segments.0.flags", ["in-reencryption"]), "expected no segment flags, found in-reencryption"),
    # CVE-2025-59054, CVE-2025-58356: null ciphers
    (put("segments.0.encryption", NULL), f"in segment 0, found '{NULL}'"),
    (put("segments.0.encryption", "null"), "in segment 0, found 'null'"),
    (put("segments.0.encryption", "capi:xts(aes)-plain64"), "in segment 0, found 'capi:xts(aes)-plain64'"),
    (put("segments.0.encryption", "aes-ecb"), "in segment 0, found 'aes-ecb'"),
    (put("segments.0.encryption", ""), "in segment 0, found ''"),
    (put("keyslots.0.area.encryption", NULL), f"in key slot 0, found '{NULL}'"),
    # the data segment is where and what the record says
    (
        put("segments.0.encryption", "aes-xts-plain"),
        "expected cipher aes-xts-plain64 in segment 0, found aes-xts-plain;",
    ),
    (put("segments.0.offset", "16781312"), "expected offset 16777216 in segment 0, found 16781312"),
    (put("segments.0.size", "4096"), "expected size dynamic in segment 0, found 4096"),
    (put("segments.0.iv_tweak", "8"), "expected iv_tweak 0 in segment 0, found 8"),
    (put("segments.0.sector_size", 4096), "expected sector size 512 in segment 0, found 4096"),
    (
        put("segments.0.integrity", {"type": "none", "journal_encryption": "none", "journal_integrity": "none"}),
        "expected no integrity in segment 0, found some",
    ),
    (put("segments", {}), "expected segment 0 alone, found none"),
    (put("config.flags", ["allow-discards"]), "no persistent activation flags, found allow-discards"),
    (put("config.keyslots_size", "268435456"), "at most 134217728 bytes for the key slot area, found 268435456"),
    (put("config.keyslots_size", "16748544"), "to end before the data at 16777216, found its end at 16781312"),
    # the digest
    (put("digests", {}), "expected one digest, found 0"),
    (second_digest, "expected one digest, found 2"),
    (put("digests.0.segments", []), "expected the digest to be of segment 0, found none"),
    (put("digests.0.segments", ["0", "1"]), "expected the digest to be of segment 0, found 0, 1"),
    (put("digests.0.keyslots", []), "expected the digest to be of every key slot (0), found none"),
    (put("digests.0.keyslots", ["0", "0"]), "expected the digest to be of every key slot (0), found 0, 0"),
    (put("digests.0.hash", "sha1"), "expected one of the hashes sha256, sha384, sha512 in digest, found 'sha1'"),
    (put("digests.0.hash", "sha512"), "expected a digest of 64 bytes, found 32"),
    (put("digests.0.digest", "AAAA"), "expected a digest of 32 bytes, found 3"),
    (put("digests.0.salt", "AAAA"), "expected a salt of 32 bytes in digest, found 3"),
    (put("digests.0.iterations", 4_000_000_000), "1000 to 10000000 PBKDF2 iterations in digest, found 4000000000"),
    # key slots
    (drop_keyslots, "expected 1 to 8 key slots, found 0"),
    (many_slots, "expected 1 to 8 key slots, found 9"),
    (put("keyslots.0.key_size", 32), "expected a key of 512 bits in key slot 0, found 256"),
    (put("keyslots.0.priority", 0), "expected key slot 0 to be in use, found priority 0"),
    (put("keyslots.0.area.key_size", 16), "a key of 256, 384, 512 bits for aes-xts-plain64 in key slot 0, found 128"),
    (put("keyslots.0.af.stripes", 1), "expected 4000 stripes in key slot 0, found 1"),
    (put("keyslots.0.af.hash", "crc32"), "sha512 in key slot 0, found 'crc32'"),
    (put("keyslots.0.kdf.hash", "md5"), "sha512 in key slot 0, found 'md5'"),
    (put("keyslots.0.kdf.salt", ""), "expected a salt of 32 bytes in key slot 0, found 0"),
    (put("keyslots.0.kdf.iterations", 10_000_001), "10000000 PBKDF2 iterations in key slot 0, found 10000001"),
    (put("keyslots.0.kdf.iterations", 999), "expected 1000 to 10000000 PBKDF2 iterations in key slot 0, found 999"),
    # their areas
    (put("keyslots.0.area.offset", "28672"), "area of key slot 0 within 32768 to 16777216, found 28672 to 286720"),
    (put("keyslots.0.area.offset", "16777216"), "area of key slot 0 within 32768 to 16777216, found 16777216 to"),
    (put("keyslots.0.area.size", "16748544"), "area of key slot 0 within 32768 to 16777216, found 32768 to 16781312"),
    (put("keyslots.0.area.offset", "33280"), "to begin at a multiple of 4096, found 33280"),
    (put("keyslots.0.area.size", "255488"), "expected at least 256000 bytes for the area of key slot 0, found 255488"),
    (add_slot(offset="32768"), "those of key slots 0 and 1 to overlap"),
    (add_slot(offset="286720"), "those of key slots 0 and 1 to overlap"),
    (add_slot(encryption=NULL), f"in key slot 1, found '{NULL}'"),
    # tokens
    (put("tokens", {"0": {"type": "x", "keyslots": ["7"]}}), "expected token 0 to name existing key slots, found 7"),
]


@pytest.mark.parametrize(("change", "message"), RULES)
def test_a_forged_header_is_refused_naming_what_was_expected_and_found(change: Change, message: str) -> None:
    with pytest.raises(InvalidHeader) as caught:
        check(forged(small(), change))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"the LUKS2 header of {WHERE} is refused: ")


def test_the_changes_of_these_tests_are_refused_for_what_they_change() -> None:
    """An unchanged header and a harmless second slot pass the same way through forging, checksums and checks."""
    check(forged(small(), lambda _: None))
    check(forged(small(), add_slot()))
    check(forged(small(), put("config.requirements", {})))
    check(forged(small(), put("keyslots.0.priority", 2)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("memory", 65537, "expected 32 to 65536 KiB of Argon2 memory in key slot 0, found 65537"),
        ("memory", 4_194_304, "found 4194304"),
        ("memory", 31, "found 31"),
        ("time", 1025, "expected 4 to 1024 Argon2 passes in key slot 0, found 1025"),
        ("time", 3, "found 3"),
        ("cpus", 5, "expected 1 to 4 Argon2 lanes in key slot 0, found 5"),
        ("cpus", 0, "found 0"),
        ("salt", "AAAA", "expected a salt of 32 bytes in key slot 0, found 3"),
    ],
)
def test_a_huge_argon2_cost_is_refused_before_any_key_is_tried(field: str, value: object, message: str) -> None:
    area = small("--sector-size", "512", "--key-size", "512", *_ARGON2)
    with pytest.raises(InvalidHeader) as caught:
        check(forged(area, put(f"keyslots.0.kdf.{field}", value)))
    assert message in str(caught.value)


def test_the_limits_are_the_caller_s() -> None:
    area = small("--sector-size", "512", "--key-size", "512", *_ARGON2)
    huge = forged(area, put("keyslots.0.kdf.memory", 1 << 20))
    check(huge, limits=Limits(memory_kib=1 << 20))
    with pytest.raises(InvalidHeader, match="expected 32 to 1048575 KiB of Argon2 memory in key slot 0, found 1048576"):
        check(huge, limits=Limits(memory_kib=(1 << 20) - 1))


def test_who_needs_more_memory_is_told_how_to_allow_it_and_not_to_restore_the_header() -> None:
    area = small("--sector-size", "512", "--key-size", "512", *_ARGON2)
    with pytest.raises(InvalidHeader, match=r"--pbkdf-memory-limit 1048576Ki, here and at the server") as caught:
        check(forged(area, put("keyslots.0.kdf.memory", 1 << 20)))
    assert "backup" not in str(caught.value)


def test_the_volume_key_digest_is_the_pinned_one() -> None:
    """Another volume key under the same UUID: somebody formatted the device again."""
    pinned = parse(small(), WHERE).key_digest
    check(small(), identity(digest=pinned))
    again = small("--sector-size", "512", "--key-size", "512", "--use-urandom", *CHEAP_PBKDF2)
    found = parse(again, WHERE).key_digest
    with pytest.raises(InvalidHeader, match=f"expected the volume key digest {pinned}, found {found}"):
        check(again, identity(digest=pinned))
    check(again, identity(digest=None))


def test_another_uuid_is_somebody_else_s_device() -> None:
    with pytest.raises(ForeignSignature, match=f"expected LUKS2 with UUID {OTHER_UUID} on {WHERE}, found UUID {UUID}"):
        check(small(), identity(uuid=OTHER_UUID))


@pytest.mark.parametrize("size", [0, DATA_OFFSET, DATA_OFFSET + 511])
def test_a_device_without_room_for_data_is_short(size: int) -> None:
    with pytest.raises(DeviceShort, match=f"expected more than {DATA_OFFSET} bytes on {WHERE}, found {size}"):
        check(small(), device_size=size)
    check(small(), device_size=DATA_OFFSET + 512)


def test_a_header_without_key_slots_is_whole_for_cryptsetup_and_refused_here() -> None:
    """luksFormat killed in its key derivation leaves this; taken for formatted, the volume could never be opened."""
    area = forged(formatted(), drop_keyslots)
    assert parse(area, WHERE).keyslots == {}
    with pytest.raises(InvalidHeader, match="expected key slots 0, found none"):
        check(area, keyslots=(0,))


def test_null_ciphers_are_taken_by_cryptsetup_and_refused_here() -> None:
    area = forged(formatted(), put("segments.0.encryption", NULL))
    assert accepts(area)
    with pytest.raises(InvalidHeader):
        check(area)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (put("segments.0.encryption", NULL), identity(cipher=NULL)),
        (put("segments.0.sector_size", 8192), identity(sector_size=8192)),
    ],
)
def test_a_record_does_not_allow_what_nobody_may_write(change: Change, expected: LuksIdentity) -> None:
    with pytest.raises(InvalidHeader, match="expected one of the "):
        check(forged(small(), change), expected)


def far_data(metadata: Metadata) -> None:
    """Room before the data for a key slot that nobody could read in time."""
    metadata["segments"]["0"]["offset"] = str(1 << 40)
    metadata["config"]["keyslots_size"] = str((1 << 40) - _SMALL)
    metadata["keyslots"]["0"]["area"]["size"] = str((1 << 40) - _SMALL)


def test_a_record_does_not_allow_a_huge_key_slot_area() -> None:
    with pytest.raises(InvalidHeader, match="expected at most 134217728 bytes for the key slot area, found 10995"):
        check(forged(small(), far_data), identity(data_offset=1 << 40), device_size=1 << 41)


def test_the_largest_key_slot_area_is_accepted() -> None:
    def largest(metadata: Metadata) -> None:
        metadata["segments"]["0"]["offset"] = str(256 << 20)
        metadata["config"]["keyslots_size"] = str(128 << 20)

    check(forged(small(), largest), identity(data_offset=256 << 20), device_size=1 << 30)


@pytest.mark.parametrize(("sector_size", "offset"), [(512, DATA_OFFSET + 8), (4096, DATA_OFFSET + 512)])
def test_a_record_does_not_allow_data_between_sectors(sector_size: int, offset: int) -> None:
    """The kernel maps no such device."""

    def between(metadata: Metadata) -> None:
        metadata["segments"]["0"] |= {"offset": str(offset), "sector_size": sector_size}

    with pytest.raises(InvalidHeader, match=f"to begin at a multiple of its sector size {sector_size}, found {offset}"):
        check(forged(small(), between), identity(sector_size=sector_size, data_offset=offset), device_size=1 << 30)


@settings(max_examples=50)
@given(st.data())
def test_what_passes_after_forging_still_protects_the_data(data: st.DataObject) -> None:
    """Random changes in the JSON with right checksums, against a record with a pinned digest."""
    original = parse(small(), WHERE)
    text = bytearray(small()[BINARY_SIZE:HDR_SIZE].rstrip(b"\0"))
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + 1] = data.draw(st.sampled_from([b"0", b"1", b"9", b"a", b"", b"00"]))
    try:
        area = with_json(small(), bytes(text))
        check(area, identity(digest=original.key_digest))
    except InvalidHeader:
        return
    found = parse(area, WHERE)
    assert (found.uuid, found.segments, found.key_digest) == (original.uuid, original.segments, original.key_digest)
    assert found.keyslots.keys() == original.keyslots.keys()
    assert all(slot.area.encryption in CIPHER_KEY_BITS for slot in found.keyslots.values())
    assert found.config.requirements is None
