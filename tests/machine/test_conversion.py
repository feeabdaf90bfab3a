"""Another volume key for a volume in use, and a first one for a plain one, on real dm-crypt."""

import hashlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from csi_driver.backends.base import Space, storage_beside
from csi_driver.host.keyring import find_user
from csi_driver.images.stopping import Stop
from csi_driver.keys.secret import read_secret
from csi_driver.luks.device import read_header, volume_key_name
from csi_driver.model.errors import (
    DeviceInUse,
    DriverError,
    FailedPrecondition,
    ResourceExhausted,
    Stopped,
    Unauthenticated,
)
from csi_driver.model.volume import VolumeRecord
from csi_driver.volumes.conversion import Watch
from tests.machine.node import BLOCK, CHEAP, MIB, SECRET, VOLUME, Node

CHUNK = MIB
SIZE = 5 * CHUNK + MIB // 2
OTHER = {"CRYPTO_KEY_VALUE": "another passphrase"}
PLAIN = {**CHEAP, "encrypted": "false"}


@pytest.fixture(autouse=True)
def unstaged(node: Node) -> Iterator[None]:
    yield
    if node.stages.get(VOLUME) is not None:
        node.unstage()


def reencrypt(node: Node, secret: Mapping[str, str] = SECRET, watch: Watch | None = None) -> VolumeRecord:
    return node.conversions.reencrypt(VOLUME, read_secret(secret), watch or Watch())


def encrypt(node: Node, secret: Mapping[str, str] = SECRET, watch: Watch | None = None) -> VolumeRecord:
    return node.conversions.encrypt(VOLUME, read_secret(secret), None, watch or Watch(), generate=False)


def after(chunks: int) -> Watch:
    """Stops once so many chunks were moved."""
    stop = Stop()
    seen: list[int] = []

    def told(done: int) -> None:
        seen.append(done)
        if len(seen) > chunks:
            stop.name = "SIGTERM"

    return Watch(told, stop)


def stop_after(node: Node, chunks: int, secret: Mapping[str, str] = SECRET) -> None:
    with pytest.raises(Stopped, match="the same command goes on"):
        reencrypt(node, secret, after(chunks))


def digest_of(path: str | Path) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        with open(descriptor, "rb", closefd=False) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    finally:
        os.close(descriptor)


def filled(node: Node, parameters: Mapping[str, str] = CHEAP) -> str:
    """A block volume that is staged and full of noise; returns the digest of that."""
    node.create(size=SIZE, parameters=parameters, capability=BLOCK)
    node.stage(capability=BLOCK)
    noise = os.urandom(SIZE)
    with open(device_of(node), "r+b", buffering=0) as file:
        assert file.write(noise) == SIZE
        os.fsync(file.fileno())
    return hashlib.sha256(noise).hexdigest()


def device_of(node: Node) -> str:
    stage = node.stages.get(VOLUME)
    assert stage is not None
    return stage.device


def key_digest(node: Node) -> str:
    return read_header("the test's volume", str(node.disk()))[1].key_digest


def next_file(node: Node) -> Path:
    return node.disk().with_name("next.img")


def test_a_volume_in_use_gets_another_volume_key(node: Node) -> None:
    content, before = filled(node), node.record()
    after_ = reencrypt(node)
    assert before.luks is not None
    assert after_.luks is not None
    assert after_.conversion is None
    assert after_.luks.uuid == before.luks.uuid
    assert after_.luks.digest != before.luks.digest
    assert key_digest(node) == after_.luks.digest
    assert digest_of(device_of(node)) == content
    assert not next_file(node).exists()
    (target,) = node.open_mapping().targets
    assert volume_key_name(before.luks.uuid) not in target.params
    assert find_user(volume_key_name(before.luks.uuid)) is None, "the old volume key is still in root's keyring"
    number = node.open_mapping().minor
    node.stage(capability=BLOCK)
    assert node.open_mapping().minor == number, "it was opened anew, as if its key were lost"
    node.unstage()
    node.stage(capability=BLOCK)
    assert digest_of(device_of(node)) == content


