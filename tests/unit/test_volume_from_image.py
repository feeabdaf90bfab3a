"""Volumes from images: what is refused before anything is made, what is made, and every step of it cut."""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec
import pytest

from csi_driver.backends.loopfile import LoopfileBackend
from csi_driver.backends.records import RecordCodec
from csi_driver.cli.record import record_rows
from csi_driver.host.workers import Workers
from csi_driver.images.base import MIB, ImageFormat
from csi_driver.images.cluster import ClusterImages
from csi_driver.images.luks_reader import LuksReader
from csi_driver.images.source import RawReader
from csi_driver.images.store import ImageStore, Provenance
from csi_driver.keys.secret import read_secret
from csi_driver.luks.header import parse
from csi_driver.model.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    DeviceBlank,
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    InvalidArgument,
    InvalidHeader,
    OutOfRange,
    ResourceExhausted,
    VolumeBusy,
)
from csi_driver.model.settings import Limits, Settings
from csi_driver.model.volume import EncryptionState, FileSystemState, LuksIdentity, VolumeRecord
from csi_driver.volumes.capability import AccessMode, Capability
from csi_driver.volumes.from_image import BackingImages
from csi_driver.volumes.keyslots import KeySlots
from csi_driver.volumes.provision import Capacity, CreateRequest, Provisioning
from tests import headers
from tests.fake_host import FakeLoops, Step, SteppedFiles, no_kms, undisturbed
from tests.fake_kernel import Killed
from tests.image_clones import HEADER, PASSPHRASE, make_source
from tests.volume_images import SECRET, Made, encrypted_image, put_image

P = ParamSpec("P")
R = TypeVar("R")

BLOCK = Capability(AccessMode.SINGLE_NODE_WRITER, block=True)
PAYLOAD = 2 * MIB + 100
SIZE = 4 * MIB
PLAIN = {"backingImage": "plain"}
SEALED = {"backingImage": "sealed", "encrypted": "true"}
WRONG = {"CRYPTO_KEY_VALUE": "another one"}
NOTHING: Mapping[str, str] = {}
CLAIMED = {"csi.storage.k8s.io/pvc/name": "disk", "csi.storage.k8s.io/pvc/namespace": "team"}
"""What external-provisioner adds (--extra-create-metadata)."""


