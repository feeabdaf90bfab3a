"""The streaming pass: same bytes back, and what is left when a pass is cut, refused or runs out of room."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from csi_driver.images.base import MIB, Extent, ImageFormat
from csi_driver.images.checkpoint import Job, Operation, SourceIdentity, load_checkpoint
from csi_driver.images.clone import run_pass
from csi_driver.images.source import RawReader
from csi_driver.images.stream import Layout, Pace, chunks_of
from csi_driver.images.target import Disk, Encryption, PartFile, PassResult, Target, hold
from csi_driver.luks.image_header import VolumeKey
from csi_driver.model.errors import (
    CommandFailed,
    DeviceUnreadable,
    DriverError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Stopped,
    Unauthenticated,
    VolumeBusy,
)
from tests.image_clones import (
    ENCRYPTED,
    HEADER,
    OTHER_PASSPHRASE,
    PASSPHRASE,
    SMALL,
    WHERE,
    clone,
    decrypted,
    digest_of,
    encrypted,
    make_source,
)

ENCRYPT, DECRYPT, REENCRYPT, IGNORE = Operation.ENCRYPT, Operation.DECRYPT, Operation.REENCRYPT, Operation.IGNORE
CHUNK = SMALL.chunk
SIZE = 24 * CHUNK + 100


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is a file system for that: a hundred headers with all their fsyncs take a disk its time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source.raw", SIZE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "new-image"


def left(folder: Path) -> list[str]:
    """What a run left in the folder and of its lock."""
    inside = sorted(os.listdir(folder)) or ["nothing"] if folder.exists() else []
    return inside + sorted(path.name for path in folder.parent.iterdir() if "lock" in path.name)


def durable_chunks(folder: Path) -> int:
    checkpoint = load_checkpoint(folder / "checkpoint.json")
    assert checkpoint is not None
    return checkpoint.chunks


def uuid_of(folder: Path) -> str:
    checkpoint = load_checkpoint(folder / "checkpoint.json")
    assert checkpoint is not None
    assert checkpoint.luks is not None
    return checkpoint.luks.uuid


def cut(
    source: Path,
    folder: Path,
    encryption: Encryption | None = ENCRYPTED,
    at: int = 17,
    pace: Pace = SMALL,
    *,
    verify: bool = False,
) -> None:
    """A pass that ends when the source cannot be read at chunk `at`."""

    def fail(offset: int) -> None:
        if offset >= at * CHUNK:
            raise DeviceUnreadable("a bad sector")

    operation = ENCRYPT if encryption else IGNORE
    with pytest.raises(DeviceUnreadable, match="a bad sector"):
        clone(operation, source, folder, encryption, before=fail, disk=NoReflink(), pace=pace, verify=verify)


class NoReflink(Disk):
    def reflink(self, descriptor: int, source: int) -> bool:
        return False


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("size", [1, 511, 512, 4097, MIB - 1, MIB, MIB + 1])
def test_encrypt_and_decrypt_give_the_same_bytes(tmp_path: Path, folder: Path, size: int, sector_size: int) -> None:
    source = make_source(tmp_path / "source.raw", size)
    result = clone(ENCRYPT, source, folder, encrypted(sector_size=sector_size), verify=True)
    stored = -(-size // sector_size) * sector_size
    assert (result.payload, result.size, result.part.stat().st_size) == (size, HEADER + stored, HEADER + stored)
    checkpoint = load_checkpoint(folder / "checkpoint.json")
    assert checkpoint is not None
    assert len(checkpoint.digests) == 32 * -(-size // CHUNK)
    inside = source.read_bytes()
    assert size < 16 or inside[:16] not in result.part.read_bytes()
    plain = clone(DECRYPT, result.part, tmp_path / "plain", verify=True)
    assert plain.part.read_bytes() == inside
    assert left(folder) == ["checkpoint.json", "part"]


def test_reencrypt_makes_another_key_cipher_and_passphrase_of_the_same_payload(tmp_path: Path, source: Path) -> None:
    first = clone(ENCRYPT, source, tmp_path / "first", encrypted(sector_size=4096))
    chosen = encrypted(OTHER_PASSPHRASE, cipher="aes-cbc-essiv:sha256", key_bits=256, sector_size=512)
    second = clone(REENCRYPT, first.part, tmp_path / "second", chosen, verify=True)
    assert first.luks is not None
    assert second.luks is not None
    assert second.luks.digest != first.luks.digest
    assert (second.luks.cipher, second.luks.key_bits, second.luks.sector_size) == ("aes-cbc-essiv:sha256", 256, 512)
    assert decrypted(second.part, tmp_path / "plain", OTHER_PASSPHRASE) == digest_of(source)
    with pytest.raises(Unauthenticated, match="opens no key slot of image debian-12"):
        decrypted(second.part, tmp_path / "none", PASSPHRASE)


def test_two_encryptions_of_one_source_have_nothing_in_common(tmp_path: Path, source: Path) -> None:
    parts = [clone(ENCRYPT, source, tmp_path / name, ENCRYPTED).part.read_bytes() for name in ("one", "two")]
    assert parts[0][HEADER : HEADER + 512] != parts[1][HEADER : HEADER + 512]


def test_holes_are_not_read_and_stay_holes_in_a_plain_copy_and_become_zeros_in_an_encrypted_one(
    tmp_path: Path, folder: Path
) -> None:
    source = tmp_path / "source.raw"
    size = 24 * MIB + 5
    with source.open("wb") as file:
        file.truncate(size)
        for place in (0, 5 * CHUNK + 4096, 20 * MIB - 4096):
            file.seek(place)
            file.write(b"data" * 2048)
    places: list[int] = []
    pace = replace(SMALL, chunk=MIB)
    plain = clone(IGNORE, source, folder, before=places.append, disk=NoReflink(), verify=True, pace=pace)
    assert len(places) == 4
    assert digest_of(plain.part) == digest_of(source)
    assert plain.part.stat().st_blocks * 512 < MIB
    places.clear()
    sealed = clone(ENCRYPT, source, tmp_path / "sealed", ENCRYPTED, before=places.append, pace=pace)
    assert len(places) == 4
    assert sealed.part.stat().st_blocks * 512 >= HEADER + size
    with sealed.part.open("rb") as file:
        file.seek(HEADER + 22 * MIB)
        assert bytes(512) not in file.read(MIB)
    opened = clone(DECRYPT, sealed.part, tmp_path / "opened", pace=pace, verify=True)
    assert digest_of(opened.part) == digest_of(source)
    assert opened.part.stat().st_blocks * 512 < 2 * MIB  # zeros were found again


@pytest.mark.parametrize("encryption", [ENCRYPTED, None])
def test_a_pass_that_was_cut_goes_on_behind_its_last_durable_chunk(
    source: Path, folder: Path, tmp_path: Path, encryption: Encryption | None
) -> None:
    cut(source, folder, encryption)
    durable = durable_chunks(folder)
    assert 0 < durable < 24
    places: list[int] = []
    said: list[int] = []
    operation = ENCRYPT if encryption else IGNORE
    result = clone(operation, source, folder, encryption, before=places.append, progress=said.append, disk=NoReflink())
    assert result.resumed == durable
    assert min(places) == durable * CHUNK
    assert said == sorted(said)
    assert (said[0], said[-1]) == (durable * CHUNK, SIZE)
    inside = decrypted(result.part, tmp_path / "plain") if encryption else digest_of(result.part)
    assert inside == digest_of(source)


RARE = replace(SMALL, stride=8)


def test_without_verify_only_what_a_checkpoint_can_end_with_is_hashed() -> None:
    layout = Layout(SIZE, CHUNK, 0, 1, stride=8)
    assert [at for at in range(25) if layout.hashed(at)] == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 24]
    assert [layout.secured(chunks) for chunks in (0, 7, 8, 23, 24, 25)] == [0, 0, 8, 16, 24, 25]
    assert all(replace(layout, verify=True).hashed(at) for at in range(25))


@pytest.mark.parametrize("size", [SIZE, 5 * CHUNK, 26 * CHUNK, CHUNK + 1])
def test_a_whole_part_keeps_the_digests_of_its_last_chunks_in_order(tmp_path: Path, folder: Path, size: int) -> None:
    result = clone(ENCRYPT, make_source(tmp_path / "source.raw", size), folder, ENCRYPTED, pace=RARE)
    checkpoint = load_checkpoint(folder / "checkpoint.json")
    assert checkpoint is not None
    stored, chunks = result.part.read_bytes()[HEADER:], -(-size // CHUNK)
    pieces = [stored[at * CHUNK : (at + 1) * CHUNK] for at in range(max(0, chunks - 4), chunks)]
    assert checkpoint.digests == b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    assert checkpoint.chunks == chunks


@pytest.mark.parametrize("encryption", [ENCRYPTED, None])
@pytest.mark.parametrize(
    ("verified", "goes_on"), [((False, False), 16), ((True, False), 16), ((True, True), 16), ((False, True), 0)]
)
def test_a_verified_pass_goes_on_from_a_verified_part_alone(
    source: Path, folder: Path, encryption: Encryption | None, verified: tuple[bool, bool], goes_on: int
) -> None:
    first, second = verified
    operation = ENCRYPT if encryption else IGNORE
    cut(source, folder, encryption, pace=RARE, verify=first)
    assert durable_chunks(folder) == 16
    result = clone(operation, source, folder, encryption, disk=NoReflink(), pace=RARE, verify=second)
    assert result.resumed == goes_on
    inside = decrypted(result.part, folder.with_name("plain")) if encryption else digest_of(result.part)
    assert inside == digest_of(source)


@pytest.mark.parametrize("torn", range(12, 16))
def test_each_of_the_last_durable_chunks_is_compared_before_a_pass_goes_on(
    source: Path, folder: Path, torn: int
) -> None:
    cut(source, folder, pace=RARE)
    uuid = uuid_of(folder)
    _tear(folder, HEADER + torn * CHUNK + 99)
    result = clone(ENCRYPT, source, folder, ENCRYPTED, pace=RARE)
    assert result.luks is not None
    assert (result.resumed, result.luks.uuid == uuid) == (0, False)


def test_a_checkpoint_with_all_digests_of_the_version_before_is_gone_on_with(source: Path, folder: Path) -> None:
    cut(source, folder, verify=True)
    path = folder / "checkpoint.json"
    told = json.loads(path.read_bytes())
    told["version"] = 1
    del told["chunks"], told["plan"]["verify"]
    path.write_text(json.dumps(told))
    assert clone(ENCRYPT, source, folder, ENCRYPTED, pace=RARE).resumed == 17


def test_what_another_thread_finishes_when_one_fails_is_kept(source: Path, folder: Path) -> None:
    failed = threading.Event()

    def read(offset: int) -> None:
        if offset == 0:
            failed.wait(10)
        if offset == 17 * CHUNK:
            failed.set()
            _unreadable(offset)

    with pytest.raises(DeviceUnreadable):
        clone(ENCRYPT, source, folder, ENCRYPTED, before=read)
    assert durable_chunks(folder) == 17


def test_a_whole_part_that_nobody_took_over_is_not_made_again(source: Path, folder: Path) -> None:
    first = clone(ENCRYPT, source, folder, ENCRYPTED)
    again = clone(ENCRYPT, source, folder, ENCRYPTED, before=lambda _: pytest.fail("read"))
    assert (again.luks, again.resumed) == (first.luks, 25)


def _tear(folder: Path, at: int) -> None:
    with (folder / "part").open("r+b") as file:
        file.seek(at)
        file.write(b"torn")


def _tear_header(folder: Path) -> None:
    for copy in (4096, 16384 + 4096):
        _tear(folder, copy)


def _swap_header(source: Path, folder: Path) -> None:
    other = clone(ENCRYPT, source, folder.with_name("other"), ENCRYPTED).part
    with other.open("rb") as given, (folder / "part").open("r+b") as file:
        file.write(given.read(HEADER))


def _garble(checkpoint: Path) -> None:
    checkpoint.write_bytes(b'{"version":2,"plan":{"payload":1,"\xc7":1}}')


CHANGES: dict[str, Callable[[Path, Path], Encryption | None]] = {
    "cipher": lambda *_: encrypted(cipher="aes-cbc-plain64", key_bits=256),
    "key size": lambda *_: encrypted(key_bits=256),
    "sector size": lambda *_: encrypted(sector_size=4096),
    "key derivation": lambda *_: encrypted(iterations=1001),
    "source written": lambda source, _: _append(source),
    "source touched": lambda source, _: os.utime(source),
    "source replaced": lambda source, _: _replace(source),
    "last durable chunk": lambda _, folder: _tear(folder, HEADER + durable_chunks(folder) * CHUNK - 100),
    "header": lambda _, folder: _tear_header(folder),
    "header of another image": _swap_header,
    "part cut off": lambda _, folder: os.truncate(folder / "part", HEADER + CHUNK),
    "part removed": lambda _, folder: os.unlink(folder / "part"),
    "checkpoint removed": lambda _, folder: os.unlink(folder / "checkpoint.json"),
    "checkpoint torn": lambda _, folder: os.truncate(folder / "checkpoint.json", 300),
    "checkpoint that is no UTF-8": lambda _, folder: _garble(folder / "checkpoint.json"),
    "checkpoint of a later version": lambda _, folder: _later(folder / "checkpoint.json"),
}


def _append(source: Path) -> None:
    with source.open("ab") as file:
        file.write(b"more")


def _replace(source: Path) -> None:
    fresh = source.with_name("fresh")
    shutil.copy2(source, fresh)
    fresh.rename(source)


def _later(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"version":2', b'"version":3'))


@pytest.mark.parametrize("change", CHANGES)
def test_a_part_that_does_not_fit_is_begun_anew_with_a_new_volume_key(
    source: Path, folder: Path, tmp_path: Path, change: str
) -> None:
    cut(source, folder)
    before = load_checkpoint(folder / "checkpoint.json")
    encryption = CHANGES[change](source, folder) or ENCRYPTED
    result = clone(ENCRYPT, source, folder, encryption, verify=True)
    assert before is not None
    assert before.luks is not None
    assert result.luks is not None
    assert result.resumed == 0
    assert result.luks.uuid != before.luks.uuid
    assert result.luks.digest != before.luks.digest
    assert decrypted(result.part, tmp_path / "plain") == digest_of(source)


def test_another_chunk_size_or_source_format_begins_anew(source: Path, folder: Path) -> None:
    cut(source, folder)
    uuid = uuid_of(folder)
    with pytest.raises(DeviceUnreadable):
        clone(ENCRYPT, source, folder, ENCRYPTED, pace=replace(SMALL, chunk=2 * CHUNK), before=_unreadable)
    changed = uuid_of(folder)
    assert changed != uuid
    with pytest.raises(DeviceUnreadable):
        clone(ENCRYPT, source, folder, ENCRYPTED, source_format=ImageFormat.QCOW2, before=_unreadable)
    assert uuid_of(folder) not in (uuid, changed)


def _unreadable(_: int) -> None:
    raise DeviceUnreadable("gone")


def test_another_passphrase_does_not_go_on_and_throws_nothing_away(source: Path, folder: Path) -> None:
    cut(source, folder)
    durable = durable_chunks(folder)
    with pytest.raises(
        Unauthenticated,
        match=r"unfinished copy of image debian-12; .* or begin anew after luks-csi image delete new-image$",
    ):
        clone(ENCRYPT, source, folder, encrypted(OTHER_PASSPHRASE))
    assert clone(ENCRYPT, source, folder, ENCRYPTED).resumed == durable


@pytest.mark.parametrize("change", [_append, _replace, os.unlink])
@pytest.mark.parametrize("encryption", [ENCRYPTED, None])
def test_a_source_that_changes_meanwhile_is_noticed_and_nothing_is_kept(
    source: Path, folder: Path, change: Callable[[Path], None], encryption: Encryption | None
) -> None:
    calls = iter([lambda: change(source)])

    def read(offset: int) -> None:
        if offset >= 8 * CHUNK:
            next(calls, lambda: None)()

    operation = ENCRYPT if encryption else IGNORE
    with pytest.raises(FailedPrecondition, match=r"source .* of image debian-12 was changed or removed while it was"):
        clone(operation, source, folder, encryption, before=read, disk=NoReflink())
    assert left(folder) == []


def test_a_source_that_shrinks_is_said_to_have_changed_not_to_be_unreadable(source: Path, folder: Path) -> None:
    with pytest.raises(FailedPrecondition, match="was changed or removed while it was read"):
        clone(ENCRYPT, source, folder, ENCRYPTED, before=lambda _: os.truncate(source, 5))
    assert left(folder) == []


class Faulty(NoReflink):
    """Fails at the n-th call of a method, and tells what was written."""

    def __init__(self, call: str, number: int, nth: int = 1) -> None:
        self.call, self.number, self.left = call, number, nth

    def _step(self, call: str) -> None:
        if call == self.call:
            self.left -= 1
            if self.left == 0:
                raise OSError(self.number, os.strerror(self.number))

    def allocate(self, descriptor: int, offset: int, length: int) -> None:
        self._step("allocate")
        super().allocate(descriptor, offset, length)

    def write(self, descriptor: int, content: memoryview, offset: int) -> int:
        self._step("write")
        return super().write(descriptor, content, offset)

    def sync(self, descriptor: int) -> None:
        self._step("sync")
        super().sync(descriptor)


@pytest.mark.parametrize(
    ("call", "nth", "number"),
    [
        ("allocate", 1, errno.ENOSPC),
        ("write", 1, errno.EDQUOT),
        ("write", 19, errno.ENOSPC),
        ("write", 25, errno.EFBIG),
        ("sync", 1, errno.ENOSPC),
    ],
)
def test_a_full_disk_is_told_and_nothing_is_left(source: Path, folder: Path, call: str, nth: int, number: int) -> None:
    with pytest.raises(ResourceExhausted, match=r"^no space for image debian-12 in .*; .* free space there$"):
        clone(ENCRYPT, source, folder, ENCRYPTED, disk=Faulty(call, number, nth))
    assert left(folder) == []


@pytest.mark.parametrize(("call", "nth"), [("write", 19), ("sync", 1)])
def test_a_target_that_cannot_be_written_is_told_and_not_trusted_any_more(
    source: Path, folder: Path, call: str, nth: int
) -> None:
    with pytest.raises(CommandFailed, match=r"the copy of image debian-12 in .* could not be .* \(EIO, Input/output"):
        clone(IGNORE, source, folder, disk=Faulty(call, errno.EIO, nth))
    assert left(folder) == []


class Room(NoReflink):
    def __init__(self, free: int) -> None:
        self._free = free

    def free(self, folder: Path) -> int:
        return self._free


def test_room_is_looked_for_before_the_first_byte_and_what_is_there_counts(source: Path, folder: Path) -> None:
    needed = HEADER + SIZE // 512 * 512 + 512
    with pytest.raises(
        ResourceExhausted, match=rf"no room for .*: {needed} bytes are wanted and {needed - 1} are free"
    ):
        clone(ENCRYPT, source, folder, ENCRYPTED, disk=Room(needed - 1), before=_unreadable)
    assert left(folder) == []
    cut(source, folder)
    assert clone(ENCRYPT, source, folder, ENCRYPTED, disk=Room(0)).resumed > 0
    with pytest.raises(ResourceExhausted, match=rf": {SIZE // 4096 * 4096 + 4096} bytes are wanted and 0 are free"):
        clone(IGNORE, source, folder, disk=Room(0), before=_unreadable)


class Journal(NoReflink):
    """What happened to a part, in order; nothing that is written counts as durable before a sync."""

    def __init__(self) -> None:
        self.written: set[int] = set()
        self.durable: set[int] = set()
        self.content: list[bytes] = []

    def write(self, descriptor: int, content: memoryview, offset: int) -> int:
        self.content.append(bytes(content))
        count = super().write(descriptor, content, offset)
        self.written.add((offset - HEADER) // CHUNK)
        return count

    def sync(self, descriptor: int) -> None:
        before = set(self.written)
        super().sync(descriptor)
        self.durable |= before


def test_a_checkpoint_speaks_only_of_what_was_synced_before(source: Path, folder: Path) -> None:
    journal = Journal()
    seen = []

    def look(_: int) -> None:
        checkpoint = load_checkpoint(folder / "checkpoint.json")  # none before the header is whole
        chunks = checkpoint.chunks if checkpoint else 0
        assert journal.durable >= set(range(chunks))
        seen.append(chunks)

    clone(ENCRYPT, source, folder, ENCRYPTED, progress=look, before=lambda _: time.sleep(0.004), disk=journal)
    assert len(set(seen)) > 2
    assert seen == sorted(seen)
    assert durable_chunks(folder) == 25


def test_no_plaintext_is_ever_written_for_an_encrypted_target(tmp_path: Path, folder: Path) -> None:
    pattern = b"not for the disk"
    source = tmp_path / "source.raw"
    source.write_bytes(pattern * (5 * CHUNK // 16) + pattern[:9])
    journal = Journal()
    clone(ENCRYPT, source, folder, ENCRYPTED, disk=journal)
    assert sum(map(len, journal.content)) >= 5 * CHUNK
    assert not any(pattern in content or bytes(512) in content for content in journal.content)
    assert all(pattern not in (folder / name).read_bytes() for name in os.listdir(folder))


class NoDirect(NoReflink):
    """A file system that opens for direct I/O and then refuses it."""

    refused = 0

    def write(self, descriptor: int, content: memoryview, offset: int) -> int:
        self._check(descriptor)
        return super().write(descriptor, content, offset)

    def read(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        self._check(descriptor)
        return super().read(descriptor, buffer, offset)

    def _check(self, descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            self.refused += 1
            raise OSError(errno.EINVAL, "no")


def test_without_direct_io_the_page_cache_serves(source: Path, folder: Path, tmp_path: Path) -> None:
    disk = NoDirect()
    result = clone(ENCRYPT, source, folder, ENCRYPTED, disk=disk, verify=True)
    assert 1 <= disk.refused <= 2  # once per thread at most
    assert decrypted(result.part, tmp_path / "plain") == digest_of(source)


class Rotten(NoReflink):
    """A disk that gives other bytes than it was given."""

    def read(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        count = super().read(descriptor, buffer, offset)
        if offset == HEADER + 3 * CHUNK:
            buffer[77] ^= 1
        return count


def test_verify_reads_back_and_finds_a_byte_that_the_disk_changed(source: Path, folder: Path) -> None:
    assert clone(ENCRYPT, source, folder, ENCRYPTED, disk=Rotten()).size > HEADER
    with pytest.raises(CommandFailed, match=rf"reads back otherwise .* at byte {HEADER + 3 * CHUNK}; it is removed"):
        clone(ENCRYPT, source, folder, ENCRYPTED, disk=Rotten(), verify=True)
    assert left(folder) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_behind_a_checkpoint_and_the_next_run_goes_on(
    source: Path, folder: Path, number: int, request: pytest.FixtureRequest
) -> None:
    # A shell's background job ignores SIGINT, and what is ignored stops nothing.
    request.addfinalizer(partial(signal.signal, number, signal.signal(number, signal.default_int_handler)))
    before = signal.getsignal(number)
    sent = threading.Event()

    def progress(done: int) -> None:
        if done >= 10 * CHUNK and not sent.is_set():
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is before  # a second one ends it at once
            sent.set()

    def read(offset: int) -> None:
        if offset >= 12 * CHUNK:
            sent.wait(10)
            time.sleep(0.3)  # the other half takes long enough to be stopped, on a busy machine too

    name = signal.Signals(number).name
    rare = replace(SMALL, checkpoint_bytes=1 << 40)
    told: list[bool] = []
    with pytest.raises(
        Stopped, match=rf"encrypt of image debian-12 was stopped by {name}: \d+ % of it are done; run"
    ) as e:
        clone(
            ENCRYPT, source, folder, ENCRYPTED, progress=progress, before=read, pace=rare,
            stopping=lambda: told.append(sent.is_set()),
        )  # fmt: skip
    assert (e.value.signal, told) == (name, [False]), "at once, by the signal itself"
    assert signal.getsignal(number) is before
    assert durable_chunks(folder) >= 10
    assert clone(ENCRYPT, source, folder, ENCRYPTED).resumed >= 10


def test_a_header_in_the_making_ends_before_another_run_may_begin(source: Path, folder: Path) -> None:
    """It is written by name: late, it would stand over the next run's data."""
    for _ in range(3):
        with pytest.raises(ResourceExhausted):
            clone(ENCRYPT, source, folder, ENCRYPTED, disk=Faulty("write", errno.ENOSPC, 1))
        assert [thread for thread in threading.enumerate() if thread.name == "image-header"] == []
    assert left(folder) == []


