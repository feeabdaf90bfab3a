"""What a refusal tells to run is run here, on the very file that earns it, and what comes of it is taken.

Every command in the sentences of the corpus must be among those, so that no refusal sends anybody in a circle.
"""

import gzip
import lzma
import os
import re
import struct
import subprocess
import tarfile
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from csi_driver.images.base import MIB
from csi_driver.images.checkpoint import Operation
from csi_driver.images.library import ImageLibrary
from csi_driver.images.requests import Clone, Import
from csi_driver.keys.secret import read_secret
from csi_driver.model.errors import InvalidArgument
from tests import headers
from tests.image_builders import DISK, patched, qcow2, vhdx
from tests.image_corpus import HOSTILE, MOST_BYTES
from tests.machine.image_lab import PROGRAM, unmetered

PASSPHRASE = headers.PASSPHRASE
KEY = read_secret({"CRYPTO_KEY_VALUE": PASSPHRASE.decode()})
DEFLATE64 = 9
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as what is not raw is read by a locked-up qemu")


class Advised(NamedTuple):
    """A file that is refused. `answers` goes to the command; `disk` is what is in the file at last."""

    name: str
    make: Callable[[Path], Path]
    answers: bytes = b""
    disk: bytes | None = DISK


def run(*command: str | Path, stdin: bytes = b"") -> bytes:
    done = subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def raw_of(folder: Path) -> Path:
    path = folder / "disk.raw"
    path.write_bytes(DISK)
    return path


