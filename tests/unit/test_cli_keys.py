"""`luks-csi keys` and `luks-csi recover`: what they tell and refuse; what they do is tested on devices."""

import json
import os
import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from csi_driver.backends.loopfile import LoopfileBackend
from csi_driver.backends.records import RecordCodec
from csi_driver.host.files import Files
from csi_driver.keys.ledger import KeyEntry, KeyLedger
from csi_driver.model.errors import Unavailable
from csi_driver.model.volume import (
    EncryptionState,
    KeyTrail,
    NamedSlot,
    Rekey,
    RekeyPhase,
    VolumeParameters,
    VolumeRecord,
)
from tests.cli import run_cli

TRAIL = KeyTrail(
    kms_id="vault-1", type="vaulttransit", name="pvc-1", wrapped="vault:v3:x", key_id="transit/csi", key_version="3"
)
PLAIN = VolumeRecord(id="plain", name="plain", capacity_bytes=1, parameters=VolumeParameters(), created="now")
SECRET = msgspec.structs.replace(
    PLAIN,
    id="of-a-secret",
    encryption=EncryptionState.ENCRYPTED,
    rekey=Rekey(phase=RekeyPhase.REMOVING, slots=(NamedSlot(number=0, salt="00"),)),
)
OF_KMS = msgspec.structs.replace(PLAIN, id="of-a-kms", encryption=EncryptionState.ENCRYPTED, key=TRAIL)


@pytest.fixture
def state(tmp_path: Path) -> list[str]:
    """Options for a state directory with three volumes, and without any KMS."""
    for record in (PLAIN, SECRET, OF_KMS):
        folder = tmp_path / "state/loopfile/volumes" / record.id
        folder.mkdir(parents=True)
        (folder / "record.json").write_bytes(RecordCodec().encode(record))
    (tmp_path / "state/locks").mkdir()
    return [
        "--state-dir", str(tmp_path / "state"), "--endpoint", str(tmp_path / "csi.sock"),
        "--kms-config", str(tmp_path / "kms.json"),
    ]  # fmt: skip


def test_status_tells_where_keys_come_from_and_never_what_they_are(state: list[str]) -> None:
    done = run_cli("keys", "status", *state, "-o", "json")
    assert json.loads(done.stdout) == [
        {
            "volume": "of-a-kms",
            "kms": "vault-1",
            "type": "vaulttransit",
            "key": "transit/csi",
            "key_version": "3",
            "change": None,
            "since": "now",
            "next": None,
            "by_request": False,
        },
        {
            "volume": "of-a-secret",
            "kms": None,
            "type": "secret",
            "key": None,
            "key_version": None,
            "change": "removing",
            "since": "now",
            "next": None,
            "by_request": False,
        },
    ]
    table = run_cli("keys", "status", "of-a-kms", *state).stdout
    assert "of-a-kms" in table
    assert "transit/csi" in table
    assert TRAIL.wrapped not in table + done.stdout


def test_status_of_a_generated_key_names_the_secret_to_back_up(state: list[str]) -> None:
    trail = KeyTrail(kms_id="", type="kubernetes-secret", name="own.0123", key_id="luks-csi")
    put(state, msgspec.structs.replace(OF_KMS, id="own", key=trail))
    (found,) = json.loads(run_cli("keys", "status", "own", *state, "-o", "json").stdout)
    assert found["key"] == "luks-csi/luks-csi-key-own.0123"


@pytest.mark.parametrize(
    "words",
    [
        ("keys", "status"), ("keys", "check"), ("keys", "rotate", "of-a-kms", "--yes"), ("keys", "rewrap", "of-a-kms"),
        ("keys", "leftovers"), ("volume", "encrypt", "plain", "--yes"), ("volume", "reencrypt", "of-a-kms", "--yes"),
    ],
)  # fmt: skip
def test_who_may_not_read_the_state_directory_is_told_so(state: list[str], words: tuple[str, ...]) -> None:
    folder, user = Path(state[1]), os.geteuid()
    run_cli(*words, *state)  # which loads what another user may not read
    parents = [each for each in folder.parents if not each.stat().st_mode & 0o001]
    folder.chmod(0)
    for each in parents:
        each.chmod(each.stat().st_mode | 0o001)
    if user == 0:
        os.seteuid(65534)
    try:
        done = run_cli(*words, *state)
    finally:
        os.seteuid(user)
        folder.chmod(0o700)
        for each in parents:
            each.chmod(each.stat().st_mode & ~0o001)
    assert done.exit_code == 1
    assert "run this as root, on the node" in done.stderr
    assert str(folder) in done.stderr


