"""A volume's content as an image: what is refused, what is made and recorded, what a kill leaves, the command."""

import contextlib
import dataclasses
import fcntl
import os
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from csi_driver.backends.loopfile import LoopfileBackend
from csi_driver.backends.records import RecordCodec
from csi_driver.cli.image import image
from csi_driver.host import ofdlock
from csi_driver.host.devicemapper import DeviceMapper
from csi_driver.host.files import Files
from csi_driver.host.locks import VolumeLocks
from csi_driver.host.mounts import Mounts
from csi_driver.images.base import MIB, ImageFormat, Progress
from csi_driver.images.bring import Meter
from csi_driver.images.library import ImageLibrary
from csi_driver.images.store import ImageRecord, Provenance
from csi_driver.luks.mapping import Mappings
from csi_driver.model.errors import (
    AlreadyExists,
    DeviceInUse,
    FailedPrecondition,
    InvalidArgument,
    InvalidHeader,
    NotFound,
    VolumeBusy,
)
from csi_driver.model.settings import Limits, Settings
from csi_driver.model.volume import (
    Conversion,
    EncryptionState,
    FileSystemState,
    KeyTrail,
    LuksIdentity,
    Rekey,
    RekeyPhase,
    VolumeRecord,
)
from csi_driver.volumes.driver import Driver, build_driver
from csi_driver.volumes.export import Export, Exports
from csi_driver.volumes.keyslots import KeySlots
from csi_driver.volumes.offline import Offline
from csi_driver.volumes.presence import Presences
from csi_driver.volumes.stages import Stage, Stages
from tests.fake_host import FakeLoops, MemoryBackend, NoHolders, undisturbed
from tests.fake_kernel import Killed
from tests.machine.image_lab import unmetered
from tests.unit.test_volume_from_image import NOTHING, PLAIN, SEALED, SIZE, InlineWorkers, Rig, inside, story
from tests.volume_images import Made, encrypted_image, put_image

PAYLOAD = 3 * MIB
OF_SEALED = {"backingImage": "copy", "encrypted": "true"}
OF_PLAIN = {"backingImage": "copy"}
CONTENT = random.Random("a volume").randbytes(PAYLOAD)
TRAIL = KeyTrail(kms_id="vault-1", type="vault")


