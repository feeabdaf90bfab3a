"""A volume of another driver becomes ours in place: nothing before its key has opened it; a cut call is gone on with.

By libcryptsetup on a real folder; the other driver's storage is a file, which `take` brings to where ours are.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.backends.base import ForeignVolume
from csi_driver.backends.loopfile import LoopfileBackend
from csi_driver.backends.records import RecordCodec
from csi_driver.host.clonefile import FileIdentity
from csi_driver.host.files import Files
from csi_driver.host.handle import Handle, open_handle
from csi_driver.host.workers import Workers
from csi_driver.keys.base import Wrapping
from csi_driver.keys.metadata import MetadataWrapper
from csi_driver.keys.secret import read_secret
from csi_driver.luks import key_token
from csi_driver.luks.device import read_header
from csi_driver.model.errors import FailedPrecondition, ForeignSignature, KeyLost, Unauthenticated
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Limits
from csi_driver.model.volume import EncryptionState, FileSystemState, KeyTrail, VolumeParameters, VolumeRecord
from csi_driver.volumes.keyslots import KeySlots
from csi_driver.volumes.takeover import Takeover, TakeoverRequest
from tests import headers
from tests.fake_host import FakeLoops
from tests.keys.given import GivenSources
from tests.unit.test_adoption import CHEAP
from tests.unit.test_staging_model import Rig

HANDLE = "0001-0008-ceph-one-0000000000000007-8a710f4c-9d2c-4f77-8a4e-2f2f1d9b9c01"
SECRET = read_secret({"encryptionPassphrase": headers.PASSPHRASE.decode()})
WRAPPER = MetadataWrapper("KMS kms (metadata)", lambda: Passphrase(b"of the class"))


class Killed(BaseException):
    """The process ends at this very step."""


class OtherDriver:
    """Has one volume, in a file."""

    def __init__(self, backend: LoopfileBackend, file: Path) -> None:
        self._backend = backend
        self.file = file
        self.kms_id, self.wrapped = "", ""
        self.behind: Callable[[], None] = lambda: None

    def find(self, handle: str, name: str) -> ForeignVolume:
        is_ours = self._backend.has(name)
        return ForeignVolume(
            handle, name, f"the image {self.file}", str(self.file), "id", 0 if is_ours else self.file.stat().st_size,
            VolumeParameters(encrypted=True), self.kms_id, self.wrapped, "tenant", is_ours,
        )  # fmt: skip

    @contextmanager
    def looked_at(self, foreign: ForeignVolume) -> Iterator[Handle]:
        with open_handle(foreign.storage, os.O_RDONLY) as device:
            yield device

    def take(self, foreign: ForeignVolume, record: VolumeRecord) -> None:
        def fill(path: str) -> None:
            shutil.copyfile(foreign.storage, path)

        self._backend.create_filled(record, foreign.size, fill)
        os.unlink(foreign.storage)
        self.behind()


class FileSlots(KeySlots):
    """Tries passphrases on what is no device here."""

    def verify(self, record: VolumeRecord, device: Handle, passphrase: Passphrase) -> None:
        assert record.luks is not None
        self.check_image(device.name, FileIdentity.of(device.name), record.luks, passphrase)


class Sources(GivenSources):
    """Of which nobody reads a configuration."""

    def foreign(self, kms_id: str, name: str, wrapped: str, tenant: str) -> KeyTrail:
        return KeyTrail(kms_id=kms_id, type="given", name=name, wrapped=wrapped, tenant=tenant, foreign=True)


@pytest.fixture
def backend(tmp_path: Path) -> LoopfileBackend:
    made = LoopfileBackend(tmp_path / "loopfile", 0, Files(), FakeLoops(), RecordCodec())
    made.prepare()
    return made


@pytest.fixture
def other(tmp_path: Path, backend: LoopfileBackend) -> OtherDriver:
    path = tmp_path / "of-the-other"
    headers.format_file(path, *CHEAP)
    return OtherDriver(backend, path)


@pytest.fixture
def takeover(tmp_path: Path, backend: LoopfileBackend, other: OtherDriver) -> Iterator[Takeover]:
    workers, limits, sources = Workers(()), Limits(), Sources(kms=Wrapping(WRAPPER))
    workers.start()
    slots, rekeying = FileSlots(workers, limits), Rig(tmp_path / "rig").rekeying
    yield Takeover(backend, other, workers, slots, sources, rekeying, limits)
    workers.stop()


def take(takeover: Takeover) -> VolumeRecord:
    return takeover.take(TakeoverRequest("v", takeover.find(HANDLE, "v"), SECRET))


def test_what_the_header_says_is_recorded_and_nothing_is_ever_formatted(
    takeover: Takeover, other: OtherDriver, backend: LoopfileBackend
) -> None:
    size, before = other.file.stat().st_size, other.file.read_bytes()
    made = take(takeover)
    assert made == backend.get("v")
    assert (made.encryption, made.file_system) == (EncryptionState.ENCRYPTED, FileSystemState.RAW)
    assert made.luks is not None
    assert made.luks.data_offset + made.capacity_bytes == size
    assert (made.key, made.tenant) == (None, "tenant")
    disk = backend.header_copy("v").with_name("disk.img")
    assert disk.read_bytes() == before
    assert backend.has_header_copy("v")


@pytest.mark.parametrize("wrapped", [False, True], ids=["secret", "kms"])
def test_a_key_that_opens_nothing_changes_nothing(
    takeover: Takeover, other: OtherDriver, backend: LoopfileBackend, *, wrapped: bool
) -> None:
    before = other.file.read_bytes()
    wrong = read_secret({"encryptionPassphrase": "another"})
    if wrapped:
        other.kms_id, other.wrapped = "kms", WRAPPER.wrap(HANDLE, Passphrase(b"another")).text
    with pytest.raises(
        KeyLost if wrapped else Unauthenticated, match=r"opens no key slot of .*of-the-other|of-the-other"
    ):
        takeover.take(TakeoverRequest("v", takeover.find(HANDLE, "v"), wrong))
    assert not backend.has("v")
    assert other.file.read_bytes() == before


def test_what_is_no_luks_or_has_no_passphrase_is_refused(
    takeover: Takeover, other: OtherDriver, backend: LoopfileBackend
) -> None:
    with pytest.raises(FailedPrecondition, match=r"neither CRYPTO_KEY_VALUE nor encryptionPassphrase"):
        takeover.take(TakeoverRequest("v", takeover.find(HANDLE, "v"), read_secret({})))
    other.file.write_bytes(b"\x7fELF".ljust(1 << 20, b"x"))
    with pytest.raises(ForeignSignature):
        take(takeover)
    assert not backend.has("v")


def test_a_call_that_was_cut_behind_the_taking_is_gone_on_with(
    takeover: Takeover, other: OtherDriver, backend: LoopfileBackend
) -> None:
    other.kms_id, other.wrapped = "kms", WRAPPER.wrap(HANDLE, Passphrase(headers.PASSPHRASE)).text

    def die() -> None:
        raise Killed

    other.behind = die
    with pytest.raises(Killed):
        take(takeover)
    assert not backend.has_header_copy("v")
    made = take(takeover)
    assert made.key is not None
    assert (made.key.foreign, made.key.name, made.key.tenant) == (True, HANDLE, "tenant")
    for path in (backend.header_copy("v").with_name("disk.img"), backend.header_copy("v")):
        assert key_token.read(*read_header("the test", str(path))) == made.key
    assert take(takeover) == made
