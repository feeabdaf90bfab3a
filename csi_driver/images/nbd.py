"""A client of the NBD protocol, as far as reading an image needs it.

Written against the NBD specification (doc/proto.md of the NetworkBlockDevice project): fixed newstyle negotiation,
structured replies, and the metadata context "base:allocation" for what reads as zeros. Numbers are big-endian. The
server is not trusted: what it says is bounded, and a word that does not fit ends the connection.
"""

import errno
import os
import socket
import struct
import time
from typing import Final, NoReturn

from csi_driver.images.base import Extent
from csi_driver.model.errors import DeviceUnreadable

_SERVER_MAGIC: Final = b"NBDMAGIC"
_OPTION_MAGIC: Final = b"IHAVEOPT"
_OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
_REQUEST_MAGIC: Final = 0x25609513
_REPLY_MAGIC: Final = 0x668E33EF
_FIXED_NEWSTYLE: Final = 1
_NO_ZEROES: Final = 2

_OPT_GO: Final = 7
_OPT_STRUCTURED_REPLY: Final = 8
_OPT_SET_META_CONTEXT: Final = 10
_REP_ACK: Final = 1
_REP_INFO: Final = 3
_REP_META_CONTEXT: Final = 4
_REP_ERROR: Final = 1 << 31
_INFO_EXPORT: Final = 0

_CMD_READ: Final = 0
_CMD_BLOCK_STATUS: Final = 7
_FLAG_DONT_FRAGMENT: Final = 1 << 2
_SEND_DONT_FRAGMENT: Final = 1 << 7

_DONE: Final = 1
_CHUNK_NONE: Final = 0
_CHUNK_DATA: Final = 1
_CHUNK_HOLE: Final = 2
_CHUNK_STATUS: Final = 5
_CHUNK_ERROR: Final = 1 << 15
_STATE_ZERO: Final = 2

_CONTEXT: Final = b"base:allocation"
_OPTION_REPLY: Final = struct.Struct(">QIII")  # magic, option, type, length
_REQUEST: Final = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
_CHUNK: Final = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length
_STATUS: Final = struct.Struct(">II")  # length, flags
_MOST_ANSWERS: Final = 64
_MOST_STATUS_BYTES: Final = 2 << 20
_MOST_TEXT_BYTES: Final = 8192