def test_a_volume_that_is_not_staged_gets_another_volume_key(node: Node) -> None:
    content = filled(node)
    node.unstage()
    before = key_digest(node)
    reencrypt(node)
    assert node.closed()
    assert key_digest(node) != before
    node.stage(capability=BLOCK)
    assert digest_of(device_of(node)) == content


def test_what_is_written_meanwhile_stays(node: Node) -> None:
    """A writer that checks itself: each block is written with its number and a count, and read back in the end."""
    filled(node)
    wrote: dict[int, bytes] = {}
    stop = threading.Event()

    def write() -> None:
        descriptor = os.open(device_of(node), os.O_RDWR)
        try:
            count = 0
            while not stop.is_set():
                place = int.from_bytes(os.urandom(4), "little") % (SIZE // 4096)
                block = hashlib.sha256(f"{place} {count}".encode()).digest() * 128
                os.pwrite(descriptor, block, place * 4096)
                wrote[place] = block
                count += 1
                if count % 64 == 0:
                    os.fsync(descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        reencrypt(node)
    finally:
        stop.set()
        writer.join()
    assert wrote
    node.unstage()
    node.stage(capability=BLOCK)
    with open(device_of(node), "rb", buffering=0) as file:
        for place, block in wrote.items():
            assert os.pread(file.fileno(), 4096, place * 4096) == block, f"block {place} was lost"


def test_a_file_system_goes_on_and_grows_afterwards(node: Node) -> None:
    node.create(size=SIZE)
    node.stage()
    node.write()
    reencrypt(node)
    assert node.read() == "precious"
    node.write("after")
    assert node.expand(16 * MIB) == 16 * MIB
    node.write("grown")
    node.unstage()
    node.stage()
    assert node.read() == "grown"


def test_the_volume_is_used_in_the_middle(node: Node) -> None:
    content = filled(node)
    stop_after(node, 2)
    assert node.record().conversion is not None
    assert len(node.open_mapping().targets) == 2
    assert digest_of(device_of(node)) == content
    node.stage(capability=BLOCK)  # kubelet repeats it
    node.unstage()
    assert node.closed()
    node.stage(capability=BLOCK)
    assert len(node.open_mapping().targets) == 2
    assert digest_of(device_of(node)) == content
    stop_after(node, 1)
    reencrypt(node)
    assert digest_of(device_of(node)) == content
    node.unstage()
    node.stage(capability=BLOCK)
    assert digest_of(device_of(node)) == content


def test_begun_in_use_and_ended_without(node: Node) -> None:
    content = filled(node)
    stop_after(node, 2)
    node.unstage()
    stop_after(node, 1)
    node.stage(capability=BLOCK)
    assert digest_of(device_of(node)) == content
    node.unstage()
    reencrypt(node)
    node.stage(capability=BLOCK)
    assert digest_of(device_of(node)) == content


def test_twice_in_a_row_while_it_is_in_use(node: Node) -> None:
    content = filled(node)
    digests = {key_digest(node)}
    for _ in range(2):
        reencrypt(node)
        digests.add(key_digest(node))
        assert digest_of(device_of(node)) == content
    assert len(digests) == 3
    node.expand(SIZE + CHUNK, path=node.staging_path())
    node.unstage()
    node.delete()


def test_what_cannot_be_done_in_the_middle_says_so_and_changes_nothing(node: Node) -> None:
    content = filled(node)
    stop_after(node, 1)
    record = node.record()
    cases: dict[str, Callable[[], object]] = {
        "cannot be enlarged meanwhile": lambda: node.expand(SIZE + CHUNK),
        "run to its end first": lambda: node.rekeying.rewrap(VOLUME, read_secret(SECRET)),
        "cannot be enlarged": lambda: node.grow(SIZE + CHUNK),
    }
    for said, call in cases.items():
        with pytest.raises(FailedPrecondition, match=said):
            call()
    with pytest.raises(Unauthenticated):
        reencrypt(node, OTHER)
    assert node.record() == record
    assert digest_of(device_of(node)) == content


def test_a_volume_is_deleted_in_the_middle(node: Node) -> None:
    filled(node)
    stop_after(node, 2)
    with pytest.raises(DeviceInUse), open(device_of(node), "rb"):
        node.delete()
    node.unstage()
    node.delete()
    assert not node.disk().parent.exists()


def test_a_key_slot_of_somebody_else_forbids_it(node: Node) -> None:
    filled(node)
    node.unstage()
    (node.folder / "new").write_text("theirs")
    subprocess.run(
        ["cryptsetup", "luksAddKey", "--key-file", "-", "--pbkdf-force-iterations", "1000", "--pbkdf", "pbkdf2",
         str(node.disk()), str(node.folder / "new")],
        input=SECRET["CRYPTO_KEY_VALUE"].encode(), check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    with pytest.raises(FailedPrecondition, match="has 2 key slots"):
        reencrypt(node)
    assert node.record().conversion is None


def test_an_older_record_moves_nothing(node: Node) -> None:
    """A backup of the record, where nothing tells its age, must not copy zeros over what was moved."""
    content = filled(node)
    node.unstage()
    stop_after(node, 1)
    old = node.record_file().read_bytes()
    stop_after(node, 1)
    newest = node.record_file().read_bytes()
    node.record_file().write_bytes(old)
    with pytest.raises(FailedPrecondition, match="restore the newest record"):
        reencrypt(node)
    os.removexattr(node.disk().parent, "trusted.luks-csi.revision")
    with pytest.raises(FailedPrecondition, match="moved further to its new volume key than its record says"):
        reencrypt(node)
    node.record_file().write_bytes(newest)
    reencrypt(node)
    node.stage(capability=BLOCK)
    assert digest_of(device_of(node)) == content


@pytest.mark.parametrize("parameters", [CHEAP, PLAIN], ids=["encrypted", "plain"])
def test_a_record_from_before_the_move_loses_nothing(node: Node, parameters: Mapping[str, str]) -> None:
    """Restored without its mark it would have next.img made anew, and half a volume staged."""
    content = filled(node, parameters)
    node.unstage()
    old = node.record_file().read_bytes()
    move = encrypt if parameters is PLAIN else reencrypt
    with pytest.raises(Stopped):
        move(node, SECRET, after(2))
    newest = node.record_file().read_bytes()
    os.removexattr(node.disk().parent, "trusted.luks-csi.revision")
    node.record_file().write_bytes(old)
    for call in (lambda: move(node), lambda: node.stage(capability=BLOCK)):
        with pytest.raises(FailedPrecondition, match="restore the newest record"):
            call()
    node.record_file().write_bytes(newest)
    move(node)
    node.stage(capability=BLOCK)
    assert digest_of(device_of(node)) == content


def test_what_a_cut_begin_left_goes(node: Node) -> None:
    content = filled(node)
    beside = storage_beside(node.store, VOLUME)
    beside.make_next(VOLUME, SIZE + 16 * MIB)
    with beside.attach_next(VOLUME) as left:
        left_open = os.open(left, os.O_WRONLY)
        os.pwrite(left_open, b"half a header", 0)
        os.fsync(left_open)
        os.close(left_open)
    node.unstage()
    node.stage(capability=BLOCK)
    assert not next_file(node).exists(), "what nothing was moved to is left"
    reencrypt(node)
    assert digest_of(device_of(node)) == content


def test_a_sick_next_header_is_not_taken(node: Node) -> None:
    content = filled(node)
    stop_after(node, 1)
    node.unstage()
    with next_file(node).open("r+b") as file:
        head = file.read(32768)
        file.seek(0)
        file.write(bytes(32768))
    with pytest.raises(DriverError):
        reencrypt(node)
    with pytest.raises(DriverError):
        node.stage(capability=BLOCK)
    assert node.closed()
    with next_file(node).open("r+b") as file:
        file.write(head)
    reencrypt(node)
    node.stage(capability=BLOCK)
    assert digest_of(device_of(node)) == content


# --- plain volumes ----------------------------------------------------------------------------------------------------


def test_a_plain_volume_is_encrypted(node: Node) -> None:
    content = filled(node, PLAIN)
    with pytest.raises(DeviceInUse, match="is in use"):
        encrypt(node)
    node.unstage()
    record = encrypt(node)
    assert record.parameters.encrypted
    assert node.closed()
    with pytest.raises(Unauthenticated):
        node.stage(capability=BLOCK, secret=OTHER)
    node.stage(capability=BLOCK)
    assert digest_of(device_of(node)) == content
    with pytest.raises(FailedPrecondition, match="encrypted already"):
        encrypt(node)
    reencrypt(node)
    assert digest_of(device_of(node)) == content


def test_no_plain_text_stays_in_the_old_file(node: Node) -> None:
    node.create(size=SIZE, parameters=PLAIN)
    node.stage()
    node.write("a greeting that nobody must find " * 1000)
    node.unstage()
    with node.disk().open("rb") as old:
        encrypt(node)
        assert not old.read().strip(b"\0"), "the old file still holds something"
    assert b"a greeting that nobody must find" not in node.disk().read_bytes()
    node.stage()
    assert node.read().startswith("a greeting")


@pytest.mark.parametrize("says_so", [True, False])
def test_where_nothing_becomes_free_all_of_it_has_room_twice_or_it_is_not_begun(
    node: Node, monkeypatch: pytest.MonkeyPatch, *, says_so: bool
) -> None:
    """A file system without holes: ramfs; or vfat, of which the kernel does not say so."""
    content = filled(node, PLAIN)
    node.unstage()
    monkeypatch.setattr("csi_driver.luks.two_keys.discard", lambda *_: not says_so)
    rooms = iter((1 << 30, SIZE - 1))  # for what is moved at once, and for all of it
    with monkeypatch.context() as full:
        full.setattr(type(node.store), "space", lambda *_: Space(1 << 30, room := next(rooms), room))
        with pytest.raises(
            ResourceExhausted, match=r"frees nothing within a file .* 5767168 bytes are wanted and 57671"
        ):
            encrypt(node)
    assert node.record().conversion is None
    assert not next_file(node).exists()
    with pytest.raises(Stopped):
        encrypt(node, SECRET, after(2))
    encrypt(node)
    node.stage(capability=BLOCK)
    assert digest_of(device_of(node)) == content
    reencrypt(node)
    assert digest_of(device_of(node)) == content


def test_a_half_encrypted_volume_is_not_staged(node: Node) -> None:
    content = filled(node, PLAIN)
    node.unstage()
    with pytest.raises(Stopped):
        encrypt(node, SECRET, after(2))
    with pytest.raises(FailedPrecondition, match="is being encrypted"):
        node.stage(capability=BLOCK)
    with pytest.raises(Unauthenticated):
        encrypt(node, OTHER)
    with pytest.raises(FailedPrecondition, match="was begun with --passphrase-file or --secret-dir and not with --gen"):
        node.conversions.encrypt(VOLUME, read_secret({}), None, Watch(), generate=True)
    encrypt(node)
    node.stage(capability=BLOCK)
    assert digest_of(device_of(node)) == content


def test_a_plain_volume_that_nobody_used_is_made_anew(node: Node) -> None:
    node.create(size=SIZE, parameters=PLAIN)
    with pytest.raises(FailedPrecondition, match="nothing is in it"):
        encrypt(node)
    assert node.record().conversion is None
    assert not next_file(node).exists()
