"""A descriptor handed on over a unix socket: who gets it, and what is said where it cannot be."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.host.handle import Handle
from csi_driver.host.passing import Passing, receive, remove_dead
from csi_driver.model.errors import Aborted, CommandFailed, DeadlineExceeded, DeviceMismatch, PermissionDenied

WORDS = {"volume": "pvc-1"}


def root(_: socket.socket) -> int:
    return 0


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A path that is longer than a socket's name may be."""
    folder = tmp_path / ("a" * 60) / ("b" * 60)
    folder.mkdir(parents=True)
    return folder / "socket"


@contextmanager
def a_file(folder: Path) -> Iterator[Handle]:
    path = folder / "file"
    path.write_bytes(b"content")
    with Handle(os.open(path, os.O_RDWR | os.O_CLOEXEC), str(path)) as handle:
        yield handle


@contextmanager
def answering(path: Path, content: bytes, descriptors: list[int]) -> Iterator[None]:
    """Somebody else who listens there and answers so."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        listening.bind(f"/proc/self/fd/{descriptor}/{path.name}")
        os.close(descriptor)
        listening.listen()

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                if content or descriptors:
                    socket.send_fds(connection, [content], descriptors)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield
        thread.join(20)


def wait_for_descriptors(number: int) -> None:
    """Who hands on closes its end of a connection by itself, a moment later."""
    deadline = time.monotonic() + 30
    while len(os.listdir("/proc/self/fd")) != number:
        assert time.monotonic() < deadline, "a descriptor was kept"
        time.sleep(0.01)


def test_what_is_no_block_device_is_refused_and_no_descriptor_is_kept(place: Path) -> None:
    with a_file(place.parent) as handle, Passing(place, handle, WORDS, root):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(
                DeviceMismatch, match=r"expected to hand on a block device and handed on a regular file"
            ):
                receive(place, "the device of volume pvc-1", peer=root)
        wait_for_descriptors(before)


def test_who_is_not_root_gets_nothing(place: Path) -> None:
    with (
        a_file(place.parent) as handle,
        Passing(place, handle, WORDS, lambda _: 1000),
        pytest.raises(Aborted, match=r"ended just now"),
    ):
        receive(place, "the device of volume pvc-1", peer=root)


def test_nothing_is_taken_from_who_is_not_root(place: Path) -> None:
    with (
        a_file(place.parent) as handle,
        Passing(place, handle, WORDS, root),
        pytest.raises(PermissionDenied, match=r"the socket .* is user 1000's and not root's; remove it"),
    ):
        receive(place, "the device of volume pvc-1", peer=lambda _: 1000)


def test_nobody_there_is_tried_again(place: Path) -> None:
    with pytest.raises(Aborted, match=r"the device of volume pvc-1: nobody holds it at .*socket now"):
        receive(place, "the device of volume pvc-1")
    with pytest.raises(Aborted):
        receive(place.parent / "nix" / "socket", "the device")
    with a_file(place.parent) as handle, Passing(place, handle, WORDS, root):
        pass
    assert not place.exists()


def test_a_socket_that_a_killed_holder_left_is_tried_again_and_replaced(place: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from csi_driver.host.handle import Handle; "
        "from csi_driver.host.passing import Passing; "
        "Passing(Path(sys.argv[1]), Handle(os.open('/dev/null', os.O_RDONLY), 'null'), {}).__enter__(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(place)], check=False).returncode == 9
    assert place.is_socket()
    with pytest.raises(Aborted, match=r"nobody holds it"):
        receive(place, "the device of volume pvc-1")
    with a_file(place.parent) as handle, Passing(place, handle, WORDS, root), pytest.raises(DeviceMismatch):
        receive(place, "the device of volume pvc-1", peer=root)


def test_who_ends_takes_no_other_ones_socket_away(place: Path) -> None:
    with a_file(place.parent) as handle:
        with Passing(place, handle, WORDS, root):
            later = Passing(place, handle, WORDS, root)
            later.__enter__()
        assert place.is_socket()
        with pytest.raises(DeviceMismatch):
            receive(place, "the device of volume pvc-1", peer=root)
        later.__exit__()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"volume": 1}', b"x" * 5000])
def test_other_answers_are_refused_and_no_descriptor_is_kept(place: Path, content: bytes) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with (
        a_file(place.parent) as handle,
        answering(place, content or b"{}", [handle.fd, handle.fd]),
        pytest.raises(CommandFailed, match=r"something that no holder of a device says"),
    ):
        receive(place, "the device of volume pvc-1", peer=root)
    wait_for_descriptors(before)


def test_who_does_not_answer_is_not_waited_for(place: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        descriptor = os.open(place.parent, os.O_PATH | os.O_DIRECTORY)
        listening.bind(f"/proc/self/fd/{descriptor}/{place.name}")
        os.close(descriptor)
        listening.listen()
        with pytest.raises(DeadlineExceeded, match=r"who holds it does not answer at .*socket; look at its log"):
            receive(place, "the device of volume pvc-1", seconds=0.2, peer=root)


def test_many_ask_at_once(place: Path) -> None:
    found: list[str] = []

    def ask() -> None:
        try:
            receive(place, "the device", seconds=60, peer=root)
        except DeviceMismatch as error:
            found.append(str(error))

    with a_file(place.parent) as handle, Passing(place, handle, WORDS, root):
        threads = [threading.Thread(target=ask) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(found) == 20


def test_a_socket_that_nobody_answers_at_goes_and_one_that_is_answered_stays(place: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        descriptor = os.open(place.parent, os.O_PATH | os.O_DIRECTORY)
        dead.bind(f"/proc/self/fd/{descriptor}/{place.name}")
        os.close(descriptor)
    remove_dead(place)
    assert not list(place.parent.iterdir())
    remove_dead(place)
    with a_file(place.parent) as device, Passing(place, device, WORDS, root):
        remove_dead(place)
        with pytest.raises(DeviceMismatch):  # it answers; a file is no device
            receive(place, "it", peer=root)


def test_a_socket_that_takes_the_place_of_a_dead_one_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.touch()
    answers = iter([False, True])
    monkeypatch.setattr("csi_driver.host.passing._answers", lambda _: next(answers))
    inode = place.stat().st_ino
    remove_dead(place)
    assert [each.stat().st_ino for each in place.parent.iterdir()] == [inode]
