"""What an agent asks of a child process, and what that tells: JSON on standard input and output, secrets among it."""

from collections.abc import Mapping
from typing import Any

import msgspec

from csi_driver.images.store import ImageRecord
from csi_driver.kube.kinds import Json

Entries = Mapping[str, str]
"""The entries of a Kubernetes secret."""


class Download(msgspec.Struct, frozen=True, tag=True):
    """From a URL, which may be a credential, as may be `headers`. `ca` is PEM text, `limit` the most bytes."""

    url: str
    checksum: str | None
    limit: int
    headers: Entries
    ca: str | None = None

    def __repr__(self) -> str:
        return "Download(...)"


class Upload(msgspec.Struct, frozen=True, tag=True):
    """A file that was uploaded to this node, whole."""

    path: str
    checksum: str | None
    limit: int


class Secret(msgspec.Struct, frozen=True):
    """A secret of Kubernetes; `name` is NAMESPACE/NAME."""

    name: str
    entries: Entries

    def __repr__(self) -> str:
        return f"Secret({self.name!r})"


class CloneWork(msgspec.Struct, frozen=True, tag=True):
    """Another image of this node, that of the Image object `source_owner`."""

    source: str
    source_owner: str
    encryption: str
    key: Secret | None
    new_key: Secret | None
    sector_size: int | None

    def __repr__(self) -> str:
        return f"CloneWork(source={self.source!r}, encryption={self.encryption!r})"


class Pull(msgspec.Struct, frozen=True, tag=True):
    """From an agent that has it: `peers` are HOST:PORT, `ca` is the path of a PEM file, `token` says who we are;
    `checksum` is the SHA-256 that the Image says, where it does.
    """

    peers: tuple[str, ...]
    ca: str
    token: str
    checksum: str | None = None

    def __repr__(self) -> str:
        return f"Pull(peers={self.peers!r})"


class Export(msgspec.Struct, frozen=True, tag=True):
    """The content of a volume of this node: `limit` bytes at most, and `rate` of them a second where that is not 0."""

    volume: str
    state_dir: str
    limit: int
    rate: int


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Make the image `name` below `folder` for the Image object `owner`; `secret` (namespace/name) opens the result.

    That `opens` does is proven where the image was encrypted before.
    """

    folder: str
    name: str
    owner: str
    secret: str | None
    opens: Secret | None = None
    allow_local: bool = False
    work: Download | Upload | CloneWork | Pull | Export


class Doing(msgspec.Struct, frozen=True, tag=True):
    """How far it is, in bytes; the total where it is known."""

    what: str
    done: int
    total: int | None


class Used(msgspec.Struct, frozen=True, tag=True):
    """A passphrase was used: what the audit trail is to say of it."""

    fields: dict[str, str]


class Made(msgspec.Struct, frozen=True, tag=True):
    """It is there; `checksum` is the SHA-256 of its file."""

    record: ImageRecord
    checksum: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """It could not be made. `text` is one sentence; `permanent` where no repetition helps, `busy` where a state passes
    by itself: an earlier child that has not ended, a file that is being removed; `elsewhere` where it is this node's
    fault, its disk's say, and another one may be able to.
    """

    text: str
    permanent: bool = False
    busy: bool = False
    elsewhere: bool = False


Line = Doing | Used | Made | Failed


def foreign(record: ImageRecord) -> str:
    """What to do about an image that has the name of an Image and is not its copy."""
    whose, owned = ("that was made by hand", "") if record.owner is None else ("of an earlier Image", " --owned")
    return (
        f"this node has an image {record.name} {whose} already that is not this Image's; remove it there with luks-csi "
        f"image delete {record.name}{owned}, or give the Image another name"
    )


def facts_of(record: ImageRecord, checksum: str) -> Json:
    """What an ImageCopy tells of its file; sizes in bytes."""
    facts: dict[str, Any] = {
        "format": str(record.format),
        "fileSize": record.file_size,
        "virtualSize": record.size,
        "encrypted": record.luks is not None,
        "checksum": checksum,
    }
    if record.luks is not None:
        facts |= {"luksUUID": record.luks.uuid, "cipher": record.luks.cipher}
        if record.secret is not None:
            facts["secret"] = record.secret
    return facts