def converted(kind: str, *options: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / f"disk.{kind}"
        run("qemu-img", "convert", "-f", "raw", "-O", kind, *options, raw_of(folder), path)
        return path

    return make


def backed(folder: Path) -> Path:
    path = folder / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", raw_of(folder), path)
    return path


def encrypted_qcow2(method: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path, key = folder / "disk.qcow2", folder / "PASSPHRASE"
        key.write_bytes(PASSPHRASE)
        options = f"encrypt.format={method},encrypt.key-secret=key"
        command = [
            *("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "--object", f"secret,id=key,file={key}"),
            *("-o", options + (",encrypt.iter-time=50" if method == "luks" else ""), str(raw_of(folder)), str(path)),
        ]
        for _ in range(50):
            done = subprocess.run(command, capture_output=True, check=False, timeout=60)
            if done.returncode == 0:
                return path
            assert b"CPU usage" in done.stderr, done.stderr
        pytest.fail("qemu-img could not measure its CPU time in 50 tries")

    return make


def flat_vmdk(folder: Path) -> Path:
    return converted("vmdk", "-o", "subformat=monolithicFlat")(folder)


def sparse_part(folder: Path) -> Path:
    """A part of a vmdk; the sentence says that FILE is its descriptor, which gets the name that it had."""
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", raw_of(folder),
        folder / "disk.vmdk")  # fmt: skip
    (part,) = folder.glob("disk-s*.vmdk")
    return part


def vmdk_child(folder: Path) -> Path:
    base, path = converted("vmdk", "-o", "subformat=monolithicSparse")(folder), folder / "top.vmdk"
    run("qemu-img", "create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", base, path)
    return path


def logged_vhdx(folder: Path) -> Path:
    """As a crash of Hyper-V leaves it: its log holds one entry, zeros for the first 4 KiB of the disk."""
    content = bytearray(vhdx())
    log, at, sequence = uuid.UUID(int=77).bytes_le, MIB, 5
    entry = bytearray(4096)
    struct.pack_into("<4sIIIQII16sQQ", entry, 0, b"loge", 0, 4096, 0, sequence, 1, 0, log, len(content), len(content))
    struct.pack_into("<4sIQQQ", entry, 64, b"zero", 0, 4096, 4 * MIB, sequence)
    content[at : at + 4096] = with_crc(bytes(entry))
    for header in (64 * 1024, 128 * 1024):
        content[header + 48 : header + 64] = log
        content[header : header + 4096] = with_crc(bytes(content[header : header + 4096]))
    path = folder / "disk.vhdx"
    path.write_bytes(content)
    return path


def with_crc(area: bytes) -> bytes:
    from csi_driver.images.vhdx import crc32c

    return patched(area, (4, "<I", crc32c(patched(area, (4, "<I", 0)))))


def changed_qcow2(*fields: tuple[int, str, int]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "disk.qcow2"
        path.write_bytes(patched(qcow2(), *fields))
        return path

    return make


def luks2(*commands: tuple[str, ...], stdin: bytes = PASSPHRASE) -> Callable[[Path], Path]:
    """A LUKS2 file to which `commands` of cryptsetup were done."""

    def make(folder: Path) -> Path:
        path = folder / "disk.luks"
        headers.format_file(path, "--sector-size", "512", *headers.CHEAP_PBKDF2)
        for command in commands:
            run("cryptsetup", *(each.replace("FOLDER", str(folder)) for each in command), path, stdin=stdin)
        return path

    return make


def damaged_luks2(at: int, length: int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = luks2()(folder)
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes(length))
        return path

    return make


def packed(suffix: str, pack: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / f"disk.{suffix}"
        path.write_bytes(pack(DISK))
        return path

    return make


def tar_of_two(folder: Path) -> Path:
    path = folder / "disks.ova"
    with tarfile.open(path, "w") as archive:
        archive.add(raw_of(folder), "it's one.img")
        archive.add(raw_of(folder), "two.img")
    return path


def zip_of_two(folder: Path) -> Path:
    path = folder / "disks.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(raw_of(folder), "one.img")
        archive.write(raw_of(folder), "two.img")
    return path


def zip_of(method: int) -> Callable[[Path], Path]:
    """A zip of one member by a method that is not taken. Stored blocks are the same in Deflate and in Deflate64."""

    def make(folder: Path) -> Path:
        path = folder / "disk.zip"
        if method != DEFLATE64:
            with zipfile.ZipFile(path, "w", method) as archive:
                archive.write(raw_of(folder), "one.img")
            return path
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=0) as archive:
            archive.write(raw_of(folder), "my one.img")
        content = path.read_bytes()
        path.write_bytes(patched(content, (8, "<H", method), (content.rindex(b"PK\1\2") + 10, "<H", method)))
        return path

    return make


def by_program(*command: str) -> Callable[[bytes], bytes]:
    return lambda content: run(*command, stdin=content)


CASES = [
    Advised("qcow2 with a backing file", backed),
    Advised("qcow of version 1", converted("qcow")),
    Advised("qcow2 not closed", changed_qcow2((72, ">Q", 1))),
    Advised("qcow2 marked corrupt", changed_qcow2((72, ">Q", 2))),
    Advised("qcow2 encrypted with LUKS", encrypted_qcow2("luks")),
    Advised("qcow2 encrypted with AES", encrypted_qcow2("aes")),
    Advised("qed", converted("qed")),
    Advised("Parallels", converted("parallels")),
    Advised("vmdk in two files", flat_vmdk),
    Advised("a part of a vmdk", sparse_part),
    Advised("vmdk with a parent", vmdk_child),
    Advised("vhdx with a log", logged_vhdx, disk=bytes(4096) + DISK[4096:]),
    Advised("LUKS2 with a damaged copy", damaged_luks2(16384, 512), disk=None),
    Advised("LUKS2 with its first header wiped", damaged_luks2(0, 4096), disk=None),
    Advised(
        "LUKS2 half reencrypted",
        luks2(("reencrypt", "-q", "--init-only", "--key-file", "-", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations",
               "1000", "--force-offline-reencrypt")),
        PASSPHRASE, None,
    ),
    Advised(
        "LUKS2 with an unbound key slot",
        luks2(("luksAddKey", "-q", "--unbound", "--key-size", "256", *headers.CHEAP_PBKDF2, "--new-keyfile", "-"),
              stdin=b"another"),
        PASSPHRASE, None,
    ),
    Advised("LUKS2 with a key slot that is not in use", luks2(("config", "--key-slot", "0", "--priority", "ignore")),
            disk=None),
    Advised("bzip2", packed("bz2", by_program("bzip2", "-c"))),
    Advised("lz4", packed("lz4", by_program("lz4", "-c"))),
    Advised("lzma alone", packed("lzma", lambda content: lzma.compress(content, lzma.FORMAT_ALONE))),
    Advised("a tar with two disks", tar_of_two),
    Advised("a zip with two disks", zip_of_two),
    Advised("a zip by Deflate64", zip_of(DEFLATE64)),
    Advised("a zip by bzip2", zip_of(zipfile.ZIP_BZIP2)),
    Advised("a zip by LZMA", zip_of(zipfile.ZIP_LZMA)),
]  # fmt: skip


def refused(library: ImageLibrary, path: Path) -> str:
    with pytest.raises(InvalidArgument, match="is refused: ") as caught:
        library.import_(Import("disk", str(path)), unmetered)
    return str(caught.value)


def command_in(sentence: str) -> str:
    found = re.findall(r"`([^`]+)`", sentence)
    assert len(found) == 1, sentence
    return str(found[0])


@pytest.mark.parametrize("advised", CASES, ids=lambda advised: advised.name)
def test_what_a_refusal_tells_to_run_helps(advised: Advised, tmp_path: Path) -> None:
    library = ImageLibrary(tmp_path / "state" / "images")
    path = advised.make(tmp_path)
    command = command_in(refused(library, path))
    if advised.make is sparse_part:
        path = tmp_path / "disk.vmdk"
    new = tmp_path / "new"
    words = {"FILE": path, "NEW": new, "FOLDER": new, "PASSPHRASE": tmp_path / "PASSPHRASE", "NAME": "disk"}
    line = re.sub(r"\b(FILE|NEW|FOLDER|PASSPHRASE|NAME)\b", lambda found: str(words[found[1]]), command)
    line = line.replace("luks-csi image", " ".join(PROGRAM))
    environment = {**os.environ, "LUKS_CSI_STATE_DIR": str(tmp_path / "state")}
    done = subprocess.run(
        ["bash", "-ec", f"set -o pipefail; {line}"], input=advised.answers, capture_output=True, check=False,
        timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, (line, done.stderr)
    if "luks-csi" not in command:
        made = path if not new.exists() else new / "one.img" if new.is_dir() else new
        library.import_(Import("disk", str(made)), unmetered)
    check(library, advised.disk)


def check(library: ImageLibrary, disk: bytes | None) -> None:
    """The image is there, opens where it is encrypted, and holds what it must."""
    record = library.get("disk")
    if record.luks:
        library.clone(Clone("disk", "open", Operation.DECRYPT, KEY), unmetered)
        return
    assert disk is not None
    if record.format == "raw":
        assert library.file("disk").read_bytes()[: len(disk)] == disk
        return
    library.clone(Clone("disk", "safe", Operation.ENCRYPT, None, KEY), unmetered)
    library.clone(Clone("safe", "open", Operation.DECRYPT, KEY), unmetered)
    assert library.file("open").read_bytes()[: len(disk)] == disk


def test_every_command_that_the_corpus_is_told_is_run_above_and_in_the_docs(tmp_path: Path) -> None:
    def shape(command: str) -> str:
        return re.sub(r"\d+", "N", command)

    library = ImageLibrary(tmp_path / "state" / "images")
    told = set()
    for number, hostile in enumerate(HOSTILE):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = hostile.make(folder)
        if hostile.name.endswith(" in gzip"):
            path.write_bytes(gzip.compress(path.read_bytes()))
        with pytest.raises(InvalidArgument) as caught:
            library.import_(Import("disk", str(path), most_bytes=MOST_BYTES), unmetered)
        told |= {shape(command) for command in re.findall(r"`([^`]+)`", str(caught.value))}
    ran = set()
    for number, advised in enumerate(CASES):
        folder = tmp_path / f"advised-{number}"
        folder.mkdir()
        ran.add(shape(command_in(refused(library, advised.make(folder)))))
    assert told <= ran
    docs = (Path(__file__).parents[2] / "docs/images.md").read_text()
    written = re.findall(r"`([^`]+)`", docs.partition("| refused | advised |")[2].partition("\n\n")[0])
    patterns = [re.escape(shape(command.replace("\\|", "|"))).replace("…", ".+") for command in written]
    assert [command for command in sorted(ran) if not any(re.fullmatch(each, command) for each in patterns)] == []
    assert [each for each in patterns if not any(re.fullmatch(each, command) for command in ran)] == []