class InlineWorkers(Workers):
    """Carries out what a worker would, at once; `step` may cut it before or after."""

    def __init__(self, step: Step) -> None:
        super().__init__(())
        self.step = step

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        yield

    def call(self, what: str, timeout: float, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        assert timeout > 0
        self.step(f"before {function.__name__}")
        result = function(*args, **kwargs)
        self.step(f"after {function.__name__}")
        return result


def at_once(_seconds: float) -> None:
    """A pause that is none."""


@dataclass
class Rig:
    """A node's controller on real files with real LUKS2 headers; `again` is the same node after a restart."""

    state: Path
    step: Step = undisturbed
    floor: int = 0
    limits: Limits = field(default_factory=Limits)
    pause: Callable[[float], None] = at_once
    steps: list[str] = field(default_factory=list)
    loops: FakeLoops = field(default_factory=FakeLoops)

    def __post_init__(self) -> None:
        def told(name: str) -> None:
            self.steps.append(name)
            self.step(name)

        files, workers, limits = SteppedFiles(told), InlineWorkers(told), self.limits
        self.backend = LoopfileBackend(self.state / "loopfile", self.floor, files, self.loops, RecordCodec())
        self.backend.prepare()
        slots = KeySlots(workers, limits)
        self.cluster = ClusterImages(self.state / "images")
        store = ImageStore(self.state / "images", files)
        self.images = BackingImages(store, self.cluster, workers, slots, no_kms(), limits, self.pause)
        self.provisioning = Provisioning(
            Settings(node_id="node-1", limits=limits), self.backend, self.images, lambda: None, lambda _: None, no_kms()
        )

    def again(self, step: Step = undisturbed) -> "Rig":
        return Rig(self.state, step)

    def create(
        self,
        parameters: Mapping[str, str],
        name: str = "pvc-1",
        *,
        required: int = SIZE,
        limit: int = 0,
        secret: Mapping[str, str] = SECRET,
    ) -> VolumeRecord:
        request = CreateRequest(name, required, limit, (BLOCK,), parameters, read_secret(secret))
        return self.provisioning.create(request).record

    def disk(self, name: str = "pvc-1") -> Path:
        return self.state / "loopfile" / "volumes" / name / "disk.img"

    def image_file(self, name: str) -> Path:
        return self.state / "images" / "ready" / name / "image"

    def left(self) -> list[str]:
        """All that is of volumes."""
        return sorted(str(path.relative_to(self.state)) for path in (self.state / "loopfile").glob("*/*"))

    def delete_image(self, name: str) -> None:
        ImageStore(self.state / "images", SteppedFiles()).delete(name)


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random("an image").randbytes(PAYLOAD)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Mapping[str, Made]:
    """One plain and one encrypted file of the same content."""
    folder = tmp_path_factory.mktemp("made")
    source = folder / "source.raw"
    source.write_bytes(content)
    return {"plain": Made(source, PAYLOAD), "sealed": encrypted_image(source, folder / "sealed")}


@pytest.fixture
def rig(tmp_path: Path, made: Mapping[str, Made]) -> Rig:
    for name, one in made.items():
        put_image(tmp_path, name, one)
    return Rig(tmp_path)


def inside(disk: Path, length: int = PAYLOAD) -> bytes:
    """The first bytes of what an encrypted disk holds."""
    with contextlib.closing(LuksReader(RawReader(str(disk), "disk"), PASSPHRASE, "disk")) as reader:
        found = bytearray(length)
        reader.read_into(0, memoryview(found))
        return bytes(found)


def payload_of(disk: Path) -> int:
    with contextlib.closing(LuksReader(RawReader(str(disk), "disk"), PASSPHRASE, "disk")) as reader:
        return reader.size


def identity(record: VolumeRecord) -> LuksIdentity:
    assert record.luks is not None
    return record.luks


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- what is made ----------------------------------------------------------------------------------------------------


def test_a_plain_volume_begins_with_the_image_and_never_gets_a_file_system(rig: Rig, content: bytes) -> None:
    before = digest(rig.image_file("plain"))
    record = rig.create(PLAIN, secret=NOTHING)
    assert (record.encryption, record.luks, record.file_system) == (None, None, FileSystemState.RAW)
    assert record.capacity_bytes == SIZE
    assert rig.disk().read_bytes() == content + bytes(SIZE - PAYLOAD)
    assert rig.disk().stat().st_blocks * 512 < PAYLOAD + MIB
    assert digest(rig.image_file("plain")) == before


def test_an_encrypted_volume_is_the_images_under_a_uuid_of_its_own(
    rig: Rig, made: Mapping[str, Made], content: bytes
) -> None:
    before = digest(rig.image_file("sealed"))
    record = rig.create(SEALED)
    image = made["sealed"].luks
    assert image is not None
    assert record == rig.backend.get("pvc-1")
    assert (record.encryption, record.file_system) == (EncryptionState.ENCRYPTED, FileSystemState.RAW)
    assert record.cloned_uuid is None
    assert msgspec.structs.replace(identity(record), uuid=image.uuid) == image
    assert identity(record).uuid != image.uuid
    assert parse(headers.head_of(rig.disk()), "disk").uuid == identity(record).uuid
    assert parse(headers.head_of(rig.disk()), "disk").key_digest == image.digest
    assert rig.disk().stat().st_size == HEADER + SIZE
    assert inside(rig.disk()) == content
    assert payload_of(rig.disk()) == SIZE, "the room is the claim's, not the image's"
    assert digest(rig.image_file("sealed")) == before
    headers.run_cryptsetup("open", "--test-passphrase", "--key-file", "-", str(rig.disk()), key=PASSPHRASE.reveal())
    assert headers.run_cryptsetup("luksUUID", str(rig.disk())).decode().strip() == identity(record).uuid


def test_volumes_of_one_image_have_different_uuids(rig: Rig) -> None:
    uuids = {identity(rig.create(SEALED, f"pvc-{number}")).uuid for number in range(3)}
    assert len(uuids) == 3


def test_the_record_says_cloning_with_both_uuids_before_the_header_is_touched(
    rig: Rig, made: Mapping[str, Made]
) -> None:
    seen: list[VolumeRecord] = []

    def look(step: str) -> None:
        if step == "before change_uuid":
            seen.append(rig.again().backend.get("pvc-1"))
            assert parse(headers.head_of(rig.disk()), "disk").uuid == seen[0].cloned_uuid

    record = rig.again(look).create(SEALED)
    image = made["sealed"].luks
    assert image is not None
    assert (seen[0].encryption, seen[0].cloned_uuid) == (EncryptionState.CLONING, image.uuid)
    assert seen[0].luks == record.luks


def test_holes_of_the_image_stay_holes(tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    with source.open("wb") as file:
        file.write(b"start")
        file.seek(64 * MIB)
        file.write(b"middle")
        file.truncate(128 * MIB)
    put_image(tmp_path, "plain", Made(source, 128 * MIB))
    rig = Rig(tmp_path)
    rig.create(PLAIN, required=256 * MIB)
    assert rig.disk().stat().st_blocks * 512 < MIB
    with rig.disk().open("rb") as file:
        assert file.read(5) == b"start"
        file.seek(64 * MIB)
        assert file.read(6) == b"middle"
    assert rig.disk().stat().st_size == 256 * MIB


def test_an_image_of_any_length_fits_into_whole_sectors(tmp_path: Path) -> None:
    for size, capacity in ((1, MIB), (511, MIB), (MIB + 1, MIB + 512)):
        put_image(tmp_path, f"raw-{size}", Made(make_source(tmp_path / "source.raw", size), size))
        rig = Rig(tmp_path)
        record = rig.create({"backingImage": f"raw-{size}"}, f"pvc-{size}", required=max(size, MIB))
        assert record.capacity_bytes == capacity
        assert rig.disk(f"pvc-{size}").read_bytes()[:size] == (tmp_path / "source.raw").read_bytes()


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [PLAIN, SEALED])
@pytest.mark.parametrize(("required", "limit"), [(PAYLOAD - 1, 0), (MIB, 2 * SIZE), (0, PAYLOAD - 1), (1, MIB)])
def test_a_claim_that_is_smaller_than_the_image_is_refused(
    rig: Rig, parameters: dict[str, str], required: int, limit: int
) -> None:
    name, told = parameters["backingImage"], required or limit
    with pytest.raises(OutOfRange, match=rf"image {name} has {PAYLOAD} bytes and the volume is to have {told};"):
        rig.create(parameters, required=required, limit=limit)
    assert rig.left() == []


@pytest.mark.parametrize(
    ("required", "limit", "capacity"),
    [
        (PAYLOAD, 0, 2 * MIB + 512),
        (0, 2 * MIB + 600, 2 * MIB + 512),
        (0, 0, 1 << 30),
        (SIZE, SIZE, SIZE),
    ],
)
def test_a_claim_that_holds_the_image_is_met_in_whole_sectors(
    rig: Rig, required: int, limit: int, capacity: int
) -> None:
    record = rig.create(SEALED, required=required, limit=limit)
    assert record.capacity_bytes == capacity
    assert rig.disk().stat().st_size == HEADER + capacity


def test_sectors_are_the_headers_and_stay_so_when_it_grows(tmp_path: Path, made: Mapping[str, Made]) -> None:
    big = encrypted_image(made["plain"].file, tmp_path / "big", sector_size=4096)
    put_image(tmp_path, "sealed", big)
    rig = Rig(tmp_path)
    record = rig.create(SEALED, required=3 * MIB + 1)
    assert record.capacity_bytes == 3 * MIB + 4096
    assert rig.provisioning.expand("pvc-1", 5 * MIB + 1, 0) == 5 * MIB + 4096
    assert rig.disk().stat().st_size == HEADER + 5 * MIB + 4096
    with pytest.raises(InvalidArgument, match=r"sectorSize 512 and the header of image sealed says 4096"):
        rig.create(SEALED | {"sectorSize": "512"}, "pvc-2")


def test_there_is_no_room_where_the_image_is_not(rig: Rig) -> None:
    there = rig.provisioning.capacity(SEALED, None, [BLOCK])
    assert there.available > 0
    assert rig.provisioning.capacity({"backingImage": "gone"}, None, [BLOCK]) == Capacity(0, 0)


# --- images that the cluster has and this node has not ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("ready", "percent", "message", "told"),
    [
        (True, 43, "12 MiB/s from node-2", "is being brought to this node: 43 %, 12 MiB/s from node-2; the volume is"),
        (True, 0, "", "is being brought to this node: 0 %; the volume is made when it is whole"),
        (True, None, "", "is being brought to this node: it was just asked for; the volume is made"),
        (False, None, "downloading", "is not ready yet, and is brought to this node then: downloading; the volume is"),
    ],
)
def test_an_image_of_the_cluster_is_asked_for_and_waited_for(
    rig: Rig, made: Mapping[str, Made], *, ready: bool, percent: int | None, message: str, told: str
) -> None:
    rig.cluster.tell("far", "uid-1", ready=ready, here=False, percent=percent, message=message)
    wanted = {"backingImage": "far"}
    assert rig.provisioning.capacity(wanted, None, [BLOCK]).available > 0
    assert list(rig.cluster.wanted()) == [], "a look at the room has brought it here"
    for _ in range(2):
        with pytest.raises(Aborted, match=re.escape(f"image far {told}")):
            rig.create(wanted, secret=NOTHING)
        assert rig.cluster.wanted() == ["far"]
    assert rig.left() == []
    put_image(rig.state, "far", made["plain"], owner="uid-1")
    rig.cluster.tell("far", "uid-1", ready=True, here=True, percent=100, message="")
    assert rig.create(wanted, secret=NOTHING).capacity_bytes == SIZE


