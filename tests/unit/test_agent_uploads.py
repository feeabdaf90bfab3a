"""Uploads as an agent takes them: piece by piece, for one Image, and never half for whole."""

import errno
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from csi_driver.agent.uploads import Uploads, limit_of
from csi_driver.images.checksum import Checksum
from csi_driver.kube.kinds import Json
from csi_driver.model.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    OutOfRange,
    ResourceExhausted,
    VolumeBusy,
)
from tests.image_clones import sha256


@pytest.fixture
def came() -> list[str]:
    return []


@pytest.fixture
def uploads(tmp_path: Path, came: list[str]) -> Uploads:
    return Uploads(tmp_path / "uploads", came.append)


def test_pieces_make_a_whole(uploads: Uploads, came: list[str]) -> None:
    assert uploads.receive("disk", "uid", 0, 10, 4, io.BytesIO(b"0123")) == 4
    assert (uploads.received("disk", "uid"), uploads.whole("disk", "uid"), came) == (4, None, [])
    assert uploads.receive("disk", "uid", 4, 10, 6, io.BytesIO(b"456789")) == 10
    whole = uploads.whole("disk", "uid")
    assert whole is not None
    assert (whole.read_bytes(), came) == (b"0123456789", ["disk"])
    assert uploads.whole("disk", "another") is None
    uploads.forget("disk", "uid")
    assert not whole.exists()


def test_what_came_before_the_cut_is_kept_and_gone_on_with(uploads: Uploads) -> None:
    with pytest.raises(Aborted, match="ended at byte 3; it goes on there"):
        uploads.receive("disk", "uid", 0, 10, 10, io.BytesIO(b"012"))
    with pytest.raises(OutOfRange, match="goes on at byte 3, not at 0"):
        uploads.receive("disk", "uid", 0, 10, 10, io.BytesIO(b"0123456789"))
    assert uploads.receive("disk", "uid", 3, 10, 7, io.BytesIO(b"3456789")) == 10


def test_half_is_never_taken_for_the_whole(uploads: Uploads) -> None:
    uploads.receive("disk", "uid", 0, 10, 4, io.BytesIO(b"0123"))
    with pytest.raises(FailedPrecondition, match="begun with 10 bytes in all and goes on with 6"):
        uploads.receive("disk", "uid", 4, 6, 2, io.BytesIO(b"45"))
    assert uploads.whole("disk", "uid") is None


A, B = b"0123456789", b"abcdefghij"


@pytest.mark.parametrize(
    ("announced", "said"), [(sha256(B), f"this one has {sha256(B)}"), (None, "of this one it is not told")]
)
def test_half_of_one_file_is_not_gone_on_with_by_another_one(
    uploads: Uploads, announced: Checksum | None, said: str
) -> None:
    uploads.receive("disk", "uid", 0, 10, 4, io.BytesIO(A[:4]), announced=sha256(A))
    with pytest.raises(FailedPrecondition, match=f"of another file, which has the checksum {sha256(A)}, and {said}"):
        uploads.receive("disk", "uid", 4, 10, 6, io.BytesIO(B[4:]), announced=announced)
    assert uploads.received("disk", "uid") == 4
    assert uploads.receive("disk", "uid", 4, 10, 6, io.BytesIO(A[4:]), announced=sha256(A)) == 10
    with pytest.raises(FailedPrecondition, match="of another file"):
        uploads.receive("disk", "uid", 0, 10, 10, io.BytesIO(B), announced=announced)
    whole = uploads.whole("disk", "uid")
    assert whole is not None
    assert (whole.read_bytes(), uploads.announced("disk", "uid"), uploads.total("disk", "uid")) == (A, sha256(A), 10)


