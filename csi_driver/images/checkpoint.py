"""What is durable of a clone in progress, so that a killed one goes on and a changed source is noticed.

One JSON file beside the part, replaced in one step (`Files.write`). It is written behind the bytes it speaks of:
header, checkpoint, chunks, fdatasync, checkpoint with more chunks. Digests are of the bytes as they lie in the target:
ciphertext where it is encrypted, as a digest of the plaintext would tell what an image holds.
"""

import contextlib
import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Final, Self

import msgspec

from csi_driver.host.files import Files, read_file
from csi_driver.host.syscalls import error_name
from csi_driver.images.base import ImageFormat
from csi_driver.luks.formats import LuksFormat
from csi_driver.model.errors import DeviceUnreadable, FailedPrecondition, NotFound
from csi_driver.model.reading import decode
from csi_driver.model.volume import LuksIdentity

VERSION: Final = 2
DIGEST_BYTES: Final = 32
"""SHA-256."""

_ALL_DIGESTS: Final = 1  # the version that knew no other checkpoints

_TICK_SECONDS = 0.02


class Operation(StrEnum):
    """What a clone does to the payload."""

    IGNORE = "ignore"
    ENCRYPT = "encrypt"
    DECRYPT = "decrypt"
    REENCRYPT = "reencrypt"

    @property
    def encrypts(self) -> bool:
        """Whether the result gets a key of its own."""
        return self in (Operation.ENCRYPT, Operation.REENCRYPT)

    @property
    def decrypts(self) -> bool:
        """Whether the source must be opened."""
        return self in (Operation.DECRYPT, Operation.REENCRYPT)


class SourceIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which file, in which state: a file of which all this stays the same has not been written (stat(2)).

    If it was fsynced before, that is: a page that is dirty already takes another write without a new time.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path, where: str) -> Self:
        """Look at `path`, links followed; `where` names the image. Raises NotFound, DeviceUnreadable.

        Times go by the kernel's tick. A file that was changed in the running tick could be changed once more without
        showing it, so such a file is looked at when the tick is over.
        """
        status = _status(path, where)
        if 0 <= time.time() - status.st_ctime < _TICK_SECONDS:
            time.sleep(_TICK_SECONDS)
            status = _status(path, where)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _status(path: Path, where: str) -> os.stat_result:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"the source {path} of {where} is not there; name another one") from None
    except OSError as error:
        raise DeviceUnreadable(
            f"the source {path} of {where} cannot be looked at ({error_name(error)}); name a file that can be read"
        ) from None


class Job(msgspec.Struct, frozen=True):
    """What is cloned. `where` names it in errors, as in "image debian-12".

    `identity` is that of the file `source`, taken before its reader was opened (`SourceIdentity.of`): so whatever
    happens to the file from then on is noticed. `source_format` is what it was opened as.
    """

    operation: Operation
    source: Path
    identity: SourceIdentity
    source_format: ImageFormat
    where: str


class SourceChanged(FailedPrecondition):
    """The source is not what it was when the job began."""


def check_source(job: Job) -> None:
    """Raise SourceChanged unless the source is the file that it was, unwritten."""
    with contextlib.suppress(NotFound):
        if SourceIdentity.of(job.source, job.where) == job.identity:
            return
    raise SourceChanged(
        f"the source {job.source} of {job.where} was changed or removed while it was read; its copy is removed, run it "
        f"again when nothing writes to the source"
    )


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that decides the target's bytes but its key. `payload` and `chunk` in bytes.

    `verify`: the digest of every chunk is kept, as the finished part is to be compared with them.
    """

    source: SourceIdentity
    source_format: ImageFormat
    operation: Operation
    payload: int
    chunk: int
    format: LuksFormat | None
    verify: bool = True

    def continues(self, found: Self) -> bool:
        """Whether a part of the plan `found` is one of this plan, too: it may have more digests than are needed."""
        return found == self or (found.verify and msgspec.structs.replace(found, verify=False) == self)


class Checkpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The leading `chunks` of `plan` are durable. `luks` is the part's header.

    `digests` are those of the last chunks of them, DIGEST_BYTES each: of all where the plan says `verify`.
    """

    version: int
    plan: Plan
    luks: LuksIdentity | None
    digests: bytes
    chunks: int = 0

    @property
    def first(self) -> int:
        """The first chunk with a digest."""
        return self.chunks - len(self.digests) // DIGEST_BYTES

    def digest(self, index: int) -> bytes:
        """The digest of one of them, from `first` on."""
        at = (index - self.first) * DIGEST_BYTES
        return self.digests[at : at + DIGEST_BYTES]


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`; None where there is none, or one that this version cannot read. Raises OSError."""
    try:
        found = decode(read_file(path), Checkpoint)
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeError):
        return None
    if found.version == _ALL_DIGESTS:
        found = msgspec.structs.replace(found, version=VERSION, chunks=len(found.digests) // DIGEST_BYTES)
    whole = found.version == VERSION and len(found.digests) % DIGEST_BYTES == 0 and found.first >= 0
    complete = found.first == 0 or not found.plan.verify
    return found if whole and complete else None


def store_checkpoint(files: Files, path: Path, checkpoint: Checkpoint) -> None:
    """Durable, in one step. Raises OSError."""
    files.write(path, msgspec.json.encode(checkpoint))