@dataclasses.dataclass
class Node:
    """A node with a plain and an encrypted volume, each made of an image and closed."""

    state: Path
    rig: Rig
    exports: Exports
    library: ImageLibrary
    locks: VolumeLocks
    stages: Stages
    loops: FakeLoops

    def export(self, volume: str, name: str = "copy", meter: Meter = unmetered, **more: Any) -> ImageRecord:
        return self.exports.export(Export(volume, name, **more), self.library, meter)

    def record(self, volume: str) -> VolumeRecord:
        return self.rig.backend.get(volume)

    def change(self, volume: str, **changes: object) -> None:
        self.rig.backend.update(msgspec.structs.replace(self.record(volume), **changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Made]:
    folder = tmp_path_factory.mktemp("made")
    source = folder / "source.raw"
    source.write_bytes(CONTENT)
    return {"plain": Made(source, PAYLOAD), "sealed": encrypted_image(source, folder / "sealed")}


@pytest.fixture
def node(tmp_path: Path, made: Mapping[str, Made]) -> Node:
    for name, one in made.items():
        put_image(tmp_path, name, one)
    rig = Rig(tmp_path)
    rig.create(PLAIN, "plain-1", secret=NOTHING)
    rig.create(SEALED, "sealed-1")
    stages = Stages(tmp_path / "stages", Files())
    (tmp_path / "stages").mkdir()
    (tmp_path / "locks").mkdir()
    locks = VolumeLocks(tmp_path / "locks", NoHolders(), rig.backend.has, remade=True)
    presences = Presences(rig.backend, stages, Mappings(DeviceMapper(), NoHolders()), Mounts())
    slots = KeySlots(InlineWorkers(undisturbed), Limits())
    exports = Exports(rig.backend, locks, presences, rig.loops, slots)
    return Node(tmp_path, rig, exports, ImageLibrary(tmp_path / "images"), locks, stages, rig.loops)


# --- what is made ----------------------------------------------------------------------------------------------------


def test_an_encrypted_volume_stays_encrypted_and_a_volume_of_it_opens_with_the_same_secret(node: Node) -> None:
    disk = node.rig.disk("sealed-1")
    before = disk.read_bytes()
    record = node.export("sealed-1", secret="images/vm-key", owner="uid-1")
    volume = node.record("sealed-1")
    assert record == node.library.get("copy")
    assert (record.format, record.luks) == (ImageFormat.LUKS2, volume.luks)
    assert (record.size, record.file_size) == (SIZE, len(before))
    assert (record.secret, record.owner) == ("images/vm-key", "uid-1")
    assert record.provenance == Provenance(operation="export", source="sealed-1")
    assert node.library.file("copy").read_bytes() == before == disk.read_bytes()
    assert sorted(path.name for path in node.library.file("copy").parent.iterdir()) == ["image", "record.json"]
    made = node.rig.create(OF_SEALED, "again")
    assert inside(node.rig.disk("again"), PAYLOAD) == CONTENT
    assert made.luks is not None
    assert volume.luks is not None
    assert (made.luks.digest, made.luks.uuid != volume.luks.uuid) == (volume.luks.digest, True)


def test_a_plain_volume_is_raw_whatever_a_guest_has_written_into_it(node: Node) -> None:
    with node.rig.disk("plain-1").open("r+b") as disk:
        disk.write(b"QFI\xfb\0\0\0\x03")
    record = node.export("plain-1")
    assert (record.format, record.luks, record.size, record.file_size) == (ImageFormat.RAW, None, SIZE, SIZE)
    assert node.library.file("copy").read_bytes() == node.rig.disk("plain-1").read_bytes()
    node.rig.create(OF_PLAIN, "again", secret=NOTHING)
    assert node.rig.disk("again").read_bytes() == node.rig.disk("plain-1").read_bytes()


def test_what_was_never_written_stays_a_hole(node: Node) -> None:
    node.rig.create(PLAIN, "large", required=128 * MIB, secret=NOTHING)
    node.export("large")
    assert node.library.file("copy").stat().st_blocks * 512 < 2 * PAYLOAD


def test_a_class_may_say_that_its_image_was_made_of_a_volume_and_must_name_that(node: Node) -> None:
    node.export("plain-1")
    told = story("export-from-volume", volume_name="plain-1", export_type="raw")
    node.rig.create(OF_PLAIN | told, "again", secret=NOTHING)
    with pytest.raises(InvalidArgument, match=r"volume-name 'other' of image copy and its record says 'plain-1'"):
        node.rig.create(OF_PLAIN | story("export-from-volume", volume_name="other"), "more", secret=NOTHING)
    with pytest.raises(InvalidArgument, match=r"'upload' of image copy and its record says 'export-from-volume"):
        node.rig.create(OF_PLAIN | story("upload"), "more", secret=NOTHING)


# --- what is refused -------------------------------------------------------------------------------------------------


def none_made(node: Node) -> bool:
    return "copy" not in node.library.names() and not node.library.unfinished()


LUKS = LuksIdentity(uuid="u", cipher="aes-xts-plain64", key_bits=512, sector_size=512, data_offset=16 * MIB)


@pytest.mark.parametrize(
    ("volume", "changes", "said"),
    [
        ("sealed-1", {"conversion": Conversion(luks=LUKS, done=SIZE // 2)}, r"50 % are done; let luks-csi volume reen"),
        ("plain-1", {"conversion": Conversion(luks=LUKS)}, r"0 % are done; let luks-csi volume encrypt plain-1 run"),
        ("sealed-1", {"rekey": Rekey(phase=RekeyPhase.ADDING)}, r"end that first \(luks-csi keys rotate sealed-1\)"),
        ("sealed-1", {"key": TRAIL}, r"has a key of its own, which no secret .* without encryptionKMSID and generateK"),
        ("sealed-1", {"encryption": EncryptionState.PREPARED}, r"was never staged, so there is nothing in it"),
        ("sealed-1", {"encryption": EncryptionState.FORMATTING}, r"was never staged, so there is nothing in it"),
        ("plain-1", {"file_system": FileSystemState.NONE}, r"was never staged, so there is nothing in it"),
        ("plain-1", {"file_system": FileSystemState.MAKING}, r"has no file system yet; stage it as a mount first"),
        ("plain-1", {"capacity_bytes": SIZE + MIB}, rf"with {SIZE + MIB} bytes and its file has {SIZE}; end its expan"),
    ],
)
def test_a_volume_that_is_not_whole_or_has_a_key_of_its_own_is_refused(
    node: Node, volume: str, changes: dict[str, object], said: str
) -> None:
    node.change(volume, **changes)
    with pytest.raises(FailedPrecondition, match=said):
        node.export(volume)
    assert none_made(node)


def attached(node: Node) -> contextlib.AbstractContextManager[object]:
    return node.loops.attach(str(node.rig.disk("plain-1")), autoclear=True)


@contextlib.contextmanager
def recorded(node: Node) -> Iterator[None]:
    node.stages.put("plain-1", Stage(staging_path="/staging", block=False, device="/dev/loop7"))
    yield
    node.stages.remove("plain-1")


@contextlib.contextmanager
def attached_unseen(node: Node) -> Iterator[None]:
    """By a driver whose devices this process does not see."""
    descriptor = os.open(node.rig.disk("plain-1"), os.O_RDWR)
    assert ofdlock.try_lock(descriptor)
    yield
    os.close(descriptor)


@contextlib.contextmanager
def attached_by_hand(node: Node) -> Iterator[None]:
    """By somebody who takes no lock."""
    with node.loops.attach(str(node.rig.disk("plain-1")), autoclear=True) as handle:
        backing = node.loops.bound[handle.name].backing
        fcntl.fcntl(backing, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_UNLCK, 0, 0, 0, 0))
        assert not ofdlock.is_locked(backing)
        yield


@pytest.mark.parametrize("use", [attached, attached_unseen, attached_by_hand, recorded])
def test_a_volume_that_somebody_may_write_to_is_refused(
    node: Node, use: Callable[[Node], contextlib.AbstractContextManager[object]]
) -> None:
    with (
        use(node),
        pytest.raises(DeviceInUse, match=r"volume plain-1 is in use and only a closed one becomes an image"),
    ):
        node.export("plain-1")
    assert none_made(node)
    node.export("plain-1")


def test_it_is_locked_for_as_long_as_it_is_read(node: Node) -> None:
    locked = []

    @contextlib.contextmanager
    def looking(what: str, total: int | None) -> Iterator[Progress]:
        assert (what, total) == ("copying", SIZE)
        with pytest.raises(VolumeBusy), node.locks.hold("plain-1"):
            pass
        locked.append("plain-1")
        yield lambda _: None

    node.export("plain-1", meter=looking)
    assert locked == ["plain-1"]
    with node.locks.hold("plain-1"), pytest.raises(VolumeBusy):
        node.export("plain-1", "another")


def test_half_of_a_volume_is_refused(node: Node) -> None:
    with node.rig.disk("plain-1").with_name("next.img").open("wb") as half:
        half.seek(17 * MIB)
        half.write(b"moved")
    with pytest.raises(FailedPrecondition, match=r"next\.img beside it holds what was moved"):
        node.export("plain-1")


def test_a_header_that_is_not_the_volumes_is_refused(node: Node, made: Mapping[str, Made], tmp_path: Path) -> None:
    other = encrypted_image(made["plain"].file, tmp_path / "other")
    with node.rig.disk("sealed-1").open("r+b") as disk:
        disk.write(other.file.read_bytes()[: 16 * MIB])
    with pytest.raises(FailedPrecondition, match=r"expected the header with UUID .* in volume sealed-1, found UUID"):
        node.export("sealed-1")
    with node.rig.disk("sealed-1").open("r+b") as disk:
        disk.write(b"LUKS\xba\xbe\0\x02" + bytes(4 * MIB))
    with pytest.raises(InvalidHeader, match=r"volume sealed-1"):
        node.export("sealed-1")
    assert none_made(node)


def test_a_plain_volume_that_begins_like_luks_is_refused(node: Node) -> None:
    with node.rig.disk("plain-1").open("r+b") as disk:
        disk.write(b"LUKS\xba\xbe")
    with pytest.raises(FailedPrecondition, match=r"is recorded as not encrypted and its data begins like LUKS"):
        node.export("plain-1")


def test_names_and_secrets_are_looked_at_first(node: Node) -> None:
    with pytest.raises(InvalidArgument, match=r"cannot be an image's name"):
        node.export("plain-1", "No name")
    with pytest.raises(InvalidArgument, match=r"must be named as NAMESPACE/NAME"):
        node.export("sealed-1", secret="vm-key")
    with pytest.raises(InvalidArgument, match=r"is not encrypted, but a secret was named for its image"):
        node.export("plain-1", secret="images/vm-key")
    with pytest.raises(AlreadyExists, match=r"image plain exists already"):
        node.export("plain-1", "plain")
    with pytest.raises(NotFound, match=r"volume gone does not exist"):
        node.export("gone")
    assert not (node.state / "locks" / "gone").exists()


def test_no_more_than_the_limit_becomes_an_image(node: Node) -> None:
    size = node.rig.disk("plain-1").stat().st_size
    with pytest.raises(InvalidArgument, match=rf"has {size} bytes and at most {size - 1} are allowed for image copy"):
        node.export("plain-1", limit=size - 1)
    assert (node.library.names(), node.library.unfinished()) == (["plain", "sealed"], [])
    assert node.export("plain-1", limit=size).file_size == size


def test_a_volume_of_another_backend_is_refused(node: Node) -> None:
    backend = MemoryBackend()
    backend.records["plain-1"] = node.record("plain-1")
    presences = Presences(backend, node.stages, Mappings(DeviceMapper(), NoHolders()), Mounts())
    slots = KeySlots(InlineWorkers(undisturbed), Limits())
    exports = Exports(backend, node.locks, presences, node.loops, slots)
    with pytest.raises(FailedPrecondition, match=r"is no file of this node, and only one of the backend loopfile"):
        exports.export(Export("plain-1", "copy"), node.library, unmetered)


# --- cut -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def killing(what: str, total: int | None) -> Iterator[Progress]:  # noqa: ARG001 - Meter names them
    def progress(done: int) -> None:
        if done:
            raise Killed

    yield progress


@pytest.mark.parametrize("written", [False, True])
def test_a_killed_one_is_seen_by_nobody_and_the_next_call_ends_it(node: Node, *, written: bool) -> None:
    with pytest.raises(Killed):
        node.export("sealed-1", meter=killing)
    assert "copy" not in node.library.names()
    assert node.library.unfinished() == ["copy"]
    if written:
        with node.rig.disk("sealed-1").open("r+b") as disk:
            disk.seek(17 * MIB)
            disk.write(b"a pod wrote this meanwhile")
    node.export("sealed-1")
    assert node.library.file("copy").read_bytes() == node.rig.disk("sealed-1").read_bytes()
    assert node.library.unfinished() == []


def test_a_write_while_it_is_read_is_noticed(node: Node) -> None:
    @contextlib.contextmanager
    def writing(what: str, total: int | None) -> Iterator[Progress]:  # noqa: ARG001 - Meter names them
        with node.rig.disk("plain-1").open("r+b") as disk:
            disk.write(b"by somebody who asks no lock")
            os.fsync(disk.fileno())
        yield lambda _: None

    with pytest.raises(FailedPrecondition, match=r"was changed or removed while it was read"):
        node.export("plain-1", meter=writing)
    assert none_made(node)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command(node: Node) -> None:
    def build(settings: Settings) -> Driver:
        driver = build_driver(settings)
        offline = SimpleNamespace(exports=node.exports)
        return dataclasses.replace(driver, offline=lambda: _as_offline(offline))

    def run(*arguments: str) -> Any:
        places = ["--state-dir", str(node.state), "--endpoint", f"unix://{node.state}/csi.sock"]
        return CliRunner().invoke(image, ["import-volume", *arguments, *places], obj=build)

    done = run("sealed-1", "copy", "--secret", "images/vm-key")
    assert (done.exit_code, done.stdout) == (0, "encrypted image copy of 4Mi is there\n")
    assert "copying" in done.stderr
    assert isinstance(run("plain-1", "copy").exception, AlreadyExists)
    shown = msgspec.json.decode(run("plain-1", "more", "-o", "json").stdout)
    assert (shown["format"], shown["provenance"]["source"]) == ("raw", "plain-1")
    wrong = run("../x", "copy")
    assert (wrong.exit_code, "'../x' is no id of a volume" in wrong.stderr) == (2, True)


def _as_offline(found: Any) -> Offline:
    return found  # type: ignore[no-any-return]


def test_the_driver_has_it(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path)
    backend = LoopfileBackend(tmp_path / "loopfile", 0, Files(), FakeLoops(), RecordCodec())
    backend.prepare()
    with pytest.raises(NotFound):
        build_driver(settings).offline().exports.export(
            Export("gone", "copy"), ImageLibrary(tmp_path / "images"), unmetered
        )
