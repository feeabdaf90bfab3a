"""What `make fuzz` feeds: a target per header parser of the image engine, and the bytes that it begins with.

A fuzzer changes a few hundred bytes well and megabytes badly. So what it gives is laid over the metadata of a whole
file, and checksums are made right behind it: else nothing would get past them.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from csi_driver.images.formats import Wrapping, detect_wrapping, inspect
from csi_driver.images.unwrap import unwrap
from csi_driver.luks.header_rules import Limits
from csi_driver.luks.image_header import read_image_header
from csi_driver.model.errors import FailedPrecondition, InvalidArgument
from tests import headers
from tests.image_builders import (
    BLOCK_TABLE,
    DISK,
    FIRST_DATA,
    HEADERS,
    ITEMS,
    METADATA,
    MIB,
    REGIONS,
    checksummed,
    luks1,
    patched,
    qcow2,
    vdi,
    vhd,
    vhd_checksummed,
    vhd_fixed,
    vhdx,
    vmdk,
    vmdk_stream,
)
from tests.unit.test_image_archive import TAKEN
from tests.unit.test_image_unwrap import PACK

MOST_BYTES = 8 * MIB
Mend = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Target:
    """A parser: `run` takes any bytes and raises only if something is wrong with it; `seeds` are what lets it in."""

    name: str
    run: Callable[[bytes], object]
    seeds: Sequence[bytes]


def inspected(content: bytes) -> None:
    """A file with that content is taken or refused, and if it is LUKS, so is its header when it is to be opened."""
    descriptor = os.memfd_create("image")
    try:
        _write(descriptor, content)
        found = None
        with suppress(InvalidArgument):
            found = inspect(descriptor, "image fuzz", MOST_BYTES)
        if found is None:
            return
        assert 0 < found.virtual_size <= MOST_BYTES
        assert 0 < found.length <= len(content)
        if found.luks:
            with suppress(FailedPrecondition):
                read_image_header("image fuzz", lambda at, length: os.pread(descriptor, length, at), found.length, ANY)
    finally:
        os.close(descriptor)


ANY = Limits(iterations=1 << 32, keyslots=32)


def unpacked(wrapping: Wrapping, content: bytes) -> None:
    """A packed file gives an image within the limit, or is refused and leaves nothing."""
    if wrapping in (Wrapping.ZIP, Wrapping.TAR) and detect_wrapping(content[:512]) is not wrapping:
        return
    path = Path(_folder(), "image")
    descriptor = os.memfd_create("packed")
    try:
        _write(descriptor, content)
        with suppress(InvalidArgument):
            size = unwrap(descriptor, wrapping, path, MIB, "image fuzz", lambda _: None)
            assert 0 < size == path.stat().st_size <= MIB
            path.unlink()
        assert os.listdir(path.parent) == []
    finally:
        os.close(descriptor)


@cache
def _folder() -> str:
    """A folder in memory, where there is one; it goes with the process."""
    folder = tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    atexit.register(shutil.rmtree, folder)
    return folder


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _laid(name: str, whole: bytes, spans: Sequence[tuple[int, int]], mend: Mend = bytes) -> Target:
    """What is given is laid over `spans` (offset, length) of a whole file, one behind the other."""

    def run(data: bytes) -> None:
        content = bytearray(whole)
        for at, length in spans:
            piece, data = data[:length], data[length:]
            content[at : at + len(piece)] = piece
        inspected(mend(bytes(content)))

    return Target(name, run, [b"".join(whole[at : at + length] for at, length in spans)])


def _vhd_mended(content: bytes) -> bytes:
    footer, dynamic = vhd_checksummed(content[:512], 64), vhd_checksummed(content[512:1536], 36)
    return footer + dynamic + content[1536:]


def _vhd_fixed_mended(content: bytes) -> bytes:
    return content[:-512] + vhd_checksummed(content[-512:], 64)


def _luks2_json(data: bytes) -> None:
    room = headers.HDR_SIZE - headers.BINARY_SIZE - 1
    area = headers.with_json(headers.formatted()[: 64 * 1024], data[:room])
    inspected(area.ljust(headers.DEVICE_SIZE, b"\0"))


def _luks2_binary(data: bytes) -> None:
    area = bytearray(headers.formatted()[: 64 * 1024])
    for at in (0, headers.HDR_SIZE):
        piece, data = data[:512], data[512:]
        area[at : at + len(piece)] = piece
    content = bytes(area)
    for at in (0, headers.HDR_SIZE):
        if content[at + 72 : at + 104] == b"sha256".ljust(32, b"\0"):
            content = headers.checksummed(content, at)
    inspected(content.ljust(headers.DEVICE_SIZE, b"\0"))


def _luks1(data: bytes) -> None:
    inspected(patched(luks1(), (0, f"{len(data[:1024])}s", data[:1024])).ljust(2 * MIB, b"\0"))


def targets() -> dict[str, Target]:
    """Every target by name."""
    stream = vmdk_stream()
    seed = headers.formatted()
    text = seed[headers.BINARY_SIZE : headers.HDR_SIZE].rstrip(b"\0")
    found = [
        _laid("qcow2", qcow2(), [(0, 512), (4096, 64), (3 * 4096, 64), (4 * 4096, FIRST_DATA - 4 * 4096)]),
        _laid("vmdk", vmdk(), [(0, 1024), (21 * 512, 512), (22 * 512, 64)]),
        _laid("vmdk-stream", stream, [(0, 1024), (len(stream) - 10 * 512, 10 * 512)]),
        _laid(
            "vhdx", vhdx()[: 4 * MIB + len(DISK)],
            [(HEADERS[0], 80), (HEADERS[1], 80), (REGIONS, 112), (METADATA, 256), (ITEMS, 64), (BLOCK_TABLE, 64)],
            checksummed,
        ),
        _laid("vhd", vhd(), [(0, 96), (512, 96), (1536, 64)], _vhd_mended),
        _laid("vhd-fixed", vhd_fixed(), [(len(DISK), 96), (0, 64)], _vhd_fixed_mended),
        _laid("vdi", vdi(), [(0, 456), (512, 64)]),
        Target("luks1", _luks1, [luks1()[:592]]),
        Target("luks2-json", _luks2_json, [text]),
        Target("luks2-binary", _luks2_binary, [seed[:512] + seed[headers.HDR_SIZE : headers.HDR_SIZE + 512]]),
        Target("any", inspected, [DISK[:1024], b'{"errors":[]}', b"QFI\xfb", b"conectix" + bytes(504)]),
    ]  # fmt: skip
    for wrapping in Wrapping:
        seeds = [content for name, content in TAKEN.items() if name.startswith(wrapping)]
        small = [PACK[wrapping](DISK[-4096:])] if wrapping in PACK else seeds
        found.append(Target(wrapping, lambda data, wrapping=wrapping: unpacked(wrapping, data), small))  # type: ignore[misc]
    return {target.name: target for target in found}


if __name__ == "__main__":
    print("\n".join(targets()))
