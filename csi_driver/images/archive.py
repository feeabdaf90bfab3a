"""The one image in a zip, a tar or an OVA: found, checked and read as a stream, in bounded memory.

An archive's headers are anybody's. What the standard library would read at once is bounded here, and nothing is ever
unpacked to a name that the archive gives.
"""

import contextlib
import io
import os
import shlex
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Final, cast

from csi_driver.images.base import MIB, Progress
from csi_driver.luks.header_metadata import shorten
from csi_driver.model.errors import DeviceUnreadable, InvalidArgument

_PIECE: Final = MIB
_MOST_AT_ONCE: Final = MIB
_MOST_MEMBERS: Final = 10_000
_NAMED: Final = 5
# What stands beside the disk of an OVA (DMTF DSP0243, 2.1), and beside one in an archive of files.
_NO_DISK: Final = (".ovf", ".mf", ".cert", ".xml", ".txt", ".md", ".json", ".sha256", ".sha512", ".sha256sum", ".asc")
_EXTRACT: Final = "`python3 -m zipfile -e FILE FOLDER`"
# Deflate64, in which Windows packs what has 2 GiB and more, is none of Python's; bzip2 and LZMA are.
_OTHER_METHODS: Final = {
    9: "unpack it on the way: `unzip -p FILE {name} | luks-csi image import - NAME`",
    zipfile.ZIP_BZIP2: f"unpack it: {_EXTRACT}",
    zipfile.ZIP_LZMA: f"unpack it: {_EXTRACT}",
}
_DAMAGED: Final = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, struct.error, EOFError, ValueError, NotImplementedError,
    RuntimeError, OverflowError, LookupError,
)  # fmt: skip


def unzipped(source: int, where: str, progress: Progress) -> Iterator[bytes]:
    """The pieces of the one image in the zip that is open at `source`, its checksum checked (APPNOTE.TXT 6.3).

    `where` names the image in errors; `progress` gets bytes of the source. Raises InvalidArgument, DeviceUnreadable.
    """
    file = _Source(source, where)
    with _told("zip", where):
        archive = zipfile.ZipFile(cast("IO[bytes]", file))
        members = {each.filename: each for each in archive.infolist() if not each.is_dir()}
        name = _only(list(members), where, "zip", _EXTRACT)
        member = members[name]
        if member.flag_bits & 1:
            raise InvalidArgument(
                f"{where} is refused: the zip that it is in is encrypted; unpack it and give what is in it"
            )
        if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            how = _OTHER_METHODS.get(member.compress_type, "unpack it with the program that packed it")
            raise InvalidArgument(
                f"{where} is refused: it is in a zip with compression {member.compress_type}, expected 0 or 8; "
                f"{how.format(name=shlex.quote(name))}"
            )
        with archive.open(member) as opened:
            yield from _pieces(opened.read, file, progress)


def untarred(source: int, where: str, progress: Progress) -> Iterator[bytes]:
    """The same for a tar or an OVA (POSIX.1-2017, pax; GNU's sparse members too)."""
    file = _Source(source, where)
    with _told("tar", where):
        archive = tarfile.open(fileobj=cast("IO[bytes]", file), mode="r:")  # noqa: SIM115 - the file is not its own
        members: dict[str, tarfile.TarInfo] = {}
        for count, member in enumerate(iter(archive.next, None)):
            if count > _MOST_MEMBERS:
                raise InvalidArgument(
                    f"{where} is refused: it is a tar of more than {_MOST_MEMBERS} files, not of an image"
                )
            if member.isreg():
                members[member.name] = member
        name = _only(list(members), where, "tar", None)
        opened = archive.extractfile(members[name])
        if opened is None:
            raise tarfile.TarError("no file")
        left = members[name].size
        for piece in _pieces(opened.read, file, progress):
            left -= len(piece)
            yield piece
        if left:
            raise tarfile.TarError("it ends early")


def _only(names: list[str], where: str, kind: str, command: str | None) -> str:
    """The one name that can be an image."""
    disks = [name for name in names if not name.lower().endswith(_NO_DISK)]
    if len(disks) == 1:
        return disks[0]
    shown = shorten(", ".join(disks[:_NAMED])) + (", …" if len(disks) > _NAMED else "")
    if not disks:
        raise InvalidArgument(f"{where} is refused: it is a {kind} without an image in it; look at how it was made")
    command = command or f"`tar -xOf FILE {shlex.quote(disks[0])} | luks-csi image import - NAME`"
    raise InvalidArgument(
        f"{where} is refused: it is a {kind} with {len(disks)} files that can be images ({shown}); give one of them: "
        f"{command}"
    )


def _pieces(read: Callable[[int], bytes], file: "_Source", progress: Progress) -> Iterator[bytes]:
    while piece := read(_PIECE):
        yield piece
        progress(file.tell())


@contextlib.contextmanager
def _told(kind: str, where: str) -> Iterator[None]:
    """Tells what the standard library finds wrong with an archive."""
    try:
        yield
    except _DAMAGED as error:
        raise InvalidArgument(
            f"{where} is refused: the {kind} that it is in is damaged ({shorten(str(error))}); fetch or pack it again"
        ) from error


class _Source(io.RawIOBase):
    """The file at a descriptor, which stays its owner's; no read is longer than 1 MiB."""

    def __init__(self, descriptor: int, where: str) -> None:
        self._descriptor = descriptor
        self._where = where
        self._position = 0
        self._size = os.fstat(descriptor).st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("it leads to before its begin")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        wanted = max(self._size - self._position, 0) if size < 0 else size
        if wanted > _MOST_AT_ONCE:
            raise ValueError(f"it has a header of {wanted} bytes")
        try:
            found = os.pread(self._descriptor, wanted, self._position)
        except OSError as error:
            raise DeviceUnreadable(
                f"{self._where} could not be read at byte {self._position}: {error.strerror}"
            ) from error
        self._position += len(found)
        return found
