"""Volume records: the way through JSON, older and newer versions, damage."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.backends.records import MIGRATIONS, VERSION, RecordCodec
from csi_driver.model.errors import FailedPrecondition
from csi_driver.model.volume import (
    Conversion,
    EncryptionState,
    FileSystemState,
    KeyTrail,
    LuksIdentity,
    Move,
    MovePhase,
    NamedSlot,
    Rekey,
    RekeyPhase,
    Span,
    VolumeParameters,
    VolumeRecord,
)

WHERE = "/state/volumes/pvc-1/record.json"
TEXTS = st.text(max_size=20)
WHOLE = st.integers(0, (1 << 63) - 1)
KEYS = st.builds(
    KeyTrail,
    kms_id=TEXTS,
    type=TEXTS,
    name=TEXTS,
    wrapped=TEXTS,
    key_id=TEXTS,
    key_version=TEXTS,
    tenant=TEXTS,
    foreign=st.booleans(),
)
LUKS = st.builds(
    LuksIdentity,
    uuid=TEXTS,
    cipher=TEXTS,
    key_bits=WHOLE,
    sector_size=WHOLE,
    data_offset=WHOLE,
    digest=st.none() | TEXTS,
)
SLOTS = st.builds(NamedSlot, number=WHOLE, salt=TEXTS)
RECORDS = st.builds(
    VolumeRecord,
    id=TEXTS,
    name=TEXTS,
    capacity_bytes=WHOLE,
    parameters=st.builds(
        VolumeParameters,
        encrypted=st.booleans(),
        cipher=st.none() | TEXTS,
        key_bits=st.none() | WHOLE,
        hash=st.none() | TEXTS,
        pbkdf=st.none() | TEXTS,
        pbkdf_memory_kib=st.none() | WHOLE,
        pbkdf_iterations=st.none() | WHOLE,
        sector_size=st.none() | WHOLE,
        kms_id=st.none() | TEXTS,
        generate_key=st.booleans(),
        retain_key=st.booleans(),
        erase_on_delete=st.booleans(),
        key_rotation_seconds=st.none() | WHOLE,
        discard=st.booleans(),
        no_read_workqueue=st.booleans(),
        no_write_workqueue=st.booleans(),
        mkfs_options=st.lists(TEXTS, max_size=3).map(tuple),
        fs_type=st.none() | TEXTS,
        backend=st.none() | TEXTS,
        replicas=WHOLE,
        claim=st.none() | TEXTS,
    ),
    encryption=st.none() | st.sampled_from(EncryptionState),
    luks=st.none() | LUKS,
    file_system=st.sampled_from(FileSystemState),
    key=st.none() | KEYS,
    conversion=st.none() | st.builds(Conversion, luks=LUKS, done=WHOLE, key=st.none() | KEYS),
    move=st.none()
    | st.builds(
        Move,
        phase=st.sampled_from(MovePhase),
        id=TEXTS,
        other=TEXTS,
        volume_id=TEXTS,
        source=TEXTS,
        size=WHOLE,
        copied=st.builds(Span, end=WHOLE, digest=TEXTS),
        compared=st.builds(Span, end=WHOLE, digest=TEXTS),
    ),
    key_since=st.none() | TEXTS,
    rekey=st.none()
    | st.builds(Rekey, phase=st.sampled_from(RekeyPhase), other=st.none() | KEYS, slots=st.lists(SLOTS).map(tuple)),
    made_fs_type=st.none() | TEXTS,
    created=TEXTS,
    revision=WHOLE,
)
RECORD = VolumeRecord(
    id="pvc-1",
    name="pvc-1",
    capacity_bytes=1 << 30,
    parameters=VolumeParameters(encrypted=True, mkfs_options=("-b", "4096")),
    encryption=EncryptionState.FORMATTING,
    luks=LuksIdentity(uuid="u", cipher="aes-xts-plain64", key_bits=512, sector_size=512, data_offset=16 << 20),
    created="2026-11-20T00:00:00+00:00",
)
KEYED = msgspec.structs.replace(RECORD, key=KeyTrail(kms_id="vault", type="vault", name="pvc-1"))
MOVED = msgspec.structs.replace(RECORD, move=Move(phase=MovePhase.LEAVING, id="m", other="/state", volume_id="pvc-1"))
ROTATED = msgspec.structs.replace(KEYED, key_since="2026-11-20T00:00:00+00:00")


@given(RECORDS)
def test_a_record_comes_back_as_it_was(record: VolumeRecord) -> None:
    assert RecordCodec().decode(RecordCodec().encode(record), WHERE) == record


def test_every_older_version_can_be_read() -> None:
    assert set(MIGRATIONS) == set(range(1, VERSION))


def test_a_file_says_its_version() -> None:
    document = msgspec.json.decode(RecordCodec().encode(MOVED))
    assert document["version"] == VERSION
    assert document["volume"]["encryption"] == "formatting"


def test_a_record_is_written_in_the_oldest_version_that_knows_what_is_in_it() -> None:
    def version(record: VolumeRecord) -> object:
        return msgspec.json.decode(RecordCodec().encode(record))["version"]

    replace = msgspec.structs.replace
    assert version(RECORD) == 1
    assert version(replace(RECORD, rekey=Rekey(phase=RekeyPhase.ADDING))) == 2
    assert version(KEYED) == 2
    assert version(ROTATED) == 2
    assert RECORD.luks is not None
    assert version(replace(RECORD, conversion=Conversion(luks=RECORD.luks))) == 2
    scheduled = VolumeParameters(encrypted=True, kms_id="vault", key_rotation_seconds=3600)
    assert version(replace(KEYED, parameters=scheduled)) == 2
    assert version(MOVED) == VERSION


@given(st.binary(max_size=100) | st.text(max_size=100).map(str.encode))
def test_what_is_no_record_is_refused_and_named(content: bytes) -> None:
    with pytest.raises(FailedPrecondition, match=WHERE):
        RecordCodec().decode(content, WHERE)


@given(st.data())
def test_damage_ends_in_a_record_or_in_our_own_error(data: st.DataObject) -> None:
    content = bytearray(RecordCodec().encode(RECORD))
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    try:
        found = RecordCodec().decode(bytes(content), WHERE)
    except FailedPrecondition:
        return
    assert RecordCodec().decode(RecordCodec().encode(found), WHERE) == found


@pytest.mark.parametrize("length", [0, 1, 20, len(RecordCodec().encode(RECORD)) - 1])
def test_a_record_that_was_cut_short_is_refused(length: int) -> None:
    with pytest.raises(FailedPrecondition, match=r"cannot be read .*restore it from a backup"):
        RecordCodec().decode(RecordCodec().encode(RECORD)[:length], WHERE)


@pytest.mark.parametrize(
    "content",
    [
        b'{"version":1,"volume":{"id":"\xff"}}',
        b'{"version":1,"volume":' + b'{"a":' * 50_000,
        b'{"version":1,"volume":[]}',
        b'{"version":1}',
        b'{"volume":{}}',
        b'{"version":"1","volume":{}}',
        b'{"version":true,"volume":{}}',
        b'{"version":0,"volume":{}}',
        b'{"version":-1,"volume":{}}',
        b'{"version":1.5,"volume":{}}',
        b"[]",
        b"null",
        bytes(4096),
    ],
    ids=lambda content: content[:28].hex(),
)
def test_strange_files_are_refused(content: bytes) -> None:
    with pytest.raises(FailedPrecondition, match=r"cannot be read"):
        RecordCodec().decode(content, WHERE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", 1),
        ("capacity_bytes", "1G"),
        ("capacity_bytes", 1.5),
        ("encryption", "sealed"),
        ("file_system", None),
        ("parameters", {"encrypted": "true"}),
        ("parameters", {"mkfs_options": "-b 4096"}),
        ("luks", {}),
        ("revision", None),
    ],
)
def test_a_field_of_another_type_is_no_record(field: str, value: object) -> None:
    document = msgspec.json.decode(RecordCodec().encode(RECORD))
    document["volume"][field] = value
    with pytest.raises(FailedPrecondition, match=r"cannot be read"):
        RecordCodec().decode(msgspec.json.encode(document), WHERE)


def test_a_newer_version_is_left_to_the_newer_driver() -> None:
    newer = RecordCodec(version=VERSION + 1).encode(MOVED)
    with pytest.raises(FailedPrecondition, match=rf"version {VERSION + 1}, written by a newer driver .*run the newer"):
        RecordCodec().decode(newer, WHERE)


def test_an_older_version_is_carried_forward_step_by_step() -> None:
    steps = []

    def two(volume: dict[str, Any]) -> dict[str, Any]:
        steps.append(2)
        return {**volume, "created": "unknown"}

    def three(volume: dict[str, Any]) -> dict[str, Any]:
        steps.append(3)
        return {**volume, "name": f"{volume['name']} of {volume['created']}"}

    old = msgspec.json.decode(RecordCodec().encode(RECORD))
    del old["volume"]["created"]
    codec = RecordCodec(version=3, migrations={1: two, 2: three})
    assert codec.decode(msgspec.json.encode(old), WHERE) == msgspec.structs.replace(
        RECORD, created="unknown", name="pvc-1 of unknown"
    )
    assert steps == [2, 3]
    assert codec.decode(codec.encode(MOVED), WHERE) == MOVED
    assert steps == [2, 3]


def test_a_version_that_no_migration_knows_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match=r"cannot be read"):
        RecordCodec(version=3, migrations={2: dict}).decode(RecordCodec().encode(RECORD), WHERE)


def test_fields_of_a_newer_writer_of_the_same_version_are_ignored_and_not_kept() -> None:
    """What must not be lost comes with a new version: see csi_driver.backends.records."""
    document = msgspec.json.decode(RecordCodec().encode(RECORD))
    document["volume"]["colour"] = "blue"
    document["volume"]["parameters"]["colour"] = document["colour"] = "red"
    found = RecordCodec().decode(msgspec.json.encode(document), WHERE)
    assert found == RECORD
    assert b"colour" not in RecordCodec().encode(found)