def test_a_node_without_the_image_lets_those_that_have_it_take_a_claim_first(
    tmp_path: Path, made: Mapping[str, Made]
) -> None:
    """More waits than `pause` sees would keep other calls from being answered."""
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) < 10:
            ask(CLAIMED)

    def ask(parameters: Mapping[str, str]) -> int:
        before = len(pauses)
        assert rig.provisioning.capacity({"backingImage": "far", **parameters}, None, [BLOCK]).available > 0
        return len(pauses) - before

    rig = Rig(tmp_path, pause=pause)
    rig.cluster.tell("far", "uid-1", ready=False, here=False, percent=None, message="")
    assert ask(CLAIMED) == 0  # nobody has it
    rig.cluster.tell("far", "uid-1", ready=True, here=False, percent=None, message="")
    assert ask(NOTHING) == 0  # how much room there is in general, as the scheduler wants to know
    assert ask(CLAIMED) == 4
    assert min(pauses) > 2  # a provisioner's first delay
    assert list(rig.cluster.wanted()) == []
    put_image(rig.state, "far", made["plain"], owner="uid-1")
    assert ask(CLAIMED) == 0


def test_an_image_that_leaves_the_cluster_is_no_more_waited_for(rig: Rig) -> None:
    rig.cluster.tell("far", "uid-1", ready=True, here=False, percent=1, message="")
    with pytest.raises(Aborted):
        rig.create({"backingImage": "far"}, secret=NOTHING)
    rig.cluster.forget("far")
    with pytest.raises(ResourceExhausted, match=r"image far is not on this node; import it here"):
        rig.create({"backingImage": "far"}, secret=NOTHING)
    assert rig.provisioning.capacity({"backingImage": "far"}, None, [BLOCK]) == Capacity(0, 0)


