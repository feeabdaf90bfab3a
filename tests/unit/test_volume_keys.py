"""Whose key a volume's is: what may be destroyed with it, what a new one is called, and what a cut leaves in a KMS."""

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from csi_driver.backends.rbderrors import CephMissing
from csi_driver.host.files import Files
from csi_driver.keys.base import Announce, nobody
from csi_driver.keys.ledger import KeyEntry, KeyLedger
from csi_driver.keys.secret import SecretKey, read_secret
from csi_driver.keys.sources import GENERATED
from csi_driver.model.errors import (
    Aborted,
    DeadlineExceeded,
    DriverError,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import (
    Conversion,
    KeyTrail,
    LuksIdentity,
    Rekey,
    RekeyPhase,
    VolumeParameters,
    VolumeRecord,
)
from csi_driver.volumes.keys import VolumeKeys
from tests.keys.given import GivenSources
from tests.told_lines import told_lines

OWN = KeyTrail(kms_id="kms", type="given", name="pvc-1.0123456789abcdef")
OF_KMS = VolumeParameters(encrypted=True, kms_id="kms")
RETAINED = VolumeParameters(encrypted=True, kms_id="kms", retain_key=True)
RECORD = VolumeRecord(id="pvc-1", name="pvc-1", capacity_bytes=1, parameters=OF_KMS, key=OWN, created="now")
NO_SECRET = SecretKey(None)


class Kill(BaseException):
    """The process ends here."""


class Kept:
    """A KMS that keeps keys by their names; `down` is what it answers instead."""

    keeps = True

    def __init__(self) -> None:
        self.names = {OWN.name}
        self.down: DriverError | None = None

    def create(self, name: str, announce: Announce = nobody) -> KeyTrail:
        self._answer()
        announce()
        self.names.add(name)
        return KeyTrail(kms_id="", type="", name=name)

    def fetch(self, trail: KeyTrail) -> Passphrase:
        return Passphrase(trail.name.encode())

    def rewrap(self, trail: KeyTrail) -> KeyTrail:
        return trail

    def destroy(self, trail: KeyTrail) -> None:
        self._answer()
        self.names.discard(trail.name)

    def check(self) -> str:
        return "here"

    def close(self) -> None:
        """Nothing."""

    def _answer(self) -> None:
        if self.down is not None:
            raise self.down


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def keys(kept: Kept, tmp_path: Path) -> VolumeKeys:
    return VolumeKeys(GivenSources(kms=kept), KeyLedger(tmp_path, Files()))


def make(
    keys: VolumeKeys,
    error: BaseException | None = None,
    volume: str = "pvc-1",
    named: Callable[[], bool] = lambda: False,
) -> str:
    """Make a volume's key; the volume is there when this returns, or `error` has ended it."""
    made = ""
    with suppress(*([type(error)] if error else [])), keys.making(volume, OF_KMS, NO_SECRET, named) as trail:
        assert trail is not None
        made = trail.name
        if error is not None:
            raise error
    return made


def destroy(keys: VolumeKeys, entries: Iterable[KeyEntry]) -> None:
    for entry in entries:
        keys.destroy_left(entry)


def left(keys: VolumeKeys, *records: VolumeRecord) -> list[str]:
    return [entry.key.name for entry in keys.unnamed(having(*records)).left]


def having(*records: VolumeRecord) -> Any:
    """A backend with these volumes."""
    found = {record.id: record for record in records}

    def get(volume_id: str) -> VolumeRecord:
        if volume_id not in found:
            raise NotFound(f"there is no volume {volume_id}")
        return found[volume_id]

    return SimpleNamespace(ids=lambda: list(found), get=get)


def test_a_volumes_own_key_goes_with_it_and_a_foreign_or_retained_one_does_not(keys: VolumeKeys, kept: Kept) -> None:
    keys.destroy(RECORD, msgspec.structs.replace(OWN, foreign=True), "delete volume")
    keys.destroy(msgspec.structs.replace(RECORD, parameters=RETAINED), OWN, "delete volume")
    assert kept.names == {OWN.name}
    keys.destroy(RECORD, OWN, "delete volume")
    assert kept.names == set()
    assert left(keys) == []


def test_no_two_volumes_and_no_two_keys_of_one_have_a_name(keys: VolumeKeys) -> None:
    made = [make(keys) for _ in range(3)]
    assert len(set(made)) == 3
    assert all(re.fullmatch(r"pvc-1\.[0-9a-f]{16}", name) for name in made)
    assert left(keys) == []


def test_a_key_is_used_again_by_the_call_that_was_killed_and_by_no_other(keys: VolumeKeys, kept: Kept) -> None:
    killed = make(keys, Kill())
    assert left(keys) == [killed]
    assert make(keys, volume="pvc-1.x") != killed
    assert make(keys, Aborted("goes on")) == killed
    assert make(keys) == killed
    assert left(keys) == []
    assert make(keys) != killed
    assert killed in kept.names


@pytest.mark.parametrize("down", [False, True])
def test_the_key_of_a_volume_that_could_not_be_made_goes(keys: VolumeKeys, kept: Kept, *, down: bool) -> None:
    def named() -> bool:
        kept.down = Unavailable("down") if down else None
        return False

    failed = make(keys, ResourceExhausted("no room"), named=named)
    kept.down = None
    assert (failed in kept.names) is down
    assert left(keys) == [failed] * down
    assert make(keys) != failed  # the one of another call, whatever it was that failed
    destroy(keys, keys.unnamed(having()).left)
    assert failed not in kept.names
    assert left(keys) == []


@pytest.mark.parametrize(
    ("found", "is_left", "untold"),
    [
        (msgspec.structs.replace(RECORD, key=None), True, []),
        (NotFound("there is no volume pvc-1"), True, []),
        (RECORD, False, []),
        (CephMissing("the pool is gone"), False, ["the pool is gone"]),
        (Unavailable("nobody answers"), False, ["nobody answers"]),
    ],
    ids=["names another", "gone", "names it", "pool gone", "silent"],
)
def test_a_volume_that_is_on_another_node_is_asked_for_before_its_key_counts_as_left(
    keys: VolumeKeys, found: VolumeRecord | DriverError, untold: Sequence[str], *, is_left: bool
) -> None:
    """A node of shared storage lists only the volumes that it has; its ledger names keys of others."""
    keys.leave("pvc-1", RECORD)

    def get(_: str) -> VolumeRecord:
        if isinstance(found, DriverError):
            raise found
        return found

    elsewhere: Any = SimpleNamespace(ids=list, get=get)
    assert [entry.key.name for entry in keys.unnamed(elsewhere).left] == [OWN.name] * is_left
    assert [(entry.key.name, str(error)) for entry, error in keys.unnamed(elsewhere).untold] == [
        (OWN.name, why) for why in untold
    ]


def test_a_key_that_a_record_names_is_never_taken_for_left(keys: VolumeKeys, kept: Kept) -> None:
    """A record that was written, though its call failed or was killed right behind it."""
    name = make(keys, FailedPrecondition("written and not durable"), named=lambda: True)
    assert name in kept.names
    record = msgspec.structs.replace(RECORD, key=msgspec.structs.replace(OWN, name=name))
    assert left(keys, record) == []
    with keys.successor(record, record.key or OWN, NO_SECRET) as other:
        assert other.name != name


def test_what_a_volume_had_goes_with_it_though_the_deletion_is_killed_between(keys: VolumeKeys, kept: Kept) -> None:
    other = make(keys, Kill())  # by a rotation that was killed before its record named it
    leaving = keys.leave("pvc-1", RECORD)
    assert sorted(entry.key.name for entry in leaving) == sorted((OWN.name, other))
    assert left(keys, RECORD) == [other]  # killed here, and the volume is there still
    assert sorted(left(keys)) == sorted((OWN.name, other))  # killed here, and it is gone
    assert make(keys) not in (OWN.name, other)
    destroy(keys, keys.leave("pvc-1", None))  # the repeated call
    assert not {OWN.name, other} & kept.names
    assert left(keys) == []


def test_a_retained_key_is_not_the_next_volumes_of_that_name(keys: VolumeKeys, kept: Kept) -> None:
    killed = make(keys, Kill())  # behind the write of the record
    record = msgspec.structs.replace(RECORD, key=msgspec.structs.replace(OWN, name=killed), parameters=RETAINED)
    with told_lines() as lines:
        assert keys.leave("pvc-1", record) == []
    assert [(line.event, line.fields["key"]) for line in lines] == [("key kept", killed)]
    assert left(keys) == []
    assert make(keys) != killed
    assert killed in kept.names


def test_a_kms_that_is_down_leaves_the_name_of_what_it_keeps(keys: VolumeKeys, kept: Kept) -> None:
    kept.down = Unavailable("down")
    destroy(keys, keys.leave("pvc-1", RECORD))
    assert left(keys) == [OWN.name]
    kept.down = None
    destroy(keys, keys.unnamed(having()).left)
    assert OWN.name not in kept.names


def test_what_nobody_foresaw_of_a_kms_keeps_nobody_from_deleting(
    keys: VolumeKeys, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    def destroy_badly(_: KeyTrail) -> None:
        raise AttributeError("of a passphrase")

    monkeypatch.setattr(kept, "destroy", destroy_badly)
    with told_lines() as lines:
        destroy(keys, keys.leave("pvc-1", RECORD))
    assert lines[-1].event == "a key was left in its KMS"
    assert lines[-1].fields["error"] == "AttributeError"
    assert left(keys) == [OWN.name]


@pytest.mark.parametrize("name", ["pvc-1.0123abcd.1", "0001-0009-rook-ceph-0000000000000001-8a710f4c", "a.7"])
def test_a_successor_has_a_name_of_its_own_and_is_found_again_where_it_was_cut(keys: VolumeKeys, name: str) -> None:
    """Of a copy of pvc-1, say, it must not be the name that pvc-1 itself goes on to: both would have one key."""
    foreign = msgspec.structs.replace(OWN, name=name, foreign=True)
    record = msgspec.structs.replace(RECORD, key=foreign)
    made = []
    for _ in range(2):
        with suppress(Kill), keys.successor(record, foreign, NO_SECRET) as trail:
            made.append(trail)
            raise Kill
    assert made[0] == made[1]
    assert re.fullmatch(r"pvc-1\.[0-9a-f]{16}", made[0].name)
    assert not made[0].foreign
    rekey = Rekey(phase=RekeyPhase.ADDING, other=made[0])
    assert left(keys, msgspec.structs.replace(record, rekey=rekey)) == []


def test_the_successor_of_a_generated_key_is_generated_whatever_the_class_said(tmp_path: Path) -> None:
    asked: list[str | None] = []

    class Sources(GivenSources):
        def create(self, kms_id: str | None, *_: object) -> KeyTrail:
            asked.append(kms_id)
            return OWN

    keys = VolumeKeys(Sources(), KeyLedger(tmp_path, Files()))
    with keys.successor(RECORD, KeyTrail(kms_id="", type=GENERATED, name="x"), NO_SECRET):
        assert asked == [None]


def test_a_kms_that_was_never_asked_to_keep_anything_leaves_no_name(keys: VolumeKeys, kept: Kept) -> None:
    kept.down = Unavailable("refused")
    with pytest.raises(Unavailable):
        make(keys)
    assert left(keys) == []


def test_a_kms_that_fails_after_it_was_asked_leaves_the_name(
    keys: VolumeKeys, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask_and_lose_the_answer(name: str, announce: Announce) -> KeyTrail:
        announce()
        kept.names.add(name)
        raise Unavailable("the line broke")

    monkeypatch.setattr(kept, "create", ask_and_lose_the_answer)
    with pytest.raises(Unavailable):
        make(keys)
    monkeypatch.undo()
    (name,) = left(keys)
    assert make(keys) == name
    assert left(keys) == []


def test_a_name_that_cannot_be_written_makes_no_key(kept: Kept, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("in the way")
    keys = VolumeKeys(GivenSources(kms=kept), KeyLedger(tmp_path, Files()))
    with pytest.raises(FailedPrecondition, match="which is to name a key of volume pvc-1, cannot be written"):
        make(keys)
    assert kept.names == {OWN.name}
    destroy(keys, keys.leave("pvc-1", RECORD))  # which keeps nobody from deleting
    assert kept.names == set()


def test_an_entry_that_cannot_be_removed_fails_no_call(kept: Kept, tmp_path: Path) -> None:
    class ReadOnly(Files):
        """Takes nothing away."""

        def remove(self, path: Path) -> None:
            raise OSError(30, "Read-only file system", str(path))

    keys = VolumeKeys(GivenSources(kms=kept), KeyLedger(tmp_path, ReadOnly()))
    with told_lines() as lines:
        name = make(keys)
    assert [line.event for line in lines] == ["key used", "the entry of a key could not be removed"]
    record = msgspec.structs.replace(RECORD, key=msgspec.structs.replace(OWN, name=name))
    assert left(keys, record) == []
    with keys.successor(record, record.key or OWN, NO_SECRET) as other:
        assert other.name != name


def test_an_entry_that_cannot_be_read_is_told_by_its_file(keys: VolumeKeys, tmp_path: Path) -> None:
    name = make(keys, Kill())
    (tmp_path / "keys" / f"{name}.json").write_text('{"version": 9}')
    with pytest.raises(FailedPrecondition, match=rf"keys/{name}\.json cannot be read as the entry of a key"):
        make(keys)


def test_a_previous_passphrase_that_was_emptied_is_none() -> None:
    assert read_secret({"CRYPTO_KEY_VALUE": "one", "CRYPTO_KEY_VALUE_PREVIOUS": ""}).previous is None


def test_a_volume_whose_name_goes_on_behind_a_dot_keeps_its_keys(keys: VolumeKeys, kept: Kept) -> None:
    """Keys are found by how their names begin, and those of both volumes begin alike."""
    other = make(keys, Kill(), volume="pvc-1.2")
    assert make(keys) != other
    destroy(keys, keys.leave("pvc-1", None))
    assert other in kept.names
    assert left(keys) == [other]


def test_the_name_of_a_key_is_durable_before_it_is_asked_for(kept: Kept, tmp_path: Path) -> None:
    class Durable(Files):
        def write_volatile(self, path: Path, content: bytes) -> None:
            raise AssertionError(f"a power cut would take {path}, and the KMS keep its key for ever")

    make(VolumeKeys(GivenSources(kms=kept), KeyLedger(tmp_path, Durable())))


def test_a_key_of_another_kms_or_namespace_is_not_used_again(kept: Kept, tmp_path: Path) -> None:
    """The class was made anew, or the claim of that name is another tenant's, since the call was killed."""
    keys = VolumeKeys(GivenSources(kms=kept, other=kept), KeyLedger(tmp_path, Files()))
    made = set()
    for kms_id, claim in (("kms", "a/claim"), ("other", "a/claim"), ("kms", "b/claim")):
        parameters = msgspec.structs.replace(OF_KMS, kms_id=kms_id, claim=claim)
        with suppress(Kill), keys.making("pvc-1", parameters, NO_SECRET, lambda: False) as trail:
            assert trail is not None
            made.add(trail.name)
            raise Kill
    assert len(made) == 3


def test_a_volume_that_could_not_be_made_in_time_goes_on_with_its_key(keys: VolumeKeys, kept: Kept) -> None:
    cut = make(keys, DeadlineExceeded("a large one is cleared"))
    assert cut in kept.names
    assert make(keys) == cut


def test_the_key_to_which_a_plain_volume_is_moved_is_never_taken_for_left(keys: VolumeKeys, kept: Kept) -> None:
    """A command that was killed behind the write of the record: half of the volume opens with that key alone."""
    name = make(keys, Kill())
    luks = LuksIdentity(uuid="u", cipher="aes-xts-plain64", key_bits=512, sector_size=512, data_offset=1 << 24)
    conversion = Conversion(luks=luks, key=msgspec.structs.replace(OWN, name=name), done=1)
    record = msgspec.structs.replace(RECORD, key=None, conversion=conversion)
    assert left(keys, record) == []
    destroy(keys, keys.leave("pvc-1", record))
    assert name not in kept.names
    assert left(keys) == []


@pytest.mark.parametrize("foreign", [False, True])
def test_a_key_that_stays_when_another_one_counts_is_not_taken_for_left(
    keys: VolumeKeys, kept: Kept, *, foreign: bool
) -> None:
    """It was noted by a call that was killed; `keys leftovers` would destroy it, with what it opens elsewhere."""
    name = make(keys, Kill())
    trail = msgspec.structs.replace(OWN, name=name, foreign=foreign)
    record = msgspec.structs.replace(RECORD, parameters=OF_KMS if foreign else RETAINED)
    keys.destroy(record, trail, "rotate")
    assert name in kept.names
    assert left(keys, record) == []
