"""A cloned header gets a UUID of its own: wherever that is cut, and never on another header."""

import errno
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_driver.luks.cloned import change_uuid, write_errors
from csi_driver.luks.header import parse
from csi_driver.luks.header_rules import Limits as HeaderLimits
from csi_driver.model.errors import (
    DeviceBlank,
    DeviceShort,
    DeviceUnreadable,
    DriverError,
    ForeignSignature,
    InvalidHeader,
)
from csi_driver.model.volume import LuksIdentity
from tests import headers
from tests.handles import handle_on


@dataclass
class Change:
    """A header before and after its UUID was changed from UUID to OTHER_UUID; all before the data."""

    path: Path
    expected: LuksIdentity
    before: bytes
    after: bytes

    def run(self, area: bytes) -> bytes:
        """Change the UUID of a device that begins with `area`; what it begins with then."""
        headers.write_sparse(self.path, area)
        change_uuid("volume v", handle_on(self.path), headers.DEVICE_SIZE, headers.UUID, self.expected, HeaderLimits())
        with self.path.open("rb") as file:
            return file.read(headers.DATA_OFFSET)


@pytest.fixture
def change(tmp_path: Path) -> Change:
    before = headers.formatted()
    header = parse(before, "before")
    expected = LuksIdentity(
        uuid=headers.OTHER_UUID,
        cipher="aes-xts-plain64",
        key_bits=512,
        sector_size=512,
        data_offset=headers.DATA_OFFSET,
        digest=header.key_digest,
    )
    made = Change(tmp_path / "disk.img", expected, before, b"")
    made.after = made.run(before)
    return made


def test_the_uuid_is_all_that_changes(change: Change) -> None:
    old, new = parse(change.before, "before"), parse(change.after, "after")
    assert (old.uuid, new.uuid) == (headers.UUID, headers.OTHER_UUID)
    assert (old.keyslots, old.segments, old.digests) == (new.keyslots, new.segments, new.digests)
    assert change.before[2 * headers.HDR_SIZE :] == change.after[2 * headers.HDR_SIZE :]
    assert headers.accepts(change.after)
    assert change.run(change.after) == change.after


SIZE_OF_COPY = headers.HDR_SIZE


def without_checksum(area: bytes, at: int) -> bytes:
    return headers.with_field(area, "csum", bytes(64), at)


@pytest.mark.parametrize(
    "cut",
    [
        lambda old, new: new[:SIZE_OF_COPY] + old[SIZE_OF_COPY:],
        lambda old, new: old[:SIZE_OF_COPY] + new[SIZE_OF_COPY:],
        lambda old, new: without_checksum(new, 0)[:SIZE_OF_COPY] + old[SIZE_OF_COPY:],
        lambda _, new: without_checksum(new, SIZE_OF_COPY),
        lambda old, _: bytes(4096) + old[4096:],
        lambda _, new: new[:SIZE_OF_COPY] + bytes(4096) + new[SIZE_OF_COPY + 4096 :],
    ],
    ids=["between", "other order", "in the first", "in the second", "first sector zero", "second sector zero"],
)
def test_a_change_that_was_cut_is_ended(change: Change, cut: Callable[[bytes, bytes], bytes]) -> None:
    found = change.run(cut(change.before, change.after))
    header = parse(found, "found")
    assert (header.uuid, header.damaged_copy) == (headers.OTHER_UUID, None)
    assert found[2 * SIZE_OF_COPY :] == change.before[2 * SIZE_OF_COPY :]
    assert headers.accepts(found)


def third(_: Change) -> bytes:
    return headers.formatted(uuid="11111111-2222-4333-8444-555555555555")


def mixed_with_a_third(change: Change) -> bytes:
    return change.after[:SIZE_OF_COPY] + third(change)[SIZE_OF_COPY:]


def another_key(_: Change) -> bytes:
    headers.formatted.cache_clear()
    return headers.formatted()


@pytest.mark.parametrize(
    ("area", "error"),
    [
        (third, ForeignSignature),
        (mixed_with_a_third, InvalidHeader),
        (another_key, InvalidHeader),
        (lambda _: bytes(headers.DATA_OFFSET), DeviceBlank),
        (lambda _: b"data" * (headers.DATA_OFFSET // 4), ForeignSignature),
        (lambda change: without_checksum(without_checksum(change.before, 0), SIZE_OF_COPY), InvalidHeader),
    ],
    ids=["third UUID", "mixed with a third", "another key", "blank", "other data", "both damaged"],
)
def test_any_other_header_is_left_as_it_is(
    change: Change, area: Callable[[Change], bytes], error: type[DriverError]
) -> None:
    found = area(change)
    with pytest.raises(error):
        change.run(found)
    assert change.path.read_bytes()[: len(found)] == found


def sealed_in_memory(area: bytes) -> int:
    """A device that can be read and opened for writing, and whose writes fail."""
    descriptor = os.memfd_create("disk", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.pwrite(descriptor, area, 0)
    os.ftruncate(descriptor, headers.DEVICE_SIZE)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    return descriptor


def test_a_storage_that_takes_no_header_is_told_of_in_a_sentence(change: Change) -> None:
    descriptor = sealed_in_memory(change.before)
    path = f"/proc/self/fd/{descriptor}"
    try:
        with pytest.raises(DeviceUnreadable, match=r"^the LUKS2 header of volume v cannot be written \(EPERM"):
            change_uuid("volume v", handle_on(path), headers.DEVICE_SIZE, headers.UUID, change.expected, HeaderLimits())
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_stays_one(number: int) -> None:
    with pytest.raises(OSError, match=os.strerror(number)) as full, write_errors("volume v"):
        raise OSError(number, os.strerror(number))
    assert full.value.errno == number


def test_a_clone_that_is_too_short_is_left_as_it_is(change: Change) -> None:
    headers.write_sparse(change.path, change.before)
    with pytest.raises(DeviceShort):
        change_uuid("v", handle_on(change.path), headers.DEVICE_SIZE + 1, headers.UUID, change.expected, HeaderLimits())
    assert change.path.read_bytes()[: len(change.before)] == change.before


def test_one_copy_is_durable_before_the_other_one_is_touched(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[object] = []
    pwrite, fsync = os.pwrite, os.fsync

    def is_disk(descriptor: int) -> bool:
        return os.readlink(f"/proc/self/fd/{descriptor}") == str(change.path)

    def note(descriptor: int, content: bytes, offset: int) -> int:
        steps.extend([offset] * is_disk(descriptor))
        return pwrite(descriptor, content, offset)

    def flush(descriptor: int) -> None:
        steps.extend(["fsync"] * is_disk(descriptor))
        fsync(descriptor)

    monkeypatch.setattr(os, "pwrite", note)
    monkeypatch.setattr(os, "fsync", flush)
    change.run(change.before)
    assert steps == [0, "fsync", headers.HDR_SIZE, "fsync"]