def test_a_volume_never_starts_from_what_is_left_of_an_image_of_the_same_name(
    rig: Rig, made: Mapping[str, Made]
) -> None:
    put_image(rig.state, "far", made["plain"], owner="uid-1")
    rig.cluster.tell("far", "uid-2", ready=True, here=False, percent=None, message="the old one is being removed")
    with pytest.raises(Aborted, match=r"image far is being brought to this node: the old one is being removed"):
        rig.create({"backingImage": "far"}, secret=NOTHING)
    assert rig.cluster.wanted() == ["far"]
    rig.cluster.tell("far", "uid-1", ready=True, here=True, percent=None, message="")
    rig.create({"backingImage": "far"}, secret=NOTHING)


@pytest.mark.parametrize("here", [True, False, None])
def test_a_volume_never_starts_from_a_file_that_the_agent_calls_another_one(
    rig: Rig, made: Mapping[str, Made], *, here: bool | None
) -> None:
    """As of a node that comes back when another one has made the image anew. None is an older agent's."""
    put_image(rig.state, "far", made["plain"], owner="uid-1")
    rig.cluster.tell("far", "uid-1", ready=True, here=bool(here), percent=None, message="has another SHA-256")
    if here is None:
        told = rig.state / "images" / "cluster" / "far.json"
        told.write_text(told.read_text().replace('"here":false,', ""))
    with (
        contextlib.nullcontext()
        if here is not False
        else pytest.raises(Aborted, match=r"another SHA-256; the volume is made")
    ):
        rig.create({"backingImage": "far"}, secret=NOTHING)


def test_what_the_cluster_says_means_nothing_for_an_image_that_was_brought_by_hand(rig: Rig) -> None:
    rig.cluster.tell("plain", "uid-1", ready=True, here=True, percent=None, message="")
    rig.create(PLAIN, secret=NOTHING)
    assert list(rig.cluster.wanted()) == []


def test_what_the_agent_wrote_and_nobody_can_read_is_a_sentence_at_the_claim(rig: Rig) -> None:
    rig.cluster.tell("far", "uid-1", ready=True, here=False, percent=None, message="")
    (rig.state / "images" / "cluster" / "far.json").write_text("{")
    with pytest.raises(FailedPrecondition, match=r"start the image agent of this node anew"):
        rig.create({"backingImage": "far"}, secret=NOTHING)


def test_a_third_clone_at_once_is_asked_for_again_and_leaves_nothing(rig: Rig) -> None:
    """Copies may take minutes, and each keeps a thread of the server: staging must find one."""
    running = ["pvc-2", "pvc-3"]
    refused: list[str] = []

    def meanwhile(step: str) -> None:
        if step == "before clone_file" and running:
            name = running.pop(0)
            try:
                rig.create(SEALED, name)
            except Aborted as error:
                refused.append(f"{name}: {error}")
                assert not [path for path in rig.left() if path.endswith(name)]

    rig.step = meanwhile
    rig.create(SEALED, "pvc-1")
    assert len(refused) == 1
    assert re.match(r"pvc-3: volume pvc-3 .*two volumes are being cloned from images on this node; the", refused[0])
    assert rig.left() == ["loopfile/volumes/pvc-1", "loopfile/volumes/pvc-2"]
    rig.create(SEALED, "pvc-3")


def test_a_clone_that_fails_makes_room_for_the_next(rig: Rig) -> None:
    def broken(step: str) -> None:
        if step == "before clone_file":
            raise OSError(errno.EIO, "Input/output error")

    rig.step = broken
    for _ in range(3):
        with pytest.raises(FailedPrecondition):
            rig.create(PLAIN)
    rig.step = undisturbed
    assert rig.create(PLAIN).id == "pvc-1"


