"""`luks-csi volume encrypt` and `reencrypt`: what is asked, what is handed on, what is told."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from csi_driver.cli.convert import encrypt, reencrypt
from csi_driver.cli.secret_files import SecretSource
from csi_driver.keys.secret import SecretKey
from csi_driver.model.settings import Settings
from csi_driver.model.volume import Conversion, LuksIdentity, VolumeParameters, VolumeRecord
from csi_driver.volumes.conversion import Watch

MIB = 1 << 20
LUKS = LuksIdentity(uuid="u", cipher="aes-xts-plain64", key_bits=512, sector_size=512, data_offset=16 * MIB)
RECORD = VolumeRecord(
    id="data", name="data", capacity_bytes=64 * MIB, parameters=VolumeParameters(), created="2026-11-20T00:00:00+00:00"
)
HALF = VolumeRecord(
    id="data",
    name="data",
    capacity_bytes=64 * MIB,
    parameters=VolumeParameters(),
    conversion=Conversion(luks=LUKS, done=32 * MIB),
    created="2026-11-20T00:00:00+00:00",
)


class FakeConversions:
    """Notes what it is asked for and moves nothing."""

    def __init__(self, record: VolumeRecord) -> None:
        self.record = record
        self.asked: list[Any] = []

    def reencrypt(self, volume_id: str, secret: SecretKey, watch: Watch) -> VolumeRecord:
        watch.progress(self.record.capacity_bytes)
        self.asked.append(("reencrypt", volume_id, secret.passphrase and secret.passphrase.reveal(), watch.rate))
        return self.record

    def encrypt(
        self, volume_id: str, secret: SecretKey, kms_id: str | None, watch: Watch, *, generate: bool
    ) -> VolumeRecord:
        passphrase = secret.passphrase and secret.passphrase.reveal()
        self.asked.append(("encrypt", volume_id, passphrase, kms_id, generate, watch.rate))
        return self.record


def run(command: Any, tmp_path: Path, *arguments: str, record: VolumeRecord = RECORD) -> tuple[Result, list[Any]]:
    conversions = FakeConversions(record)

    def build(settings: Settings) -> Any:
        backend = SimpleNamespace(get=lambda _: record)
        return SimpleNamespace(
            settings=settings,
            backend=backend,
            offline=lambda: SimpleNamespace(conversions=conversions),
            stop=lambda: None,
        )

    places = ["--state-dir", str(tmp_path), "--endpoint", f"unix://{tmp_path}/csi.sock"]
    return CliRunner().invoke(command, [*arguments, *places], obj=build), conversions.asked


@pytest.fixture
def passphrase(tmp_path: Path) -> str:
    path = tmp_path / "passphrase"
    path.write_text("plain oak table\n")
    return str(path)


def test_another_volume_key(tmp_path: Path, passphrase: str) -> None:
    done, asked = run(reencrypt, tmp_path, "data", "--yes", "--rate", "50Mi", "--passphrase-file", passphrase)
    assert (done.exit_code, done.stdout) == (0, "volume data has another volume key\n")
    assert "volume data: 100% of 64MiB" in done.stderr
    assert asked == [("reencrypt", "data", b"plain oak table", 50 * MIB)]


@pytest.mark.parametrize(
    ("options", "kms_id", "generate"),
    [((), None, False), (("--kms", "vault-1"), "vault-1", False), (("--generate-key",), None, True)],
)
def test_a_first_one(
    tmp_path: Path, passphrase: str, options: tuple[str, ...], kms_id: str | None, *, generate: bool
) -> None:
    given = ("--yes", "-o", "json", "--passphrase-file", passphrase)
    done, asked = run(encrypt, tmp_path, "data", *options, *given)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["id"] == "data"
    assert asked == [("encrypt", "data", b"plain oak table", kms_id, generate, None)]


@pytest.mark.parametrize(
    ("command", "options", "record", "asked_for", "new"),
    [
        (encrypt, (), RECORD, "New passphrase of volume data", True),
        (encrypt, (), HALF, "Passphrase of volume data", False),
        (encrypt, ("--kms", "vault-1"), RECORD, "Passphrase of volume data", False),
        (encrypt, ("--generate-key",), RECORD, "Passphrase of volume data", False),
        (reencrypt, (), RECORD, "Passphrase of volume data", False),
    ],
)
def test_only_a_new_passphrase_is_asked_for_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any, options: tuple[str, ...], record: VolumeRecord,
    asked_for: str, *, new: bool,
) -> None:  # fmt: skip
    read: list[tuple[str, bool]] = []

    def note(_: SecretSource, prompt: str, *, new: bool = False) -> dict[str, str]:
        read.append((prompt, new))
        return {}

    monkeypatch.setattr(SecretSource, "read", note)
    run(command, tmp_path, "data", "--yes", *options, record=record)
    assert read == [(asked_for, new)]


@pytest.mark.parametrize("command", [encrypt, reencrypt])
def test_it_is_asked_before_it_begins_and_not_before_it_goes_on(tmp_path: Path, command: Any) -> None:
    done, asked = run(command, tmp_path, "data")
    assert done.exit_code == 2
    assert "answer with --yes" in done.stderr
    assert asked == []
    done, asked = run(command, tmp_path, "data", record=HALF)
    assert done.exit_code == 0, done.output
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("data", "--kms", "vault-1", "--generate-key"), "exclude each other"),
        (("data", "--rate", "0"), "no size that anything could have"),
        (("../data",), "is no id of a volume"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_asked(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done, asked = run(encrypt, tmp_path, *arguments, "--yes")
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert asked == []
