"""The audit trail: who asked, and how the use of a key ended; and the file that it is told in too."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.agent.jobs import Job
from csi_driver.agent.work import CloneWork, Failed, Made, Request, Secret
from csi_driver.host.log import request_id
from csi_driver.images.checkpoint import Operation
from csi_driver.images.library import ImageLibrary
from csi_driver.images.requests import Clone, Import
from csi_driver.keys.audit import Audit, asker
from csi_driver.keys.secret import read_secret
from csi_driver.model.errors import Unauthenticated
from tests.machine.image_lab import unmetered
from tests.told_lines import told_lines

FIELDS = {
    "volume": "pvc-1",
    "claim_namespace": "team",
    "kms": "",
    "key": "secret",
    "operation": "use",
    "purpose": "test",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture(autouse=True)
def no_call() -> Iterator[None]:
    """Nobody has called, whatever an earlier test in this thread left."""
    token = request_id.set("")
    yield
    request_id.reset(token)


def lines(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_came_of_it_is_told_when_it_has_ended(file: Path) -> None:
    audit = Audit(file)
    with audit.using(**FIELDS):
        assert not file.exists()
    with pytest.raises(Unauthenticated), audit.using(**FIELDS):
        raise Unauthenticated("the passphrase opens no key slot")
    assert [(line["outcome"], line["volume"], line["purpose"]) for line in lines(file)] == [
        ("OK", "pvc-1", "test"),
        ("Unauthenticated", "pvc-1", "test"),
    ]
    assert "key slot" not in file.read_text()


def test_who_asked_is_a_call_the_schedule_or_a_command_of_whoever_logged_in(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit, login = Audit(file), tmp_path / "loginuid"
    monkeypatch.setattr("csi_driver.keys.audit._LOGIN", login)
    monkeypatch.setattr("os.getuid", lambda: 0)
    audit.record(**FIELDS)
    login.write_text("1000\n")
    audit.record(**FIELDS)
    login.write_text("4294967295\n")
    audit.record(**FIELDS)
    for variable, text in ((asker, "schedule"), (request_id, "r-1")):
        token = variable.set(text)
        audit.record(**FIELDS)
        variable.reset(token)
    assert [(line["by"], line.get("request_id")) for line in lines(file)] == [
        ("command of user 0", None),
        ("command of user 1000", None),
        ("command of user 0", None),
        ("schedule", None),
        ("call", "r-1"),
    ]


def test_a_full_file_becomes_the_one_before(file: Path) -> None:
    audit = Audit(file, most_bytes=600)
    for number in range(9):
        audit.record(**FIELDS | {"volume": f"pvc-{number}"})
    before = lines(file.with_name("audit.jsonl.1"))
    assert [line["volume"] for line in before + lines(file)][-1] == "pvc-8"
    assert file.stat().st_size <= 600


def test_a_file_that_cannot_be_written_keeps_nobody_from_a_key(tmp_path: Path) -> None:
    with told_lines() as told:
        Audit(tmp_path / "nowhere" / "file").record(**FIELDS)
    assert [line.event for line in told] == ["key used", "the audit file cannot be written"]


def test_what_another_thread_opens_at_the_change_of_file_stays_open(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("x" * 50)
    opened, really_open = [], os.open

    def out_of_descriptors(path: Path, *arguments: int) -> int:
        if path == file and file.with_name("audit.jsonl.1").exists():
            opened.append(really_open("/dev/null", os.O_RDONLY))  # by another thread: it gets the number just closed
            raise OSError(errno.EMFILE, "Too many open files")
        return really_open(path, *arguments)

    monkeypatch.setattr(os, "open", out_of_descriptors)
    with told_lines() as told:
        Audit(file, most_bytes=40).record(**FIELDS)
    assert [line.event for line in told] == ["key used", "the audit file cannot be written"]
    os.close(opened[0])  # OSError where it was closed already


def test_the_passphrases_of_clones_are_told_and_copies_have_none(file: Path, tmp_path: Path) -> None:
    library = ImageLibrary(tmp_path / "images", audit=Audit(file))
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(1 << 20))

    cheap = {"CRYPTO_PBKDF": "pbkdf2", "CRYPTO_KEY_HASH": "sha256"}
    key, wrong = (read_secret({"CRYPTO_KEY_VALUE": text, **cheap}) for text in ("right", "wrong"))
    library.import_(Import("disk", str(raw)), unmetered)
    library.clone(Clone("disk", "copy"), unmetered)
    library.clone(Clone("disk", "safe", Operation.ENCRYPT, new_key=key), unmetered)
    with pytest.raises(Unauthenticated):
        library.clone(Clone("safe", "plain", Operation.DECRYPT, key=wrong), unmetered)
    library.clone(Clone("safe", "other", Operation.REENCRYPT, key=key, new_key=wrong), unmetered)
    assert [(line["image"], line["purpose"], line["outcome"]) for line in lines(file)] == [
        ("safe", "encrypt", "OK"),
        ("plain", "decrypt", "Unauthenticated"),
        ("other", "reencrypt", "OK"),
    ]


def test_what_an_agents_child_does_with_passphrases_is_told_by_the_agent(file: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(1 << 20))
    ImageLibrary(images).import_(Import("disk", str(raw), owner="uid-disk"), unmetered)
    right = {"CRYPTO_KEY_VALUE": "right", "CRYPTO_PBKDF": "pbkdf2", "CRYPTO_KEY_HASH": "sha256"}

    def made(name: str, work: CloneWork) -> Made | Failed | None:
        job = Job(Request(folder=str(images), name=name, owner="uid-1", secret=None, work=work), Audit(file), _nobody)
        assert job.join(60)
        return job.result

    with told_lines() as told:
        assert isinstance(made("copy", CloneWork("disk", "uid-disk", "ignore", None, None, None)), Made)
        assert isinstance(
            made("safe", CloneWork("disk", "uid-disk", "encrypt", None, Secret("vms/key", right), None)), Made
        )
        wrong = Secret("vms/other", right | {"CRYPTO_KEY_VALUE": "wrong"})
        failed = made("plain", CloneWork("safe", "uid-1", "decrypt", wrong, None, None))
        assert isinstance(failed, Failed)
        assert "opens no key slot of image safe" in failed.text
        assert "back into the secret vms/other" in failed.text
    assert [(line["by"], line["image"], line["key"], line["purpose"], line["outcome"]) for line in lines(file)] == [
        ("Image uid-1", "safe", "secret", "encrypt", "OK"),
        ("Image uid-1", "plain", "secret", "decrypt", "Unauthenticated"),
    ]
    assert [line.event for line in told if line.event == "key used"] == ["key used"] * 2
    assert "wrong" not in file.read_text()


def _nobody() -> None:
    """Wants to know nothing."""