def test_one_run_per_target(source: Path, folder: Path) -> None:
    refused: list[DriverError] = []

    def progress(_: int) -> None:
        if not refused:
            with pytest.raises(
                VolumeBusy, match=r"another run is at work on image debian-12 in .*process \d+"
            ) as caught:
                clone(ENCRYPT, source, folder, ENCRYPTED)
            refused.append(caught.value)

    result = clone(ENCRYPT, source, folder, ENCRYPTED, progress=progress)
    assert refused
    assert result.resumed == 0
    assert left(folder) == ["checkpoint.json", "part"]


def test_a_result_is_published_while_the_target_is_locked(source: Path, folder: Path, tmp_path: Path) -> None:
    published: list[PassResult] = []

    def publish(result: PassResult) -> None:
        with pytest.raises(VolumeBusy), hold(Target(folder), WHERE):
            pass
        result.part.rename(tmp_path / "published")
        published.append(result)

    job = Job(IGNORE, source, SourceIdentity.of(source, WHERE), ImageFormat.RAW, WHERE)
    reader = RawReader(str(source), WHERE)
    run_pass(reader, Target(folder, disk=NoReflink()), job, lambda _: None, publish=publish)
    reader.close()
    assert [result.payload for result in published] == [SIZE]
    assert digest_of(tmp_path / "published") == digest_of(source)


