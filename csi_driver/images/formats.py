"""What the file of an image is, from its own bytes, before any qemu tool sees it.

The answer is recorded and named to every tool from then on, so nothing probes the file again: a guest that writes a
qcow2 header into its raw disk gains nothing. What cannot be told apart from a raw disk is raw, an iso too.
"""

import os
import re
import stat
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from csi_driver.host.blockdev import kind
from csi_driver.images import qcow2, vdi, vhd, vhdx, vmdk
from csi_driver.images.base import ImageFormat
from csi_driver.images.foreign import refuse_foreign
from csi_driver.images.imagefile import SECTOR, ImageFile
from csi_driver.images.luksfile import inspect_luks
from csi_driver.luks.header import PRIMARY_MAGIC, is_luks1
from csi_driver.model.errors import InvalidArgument
from csi_driver.model.volume import LuksIdentity

HEAD_BYTES: Final = 64 * 1024
"""How much of the start of a file its signature may take."""

_CONTAINERS: Final = (
    (0, qcow2.MAGIC, ImageFormat.QCOW2, qcow2.virtual_size),
    (0, vmdk.MAGIC, ImageFormat.VMDK, vmdk.virtual_size),
    (0, vhdx.MAGIC, ImageFormat.VHDX, vhdx.virtual_size),
    (0, vhd.MAGIC, ImageFormat.VHD, vhd.virtual_size),
    (vdi.MAGIC_AT, vdi.MAGIC, ImageFormat.VDI, vdi.virtual_size),
)

_TAR_HEADER: Final = 512
_TAR_SUM: Final = slice(148, 156)

_SCHEMES: Final = {
    "s3": "give an https URL that is signed for it, as aws s3 presign makes one",
    "gs": "give an https URL that is signed for it, as gcloud storage sign-url makes one",
    "docker": "take the disk out of that container image (in those of KubeVirt it lies in /disk) and give its path",
    "oci": "take the disk out of that container image (in those of KubeVirt it lies in /disk) and give its path",
    "file": "give the path without file:",
    "ftp": "fetch it with a program that can, and give the path",
    "ssh": "pipe what that program gives into luks-csi image import - NAME",
    "scp": "pipe what that program gives into luks-csi image import - NAME",
    "sftp": "pipe what that program gives into luks-csi image import - NAME",
    "nfs": "mount it and give the path",
}


class Wrapping(StrEnum):
    """How a file is packed around the image."""

    GZIP = "gzip"
    XZ = "xz"
    ZSTD = "zstd"
    ZIP = "zip"
    TAR = "tar"


# RFC 1952 and its only method; the xz file format; RFC 8878, which may begin with a skippable frame; APPNOTE.TXT 4.3.7.
_WRAPPINGS: Final = (
    (re.compile(rb"\x1f\x8b\x08"), Wrapping.GZIP),
    (re.compile(rb"\xfd7zXZ\0"), Wrapping.XZ),
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), Wrapping.ZSTD),
    (re.compile(rb"PK\x03\x04"), Wrapping.ZIP),
)


@dataclass(frozen=True)
class Inspected:
    """What an image file is. `virtual_size` is the bytes of payload: what a VM sees, behind the header of a LUKS.

    `length` is how many bytes of the file are the image: less than all of it where a vhd's footer stands behind them.
    `luks` is what the header of a LUKS image says, None for every other format. `warning` is what to tell about an
    image that is taken all the same.
    """

    format: ImageFormat
    virtual_size: int
    length: int
    luks: LuksIdentity | None = None
    warning: str | None = None


def detect_wrapping(head: bytes) -> Wrapping | None:
    """How a file that begins with `head` (512 bytes do) is packed; None where it is not."""
    found = next((wrapping for pattern, wrapping in _WRAPPINGS if pattern.match(head)), None)
    return found or (Wrapping.TAR if _begins_like_tar(head) else None)


def check_source(source: str) -> None:
    """Refuse a source that is neither a path nor an http(s) address: QEMU takes `json:…` and `nbd:…` as instructions.

    Raises InvalidArgument.
    """
    prefix = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", source)
    if not prefix or (scheme := prefix[1].lower()) in {"http", "https"}:
        return
    if advice := _SCHEMES.get(scheme):
        raise InvalidArgument(f"the source is refused: images are not fetched by {scheme}:; {advice}")
    raise InvalidArgument(
        f"the source is refused: it begins with {prefix[0]!r}, which QEMU takes as instructions and not as a name; "
        f"give a path (./{prefix[0]}… for a file of that name) or an http(s) address"
    )


def inspect(descriptor: int, where: str, most_bytes: int) -> Inspected:
    """Tell what the regular file at `descriptor`, not packed, is, from all of its metadata; nothing else is opened.

    `where` names the image in errors ("image ubuntu"), `most_bytes` is the biggest payload that is allowed. Raises
    InvalidArgument for every file that is refused, DeviceUnreadable.
    """
    status = os.fstat(descriptor)
    image = ImageFile(descriptor, where, status.st_size, most_bytes)
    if not stat.S_ISREG(status.st_mode):
        raise image.refusal(f"expected a regular file, found a {kind(status.st_mode)}; give a file")
    if not image.size:
        raise image.refusal("it is empty; look at how it was made")
    head = image.peek(0, HEAD_BYTES)
    for offset, magic, format, virtual_size in _CONTAINERS:
        if head.startswith(magic, offset):
            return Inspected(format, virtual_size(image), image.size)
    fixed = vhd.fixed_size(image)
    if fixed is not None:
        image = replace(image, size=fixed)
    if head.startswith(PRIMARY_MAGIC):
        identity, payload = inspect_luks(image)
        return Inspected(ImageFormat.LUKS1 if is_luks1(head) else ImageFormat.LUKS2, payload, image.size, identity)
    if fixed is not None:  # a disk for sure, whatever is on it
        return Inspected(ImageFormat.RAW, image.size, image.size)
    if wrapping := detect_wrapping(head):
        raise image.refusal(f"it is packed with {wrapping} a second time; unpack the outer one and give what is in it")
    refuse_foreign(image, head)
    image.require_limit(image.size)
    return Inspected(ImageFormat.RAW, image.size, image.size, warning=_warning(image))


def _warning(image: ImageFile) -> str | None:
    if image.size % SECTOR:
        return (
            f"{image.where} has {image.size} bytes, expected a multiple of {SECTOR} of a disk; it is taken, and may be "
            "cut short or no disk"
        )
    return None


def _begins_like_tar(head: bytes) -> bool:
    """Whether the sum in the first header is right: so is told an archive without a signature, as version 7 wrote."""
    header = head[:_TAR_HEADER]
    said = header[_TAR_SUM].strip(b" \0")
    if len(header) < _TAR_HEADER or not header[0] or not re.fullmatch(rb"[0-7]{1,7}", said):
        return False
    return int(said, 8) == sum(header) - sum(header[_TAR_SUM]) + 8 * ord(" ")
