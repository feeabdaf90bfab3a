"""The NBD client against a server that keeps to the protocol, and against ones that do not."""

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from csi_driver.images.base import Extent
from csi_driver.images.nbd import NbdConnection
from csi_driver.model.errors import DeviceUnreadable

WHERE = "image a"
CONTENT = random.Random(1).randbytes(1 << 16)
GREETING = b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3)
REPLY_MAGIC = 0x0003E889045565A9
DATA, HOLE, STATUS, ERROR, ERROR_OFFSET = 1, 2, 5, 0x8001, 0x8002
CONTEXT = 7


Answer = Callable[[int, int, int], bytes]
"""From cookie, offset and length of a request to the bytes of the reply."""


def chunk(cookie: int, kind: int, content: bytes, *, done: bool = True, magic: int = 0x668E33EF) -> bytes:
    return struct.pack(">IHHQI", magic, int(done), kind, cookie, len(content)) + content


def good_option(option: int, data: bytes) -> list[tuple[int, bytes]]:
    if option == 8:
        assert data == b""
        return [(1, b"")]
    if option == 10:
        assert data == struct.pack(">III", 0, 1, 15) + b"base:allocation"
        return [(4, struct.pack(">I", CONTEXT) + b"base:allocation"), (1, b"")]
    assert (option, data) == (7, struct.pack(">IH", 0, 0))
    block_sizes = (3, struct.pack(">HIII", 3, 1, 4096, 1))
    return [block_sizes, *export(len(CONTENT), 1 | 1 << 1 | 1 << 7)]


def good_read(cookie: int, offset: int, length: int) -> bytes:
    return chunk(cookie, DATA, struct.pack(">Q", offset) + CONTENT[offset : offset + length])


def good_status(cookie: int, offset: int, length: int) -> bytes:
    assert offset == 0
    return chunk(cookie, STATUS, struct.pack(">IIIII", CONTEXT, 4096, 0, length, 3))


def export(size: int, flags: int) -> list[tuple[int, bytes]]:
    return [(3, struct.pack(">HQH", 0, size, flags)), (1, b"")]


class Server:
    """An NBD server for one connection, over CONTENT; a test may replace each of its answers."""

    def __init__(self) -> None:
        self.channel, self.client = socket.socketpair()
        self.channel.settimeout(5)
        self.thread = threading.Thread(target=self._run)
        self.greeting = GREETING
        self.option_answers = good_option
        self.read_answer: Answer = good_read
        self.status_answer: Answer = good_status
        self.failure: BaseException | None = None

    def _run(self) -> None:
        try:
            with self.channel, contextlib.suppress(ConnectionError, TimeoutError):
                self._serve()
        except BaseException as error:  # noqa: BLE001 -- given to the test's thread
            self.failure = error

    def _serve(self) -> None:
        self.channel.sendall(self.greeting)
        assert self._receive(4) == struct.pack(">I", 3)
        option = 0
        while option != 7:
            magic, option, length = struct.unpack(">8sII", self._receive(16))
            assert magic == b"IHAVEOPT"
            for kind, data in self.option_answers(option, self._receive(length)):
                self.channel.sendall(struct.pack(">QIII", REPLY_MAGIC, option, kind, len(data)) + data)
        while True:
            magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", self._receive(28))
            assert (magic, flags) == (0x25609513, 4 if command == 0 else 0)
            self.channel.sendall((self.read_answer if command == 0 else self.status_answer)(cookie, offset, length))

    def _receive(self, length: int) -> bytes:
        content = b""
        while len(content) < length:
            piece = self.channel.recv(length - len(content))
            if not piece:
                raise ConnectionResetError
            content += piece
        return content


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    server.thread.start()
    try:
        yield server
    finally:
        with contextlib.suppress(OSError):
            server.client.shutdown(socket.SHUT_RDWR)
        server.client.close()
        server.thread.join(10)
    if server.failure:
        raise server.failure


def connected(server: Server, timeout: float = 5) -> NbdConnection:
    return NbdConnection(server.client, WHERE, timeout)