class Reflinking(Disk):
    """A file system that shares blocks."""

    def reflink(self, descriptor: int, source: int) -> bool:
        os.sendfile(descriptor, source, 0, SIZE)
        return True

    def write(self, descriptor: int, content: memoryview, offset: int) -> int:
        raise AssertionError


def test_a_copy_shares_blocks_where_it_can(source: Path, folder: Path) -> None:
    said: list[int] = []
    result = clone(IGNORE, source, folder, disk=Reflinking(), progress=said.append)
    assert (result.reflinked, result.size, said) == (True, SIZE, [SIZE])
    assert digest_of(result.part) == digest_of(source)


def test_the_file_of_another_format_is_not_its_payload_even_when_as_long(source: Path, folder: Path) -> None:
    with pytest.raises(AssertionError):  # it is written, chunk by chunk
        clone(IGNORE, source, folder, disk=Reflinking(), source_format=ImageFormat.QCOW2)


def test_a_target_without_a_place_is_told(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=r"the copy of image debian-12 in .* could not be locked \(ENOENT"):
        clone(ENCRYPT, source, tmp_path / "none" / "new-image", ENCRYPTED)


def test_what_cannot_be_right_is_refused_before_any_work(tmp_path: Path, source: Path, folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="encrypt of image debian-12 needs the key of a secret"):
        clone(ENCRYPT, source, folder)
    with pytest.raises(InvalidArgument, match="ignore of image debian-12 takes no key"):
        clone(IGNORE, source, folder, ENCRYPTED)
    with pytest.raises(InvalidArgument, match="image debian-12 is empty"):
        clone(ENCRYPT, make_source(tmp_path / "empty", 0), folder, ENCRYPTED)
    huge = tmp_path / "huge"
    huge.touch()
    os.truncate(huge, 3 << 40)
    with pytest.raises(OutOfRange, match="aes-xts-plain repeats its IV"):
        clone(ENCRYPT, huge, folder, encrypted(cipher="aes-xts-plain"))
    with pytest.raises(NotFound, match=r"the source .*/none of image debian-12 is not there"):
        SourceIdentity.of(tmp_path / "none", WHERE)
    assert left(folder) == []


