"""Downloads from a server on 127.0.0.1 that behaves in every bad way."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from csi_driver.images.checksum import Algorithm, Checksum, checksum_of
from csi_driver.images.destinations import Connector, Patience, SocketAddress, parse_url
from csi_driver.images.fetch import Fetched, FetchProgress, fetch
from csi_driver.model.errors import (
    CommandFailed,
    DriverError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    VolumeBusy,
)
from tests.image_server import Answer, Handler, ImageServer, chunked, cut, raw, serving, sha512, status
from tests.small_folder import in_a_small_folder

MIB = 1 << 20
CONTENT = b"".join(hashlib.sha512(b"%d" % number).digest() for number in range(10_000)) + b"odd"
LOCAL = Connector(allow_local=True)
HASTY = Connector(allow_local=True, patience=Patience(stall_seconds=0.2, stall_bytes=1000))


def get(
    server: ImageServer,
    path: Path,
    *,
    most_bytes: int = 4 * MIB,
    connector: Connector = LOCAL,
    expected: str | None = None,
    progress: FetchProgress = lambda _done, _total: None,
    retries: int = 3,
    at: str = "/image",
) -> Fetched:
    checksum = Checksum.parse(expected) if expected else None
    return fetch(
        server.url(at),
        path,
        most_bytes,
        connector,
        expected=checksum,
        progress=progress,
        retries=retries,
        backoff_seconds=0,
    )


def ranges(server: ImageServer) -> list[str | None]:
    return [request.get("range") for request in server.requests]


def test_an_image_comes_whole_with_its_checksum_and_nothing_beside_it(tmp_path: Path) -> None:
    steps: list[tuple[int, int | None]] = []
    with serving(CONTENT) as server:
        fetched = get(server, tmp_path / "a.img", progress=lambda done, total: steps.append((done, total)))
    assert fetched == Fetched(len(CONTENT), Checksum(Algorithm.SHA512, sha512(CONTENT)))
    assert (tmp_path / "a.img").read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["a.img"]
    assert (tmp_path / "a.img").stat().st_mode & 0o777 == 0o600
    assert steps == sorted(steps)
    assert steps[0] == (0, len(CONTENT))
    assert steps[-1] == (len(CONTENT), len(CONTENT))
    assert server.requests[0]["accept-encoding"] == "identity"
    assert server.requests[0]["host"] == f"127.0.0.1:{server.port}"


@pytest.mark.parametrize("prefix", ["", "sha512:", "SHA512:"])
def test_the_checksum_that_longhorn_writes_is_held_against_the_bytes(tmp_path: Path, prefix: str) -> None:
    with serving(CONTENT) as server:
        get(server, tmp_path / "good", expected=prefix + sha512(CONTENT).upper().lower())
        with pytest.raises(InvalidArgument, match=r"/image has the checksum sha512:[0-9a-f]{128}, expected sha512:"):
            get(server, tmp_path / "bad", expected=prefix + sha512(CONTENT + b"x"))
    assert os.listdir(tmp_path) == ["good"]
    assert len(server.requests) == 2, "a wrong checksum does not pass by trying again"


def test_a_connection_that_drops_three_times_goes_on_where_it_was(tmp_path: Path) -> None:
    with serving(CONTENT) as server:
        server.answers = [cut(1000), cut(300_000), cut(0)]
        fetched = get(server, tmp_path / "a.img", expected=sha512(CONTENT))
    assert (tmp_path / "a.img").read_bytes() == CONTENT
    assert fetched.size == len(CONTENT)
    assert ranges(server) == [None, "bytes=1000-", "bytes=301000-", "bytes=301000-"]


def test_after_the_last_retry_the_part_stays_and_the_next_call_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    with serving(CONTENT) as server:
        server.answers = [cut(1000), cut(1000)]
        with pytest.raises(Unavailable, match=r"failed 2 times, the last time as .* 2000 bytes are kept"):
            get(server, path, retries=1)
        assert sorted(os.listdir(tmp_path)) == ["a.img.part", "a.img.part.json"]
        get(server, path, expected=sha512(CONTENT))
    assert ranges(server)[2:] == ["bytes=2000-"]
    assert path.read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["a.img"]


def test_retries_wait_for_the_back_off_and_are_told(tmp_path: Path) -> None:
    told: list[str] = []
    with serving(CONTENT) as server:
        server.answers = [status(503), status(500)]
        started = time.monotonic()
        fetch(server.url("/a?signature=x"), tmp_path / "a", 4 * MIB, LOCAL, backoff_seconds=0.1, warn=told.append)
        assert time.monotonic() - started >= 0.2
        assert told == [
            f"the download of {server.url('/a')} failed as the server answered with status {code}; it is tried again "
            f"in 0.1 s"
            for code in (503, 500)
        ]
    assert len(server.requests) == 3


def test_a_part_of_another_url_is_not_taken_up(tmp_path: Path) -> None:
    with serving(CONTENT) as server:
        server.answers = [cut(1000)]
        with pytest.raises(Unavailable):
            get(server, tmp_path / "a.img", retries=0, at="/old?token=1")
        get(server, tmp_path / "a.img", at="/old?token=2")
    assert ranges(server) == [None, None]
    assert (tmp_path / "a.img").read_bytes() == CONTENT


@pytest.mark.parametrize("broken", [b"", b"{", b'{"received": 3}', b'{"source":"\xc7"}', b"\xff\x00", b"[]"])
def test_a_part_without_a_readable_record_starts_anew(tmp_path: Path, broken: bytes) -> None:
    (tmp_path / "a.img.part").write_bytes(b"something")
    (tmp_path / "a.img.part.json").write_bytes(broken)
    with serving(CONTENT) as server:
        get(server, tmp_path / "a.img")
    assert (tmp_path / "a.img").read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["a.img"]


def test_only_what_is_recorded_as_durable_of_a_part_is_believed(tmp_path: Path) -> None:
    path, part = tmp_path / "a.img", tmp_path / "a.img.part"
    with serving(CONTENT) as server:
        server.answers = [cut(5000)]
        with pytest.raises(Unavailable):
            get(server, path, retries=0)
        part.write_bytes(CONTENT[:5000] + bytes(3000))  # longer than the record says: as after a power cut
        get(server, path)
        assert path.read_bytes() == CONTENT
        server.answers = [cut(5000)]
        with pytest.raises(Unavailable):
            get(server, path, retries=0)
        part.write_bytes(CONTENT[:4999])  # shorter
        get(server, path)
        assert path.read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=5000-", None, None]


def test_a_part_that_is_complete_needs_no_server(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    with serving(CONTENT) as server:
        server.answers = [cut(5000)]
        with pytest.raises(Unavailable):
            get(server, path, retries=0)
        record = json.loads((tmp_path / "a.img.part.json").read_bytes())
        (tmp_path / "a.img.part").write_bytes(CONTENT)
        (tmp_path / "a.img.part.json").write_text(json.dumps({**record, "received": len(CONTENT)}))
        with pytest.raises(InvalidArgument, match=r"at most 10 bytes are allowed"):
            get(server, tmp_path / "a.img", most_bytes=10)
        assert os.listdir(tmp_path) == []
        (tmp_path / "a.img.part").write_bytes(CONTENT)
        (tmp_path / "a.img.part.json").write_text(json.dumps({**record, "received": len(CONTENT)}))
        get(server, path, expected=sha512(CONTENT))
    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_killed_download_goes_on_from_what_was_durable(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    content = bytes(65 * MIB) + CONTENT
    fetching = f"""
