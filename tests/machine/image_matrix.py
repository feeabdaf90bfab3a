"""`make images-matrix`: every choice of encryption on images of every format and odd size, opened by real cryptsetup.

All of cipher, key size, hash, PBKDF and sector size is tried with each other. Format and size of the source take turns
over that, so that each meets each value of the others; images of 10 GiB, nearly all holes, come last. A case is a
chain: encrypt the image, copy that as it is, decrypt the copy, reencrypt with another case's choice, decrypt that. Each
encrypted result is opened by cryptsetup and dm-crypt, each result is compared with the disk that the image was made of.

SEED and COUNT choose: COUNT of the cases, drawn with SEED; all by default.
"""

import itertools
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from csi_driver.images.base import MIB
from csi_driver.images.checkpoint import Operation
from csi_driver.images.library import ImageLibrary
from csi_driver.images.requests import Clone, Import
from csi_driver.images.target import Encryption
from csi_driver.keys.secret import SecretKey
from csi_driver.luks.formats import CIPHER_KEY_BITS, HASHES, PBKDFS, SECTOR_SIZES
from csi_driver.luks.image_header import padded
from csi_driver.model.secret import Passphrase
from tests.machine.image_lab import KINDS, converted, cryptsetup, make_disk, opened, size_of, unmetered, work_folder

SIZES: Final = (1, 511, 512, 4097, MIB - 1, MIB + 1)
HUGE: Final = 10 << 30
HUGE_KINDS: Final = ("raw", "qcow2-zstd", "vmdk-sparse", "vhdx")
_ORDER: Final = 3  # a seed with which every pair meets
_SAMPLES: Final = 256
_PIECE: Final = 4 * MIB
_OLD, _NEW = b"the passphrase of the image", b"another one"


@dataclass(frozen=True)
class Crypto:
    """A choice of encryption."""

    cipher: str
    key_bits: int
    hash: str
    pbkdf: str
    sector_size: int

    def key(self, passphrase: bytes) -> SecretKey:
        """A secret that wishes for it."""
        return SecretKey(Passphrase(passphrase), self.cipher, self.hash, str(self.key_bits), self.pbkdf)


@dataclass(frozen=True)
class Case:
    """An image of `kind` (image_lab.KINDS) of a disk of `size` bytes; encrypted, then reencrypted as `other` says."""

    kind: str
    size: int
    crypto: Crypto
    other: Crypto

    @property
    def payload(self) -> int:
        """Bytes that a VM sees: only a raw file can end within 512 bytes."""
        return self.size if self.kind == "raw" else padded(self.size, 512)

    def __str__(self) -> str:
        return f"{self.kind} of {self.size}, {self.crypto}"


class CheapLibrary(ImageLibrary):
    """Key slots at the least cost: that is no axis of the matrix, and thousands of real ones would take hours."""

    @staticmethod
    def _encryption(wanted: Clone) -> Encryption | None:
        chosen = ImageLibrary._encryption(wanted)  # noqa: SLF001 - a static method has no super()
        if chosen is None:
            return None
        if chosen.format.pbkdf == "pbkdf2":
            return replace(chosen, format=replace(chosen.format, iterations=1000))
        return replace(chosen, format=replace(chosen.format, iterations=4, memory_kib=32))


Build = Callable[[Path], ImageLibrary]


class Wrong(Exception):
    """What is not as it must be."""


@dataclass
class Result:
    """What came of all cases; each entry of `wrong` is a sentence."""

    cases: int = 0
    opened: int = 0
    compared: int = 0
    wrong: list[str] = field(default_factory=list)


