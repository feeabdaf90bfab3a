"""Image files out of .gz, .xz, .zst, .zip and .tar: as a stream, in bounded memory, holes where the image has zeros."""

import errno
import lzma
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Final, Protocol, cast

import zstandard

from csi_driver.host.files import Files
from csi_driver.images.archive import untarred, unzipped
from csi_driver.images.base import MIB, Progress
from csi_driver.images.formats import Wrapping
from csi_driver.images.room import EVERY, check_room
from csi_driver.model.errors import CommandFailed, DeviceUnreadable, InvalidArgument, ResourceExhausted

_PIECE = MIB
_READ = 256 << 10
_OUT = 64 << 10
"""What zlib and lzma are asked for at a time: of 1 MiB each piece is new memory for the kernel to clear, and lzma takes
two thirds longer.
"""
_HOLE = 64 << 10
_ZEROS: Final = bytes(_HOLE)
_ARCHIVES: Final = {Wrapping.ZIP: unzipped, Wrapping.TAR: untarred}
_MOST_MEMORY = 128 * MIB
"""For a decoder: what `xz -9` and `zstd --ultra -22` need, and what zstd(1) itself allows."""


Warn = Callable[[str], None]
"""Called with a sentence about an image that is taken all the same."""


def unwrap(
    source: int,
    wrapping: Wrapping,
    path: Path,
    most_bytes: int,
    where: str,
    progress: Progress,
    warn: Warn = lambda _: None,
) -> int:
    """Unpack the file open at `source` to a new `path`, seen when it is whole and fsynced; returns its bytes.

    `where` names the image in errors. `progress` gets the bytes of the source that are done. What follows the end of
    a gzip stream is left out and told to `warn`, as gzip(1) does. One call per path at a time.

    Raises InvalidArgument (more than `most_bytes` come out, nothing comes out, damaged, truncated, something behind the
    end, a decoder that would need more than 128 MiB, an archive of more than one image), ResourceExhausted,
    DeviceUnreadable (the source), CommandFailed (the target), and what `progress` raises; then nothing is left.
    """
    files = Files()
    fresh = path.with_name(f".{path.name}.new")
    try:
        target = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            size = _write(target, _unpacked(source, wrapping, where, progress, warn), most_bytes, where)
            os.fsync(target)
        finally:
            os.close(target)
        files.rename(fresh, path)
    except BaseException as error:
        fresh.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise ResourceExhausted(f"no space is left to unpack {where} to {path}; make room") from error
        raise CommandFailed(f"{where} could not be unpacked to {path}: {error.strerror}") from error
    return size


def _unpacked(
    source: int, wrapping: Wrapping, where: str, progress: Progress, warn: Warn
) -> Iterator[bytes | memoryview]:
    """What comes out, in pieces of at most 1 MiB; a memoryview holds until the next one is asked for."""
    if wrapping in _ARCHIVES:
        yield from _ARCHIVES[wrapping](source, where, progress)
        return
    try:
        yield from _decompressed(_pieces(source, where, progress), wrapping, where, warn)
    except _Bad as error:
        raise InvalidArgument(f"{where} is refused: its {wrapping} stream {error}; fetch or pack it again") from error
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        if "memory" in str(error).lower():
            raise InvalidArgument(
                f"{where} is refused: unpacking its {wrapping} stream takes more than the {_MOST_MEMORY >> 20} MiB of "
                f"memory that are allowed; pack it with a smaller window"
            ) from error
        raise InvalidArgument(
            f"{where} is refused: its {wrapping} stream is damaged ({error}); fetch or pack it again"
        ) from error


def _decompressed(pieces: Iterator[bytes], wrapping: Wrapping, where: str, warn: Warn) -> Iterator[bytes | memoryview]:
    match wrapping:
        case Wrapping.GZIP:
            if (yield from _members(pieces, _Gzip, b"\x1f\x8b")):
                warn(f"behind the gzip stream of {where} stands something else, which is left out")
        case Wrapping.XZ:
            if (yield from _members(pieces, _xz, b"\xfd7zXZ\0", padding=4)):
                raise _Bad(_FOLLOWED)
        case _:
            yield from _zstd(pieces)


class _Bad(Exception):
    """What is wrong with a stream: a clause that goes on after its name."""


_TRUNCATED = "ends before its end"
_FOLLOWED = "has something behind its end that is not a part of it"


def _pieces(source: int, where: str, progress: Progress) -> Iterator[bytes]:
    done = 0
    while True:
        try:
            piece = os.pread(source, _READ, done)
        except OSError as error:
            raise DeviceUnreadable(f"{where} could not be read at byte {done}: {error.strerror}") from error
        if not piece:
            return
        yield piece
        done += len(piece)
        progress(done)


class _Decoder(Protocol):
    """One member of a stream; as lzma.LZMADecompressor."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """One member of RFC 1952, its CRC and length checked by zlib."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._inflate.decompress(self._inflate.unconsumed_tail + data, max_length)
        # zlib may hold back output after it has taken all input.
        self.needs_input = len(out) < max_length
        return out


def _xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_MEMORY)


