"""The proof that nobody has used the inside of a volume in which mkfs may run again. Runs in a worker.

A mkfs that was cut may have left anything that mkfs writes, in any order after a power cut. It is told from a file
system in use by what the kernel writes at the first mount (measured with Linux 6.1, e2fsprogs 1.47.0, xfsprogs 6.1.0
and btrfs-progs 6.2; a read-only mount that changes nothing leaves no trace, and nothing to lose):

- ext4 has the time of the last mount and counts mounts; mkfs writes the superblock last;
- xfs has an LSN in the superblock and writes to its log, at every mount; mkfs leaves one record in it;
- btrfs has the generation of its UUID tree in the superblock; mkfs leaves a generation of 6.
"""

import os
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

from csi_driver.host.signatures import HEAD_BYTES, name_of
from csi_driver.luks.blank import Place, Span, read_all, sample_spans, written_spans
from csi_driver.model.errors import ForeignSignature

_BLOCK: Final = 4096
_SECTOR: Final = 512
_PIECE: Final = 1 << 20
_ZEROED: Final = 2048  # by each mkfs, first: where its superblock will be; an earlier one's tables may lie behind it
_ALL_BYTES: Final = 1 << 30  # so much is read where nobody knows what was written, else samples

_EXT4_COPIES: Final = tuple(8 * size * size + (size if size == 1024 else 0) for size in (1024, 2048, 4096))
"""Where the second superblock is, for each size of a block: behind as many blocks as one block has bits."""

_BTRFS_PLACES: Final = (0x10000, 0x4000000)
_BTRFS_MOST_GENERATION: Final = 16
_XFS_LOG_BYTES: Final = 64 << 10
_XFS_LOG_MAGIC: Final = 0xFEEDBABE
_TEXT: Final = re.compile(rb"[\t\n\r -~]{16}")
_SMALL: Final = bytes((*range(0x20), 0xFF))


def prove_never_mounted(where: str, path: Place, size: int, storage: Place | None = None, data_offset: int = 0) -> None:
    """Prove that the device at `path` holds nothing, or what a mkfs left there, whole or cut, that was never mounted.

    `storage` is the sparse file or the device with what is stored of it, from `data_offset` on: the ciphertext where
    `path` is a mapping. What is all zero there was never written, whatever the mapping shows. Raises ForeignSignature
    in any doubt, DeviceUnreadable, DeviceShort.
    """
    with ExitStack() as undo:
        inside = _Inside(where, path, size, storage, data_offset, undo)
        head = inside.read(0, min(HEAD_BYTES, size))
        found = name_of(head)
        if head[:4] == b"XFSB":
            used = _is_used_xfs(inside, head)
        elif found == "ext4":
            used = _is_mounted_ext4(head[1024:])
        elif found == "btrfs":
            used = _is_used_btrfs(head[_BTRFS_PLACES[0] :])
        else:
            used = bool(found) or bool(head[:_ZEROED].strip(b"\0")) or _is_used_without_superblock(inside)
        if used:
            raise ForeignSignature(
                f"{where} is recorded as never used and holds {f'a {found} that was mounted' if found else 'data'}; "
                f"nothing was written, restore the volume's newest record, or delete the volume if nobody needs it"
            )


class _Inside:
    """What a file system would see, except that what was never written reads as zeros."""

    def __init__(
        self, where: str, path: Place, size: int, storage: Place | None, data_offset: int, undo: ExitStack
    ) -> None:
        self.size = size
        self._where = where
        self._stored_at = data_offset
        self._shown, self._stored = (_open(name, undo) for name in (path, storage or path))
        # A killed mkfs leaves pages that are not yet written back; and what lies below was written past its own pages.
        for descriptor in (self._shown, self._stored):
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._spans = written_spans(storage, data_offset, data_offset + size)

    def read(self, start: int, length: int) -> bytes:
        length = max(0, min(length, self.size - start))
        shown = read_all(self._where, self._shown, start, length)
        stored = read_all(self._where, self._stored, self._stored_at + start, length)
        if bytes(_SECTOR) not in stored:
            return shown
        pieces = (slice(at, at + _SECTOR) for at in range(0, length, _SECTOR))
        return b"".join(shown[piece] if stored[piece].strip(b"\0") else bytes(len(shown[piece])) for piece in pieces)

    def written(self) -> Iterator[bytes]:
        """All that was ever written, in pieces of whole blocks, or samples of what there is."""
        for start, end in self._spans_inside():
            for at in range(start - start % _BLOCK, end, _PIECE):
                yield self.read(at, min(_PIECE, end - at))

    def _spans_inside(self) -> Iterator[Span]:
        if self._spans is not None:
            yield from ((start - self._stored_at, end - self._stored_at) for start, end in self._spans)
        elif self.size <= _ALL_BYTES:
            yield 0, self.size
        else:
            yield 0, _PIECE
            yield from sample_spans(_PIECE, self.size)