def read(connection: NbdConnection, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    connection.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def test_reads_and_block_status_follow_each_other_on_one_connection() -> None:
    with serving(Server()) as server:
        connection = connected(server)
        assert connection.size == len(CONTENT)
        assert read(connection, 100, 5000) == CONTENT[100:5100]
        assert connection.block_status(0, 65536) == [Extent(0, 4096, zero=False), Extent(4096, 61440, zero=True)]
        assert read(connection, 0, len(CONTENT)) == CONTENT


def test_a_hole_is_zeros_in_a_buffer_that_held_something() -> None:
    server = Server()
    server.read_answer = lambda cookie, offset, length: chunk(cookie, HOLE, struct.pack(">QI", offset, length))
    with serving(server):
        buffer = bytearray(b"x" * 512)
        connected(server).read_into(0, memoryview(buffer))
        assert buffer == bytes(512)


def test_data_may_come_before_a_last_chunk_without_content() -> None:
    server = Server()
    server.read_answer = lambda cookie, offset, length: (
        chunk(cookie, DATA, struct.pack(">Q", offset) + CONTENT[:length], done=False) + chunk(cookie, 0, b"")
    )
    with serving(server):
        assert read(connected(server), 0, 512) == CONTENT[:512]


def test_a_read_error_of_the_server_is_told_and_the_connection_goes_on() -> None:
    server = Server()
    good = server.read_answer

    def bad(cookie: int, offset: int, length: int) -> bytes:
        if offset != 512:
            return good(cookie, offset, length)
        return chunk(cookie, ERROR_OFFSET, struct.pack(">IH4sQ", 5, 4, b"ba\nd", offset))

    server.read_answer = bad
    with serving(server):
        connection = connected(server)
        with pytest.raises(DeviceUnreadable, match=r"image a cannot be read at byte 512 of 65536: Input/output error"):
            read(connection, 512, 512)
        assert not connection.hung_up
        assert read(connection, 0, 512) == CONTENT[:512]


def test_an_error_of_the_block_status_is_told() -> None:
    server = Server()
    server.status_answer = lambda cookie, *_: chunk(cookie, ERROR, struct.pack(">IH", 0xFFFFFFFF, 0))
    with serving(server), pytest.raises(DeviceUnreadable, match="the block status of image a at byte 0 cannot be had"):
        connected(server).block_status(0, 512)


def test_the_last_extent_is_cut_to_what_was_asked() -> None:
    server = Server()
    server.status_answer = lambda cookie, *_: chunk(cookie, STATUS, struct.pack(">III", CONTEXT, 1 << 30, 2))
    with serving(server):
        assert connected(server).block_status(512, 1024) == [Extent(512, 1024, zero=True)]


AT_ZERO = bytes(8)
READS: dict[str, tuple[bytes, str]] = {
    # Answers to the first request, for 512 bytes at offset 0.
    "another magic": (chunk(1, DATA, AT_ZERO + bytes(512), magic=0x67446698), "magic 0x67446698"),
    "another cookie": (chunk(2, DATA, AT_ZERO + bytes(512)), "expected cookie 1"),
    "too much data": (chunk(1, DATA, AT_ZERO + bytes(513)), "type 1 and 521 bytes answers a read of 512"),
    "too little data": (chunk(1, DATA, AT_ZERO + bytes(511)), "type 1 and 519 bytes"),
    "another offset": (chunk(1, DATA, struct.pack(">Q", 1) + bytes(512)), "the offset of the data"),
    "a hole of another length": (chunk(1, HOLE, struct.pack(">QI", 0, 513)), "the range of the hole"),
    "data twice": (2 * chunk(1, DATA, AT_ZERO + bytes(512), done=False), "type 1 and 520 bytes"),
    "no data": (chunk(1, 0, b""), "no data answers a read of 512 bytes"),
    "a status": (chunk(1, STATUS, bytes(12)), "type 5"),
    "content in the chunk without": (chunk(1, 0, b"x"), "type 0 and 1 bytes"),
    "empty chunks without end": (65 * chunk(1, 0, b"", done=False), "more than 64 chunks"),
    "an error of two bytes": (chunk(1, ERROR, b"xx"), "an error chunk has 2 bytes"),
    "a huge error": (chunk(1, ERROR, bytes(8193)), "an error chunk has 8193 bytes"),
    "silence": (b"", r"gave no answer within 0\.2 s"),
}


@pytest.mark.parametrize("name", READS)
def test_a_reply_that_breaks_the_protocol_ends_the_connection(name: str) -> None:
    answer, sentence = READS[name]
    server = Server()
    server.read_answer = lambda *_: answer
    with serving(server):
        connection = connected(server, 0.2)
        with pytest.raises(DeviceUnreadable, match=sentence):
            read(connection, 0, 512)
        with pytest.raises(DeviceUnreadable, match="hung up"):
            read(connection, 0, 512)


STATUSES: dict[str, tuple[bytes, str]] = {
    "another context": (struct.pack(">III", CONTEXT + 1, 512, 0), "expected the metadata context"),
    "an empty extent": (struct.pack(">III", CONTEXT, 0, 0), "an extent of 0 bytes"),
    "an extent behind the range": (struct.pack(">IIIII", CONTEXT, 512, 0, 1, 0), "an extent of 1 bytes at 512"),
    "half an extent": (struct.pack(">IIII", CONTEXT, 512, 0, 1), "a chunk of type 5 and 16 bytes"),
    "no extent": (struct.pack(">I", CONTEXT), "a chunk of type 5 and 4 bytes"),
    "more extents than memory should hold": (bytes((2 << 20) + 4), "a chunk of type 5 and 2097156 bytes"),
}


@pytest.mark.parametrize("name", STATUSES)
def test_a_block_status_that_breaks_the_protocol_ends_the_connection(name: str) -> None:
    content, sentence = STATUSES[name]
    server = Server()
    server.status_answer = lambda cookie, *_: chunk(cookie, STATUS, content)
    with serving(server):
        connection = connected(server)
        with pytest.raises(DeviceUnreadable, match=sentence):
            connection.block_status(0, 512)
        with pytest.raises(DeviceUnreadable, match="hung up"):
            connection.block_status(0, 512)


@pytest.mark.parametrize(
    ("greeting", "sentence"),
    [
        (b"HTTP/1.1 200 OK\r\n", "the greeting of an NBD server"),
        (b"NBDMAGIC" + bytes.fromhex("00420281861253") + b"x" * 8, "the newstyle greeting"),
        (b"NBDMAGICIHAVEOPT" + struct.pack(">H", 2), "no fixed newstyle"),
    ],
)
def test_a_greeting_of_another_kind_is_refused(greeting: bytes, sentence: str) -> None:
    server = Server()
    server.greeting = greeting
    with serving(server), pytest.raises(DeviceUnreadable, match=sentence):
        connected(server)


OPTIONS: dict[str, tuple[int, list[tuple[int, bytes]], str]] = {
    "no structured replies": (8, [(0x80000001, b"not \x1b[31mtoday")], r"refuses option 8: not \[31mtoday"),
    "no context": (10, [(1, b"")], "expected the one metadata context base:allocation, found 0"),
    "another context": (10, [(4, struct.pack(">I", 1) + b"qemu:x"), (1, b"")], "expected the one metadata context"),
    "no size": (7, [(1, b"")], "expected the size of one export, found 0"),
    "two sizes": (7, export(1, 1 << 7)[:1] + export(2, 1 << 7), "expected the size of one export, found 2"),
    "a negative size": (7, export(1 << 63, 1 << 7), "found 9223372036854775808 bytes"),
    "reads in pieces": (7, export(1, 1), "reads in one piece"),
    "a long answer": (7, [(3, bytes(8193))], "8193 bytes"),
    "answers without end": (7, [(3, b"")] * 64, "more than 64 answers"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_negotiation_that_does_not_fit_is_refused(name: str) -> None:
    about, answers, sentence = OPTIONS[name]
    server = Server()
    good = server.option_answers
    server.option_answers = lambda option, data: answers if option == about else good(option, data)
    with serving(server), pytest.raises(DeviceUnreadable, match=sentence):
        connected(server)


def test_a_server_that_trickles_is_given_up() -> None:
    server = Server()
    stop = threading.Event()

    def trickle(cookie: int, offset: int, length: int) -> bytes:
        server.channel.sendall(chunk(cookie, DATA, struct.pack(">Q", offset) + bytes(length))[:28])
        while not stop.wait(0.05):
            server.channel.sendall(b"x")
        return b""

    server.read_answer = trickle
    with serving(server):
        connection = connected(server, 0.3)
        began = time.monotonic()
        with pytest.raises(DeviceUnreadable, match=r"no answer within 0\.3 s"):
            read(connection, 0, 4096)
        assert time.monotonic() - began < 3
        stop.set()


def test_closing_wakes_a_thread_that_waits_for_an_answer() -> None:
    server = Server()
    asked = threading.Event()

    def never(*_: int) -> bytes:
        asked.set()
        return b""

    server.read_answer = never
    with serving(server):
        connection = connected(server, 30)
        failures: list[str] = []

        def wait() -> None:
            try:
                read(connection, 0, 512)
            except DeviceUnreadable as error:
                failures.append(str(error))

        thread = threading.Thread(target=wait)
        thread.start()
        assert asked.wait(5)
        connection.close()
        thread.join(5)
        assert failures == ["image a cannot be read: its NBD server hung up"]
        assert connection.hung_up
        connection.close()


def test_random_bytes_of_a_server_end_in_our_error_only() -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(50):
        server = Server()
        server.read_answer = lambda cookie, *_: chunk(
            cookie,
            draw.choice((0, DATA, HOLE, STATUS, ERROR)),
            draw.randbytes(draw.randrange(40)),
            done=draw.random() < 0.5,
        )
        with serving(server):
            connection = connected(server, 0.05)
            with pytest.raises(DeviceUnreadable):
                read(connection, 0, 512)
