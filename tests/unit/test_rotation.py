"""When keys are changed by themselves, whose, and what is told of those that could not be."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from csi_driver.host.locks import VolumeLocks
from csi_driver.keys.audit import asker
from csi_driver.keys.base import RequestNeeded
from csi_driver.keys.secret import SecretKey, read_secret
from csi_driver.model.errors import DeviceInUse, DriverError, FailedPrecondition, NotFound, Unavailable
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import (
    Conversion,
    EncryptionState,
    KeyTrail,
    LuksIdentity,
    Move,
    MovePhase,
    Rekey,
    RekeyPhase,
    VolumeParameters,
    VolumeRecord,
)
from csi_driver.volumes.rekey import Rekeyed, Rekeying
from csi_driver.volumes.rotation import LOOK_SECONDS, KeyRotation, schedule
from tests.fake_host import MemoryBackend, NoHolders
from tests.told_lines import Told, told_lines

HOUR, DAY = 3600, 24 * 3600
MADE = datetime(2026, 11, 20, tzinfo=UTC).timestamp()
TRAIL = KeyTrail(kms_id="kms", type="given", name="v.1")
SECONDS = 20
AWAY = (MovePhase.LEFT, MovePhase.ARRIVING, MovePhase.ARRIVED)


def told(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def record(volume_id: str = "v", period: int | None = 90 * DAY, **more: object) -> VolumeRecord:
    made = VolumeRecord(
        id=volume_id,
        name=volume_id,
        capacity_bytes=1,
        parameters=VolumeParameters(encrypted=True, kms_id="kms", key_rotation_seconds=period),
        encryption=EncryptionState.ENCRYPTED,
        key=TRAIL,
        created=told(MADE),
    )
    return msgspec.structs.replace(made, **more)


class FakeRekeying(Rekeying):
    """Changes the record as the real one does; `fails` are volumes where that raises."""

    def __init__(self, backend: MemoryBackend, clock: "Clock") -> None:
        self._backend = backend
        self._clock = clock
        self.made: list[tuple[object, ...]] = []
        self.fails: dict[str, Exception] = {}

    def rotate(self, volume_id: str, secret: SecretKey, new: Passphrase | None) -> Rekeyed:
        self.made.append(("rotate", volume_id, secret, new))
        return Rekeyed(self._changed(volume_id), changed=True)

    def end(self, volume_id: str, secret: SecretKey) -> VolumeRecord:
        self.made.append(("end", volume_id, secret))
        return self._changed(volume_id)

    def _changed(self, volume_id: str) -> VolumeRecord:
        if volume_id in self.fails:
            raise self.fails[volume_id]
        found = self._backend.get(volume_id)
        return self._backend.update(msgspec.structs.replace(found, rekey=None, key_since=told(self._clock.at)))

    def rotated(self) -> list[object]:
        return [volume for what, volume, *_ in self.made if what == "rotate"]


class Clock:
    def __init__(self) -> None:
        self.at = MADE

    def __call__(self) -> float:
        return self.at


class Lab:
    def __init__(self, folder: Path) -> None:
        self.backend, self.clock = MemoryBackend(), Clock()
        self.rekeying = FakeRekeying(self.backend, self.clock)
        self.locks = VolumeLocks(folder, NoHolders())
        self.mounted = True
        self.rotation = KeyRotation(self.backend, self.locks, self.rekeying, self.check, self.clock)

    def check(self) -> None:
        if not self.mounted:
            raise FailedPrecondition("the state directory is not the one that it was")

    def add(self, *records: VolumeRecord) -> None:
        for one in records:
            self.backend.create(one, 1)

    def look(self, at: float) -> list[object]:
        """What was rotated by a look at that time."""
        self.rekeying.made.clear()
        self.clock.at = at
        self.rotation.look(lambda: False)
        return self.rekeying.rotated()


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture
def lines() -> Iterator[Told]:
    with told_lines() as told:
        yield told


def due(one: VolumeRecord) -> float:
    planned = schedule(one)
    assert planned is not None
    return planned.due


# When


def test_a_key_is_changed_in_the_last_tenth_of_its_period_and_then_counts_anew(lab: Lab) -> None:
    lab.add(record())
    first = due(record())
    assert MADE + 81 * DAY < first <= MADE + 90 * DAY
    assert lab.look(first - 1) == []
    assert lab.look(first) == ["v"]
    assert lab.backend.get("v").key_since == told(first)
    assert lab.look(first + 1) == []
    assert lab.look(first + 81 * DAY - 1) == []
    assert lab.look(first + 90 * DAY) == ["v"]


def test_only_what_a_look_does_is_the_schedules(lab: Lab) -> None:
    asked: list[str] = []
    lab.rotation = KeyRotation(lab.backend, lab.locks, lab.rekeying, lambda: asked.append(asker.get()), lab.clock)
    before = asker.get()
    lab.look(MADE)
    assert asked == ["schedule"]
    assert asker.get() == before != "schedule"


def test_no_secret_is_needed_and_none_is_invented(lab: Lab) -> None:
    lab.add(record())
    lab.look(MADE + 90 * DAY)
    assert lab.rekeying.made == [("rotate", "v", SecretKey(None), None)]


def test_a_hundred_volumes_of_a_class_do_not_come_at_once(lab: Lab) -> None:
    volumes = [record(f"pvc-{number}") for number in range(100)]
    lab.add(*volumes)
    looks = [lab.look(MADE + 81 * DAY + tenth * 0.9 * DAY) for tenth in range(11)]
    assert sorted(str(one) for look in looks for one in look) == sorted(one.id for one in volumes)
    assert looks[0] == []
    assert max(map(len, looks)) < 25


def test_the_shortest_period_is_seen_in_time() -> None:
    shortest = schedule(record(period=HOUR))
    assert shortest is not None
    assert shortest.limit == MADE + HOUR
    assert LOOK_SECONDS <= HOUR / 12


def test_a_clock_that_was_set_back_changes_nothing(lab: Lab) -> None:
    lab.add(record())
    assert lab.look(MADE - 365 * DAY) == []


# Whose


@pytest.mark.parametrize(
    "other",
    [
        record(period=None),
        record(encryption=EncryptionState.PREPARED),
        record(encryption=EncryptionState.FORMATTING),
        record(encryption=None, key=None),
        record(key=None),
        record(key=None, rekey=Rekey(phase=RekeyPhase.REMOVING)),
        *(record(move=Move(phase=phase, id="m", other="/there", volume_id="v")) for phase in AWAY),
        record(rekey=Rekey(phase=RekeyPhase.REMOVING), move=Move(phase=AWAY[0], id="m", other="/there", volume_id="v")),
    ],
    ids=[
        "no period",
        "never staged",
        "being formatted",
        "plain",
        "of a secret",
        "of a secret, cut",
        *AWAY,
        "away, cut",
    ],
)
def test_others_are_left_alone(lab: Lab, other: VolumeRecord) -> None:
    lab.add(other)
    lab.look(MADE + 400 * DAY)
    assert lab.rekeying.made == []
    assert lab.rotation.overdue() == 0


def test_what_is_moved_to_another_volume_key_is_left_alone_until_that_has_ended(lab: Lab) -> None:
    luks = LuksIdentity(uuid="u", cipher="aes-xts-plain64", key_bits=512, sector_size=512, data_offset=1 << 24)
    lab.add(record(conversion=Conversion(luks=luks)))
    lab.look(MADE + 400 * DAY)
    assert lab.rekeying.made == []


@pytest.mark.parametrize("period", [HOUR, None], ids=["by schedule", "by hand"])
def test_a_change_that_was_cut_is_ended_and_none_begun(lab: Lab, period: int | None) -> None:
    lab.add(record(period=period, rekey=Rekey(phase=RekeyPhase.ADDING, other=TRAIL)))
    lab.look(MADE + 2 * HOUR)
    assert lab.rekeying.made == [("end", "v", SecretKey(None))]
    assert lab.backend.get("v").rekey is None
    assert lab.rotation.overdue() == 0


def test_a_volume_at_work_is_left_for_the_next_look(lab: Lab, lines: Told) -> None:
    lab.add(record(), record("w"))
    with lab.locks.hold("v"):
        assert lab.look(MADE + 90 * DAY) == ["w"]
    assert lab.rotation.failed() == 0
    assert lab.rotation.overdue() == 1
    assert lab.look(MADE + 90 * DAY) == ["v"]
    assert lab.rotation.overdue() == 0
    assert not [line for line in lines if line.level != "info"]


def test_one_that_was_changed_meanwhile_is_not_changed_again(lab: Lab, tmp_path: Path) -> None:
    """Between the look and the lock: somebody's `keys rotate` was faster."""
    lab.add(record())

    class Slow(VolumeLocks):
        @contextmanager
        def hold(self, volume_id: str) -> Iterator[None]:
            with super().hold(volume_id):
                found = lab.backend.get(volume_id)
                lab.backend.update(msgspec.structs.replace(found, key_since=told(lab.clock.at)))
                yield

    slow = Slow(tmp_path, NoHolders())
    lab.clock.at = MADE + 90 * DAY
    KeyRotation(lab.backend, slow, lab.rekeying, lab.check, lab.clock).look(lambda: False)
    assert lab.rekeying.made == []