def test_what_nobody_announced_is_held_to_what_is_announced_for_its_rest(uploads: Uploads) -> None:
    uploads.receive("disk", "uid", 0, 10, 4, io.BytesIO(A[:4]))
    assert (uploads.announced("disk", "uid"), uploads.total("disk", "uid")) == (None, 10)
    uploads.receive("disk", "uid", 4, 10, 2, io.BytesIO(A[4:6]), announced=sha256(A))
    assert uploads.announced("disk", "uid") == sha256(A)


def test_of_which_nothing_came_another_file_may_come(uploads: Uploads) -> None:
    for announced, total in ((sha256(A), 10), (None, 8), (sha256(B), 9)):
        with pytest.raises(Aborted):
            uploads.receive("disk", "uid", 0, total, total, io.BytesIO(), announced=announced)
        assert (uploads.announced("disk", "uid"), uploads.total("disk", "uid")) == (None, None)
    assert uploads.receive("disk", "uid", 0, 10, 10, io.BytesIO(A)) == 10
    assert uploads.announced("disk", "uid") is None


def test_more_than_the_image_may_have_is_refused_before_it_comes(uploads: Uploads) -> None:
    body = io.BytesIO(A)
    with pytest.raises(InvalidArgument, match=r"may have 9 bytes and 10 were to come; raise spec\.limit of the Image"):
        uploads.receive("disk", "uid", 0, 10, 10, body, most=9)
    assert (body.tell(), uploads.owned()) == (0, {})
    image: Json = {"spec": {"limit": "2Ti"}}
    assert (limit_of(image), limit_of({"spec": {}})) == (2 << 40, 1 << 40)


@pytest.mark.parametrize("limit", [9223372036854775807, "1025Ti", "99999999999Ti", "much"])
def test_a_limit_that_is_no_size_is_told(limit: int | str) -> None:
    with pytest.raises(InvalidArgument, match=rf"spec\.limit of the Image, {limit}, is no size of at most 1024Ti"):
        limit_of({"spec": {"limit": limit}})
    assert limit_of({"spec": {"limit": "1024Ti"}}) == 1 << 50


def test_what_an_earlier_image_of_the_name_got_is_not_this_ones(uploads: Uploads) -> None:
    uploads.receive("disk", "uid", 0, 10, 4, io.BytesIO(b"0123"))
    assert uploads.received("disk", "another") == 0
    assert uploads.receive("disk", "another", 0, 2, 2, io.BytesIO(b"ab")) == 2
    assert uploads.owned() == {"disk": "another"}
    uploads.forget("disk", "uid")  # the earlier one's copy is removed now
    assert uploads.received("disk", "another") == 2


