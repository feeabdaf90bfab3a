"""The bulk ciphers against the kernel's dm-crypt and the real cryptsetup: the same bytes, both ways."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.host.devicemapper import DeviceMapper, Target
from csi_driver.host.loop import LoopDevices
from csi_driver.luks.bulk import sector_cipher
from tests.bulk_cases import CASES, DATA, DIGESTS, FIRST, WAYS, Case, digest, done
from tests.headers import CHEAP_PBKDF2, DATA_OFFSET, PASSPHRASE, format_file

NAME = "luks-test-bulk"
OTHER = bytes(reversed(DATA))


def write(path: Path, offset: int, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(descriptor, data, offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), len(DATA), offset)


@contextmanager
def crypt_target(path: Path, case: Case) -> Iterator[Path]:
    """The file as the data device of a bare dm-crypt mapping whose numbers begin at FIRST."""
    mapper = DeviceMapper()
    with LoopDevices().attach(str(path), autoclear=True) as loop:
        options = f" 1 sector_size:{case.sector_size}" if case.sector_size > 512 else ""
        parameters = f"{case.cipher} {case.key.hex()} {FIRST} {loop.major}:{loop.minor} 0{options}"
        device = mapper.create(NAME, "", [Target(0, len(DATA) // 512, "crypt", parameters)])
        try:
            yield Path(device.path)
        finally:
            mapper.remove(NAME)


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dm_crypt_reads_what_was_encrypted_and_what_it_writes_is_decrypted(
    folder: Path, case: Case, *, compiled: bool
) -> None:
    cipher = sector_cipher(case.cipher, case.key, case.sector_size, compiled=compiled)
    disk = folder / "disk.img"
    write(disk, 0, done(cipher.encrypt, FIRST, DATA))
    with crypt_target(disk, case) as mapping:
        assert read(mapping, 0) == DATA
        write(mapping, 0, OTHER)
    assert done(cipher.decrypt, FIRST, read(disk, 0)) == OTHER
    with crypt_target(disk, case) as mapping:
        write(mapping, 0, DATA)
    assert digest(read(disk, 0)) == DIGESTS[str(case)]


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """The mapping that the real cryptsetup makes of a LUKS2 file."""
    environment = {**os.environ, "DM_DISABLE_UDEV": "1"}
    command = ["cryptsetup", "open", "--key-file", "-", str(path), NAME]
    subprocess.run(command, input=PASSPHRASE, check=True, timeout=120, env=environment)
    try:
        yield Path("/dev/mapper", NAME)
    finally:
        subprocess.run(["cryptsetup", "close", NAME], check=True, timeout=120, env=environment)


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize(
    "case",
    [
        Case("aes-xts-plain64", 512, 512),
        Case("aes-xts-plain64", 512, 4096),
        Case("aes-cbc-essiv:sha256", 256, 512),
        Case("aes-cbc-essiv:sha256", 256, 4096),
    ],
    ids=str,
)
def test_cryptsetup_opens_what_was_encrypted_and_what_is_written_there_is_decrypted(
    folder: Path, case: Case, *, compiled: bool
) -> None:
    disk, key = folder / "disk.img", folder / "key"
    format_file(
        disk,
        *("--cipher", case.cipher, "--key-size", str(case.key_bits), "--sector-size", str(case.sector_size)),
        *CHEAP_PBKDF2,
    )
    dump = ["cryptsetup", "luksDump", "-q", "--dump-volume-key", "--volume-key-file", str(key), "--key-file", "-"]
    subprocess.run([*dump, str(disk)], input=PASSPHRASE, check=True, timeout=120, stdout=subprocess.DEVNULL)
    cipher = sector_cipher(case.cipher, key.read_bytes(), case.sector_size, compiled=compiled)
    half = len(DATA) // 2 // 4096 * 4096
    write(disk, DATA_OFFSET, done(cipher.encrypt, 0, DATA[:half]))
    write(disk, DATA_OFFSET + half, done(cipher.encrypt, half // 512, DATA[half:]))
    with opened(disk) as mapping:
        assert read(mapping, 0) == DATA
        write(mapping, 0, OTHER)
    assert done(cipher.decrypt, 0, read(disk, DATA_OFFSET)) == OTHER