def _open(path: Place, undo: ExitStack) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    undo.callback(os.close, descriptor)
    return descriptor


def _is_mounted_ext4(superblock: bytes) -> bool:
    """By time of the last mount, number of mounts, and where it was mounted (fs/ext4/ext4.h, ext4_super_block)."""
    mounted, mounts = struct.unpack_from("<I4xH", superblock, 0x2C)
    return bool(mounted or mounts or superblock[0x88:0xC8].strip(b"\0"))


def _is_used_xfs(inside: _Inside, superblock: bytes) -> bool:
    """By the LSN of the superblock and by the log (fs/xfs/libxfs/xfs_format.h)."""
    if superblock[126] == 1:
        return False  # sb_inprogress: mkfs has not ended, and the kernel mounts no such
    return any(superblock[240:248]) or _is_used_xfs_log(inside, superblock)


def _is_used_xfs_log(inside: _Inside, superblock: bytes) -> bool:
    """Whether there is more in the log than mkfs's one record (fs/xfs/libxfs/xfs_log_format.h)."""
    block_bytes, log_start, group_blocks, group_bits, log_unit = struct.unpack_from(">4xI40xQ28xI36xB71xI", superblock)
    at = ((log_start >> group_bits) * group_blocks + (log_start & ((1 << group_bits) - 1))) * block_bytes
    if not log_start or at + _XFS_LOG_BYTES > inside.size:
        return True
    log = inside.read(at, _XFS_LOG_BYTES)
    magic, cycle = struct.unpack_from(">2I", log)
    record = max(1024, log_unit) if (magic, cycle) == (_XFS_LOG_MAGIC, 1) else 0
    return bool(log[record:].strip(b"\0"))


def _is_used_btrfs(superblock: bytes) -> bool:
    """By the generations and the log tree of the superblock (include/uapi/linux/btrfs_tree.h, btrfs_super_block)."""
    generation, log_root = struct.unpack_from("<Q16xQ", superblock, 72)
    cache, uuid_tree = struct.unpack_from("<2Q", superblock, 555)
    return bool(generation > _BTRFS_MOST_GENERATION or log_root or uuid_tree or cache not in (0, 2**64 - 1))


def _is_used_without_superblock(inside: _Inside) -> bool:
    """Whether there is more than a mkfs may leave that was cut before the superblock was whole.

    Each mkfs first zeroes where it will be. A file system that lost its first superblock is known by another one. Of
    all that was written, each sector must look like the tables that file systems are made of (`_is_table`). Zeros tell
    nothing and lose nothing.
    """
    for at in _EXT4_COPIES:
        if (copy := inside.read(at, 1024))[0x38:0x3A] == b"\x53\xef" and _is_used_ext4_by_journal(inside, copy):
            return True
    for at in _BTRFS_PLACES[1:]:
        if (copy := inside.read(at, _BLOCK))[64:72] == b"_BHRfS_M" and _is_used_btrfs(copy):
            return True
    return any(
        not _is_table(sector) or (sector[:4] == b"XFSB" and _is_used_xfs_log(inside, sector))
        for piece in inside.written()
        if piece.strip(b"\0")
        for sector in (piece[at : at + _SECTOR] for at in range(0, len(piece), _SECTOR))
    )


def _is_used_ext4_by_journal(inside: _Inside, superblock: bytes) -> bool:
    """What the kernel never updates in a copy of the superblock it writes to the journal (include/linux/jbd2.h)."""
    if _is_mounted_ext4(superblock):
        return True
    magic, depth, high, low = struct.unpack_from("<H4xH10xHI", superblock, 0x10C)  # of its inode: the extent tree
    journal = inside.read((high << 32 | low) * (1024 << superblock[0x18]), 32)
    if (magic, depth) != (0xF30A, 0) or not journal:
        return True
    sequence, start = struct.unpack_from(">2I", journal, 24)
    return bool(journal.strip(b"\0")) and (journal[:4] != b"\xc0\x3b\x39\x98" or sequence != 1 or bool(start))


def _is_table(sector: bytes) -> bool:
    """Whether it holds numbers, most of them small, and no text.

    Of its words of 32 bits five of eight or more are below 2^29 or at the upper end, in either order of bytes: 71
    percent are in the densest sector that a mkfs was seen to write (volumes of 8 MiB to 5 TiB), of random bytes 13.
    The longest text that one writes is "lost+found".
    """
    large = min(len(sector[top::4].translate(None, delete=_SMALL)) for top in (3, 0))
    return 8 * large <= 3 * (len(sector) // 4) and _TEXT.search(sector) is None