class NbdConnection:
    """One connection to the default export of a server; one request at a time, so for one thread at a time.

    `channel` is connected; it belongs to the connection from here on. `where` names the image in errors. `timeout` is
    how many seconds an answer may take. All errors are DeviceUnreadable; after one that leaves the conversation out
    of step, the connection is closed and each later call fails.
    """

    def __init__(self, channel: socket.socket, where: str, timeout: float) -> None:
        self._channel = channel
        self._where = where
        self._timeout = timeout
        self._cookie = 0
        self._deadline = time.monotonic() + timeout
        limit = struct.pack("@ll", int(timeout), int(timeout % 1 * 1_000_000))
        for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            channel.setsockopt(socket.SOL_SOCKET, direction, limit)
        self.hung_up = False
        self.size = self._negotiate()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`, at most 32 MiB (servers refuse more), from `offset`."""
        self._ask(_CMD_READ, _FLAG_DONT_FRAGMENT, offset, len(buffer))
        filled = False
        failure = ""
        for _ in range(_MOST_ANSWERS):
            done, kind, length = self._chunk()
            if kind & _CHUNK_ERROR:
                failure = self._failure(length)
            elif kind == _CHUNK_DATA and not filled and length == 8 + len(buffer):
                self._expect(self._receive(8), struct.pack(">Q", offset), "the offset of the data")
                self._fill(buffer)
                filled = True
            elif kind == _CHUNK_HOLE and not filled and length == 12:
                self._expect(self._receive(12), struct.pack(">QI", offset, len(buffer)), "the range of the hole")
                buffer[:] = bytes(len(buffer))
                filled = True
            elif kind != _CHUNK_NONE or length:
                self._violation(f"a chunk of type {kind} and {length} bytes answers a read of {len(buffer)} bytes")
            if done:
                break
        else:
            self._violation(f"more than {_MOST_ANSWERS} chunks answer one read")
        if failure:
            raise DeviceUnreadable(f"{self._where} cannot be read at byte {offset} of {self.size}: {failure}")
        if not filled:
            self._violation(f"no data answers a read of {len(buffer)} bytes at {offset}")

    def block_status(self, offset: int, length: int) -> list[Extent]:
        """What lies in the range, from `offset` on without gaps: one extent or more, perhaps not all of the range."""
        self._ask(_CMD_BLOCK_STATUS, 0, offset, length)
        found: list[Extent] = []
        failure = ""
        for _ in range(_MOST_ANSWERS):
            done, kind, size = self._chunk()
            if kind & _CHUNK_ERROR:
                failure = self._failure(size)
            elif kind == _CHUNK_STATUS and not found and size >= 12 and size % 8 == 4 and size <= _MOST_STATUS_BYTES:
                found = self._extents(self._receive(size), offset, length)
            elif kind != _CHUNK_NONE or size:
                self._violation(f"a chunk of type {kind} and {size} bytes answers a question for the block status")
            if done:
                break
        else:
            self._violation(f"more than {_MOST_ANSWERS} chunks answer one question for the block status")
        if failure:
            raise DeviceUnreadable(f"the block status of {self._where} at byte {offset} cannot be had: {failure}")
        if not found:
            self._violation("no extents answer a question for the block status")
        return found

    def close(self) -> None:
        """Hang up; a call of another thread that waits for an answer fails."""
        try:
            self._channel.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.EBADF):
                raise
        self._channel.close()

    def _negotiate(self) -> int:
        """Agree on what is used; returns the size of the export in bytes."""
        self._expect(self._receive(8), _SERVER_MAGIC, "the greeting of an NBD server")
        self._expect(self._receive(8), _OPTION_MAGIC, "the newstyle greeting")
        flags = struct.unpack(">H", self._receive(2))[0] & (_FIXED_NEWSTYLE | _NO_ZEROES)
        if not flags & _FIXED_NEWSTYLE:
            self._violation("the server knows no fixed newstyle negotiation")
        self._send(struct.pack(">I", flags))
        self._option(_OPT_STRUCTURED_REPLY, b"")
        # For the export with the empty name, one query.
        answers = self._option(_OPT_SET_META_CONTEXT, struct.pack(">III", 0, 1, len(_CONTEXT)) + _CONTEXT)
        contexts = [data for kind, data in answers if kind == _REP_META_CONTEXT]
        if [context[4:] for context in contexts] != [_CONTEXT]:
            self._violation(f"expected the one metadata context {_CONTEXT.decode()}, found {len(contexts)}")
        self._context = contexts[0][:4]
        answers = self._option(_OPT_GO, struct.pack(">IH", 0, 0))
        exports = [
            struct.unpack_from(">QH", data, 2)
            for kind, data in answers
            if kind == _REP_INFO and len(data) == 12 and data[:2] == struct.pack(">H", _INFO_EXPORT)
        ]
        if len(exports) != 1:
            self._violation(f"expected the size of one export, found {len(exports)}")
        ((size, transmission),) = exports
        if not transmission & _SEND_DONT_FRAGMENT or size >= 1 << 63:
            self._violation(f"expected a size and reads in one piece, found {size} bytes and flags {transmission:#x}")
        return int(size)

    def _option(self, option: int, data: bytes) -> list[tuple[int, bytes]]:
        """Send an option; returns the type and data of each reply before the acknowledgement."""
        self._send(_OPTION_MAGIC + struct.pack(">II", option, len(data)) + data)
        answers: list[tuple[int, bytes]] = []
        while True:
            magic, about, kind, length = _OPTION_REPLY.unpack(self._receive(_OPTION_REPLY.size))
            if magic != _OPTION_REPLY_MAGIC or about != option or length > _MOST_TEXT_BYTES:
                self._violation(f"the answer to option {option} has magic {magic:#x}, option {about}, {length} bytes")
            content = self._receive(length)
            if kind & _REP_ERROR:
                self._violation(f"the server refuses option {option}: {printable(content) or hex(kind)}")
            if kind == _REP_ACK:
                return answers
            answers.append((kind, content))
            if len(answers) == _MOST_ANSWERS:
                self._violation(f"more than {_MOST_ANSWERS} answers to option {option}")

    def _ask(self, command: int, flags: int, offset: int, length: int) -> None:
        self._cookie += 1
        self._deadline = time.monotonic() + self._timeout
        self._send(_REQUEST.pack(_REQUEST_MAGIC, flags, command, self._cookie, offset, length))

    def _chunk(self) -> tuple[bool, int, int]:
        """The head of the next chunk: whether it is the last one, its type, and how many bytes follow."""
        magic, flags, kind, cookie, length = _CHUNK.unpack(self._receive(_CHUNK.size))
        if magic != _REPLY_MAGIC or cookie != self._cookie:
            self._violation(f"a reply has magic {magic:#x} and cookie {cookie}, expected cookie {self._cookie}")
        return bool(flags & _DONE), kind, length

    def _failure(self, length: int) -> str:
        """The content of an error chunk in words."""
        if not 6 <= length <= _MOST_TEXT_BYTES:
            self._violation(f"an error chunk has {length} bytes")
        content = self._receive(length)
        number, size = struct.unpack_from(">IH", content)
        said = printable(content[6 : 6 + size])
        name = os.strerror(min(number, 4095))  # the kernel's own bound of such numbers
        return f"{name} ({said})" if said else name

    def _extents(self, content: bytes, offset: int, length: int) -> list[Extent]:
        self._expect(content[:4], self._context, "the metadata context")
        found: list[Extent] = []
        end = offset + length
        for size, flags in _STATUS.iter_unpack(content[4:]):
            if not size or offset >= end:
                self._violation(f"an extent of {size} bytes at {offset} in a range that ends at {end}")
            # The last one may reach further than was asked.
            found.append(Extent(offset, min(size, end - offset), zero=bool(flags & _STATE_ZERO)))
            offset += size
        return found

    def _expect(self, found: bytes, expected: bytes, what: str) -> None:
        if found != expected:
            self._violation(f"expected {what}, found {found.hex()}")

    def _send(self, content: bytes) -> None:
        try:
            self._channel.sendall(content)
        except OSError as error:
            self._lost(error)

    def _receive(self, length: int) -> bytes:
        content = bytearray(length)
        self._fill(memoryview(content))
        return bytes(content)

    def _fill(self, buffer: memoryview) -> None:
        while buffer:
            try:
                count = self._channel.recv_into(buffer, 0, socket.MSG_WAITALL)
            except OSError as error:
                self._lost(error)
            if not count:
                self._lost(ConnectionResetError())
            buffer = buffer[count:]
            if (
                buffer and time.monotonic() > self._deadline
            ):  # a server that trickles never runs into the receive's limit
                self._lost(BlockingIOError())

    def _lost(self, error: OSError) -> NoReturn:
        self.close()
        if isinstance(error, BlockingIOError):
            raise DeviceUnreadable(
                f"{self._where} cannot be read: its NBD server gave no answer within {self._timeout:g} s"
            ) from None
        self.hung_up = True
        raise DeviceUnreadable(f"{self._where} cannot be read: its NBD server hung up") from None

    def _violation(self, what: str) -> NoReturn:
        self.close()
        raise DeviceUnreadable(f"{self._where} cannot be read: its NBD server breaks the protocol: {what}")


def printable(content: bytes) -> str:
    """Text of a server that is not trusted, fit for a message."""
    return "".join(letter for letter in content.decode(errors="replace")[:300] if letter.isprintable())
