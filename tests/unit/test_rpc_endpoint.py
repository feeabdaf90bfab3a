"""The server's socket: private from the first moment, never taken from a server that lives, taken from a dead one."""

import fcntl
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from csi_driver.model.errors import DeviceInUse, FailedPrecondition, InvalidArgument
from csi_driver.rpc.endpoint import Endpoint, address_of, endpoint_path, host_and_port

Listen = Callable[[Path], None]


@pytest.fixture
def listen() -> Iterator[Listen]:
    with ExitStack() as sockets:

        def listen_at(path: Path) -> None:
            server = sockets.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(str(path))
            server.listen(1)

        yield listen_at


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(5)
        try:
            peer.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_only_root_may_connect_from_the_first_moment_on(tmp_path: Path, listen: Listen) -> None:
    path, modes = tmp_path / "deep" / "csi.sock", []

    def watched(place: Path) -> None:
        assert not path.exists()
        listen(place)
        modes.append(mode(place))

    before = os.umask(0)
    try:
        Endpoint(path).place(watched)
        mask = os.umask(0)
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert mode(path) == 0o600
    assert mask == 0
    assert answers(path)
    assert os.listdir(path.parent) == ["csi.sock"]


def test_a_socket_on_which_nobody_answers_is_replaced(tmp_path: Path, listen: Listen) -> None:
    path = tmp_path / "csi.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    (tmp_path / ".csi.sock.new").touch()  # what a server leaves that was killed while it started
    Endpoint(path).place(listen)
    assert answers(path)


def test_a_socket_on_which_somebody_answers_is_left_alone(tmp_path: Path, listen: Listen) -> None:
    path = tmp_path / "csi.sock"
    listen(path)
    before = path.lstat().st_ino
    with pytest.raises(DeviceInUse, match=r"another server answers on the endpoint .*csi\.sock"):
        Endpoint(path).place(listen)
    assert path.lstat().st_ino == before
    assert answers(path)


def test_a_server_that_hangs_with_a_full_queue_counts_as_answering(tmp_path: Path, listen: Listen) -> None:
    path = tmp_path / "csi.sock"
    with ExitStack() as peers:
        server = peers.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(str(path))
        server.listen(0)
        for _ in range(8):
            peer = peers.enter_context(socket.socket(socket.AF_UNIX))
            peer.setblocking(False)
            if peer.connect_ex(str(path)) != 0:
                break
        with pytest.raises(DeviceInUse):
            Endpoint(path).place(listen)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path, listen: Listen) -> None:
    path = tmp_path / "csi.sock"
    path.write_text("precious")
    with pytest.raises(FailedPrecondition, match="is no socket"):
        Endpoint(path).place(listen)
    assert path.read_text() == "precious"


def test_a_folder_that_cannot_be_made_is_told_in_a_sentence(tmp_path: Path, listen: Listen) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FailedPrecondition, match="cannot be made"):
        Endpoint(tmp_path / "file" / "csi.sock").place(listen)


def test_two_servers_that_start_at_once_do_not_replace_each_other(tmp_path: Path, listen: Listen) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(DeviceInUse, match="just starting"):
            Endpoint(tmp_path / "csi.sock", 0).place(listen)
    finally:
        os.close(descriptor)


def test_a_server_that_is_just_starting_there_is_waited_for(tmp_path: Path, listen: Listen) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    starting = threading.Timer(0.2, os.close, [descriptor])
    starting.start()
    Endpoint(tmp_path / "csi.sock").place(listen)
    starting.join()
    assert answers(tmp_path / "csi.sock")


def test_remove_takes_away_our_own_socket_only(tmp_path: Path, listen: Listen) -> None:
    ours, path = Endpoint(tmp_path / "csi.sock"), tmp_path / "csi.sock"
    ours.place(listen)
    ours.remove()
    ours.remove()
    assert os.listdir(tmp_path) == []
    ours.place(listen)
    path.rename(tmp_path / "kept")  # its inode number stays in use
    listen(path)
    ours.remove()
    assert answers(path)


def test_remove_without_place_does_nothing(tmp_path: Path, listen: Listen) -> None:
    listen(tmp_path / "csi.sock")
    Endpoint(tmp_path / "csi.sock").remove()
    assert answers(tmp_path / "csi.sock")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/run/a/csi.sock", "/run/a/csi.sock"),
        ("unix:///run/csi.sock", "/run/csi.sock"),
        ("unix:/csi.sock", "/csi.sock"),
    ],
)
def test_endpoints_are_read(text: str, path: str) -> None:
    assert endpoint_path(text) == Path(path)


@pytest.mark.parametrize("text", ["", "csi.sock", "unix:csi.sock", "unix://host/csi.sock", "tcp://h:1", "/", "/a/../b"])
def test_endpoints_that_are_no_absolute_path_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="absolute path"):
        endpoint_path(text)


def test_the_longest_endpoint_works_and_the_next_one_is_refused(tmp_path: Path, listen: Listen) -> None:
    with pytest.raises(InvalidArgument, match="at most 102 bytes"):
        endpoint_path("/" + "x" * 102)
    most = 102 - len(str(tmp_path)) - 1
    assert most > 0, "the temporary folder's name is too long for this test"
    path = endpoint_path(str(tmp_path / ("x" * most)))
    Endpoint(path).place(listen)
    assert answers(path)


def test_addresses_for_grpc_are_quoted() -> None:
    assert address_of(Path("/run/a b%20#?/csi.sock")) == "unix:/run/a%20b%2520%23%3F/csi.sock"


@pytest.mark.parametrize(
    ("text", "read"), [("127.0.0.1:80", ("127.0.0.1", 80)), (":9090", ("", 9090)), ("[::1]:65535", ("::1", 65535))]
)
def test_addresses_are_read(text: str, read: tuple[str, int]) -> None:
    assert host_and_port(text) == read


@pytest.mark.parametrize(
    "text", ["", "host", "host:", "host:0", "host:65536", "host:x", "::1:80", "[host]:80", "host:-1"]
)
def test_addresses_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="host:port"):
        host_and_port(text)