class Lab:
    """A library in `folder`, the disks from which its images were made, and the cases tried on them."""

    def __init__(self, folder: Path, build: Build = CheapLibrary) -> None:
        self._folder = folder
        self._library = build(folder / "images")
        self.result = Result()

    def try_all(self, cases: Sequence[Case]) -> Result:
        """Try each; what is wrong is told on standard error as it comes."""
        for case in cases:
            if self.result.cases % 50 == 0:
                print(f"case {self.result.cases + 1} of {len(cases)}: {case}", file=sys.stderr, flush=True)
            self.result.cases += 1
            try:
                self._try(case)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told and the next case tried
                self.result.wrong.append(f"{case}: {type(error).__name__}: {error}")
                print(self.result.wrong[-1], file=sys.stderr, flush=True)
            for name in self._library.names():
                if "." not in name:
                    self._library.delete(name)
        return self.result

    def _try(self, case: Case) -> None:
        source, disk = self._source(case)
        old, new = case.crypto.key(_OLD), case.other.key(_NEW)
        clone, crypto, other = self._clone, case.crypto, case.other
        clone(Clone(source, "encrypted", Operation.ENCRYPT, None, old, sector_size=crypto.sector_size))
        self._check_encrypted("encrypted", _OLD, crypto, disk, case)
        if case.size == HUGE:
            clone(Clone("encrypted", "decrypted", Operation.DECRYPT, old))
            self._check_plain("decrypted", disk, case)
            return
        clone(Clone("encrypted", "copy"))
        self._compare(self._library.file("encrypted"), self._library.file("copy"), None)
        clone(Clone("copy", "decrypted", Operation.DECRYPT, old))
        self._check_plain("decrypted", disk, case)
        clone(Clone("encrypted", "other", Operation.REENCRYPT, old, new, sector_size=other.sector_size))
        self._check_encrypted("other", _NEW, other, disk, case)
        clone(Clone("other", "again", Operation.DECRYPT, new))
        self._check_plain("again", disk, case)

    def _source(self, case: Case) -> tuple[str, Path]:
        """The image that a case begins with, imported and copied once, and its disk."""
        name = f"{case.kind}.{case.size}"
        disk = self._folder / str(case.size)
        if not disk.exists():
            make_disk(disk, case.size, case.size)
        if name not in self._library.names():
            image = converted(disk, case.kind)
            self._library.import_(Import(name, str(image)), unmetered)
            if image != disk:
                image.unlink()
            self._clone(Clone(name, "plain"))
            self._compare(self._library.file(name), self._library.file("plain"), None)
        record = self._library.get(name)
        if (record.size, record.luks) != (case.payload, None):
            raise Wrong(f"the image is recorded with {record.size} bytes, encrypted: {record.luks is not None}")
        return name, disk

    def _clone(self, wanted: Clone) -> None:
        self._library.clone(wanted, unmetered)

    def _check_encrypted(self, name: str, passphrase: bytes, crypto: Crypto, disk: Path, case: Case) -> None:
        """By the header as cryptsetup reads it, and by what it opens."""
        file, record = self._library.file(name), self._library.get(name)
        if (found := _dumped(file)) != crypto:
            raise Wrong(f"{name} is encrypted as {found}, expected {crypto}")
        if record.size != case.payload or record.luks is None:
            raise Wrong(f"{name} is recorded with {record.size} bytes, expected {case.payload}, encrypted")
        with opened(file, passphrase) as mapping:
            self.result.opened += 1
            whole = padded(case.payload, crypto.sector_size)
            if size_of(mapping) != whole:
                raise Wrong(f"the mapping of {name} has {size_of(mapping)} bytes, expected {whole}")
            self._compare(disk, mapping, whole)

    def _check_plain(self, name: str, disk: Path, case: Case) -> None:
        file, record = self._library.file(name), self._library.get(name)
        if not (record.size == record.file_size == size_of(file) == case.payload) or record.luks:
            raise Wrong(f"{name} has {size_of(file)} bytes and is recorded with {record.size}, expected {case.payload}")
        self._compare(disk, file, case.payload)

    def _compare(self, disk: Path, other: Path, size: int | None) -> None:
        """That `other` begins with the disk and has zeros behind it, up to `size`; without it, that they are equal."""
        self.result.compared += 1
        if size is None:
            size = size_of(disk)
            if size_of(other) != size:
                raise Wrong(f"{other} has {size_of(other)} bytes, expected {size}")
        with disk.open("rb", buffering=0) as first, other.open("rb", buffering=0) as second:
            for at, length in _places(first.fileno(), second.fileno(), size):
                wanted, found = (os.pread(file.fileno(), length, at) for file in (first, second))
                if wanted.ljust(length, b"\0") != found:
                    raise Wrong(f"{other} is not what {disk.name} is between {at} and {at + length}")


