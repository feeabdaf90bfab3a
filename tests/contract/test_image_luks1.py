"""LUKS version 1 of cryptsetup and of QEMU as the source of clones, and LUKS2 that cryptsetup made of it."""

import os
import random
import re
import subprocess
from pathlib import Path

import pytest

from csi_driver.images.base import MIB, ImageFormat
from csi_driver.images.checkpoint import Operation
from csi_driver.images.library import ImageLibrary
from csi_driver.images.requests import Clone, Import
from csi_driver.keys.secret import read_secret
from csi_driver.luks.image_header import padded
from csi_driver.model.errors import Unauthenticated
from tests.cli import run_cli
from tests.headers import run_cryptsetup
from tests.image_clones import PASSPHRASE, make_source
from tests.machine.image_lab import unmetered

SIZE = 2 * MIB
KEY = read_secret({"CRYPTO_KEY_VALUE": PASSPHRASE.reveal().decode()})
OTHER = read_secret({"CRYPTO_KEY_VALUE": "another one", "CRYPTO_PBKDF": "pbkdf2"})


@pytest.fixture
def library(tmp_path: Path) -> ImageLibrary:
    return ImageLibrary(tmp_path / "state" / "images")


def of_cryptsetup(folder: Path, *options: str) -> tuple[Path, Path]:
    """A LUKS1 file, and what is in it: of a copy, which is made LUKS2 and decrypted, as that needs no device-mapper."""
    image, copy = folder / "luks1", folder / "content"
    draw = random.Random(1)
    image.write_bytes(draw.randbytes(2 * MIB) + draw.randbytes(SIZE))
    run_cryptsetup(
        *("luksFormat", "-q", "--type", "luks1", "--offset", "4096", "--key-file", "-"),
        *("--pbkdf-force-iterations", "1000", *options, str(image)),
        key=PASSPHRASE.reveal(),
    )
    copy.write_bytes(image.read_bytes())
    run_cryptsetup("convert", "-q", "--type", "luks2", str(copy))
    run_cryptsetup(
        *("reencrypt", "--decrypt", "-q", "--force-offline-reencrypt", "--header", str(folder / "header")),
        *("--key-file", "-", str(copy)),
        key=PASSPHRASE.reveal(),
    )
    os.truncate(copy, SIZE)
    return image, copy


def of_qemu(folder: Path, source: Path, options: str = "") -> Path:
    """The same by qemu-img, which now and then finds no CPU time to measure and is asked again."""
    image = folder / "luks1"
    secret = folder / "passphrase"
    secret.write_bytes(PASSPHRASE.reveal())
    command = [
        *("qemu-img", "convert", "-O", "luks", "--object", f"secret,id=key,file={secret}"),
        *("-o", f"key-secret=key,iter-time=50{options}", str(source), str(image)),
    ]
    for _ in range(50):
        done = subprocess.run(command, capture_output=True, check=False, timeout=60)
        if done.returncode == 0:
            return image
        assert b"CPU usage" in done.stderr
    pytest.fail("qemu-img could not measure its CPU time in 50 tries")


def check(library: ImageLibrary, image: Path, source: Path) -> None:
    """Imported as LUKS1, decrypted and reencrypted, it gives what is in `source`."""
    record = library.import_(Import("old", str(image), secret="vms/key"), unmetered)
    assert (record.format, record.luks is not None, record.secret) == (ImageFormat.LUKS1, True, "vms/key")
    told = run_cli("image", "inspect", record.name, "--state-dir", library.file(record.name).parents[3]).stdout
    assert re.search(r"^encryption +LUKS1 [0-9a-f]{8}-", told, re.MULTILINE), told
    assert library.file("old").read_bytes() == image.read_bytes()
    assert [slot.kdf for slot in library.header("old").keyslots.values()]
    library.clone(Clone("old", "plain", Operation.DECRYPT, KEY), unmetered)
    library.clone(Clone("old", "new", Operation.REENCRYPT, KEY, OTHER), unmetered)
    assert library.get("new").format is ImageFormat.LUKS2
    library.clone(Clone("new", "again", Operation.DECRYPT, OTHER), unmetered)
    wanted = source.read_bytes()
    for name in ("plain", "again"):
        found = library.file(name).read_bytes()
        assert found[: len(wanted)] == wanted
        assert len(found) == record.size
    copy = library.clone(Clone("old", "copy"), unmetered)
    assert (copy.format, library.file("copy").read_bytes()) == (ImageFormat.LUKS1, image.read_bytes())
    with pytest.raises(Unauthenticated, match="opens no key slot of image old"):
        library.clone(Clone("old", "wrong", Operation.DECRYPT, OTHER), unmetered)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--cipher", "aes-cbc-essiv:sha256", "--key-size", "256", "--hash", "sha1"),
        ("--cipher", "aes-cbc-plain64", "--key-size", "128", "--hash", "sha512"),
        ("--cipher", "aes-xts-plain", "--key-size", "256", "--hash", "sha384"),
    ],
    ids=" ".join,
)
def test_luks1_of_cryptsetup_is_read(library: ImageLibrary, tmp_path: Path, options: tuple[str, ...]) -> None:
    check(library, *of_cryptsetup(tmp_path, *options))


@pytest.mark.parametrize(
    "options", ["", ",cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha512"]
)
def test_luks1_of_qemu_is_read(library: ImageLibrary, tmp_path: Path, options: str) -> None:
    source = make_source(tmp_path / "source.raw", SIZE)
    check(library, of_qemu(tmp_path, source, options), source)


def test_luks2_that_was_converted_from_luks1_is_read(library: ImageLibrary, tmp_path: Path) -> None:
    """Its digest keeps the 20 bytes of LUKS1."""
    image, source = of_cryptsetup(tmp_path, "--hash", "sha1")
    run_cryptsetup("convert", "-q", "--type", "luks2", str(image))
    record = library.import_(Import("old", str(image)), unmetered)
    assert record.luks is not None
    assert (record.format, len(record.luks.digest or "")) == (ImageFormat.LUKS2, 40)
    library.clone(Clone("old", "plain", Operation.DECRYPT, KEY), unmetered)
    assert library.file("plain").read_bytes()[:SIZE] == source.read_bytes()
    assert library.get("plain").size == padded(record.size, 512)