# Failures


def test_a_failure_is_told_and_counted_and_keeps_no_other_from_it(lab: Lab, lines: Told) -> None:
    lab.add(record("a"), record("b"), record("c"))
    lab.rekeying.fails = {"a": Unavailable("KMS kms cannot be reached"), "b": OSError(5, "Input/output error")}
    assert lab.look(MADE + 90 * DAY) == ["a", "b", "c"]
    assert (lab.rotation.failed(), lab.rotation.overdue()) == (2, 2)
    warned = [line for line in lines if line.event == "a key could not be rotated"]
    assert [(line.level, line.fields["volume_id"]) for line in warned] == [("warning", "a"), ("warning", "b")]
    assert warned[0].fields["error"] == "KMS kms cannot be reached"
    lab.rekeying.fails.clear()
    assert lab.look(MADE + 90 * DAY) == ["a", "b"]
    assert (lab.rotation.failed(), lab.rotation.overdue()) == (2, 0)


def test_what_nobody_foresaw_ends_no_look_and_is_not_quoted(lab: Lab, lines: Told) -> None:
    lab.add(record("a"), record("b"))
    lab.rekeying.fails = {"a": ValueError("a passphrase")}
    assert lab.look(MADE + 90 * DAY) == ["a", "b"]
    assert lab.rotation.failed() == 1
    assert "ValueError" in str(lines)
    assert "a passphrase" not in str(lines)