def _members(
    pieces: Iterator[bytes], fresh: Callable[[], _Decoder], magic: bytes, padding: int = 0
) -> Generator[bytes, None, bytes]:
    """Unpack members one behind the other; multiples of `padding` zeros may stand behind each (xz file format, 2.2).

    Without `padding` zeros may stand behind the last one only, as for gzip(1). Returns the begin of what else stands
    behind that.
    """
    decoder = fresh()
    left, zeros = b"", 0
    for piece in pieces:
        left += piece
        while left or not (decoder.eof or decoder.needs_input):
            if decoder.eof:
                rest = left.lstrip(b"\0")
                zeros += len(left) - len(rest)
                left = rest
                misplaced = zeros % padding if padding else zeros
                if not magic.startswith(left[: len(magic)]) or (left and misplaced):
                    return left
                if len(left) < len(magic):
                    break  # more of it is to come
                decoder, zeros = fresh(), 0
            out = decoder.decompress(left, _OUT)
            left = decoder.unused_data if decoder.eof else b""
            yield out
    if left or not decoder.eof:
        raise _Bad(_TRUNCATED)
    if padding and zeros % padding:
        raise _Bad(_FOLLOWED)
    return b""


def _zstd(pieces: Iterator[bytes]) -> Iterator[memoryview]:
    frames = _Frames(pieces)
    decoder = zstandard.ZstdDecompressor(max_window_size=_MOST_MEMORY)
    reader = decoder.stream_reader(cast("IO[bytes]", frames), read_across_frames=True)
    buffer = memoryview(bytearray(_PIECE))
    try:
        while count := reader.readinto(buffer):
            yield buffer[:count]
    except zstandard.ZstdError as error:
        if frames.trailing:
            raise _Bad(_FOLLOWED) from error
        raise
    if not frames.whole:
        raise _Bad(_TRUNCATED)


class _Frames:
    """Pieces of a zstd stream on their way to the decoder, which takes a truncated stream for a whole one
    (findings/zstandard-truncated-stream.sh).

    Follows the frames and the blocks in them by their lengths (RFC 8878, 3.1), to know where one ends.
    """

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._steps = self._walk()
        self._between = False
        self._have = b""
        self._skip, self._want = next(self._steps)

    @property
    def whole(self) -> bool:
        """The pieces so far end where a frame ends."""
        return self._between and not self._skip and not self._have

    @property
    def trailing(self) -> bool:
        """Behind the last frame so far stand one to three bytes, too few to begin another."""
        return self._between and not self._skip and bool(self._have)

    def read(self, _size: int) -> bytes:
        """The next piece, b"" behind the last one."""
        piece = next(self._pieces, b"")
        at = 0
        while at < len(piece):
            skipped = min(self._skip, len(piece) - at)
            self._skip -= skipped
            at += skipped
            taken = piece[at : at + self._want - len(self._have)]
            at += len(taken)
            self._have += taken
            if len(self._have) == self._want:
                have, self._have = self._have, b""
                self._skip, self._want = self._steps.send(have)
        return piece

    def _walk(self) -> Generator[tuple[int, int], bytes, None]:
        """Yields how many bytes to pass over and how many to be given then; is sent those."""
        skip = 0
        while True:
            magic = int.from_bytes((yield skip, 4), "little")
            first, self._between = not self._between, False
            if magic & ~0xF == 0x184D2A50:  # skippable
                skip = int.from_bytes((yield 0, 4), "little")
            elif magic == 0xFD2FB528:
                (descriptor,) = yield 0, 1
                single = descriptor >> 5 & 1
                content_size = (single, 2, 4, 8)[descriptor >> 6]
                skip = (0, 1, 2, 4)[descriptor & 3] + content_size + (1 - single)
                last = 0
                while not last:
                    block = int.from_bytes((yield skip, 3), "little")
                    last = block & 1
                    skip = 1 if block >> 1 & 3 == 1 else block >> 3  # a run of one byte, or so many
                skip += descriptor & 4  # a checksum of 4 bytes
            else:
                raise _Bad("does not begin as one" if first else _FOLLOWED)
            self._between = True


def _write(target: int, pieces: Iterator[bytes | memoryview], most_bytes: int, where: str) -> int:
    buffer = bytearray(_PIECE)
    filled = size = looked = 0
    for piece in pieces:
        size += len(piece)
        if size >= looked:
            check_room(target, f"to unpack {where}")
            looked = size + EVERY
        if size > most_bytes:
            raise InvalidArgument(
                f"{where} is refused: more than the {most_bytes} bytes that are allowed come out of it; take a smaller "
                f"image or raise the limit"
            )
        at = 0
        while at < len(piece):
            count = min(len(piece) - at, _PIECE - filled)
            buffer[filled : filled + count] = piece[at : at + count]
            filled += count
            at += count
            if filled == _PIECE:
                _write_data(target, buffer, filled, size - len(piece) + at - filled)
                filled = 0
    if not size:
        raise InvalidArgument(f"{where} is refused: nothing is packed in it; look at how it was made")
    _write_data(target, buffer, filled, size - filled)
    os.ftruncate(target, size)  # it may end in a hole
    return size


def _write_data(target: int, buffer: bytearray, filled: int, offset: int) -> None:
    """Write what is not zero of the first `filled` bytes; the rest of the new file stays a hole."""
    view = memoryview(buffer)
    start = at = 0
    while at < filled:
        end = min(at + _HOLE, filled)
        if buffer.startswith(_ZEROS if end - at == _HOLE else _ZEROS[: end - at], at):
            _write_all(target, view[start:at], offset + start)
            start = end
        at = end
    _write_all(target, view[start:filled], offset + start)


def _write_all(target: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(target, view, offset)
        view = view[count:]
        offset += count