def test_space_is_looked_at_before_the_first_byte(rig: Rig) -> None:
    full = Rig(rig.state, floor=1 << 60)
    with pytest.raises(ResourceExhausted, match=r"no room for volume pvc-1"):
        full.create(PLAIN)
    assert "before clone_file" not in full.steps
    assert rig.left() == []


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "secret", "error", "said"),
    [
        (
            SEALED | {"encrypted": "false"},
            SECRET,
            InvalidArgument,
            r'image sealed is encrypted and the StorageClass says encrypted "false"',
        ),
        (
            PLAIN | {"encrypted": "true"},
            SECRET,
            InvalidArgument,
            r'image plain is not encrypted and the StorageClass says encrypted "true"; name a clone .* with encrypt',
        ),
        (SEALED, WRONG, FailedPrecondition, r"the passphrase in the secret opens no key slot of image sealed"),
        (
            SEALED,
            NOTHING,
            FailedPrecondition,
            r"volume pvc-1 starts from the encrypted image sealed .*provisioner-secret",
        ),
        (
            PLAIN | {"backingImage": "gone"},
            SECRET,
            ResourceExhausted,
            r"image gone is not on this node; import it here first",
        ),
        (SEALED | {"cipher": "aes-cbc-plain"}, SECRET, InvalidArgument, r"cipher aes-cbc-plain .* aes-xts-plain64"),
        (SEALED | {"keySize": "256"}, SECRET, InvalidArgument, r"keySize 256 and the header .* says 512"),
        (SEALED | {"hash": "sha512"}, SECRET, InvalidArgument, r"hash sha512 and the header .* says sha256"),
        (SEALED | {"pbkdf": "argon2id"}, SECRET, InvalidArgument, r"pbkdf argon2id and the header .* says pbkdf2"),
        (
            SEALED | {"pbkdf": "pbkdf2", "pbkdfIterations": "2000"},
            SECRET,
            InvalidArgument,
            r"pbkdfIterations 2000 and the header .* says 1000",
        ),
        (SEALED | {"pbkdfMemory": "65536"}, SECRET, InvalidArgument, r"pbkdfMemory 65536 and the header .* says none"),
        (SEALED | {"sectorSize": "4096"}, SECRET, InvalidArgument, r"sectorSize 4096 and the header .* says 512"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_sides_and_nothing_is_made(
    rig: Rig, parameters: dict[str, str], secret: Mapping[str, str], error: type[DriverError], said: str
) -> None:
    with pytest.raises(error, match=said):
        rig.create(parameters, secret=secret)
    assert rig.left() == []


def test_the_passphrase_that_the_secret_had_before_opens_the_image_too(rig: Rig) -> None:
    changed = {"CRYPTO_KEY_VALUE": "a new one", "CRYPTO_KEY_VALUE_PREVIOUS": SECRET["CRYPTO_KEY_VALUE"]}
    assert rig.create(SEALED, secret=changed).encryption is EncryptionState.ENCRYPTED


def test_parameters_that_the_header_bears_out_are_fine(rig: Rig) -> None:
    agreeing = {
        "cipher": "aes-xts-plain64", "keySize": "512", "hash": "sha256", "pbkdf": "pbkdf2", "pbkdfIterations": "1000",
        "sectorSize": "512",
    }  # fmt: skip
    assert rig.create(SEALED | agreeing).encryption is EncryptionState.ENCRYPTED


def put_with_second_slot(rig: Rig, made: Mapping[str, Made], name: str, *options: str) -> None:
    """An image like `sealed` with one more key slot."""
    file, second = rig.state / "two-slots", rig.state / "second"
    shutil.copyfile(made["sealed"].file, file)
    second.write_bytes(b"another passphrase")
    arguments = ("luksAddKey", "-q", "--key-file", "-", *options, str(file), str(second))
    headers.run_cryptsetup(*arguments, key=PASSPHRASE.reveal())
    put_image(rig.state, name, Made(file, PAYLOAD, made["sealed"].luks))


@pytest.mark.parametrize(("told", "fact"), [("1000", "2000"), ("2000", "1000")])
def test_what_one_key_slot_contradicts_is_refused(rig: Rig, made: Mapping[str, Made], told: str, fact: str) -> None:
    """Every key slot opens the volume: the cheapest one to guess counts."""
    put_with_second_slot(rig, made, "two", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "2000")
    two = SEALED | {"backingImage": "two", "pbkdf": "pbkdf2"}
    with pytest.raises(InvalidArgument, match=rf"pbkdfIterations {told} and the header of image two says {fact};"):
        rig.create(two | {"pbkdfIterations": told})
    assert rig.left() == []
    assert rig.create(two | {"keySize": "512"}).encryption is EncryptionState.ENCRYPTED


def test_costs_over_the_limit_are_refused_with_advice_for_an_image(rig: Rig, made: Mapping[str, Made]) -> None:
    costs = ("--pbkdf", "argon2id", "--pbkdf-memory", "1024", "--pbkdf-force-iterations", "4")
    put_with_second_slot(rig, made, "costly", *costs, "--pbkdf-parallel", "1")
    small = Rig(rig.state, limits=Limits(pbkdf_memory_kib=512))
    with pytest.raises(InvalidHeader, match=r"header of image costly is refused: .*found 1024; .*reencrypt") as refused:
        small.create(SEALED | {"backingImage": "costly"})
    assert "--pbkdf-memory-limit on all nodes" in str(refused.value)
    assert "backup" not in str(refused.value)
    assert rig.left() == []


def test_a_secret_that_opens_nothing_is_told_with_the_recorded_one(rig: Rig, made: Mapping[str, Made]) -> None:
    put_image(rig.state, "told", made["sealed"], secret="shop/key")
    with pytest.raises(
        FailedPrecondition, match=r"opens no key slot of image told; .*recorded with the secret shop/key"
    ):
        rig.create(SEALED | {"backingImage": "told"}, secret=WRONG)
    with pytest.raises(FailedPrecondition) as refused:
        rig.create(SEALED, secret=WRONG)
    assert "recorded" not in str(refused.value)


@pytest.mark.parametrize("image_format", [ImageFormat.QCOW2, ImageFormat.VMDK, ImageFormat.VHDX])
@pytest.mark.parametrize(
    ("encrypted", "advice"),
    [("true", r"clone it with encrypt and name"), ("false", r"import its disk as raw, or clone")],
)
def test_what_is_no_disk_as_it_lies_there_is_refused_with_advice(
    rig: Rig, made: Mapping[str, Made], image_format: ImageFormat, encrypted: str, advice: str
) -> None:
    put_image(rig.state, "packed", made["plain"], image_format=image_format)
    with pytest.raises(InvalidArgument, match=rf"image packed is a {image_format} file .*{advice}"):
        rig.create({"backingImage": "packed", "encrypted": encrypted})
    assert rig.left() == []


DOWNLOADED = Provenance(operation="import", source="https://images.example/debian-12.raw")
CLONED = Provenance(operation="encrypt", source="debian-12")
DECRYPTED = Provenance(operation="decrypt", source="sealed-12")
COPIED = Provenance(operation="ignore", source="debian-12")
UPLOADED = Provenance(operation="import", source="/srv/debian-12.raw")


def story(kind: str, **said: str) -> dict[str, str]:
    """What a class says of an image's origin; _ in a name stands for -."""
    return {
        "backingImageDataSourceType": kind,
        "backingImageDataSourceParameters": json.dumps({key.replace("_", "-"): text for key, text in said.items()}),
    }


@pytest.mark.parametrize(
    ("provenance", "told"),
    [
        (DOWNLOADED, story("download", url="https://images.example/debian-12.raw")),
        (DOWNLOADED, story("download", url="HTTPS://images.example:443/debian-12.raw?token=t0p")),
        (DOWNLOADED, {"backingImageDataSourceType": "download"}),
        (UPLOADED, story("upload")),
        (COPIED, story("clone", backing_image="debian-12", encryption="ignore", secret="", secret_namespace="")),
        (COPIED, story("clone", backing_image="debian-12")),
        (DECRYPTED, story("clone", backing_image="sealed-12", encryption="decrypt", secret="s", secret_namespace="n")),
        (UPLOADED, {"backingImageDataSourceType": "", "backingImageDataSourceParameters": ""}),
    ],
)
def test_a_class_that_tells_the_recorded_story_is_fine(
    tmp_path: Path, made: Mapping[str, Made], provenance: Provenance, told: dict[str, str]
) -> None:
    put_image(tmp_path, "plain", made["plain"], provenance)
    record = Rig(tmp_path).create(PLAIN | told)
    assert record.file_system is FileSystemState.RAW
    assert b"t0p" not in (tmp_path / "loopfile/volumes/pvc-1/record.json").read_bytes()


def test_the_secret_of_a_clone_is_part_of_its_story(rig: Rig, made: Mapping[str, Made]) -> None:
    put_image(rig.state, "told", made["sealed"], CLONED, secret="shop/key")
    told = SEALED | {"backingImage": "told"}
    right = {"backing_image": "debian-12", "encryption": "encrypt"}
    rig.create(told | story("clone", **right, secret="key", secret_namespace="shop"), "pvc-2")
    with pytest.raises(InvalidArgument, match=r"secret-namespace 'house' of image told and its record says 'shop'"):
        rig.create(told | story("clone", **right, secret="key", secret_namespace="house"))
    with pytest.raises(InvalidArgument, match=r"secret 'other' of image told and its record says 'key'"):
        rig.create(told | story("clone", **right, secret="other", secret_namespace="shop"))


@pytest.mark.parametrize(
    ("provenance", "told", "said"),
    [
        (
            DOWNLOADED,
            story("download", url="https://images.example/other"),
            r"url 'https://images.example/other'.*12.raw",
        ),
        (
            DOWNLOADED,
            story("upload"),
            r"'upload' of image plain and its record says 'download \(import of https://imag",
        ),
        (UPLOADED, story("download", url="http://a.example/b"), r"'download' of image plain .* says 'upload \(import"),
        (UPLOADED, story("restore"), r"'restore' of image plain and its record says 'upload"),
        (UPLOADED, story("export-from-volume"), r"'export-from-volume' of image plain"),
        (COPIED, story("clone", backing_image="fedora"), r"backing-image 'fedora' of image plain .* says 'debian-12'"),
        (COPIED, story("clone", backing_image="debian-12", encryption="encrypt"), r"'encrypt' .* says 'ignore'"),
        (DECRYPTED, story("clone", backing_image="sealed-12"), r"encryption 'ignore' .* record says 'decrypt'"),
        (UPLOADED, story("upload", url="http://a.example/b"), r"has 'url', which the type upload does not know"),
        (COPIED, story("clone", backing_images="x"), r"has 'backing-images', which the type clone does not know"),
        (UPLOADED, {"backingImageDataSourceParameters": '{"url": "http://a.example/b"}'}, r"needs backingImageDataSou"),
    ],
)
def test_a_class_that_tells_another_story_is_refused_with_both(
    tmp_path: Path, made: Mapping[str, Made], provenance: Provenance, told: dict[str, str], said: str
) -> None:
    put_image(tmp_path, "plain", made["plain"], provenance)
    rig = Rig(tmp_path)
    with pytest.raises(InvalidArgument, match=said):
        rig.create(PLAIN | told)
    assert rig.left() == []


@pytest.mark.parametrize("told", [{"backingImageDataSourceType": "upload"}, story("clone", secret="s")])
def test_a_story_without_an_image_is_refused(rig: Rig, told: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match=r"is about an image and backingImage names none"):
        rig.create(told)


def test_a_url_that_cannot_be_is_refused_without_its_credential(rig: Rig) -> None:
    for text in ('{"url": "https://user:t0p@a.example/"}', '{"url": "ftp://t0p/"', '["t0p"]'):
        with pytest.raises(InvalidArgument, match=r"backingImageDataSourceParameters") as refused:
            rig.create(PLAIN | {"backingImageDataSourceParameters": text})
        assert "t0p" not in str(refused.value)


# --- the image's file is not what is recorded ------------------------------------------------------------------------


def test_an_image_whose_header_is_not_the_recorded_one_is_refused(rig: Rig) -> None:
    other = encrypted_image(make_source(rig.state / "other.raw", PAYLOAD), rig.state / "other")
    rig.image_file("sealed").unlink()
    other.file.rename(rig.image_file("sealed"))
    with pytest.raises(FailedPrecondition, match=r"image sealed is recorded with the LUKS UUID .* import it anew"):
        rig.create(SEALED)
    with rig.image_file("sealed").open("r+b") as file:
        file.write(bytes(HEADER))
    with pytest.raises(DeviceBlank):
        rig.create(SEALED)
    assert rig.left() == []


def test_an_image_whose_length_is_not_the_recorded_one_is_refused(rig: Rig) -> None:
    for name, parameters in (("plain", PLAIN), ("sealed", SEALED)):
        rig.image_file(name).unlink()
        rig.image_file(name).write_bytes(bytes(MIB))
        with pytest.raises(FailedPrecondition, match=rf"image {name} has 1048576 bytes and \d+ are recorded"):
            rig.create(parameters)
    assert rig.left() == []


def test_a_plain_image_that_begins_like_luks_is_refused(rig: Rig, made: Mapping[str, Made]) -> None:
    put_image(rig.state, "odd", Made(made["sealed"].file, made["sealed"].file.stat().st_size))
    with pytest.raises(FailedPrecondition, match=r"recorded as not encrypted and its data begins like LUKS"):
        rig.create({"backingImage": "odd"}, required=1 << 30)
    assert rig.left() == []


@pytest.mark.parametrize("parameters", [PLAIN, SEALED])
def test_an_image_that_is_replaced_or_deleted_meanwhile_is_noticed(rig: Rig, parameters: dict[str, str]) -> None:
    name = parameters["backingImage"]

    def replace(step: str) -> None:
        if step == "before clone_file":
            fresh = rig.image_file(name).with_name("fresh")
            shutil.copyfile(rig.image_file(name), fresh)
            fresh.rename(rig.image_file(name))

    def delete(step: str) -> None:
        if step == "before clone_file":
            with pytest.raises(DeviceInUse, match=rf"image {name} is being read for volume pvc-1 and was not deleted"):
                rig.delete_image(name)
            shutil.rmtree(rig.image_file(name).parent)  # by somebody who does not ask

    for change, said in ((replace, r"was replaced by another one; call again"), (delete, r"went away; call again")):
        with pytest.raises(Aborted, match=said):
            rig.again(change).create(parameters)
        assert rig.left() == []
    with pytest.raises(ResourceExhausted, match=r"is not on this node"):
        rig.create(parameters)


# --- the same name again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [PLAIN, SEALED])
def test_a_repeat_finds_the_volume_even_without_image_and_secret(rig: Rig, parameters: dict[str, str]) -> None:
    first = rig.create(parameters)
    assert rig.create(parameters) == first
    rig.delete_image(parameters["backingImage"])
    before = digest(rig.disk())
    assert rig.again().create(parameters, secret=NOTHING) == first
    assert digest(rig.disk()) == before


def test_the_same_name_from_another_image_exists_already(rig: Rig, made: Mapping[str, Made]) -> None:
    put_image(rig.state, "second", made["plain"])
    rig.create(PLAIN)
    for other in ({"backingImage": "second"}, {}, SEALED, PLAIN | story("upload")):
        with pytest.raises(AlreadyExists):
            rig.create(other)
    rig.create({}, "pvc-2")
    with pytest.raises(AlreadyExists):
        rig.create(PLAIN, "pvc-2")


def test_the_volume_outlives_the_image(rig: Rig, content: bytes) -> None:
    rig.create(PLAIN)
    rig.create(SEALED, "pvc-2")
    for name in ("plain", "sealed"):
        rig.delete_image(name)
    assert rig.disk().read_bytes()[:PAYLOAD] == content
    assert inside(rig.disk("pvc-2")) == content


# --- every step is cut -----------------------------------------------------------------------------------------------


def fail_at(number: int, error: BaseException, *, lasting: bool) -> Step:
    """The step of that number raises; with `lasting` all behind it too, as in a process that is gone."""
    left = [number]

    def step(_: str) -> None:
        left[0] -= 1
        if left[0] == -1 or (lasting and left[0] < 0):
            raise error

    return step


ERRORS = {
    "killed": (Killed(), True),
    "full": (OSError(errno.ENOSPC, "No space left on device"), False),
    "broken": (OSError(errno.EIO, "Input/output error"), False),
}


@pytest.mark.parametrize(
    ("parameters", "error"),
    [(PLAIN, "killed"), (PLAIN, "full"), (PLAIN, "broken"), (SEALED, "killed"), (SEALED, "full"), (SEALED, "broken")],
    ids=lambda value: value if isinstance(value, str) else value["backingImage"],
)
def test_create_is_whole_or_nothing_or_gone_on_with_at_every_step(
    tmp_path: Path, made: Mapping[str, Made], content: bytes, parameters: dict[str, str], error: str
) -> None:
    put_image(tmp_path, "plain", made["plain"])
    put_image(tmp_path, "sealed", made["sealed"])
    sealed = parameters is SEALED
    recorded = Rig(tmp_path)
    recorded.create(parameters)
    steps = list(recorded.steps)
    assert steps.index("after clone_file") < steps.index("before rename to volumes")
    assert not sealed or steps.index("before rename to volumes") < steps.index("before change_uuid")
    recorded.provisioning.delete("pvc-1")
    raised, lasting = ERRORS[error]
    for number, at in enumerate(steps):
        rig = Rig(tmp_path, fail_at(number, raised, lasting=lasting))
        with pytest.raises((Killed, DriverError, OSError)) as failed:
            rig.create(parameters)
        if error == "full" and "image" not in at:
            assert isinstance(failed.value, ResourceExhausted | OSError), at
        after = rig.again()
        if not lasting:
            assert after.left() == [], f"an error at {at!r} left something"
        elif "volumes/pvc-1" in after.left():
            found = after.backend.get("pvc-1")
            assert found.encryption in ((EncryptionState.CLONING, EncryptionState.ENCRYPTED) if sealed else (None,)), at
            assert rig.disk().stat().st_size == SIZE + (HEADER if sealed else 0), at
            assert found.file_system is FileSystemState.RAW
            after.delete_image(parameters["backingImage"])  # what is cloned needs it no more
        record = after.create(parameters)
        assert record.encryption is (EncryptionState.ENCRYPTED if sealed else None), at
        assert not sealed or parse(headers.head_of(rig.disk()), "disk").uuid == identity(record).uuid
        assert (inside(rig.disk()) if sealed else rig.disk().read_bytes()[:PAYLOAD]) == content, at
        assert after.left() == ["loopfile/volumes/pvc-1"], at
        after.provisioning.delete("pvc-1")
        if not rig.image_file(parameters["backingImage"]).exists():
            put_image(tmp_path, parameters["backingImage"], made[parameters["backingImage"]])


def test_a_clone_that_cannot_be_ended_is_removed(rig: Rig) -> None:
    def spoil(step: str) -> None:
        if step == "before change_uuid":
            with rig.disk().open("r+b") as disk:
                disk.write(bytes(MIB))

    with pytest.raises(DriverError):
        rig.again(spoil).create(SEALED)
    assert rig.left() == []
    assert rig.create(SEALED).encryption is EncryptionState.ENCRYPTED


def test_a_clone_that_another_writer_ended_is_left_alone(rig: Rig) -> None:
    """As when a stage on a hanging storage goes on after all: what it has ended may already be in use."""

    def race(step: str) -> None:
        if step == "after change_uuid":
            record = rig.backend.get("pvc-1")
            ended = msgspec.structs.replace(record, encryption=EncryptionState.ENCRYPTED, cloned_uuid=None)
            rig.backend.update(ended)

    with pytest.raises(Aborted, match=r"record of volume pvc-1 was changed by another writer"):
        rig.again(race).create(SEALED)
    assert inside(rig.disk(), 16)
    assert rig.create(SEALED) == rig.backend.get("pvc-1")

    def race_and_break(step: str) -> None:
        race(step)
        if step == "after change_uuid":
            raise OSError(errno.EIO, "Input/output error")

    rig.provisioning.delete("pvc-1")
    with pytest.raises(OSError, match="Input/output"):
        rig.again(race_and_break).create(SEALED)
    assert rig.backend.get("pvc-1").encryption is EncryptionState.ENCRYPTED


@pytest.mark.parametrize("error", [DeadlineExceeded("a worker hangs"), VolumeBusy("a child is at work")])
def test_a_clone_that_somebody_may_be_at_work_on_stays(rig: Rig, error: DriverError) -> None:
    def hang(step: str) -> None:
        if step == "after change_uuid":
            raise error

    with pytest.raises(type(error)):
        rig.again(hang).create(SEALED)
    left = rig.backend.get("pvc-1")
    assert left.encryption is EncryptionState.CLONING
    assert identity(rig.create(SEALED)) == left.luks


def test_a_guard_that_a_cut_stage_left_on_does_not_hinder(rig: Rig) -> None:
    def cut(step: str) -> None:
        if step == "before change_uuid":
            raise Killed

    def look(step: str) -> None:
        if step == "before change_uuid":
            assert not again.loops.guarded, "an append-only file takes no other header"

    with pytest.raises(Killed):
        rig.again(cut).create(SEALED)
    again = rig.again(look)
    again.loops.guarded.add(str(rig.disk()))
    assert again.create(SEALED).encryption is EncryptionState.ENCRYPTED


def test_an_attached_file_has_its_guard_again_behind_the_work_on_it(rig: Rig) -> None:
    rig.create(PLAIN)
    with contextlib.closing(rig.backend.attach("pvc-1", lasting=False)):
        rig.backend.guard("pvc-1")
        with rig.backend.storage("pvc-1") as file:
            assert os.path.samefile(file, rig.disk())
            assert not rig.loops.guarded
        assert rig.loops.guarded == {str(rig.disk())}
    with rig.backend.storage("pvc-1"):
        pass
    assert not rig.loops.guarded, "a file that nothing has bound is left open to writers"


# --- what people are told, and what callers ask again ----------------------------------------------------------------


def test_every_state_of_a_volume_has_its_words_for_people(rig: Rig) -> None:
    record = rig.create(SEALED)
    for state in EncryptionState:
        rows = dict(record_rows(msgspec.structs.replace(record, encryption=state)))
        assert state[:5] in rows["encryption"]
        assert (rows["image"], rows["LUKS UUID"]) == ("sealed", identity(record).uuid)


def test_a_repeat_is_not_measured_by_what_new_volumes_may_be(rig: Rig) -> None:
    """The secret's wish is for luksFormat; the volume has its image's cipher, which can do more than 2 TiB."""
    wish = SECRET | {"CRYPTO_KEY_CIPHER": "aes-xts-plain"}
    roomy = Rig(rig.state, floor=-(4 << 40))
    first = roomy.create(SEALED, required=3 << 40, secret=wish)
    assert roomy.create(SEALED, required=3 << 40, secret=wish) == first
