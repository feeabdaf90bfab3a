"""What is asked of the image library, and what of it is refused before any work."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, Final

from csi_driver.images.checkpoint import Operation
from csi_driver.images.checksum import Checksum
from csi_driver.images.store import ImageRecord
from csi_driver.keys.secret import CEPH_PASSPHRASE, LONGHORN_VALUE, SecretKey
from csi_driver.luks.choice import luks_format
from csi_driver.luks.formats import LuksFormat
from csi_driver.model.errors import FailedPrecondition, InvalidArgument
from csi_driver.model.secret import Passphrase
from csi_driver.model.volume import VolumeParameters

MOST_BYTES: Final = 1 << 40
"""Bytes that an image may have, unless the caller says otherwise."""

_SECRET_NAME: Final = re.compile(r"[a-z0-9][-a-z0-9]{0,62}/[a-z0-9][-a-z0-9.]{0,252}")


@dataclass(frozen=True)
class Import:
    """`source` is a path or an http(s) URL; `checksum` is of the file as it lies there, wrapping included.

    `secret` (namespace/name) may be told for an image that is encrypted already. `stream` is read in the place of a
    source. `headers` are sent to the server of the URL, and may be credentials, as a signed URL is one. `take` moves
    the file of a local source in, where it is neither unpacked nor cut, instead of copying it. `owner` is the uid of
    the Image object that the image is for.
    """

    name: str
    source: str = field(repr=False)
    checksum: Checksum | None = None
    secret: str | None = None
    most_bytes: int = MOST_BYTES
    stream: BinaryIO | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    take: bool = False
    owner: str | None = None


@dataclass(frozen=True)
class Clone:
    """`key` opens an encrypted source, `new_key` is for an encrypted result, as is `sector_size` in bytes (512).

    `owner` as in Import; `source_owner` is the one that the source must be of, where that is told.
    """

    source: str
    name: str
    operation: Operation = Operation.IGNORE
    key: SecretKey | None = None
    new_key: SecretKey | None = None
    secret: str | None = None
    sector_size: int | None = None
    verify: bool = False
    owner: str | None = None
    source_owner: str | None = None


def chosen_format(wanted: Clone) -> LuksFormat:
    """The LUKS2 format that a secret asks for; sectors of 512 bytes unless said otherwise. Errors as `luks_format`."""
    parameters = VolumeParameters(encrypted=True, sector_size=wanted.sector_size or 512)
    return luks_format(parameters, wanted.new_key or SecretKey(None))


def check_clone(source: ImageRecord, wanted: Clone) -> None:
    """Raise InvalidArgument for what cannot be done with the image `source`, before any work."""
    encrypted = source.luks is not None
    if wanted.operation is Operation.ENCRYPT and encrypted:
        raise InvalidArgument(
            f"image {source.name} is encrypted already and is not encrypted again; use reencrypt for another key, or "
            f"ignore for a copy"
        )
    if wanted.operation.decrypts and not encrypted:
        raise InvalidArgument(
            f"image {source.name} is not encrypted, so it cannot be cloned with {wanted.operation}; use encrypt, or "
            f"ignore for a copy"
        )
    for key, takes, option in (
        (wanted.key, wanted.operation.decrypts, "source"),
        (wanted.new_key, wanted.operation.encrypts, "result"),
    ):
        if key is not None and not takes:
            raise InvalidArgument(f"{wanted.operation} takes no secret for its {option}; leave it out")
        if key is None and takes:
            raise InvalidArgument(f"{wanted.operation} needs the secret for its {option}; name it")
    check_secret(wanted.secret)
    if wanted.secret and (wanted.operation is Operation.DECRYPT or not (encrypted or wanted.new_key)):
        raise InvalidArgument(
            f"the result of {wanted.operation} is not encrypted, so no secret can be named for it; leave it out"
        )
    if wanted.sector_size and wanted.new_key is None:
        raise InvalidArgument(f"{wanted.operation} makes no new encryption, so it takes no sector size; leave it out")


def check_secret(secret: str | None) -> None:
    """Raise InvalidArgument unless it is NAMESPACE/NAME; not repeated, as it might be the passphrase by mistake."""
    if secret is not None and not _SECRET_NAME.fullmatch(secret):
        raise InvalidArgument("the secret must be named as NAMESPACE/NAME, as Kubernetes has them")


def passphrase_of(key: SecretKey, where: str) -> Passphrase:
    """What a secret for the image `where` opens it with. Raises FailedPrecondition when it holds none."""
    if key.passphrase is None:
        raise FailedPrecondition(
            f"{key.where} for {where} holds neither {LONGHORN_VALUE} nor {CEPH_PASSPHRASE}; add one of them"
        )
    return key.passphrase
