"""Checksums of image files."""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from csi_driver.images.base import MIB, Progress
from csi_driver.model.errors import InvalidArgument

_CHECKSUM: Final = re.compile(r"(?:(sha256|sha512):)?([0-9a-f]{64}|[0-9a-f]{128})")


class Algorithm(StrEnum):
    """Digests that a checksum can be."""

    SHA256 = "sha256"
    SHA512 = "sha512"


@dataclass(frozen=True)
class Checksum:
    """A digest of a file's bytes as they are stored or downloaded, wrapping included; lower-case hexadecimal."""

    algorithm: Algorithm
    digest: str

    @classmethod
    def parse(cls, text: str) -> "Checksum":
        """Read `sha256:…`, `sha512:…`, or bare digits: 128 are SHA-512, as Longhorn writes it, 64 are SHA-256.

        Raises InvalidArgument.
        """
        found = _CHECKSUM.fullmatch(text.strip().lower())
        if found:
            by_length = Algorithm.SHA256 if len(found[2]) == 64 else Algorithm.SHA512
            if found[1] in (None, by_length):
                return cls(by_length, found[2])
        raise InvalidArgument(
            f"a checksum of {len(text.strip())} characters is not one that is understood; expected 128 hexadecimal "
            f"digits of SHA-512 or 64 of SHA-256, alone or after sha512: or sha256:"
        )

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.digest}"

    def require(self, found: "Checksum", where: str) -> None:
        """Raise InvalidArgument unless `found`, the checksum of `where`, is this one."""
        if found != self:
            raise InvalidArgument(
                f"{where} has the checksum {found}, expected {self}; it is damaged or another image: correct the "
                f"checksum or the source"
            )


def checksum_of(descriptor: int, algorithm: Algorithm, progress: Progress = lambda _: None) -> Checksum:
    """The checksum of an open file, whole, read from its begin. Raises OSError."""
    digest = hashlib.new(algorithm)
    for done in hashed(descriptor, digest, os.fstat(descriptor).st_size):
        progress(done)
    return Checksum(algorithm, digest.hexdigest())


def hashed(descriptor: int, digest: "hashlib._Hash", size: int) -> Iterator[int]:
    """Feed the first `size` bytes of a file to `digest`; how many are done, piece by piece."""
    done = 0
    while piece := os.pread(descriptor, min(MIB, size - done), done):
        digest.update(piece)
        done += len(piece)
        yield done
