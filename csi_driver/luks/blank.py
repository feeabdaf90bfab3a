"""The proof that a device is blank, without which nothing is ever formatted. Runs in a worker.

`storage` is the path of the sparse file below the device, byte for byte the same. The file system knows where anything
was ever written to it: then all of that is read, and the proof is complete. Without it, or where everything is said to
be data, samples are.
"""

import errno
import os
from collections.abc import Iterator
from typing import Final

from csi_driver.host import blockdev
from csi_driver.host.signatures import HEAD_BYTES, name_of
from csi_driver.luks.formats import DATA_OFFSET, MIB
from csi_driver.luks.header import HEADER_PROBE
from csi_driver.luks.header_probe import is_blank_or_ours
from csi_driver.model.errors import DeviceShort, DeviceUnreadable, ForeignSignature

_CHUNK: Final = MIB
_ZEROS: Final = bytes(_CHUNK)
_SAMPLES: Final = 64
_SAMPLE: Final = 0x10000

Place = str | os.PathLike[str]
Span = tuple[int, int]
"""Bytes from the first number on, up to the second."""


def prove_blank(where: str, path: Place, least_size: int, storage: Place | None = None) -> None:
    """Prove that the device at `path` is at least `least_size` bytes long and holds nothing.

    Read are the whole header area and the first MiB behind it, the last MiB (backup partition tables, RAID and ZFS
    labels) and, of the rest, all that was ever written to `storage`, or 64 blocks of 64 KiB spread over it. Raises
    DeviceShort, DeviceUnreadable, and ForeignSignature for anything but zeros: a doubt is an error, never a blank
    device.
    """
    with open(path, "rb", buffering=0) as device:
        size = _check_size(where, device.fileno(), least_size)
        head = read_all(where, device.fileno(), 0, HEAD_BYTES)
        _refuse_data(where, device.fileno(), 0, min(size, DATA_OFFSET + MIB), head)
        _refuse_data_behind(where, device.fileno(), size, DATA_OFFSET + MIB, head, storage)


def prove_unwritten(where: str, path: Place, least_size: int, uuid: str, storage: Place | None = None) -> None:
    """Prove that a device whose formatting was cut short holds nothing but, perhaps, a part of that very header.

    The header area must be empty or carry `uuid`; behind it everything `prove_blank` reads must be zero. Same errors.
    """
    with open(path, "rb", buffering=0) as device:
        size = _check_size(where, device.fileno(), least_size)
        chunks = [read_all(where, device.fileno(), at, _CHUNK) for at in range(0, HEADER_PROBE, _CHUNK)]
        if any(chunk != _ZEROS for chunk in chunks) and not is_blank_or_ours(b"".join(chunks), uuid):
            raise _foreign(where, chunks[0][:HEAD_BYTES], f"zeros or the unfinished LUKS2 header {uuid}")
        _refuse_data_behind(where, device.fileno(), size, DATA_OFFSET, chunks[0][:HEAD_BYTES], storage)


def prove_payload_blank(where: str, path: Place, least_size: int, storage: Place | None = None) -> None:
    """Prove that nothing was ever written through the mapping of a formatted device: all is zero behind its header.

    `path` is the device with the ciphertext. What the mapping shows of it is noise. Errors as `prove_blank`.
    """
    with open(path, "rb", buffering=0) as device:
        size = _check_size(where, device.fileno(), least_size)
        # What the kernel read before it was written through the mapping must not hide that.
        os.posix_fadvise(device.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        head = read_all(where, device.fileno(), DATA_OFFSET, min(HEAD_BYTES, size - DATA_OFFSET))
        _refuse_data_behind(where, device.fileno(), size, DATA_OFFSET, head, storage)


def written_spans(storage: Place | None, start: int, end: int) -> list[Span] | None:
    """The parts between `start` and `end` of the file `storage` to which something was ever written.

    None where nobody knows: without a file, on a file system without SEEK_DATA (lseek(2)), or where all of it is data.
    Raises DeviceUnreadable for any other error: that is no answer.
    """
    if storage is None or not os.path.isfile(storage):
        return None
    try:
        with open(storage, "rb", buffering=0) as file:
            spans = list(_data_of(file.fileno(), start, end))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise DeviceUnreadable(
            f"{storage} cannot be asked what was ever written to it ({error.strerror}); nothing was written, look at "
            f"the kernel log and the storage below it"
        ) from None
    return None if spans == [(start, end)] else spans


def sample_spans(start: int, end: int) -> Iterator[Span]:
    """Blocks of 64 KiB spread over what lies between."""
    step = (end - start) // _SAMPLES
    for index in range(_SAMPLES if step > 0 else 0):
        at = max(start, (start + index * step) & -_SAMPLE)
        yield at, min(at + _SAMPLE, end)


def _data_of(descriptor: int, start: int, end: int) -> Iterator[Span]:
    while start < end:
        try:
            start = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # only a hole is left
            raise
        if start >= end:
            return
        hole = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, min(hole, end)
        start = hole


def _check_size(where: str, descriptor: int, least_size: int) -> int:
    size = blockdev.size_bytes(descriptor)
    if size < least_size:
        raise DeviceShort(
            f"{where} is {size} bytes long and {least_size} are recorded; nothing was written, check the storage below"
        )
    return size


def _refuse_data_behind(where: str, descriptor: int, size: int, start: int, head: bytes, storage: Place | None) -> None:
    last = max(start, size - MIB)
    _refuse_data(where, descriptor, start, min(start + MIB, size), head)
    _refuse_data(where, descriptor, last, size, head)
    written = written_spans(storage, start, size)
    for at, end in sample_spans(start, last) if written is None else written:
        _refuse_data(where, descriptor, at, end, head)


def _refuse_data(where: str, descriptor: int, start: int, end: int, head: bytes) -> None:
    for at in range(start, end, _CHUNK):
        length = min(_CHUNK, end - at)
        if read_all(where, descriptor, at, length) != _ZEROS[:length]:
            raise _foreign(where, head, "nothing but zeros")


def _foreign(where: str, head: bytes, expected: str) -> ForeignSignature:
    found = name_of(head)
    return ForeignSignature(
        f"{where} should hold {expected} and holds {f'a {found} signature' if found else 'other data'}; nothing was "
        f"written, check that this is the volume's device"
    )


def read_all(where: str, descriptor: int, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on. Raises DeviceUnreadable, DeviceShort."""
    try:
        found = blockdev.read_at(descriptor, offset, length)
    except OSError as error:
        raise DeviceUnreadable(
            f"{where} cannot be read at byte {offset} ({error.strerror}); nothing was written, look at the kernel log "
            f"and the storage below it"
        ) from None
    if len(found) < length:
        raise DeviceShort(f"{where} ends at byte {offset + len(found)}, inside what is recorded; check the storage")
    return found