from pathlib import Path
from csi_driver.images.destinations import Connector
from csi_driver.images.fetch import fetch
import sys
fetch(sys.argv[1], Path({str(path)!r}), 1 << 30, Connector(allow_local=True))
"""
    with serving(content) as server:

        def stall(handler: Handler) -> None:
            handler.head(200, Content_Length=len(content), ETag=server.etag)
            handler.wfile.write(content[:-1])
            server.ended.wait()

        server.answers = [stall]
        with subprocess.Popen([sys.executable, "-c", fetching, server.url()]) as child:
            deadline = time.monotonic() + 30
            while not (tmp_path / "a.img.part.json").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            child.send_signal(signal.SIGKILL)
        assert not path.exists()
        get(server, path, most_bytes=1 << 30, expected=hashlib.sha256(content).hexdigest())
        first, second = ranges(server)
    assert first is None
    assert second is not None
    assert 64 * MIB <= int(second.removeprefix("bytes=").removesuffix("-")) < 66 * MIB
    assert os.listdir(tmp_path) == ["a.img"]
    assert path.stat().st_size == len(content)


def test_a_server_that_ignores_range_starts_anew(tmp_path: Path) -> None:
    def whole(handler: Handler) -> None:
        handler.head(200, Content_Length=len(CONTENT), ETag=handler.server.etag)
        handler.wfile.write(CONTENT)

    with serving(CONTENT) as server:
        server.answers = [cut(5000), whole]
        get(server, tmp_path / "a.img", expected=sha512(CONTENT))
    assert ranges(server) == [None, "bytes=5000-"]
    assert (tmp_path / "a.img").read_bytes() == CONTENT


@pytest.mark.parametrize("honest", [True, False])
def test_an_image_that_changed_meanwhile_starts_anew(tmp_path: Path, *, honest: bool) -> None:
    new = CONTENT[::-1]

    def change(handler: Handler) -> None:
        handler.server.etag = '"2"'
        handler.server.content = new
        if honest:  # If-Range does not fit: the whole file
            handler.head(200, Content_Length=len(new), ETag='"2"')
            handler.wfile.write(new)
        else:  # goes on with the new file regardless
            span = f"bytes 5000-{len(new) - 1}/{len(new)}"
            handler.head(206, Content_Length=len(new) - 5000, Content_Range=span, ETag='"2"')
            handler.wfile.write(new[5000:])

    with serving(CONTENT) as server:
        server.answers = [cut(5000), change]
        get(server, tmp_path / "a.img")
    assert (tmp_path / "a.img").read_bytes() == new
    assert ranges(server) == [None, "bytes=5000-"] if honest else [None, "bytes=5000-", None]


def test_a_server_that_goes_on_without_the_etag_that_was_asked_for_is_not_believed(tmp_path: Path) -> None:
    new = CONTENT[::-1]

    def change(handler: Handler) -> None:
        handler.server.etag, handler.server.content = '"2"', new
        span = f"bytes 5000-{len(new) - 1}/{len(new)}"
        handler.head(206, Content_Length=len(new) - 5000, Content_Range=span)
        handler.wfile.write(new[5000:])

    with serving(CONTENT) as server:
        server.answers = [cut(5000), change]
        get(server, tmp_path / "a.img")
    assert (tmp_path / "a.img").read_bytes() == new


def test_nothing_of_a_longer_part_stays_behind_a_shorter_image(tmp_path: Path) -> None:
    def shrink(handler: Handler) -> None:
        handler.head(200, Content_Length=1000, ETag='"2"')
        handler.wfile.write(bytes(1000))

    with serving(CONTENT) as server:
        server.answers = [cut(5000), shrink]
        get(server, tmp_path / "a.img")
    assert (tmp_path / "a.img").read_bytes() == bytes(1000)


@pytest.mark.parametrize(
    "span",
    [
        "bytes 4000-{last}/{size}",
        "bytes 5000-{last}/9999999",
        "bytes 5000-4999/{size}",
        "bytes 5000-6000/{size}",
        "bytes */{size}",
        "nonsense",
    ],
)
def test_a_range_that_does_not_fit_starts_anew(tmp_path: Path, span: str) -> None:
    def lie(handler: Handler) -> None:
        told = span.format(last=len(CONTENT) - 1, size=len(CONTENT))
        handler.head(206, Content_Length=len(CONTENT) - 5000, Content_Range=told, ETag=handler.server.etag)
        handler.wfile.write(bytes(len(CONTENT) - 5000))

    with serving(CONTENT) as server:
        server.answers = [cut(5000), lie]
        get(server, tmp_path / "a.img")
    assert (tmp_path / "a.img").read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=5000-", None]


def test_a_range_that_is_served_in_pieces_is_put_together(tmp_path: Path) -> None:
    def piece(handler: Handler) -> None:
        span = f"bytes 5000-9999/{len(CONTENT)}"
        handler.head(206, Content_Length=5000, Content_Range=span, ETag=handler.server.etag)
        handler.wfile.write(CONTENT[5000:10000])

    with serving(CONTENT) as server:
        server.answers = [cut(5000), piece]
        get(server, tmp_path / "a.img", expected=sha512(CONTENT))
    assert ranges(server) == [None, "bytes=5000-", "bytes=10000-"]


def test_a_server_whose_file_became_shorter_starts_anew(tmp_path: Path) -> None:
    with serving(CONTENT) as server:
        server.answers = [cut(5000), status(416)]
        get(server, tmp_path / "a.img", expected=sha512(CONTENT))
    assert ranges(server) == [None, "bytes=5000-", None]


DATE = "Fri, 14 Nov 2025 10:00:{:02} GMT"


@pytest.mark.parametrize(
    ("fields", "resumed"),
    [
        ({"Date": DATE.format(9), "Last_Modified": DATE.format(8)}, DATE.format(8)),
        ({"Date": DATE.format(9), "Last_Modified": DATE.format(9)}, None),  # may have changed in that second
        ({"Last_Modified": DATE.format(8)}, None),
        ({"Date": DATE.format(9), "Last_Modified": "yesterday"}, None),
        ({"ETag": 'W/"1"'}, None),
        ({"ETag": '"1"', "Date": DATE.format(9), "Last_Modified": DATE.format(8)}, '"1"'),
        ({}, None),
    ],
)
def test_only_what_proves_the_same_file_is_used_to_go_on(
    tmp_path: Path, fields: dict[str, str], resumed: str | None
) -> None:
    def dated(handler: Handler) -> None:
        handler.send_response_only(200)
        handler.send_header("Content-Length", str(len(CONTENT)))
        for name, value in fields.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(CONTENT[:5000])

    with serving(CONTENT) as server:
        server.answers = [dated]
        get(server, tmp_path / "a.img", expected=sha512(CONTENT))
    assert server.requests[1].get("if-range") == resumed
    assert server.requests[1].get("range") == (resumed and "bytes=5000-")


def test_without_a_proof_nothing_is_kept(tmp_path: Path) -> None:
    with serving(CONTENT) as server:
        server.etag = ""
        server.answers = [cut(5000)]
        with pytest.raises(Unavailable, match=r"nothing is kept"):
            get(server, tmp_path / "a.img", retries=0)
    assert os.listdir(tmp_path) == []


def test_too_little_is_never_taken_for_the_image(tmp_path: Path) -> None:
    with serving(CONTENT) as server:
        server.answers = [cut(len(CONTENT) - 1)]
        with pytest.raises(Unavailable, match=rf"ended after {len(CONTENT) - 1} of {len(CONTENT)} bytes"):
            get(server, tmp_path / "a.img", retries=0)
    assert not (tmp_path / "a.img").exists()


def test_too_much_is_refused_before_or_while_it_comes(tmp_path: Path) -> None:
    with serving(CONTENT) as server:
        with pytest.raises(InvalidArgument, match=rf"has {len(CONTENT)} bytes; at most {len(CONTENT) - 1} bytes"):
            get(server, tmp_path / "announced", most_bytes=len(CONTENT) - 1)
        server.answers = [chunked(CONTENT)]
        with pytest.raises(InvalidArgument, match=r"goes on beyond the limit; at most"):
            get(server, tmp_path / "unannounced", most_bytes=len(CONTENT) - 1)
        get(server, tmp_path / "fits", most_bytes=len(CONTENT))
    assert os.listdir(tmp_path) == ["fits"]


def test_bytes_beyond_the_announced_length_are_not_the_image(tmp_path: Path) -> None:
    def generous(handler: Handler) -> None:
        handler.head(200, Content_Length=1000, ETag='"1"')
        handler.wfile.write(CONTENT)

    with serving(CONTENT) as server:
        server.answers = [generous]
        get(server, tmp_path / "a.img")
    assert (tmp_path / "a.img").read_bytes() == CONTENT[:1000]


def test_two_lengths_of_one_answer_are_not_believed(tmp_path: Path) -> None:
    twice = b'HTTP/1.1 200 OK\r\nContent-Length: 1024\r\nContent-Length: %d\r\nETag: "1"\r\n\r\n' % len(CONTENT)
    with serving(CONTENT) as server:
        server.answers = [raw(twice + CONTENT)]
        with pytest.raises(Unavailable, match="contradicts itself about the length of its answer"):
            get(server, tmp_path / "a.img", retries=0)
        assert os.listdir(tmp_path) == []
        get(server, tmp_path / "a.img")
    assert (tmp_path / "a.img").read_bytes() == CONTENT


def test_a_proxy_and_a_redirect_to_nowhere_are_told(tmp_path: Path) -> None:
    with serving(CONTENT) as server:
        server.answers = [status(407), status(302)]
        with pytest.raises(FailedPrecondition, match=r"a proxy in front of .*/image wants to know who asks"):
            get(server, tmp_path / "a.img")
        with pytest.raises(InvalidArgument, match="is redirected with status 302 to nowhere"):
            get(server, tmp_path / "a.img")


def test_chunks_tell_their_end_and_a_cut_is_noticed(tmp_path: Path) -> None:
    with serving(CONTENT) as server:
        server.answers = [chunked(CONTENT)]
        get(server, tmp_path / "whole")
        assert (tmp_path / "whole").read_bytes() == CONTENT
        server.answers = [chunked(CONTENT[:100_000], ended=False)]
        get(server, tmp_path / "cut", expected=sha512(CONTENT))
    assert ranges(server) == [None, None, "bytes=100000-"]


def test_a_transfer_that_ends_with_the_connection_needs_a_checksum(tmp_path: Path) -> None:
    with serving(CONTENT) as server:
        server.answers = [raw(b"HTTP/1.0 200 OK\r\n\r\n" + CONTENT)] * 3
        with pytest.raises(InvalidArgument, match=r"does not say how large .*; give its checksum"):
            get(server, tmp_path / "a.img")
        get(server, tmp_path / "a.img", expected=sha512(CONTENT))
        assert (tmp_path / "a.img").read_bytes() == CONTENT
        server.answers = [raw(b"HTTP/1.0 200 OK\r\n\r\n" + CONTENT[:-1])]
        with pytest.raises(InvalidArgument, match=r"expected sha512"):
            get(server, tmp_path / "b.img", expected=sha512(CONTENT))


def test_an_empty_image_is_refused(tmp_path: Path) -> None:
    with serving() as server, pytest.raises(InvalidArgument, match=r"is empty"):
        get(server, tmp_path / "a.img")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "error", "tries"),
    [
        (404, NotFound, 1),
        (410, NotFound, 1),
        (401, FailedPrecondition, 1),
        (403, FailedPrecondition, 1),
        (407, FailedPrecondition, 1),
        (206, FailedPrecondition, 1),  # nobody asked for a range
        (304, FailedPrecondition, 1),
        (429, Unavailable, 3),
        (503, Unavailable, 3),
    ],
)
def test_refusals_end_at_once_and_failures_are_tried_again(
    tmp_path: Path, code: int, error: type[DriverError], tries: int
) -> None:
    with serving(CONTENT) as server:
        server.answers = [status(code)] * 9
        with pytest.raises(error, match=rf"status {code}"):
            get(server, tmp_path / "a.img", retries=2, at="/image?signature=geheim")
    assert len(server.requests) == tries
    assert os.listdir(tmp_path) == []


def test_a_query_that_may_be_a_credential_is_in_no_error(tmp_path: Path) -> None:
    answers: list[Answer] = [status(404), status(403), cut(5), cut(len(CONTENT)), status(302, Location="/b?x=geheim")]
    with serving(CONTENT) as server:
        for answer in answers:
            server.answers = [answer, status(404)]
            with pytest.raises(DriverError) as caught:
                get(server, tmp_path / "a.img", retries=0, at="/image?sig=geheim", expected=sha512(b""))
            assert "geheim" not in f"{caught.value}{caught.value.__cause__}"
            for left in tmp_path.iterdir():
                assert b"geheim" not in left.read_bytes()
    assert "geheim" not in repr(parse_url("https://host.example/a?sig=geheim"))


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TOO_MUCH = r"sends more than such a response can need"


@pytest.mark.parametrize(
    ("garbage", "told"),
    [
        (b"220 mail.example ESMTP\r\n", r"220 mail\.example"),
        (b"HTTP/1.1 abc\r\n\r\n", r"abc"),
        (b"", r"closed connection"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200, r"100 headers"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 30_000, TOO_MUCH),
        (CHUNKED + b"zz\r\n", r"the transfer broke \(IncompleteRead"),
        (CHUNKED + b"1\r\nx\r\n" * 100_000, TOO_MUCH),
        (CHUNKED + b"5\r\nabcde\r\n0\r\n" + b"trailer: x\r\n" * 100_000, TOO_MUCH),
    ],
    ids=["smtp", "status", "nothing", "fields", "continue", "chunk", "tiny-chunks", "trailers"],
)
def test_what_is_no_http_ends_as_a_failure(tmp_path: Path, garbage: bytes, told: str) -> None:
    with serving() as server:
        server.answers = [raw(garbage)]
        with pytest.raises(Unavailable, match=rf"failed 1 times, the last time as .*{told}.*; nothing is kept"):
            get(server, tmp_path / "a.img", retries=0, most_bytes=128 << 10)


def test_what_the_server_says_cannot_play_with_the_terminal(tmp_path: Path) -> None:
    with serving() as server:
        server.answers = [raw(b"\x1b[2J hello\r\n")]
        with pytest.raises(Unavailable) as caught:
            get(server, tmp_path / "a.img", retries=0)
    assert "\x1b" not in str(caught.value)
    assert "hello" in str(caught.value)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        raw(b"", pause=30),
        raw(HEAD, pause=30),
        raw(*(HEAD[at : at + 1] for at in range(len(HEAD))), pause=0.05),
        raw(HEAD, *[b"x"] * 1000, pause=0.05),
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", *[b"x"] * 1000, pause=0.05),
    ],
    ids=["silent", "silent-body", "dripped-head", "dripped-body", "dripped-chunk"],
)
def test_a_server_that_stalls_or_drips_is_not_waited_for(tmp_path: Path, answer: Answer) -> None:
    with serving() as server:
        server.answers = [answer]
        with pytest.raises(Unavailable, match=r"bytes came in 0\.2 s"):
            get(server, tmp_path / "a.img", connector=HASTY, retries=0)


def test_a_slow_server_that_brings_its_share_is_waited_for(tmp_path: Path) -> None:
    patience = Patience(stall_seconds=2, stall_bytes=1000)  # less than all of it takes
    with serving() as server:
        server.answers = [raw(HEAD, *[bytes(4000)] * 25, pause=0.1)]
        get(server, tmp_path / "a.img", connector=Connector(allow_local=True, patience=patience), retries=0)
    assert (tmp_path / "a.img").stat().st_size == 100_000


def test_a_name_that_is_never_resolved_is_not_waited_for(tmp_path: Path) -> None:
    told = threading.Event()

    def hang(_host: str, _port: int) -> Sequence[SocketAddress]:
        told.wait(60)
        return []

    connector = Connector(patience=Patience(connect_seconds=0.05), resolve=hang)
    with pytest.raises(Unavailable, match=r"images\.example was not resolved in 0\.05 s"):
        fetch("http://images.example/a", tmp_path / "a", MIB, connector, retries=0)
    told.set()


def test_a_port_where_nobody_listens_and_a_name_that_nobody_has_fail(tmp_path: Path) -> None:
    with socket.socket() as idle:
        idle.bind(("127.0.0.1", 0))
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1 could not be connected to .*refused"):
            fetch(f"http://127.0.0.1:{idle.getsockname()[1]}/", tmp_path / "a", MIB, LOCAL, retries=0)
    for connector in (LOCAL, Connector(allow_local=True, resolve=lambda _host, _port: [])):
        with pytest.raises(Unavailable, match=r"could not be connected to"):
            fetch("http://" + "a" * 60 + ".invalid/", tmp_path / "a", MIB, connector, retries=0)
    assert os.listdir(tmp_path) == []


def test_two_downloads_to_one_path_do_not_mix(tmp_path: Path) -> None:
    busy: list[str] = []

    def again(_done: int, _total: int | None) -> None:
        if not busy:
            with pytest.raises(VolumeBusy) as caught:
                get(server, tmp_path / "a.img")
            busy.append(str(caught.value))

    with serving(CONTENT) as server:
        get(server, tmp_path / "a.img", progress=again)
    assert busy == [f"another download to {tmp_path}/a.img.part is at work; call again when it has ended"]
    assert (tmp_path / "a.img").read_bytes() == CONTENT


class Stopped(Exception):
    pass


def test_progress_can_end_a_download_and_the_next_call_goes_on(tmp_path: Path) -> None:
    def stop(done: int, _total: int | None) -> None:
        if done:
            raise Stopped

    with serving(CONTENT) as server:
        with pytest.raises(Stopped):
            get(server, tmp_path / "a.img", progress=stop)
        kept = (tmp_path / "a.img.part").stat().st_size
        get(server, tmp_path / "a.img", expected=sha512(CONTENT))
    assert ranges(server) == [None, f"bytes={kept}-"]
    assert os.listdir(tmp_path) == ["a.img"]


def test_an_image_that_does_not_fit_the_disk_is_refused_before_it_comes(tmp_path: Path) -> None:
    with serving() as server:
        server.answers = [raw(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1 << 59))]
        with pytest.raises(ResourceExhausted, match=rf"needs {1 << 59} bytes on the disk, which has [0-9]+ free"):
            get(server, tmp_path / "a.img", most_bytes=1 << 60)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("looks", [0, 1])
def test_a_download_leaves_room_to_others_also_where_its_length_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    """Two at once, each of which would fit, would fill the disk together."""
    rooms = iter([*[len(CONTENT) + MIB] * looks, len(CONTENT) - 1, 0])

    def room(_: int) -> SimpleNamespace:
        return SimpleNamespace(f_bavail=next(rooms, 0), f_frsize=1, f_blocks=20 * MIB)  # of which 1 MiB is kept

    monkeypatch.setattr("csi_driver.images.room.os", SimpleNamespace(fstatvfs=room))
    with (
        serving(CONTENT) as server,
        pytest.raises(ResourceExhausted, match=r"kept for what else (is there|is on the disk)"),
    ):
        get(server, tmp_path / "a.img")


def test_a_disk_that_fills_up_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    fetching = """
import os, sys
from pathlib import Path
from csi_driver.images.destinations import Connector
from csi_driver.images.fetch import fetch
from csi_driver.model.errors import ResourceExhausted
try:
    fetch(sys.argv[1], Path("a"), 1 << 30, Connector(allow_local=True))
