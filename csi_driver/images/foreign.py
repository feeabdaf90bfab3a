"""Files that are no disk: told by what they begin or end with, and that no raw disk has by chance.

A list of what people hand in by mistake. Signatures are those of file(1) and of the formats' own specifications.
"""

import codecs
import re
from typing import Final

from csi_driver.images.imagefile import SECTOR, ImageFile
from csi_driver.luks.header import BINARY_SIZE, HEADER_SIZES, SECONDARY_MAGIC

_UNPACK: Final = "unpack it and give the image inside"
_RESTORE: Final = "restore it to a raw disk with the program that made it"


def _convert(name: str) -> str:
    return f"convert it with `qemu-img convert -f {name} -O qcow2 FILE NEW`"


def _by_qemu(name: str) -> str:
    return f"convert it to qcow2 with qemu-img, which knows it as {name}"


def _pipe(program: str) -> str:
    return f"unpack it on the way: `{program} FILE | luks-csi image import - NAME`"


_BINARY: Final = tuple(
    (offset, re.compile(pattern, re.DOTALL), name, advice)
    for offset, pattern, name, advice in (
        (0, rb"Witho(utFreeSpace|uFreSpacExt)", "a Parallels disk", _convert("parallels")),
        (0, rb"QED\0", "a qed disk", _convert("qed")),
        (0, rb"Bochs Virtual HD Image", "a Bochs disk", _by_qemu("bochs")),
        (0, rb"COWD\x01\0\0\0", "a VMware COWD extent", _by_qemu("vmdk")),
        (0, rb"\xbe\xba\xfe\xca\0{4}\x01\0\0\0\x02\0\0\0", "a VMware seSparse extent", _by_qemu("vmdk")),
        (0, rb"#!/bin/sh\n#V2\.0 Format\n", "a cloop disk", _by_qemu("cloop")),
        (0, rb"(?i:\s*# Disk DescriptorFile)|(?:#[^\n]*\n| *\r?\n)*version=\d",
         "the descriptor of a vmdk, a text that names other files",
         "make one image of it where they are: `qemu-img convert -f vmdk -O qcow2 FILE NEW`"),
        (0, rb"\s*json:", "a name in QEMU's json: notation, not an image", "give the image that it describes"),
        (0, rb"(?i:\s*<(!doctype|html|\?xml))", "a page of text", "look at it; a server may have answered so"),
        (0, rb"\x3a\xff\x26\xed\x01\0", "an Android sparse image", "make a raw image of it with Android's simg2img"),
        (0, rb"VMA\0{4}\x01", "a backup of Proxmox (VMA)", "restore it there, or unpack it with its program vma"),
        (0, rb"MSWIM\0\0\0", "a Windows image (WIM), files and not a disk", "install it to a disk and give that"),
        (0, rb"\0?partclone-image", "a backup of partclone", _RESTORE),
        (0, rb"\0ntfsclone-image", "a backup of ntfsclone", _RESTORE),
        (0, rb"EVF\x09\x0d\x0a\xff\0|EVF2\x0d\x0a\x81", "an EnCase image (E01)", _RESTORE),
        (0, rb"AFF10\r\n\0", "an AFF image", _RESTORE),
        (0, rb"shdw", "an Apple sparse image (ASIF)", "make a raw image of it with diskutil on macOS"),
        (0, rb"sprs", "an Apple sparseimage", "make a raw image of it with hdiutil on macOS"),
        (0, rb"encrcdsa", "an encrypted dmg disk", "make a raw image of it with hdiutil on macOS"),
        (0, rb"QEVM", "a state of a virtual machine that QEMU saved, not a disk", "give the machine's disk"),
        (0, rb"BZh[1-9]1AY&SY", "compressed with bzip2", _pipe("bzip2 -dc")),
        (0, rb"\x04\x22\x4d\x18|\x02\x21\x4c\x18", "compressed with lz4", _pipe("lz4 -dc")),
        (0, rb"LZIP[\0\x01]", "compressed with lzip", _UNPACK),
        (0, rb"\x89LZO\0\r\n\x1a\n", "compressed with lzop", _UNPACK),
        (0, rb"\x1f\x9d\x90", "compressed with compress", _UNPACK),
        # The usual properties, a dictionary of a power of two, and a size that is unknown or below 2^40.
        (0, rb"\x5d\0\0[\0\x01\x02\x04\x08\x10\x20\x40\x80][\0-\x08](?:\xff{8}|.{5}\0{3})",
         "compressed as lzma alone", _pipe("xz --format=lzma -dc")),
        (0, rb"PK\x05\x06|PK\x07\x08", "a zip archive that is empty or a part of several files", _UNPACK),
        (0, rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
        (0, rb"Rar!\x1a\x07", "a rar archive", _UNPACK),
        (0, rb"MSCF\0{4}", "a cabinet archive", _UNPACK),
        (0, rb"07070[127][0-7a-fA-F]{6}", "a cpio archive", _UNPACK),
        (0, rb"!<arch>\n", "an ar archive or a Debian package", _UNPACK),
        (0, rb"\xed\xab\xee\xdb", "an RPM package", _UNPACK),
        (0, rb"xar!\0\x1c", "a xar archive", _UNPACK),
        (257, rb"ustar(\0|  \0)", "a tar archive whose first header is damaged", "fetch it again"),
        (0, rb"\x7fELF[\x01\x02][\x01\x02]\x01", "an ELF program, not a disk", "give an image"),
        (0, rb"%PDF-1\.", "a PDF document", "give an image"),
    )
)  # fmt: skip

_TEXTS: Final = tuple(
    (re.compile(pattern), name, advice)
    for pattern, name, advice in (
        (rb"version https://git-lfs\.github\.com/", "a Git LFS pointer", "fetch the file itself with git lfs pull"),
        (rb"\s*[{\[]", "a JSON text", "look at it; a server may have answered so"),
        (
            rb"(?:#[^\n]*\n)*(?:[0-9a-f]{32,128} [ *]|SHA\d+ \()\S",
            "a list of checksums",
            "give the image that it is about",
        ),
    )
)
_UTF8: Final = codecs.getincrementaldecoder("utf-8")
_UTF16: Final = codecs.getincrementaldecoder("utf-16")
_UTF16_MARKS: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_ASCII: Final = bytes(range(128))
# What a text may hold; a disk begins with a boot sector or with zeros.
_CONTROLS: Final = bytes({*range(32), 127} - {*b"\t\n\r\f\x1b"})


def refuse_foreign(image: ImageFile, head: bytes) -> None:
    """Refuse what would be a raw disk but for a signature, or for being text; `head` is the start of the file.

    Raises InvalidArgument, DeviceUnreadable.
    """
    for offset, pattern, name, advice in _BINARY:
        if pattern.match(head, offset):
            raise image.refusal(f"it is {name}; {advice}")
    if _is_text(head, whole=len(head) == image.size):
        for text_pattern, name, advice in _TEXTS:
            if text_pattern.match(head):
                raise image.refusal(f"it is {name}; {advice}")
        # Not repeated: it may be the passphrase by mistake.
        raise image.refusal(f"it is a text of {image.size} bytes and no disk; look at what is in it")
    tail = image.peek(max(image.size - SECTOR, 0), SECTOR)
    if tail.startswith(b"koly\0\0\0\4\0\0\2\0"):
        raise image.refusal(f"it is a dmg disk; {_by_qemu('dmg')}")
    if not head[:BINARY_SIZE].strip(b"\0") and any(_has_luks_copy(image, place) for place in HEADER_SIZES):
        raise image.refusal("it is LUKS2 with its first header wiped; mend it with `cryptsetup repair FILE`")


def _is_text(head: bytes, *, whole: bool) -> bool:
    """Whether it is text without control characters: UTF-8, UTF-16 behind its mark, or an older code, mostly ASCII.

    Where it is not the `whole` file, its last character may be cut.
    """
    if head.startswith(_UTF16_MARKS):
        try:
            head = _UTF16().decode(head, final=whole).encode()
        except UnicodeDecodeError:
            return False
    if not head or head.translate(None, _CONTROLS) != head:
        return False
    try:
        return bool(_UTF8().decode(head, final=whole))
    except UnicodeDecodeError:
        return len(head.translate(None, _ASCII)) * 4 < len(head)


def _has_luks_copy(image: ImageFile, place: int) -> bool:
    copy = image.peek(place, 264)
    return copy.startswith(SECONDARY_MAGIC) and copy[256:] == place.to_bytes(8, "big")
