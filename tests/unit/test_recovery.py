"""A header put back, one that lies elsewhere, a file that is adopted: what is refused and what is kept."""

from pathlib import Path

import pytest

from csi_driver.backends.base import kept_before, next_before
from csi_driver.keys.secret import read_secret
from csi_driver.luks import recovery as luks
from csi_driver.luks.header import parse
from csi_driver.luks.header_rules import Limits as HeaderLimits
from csi_driver.model.errors import (
    DeviceInUse,
    DeviceMismatch,
    DriverError,
    FailedPrecondition,
    Unauthenticated,
)
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Limits
from csi_driver.model.volume import LuksIdentity
from csi_driver.volumes.adoption import Adoption, AdoptRequest
from csi_driver.volumes.keyslots import KeySlots
from csi_driver.volumes.presence import Presences
from csi_driver.volumes.recovery import Recovery
from tests import headers
from tests.fake_host import at_home
from tests.fake_kernel import KernelMounts, KernelWorkers
from tests.handles import handle_on
from tests.keys.given import GivenSources
from tests.unit.test_staging_model import KEY, NO_KEY, Rig

RIGHT = Passphrase(headers.PASSPHRASE)


def identity_of(area: bytes) -> LuksIdentity:
    return LuksIdentity(
        uuid=parse(area, "the test").uuid,
        cipher="aes-xts-plain64",
        key_bits=512,
        sector_size=512,
        data_offset=headers.DATA_OFFSET,
        digest=parse(area, "the test").key_digest,
    )


def with_other_seqid(area: bytes) -> bytes:
    """The same header, written once more."""
    return headers.forged(area, lambda metadata: metadata["tokens"].update({"0": {"type": "mine", "keyslots": []}}))


class Device:
    """A volume's file, the copy of its header, and where what is overwritten goes."""

    def __init__(self, folder: Path, content: bytes) -> None:
        self.area = headers.formatted()
        self.path, self.copy, self.before = (folder / name for name in ("disk.img", "copy", "header.before"))
        headers.write_sparse(self.path, content)
        headers.write_sparse(self.copy, self.area)

    def restore(self, passphrase: Passphrase | None) -> bool:
        with handle_on(self.path) as device:
            return luks.restore_header(
                "volume v",
                device,
                headers.DEVICE_SIZE,
                identity_of(self.area),
                HeaderLimits(),
                str(self.copy),
                passphrase,
                str(self.before),
            )

    def head(self) -> bytes:
        return self.path.read_bytes()[: 2 * headers.HDR_SIZE]


def test_what_is_overwritten_is_kept(tmp_path: Path) -> None:
    device = Device(tmp_path, other := with_other_seqid(headers.formatted()))
    assert device.restore(RIGHT)
    assert device.head() == device.area[: 2 * headers.HDR_SIZE]
    assert headers.accepts(device.path.read_bytes()[: headers.DATA_OFFSET])
    assert device.before.read_bytes()[: 2 * headers.HDR_SIZE] == other[: 2 * headers.HDR_SIZE]


def test_a_copy_that_the_key_does_not_open_is_not_written(tmp_path: Path) -> None:
    device = Device(tmp_path, with_other_seqid(headers.formatted()))
    found = device.head()
    with pytest.raises(Unauthenticated):
        device.restore(Passphrase(b"another"))
    assert device.head() == found
    assert not device.before.exists()
    assert device.restore(None), "by force"
    assert device.head() == device.area[: 2 * headers.HDR_SIZE]


def test_what_is_no_header_is_not_kept(tmp_path: Path) -> None:
    for content in (b"", b"\xa5" * 65536):
        device = Device(tmp_path, content)
        assert not device.restore(RIGHT)
        assert not device.before.exists()
        assert device.head() == device.area[: 2 * headers.HDR_SIZE]


def test_nothing_is_written_where_nothing_can_be_kept(tmp_path: Path) -> None:
    device = Device(tmp_path, with_other_seqid(headers.formatted()))
    found = device.head()
    device.before = tmp_path / "nowhere" / "header.before"
    with pytest.raises(FailedPrecondition, match=r"cannot be kept at .*nothing was written"):
        device.restore(RIGHT)
    assert device.head() == found


