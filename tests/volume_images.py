"""Images in a state directory, as `luks-csi image` leaves them there, for volumes to start from."""

import os
import random
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from csi_driver.host.files import Files
from csi_driver.images.base import MIB, ImageFormat
from csi_driver.images.checkpoint import Operation
from csi_driver.images.store import ImageRecord, ImageStore, Provenance
from csi_driver.model.volume import LuksIdentity
from tests.image_clones import PASSPHRASE, clone, encrypted

IMPORTED = Provenance(operation="import", source="/srv/debian-12.raw")
SECRET = {"CRYPTO_KEY_VALUE": PASSPHRASE.reveal().decode()}
"""What opens an encrypted image of these."""

DISK_BYTES: Final = 16 * MIB
BOOT: Final = (MIB, 8 * MIB)
DATA: Final = (9 * MIB + 512, 5 * MIB)
"""Start and length of the partitions of `make_disk`; the second one is not aligned."""
GREETING: Final = "an installer wrote this"
BOOT_FILE: Final = "grub.cfg"


@dataclass(frozen=True)
class Made:
    """The file of an image before it is in a store; `size` is what is inside, in bytes."""

    file: Path
    size: int
    luks: LuksIdentity | None = None


def make_file_system(path: Path, size: int = DISK_BYTES) -> Path:
    """An ext4 file system of `size` bytes that holds GREETING in BOOT_FILE."""
    folder = path.with_name(f"{path.name}.content")
    folder.mkdir()
    (folder / BOOT_FILE).write_text(GREETING)
    with path.open("wb") as file:
        file.truncate(size)
    command = ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1", "-d", str(folder), str(path)]
    subprocess.run(command, check=True, timeout=60)
    (folder / BOOT_FILE).unlink()
    folder.rmdir()
    return path


def make_disk(path: Path) -> Path:
    """A disk of DISK_BYTES as an installer leaves it: an MBR, a boot partition with a file system, one with noise."""
    make_file_system(path, BOOT[1])
    boot = path.read_bytes()
    entries = b"".join(
        struct.pack("<B3sB3sII", flag, bytes(3), 0x83, bytes(3), start // 512, length // 512)
        for flag, (start, length) in ((0x80, BOOT), (0, DATA))
    )
    with path.open("wb") as disk:
        disk.write(bytes(446) + entries.ljust(64, b"\0") + b"\x55\xaa")
        disk.seek(BOOT[0])
        disk.write(boot)
        disk.seek(DATA[0])
        disk.write(random.Random("noise").randbytes(DATA[1]))
        disk.truncate(DISK_BYTES)
    return path


def encrypted_image(source: Path, folder: Path, **chosen: object) -> Made:
    """An encrypted clone of a raw file; `chosen` as in LuksFormat."""
    result = clone(Operation.ENCRYPT, source, folder, encrypted(PASSPHRASE, **chosen))
    return Made(result.part, result.payload, result.luks)


def put_image(
    state: Path,
    name: str,
    made: Made,
    provenance: Provenance = IMPORTED,
    *,
    image_format: ImageFormat | None = None,
    secret: str | None = None,
    owner: str | None = None,
) -> ImageRecord:
    """What was made becomes the image `name` of the state directory `state`, as a link where that can be."""
    store = ImageStore(state / "images", Files())
    store.start()
    file = store.begin(name, owner) / "part"
    try:
        os.link(made.file, file)
    except OSError:
        subprocess.run(["cp", "--sparse=always", made.file, file], check=True, timeout=60)
    record = ImageRecord(
        name=name,
        format=image_format or (ImageFormat.LUKS2 if made.luks else ImageFormat.RAW),
        size=made.size,
        file_size=file.stat().st_size,
        luks=made.luks,
        secret=secret,
        owner=owner,
        created="2026-11-20T00:00:00+00:00",
        provenance=provenance,
    )
    store.finish(record, file)
    return record