def test_an_upload_that_is_forgotten_says_to_the_last_whose_it_was(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, real = os.listdir, os.unlink

    def unlink(path: Path) -> None:
        if path.name == "part":
            raise KeyboardInterrupt
        real(path)

    uploads.receive("disk", "uid", 0, 10, 4, io.BytesIO(A[:4]))
    with monkeypatch.context() as patch:
        patch.setattr("csi_driver.host.files.os.listdir", lambda path: sorted(listed(path)))
        patch.setattr("csi_driver.host.files.os.unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            uploads.forget("disk", "uid")
    assert uploads.owned() == {"disk": "uid"}
    uploads.forget("disk", "uid")
    assert (uploads.owned(), uploads.received("disk", "uid")) == ({}, 0)


@pytest.mark.parametrize(("start", "total", "length"), [(0, 0, 1), (5, 4, 1), (0, 4, 5), (-1, 4, 1)])
def test_what_is_no_part_of_an_image_is_refused(uploads: Uploads, start: int, total: int, length: int) -> None:
    with pytest.raises(InvalidArgument, match="are no part of an image"):
        uploads.receive("disk", "uid", start, total, length, io.BytesIO(b"x"))


def test_one_at_a_time(uploads: Uploads) -> None:
    begun, go = threading.Event(), threading.Event()

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            begun.set()
            go.wait(30)
            return super().read(size)

    first = threading.Thread(target=uploads.receive, args=("disk", "uid", 0, 4, 4, Slow(b"0123")))
    first.start()
    assert begun.wait(30)
    with pytest.raises(VolumeBusy, match="is being uploaded already"):
        uploads.receive("disk", "uid", 0, 4, 4, io.BytesIO(b"0123"))
    with pytest.raises(VolumeBusy):
        uploads.forget("disk", "another")
    go.set()
    first.join()
    assert uploads.whole("disk", "uid") is not None


class Sender(io.BytesIO):
    """Does something before each piece; of one byte each."""

    def __init__(self, content: bytes, before: Callable[[], None]) -> None:
        super().__init__(content)
        self._before = before

    def read(self, _size: int | None = -1, /) -> bytes:
        self._before()
        return super().read(1)


def test_an_upload_ends_with_the_image_that_it_is_for_and_with_no_other(uploads: Uploads) -> None:
    """Else it would hold its deletion for as long as it takes, and go on filling the disk."""
    uids = iter(["another", "another", "uid"])

    def forget() -> None:
        with pytest.raises(VolumeBusy):
            uploads.forget("disk", next(uids))

    with pytest.raises(Aborted, match=r"image disk is not wanted any more"):
        uploads.receive("disk", "uid", 0, 10, 10, Sender(b"0123456789", forget))
    assert next(uids, None) is None
    uploads.forget("disk", "uid")
    assert uploads.owned() == {}
    uploads.receive("disk", "new", 0, 10, 10, io.BytesIO(b"0123456789"))


def test_what_would_fill_the_disk_is_refused_before_most_of_it_has_come(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the node is filled to its last GiB, and all of it is thrown away and begins anew on the next one."""
    room = SimpleNamespace(f_bavail=10 << 20, f_frsize=1024, f_blocks=100 << 20)  # 10 GiB free of 100, 1 GiB is kept
    monkeypatch.setattr("csi_driver.images.room.os", SimpleNamespace(fstatvfs=lambda _: room))
    with pytest.raises(ResourceExhausted, match=rf"for image disk: {(9 << 30) + 1} bytes are wanted, {10 << 30} bytes"):
        uploads.receive("disk", "uid", 0, (9 << 30) + 1, 4, io.BytesIO(b"0123"))
    assert uploads.received("disk", "uid") == 0
    assert uploads.receive("disk", "uid", 0, 9 << 30, 4, io.BytesIO(b"0123")) == 4
    room.f_bavail -= 1
    with pytest.raises(ResourceExhausted):
        uploads.receive("disk", "uid", 4, 9 << 30, 4, io.BytesIO(b"0123"))


def test_a_piece_that_there_is_no_room_for_is_remembered_until_another_one_comes(
    uploads: Uploads, came: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int, what: str, _wanted: int) -> None:
        raise ResourceExhausted(f"no space is left {what}")

    def broken(_descriptor: int, _what: str, _wanted: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for check, said in (
        (full, "no space is left for image disk"),
        (
            broken,
            "no space is left for image disk (ENOSPC, No space left on device); make room on the disk of this node",
        ),
    ):
        monkeypatch.setattr("csi_driver.agent.uploads.check_room", check)
        with pytest.raises(ResourceExhausted):
            uploads.receive("disk", "uid", 0, 10, 10, io.BytesIO(b"0123456789"))
        assert uploads.refused("disk", "uid") == said
        assert uploads.refused("disk", "another") == ""
    assert came == ["disk"] * 3  # the second one went on, and was refused too
    monkeypatch.undo()
    uploads.came = lambda name: came.append(f"{name}: {uploads.refused(name, 'uid')}")
    with pytest.raises(Aborted):
        uploads.receive("disk", "uid", 0, 10, 10, io.BytesIO(b"012"))
    assert uploads.refused("disk", "uid") == ""
    assert came[3:] == ["disk: "]  # else the agent has it awaited elsewhere, and what came is thrown away
    uploads.receive("disk", "uid", 3, 10, 2, io.BytesIO(b"34"))
    assert came[4:] == []