def test_kept_headers_have_numbers_and_none_is_overwritten(tmp_path: Path) -> None:
    first = tmp_path / "header.before"
    for number in range(3):
        assert len(kept_before(first)) == number
        next_before(first, number).touch()
    assert [path.name for path in kept_before(first)] == ["header.before", "header.before.1", "header.before.2"]


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (lambda: headers.formatted(uuid=headers.OTHER_UUID), "is the header of another volume"),
        (lambda: headers.formatted("--sector-size", "4096"), "has another volume key"),
        (headers.formatted, None),
        (lambda: b"", None),
        (lambda: b"\xa5" * 65536, None),
    ],
    ids=["UUID", "volume key", "the same", "blank", "damaged"],
)
def test_a_header_is_for_the_device_whose_own_says_the_same(tmp_path: Path, own: object, words: str | None) -> None:
    assert callable(own)
    headers.write_sparse(tmp_path / "disk.img", own())
    with handle_on(tmp_path / "disk.img") as device:
        if words is None:
            luks.refuse_another("volume v", device, "copy", identity_of(headers.formatted()))
        else:
            with pytest.raises(FailedPrecondition, match=words):
                luks.refuse_another("volume v", device, "copy", identity_of(headers.formatted()))


# --- what is asked before anything is read ---------------------------------------------------------------------------


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    """A volume that was used and closed."""
    rig = Rig(tmp_path)
    rig.create("enc-1")
    rig.stage("enc-1")
    rig.unstage("enc-1")
    return rig


def recovery_of(rig: Rig) -> Recovery:
    presences = Presences(rig.backend, rig.stages, rig.mappings, KernelMounts(rig.kernel))
    workers, sources = KernelWorkers(rig.kernel), GivenSources()
    return Recovery(
        rig.backend, presences, workers, rig.kernel.loops, sources, rig.keys, at_home(rig.backend), Limits()
    )


def adopt(rig: Rig, file: Path) -> None:
    workers = KernelWorkers(rig.kernel)
    slots = KeySlots(workers, Limits())
    made = Adoption(rig.backend, workers, rig.kernel.loops, slots, GivenSources(), rig.rekeying, Limits())
    made.adopt(AdoptRequest("adopted", file, read_secret({"CRYPTO_KEY_VALUE": "right"})))


def test_a_passphrase_is_asked_for_before_a_header_is_put_back(rig: Rig, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.touch()
    with pytest.raises(FailedPrecondition, match=r"--passphrase-file or --secret-dir, or --force"):
        recovery_of(rig).restore_header("enc-1", copy, NO_KEY)


def test_a_file_that_is_attached_by_hand_keeps_its_header(rig: Rig, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.touch()
    disk = tmp_path / "loopfile/volumes/enc-1/disk.img"
    with rig.kernel.loops.attach(str(disk), autoclear=True), pytest.raises(DeviceInUse):
        recovery_of(rig).restore_header("enc-1", copy, KEY)


@pytest.mark.parametrize("name", ["disk.img", "next.img", "link"])
def test_half_a_volume_is_neither_adopted_nor_opened(rig: Rig, tmp_path: Path, name: str) -> None:
    halves = tmp_path / "halves"
    halves.mkdir()
    for half in ("disk.img", "next.img"):
        (halves / half).touch()
    (tmp_path / "link").symlink_to(halves / "disk.img")
    path = tmp_path / "link" if name == "link" else halves / name
    with pytest.raises(FailedPrecondition, match="the other half; let luks-csi volume reencrypt"):
        adopt(rig, path)
    with pytest.raises(FailedPrecondition, match="the other half; let luks-csi volume reencrypt"):
        recovery_of(rig).open(path, "rec", None, KEY, read_only=True)
    assert not rig.backend.has("adopted")


def test_what_is_attached_is_neither_adopted_nor_opened(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "foreign.img"
    path.touch()
    with rig.kernel.loops.attach(str(path), autoclear=True) as loop:
        for call in (
            lambda: adopt(rig, path),
            lambda: recovery_of(rig).open(path, "rec", None, KEY, read_only=True),
        ):
            with pytest.raises(DeviceInUse, match=rf"^{path} is in use by {loop.name}; .*work on a copy"):
                call()


@pytest.mark.parametrize(("path", "kind"), [("", "directory"), ("/dev/null", "character device")])
def test_what_is_no_file_is_told_by_what_it_is(rig: Rig, tmp_path: Path, path: str, kind: str) -> None:
    with pytest.raises(FailedPrecondition, match=rf"is a {kind} and a volume is made of a file"):
        adopt(rig, tmp_path / path)
    with pytest.raises(DeviceMismatch, match=rf"is a {kind}; name the volume's device, or the file below it"):
        recovery_of(rig).open(tmp_path / path, "rec", None, KEY, read_only=False)


def test_what_is_not_there_is_told(rig: Rig, tmp_path: Path) -> None:
    for call in (
        lambda: adopt(rig, tmp_path / "nothing"),
        lambda: recovery_of(rig).open(tmp_path / "nothing", "rec", None, KEY, read_only=False),
    ):
        with pytest.raises(DriverError, match=r"cannot be looked at|there is nothing at"):
            call()
