"""Two controllers at one volume of Ceph: none takes what the other has made, and nothing is left that nobody knows."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import msgspec
import pytest

from csi_driver.backends.librbd import Image
from csi_driver.backends.rbd import RbdBackend
from csi_driver.backends.rbddevices import MappedVolumes
from csi_driver.backends.rbderrors import CephMissing
from csi_driver.backends.rbdimages import Images
from csi_driver.backends.rbdnodes import NodeAttachments
from csi_driver.backends.rbdplace import image_name
from csi_driver.backends.rbdrecords import INDEX, Attachment, VolumeLogs
from csi_driver.backends.records import RecordCodec
from csi_driver.host.files import Files
from csi_driver.host.krbd import MappedImages
from csi_driver.host.workers import Workers
from csi_driver.keys.secret import SecretKey
from csi_driver.model.errors import Aborted, CommandFailed, DeviceAbsent, DeviceInUse, FailedPrecondition
from csi_driver.model.secret import Passphrase
from csi_driver.model.settings import Limits
from csi_driver.model.volume import EncryptionState, LuksIdentity, VolumeParameters, VolumeRecord
from csi_driver.volumes.check import Checking
from csi_driver.volumes.recovery import Recovery
from csi_driver.volumes.rekey import Rekeying
from csi_driver.volumes.sizing import grow_device
from tests.ceph_fakes import PLACE, FakePool

MIB = 1 << 20
ID = PLACE.id_for("pvc-1")
IMAGE = image_name(ID)
LUKS = LuksIdentity(uuid="u", cipher="aes-xts-plain64", key_bits=512, sector_size=512, data_offset=MIB)
RECORD = VolumeRecord(id=ID, name="pvc-1", capacity_bytes=MIB, parameters=VolumeParameters(), created="now")


class Pool(FakePool):
    """`at` is called once, when a step of that name comes; it may raise."""

    def __init__(self) -> None:
        super().__init__(self._told)
        self._awaited: tuple[str, Callable[[], object]] | None = None
        self.is_gone = False

    def info(self, image: str) -> Image | None:
        if self.is_gone:
            raise CephMissing("the pool is gone")
        return super().info(image)

    def at(self, step: str, act: Callable[[], object]) -> None:
        self._awaited = step, act

    def _told(self, step: str) -> None:
        if self._awaited is not None and step.startswith(self._awaited[0]):
            _, act = self._awaited
            self._awaited = None
            act()

    def rooms(self) -> Any:
        return [SimpleNamespace(name="rbd", number=7, available=1 << 40)]


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def controller(pool: Pool, tmp_path: Path) -> Callable[[str], RbdBackend]:
    def make(name: str, make_devices: type[MappedVolumes] = MappedVolumes) -> RbdBackend:
        logs, files, workers = VolumeLogs(), Files(), Workers(())
        access: Any = SimpleNamespace(
            pool=lambda *_: pool, place_of=lambda _: PLACE, uuid=lambda _: "fsid-1", forget=lambda _: None,
            every_pool=lambda: [pool], reached=str,
        )  # fmt: skip
        devices = make_devices(tmp_path / name, files, workers, MappedImages(str(tmp_path / "none")), 1)
        backend = RbdBackend(
            tmp_path / name, access, logs, Images(logs, 1), NodeAttachments(logs, "", "boot"), devices, RecordCodec(),
            files, is_central=True,
        )  # fmt: skip
        backend.prepare()
        return backend

    return make


class Mapped(MappedVolumes):
    """The image is mapped here, by that client."""

    def mapped(self, volume_id: str) -> Any:
        return SimpleNamespace(path="/dev/rbd0", client="192.0.2.7:0/1")


def test_a_device_of_a_client_that_was_fenced_off_is_none(pool: Pool, controller: Callable[..., RbdBackend]) -> None:
    """The node may have the volume again: staged as it was, each write of its pod would fail."""
    controller("one").create(RECORD, MIB)
    backend, node = controller("node", Mapped), NodeAttachments(VolumeLogs(), "", "boot")
    for client, expected in (("192.0.2.7:0/1", nullcontext()), ("192.0.2.7:0/2", fenced_off())):
        node.may_write(pool, ID, client, Attachment(by_itself=True))
        with expected:
            backend.guard(ID)
    node.take(pool, ID, "")
    with fenced_off():
        backend.guard(ID)
    controller("node").guard(ID)  # nothing is mapped


def fenced_off() -> Any:
    said = r"cannot be used on node .* by /dev/rbd0: .* the client 192\.0\.2\.7:0/1 was fenced off; end what uses it"
    return pytest.raises(FailedPrecondition, match=said)


def fail() -> None:
    raise CommandFailed("rbd info failed: its worker process was killed before it could answer; call again")


def test_a_creation_that_fails_leaves_what_another_has_made_meanwhile(
    pool: Pool, controller: Callable[[str], RbdBackend]
) -> None:
    one, other = controller("one"), controller("other")

    def overtaken() -> None:
        other.create(RECORD, MIB)
        fail()

    pool.at("after create", overtaken)
    with pytest.raises(CommandFailed):
        one.create(RECORD, MIB)
    assert other.get(ID) == RECORD
    assert IMAGE in pool.images


def test_a_creation_that_fails_for_good_leaves_nothing(pool: Pool, controller: Callable[[str], RbdBackend]) -> None:
    pool.at("after create", fail)
    with pytest.raises(CommandFailed):
        controller("one").create(RECORD, MIB)
    assert (pool.images, pool.maps[INDEX], pool.objects) == ({}, {}, {})


@pytest.mark.parametrize("step", ["after rm", "before rm", "before unset", "before drop"])
def test_a_deletion_does_not_forget_what_was_made_anew_meanwhile(
    pool: Pool, controller: Callable[[str], RbdBackend], step: str
) -> None:
    one, other = controller("one"), controller("other")
    one.create(RECORD, MIB)

    def made_anew() -> None:
        other.create(RECORD, MIB)
        other.publish(ID, "node-2", many_nodes=False)

    pool.at(step, made_anew)
    one.delete(ID)
    assert other.get(ID) == RECORD
    assert other.published(ID) == ["node-2"]
    assert IMAGE in pool.images
    other.unpublish(ID, "node-2")
    other.delete(ID)
    assert (pool.images, pool.maps[INDEX], pool.objects) == ({}, {}, {})


@pytest.mark.parametrize("step", ["before create", "after create", "before append", "after append", "after set"])
def test_a_creation_that_was_deleted_meanwhile_leaves_no_image_that_nobody_knows(
    pool: Pool, controller: Callable[[str], RbdBackend], step: str
) -> None:
    one, other = controller("one"), controller("other")
    pool.at(step, lambda: other.delete(ID))
    with suppress(Aborted):
        one.create(RECORD, MIB)
    if not one.has(ID):
        one.create(RECORD, MIB)
    assert other.get(ID) == RECORD
    other.delete(ID)
    assert (pool.images, pool.maps[INDEX]) == ({}, {})


def test_what_is_complete_by_now_is_no_orphan_that_is_removed(
    controller: Callable[[str], RbdBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = controller("one"), controller("other")
    one.create(RECORD, MIB)
    monkeypatch.setattr(other, "has", lambda _: False)  # it looked before that
    with pytest.raises(Aborted, match="was made by somebody else meanwhile; it was left as it is"):
        other.remove_orphans(ID)
    assert one.get(ID) == RECORD


def test_an_entry_of_the_index_that_names_no_life_goes_with_a_deletion(
    pool: Pool, controller: Callable[[str], RbdBackend]
) -> None:
    pool.set_value(INDEX, ID, "")
    controller("one").delete(ID)
    assert pool.maps[INDEX] == {}


def test_a_volume_whose_log_is_empty_is_not_forgotten_with_its_image_there(
    pool: Pool, controller: Callable[[str], RbdBackend]
) -> None:
    backend = controller("one")
    backend.create(RECORD, MIB)
    (log,) = pool.objects
    pool.objects[log] = b""
    with pytest.raises(FailedPrecondition, match="the log of the volume is empty or gone; restore that object"):
        controller("other").delete(ID)
    assert IMAGE in pool.images
    assert ID in pool.maps[INDEX]


class Unmappable(MappedVolumes):
    """The kernel finds something missing."""

    def map(self, *_: object) -> NoReturn:
        raise CephMissing("the map of an object is missing")


@pytest.mark.parametrize(
    ("is_there", "said"),
    [(False, rf"volume {ID} has no image {IMAGE} with the id \w+ in .*; restore it"), (True, "the map of an object")],
    ids=["image", "something else"],
)
def test_a_volume_that_lacks_something_is_not_told_as_one_that_is_not_there(
    controller: Callable[..., RbdBackend], pool: Pool, said: str, *, is_there: bool
) -> None:
    """NOT_FOUND says to Kubernetes that there is no such volume."""
    one = controller("one", Unmappable)
    one.create(RECORD, MIB)
    if not is_there:
        pool.remove(IMAGE, 1)
    with pytest.raises(DeviceAbsent, match=said):
        one.attach(ID, lasting=True)


def test_a_volume_whose_pool_goes_is_not_told_as_one_that_is_not_there(
    controller: Callable[..., RbdBackend], pool: Pool
) -> None:
    class Going(Unmappable):
        def map(self, *words: object) -> NoReturn:
            pool.is_gone = True
            super().map(*words)

    one = controller("one", Going)
    one.create(RECORD, MIB)
    with pytest.raises(DeviceAbsent, match="the map of an object"):
        one.attach(ID, lasting=True)


def test_a_growth_that_comes_late_makes_nothing_shorter(pool: Pool, controller: Callable[[str], RbdBackend]) -> None:
    """A controller that stood still between its look and its call, while another one has grown the volume further."""
    one, other = controller("one"), controller("other")
    record = one.create(RECORD, MIB)
    pool.at("before resize", lambda: grow_device(other, record, 3 * MIB, 0))
    with pytest.raises(Aborted):
        grow_device(one, record, 2 * MIB, 0)
    assert (pool.images[IMAGE].size, other.get(ID).capacity_bytes) == (3 * MIB, 3 * MIB)


def check(backend: RbdBackend) -> None:
    make: Any = Checking
    make(backend, *[None] * 8, Limits()).check(ID, SecretKey(None), repair=True, seconds=1)


def restore_header(backend: RbdBackend) -> None:
    make: Any = Recovery
    make(backend, *[None] * 6, Limits()).restore_header(ID, Path("/copy"), SecretKey(None), force=True)


def rotate(backend: RbdBackend) -> None:
    make: Any = Rekeying
    make(backend, *[None] * 4).rotate(ID, SecretKey(None), None)


@pytest.mark.parametrize("act", [check, restore_header, rotate])
def test_what_two_nodes_have_is_neither_mended_nor_given_another_header(
    controller: Callable[[str], RbdBackend], act: Callable[[RbdBackend], None]
) -> None:
    """A virtual machine may write on the one where the other one sees a closed volume, as in a live migration."""
    backend = controller("one")
    backend.create(msgspec.structs.replace(RECORD, encryption=EncryptionState.ENCRYPTED, luks=LUKS), MIB)
    for node in ("a", "b"):
        backend.publish(ID, node, many_nodes=True)
    with pytest.raises(DeviceInUse, match=f"^volume {ID} is left as it is: it was given to the nodes a and b, "):
        act(backend)


def test_nor_does_a_stage_on_two_nodes_change_its_passphrase(controller: Callable[[str], RbdBackend]) -> None:
    backend = controller("one")
    backend.create(msgspec.structs.replace(RECORD, encryption=EncryptionState.ENCRYPTED, luks=LUKS), MIB)
    for node in ("a", "b"):
        backend.publish(ID, node, many_nodes=True)
    make: Any = Rekeying
    changed = SecretKey(Passphrase(b"new"), previous=Passphrase(b"old"))
    assert make(backend, *[None] * 4).renew(backend.get(ID), None, changed) == backend.get(ID)