LEFT = KeyTrail(kms_id="vault-1", type="vault", name="gone.0123456789abcdef")


def note(state: list[str], trail: KeyTrail = LEFT, *, leaving: bool = True) -> None:
    volume = trail.name.rpartition(".")[0]
    KeyLedger(Path(state[1]), Files()).note(KeyEntry(volume=volume, key=trail, leaving=leaving))


def test_a_key_that_is_left_is_told_and_one_that_a_record_names_is_not(state: list[str]) -> None:
    put(state, msgspec.structs.replace(OF_KMS, id="kept", key=msgspec.structs.replace(LEFT, name="kept.00")))
    note(state, msgspec.structs.replace(LEFT, name="kept.00"))
    assert run_cli("keys", "leftovers", *state).stdout == "no KMS keeps a key for nothing\n"
    assert run_cli("keys", "status", *state).stderr == ""
    note(state)
    note(state, msgspec.structs.replace(LEFT, name="half.11", kms_id="", type="kubernetes-secret"), leaving=False)
    assert "a KMS keeps 2 keys for nothing" in run_cli("keys", "status", *state).stderr
    assert run_cli("keys", "status", "of-a-kms", *state).stderr == ""
    found = json.loads(run_cli("keys", "leftovers", *state, "-o", "json").stdout)
    assert found == [
        {
            "volume": "gone",
            "kms": "vault-1",
            "type": "vault",
            "key": LEFT.name,
            "left_by": "deletion",
            "destroyed": False,
            "forgotten": False,
        },
        {
            "volume": "half",
            "kms": "-",
            "type": "kubernetes-secret",
            "key": "half.11",
            "left_by": "creation",
            "destroyed": False,
            "forgotten": False,
        },
    ]
    done = run_cli("keys", "leftovers", LEFT.name, *state)
    assert "LEFT BY" in done.stdout
    assert LEFT.name in done.stdout
    assert "half.11" not in done.stdout