except ResourceExhausted as error:
    print(error, os.listdir())
"""
    with serving(CONTENT) as server:
        server.answers = [chunked(CONTENT)]  # so that the size is not known before
        told = in_a_small_folder(tmp_path, fetching, server.url())
    assert re.fullmatch(r"no space is left for the download to a after 2[0-9]{5} bytes; make room \[\]\n", told)


def test_a_disk_that_cannot_be_written_is_told_and_not_tried_again(tmp_path: Path) -> None:
    with serving(CONTENT) as server:
        with pytest.raises(CommandFailed, match=r"could not be begun: No such file or directory"):
            get(server, tmp_path / "absent" / "a.img")
        (tmp_path / "target").mkdir()
        with pytest.raises(CommandFailed, match=r"could not be written: Is a directory"):
            get(server, tmp_path / "target")
        (tmp_path / "link.part").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CommandFailed, match=r"could not be begun: Too many levels of symbolic links"):
            get(server, tmp_path / "link")
    assert len(server.requests) == 1
    assert not (tmp_path / "elsewhere").exists()


# Checksums.


@pytest.mark.parametrize(
    "text",
    [
        *("", "sha512:", "sha256:" + "a" * 128, "sha512:" + "a" * 64, "md5:" + "a" * 32, "a" * 40, "g" * 64),
        *("a" * 63, "a" * 129, "sha-256:" + "a" * 64, "é" * 64),
    ],
)
def test_what_is_no_checksum_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"a checksum of [0-9]+ characters is not one"):
        Checksum.parse(text)


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_a_local_file_is_checked_too(tmp_path: Path, algorithm: Algorithm) -> None:
    path = tmp_path / "local.img"
    path.write_bytes(CONTENT)
    steps: list[int] = []
    with path.open("rb") as opened:
        found = checksum_of(opened.fileno(), algorithm, steps.append)
    assert str(found) == f"{algorithm}:{hashlib.new(algorithm, CONTENT).hexdigest()}"
    assert steps[-1] == len(CONTENT)
    for text in (str(found), found.digest, f" {found.digest.upper()}\n"):
        Checksum.parse(text).require(found, "local.img")
    with pytest.raises(InvalidArgument, match=rf"^local\.img has the checksum {algorithm}:"):
        Checksum.parse("0" * len(found.digest)).require(found, "local.img")
