"""The proof that a device is blank, without which nothing is ever formatted. Runs in a worker."""

import os
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


def prove_blank(where: str, path: str | os.PathLike[str], least_size: int) -> None:
    """Prove that the device at `path` is at least `least_size` bytes long and holds nothing.

    Read are the whole header area and the first MiB behind it, the last MiB (backup partition tables, RAID and ZFS
    labels) and 64 blocks of 64 KiB spread over the rest. Raises DeviceShort, DeviceUnreadable, and ForeignSignature
    for anything but zeros: a doubt is an error, never a blank device.
    """
    with open(path, "rb", buffering=0) as device:
        size = _check_size(where, device.fileno(), least_size)
        head = _read(where, device.fileno(), 0, HEAD_BYTES)
        _refuse_data(where, device.fileno(), 0, min(size, DATA_OFFSET + MIB), head)
        _refuse_data_behind(where, device.fileno(), size, DATA_OFFSET + MIB, head)


def prove_unwritten(where: str, path: str | os.PathLike[str], least_size: int, uuid: str) -> None:
    """Prove that a device whose formatting was cut short holds nothing but, perhaps, a part of that very header.

    The header area must be empty or carry `uuid`; behind it everything `prove_blank` reads must be zero. Same errors.
    """
    with open(path, "rb", buffering=0) as device:
        size = _check_size(where, device.fileno(), least_size)
        chunks = [_read(where, device.fileno(), at, _CHUNK) for at in range(0, HEADER_PROBE, _CHUNK)]
        if any(chunk != _ZEROS for chunk in chunks) and not is_blank_or_ours(b"".join(chunks), uuid):
            raise _foreign(where, chunks[0][:HEAD_BYTES], f"zeros or the unfinished LUKS2 header {uuid}")
        _refuse_data_behind(where, device.fileno(), size, DATA_OFFSET, chunks[0][:HEAD_BYTES])


def _check_size(where: str, descriptor: int, least_size: int) -> int:
    size = blockdev.size_bytes(descriptor)
    if size < least_size:
        raise DeviceShort(
            f"{where} is {size} bytes long and {least_size} are recorded; nothing was written, check the storage below"
        )
    return size


def _refuse_data_behind(where: str, descriptor: int, size: int, start: int, head: bytes) -> None:
    last = max(start, size - MIB)
    _refuse_data(where, descriptor, start, min(start + MIB, size), head)
    _refuse_data(where, descriptor, last, size, head)
    step = (last - start) // _SAMPLES
    if step > 0:
        for index in range(_SAMPLES):
            at = (start + index * step) & ~0xFFFF
            _refuse_data(where, descriptor, max(at, start), min(max(at, start) + 0x10000, size), head)


def _refuse_data(where: str, descriptor: int, start: int, end: int, head: bytes) -> None:
    for at in range(start, end, _CHUNK):
        length = min(_CHUNK, end - at)
        if _read(where, descriptor, at, length) != _ZEROS[:length]:
            raise _foreign(where, head, "nothing but zeros")


def _foreign(where: str, head: bytes, expected: str) -> ForeignSignature:
    found = name_of(head)
    return ForeignSignature(
        f"{where} should hold {expected} and holds {f'a {found} signature' if found else 'other data'}; nothing was "
        f"written, check that this is the volume's device"
    )


def _read(where: str, descriptor: int, offset: int, length: int) -> bytes:
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