def test_what_its_kms_does_not_destroy_stays_listed(state: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    note(state)
    assert run_cli("keys", "leftovers", "--destroy", *state).exit_code == 2  # it asks first
    done = run_cli("keys", "leftovers", "--destroy", "--yes", *state)
    assert done.exit_code == 1
    assert "kept" in done.stdout
    assert "no KMS is configured" in capfd.readouterr().err
    assert LEFT.name in run_cli("keys", "leftovers", *state).stdout


def test_a_key_of_a_kms_that_is_gone_is_forgotten_by_its_name(
    state: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    note(state)
    note(state, msgspec.structs.replace(LEFT, name="gone.11"))
    for wrong in (("--forget",), ("--forget", "--destroy", LEFT.name)):
        done = run_cli("keys", "leftovers", *wrong, *state)
        assert done.exit_code == 2
        assert "--forget is for keys that are named" in done.stderr
    assert run_cli("keys", "leftovers", "--forget", "transit/csi", "--yes", *state).exit_code == 1
    assert run_cli("keys", "leftovers", "--forget", LEFT.name, *state).exit_code == 2  # it asks first
    done = run_cli("keys", "leftovers", "--forget", LEFT.name, "--yes", *state, "-o", "json")
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)
    assert (found["key"], found["destroyed"], found["forgotten"]) == (LEFT.name, False, True)
    assert "a key is looked after no more" in capfd.readouterr().err
    assert [each["key"] for each in json.loads(run_cli("keys", "leftovers", *state, "-o", "json").stdout)] == [
        "gone.11"
    ]


def test_a_key_of_which_nobody_can_tell_is_told_and_only_forgotten(
    state: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage that has the record does not answer, or went with it."""
    note(state)
    real, volume = LoopfileBackend.get, LEFT.name.rpartition(".")[0]

    def get(self: LoopfileBackend, volume_id: str) -> VolumeRecord:
        if volume_id == volume:
            raise Unavailable("nobody answers")
        return real(self, volume_id)

    monkeypatch.setattr(LoopfileBackend, "get", get)
    told = rf"nobody can tell whether volume {volume} has the key {LEFT.name} of its KMS \(nobody answers\); "
    for command in (("status",), ("leftovers",)):
        assert re.search(told, run_cli("keys", *command, *state).stderr)
    done = run_cli("keys", "leftovers", LEFT.name, "--destroy", "--yes", *state)
    assert (done.exit_code, f"no KMS keeps {LEFT.name} for nothing" in done.stderr) == (1, True)
    assert run_cli("keys", "leftovers", LEFT.name, "--forget", "--yes", *state).exit_code == 0
    assert "nobody can tell" not in run_cli("keys", "status", *state).stderr


def test_no_key_is_destroyed_while_a_record_that_may_name_it_cannot_be_read(state: list[str]) -> None:
    note(state)
    (Path(state[1]) / "loopfile/volumes/plain/record.json").write_text("{")
    done = run_cli("keys", "leftovers", "--destroy", "--yes", *state)
    assert done.exit_code == 1
    assert "record.json cannot be read" in done.stderr


def test_a_key_that_is_not_left_is_not_destroyed_by_its_name(state: list[str]) -> None:
    done = run_cli("keys", "leftovers", "transit/csi", "--destroy", "--yes", *state)
    assert done.exit_code == 1
    assert "no KMS keeps transit/csi for nothing" in done.stderr


def test_an_adopted_volume_that_shares_a_key_is_told(state: list[str]) -> None:
    foreign = msgspec.structs.replace(TRAIL, wrapped="", foreign=True)
    put(state, msgspec.structs.replace(OF_KMS, id="copy", key=foreign))
    assert "volume copy opens with the key of what it was adopted from" in run_cli("keys", "status", *state).stderr


def put(state: list[str], record: VolumeRecord) -> None:
    folder = Path(state[1]) / "loopfile/volumes" / record.id
    folder.mkdir(exist_ok=True)
    (folder / "record.json").write_bytes(RecordCodec().encode(record))


def test_status_tells_since_when_a_key_counts_and_when_the_next_one_is_due(state: list[str]) -> None:
    since = (datetime.now(UTC) - timedelta(days=1)).isoformat(timespec="seconds")
    parameters = VolumeParameters(encrypted=True, kms_id="vault-1", key_rotation_seconds=90 * 86400)
    put(state, msgspec.structs.replace(OF_KMS, parameters=parameters, key_since=since))
    (found,) = json.loads(run_cli("keys", "status", "of-a-kms", *state, "-o", "json").stdout)
    assert (found["since"], found["by_request"]) == (since, False)
    age = datetime.fromisoformat(found["next"]) - datetime.fromisoformat(since)
    assert timedelta(days=81) < age <= timedelta(days=90)
    table = run_cli("keys", "status", "of-a-kms", *state).stdout
    assert since in table
    assert found["next"] in table


@pytest.mark.parametrize(
    ("entry", "waits"),
    [
        ({"encryptionKMSType": "metadata"}, True),  # its passphrase comes with each request
        ({"encryptionKMSType": "vaulttenantsa", "vaultAddress": "https://127.0.0.1:1"}, True),  # as the namespace does
        ({"encryptionKMSType": "kms-plugin", "endpoint": "unix:///nonexistent/kms.sock"}, False),
    ],
    ids=["metadata", "vaulttenantsa", "kms-plugin"],
)
def test_status_tells_a_key_that_waits_for_a_request(state: list[str], entry: dict[str, str], *, waits: bool) -> None:
    Path(state[-1]).write_text(json.dumps({"vault-1": entry}))
    parameters = VolumeParameters(encrypted=True, kms_id="vault-1", key_rotation_seconds=3600)
    trail = msgspec.structs.replace(TRAIL, type=entry["encryptionKMSType"])
    overdue = msgspec.structs.replace(OF_KMS, parameters=parameters, key=trail, created="2026-01-01T00:00:00+00:00")
    put(state, overdue)
    (found,) = json.loads(run_cli("keys", "status", "of-a-kms", *state, "-o", "json").stdout)
    assert found["by_request"] is waits
    assert ("by request" in run_cli("keys", "status", "of-a-kms", *state).stdout) is waits
    fresh = msgspec.structs.replace(overdue, key_since=datetime.now(UTC).isoformat(timespec="seconds"))
    put(state, fresh)
    (found,) = json.loads(run_cli("keys", "status", "of-a-kms", *state, "-o", "json").stdout)
    assert not found["by_request"]


def test_status_of_what_is_not_there(state: list[str]) -> None:
    done = run_cli("keys", "status", "nope", *state)
    assert (done.exit_code, "nope does not exist" in done.stderr) == (1, True)


def test_one_record_that_cannot_be_read_hides_no_other(state: list[str]) -> None:
    (Path(state[1]) / "loopfile/volumes/plain/record.json").write_text("{")
    done = run_cli("keys", "status", *state, "-o", "json")
    assert done.exit_code == 1
    assert "plain" in done.stderr
    assert [one["volume"] for one in json.loads(done.stdout)] == ["of-a-kms", "of-a-secret"]
    done = run_cli("keys", "rewrap", "--all", *state, "-o", "json")
    assert done.exit_code == 1
    assert [one["volume"] for one in json.loads(done.stdout)] == ["of-a-kms", "plain"]


def test_without_any_kms_there_is_nothing_to_check(state: list[str]) -> None:
    assert run_cli("keys", "check", *state).stdout == "no KMS is configured\n"


def test_each_kms_is_told_and_one_that_fails_ends_with_1(state: list[str]) -> None:
    Path(state[-1]).write_text('{"a": {"encryptionKMSType": "abacus"}, "b": {"encryptionKMSType": "metadata"}}')
    done = run_cli("keys", "check", *state, "-o", "json")
    assert done.exit_code == 1
    assert [(one["kms"], one["ok"]) for one in json.loads(done.stdout)] == [("a", False), ("b", None)]
    assert "FAIL" in run_cli("keys", "check", *state).stdout


def test_a_kms_that_was_not_tried_is_no_failure_and_a_field_that_nobody_reads_is_told(state: list[str]) -> None:
    Path(state[-1]).write_text('{"b": {"encryptionKMSType": "metadata", "secretname": "x"}}')
    done = run_cli("keys", "check", *state)
    assert (done.exit_code, done.stdout.split()[:2]) == (0, ["-", "b"])
    assert done.stderr == (
        "warning: the KMS b has fields that nobody reads: secretname (did you mean secretName?); correct the KMS "
        "configuration, or take them out\n"
    )
    (found,) = json.loads(run_cli("keys", "check", *state, "-o", "json").stdout)
    assert found["unknown_fields"] == ["secretname (did you mean secretName?)"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rewrap",), "Name volumes, or all of them with --all"),
        (("rewrap", "--all", "of-a-kms"), "Name volumes, or all of them with --all"),
        (("rotate", "of-a-kms"), "--yes"),
        (("rotate",), "Missing argument"),
    ],
)
def test_a_command_line_that_cannot_be_right(state: list[str], words: tuple[str, ...], said: str) -> None:
    done = run_cli("keys", *words, *state)
    assert done.exit_code == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("volume", "said"),
    [
        ("plain", "is not encrypted, so it has no key"),
        ("nope", "does not exist"),
        ("NOPE", "is no volume's id"),
        ("of-a-secret", "opens with a passphrase; give the new one too"),
    ],
)
def test_what_cannot_be_rotated_is_told(state: list[str], volume: str, said: str) -> None:
    done = run_cli("keys", "rotate", volume, "--yes", *state)
    assert done.exit_code == 1
    assert said in done.stderr


def test_a_volume_that_fails_keeps_no_other_from_being_wrapped_anew(state: list[str]) -> None:
    done = run_cli("keys", "rewrap", "of-a-secret", "of-a-kms", *state, "-o", "json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert [(one["volume"], one["changed"]) for one in found] == [("of-a-secret", False), ("of-a-kms", False)]
    assert "there is nothing to wrap" in found[0]["error"]
    assert "no KMS is configured" in found[1]["error"]


def test_where_no_kms_wraps_anything_that_is_told(state: list[str]) -> None:
    shutil.rmtree(Path(state[1]) / "loopfile/volumes/of-a-kms")
    assert run_cli("keys", "rewrap", "--all", *state).stdout == "no KMS wraps the key of a volume here\n"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "control", "a b", "a\\x20b", "ä", "a\nb", "-a", "a" * 128])
def test_recover_takes_no_name_that_cannot_be_a_mappings(tmp_path: Path, name: str) -> None:
    device = tmp_path / "disk.img"
    device.touch()
    done = run_cli("recover", "--", device, name)
    assert done.exit_code == 2
    assert "name of a mapping" in done.stderr


def test_a_header_is_restored_to_a_volume_that_is_there_alone(state: list[str]) -> None:
    done = run_cli("volume", "restore-header", "nope", "--yes", *state[:4])
    assert (done.exit_code, "does not exist" in done.stderr) == (1, True)


def test_a_wrapped_key_that_is_no_text_is_told(tmp_path: Path) -> None:
    file, wrapped = tmp_path / "disk.img", tmp_path / "wrapped"
    file.touch()
    wrapped.write_bytes(b"\xff\x00\x80")
    kms = ("--kms", "kms", "--kms-type", "metadata", "--wrapped", wrapped)
    done = run_cli("volume", "adopt", "v", file, *kms, "--state-dir", tmp_path, "--endpoint", tmp_path / "csi.sock")
    assert done.exit_code == 1
    assert f"the wrapped key cannot be read from {wrapped}" in done.stderr
