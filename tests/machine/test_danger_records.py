"""Records that are missing, damaged, newer, or older than their device: clear errors, and nothing is touched.

Field problems 1, 22 and 23, and what a record must never be overruled by.
"""

import json
import os
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from csi_driver.backends.records import RecordCodec
from csi_driver.cli.volume import volume as volume_command
from csi_driver.model.errors import Aborted, DriverError, FailedPrecondition, ForeignSignature, NotFound
from csi_driver.model.volume import EncryptionState, FileSystemState, VolumeRecord
from tests.machine.node import BLANK, BLOCK, CHEAP, MIB, MOUNT, SIZE, VOLUME, Node, fingerprint
from tests.machine.places import OF_FILES, RECORDS_ARE_FILES, not_on, only_of_files

Change = Callable[[dict[str, Any]], object]
MARK = "trusted.luks-csi.revision"
WRITTEN = b"precious" * (8192 if OF_FILES else MIB // 4)
"""Where nobody knows what was ever written, 64 samples are read: of 64 MiB one lies in each."""


def change_record(node: Node, change: Change) -> None:
    document = json.loads(node.raw_record())
    change(document)
    node.put_record(json.dumps(document).encode())


DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read"),
    "cut": (b'{"version":1,"volume":{"id":"pvc-1","na', "cannot be read"),
    "zeros": (bytes(512), "cannot be read"),
    "no record": (b'{"version":1}', "cannot be read"),
    "newer": (b'{"version":99,"volume":{}}', "version 99, written by a newer driver"),
    "other type": (b'{"version":1,"volume":{"id":5}}', "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_record_is_told_and_nothing_is_touched(used: Node, name: str) -> None:
    content, words = DAMAGE[name]
    kept = used.raw_record()
    before = fingerprint(used.disk())
    used.put_record(content)
    for call in (used.stage, used.create, lambda: used.grow(1 << 30), lambda: used.expand(1 << 30)):
        with pytest.raises(FailedPrecondition, match=words):
            call()
    used.unstage()
    assert used.raw_record() == content
    assert fingerprint(used.disk()) == before
    assert used.closed()
    used.put_record(kept)
    used.stage()
    assert used.read() == "precious"
    used.unstage()


@not_on("record", "rbd", "csi")
def test_a_missing_record_is_no_new_volume(used: Node) -> None:
    """A volume's folder without its record still holds data: neither staged nor made anew over it."""
    kept = used.record_file().read_bytes()
    before = fingerprint(used.disk())
    used.record_file().unlink()
    with pytest.raises(NotFound, match=f"volume {VOLUME} does not exist"):
        used.stage()
    with pytest.raises(DriverError):
        used.create()
    assert fingerprint(used.disk()) == before
    used.record_file().write_bytes(kept)
    used.stage()
    assert used.read() == "precious"
    used.unstage()


def test_an_unknown_volume_is_not_found_and_its_unstage_is_fine(node: Node) -> None:
    with pytest.raises(NotFound):
        node.stage("pvc-unknown")
    with pytest.raises(NotFound):
        node.expand(1 << 30, "pvc-unknown")
    node.unstage("pvc-unknown")
    node.delete("pvc-unknown")


@pytest.mark.parametrize("state", ["prepared", "formatting"])
def test_lh10416_a_record_that_was_set_back_does_not_format_data_away(used: Node, state: str) -> None:
    """A record restored from an old backup says "never formatted"; the device says otherwise, and it is believed."""
    before = fingerprint(used.disk())

    def set_back(document: dict[str, Any]) -> None:
        document["volume"].update(encryption=state, file_system="none", made_fs_type=None)
        if state == "prepared":
            document["volume"].update(luks=None)

    change_record(used, set_back)
    with pytest.raises(DriverError, match="nothing was written"):
        used.stage()
    assert fingerprint(used.disk()) == before
    assert used.encryption_state() == state
    assert used.closed()


def test_lh10416_a_record_without_its_luks_identity_opens_nothing(used: Node) -> None:
    change_record(used, lambda document: document["volume"].update(luks=None))
    before = fingerprint(used.disk())
    with pytest.raises(FailedPrecondition, match="names no LUKS UUID; restore the record"):
        used.stage()
    assert fingerprint(used.disk()) == before
    assert used.closed()


def test_lh14042_a_file_system_recorded_as_made_is_never_made_again(used: Node) -> None:
    """Even where the record names none: what is there is mounted, or the call fails."""
    change_record(used, lambda document: document["volume"].update(made_fs_type=None))
    before = fingerprint(used.disk())
    with pytest.raises(FailedPrecondition):
        used.stage()
    assert fingerprint(used.disk()) == before
    assert used.closed()


def test_hc_pr1364_mkfs_that_was_cut_runs_again_and_only_then(node: Node) -> None:
    """`making` is the one state in which mkfs may run over something; `raw` and `made` never are."""
    node.create()
    node.stage(capability=BLOCK)
    node.unstage()
    change_record(node, lambda document: document["volume"].update(file_system="making"))
    node.stage()
    assert node.file_system_state() is FileSystemState.MADE
    node.write()
    node.unstage()
    node.stage()
    assert node.read() == "precious"
    node.unstage()


@pytest.fixture
def records(node: Node, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every record of a volume up to the end of its first stage, in which a file was written."""
    node.create()
    written, update = [node.raw_record()], node.store.update

    def recorded(record: VolumeRecord) -> VolumeRecord:
        updated = update(record)
        written.append(RecordCodec().encode(updated))
        return updated

    with monkeypatch.context() as patch:
        patch.setattr(node.store, "update", recorded)
        node.stage()
        node.write()
        node.unstage()
    found = [RecordCodec().decode(content, "the test") for content in written]
    assert [(each.encryption, each.file_system) for each in found] == [
        (EncryptionState.PREPARED, FileSystemState.NONE),
        (EncryptionState.FORMATTING, FileSystemState.NONE),
        (EncryptionState.ENCRYPTED, FileSystemState.NONE),
        (EncryptionState.ENCRYPTED, FileSystemState.MAKING),
        (EncryptionState.ENCRYPTED, FileSystemState.MADE),
    ]
    return written


@not_on("record", "rbd", "csi")
def test_no_record_of_a_first_stage_that_is_put_back_formats_data_away(node: Node, records: list[bytes]) -> None:
    before = fingerprint(node.disk())
    for content in records[:-1]:
        node.record_file().write_bytes(content)
        for capability in (MOUNT, BLOCK):
            with pytest.raises(FailedPrecondition, match=r"is older than the volume: .*restore the newest record"):
                node.stage(capability=capability)
        assert node.closed()
        assert node.record_file().read_bytes() == content
        assert fingerprint(node.disk()) == before
        answer = accept(node)
        assert answer.exit_code == 1
        assert "by which the volume would be formatted" in str(answer.exception)
    node.record_file().write_bytes(records[-1])
    node.stage()
    assert node.read() == "precious"
    node.unstage()


def test_without_a_mark_too_no_older_record_formats_data_away(node: Node, records: list[bytes]) -> None:
    """A file system without such attributes, or a volume that was copied without them: what lies there is looked at."""
    before = fingerprint(node.disk())
    for content in records[:-1]:
        if RECORDS_ARE_FILES:
            os.removexattr(node.record_file().parent, MARK)
        node.put_record(content)
        with pytest.raises(ForeignSignature, match="nothing was written"):
            node.stage()
        assert node.closed()
        assert node.raw_record() == content
        assert fingerprint(node.disk()) == before
        if RECORDS_ARE_FILES:
            os.setxattr(node.record_file().parent, MARK, b"0")
    node.put_record(records[-1])
    node.stage()
    assert node.read() == "precious"
    node.unstage()


@pytest.mark.parametrize("state", ["none", "making"])
@pytest.mark.parametrize("parameters", [CHEAP, {}], ids=["encrypted", "plain"])
def test_a_record_that_was_set_back_makes_no_file_system_over_what_a_pod_wrote_to_the_block_device(
    node: Node, parameters: dict[str, str], state: str
) -> None:
    node.create(parameters=parameters, size=64 * MIB)
    node.stage(capability=BLOCK)
    target = node.publish(capability=BLOCK)
    with target.open("r+b") as device:
        device.seek(10 * MIB + 4096)
        device.write(WRITTEN)
    node.unpublish()
    node.unstage()
    change_record(node, lambda document: document["volume"].update(file_system=state))
    before = fingerprint(node.disk())
    with pytest.raises(ForeignSignature, match="nothing was written"):
        node.stage()
    assert fingerprint(node.disk()) == before


@only_of_files("written")
def test_of_a_cut_luksformat_all_that_was_ever_written_is_looked_at(node: Node) -> None:
    """The record says `formatting` again, over a block volume with data where no sample was taken."""
    node.create(size=256 * MIB)
    node.stage(capability=BLOCK)
    target = node.publish(capability=BLOCK)
    with target.open("r+b") as device:
        device.seek(10 * MIB + 4096)
        device.write(b"precious" * 512)
    node.unpublish()
    node.unstage()

    def set_back(document: dict[str, Any]) -> None:
        document["volume"]["encryption"] = "formatting"
        document["volume"]["luks"]["digest"] = None

    change_record(node, set_back)
    before = fingerprint(node.disk())
    with pytest.raises(ForeignSignature, match="nothing was written"):
        node.stage(capability=BLOCK)
    assert fingerprint(node.disk()) == before


@not_on("record", "rbd", "csi")
def test_a_settled_record_from_a_backup_is_taken_when_an_administrator_says_so(
    node: Node, records: list[bytes]
) -> None:
    node.grow(2 * SIZE)
    node.record_file().write_bytes(records[-1])
    for call in (node.stage, lambda: node.grow(3 * SIZE), lambda: node.store.update(node.record())):
        with pytest.raises(FailedPrecondition, match=rf"accept-record {VOLUME}`"):
            call()
    answer = accept(node)
    assert answer.exit_code == 0, answer.output
    node.stage()
    assert node.read() == "precious"
    assert node.expand(2 * SIZE) == 2 * SIZE
    node.unstage()
    node.record_file().write_bytes(records[-1])
    with pytest.raises(FailedPrecondition, match="is older than the volume"):
        node.stage()


@not_on("record", "rbd", "csi")
def test_a_volume_that_lost_its_mark_goes_on(node: Node, records: list[bytes]) -> None:
    assert records
    os.removexattr(node.record_file().parent, MARK)
    node.stage()
    assert node.read() == "precious"
    node.unstage()


def accept(node: Node) -> Result:
    arguments = ["accept-record", VOLUME, "--state-dir", str(node.state), "--yes"]
    return CliRunner().invoke(volume_command, arguments)


def test_two_writers_of_a_record_do_not_overwrite_each_other(used: Node) -> None:
    """Compare-and-swap: the second of two that read the same revision is told to call again."""
    seen = used.record()
    used.store.update(seen)
    with pytest.raises(Aborted, match="changed by another writer"):
        used.store.update(msgspec.structs.replace(seen, encryption=EncryptionState.PREPARED))
    assert used.encryption_state() is EncryptionState.ENCRYPTED


def test_cc3402_create_writes_the_intent_before_anything_else_can_happen(node: Node) -> None:
    """Field problem 22: from the first moment that a volume is to be seen, it is known to be encrypted."""
    node.create()
    document = json.loads(node.raw_record())
    assert document["volume"]["encryption"] == "prepared"
    assert document["volume"]["parameters"]["encrypted"] is True
    assert fingerprint(node.disk()) == BLANK
    again = node.create()
    assert again.record == node.record()
    assert again.context["encrypted"] == "true"


def test_a_stage_of_another_boot_counts_as_none(used: Node) -> None:
    """After a reboot nothing is mounted, whatever the file says."""
    used.stage()
    file = used.state / "stages" / VOLUME
    content = file.read_bytes()
    used.unstage()
    stale = json.loads(content)
    stale["boot_id"] = "00000000-0000-0000-0000-000000000000"
    file.write_text(json.dumps(stale))
    assert used.stages.get(VOLUME) is None
    used.stage()
    assert used.read() == "precious"
    used.unstage()