class Told:
    """A reader that tells these extents of a payload."""

    def __init__(self, size: int, *extents: Extent) -> None:
        self.size = size
        self._extents = extents

    def extents(self) -> Iterator[Extent]:
        yield from self._extents

    def read_into(self, offset: int, buffer: memoryview) -> None:
        raise AssertionError

    def close(self) -> None:
        raise AssertionError


def test_chunks_hold_the_data_of_their_extents() -> None:
    reader = Told(25, Extent(0, 3, zero=False), Extent(3, 10, zero=True), Extent(13, 12, zero=False))
    chunks = list(chunks_of(reader, Layout(25, 10, 0, 1), 0, WHERE))
    assert [(chunk.index, [(part.offset, part.length) for part in chunk.data]) for chunk in chunks] == [
        (0, [(0, 3)]),
        (1, [(13, 7)]),
        (2, [(20, 5)]),
    ]
    assert [chunk.index for chunk in chunks_of(reader, Layout(25, 10, 0, 1), 2, WHERE)] == [2]


@pytest.mark.parametrize(
    "extents",
    [
        (Extent(0, 10, zero=False),),
        (Extent(0, 10, zero=False), Extent(11, 14, zero=True)),
        (Extent(0, 10, zero=False), Extent(10, 0, zero=True), Extent(10, 15, zero=True)),
        (Extent(0, 30, zero=True),),
        (),
    ],
)
def test_extents_that_leave_gaps_are_refused(extents: tuple[Extent, ...]) -> None:
    with pytest.raises(DeviceUnreadable, match=f"^{WHERE} does not tell what lies at byte"):
        list(chunks_of(Told(25, *extents), Layout(25, 10, 0, 1), 0, WHERE))


def test_a_volume_key_is_wiped_and_shows_nowhere() -> None:
    with VolumeKey.fresh(512) as key:
        assert len(set(key.value)) > 16
        assert repr(key) == str(key) == "VolumeKey(…)"
        value = key.value
    assert value == bytes(64)


def test_a_part_is_never_followed_to_somewhere_else(tmp_path: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "part").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").touch()
    with pytest.raises(CommandFailed, match=r"could not be opened \(ELOOP"):
        PartFile(Target(folder), WHERE, new=False)


def test_what_else_is_in_the_folder_stays(source: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "download").write_bytes(b"other")
    with pytest.raises(ResourceExhausted):
        clone(ENCRYPT, source, folder, ENCRYPTED, disk=Faulty("write", errno.ENOSPC, 5))
    assert left(folder) == ["download"]