@pytest.mark.parametrize(
    ("fails", "event"),
    [
        (RequestNeeded("it is so"), "a key is rotated by request only"),
        (DeviceInUse("it is so"), "a key is not rotated while its volume is in use"),
    ],
    ids=["request", "two nodes"],
)
def test_what_does_not_pass_by_itself_is_told_once_and_stays_overdue(
    lab: Lab, lines: Told, fails: DriverError, event: str
) -> None:
    lab.add(record("a"), record("b"))
    lab.rekeying.fails = {"a": fails}
    for _ in range(3):
        lab.look(MADE + 90 * DAY)
    (line,) = [line for line in lines if line.event == event]
    assert (line.fields["volume_id"], line.fields["error"]) == ("a", "it is so")
    assert (lab.rotation.failed(), lab.rotation.overdue()) == (0, 1)


def test_a_record_that_says_no_time_is_told_once_and_hinders_no_other(lab: Lab, lines: Told) -> None:
    lab.add(record("a", created="now"), record("b"))
    assert lab.look(MADE + 90 * DAY) == ["b"]
    lab.look(MADE + 90 * DAY)
    (line,) = [line for line in lines if line.event == "a key was not looked at"]
    assert "counts since 'now', which is no time" in line.fields["error"]
    assert lab.rotation.failed() == 0


def test_what_was_deleted_is_not_overdue_any_more(lab: Lab) -> None:
    lab.add(record("a"), record("b"))
    lab.rekeying.fails = dict.fromkeys(("a", "b"), Unavailable("down"))
    lab.look(MADE + 90 * DAY)
    assert lab.rotation.overdue() == 2
    lab.backend.delete("a")
    lab.look(MADE + 90 * DAY)
    assert lab.rotation.overdue() == 1


def test_one_that_is_deleted_during_a_look_is_no_failure(lab: Lab, lines: Told) -> None:
    lab.add(record("a"))
    lab.rekeying.fails = {"a": NotFound("volume a does not exist")}
    lab.look(MADE + 90 * DAY)
    assert lab.rotation.failed() == 0
    assert not lines


def test_nothing_is_looked_at_in_another_state_directory(lab: Lab, lines: Told) -> None:
    lab.add(record())
    lab.mounted = False
    assert lab.look(MADE + 90 * DAY) == []
    assert [line.event for line in lines] == ["keys were not looked at"]


def test_the_looks_end_with_the_server_between_two_volumes(lab: Lab) -> None:
    lab.add(record("a"), record("b"))

    lab.clock.at = MADE + 90 * DAY
    lab.rotation.look(lambda: bool(lab.rekeying.rotated()))
    assert lab.rekeying.rotated() == ["a"]


# By request

BOTH = read_secret({"CRYPTO_KEY_VALUE": "new", "CRYPTO_KEY_VALUE_PREVIOUS": "old"})
ONE = read_secret({"CRYPTO_KEY_VALUE": "old"})


def test_a_request_for_a_key_of_a_kms_leaves_the_new_one_to_it(lab: Lab) -> None:
    lab.add(record(period=None))
    lab.rotation.rotate("v", BOTH)
    assert lab.rekeying.made == [("rotate", "v", BOTH, None)]


def test_a_request_for_a_secrets_passphrase_needs_both(lab: Lab) -> None:
    lab.add(record(key=None))
    lab.rotation.rotate("v", BOTH)
    assert lab.rekeying.made == [("rotate", "v", BOTH, BOTH.passphrase)]


@pytest.mark.parametrize("secret", [ONE, SecretKey(None), read_secret({"CRYPTO_KEY_VALUE_PREVIOUS": "old"})])
def test_without_both_the_sentence_says_what_to_do(lab: Lab, secret: SecretKey) -> None:
    lab.add(record(key=None))
    with pytest.raises(FailedPrecondition, match=r"CRYPTO_KEY_VALUE and the present one into CRYPTO_KEY_VALUE_PREV"):
        lab.rotation.rotate("v", secret)
    assert lab.rekeying.made == []


def test_what_has_no_key_slot_is_for_the_use_case_to_refuse(lab: Lab) -> None:
    lab.add(record(key=None, encryption=EncryptionState.PREPARED))
    lab.rotation.rotate("v", ONE)
    assert lab.rekeying.rotated() == ["v"]


def test_a_request_in_another_state_directory_is_refused(lab: Lab) -> None:
    lab.add(record())
    lab.mounted = False
    with pytest.raises(FailedPrecondition, match="not the one that it was"):
        lab.rotation.rotate("v", BOTH)