def _places(first: int, second: int, size: int) -> Iterator[tuple[int, int]]:
    """What to compare: all that is not a hole in both; of a huge device the disk's data, and samples."""
    device = not os.path.isfile(f"/proc/self/fd/{second}")
    if device and size <= 1 << 30:
        extents = {(0, size)}
    elif device:
        draw = random.Random(size)
        extents = {*_data(first, size), (size - 4096, size)}
        extents |= {(at, at + 4096) for at in (draw.randrange(size // 4096) * 4096 for _ in range(_SAMPLES))}
    else:
        extents = {*_data(first, size), *_data(second, size)}
    for start, end in sorted(extents):
        for at in range(start, end, _PIECE):
            yield at, min(_PIECE, end - at)


def _data(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file holds data (lseek(2))."""
    end = 0
    with suppress(OSError):  # ENXIO: only a hole is left
        while end < size:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
            yield start, end


def _dumped(file: Path) -> Crypto:
    """How a file is encrypted, by the real cryptsetup."""
    dump: dict[str, Any] = msgspec.json.decode(cryptsetup("luksDump", "--dump-json-metadata", str(file)))
    segment, slot, digest = dump["segments"]["0"], dump["keyslots"]["0"], dump["digests"]["0"]
    hashes = {slot["af"]["hash"], digest["hash"], slot["kdf"].get("hash", slot["af"]["hash"])}
    return Crypto(
        segment["encryption"], slot["key_size"] * 8, "/".join(sorted(hashes)), slot["kdf"]["type"],
        segment["sector_size"],
    )  # fmt: skip


def all_cases() -> list[Case]:
    """Every choice of encryption once, and once as the one to reencrypt to, in a fixed mixture; then the huge ones."""
    draw = random.Random(_ORDER)
    cryptos = [
        Crypto(cipher, bits, *rest)
        for cipher, sizes in CIPHER_KEY_BITS.items()
        for bits in sizes
        for rest in itertools.product(HASHES, PBKDFS, SECTOR_SIZES)
    ]
    draw.shuffle(cryptos)
    # Reading what is not raw takes seconds for the start of qemu-nbd alone: each second case is raw.
    others = [kind for kind in KINDS if kind != "raw"]
    kinds = itertools.cycle(itertools.chain.from_iterable(("raw", kind) for kind in others))
    rounds = len(cryptos) // len(SIZES) + 1
    sizes = list(itertools.chain.from_iterable(draw.sample(SIZES, len(SIZES)) for _ in range(rounds)))
    cases = [
        Case(kind, size, crypto, cryptos[number - 1])
        for number, (crypto, kind, size) in enumerate(zip(cryptos, kinds, sizes, strict=False))
    ]
    huge = [Case(kind, HUGE, case.crypto, case.other) for kind, case in zip(HUGE_KINDS, cases, strict=False)]
    return cases + huge


def main() -> int:
    """Exit code 0 when every case was as it must be."""
    seed = int(os.environ.get("SEED") or time.time_ns() % 100_000)
    cases = all_cases()
    wanted = int(os.environ.get("COUNT") or 0)
    chosen = random.Random(seed).sample(cases, min(wanted, len(cases))) if wanted else cases
    started = time.monotonic()
    with work_folder("matrix-") as folder:
        result = Lab(folder).try_all(chosen)
    print(
        f"cases={result.cases} opened={result.opened} compared={result.compared} wrong={len(result.wrong)} "
        f"of={len(cases)} seconds={time.monotonic() - started:.0f} seed={seed}"
    )
    return int(bool(result.wrong))


if __name__ == "__main__":
    sys.exit(main())
