"""Real LUKS2 headers, and forged ones whose checksums are right.

`formatted` runs the real `cryptsetup luksFormat` on a sparse file; `forged` changes the metadata of what it made as
somebody with write access to the storage would.
"""

import hashlib
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

UUID = "6f1c2b1e-0a55-4c3e-9d3c-5a3c8b0f7d21"
OTHER_UUID = "b3a1f6d0-1111-4222-8333-444455556666"
PASSPHRASE = b"correct horse battery staple"
WHERE = "volume pvc-1 on /dev/loop3"
DATA_OFFSET = 16 << 20
DEVICE_SIZE = 17 << 20
HDR_SIZE = 16384
BINARY_SIZE = 4096
CHEAP_PBKDF2 = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")

Metadata = dict[str, Any]
Change = Callable[[Metadata], object]

# field: offset and struct format (LUKS2 On-Disk Format Specification, section 2.1)
FIELDS = {
    "magic": (0, "6s"),
    "version": (6, ">H"),
    "hdr_size": (8, ">Q"),
    "seqid": (16, ">Q"),
    "label": (24, "48s"),
    "checksum_alg": (72, "32s"),
    "salt": (104, "64s"),
    "uuid": (168, "40s"),
    "subsystem": (208, "48s"),
    "hdr_offset": (256, ">Q"),
    "csum": (448, "64s"),
}


def format_file(path: Path, *options: str, uuid: str = UUID, size: int = DEVICE_SIZE) -> None:
    """Make `path` a sparse file of `size` bytes with LUKS2, data offset 16 MiB, opened by PASSPHRASE."""
    with path.open("wb") as file:
        file.truncate(size)
    run_cryptsetup(
        *("luksFormat", "-q", "--type", "luks2", "--offset", str(DATA_OFFSET // 512), "--uuid", uuid),
        *("--key-file", "-", *options, str(path)),
        key=PASSPHRASE,
    )


def write_sparse(path: Path, area: bytes) -> None:
    """Make `path` a device of DEVICE_SIZE that begins with `area`."""
    path.write_bytes(area)
    os.truncate(path, DEVICE_SIZE)


def head_of(path: Path) -> bytes:
    """The first 128 KiB at `path`: both copies of any header that these tests make."""
    with path.open("rb") as file:
        return file.read(128 << 10)


def run_cryptsetup(*arguments: str, key: bytes = b"") -> bytes:
    """Output of the real cryptsetup; `key` goes in on stdin."""
    done = subprocess.run(["cryptsetup", *arguments], input=key, capture_output=True, check=False, timeout=120)
    if done.returncode:
        raise AssertionError(f"cryptsetup {arguments}: exit {done.returncode}, {done.stderr.decode()}")
    return done.stdout


def accepts(area: bytes, *, key: bytes = PASSPHRASE) -> bool:
    """Whether the real cryptsetup loads the header in `area` (all before the data) and `key` opens a slot."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "disk.img")
        write_sparse(path, area)
        arguments = ["cryptsetup", "open", "--test-passphrase", "--key-file", "-", str(path)]
        return subprocess.run(arguments, input=key, capture_output=True, check=False, timeout=120).returncode == 0


@cache
def formatted(*options: str, uuid: str = UUID) -> bytes:
    """The 16 MiB before the data of a device formatted with `options`; made once in a process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "disk.img")
        format_file(path, *(options or ("--sector-size", "512", "--key-size", "512", *CHEAP_PBKDF2)), uuid=uuid)
        with path.open("rb") as file:
            return file.read(DATA_OFFSET)


def metadata_of(area: bytes, offset: int = 0) -> Metadata:
    """The JSON metadata of the copy at `offset`."""
    text = area[offset + BINARY_SIZE : offset + HDR_SIZE].rstrip(b"\0")
    decoded: Metadata = msgspec.json.decode(text)
    return decoded


def forged(area: bytes, change: Change) -> bytes:
    """`area` with `change` done to the metadata in both copies, checksums right again."""
    metadata = metadata_of(area)
    change(metadata)
    return with_json(area, msgspec.json.encode(metadata))


def with_json(area: bytes, text: bytes, places: tuple[int, ...] = (0, HDR_SIZE)) -> bytes:
    """`area` with `text` as the JSON area of the copies at `places`, checksums right again."""
    for offset in places:
        start, end = offset + BINARY_SIZE, offset + HDR_SIZE
        area = checksummed(area[:start] + text.ljust(end - start, b"\0") + area[end:], offset)
    return area


def with_field(area: bytes, field: str, value: bytes | int, offset: int = 0) -> bytes:
    """`area` with one field of the binary header at `offset` set; its checksum is left as it was."""
    at, form = FIELDS[field]
    changed = bytearray(area)
    struct.pack_into(form, changed, offset + at, value)
    return bytes(changed)


def checksummed(area: bytes, offset: int, size: int = HDR_SIZE) -> bytes:
    """`area` with the checksum of the copy at `offset` right again, by the algorithm that the copy names."""
    at, form = FIELDS["checksum_alg"]
    (name,) = struct.unpack_from(form, area, offset + at)
    blanked = with_field(area, "csum", bytes(64), offset)
    digest = hashlib.new(name.rstrip(b"\0").decode(), blanked[offset : offset + size]).digest()
    return with_field(area, "csum", digest, offset)
