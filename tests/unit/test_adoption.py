"""A LUKS2 file becomes a volume: by libcryptsetup and on a real folder, as no device is needed for that."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.backends.loopfile import LoopfileBackend
from csi_driver.backends.records import RecordCodec
from csi_driver.host.files import Files
from csi_driver.host.workers import Workers
from csi_driver.keys.base import Wrapping
from csi_driver.keys.metadata import MetadataWrapper
from csi_driver.keys.secret import read_secret
from csi_driver.luks import key_token
from csi_driver.luks.device import read_header
from csi_driver.model.errors import KeyLost
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Limits
from csi_driver.model.volume import KeyTrail
from csi_driver.volumes.adoption import Adoption, AdoptRequest
from csi_driver.volumes.keyslots import KeySlots
from tests import headers
from tests.cli import run_cli
from tests.fake_host import FakeLoops
from tests.keys.given import GivenSources
from tests.unit.test_staging_model import Rig

CHEAP = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
WRAPPER = MetadataWrapper("KMS kms (metadata)", lambda: Passphrase(b"of the class"))


def trail_of(key: bytes) -> KeyTrail:
    return KeyTrail(kms_id="kms", type="given", name="handle", wrapped=WRAPPER.wrap("handle", Passphrase(key)).text)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "foreign.img"
    headers.format_file(path, *CHEAP)
    return path


@pytest.fixture
def backend(tmp_path: Path) -> LoopfileBackend:
    made = LoopfileBackend(tmp_path / "loopfile", 0, Files(), FakeLoops(), RecordCodec())
    made.prepare()
    return made


@pytest.fixture
def adoption(tmp_path: Path, backend: LoopfileBackend) -> Iterator[Adoption]:
    workers, limits = Workers(()), Limits()
    workers.start()
    sources = GivenSources(kms=Wrapping(WRAPPER))
    yield Adoption(
        backend, workers, FakeLoops(), KeySlots(workers, limits), sources, Rig(tmp_path / "rig").rekeying, limits
    )
    workers.stop()


def test_the_header_names_a_key_that_a_kms_has_wrapped_and_a_copy_of_it_is_kept(
    adoption: Adoption, backend: LoopfileBackend, file: Path
) -> None:
    before = file.read_bytes()
    made = adoption.adopt(AdoptRequest("v", file, read_secret({}), trail_of(headers.PASSPHRASE)))
    for path in (backend.header_copy("v").with_name("disk.img"), backend.header_copy("v")):
        assert key_token.read(*read_header("the test", str(path))) == made.key
    assert file.read_bytes() == before


def test_a_key_of_a_kms_that_opens_nothing_is_told_as_that(
    adoption: Adoption, backend: LoopfileBackend, file: Path
) -> None:
    with pytest.raises(KeyLost, match=rf"the key handle of the KMS kms opens no key slot of {file}; "):
        adoption.adopt(AdoptRequest("v", file, read_secret({}), trail_of(b"another")))
    assert not backend.has("v")


def test_a_link_is_followed(adoption: Adoption, backend: LoopfileBackend, file: Path) -> None:
    link = file.with_name("link")
    link.symlink_to(file)
    adoption.adopt(AdoptRequest("v", link, read_secret({"CRYPTO_KEY_VALUE": headers.PASSPHRASE.decode()})))
    assert backend.has_header_copy("v")


def test_a_header_of_more_memory_is_taken_with_a_word_on_the_server(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, passphrase, state = tmp_path / "foreign.img", tmp_path / "passphrase", tmp_path / "state"
    headers.format_file(file, "--pbkdf", "argon2id", "--pbkdf-memory", "66560", "--pbkdf-force-iterations", "4")
    passphrase.write_bytes(headers.PASSPHRASE)
    options = ("--passphrase-file", passphrase, "--state-dir", state, "--endpoint", tmp_path / "csi.sock")
    run = ("volume", "adopt", "v", file, *options, "--free-space-floor", "0")
    (state / "locks").mkdir(parents=True)
    for folder in ("volumes", "new", "trash"):
        (state / "loopfile" / folder).mkdir(parents=True)
    refused = run_cli(*run)
    assert (refused.exit_code, "--pbkdf-memory-limit 66560Ki, here and at the server" in refused.stderr) == (1, True)
    done = run_cli(*run, "--pbkdf-memory-limit", "128Mi")
    assert done.exit_code == 0, done.stderr
    told = capfd.readouterr().err
    assert "the server needs this limit too" in told
    assert "66560Ki" in told
